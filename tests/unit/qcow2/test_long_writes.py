"""Long writes leave the lock to others while the host takes their data: what those do meanwhile, and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import Request, Verb
from cowfence.errors import Closed, NoSpace, ReadOnly, StorageFailed
from cowfence.ops.snapshot import create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.replay import replay
from cowfence.storage.base import Buffer
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import KIB, MIB

CLUSTER = 64 * KIB
DISK_BYTES = 16 * MIB
LONG = 512 * KIB


class Between(StorageWrapper):
    """``then`` is called once, when the next data call has been made and before it returns."""

    def __init__(self) -> None:
        self.memory = MemoryStorage(name="image")
        super().__init__(self.memory)
        self.then: Callable[[], None] | None = None
        self.at_fence: Callable[[], None] = lambda: None
        self.calls: list[str] = []
        self.failing: dict[str, Exception] = {}

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        super().writev(offset, buffers, mark)
        self.calls.append(mark)
        if mark == "data.write" and self.then is not None:
            then, self.then = self.then, None
            then()
        if mark in self.failing:
            raise self.failing.pop(mark)

    def fence(self, mark: str) -> None:
        self.calls.append(mark)
        self.at_fence()
        if mark in self.failing:
            raise self.failing.pop(mark)
        super().fence(mark)


@pytest.fixture
def storage() -> Between:
    storage = Between()
    write_new(storage, NewImage(DISK_BYTES, CLUSTER))
    return storage


@pytest.fixture
def disk(storage: Between) -> Iterator[Qcow2Disk]:
    """With its L2 table in memory, durable."""
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
    disk.write(DISK_BYTES - 512, b"\xff" * 512)
    disk.flush()
    yield disk
    disk.close()


def long_write(cluster: int = 0, fill: bytes = b"L", length: int = LONG, within: int = 0) -> Request:
    return Request(Verb.WRITE, cluster * CLUSTER + within, length, fill * length)


def reopened(storage: Between, offset: int, length: int) -> bytes:
    assert fatal_findings(storage.memory.snapshot()) == []
    with open_image(MemoryStorage(storage.memory.snapshot(), "image"), backing=None, writable=False) as again:
        return again.read(offset, length)


def test_the_lock_is_free_and_nothing_is_seen_before_its_end(disk: Qcow2Disk, storage: Between) -> None:
    seen: list[object] = []

    def then() -> None:
        seen.append(disk.planning)
        seen.append(disk.read(0, LONG) == bytes(LONG))
        seen.append(next(iter(disk.extents(0, LONG))).present)

    storage.then = then
    assert disk.submit([long_write()]) == [None]
    assert seen == [False, True, False]
    assert disk.read(0, LONG) == b"L" * LONG
    disk.flush()
    assert reopened(storage, 0, LONG) == b"L" * LONG


def test_a_flush_in_between_does_not_cover_it_and_the_next_one_does(disk: Qcow2Disk, storage: Between) -> None:
    def then() -> None:
        disk.write(LONG, b"other")
        disk.flush()

    storage.then = then
    storage.calls.clear()
    disk.submit([long_write()])
    disk.flush()
    linked = [number for number, mark in enumerate(storage.calls) if mark == "l2.link"]
    assert len(linked) == 2
    # The data, its fence, and only then what leads there.
    first_data = storage.calls.index("data.write")
    fences = [number for number, mark in enumerate(storage.calls) if mark == "prepare.fence"]
    assert first_data < fences[0] < linked[0] < fences[1] < linked[1]
    assert reopened(storage, 0, LONG + 5) == b"L" * LONG + b"other"


@pytest.mark.parametrize("meanwhile", ["short", "long", "zero", "discard", "batch"])
def test_whoever_else_writes_there(disk: Qcow2Disk, storage: Between, meanwhile: str) -> None:
    """Any order is right, but nothing may be torn inside of what was written, and nothing else hit."""
    free = disk._state.allocator.free

    def then() -> None:
        if meanwhile == "short":
            disk.write(CLUSTER + 512, b"S" * 512)
        elif meanwhile == "batch":
            assert disk.submit([Request(Verb.WRITE, CLUSTER + 512, 512, b"S" * 512)], wait=False) == [None]
        elif meanwhile == "long":
            assert disk.submit([long_write(2, b"S")]) == [None]
        elif meanwhile == "zero":
            disk.zero(CLUSTER, CLUSTER, unmap=False)
        else:
            disk.discard(CLUSTER, 3 * CLUSTER)

    storage.then = then
    assert disk.submit([long_write()]) == [None]
    # It was acknowledged last.
    assert disk.read(0, LONG) == b"L" * LONG
    rest = disk.read(LONG, DISK_BYTES - 512 - LONG)
    assert rest == (b"S" * 2 * CLUSTER + bytes(len(rest) - 2 * CLUSTER) if meanwhile == "long" else bytes(len(rest)))
    assert disk._state.allocator.free == free - (10 if meanwhile == "long" else 8)
    disk.flush()
    assert reopened(storage, 0, LONG) == b"L" * LONG


def test_clusters_are_nobody_elses_meanwhile(disk: Qcow2Disk, storage: Between) -> None:
    def then() -> None:
        assert disk.submit([long_write(100, b"S", MIB)]) == [None]

    storage.then = then
    assert disk.submit([long_write(), long_write(20, b"M", LONG - 700, within=300)]) == [None, None]
    assert disk.read(0, LONG) == b"L" * LONG
    assert disk.read(100 * CLUSTER, MIB) == b"S" * MIB
    assert disk.read(20 * CLUSTER, LONG) == bytes(300) + b"M" * (LONG - 700) + bytes(400)


@pytest.mark.parametrize("lost", ["table", "block", "room"])
def test_what_it_was_planned_with_may_be_gone(disk: Qcow2Disk, storage: Between, lost: str) -> None:
    state, commits = disk._state, disk.statistics()["commits"]

    def then() -> None:
        if lost == "table":
            state.l2.tables.clear()
        elif lost == "block":
            state.refcounts.blocks.tables.clear()
        else:
            state.quarantine_limit = -1
            storage.at_fence = lambda: setattr(state, "quarantine_limit", 1000)

    storage.then = then
    assert disk.submit([long_write()]) == [None]
    assert disk.read(0, LONG) == b"L" * LONG
    assert (disk.statistics()["commits"] > commits) == (lost == "room")
    disk.flush()
    assert reopened(storage, 0, LONG) == b"L" * LONG


def test_an_alteration_waits_for_it(disk: Qcow2Disk, storage: Between) -> None:
    done = threading.Event()

    def snapshot() -> None:
        create_snapshot(disk, "s")
        done.set()

    thread = threading.Thread(target=snapshot)

    def then() -> None:
        thread.start()
        assert not done.wait(0.1)

    storage.then = then
    assert disk.submit([long_write()]) == [None]
    thread.join(10)
    assert done.is_set()
    disk.write(0, b"later")
    disk.flush()
    with open_image(MemoryStorage(storage.memory.snapshot(), "image"), backing=None, writable=False, snapshot="s") as then_:
        assert then_.read(0, LONG) == b"L" * LONG
    assert reopened(storage, 0, LONG) == b"later" + b"L" * (LONG - 5)


def test_closing_waits_for_it_and_makes_it_durable(disk: Qcow2Disk, storage: Between) -> None:
    thread = threading.Thread(target=disk.close)

    def then() -> None:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()

    storage.then = then
    assert disk.submit([long_write()]) == [None]
    thread.join(10)
    assert not thread.is_alive()
    assert reopened(storage, 0, LONG) == b"L" * LONG
    assert isinstance(disk.submit([long_write()])[0], Closed)


def test_a_fence_that_failed_meanwhile(disk: Qcow2Disk, storage: Between) -> None:
    """Nothing more reaches the host, and nothing is acknowledged."""

    def then() -> None:
        disk.write(LONG, b"other")
        storage.failing["prepare.fence"] = StorageFailed("image", "fence", 0, OSError(5, "I/O error"))
        with pytest.raises(StorageFailed):
            disk.flush()

    storage.then = then
    (outcome,) = disk.submit([long_write()])
    assert isinstance(outcome, ReadOnly)
    assert disk.read(0, LONG) == bytes(LONG)
    with pytest.raises(ReadOnly):
        disk.close()
    assert reopened(storage, 0, LONG) == bytes(LONG)


@pytest.mark.parametrize("error", [StorageFailed("image", "write", 0, OSError(5, "I/O error")), NoSpace("image: full")])
def test_one_of_a_batch_fails(disk: Qcow2Disk, storage: Between, error: Exception) -> None:
    """A full host is tried once more, the way of ``write``: a commit may have freed something."""
    free = disk._state.allocator.free
    storage.failing["data.write"] = error
    outcomes = disk.submit([long_write(), long_write(20), long_write(40)])
    assert outcomes[1:] == [None, None]
    assert (outcomes[0] is None) == isinstance(error, NoSpace)
    assert disk._state.allocator.free == free - (16 if outcomes[0] else 24)
    disk.flush()
    assert reopened(storage, 20 * CLUSTER, LONG) == b"L" * LONG
    assert reopened(storage, 0, LONG) == (bytes(LONG) if outcomes[0] else b"L" * LONG)


def test_a_keeper_hears_of_it(storage: Between) -> None:
    journal = Journal.new(bytearray(MIB))
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None), journal=journal)
    disk.write(DISK_BYTES - 512, b"\xff" * 512)
    assert disk.submit([long_write()]) == [None]
    left = MemoryStorage(storage.memory.snapshot(), "image")
    replay(left, Journal(bytearray(journal.snapshot())))
    assert fatal_findings(left.snapshot()) == []
    with open_image(left, backing=None, writable=False) as again:
        assert again.read(0, LONG) == b"L" * LONG
    disk.close()


def test_many_at_once(disk: Qcow2Disk, storage: Between) -> None:
    """Threads that write long and short, flush, discard and read, over one another's clusters but not bytes."""
    failures: list[BaseException] = []
    last: dict[int, int] = {}

    def worker(number: int) -> None:
        try:
            for turn in range(12):
                mark = number * 16 + turn + 1
                # Neighbours share the cluster in between: each writes from its middle to the middle of a later one.
                start = number * 2 * MIB + CLUSTER // 2
                data = bytes((mark,)) * (2 * MIB)
                assert disk.submit([Request(Verb.WRITE, start, len(data), data)]) == [None]
                last[number] = mark
                assert disk.read(start, len(data)) == data
                if turn % 3 == number % 3:
                    disk.flush()
                if turn < 11:
                    disk.discard(start + CLUSTER, len(data) - 2 * CLUSTER)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    disk.flush()
    for number in range(6):
        assert reopened(storage, number * 2 * MIB + CLUSTER // 2, 2 * MIB) == bytes((last[number],)) * (2 * MIB)
