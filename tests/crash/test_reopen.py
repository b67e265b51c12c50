"""Kill, reopen, work, power cut: what a killed process wrote may stand in the page cache only (M32, and R9).

The dangerous path needs somebody who frees what the page cache says is free: leaks reclaimed after a kill in the middle of
LINK. The old cluster looks unreferenced, but the entry that leads to it may come back with a power cut.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from cowfence.crash.explore import Recording, Runner, Verdicts, explore
from cowfence.errors import CowfenceError, ReadOnly
from cowfence.qcow2.repair import Mode, repair
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.record import RecordingStorage
from cowfence.storage.wrapper import StorageWrapper
from crash.scenarios import CLUSTER, OPTIONS, W, compressed, image, open_plain, written


class _Killed(Exception):
    pass


class _NoOpenFence(StorageWrapper):
    """The mutant: opening and repairing begin without a fence."""

    def fence(self, mark: str) -> None:
        if mark not in ("open.fence", "repair.fence"):
            self.inner.fence(mark)


def _run(*, mutant: bool) -> tuple[bytes, Recording]:
    content = compressed(written(image(), (0, 4 * CLUSTER)), 0)

    def wrapped(storage: Storage) -> Storage:
        return _NoOpenFence(storage) if mutant else storage

    def opener(storage: Storage, writable: bool) -> Any:
        return open_plain(wrapped(storage) if writable else storage, writable)

    runner = Runner(content, opener)
    guest = runner.disk.read(0, runner.disk.size)
    # The first life ends when LINK is written and not fenced: in the page cache the new entry stands, on the disk perhaps not.
    runner.step(W(0))
    runner.log.note("flush.begin")
    with (
        mock.patch.object(RecordingStorage, "fence", _fence_that_kills),
        pytest.raises(_Killed),
    ):
        runner.disk.flush()
    runner.log.note("flush.lost")
    runner.memory = MemoryStorage(runner.memory.snapshot(), name="image")
    runner.storage = RecordingStorage(runner.memory, runner.log, "image")
    repair(wrapped(runner.storage), Mode.LEAKS)
    runner.disk = opener(runner.storage, True)
    runner.log.note("reopened", data=runner.disk.read(0, runner.disk.size))
    for step in (W(20), W(21), W(22), W(23)):
        runner.step(step)
    return content, Recording(content, guest, runner.log.entries())


_true_fence = RecordingStorage.fence


def _fence_that_kills(self: RecordingStorage, mark: str) -> None:
    if mark == "link.fence":
        raise _Killed
    _true_fence(self, mark)


def _judge(recording: Recording) -> Verdicts:
    return explore(recording, "power", lambda storage, writable: open_plain(storage, writable))


def test_leaks_reclaimed_after_a_kill_survive_a_power_cut() -> None:
    _, recording = _run(mutant=False)
    verdicts = _judge(recording)
    assert not verdicts.violations, str(verdicts.violations[0])


def test_no_fence_at_open_is_caught() -> None:
    """M32."""
    _, recording = _run(mutant=True)
    verdicts = _judge(recording)
    assert verdicts.violations
    assert verdicts.violations[0].clause in ("C1", "C3", "C5")


def test_a_failed_fence_is_not_called_again() -> None:
    """M28: a fence that failed once "succeeds" when it is called again, because the pages are gone. The image must say no."""
    content = written(image(), (0, CLUSTER))
    plan = FaultPlan(1, kinds=(Kind.FENCE,), marks=("prepare.fence",))
    memory = MemoryStorage(content, name="image")
    disk = open_plain(FaultyStorage(memory, plan), True, options=OPTIONS)
    disk.write(10 * CLUSTER, b"x" * CLUSTER)
    with pytest.raises(CowfenceError):
        disk.flush()
    before = memory.snapshot()
    for attempt in (disk.flush, lambda: disk.write(0, b"y" * CLUSTER), disk.flush):
        with pytest.raises(CowfenceError, match="fence failed"):
            attempt()
    # Nobody may believe that a disk was closed well whose last writes are lost; the file is released all the same.
    with pytest.raises(ReadOnly, match="fence failed"):
        disk.close()
    disk.close()
    assert memory.snapshot() == before
