"""Clusters on their way from quarantine to availability, and who must not come in between.

The last holder of a ticket wakes whoever waits for all of them, and is the one that releases what had waited for it. It punches
outside the lock: an alteration that read the counts again meanwhile would find the same clusters free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import Request, Verb
from cowfence.ops.snapshot import create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.storage.base import Buffer, WritableBuffer
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import KIB, MIB

CLUSTER = 64 * KIB
DISK_BYTES = 32 * MIB


class Slow(StorageWrapper):
    """Its first long data call in a thread named "holder" waits for ``go_on``, and the next discard for ``punch``."""

    def __init__(self) -> None:
        self.memory = MemoryStorage(name="image")
        super().__init__(self.memory)
        self.holding, self.go_on = threading.Event(), threading.Event()
        self.punching, self.punch = threading.Event(), threading.Event()
        self.is_closed = False

    def _hold(self) -> None:
        if threading.current_thread().name == "holder" and not self.holding.is_set():
            self.holding.set()
            assert self.go_on.wait(10)

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if mark == "data.write":
            self._hold()
        super().writev(offset, buffers, mark)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        if sum(map(len, buffers)) >= MIB:
            self._hold()
        return super().readv(offset, buffers, wait=wait)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        if threading.current_thread().name == "holder":
            self.punching.set()
            assert self.punch.wait(10)
            assert not self.is_closed
        super().discard(offset, length_bytes, mark)

    def close(self) -> None:
        self.is_closed = True
        super().close()


@pytest.fixture
def storage() -> Slow:
    storage = Slow()
    write_new(storage, NewImage(DISK_BYTES, CLUSTER))
    return storage


@pytest.fixture
def disk(storage: Slow) -> Iterator[Qcow2Disk]:
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
    disk.write(0, b"a" * MIB)
    disk.write(4 * MIB, b"r" * 2 * MIB)
    disk.flush()
    yield disk
    disk.close()


def write_new_clusters(disk: Qcow2Disk) -> None:
    assert disk.submit([Request(Verb.WRITE, 8 * MIB, MIB, b"L" * MIB)]) == [None]


def write_in_place(disk: Qcow2Disk) -> None:
    assert disk.submit([Request(Verb.WRITE, 4 * MIB, MIB, b"L" * MIB)]) == [None]


def read(disk: Qcow2Disk) -> None:
    assert disk.read(4 * MIB, 2 * MIB) == b"r" * 2 * MIB


HOLDERS = pytest.mark.parametrize("hold", [write_new_clusters, write_in_place, read])


def _punching(disk: Qcow2Disk, storage: Slow, hold: Callable[[Qcow2Disk], None]) -> threading.Thread:
    """A holder of a ticket that has ended it, and is about to punch what had waited for it: the disk's first MiB."""
    holder = threading.Thread(target=hold, args=(disk,), name="holder")
    holder.start()
    assert storage.holding.wait(10)
    disk.discard(0, MIB)
    disk.flush()
    storage.go_on.set()
    assert storage.punching.wait(10)
    return holder


@HOLDERS
def test_an_alteration_waits_for_what_is_being_released(
    disk: Qcow2Disk, storage: Slow, hold: Callable[[Qcow2Disk], None]
) -> None:
    holder = _punching(disk, storage, hold)
    altering = threading.Thread(target=create_snapshot, args=(disk, "s"))
    altering.start()
    altering.join(0.1)
    assert altering.is_alive()
    storage.punch.set()
    altering.join(10)
    holder.join(10)
    assert not altering.is_alive()
    assert not holder.is_alive()
    disk.write(16 * MIB, b"N" * 2 * MIB)
    disk.write(24 * MIB, b"M" * 2 * MIB)
    disk.flush()
    assert disk.read(16 * MIB, 2 * MIB) == b"N" * 2 * MIB
    assert disk.read(24 * MIB, 2 * MIB) == b"M" * 2 * MIB
    assert fatal_findings(storage.memory.snapshot()) == []


@HOLDERS
def test_closing_waits_for_it_too(disk: Qcow2Disk, storage: Slow, hold: Callable[[Qcow2Disk], None]) -> None:
    holder = _punching(disk, storage, hold)
    closing = threading.Thread(target=disk.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    storage.punch.set()
    closing.join(10)
    holder.join(10)
    assert not closing.is_alive()
    assert fatal_findings(storage.memory.snapshot()) == []


@HOLDERS
def test_who_fails_in_the_end_is_not_waited_for(
    disk: Qcow2Disk, storage: Slow, hold: Callable[[Qcow2Disk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk._state.reclaimer, "release", fail)
        disk._state.reclaimer._quarantine.append((0, [], []))
        with pytest.raises(KeyboardInterrupt):
            hold(disk)
    create_snapshot(disk, "s")
    assert not storage.punching.is_set()


def test_a_very_long_batch() -> None:
    """It goes on operation by operation, and not one inside of another."""
    small = MemoryStorage(name="small")
    write_new(small, NewImage(DISK_BYTES, 512))
    disk = open_image(small, backing=None, writable=True, options=Options(commit_interval=None, long_write_bytes=512))
    # Its L2 tables are there, and empty.
    for offset in range(0, DISK_BYTES, 32 * KIB):
        disk.write(offset, b"x")
    disk.discard(0, DISK_BYTES)
    disk.flush()
    requests = [Request(Verb.WRITE, at, 31 * KIB, bytes((at >> 15 & 255,)) * 31 * KIB) for at in range(0, DISK_BYTES, 32 * KIB)]
    assert set(disk.submit(requests)) == {None}
    for request in requests[::97]:
        assert disk.read(request.offset, 31 * KIB) == request.data
    disk.close()
    assert fatal_findings(small.snapshot()) == []
