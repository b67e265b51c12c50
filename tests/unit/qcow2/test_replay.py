"""Killed after every step of every script: with the journal replayed, each acknowledged write is there.

A step is an entry of the recorder's log: a call issued, a call returned, notes published, a generation retired. At each the
file and the journal are copied, the journal is replayed on the copy, and the disk must be as it was at the last acknowledged
operation; where one was under way, each sector may be as it was before it or after it. The replay is killed after each of its
own steps too, and done again.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cowfence.crash.images import tagged
from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import BLOCKED, Request, Verb
from cowfence.errors import Corrupt, CowfenceError, StorageFailed
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.replay import replay
from cowfence.storage.fault import Arrived, FaultPlan, FaultyStorage, Kind
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Entry, OpLog
from cowfence.storage.record import RecordingStorage
from crash.orders import available_before_retired, published_before_the_data
from crash.scenarios import CLUSTER, compressed, image, short_l1, snapshotted, written
from fault.test_fault_loop import full_table

SECTOR = 512
JOURNAL_BYTES = 32768
QUIET = Options(cache_bytes=64 * CLUSTER, commit_interval=None)
TIGHT = Options(cache_bytes=CLUSTER, commit_interval=None)

Operation = tuple[str, int, int]
"""Verb, first cluster, clusters."""


@dataclass
class State:
    """What a kill leaves, and what the guest may then find: in each sector the bytes of ``before`` or of ``after``."""

    content: bytes
    journal: bytes
    step: str
    before: bytes = b""
    after: bytes = b""


@dataclass
class WatchedLog(OpLog):
    """A log that copies file and journal at each entry."""

    watch: Callable[[str], None] = field(default=lambda _: None)

    def __init__(self, watch: Callable[[str], None]) -> None:
        super().__init__()
        self.watch = watch

    def append(self, entry: Entry) -> int:
        position = super().append(entry)
        self.watch(str(entry)[:120])
        return position


class Run:
    """Carries out a script and keeps every state that a kill could leave."""

    def __init__(self, content: bytes, options: Options = QUIET, plan: FaultPlan | None = None) -> None:
        self.states: list[State] = []
        self.memory = MemoryStorage(content, "image")
        self.log = WatchedLog(self._watch)
        self.journal = Journal.new(bytearray(JOURNAL_BYTES), observe=self.log.note)
        recorder = RecordingStorage(self.memory, self.log, "image")
        storage = recorder if plan is None else FaultyStorage(recorder, plan)
        self.disk: Qcow2Disk = open_image(storage, backing=None, writable=True, options=options, journal=self.journal)
        self.seen = self.disk.read(0, self.disk.size)
        self._settled = 0
        self._serial = 0
        self.settle()

    def _watch(self, step: str) -> None:
        if hasattr(self, "journal"):
            self.states.append(State(self.memory.snapshot(), self.journal.snapshot(), step))

    def settle(self, *, failed: bool = False) -> None:
        """Everything up to here was acknowledged; or the last operation failed, and may have been done in part."""
        before, self.seen = self.seen, self.disk.read(0, self.disk.size)
        for state in self.states[self._settled :]:
            state.before, state.after = before, self.seen
        last = before if failed else self.seen
        self.states.append(State(self.memory.snapshot(), self.journal.snapshot(), "acknowledged", last, self.seen))
        self._settled = len(self.states)

    def __call__(self, operation: Operation) -> None:
        verb, cluster, clusters = operation
        offset, length_bytes = cluster * CLUSTER, clusters * CLUSTER
        self._serial += 1
        failed = False
        try:
            if verb == "write":
                self.disk.write(offset, tagged(offset, length_bytes, self._serial))
            elif verb == "part":
                self.disk.write(offset + 100, b"part %d" % self._serial)
            elif verb == "batch":
                self._batch(cluster, clusters)
            elif verb == "zero":
                self.disk.zero(offset, length_bytes)
            elif verb == "keep_zero":
                self.disk.zero(offset, length_bytes, unmap=False)
            elif verb == "discard":
                self.disk.discard(offset, length_bytes)
            else:
                self.disk.flush()
        except CowfenceError:
            failed = True
        self.settle(failed=failed)

    def inside(self, operation: Operation) -> None:
        """One operation inside a call of another, if it needs no commit of its own (one thread runs both)."""
        verb, cluster, _ = operation
        self.settle()
        self._serial += 1
        offset = cluster * CLUSTER
        if verb == "discard":
            request = Request(Verb.DISCARD, offset, CLUSTER)
        else:
            request = Request(Verb.WRITE, offset, CLUSTER, tagged(offset, CLUSTER, self._serial))
        self.disk.submit([request], wait=False)
        self.settle()

    def _batch(self, cluster: int, clusters: int) -> None:
        """Every cluster of the range by itself, in one batch, and the first of them twice."""
        requests = [
            Request(Verb.WRITE, number * CLUSTER, CLUSTER, tagged(number * CLUSTER, CLUSTER, self._serial))
            for number in [*range(cluster, cluster + clusters), cluster]
        ]
        outcomes = self.disk.submit(requests, wait=False)
        again = [request for request, outcome in zip(requests, outcomes, strict=True) if outcome is BLOCKED]
        for outcome in [*outcomes, *(self.disk.submit(again) if again else ())]:
            if isinstance(outcome, CowfenceError):
                raise outcome


class Judge:
    """Replays each distinct state once, by itself and killed at each step, and says what is wrong."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.replays = 0

    def __call__(self, state: State, *, nested: bool = True) -> str | None:
        key = hashlib.sha256(b"".join((state.content, state.journal, state.before, state.after))).digest()
        if key in self._seen:
            return None
        self._seen.add(key)
        inner: list[State] = []
        memory = MemoryStorage(state.content, "image")

        def watch(step: str) -> None:
            inner.append(
                State(memory.snapshot(), journal.snapshot(), f"{state.step}; replay: {step}", state.before, state.after)
            )

        log = WatchedLog(watch)
        journal = Journal(bytearray(state.journal), observe=log.note)
        done = replay(RecordingStorage(memory, log, "image"), journal)
        self.replays += 1
        if journal.poisoned:
            # What was flushed is all there is, and nothing may be built upon it.
            return None if memory.snapshot() == state.content else f"{state.step}: a poisoned journal was replayed"
        if done.failure is not None:
            return f"{state.step}: the replay failed: {done.failure}"
        wrong = self._look(memory.snapshot(), state)
        if wrong:
            return f"{state.step}: {wrong}"
        if nested:
            for nest in inner:
                wrong = self(nest, nested=False)
                if wrong:
                    return wrong
        return None

    def _look(self, content: bytes, state: State) -> str | None:
        found = fatal_findings(content)
        if found:
            return found[0]
        disk = open_image(MemoryStorage(content, "left"), backing=None, writable=True, options=QUIET)
        guest = disk.read(0, disk.size)
        for at in range(0, len(guest), SECTOR):
            sector = guest[at : at + SECTOR]
            if sector not in (state.before[at : at + SECTOR], state.after[at : at + SECTOR]):
                return f"guest sector {at // SECTOR} holds {sector[:24]!r}, not {state.after[at : at + 24]!r}"
        # Life goes on: an old, a new and the last cluster.
        for number in (0, 33, disk.size // CLUSTER - 1):
            data = tagged(number * CLUSTER, CLUSTER, 999)
            disk.write(number * CLUSTER, data)
            guest = guest[: number * CLUSTER] + data + guest[(number + 1) * CLUSTER :]
        disk.flush()
        if disk.read(0, disk.size) != guest:
            return "what is written after the replay lands elsewhere"
        found = fatal_findings(disk.storage.snapshot())  # type: ignore[attr-defined]
        return f"after the replay and a write: {found[0]}" if found else None


def first_wrong(run: Run, judge: Judge | None = None, *, nested: bool = True) -> str | None:
    judge = judge or Judge()
    return next((wrong for state in run.states if (wrong := judge(state, nested=nested))), None)


def violation(content: bytes, script: Sequence[Operation], options: Options = QUIET) -> str | None:
    run = Run(content, options)
    for operation in script:
        run(operation)
    return first_wrong(run)


FLUSH: Operation = ("flush", 0, 0)
USED = written(image(), (0, 4 * CLUSTER), (70 * CLUSTER, CLUSTER))
NEARLY_FULL = written(image(64, size=256 * CLUSTER), (0, 46 * CLUSTER))
SHARED = snapshotted(USED)
PACKED = compressed(USED, 0)

SCRIPTS: dict[str, tuple[bytes, list[Operation]]] = {
    "new": (image(), [("write", 0, 1), ("write", 5, 2), FLUSH, ("write", 64, 1), ("part", 9, 1)]),
    "two tables": (image(), [("write", 63, 2), FLUSH, ("write", 62, 3)]),
    "in place": (USED, [("write", 0, 1), FLUSH, ("part", 1, 1), ("write", 10, 1)]),
    "batch": (USED, [("batch", 0, 8), ("batch", 4, 8), FLUSH, ("batch", 60, 8)]),
    "compressed": (PACKED, [("write", 0, 1), ("write", 9, 1), FLUSH, ("write", 10, 2), ("part", 0, 1)]),
    "shared": (SHARED, [("part", 0, 1), ("write", 1, 1), FLUSH, ("write", 20, 1), ("write", 70, 1), ("write", 2, 1), FLUSH]),
    "discard": (USED, [("discard", 0, 2), ("write", 9, 1), FLUSH, ("write", 10, 2), ("discard", 9, 1), ("write", 9, 1)]),
    "zero": (USED, [("zero", 0, 2), ("write", 9, 1), FLUSH, ("write", 0, 1), ("zero", 70, 1), FLUSH, ("write", 70, 1)]),
    "keep zero": (USED, [("keep_zero", 0, 2), ("part", 0, 1), FLUSH, ("part", 1, 1)]),
    "zero on shared": (SHARED, [("zero", 0, 2), ("discard", 2, 1), FLUSH, ("write", 0, 4)]),
    "refcount block": (NEARLY_FULL, [("write", 60, 12), ("write", 100, 4), FLUSH, ("write", 120, 4)]),
    "refcount blocks": (NEARLY_FULL, [("write", 50, 100), ("write", 150, 100), ("discard", 60, 20), FLUSH, ("write", 10, 1)]),
    "one bit": (image(1), [("write", 0, 1), ("write", 1, 2), FLUSH, ("discard", 0, 1), FLUSH, ("write", 3, 1)]),
    "two bits": (image(2), [("write", 0, 2), ("discard", 0, 1), FLUSH, ("write", 3, 2)]),
    "longer L1": (short_l1(written(image(), (0, CLUSTER))), [("write", 70, 1), ("write", 0, 1), FLUSH, ("write", 71, 1)]),
    "version 2": (image(version=2), [("write", 0, 2), ("discard", 0, 1), ("zero", 1, 1), FLUSH, ("write", 1, 1)]),
}


@pytest.mark.parametrize("options", [QUIET, TIGHT], ids=["many tables", "one table"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_anywhere_nothing_acknowledged_is_lost(name: str, options: Options) -> None:
    content, script = SCRIPTS[name]
    assert violation(content, script, options) is None


def test_killed_while_the_refcount_table_grows() -> None:
    run = Run(full_table())
    for operation in [("write", 20, 2), ("write", 30, 10), FLUSH, ("write", 60, 12), ("discard", 20, 1), ("write", 90, 1)]:
        run(operation)
    tables = {content[48:56] for state in run.states if (content := state.content)}
    assert len(tables) == 2
    assert first_wrong(run) is None


@pytest.mark.parametrize("arrived", Arrived)
@pytest.mark.parametrize("keep_failing", [False, True])
@pytest.mark.parametrize("name", ["new", "compressed", "shared", "discard", "refcount block", "longer L1"])
def test_a_failed_call_then_a_kill(name: str, keep_failing: bool, arrived: Arrived) -> None:
    content, script = SCRIPTS[name]
    script = [*script, ("write", 12, 1), FLUSH, ("write", 13, 1), ("write", 0, 1)]
    nth = 1  # the fence at open
    judge = Judge()  # one for all: up to the call that fails the states are those of the run before
    while True:
        nth += 1
        plan = FaultPlan(nth, keep_failing=keep_failing, arrived=arrived)
        run = Run(content, plan=plan)
        for operation in script:
            run(operation)
        if not plan.failed:
            break
        assert first_wrong(run, judge, nested=False) is None, f"call {nth} failed"
    assert nth > 5


@pytest.mark.parametrize("inner", [("write", 30, 1), ("write", 0, 1), ("write", 1, 1), ("discard", 1, 1), ("discard", 0, 1)])
@pytest.mark.parametrize("name", ["new", "in place", "compressed", "shared", "discard", "zero", "keep zero"])
def test_an_operation_inside_each_fence_then_a_kill(name: str, inner: Operation) -> None:
    content, script = SCRIPTS[name]
    runs: list[Run] = []

    def on_call(kind: Kind, _mark: str) -> None:
        if kind is Kind.FENCE and runs:
            runs[0].inside(inner)

    run = Run(content, plan=FaultPlan(on_call=on_call))
    runs.append(run)
    for operation in script:
        run(operation)
    assert first_wrong(run) is None


@pytest.mark.parametrize("seed", range(int(os.environ.get("COWFENCE_KEEPER_WALKS", "28"))))
def test_a_walk_killed_anywhere(seed: int) -> None:
    rng = random.Random(seed)
    content = rng.choice([image(), USED, SHARED, PACKED, NEARLY_FULL, image(1), image(4)])
    plan = FaultPlan(rng.randrange(1, 60), arrived=rng.choice(list(Arrived)), kinds={Kind.WRITE}) if seed % 2 else FaultPlan()
    run = Run(content, rng.choice([QUIET, TIGHT]), plan=plan)
    for _ in range(25):
        verb = rng.choice(["write", "write", "part", "batch", "zero", "keep_zero", "discard", "flush"])
        run((verb, rng.choice([rng.randrange(8), rng.randrange(112)]), rng.randrange(1, 12)))
    assert first_wrong(run, nested=seed % 4 == 0) is None


def test_when_the_journal_is_full_the_operation_commits_first() -> None:
    run = Run(image(size=1024 * CLUSTER))
    for number in range(0, 1000, 2):
        run.disk.write(number * CLUSTER, bytes([1 + number % 255]) * CLUSTER)
    assert 2 <= run.disk.fences <= 20
    memory = MemoryStorage(run.memory.snapshot(), "image")
    assert replay(memory, Journal(bytearray(run.journal.snapshot()))).failure is None
    with open_image(memory, backing=None, writable=False) as left:
        for number in range(0, 1000, 2):
            assert left.read(number * CLUSTER, CLUSTER) == bytes([1 + number % 255]) * CLUSTER


def test_the_largest_clusters_and_tables_fit_into_the_journal(tmp_path: Path) -> None:
    """Every entry of the largest L2 table there is, in one call; what is noted for it is bounded by pieces."""
    path = tmp_path / "wide"
    path.touch()
    cluster_bytes = 2 << 20
    size = cluster_bytes << 18
    storage = FileStorage.open(path, writable=True, lock=False)
    write_new(storage, NewImage(size, cluster_bytes, preallocate_metadata=True))
    memory = bytearray(4 << 20)
    options = Options(commit_interval=None, quarantine_bytes=1 << 60)
    disk = open_image(storage, backing=None, writable=True, options=options, journal=Journal.new(memory))
    disk.write(cluster_bytes, b"before")
    disk.flush()
    fences = disk.fences
    disk.zero(0, size)
    disk.write(5 * cluster_bytes, b"after")
    assert fences < disk.fences
    copy = FileStorage.open(path, writable=True, lock=False)
    assert replay(copy, Journal(memory)).failure is None
    copy.close()
    with open_image(FileStorage.open(path, lock=False), backing=None, writable=False) as left:
        assert left.read(5 * cluster_bytes, 6) == b"after\0"
        assert left.read(cluster_bytes, 6) == bytes(6)
        assert [extent.start for extent in left.extents(0, size) if not extent.zero] == [5 * cluster_bytes]
    disk.close()


# The broken order M36 of the crash contract


@contextmanager
def acknowledged_before_published() -> Iterator[None]:
    with mock.patch.object(Journal, "publish"):
        yield


@pytest.mark.parametrize(
    ("order", "name"),
    [
        (available_before_retired, "shared"),
        (available_before_retired, "zero on shared"),
        (published_before_the_data, "new"),
        (published_before_the_data, "shared"),
        (acknowledged_before_published, "new"),
    ],
)
def test_m36_broken_orders_of_the_keeper_are_caught(order: Callable[[], Any], name: str) -> None:
    content, script = SCRIPTS[name]
    # The mutants are of the writer; the replay that judges them is the true one.
    with order():
        run = Run(content)
        for operation in script:
            run(operation)
    wrong = first_wrong(run)
    assert wrong is not None
    assert "the replay failed" not in wrong


# What the keeper must refuse


def pending_run() -> Run:
    run = Run(USED)
    run(("write", 10, 2))
    run(("write", 20, 1))
    return run


def replayed(run: Run, journal: Journal, plan: FaultPlan | None = None) -> tuple[CowfenceError | None, bytes]:
    memory = MemoryStorage(run.memory.snapshot(), "image")
    return replay(FaultyStorage(memory, plan), journal).failure, memory.snapshot()


def test_a_poisoned_journal_is_not_replayed() -> None:
    run = pending_run()
    run.journal.fence_begins()
    run.journal.fence_failed()
    failure, content = replayed(run, Journal(bytearray(run.journal.snapshot())))
    assert failure is not None
    assert "a fence failed" in str(failure)
    assert content == run.memory.snapshot()


def test_a_writer_that_died_inside_a_fence_is_replayed_only_if_ours_does_not_fail() -> None:
    run = pending_run()
    run.journal.fence_begins()
    failure, content = replayed(run, Journal(bytearray(run.journal.snapshot())))
    assert failure is None
    assert content != run.memory.snapshot()
    failure, content = replayed(run, Journal(bytearray(run.journal.snapshot())), FaultPlan(1, kinds={Kind.FENCE}))
    assert isinstance(failure, StorageFailed)
    assert content == run.memory.snapshot()


def test_a_closed_journal_is_left_alone() -> None:
    run = pending_run()
    run.journal.close()
    failure, content = replayed(run, Journal(bytearray(run.journal.snapshot())))
    assert failure is None
    assert content == run.memory.snapshot()


def test_a_note_that_would_land_on_another_table_changes_nothing() -> None:
    run = Run(USED)
    journal = Journal.new(bytearray(4096))
    # An L2 entry onto the header's cluster.
    journal.publish([2 << 59, 5])
    failure, content = replayed(run, journal)
    assert isinstance(failure, Corrupt)
    assert content == run.memory.snapshot()


def test_a_wrong_checksum_is_said_and_what_stands_before_it_is_done() -> None:
    run = pending_run()
    memory = bytearray(run.journal.snapshot())
    groups = list(Journal(memory).unretired())
    assert len(groups) == 2
    # The last word of the second group's notes.
    words = sum(len(group.notes) + 3 for group in groups)
    memory[(8 + words - 2) * 8] ^= 1
    failure, content = replayed(run, Journal(memory))
    assert "checksum" in str(failure)
    assert content != run.memory.snapshot()
    assert not fatal_findings(content)
