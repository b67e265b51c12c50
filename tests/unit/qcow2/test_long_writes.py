"""Long writes leave the lock to others while the host takes their data: what those do meanwhile, and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import Request, Verb
from cowfence.errors import Closed, Corrupt, NoSpace, OutOfRange, ReadOnly, StorageFailed
from cowfence.ops.snapshot import create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.entries import COPIED
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


@pytest.mark.parametrize("meanwhile", ["nothing", "short", "long", "zero", "keep_zero", "discard"])
def test_in_place(disk: Qcow2Disk, storage: Between, meanwhile: str) -> None:
    """Over clusters that lie in pieces; what others let go of is nobody else's before the data is there."""
    for cluster in (3, 1, 0, 2, 7, 4, 5, 6, 8):
        disk.write(cluster * CLUSTER, b"o" * CLUSTER)
    disk.flush()

    def then() -> None:
        assert not disk.planning
        if meanwhile == "short":
            disk.write(CLUSTER + 512, b"S" * 512)
        elif meanwhile == "long":
            assert disk.submit([long_write(2, b"S")]) == [None]
        elif meanwhile == "zero":
            disk.zero(CLUSTER, CLUSTER)
        elif meanwhile == "keep_zero":
            disk.zero(CLUSTER, CLUSTER, unmap=False)
        elif meanwhile == "discard":
            disk.discard(CLUSTER, 3 * CLUSTER)
        disk.flush()
        # They would take what is free.
        assert disk.submit([long_write(100, b"N")]) == [None]

    storage.then = then
    storage.calls.clear()
    assert disk.submit([long_write(within=512)]) == [None]
    assert disk.read(100 * CLUSTER, LONG) == b"N" * LONG
    assert disk.read(0, 512) == b"o" * 512
    after = disk.read(512, LONG)
    if meanwhile == "nothing":
        assert after == b"L" * LONG
        # In the file the nine stand as 2, 1, 3, 0, 5 6 7, 4, 8.
        assert storage.calls.count("data.write") == 7 + 1
    else:
        assert set(after) <= set(b"LS\0")
    disk.flush()
    kept = disk.read(0, DISK_BYTES)
    assert reopened(storage, 0, DISK_BYTES) == kept


def test_in_place_in_one_call_and_flushed_afterwards(disk: Qcow2Disk, storage: Between) -> None:
    disk.submit([long_write()])
    disk.flush()
    storage.calls.clear()
    assert disk.submit([long_write(fill=b"M", length=LONG - 1000, within=500)]) == [None]
    assert storage.calls == ["data.write"]
    disk.flush()
    assert storage.calls == ["data.write", "data.fence"]
    assert reopened(storage, 0, LONG) == b"L" * 500 + b"M" * (LONG - 1000) + b"L" * 500


def test_in_place_while_a_flush_goes_on(disk: Qcow2Disk, storage: Between) -> None:
    """The fence of a flush that began before does not cover it, and the next flush makes one."""
    disk.submit([long_write()])
    disk.flush()
    storage.then = disk.flush
    storage.calls.clear()
    assert disk.submit([long_write(fill=b"M")]) == [None]
    disk.flush()
    assert storage.calls[-1] == "data.fence"
    assert storage.calls.index("data.write") < len(storage.calls) - 1


@pytest.mark.parametrize("error", [StorageFailed("image", "write", 0, OSError(5, "I/O error")), NoSpace("image: full")])
def test_in_place_that_fails(disk: Qcow2Disk, storage: Between, error: Exception) -> None:
    disk.submit([long_write(), long_write(20)])
    storage.failing["data.write"] = error
    outcomes = disk.submit([long_write(fill=b"M"), long_write(20, b"M")])
    assert outcomes == [None if isinstance(error, NoSpace) else error, None]
    assert disk.read(20 * CLUSTER, LONG) == b"M" * LONG


def test_what_a_snapshot_shares_is_not_written_in_place(disk: Qcow2Disk, storage: Between) -> None:
    disk.submit([long_write()])
    create_snapshot(disk, "s")
    assert disk.read(0, 1) == b"L"
    assert 0 in disk._tables
    assert disk.submit([long_write(fill=b"M")]) == [None]
    disk.flush()
    with open_image(MemoryStorage(storage.memory.snapshot(), "image"), backing=None, writable=False, snapshot="s") as then:
        assert then.read(0, LONG) == b"L" * LONG
    assert reopened(storage, 0, LONG) == b"M" * LONG


@pytest.mark.parametrize("leads", ["onto a table", "past the end"])
def test_an_entry_that_leads_where_no_data_is(disk: Qcow2Disk, storage: Between, leads: str) -> None:
    """A hostile image: nothing is written there."""
    disk.submit([long_write()])
    disk.flush()
    table = disk._tables[0]
    table.entries[3] = COPIED | (table.offset if leads == "onto a table" else 1 << 40)
    before = storage.memory.snapshot()
    (outcome,) = disk.submit([long_write(fill=b"M")])
    assert isinstance(outcome, Corrupt)
    assert storage.memory.snapshot()[: table.offset + CLUSTER] == before[: table.offset + CLUSTER]
    assert storage.memory.size() < 1 << 30


@pytest.mark.parametrize("offset", [DISK_BYTES - LONG + 1, DISK_BYTES, -1])
def test_past_the_end(disk: Qcow2Disk, storage: Between, offset: int) -> None:
    disk.submit([long_write(DISK_BYTES // CLUSTER - 8, length=LONG)])
    storage.calls.clear()
    (outcome,) = disk.submit([Request(Verb.WRITE, offset, LONG, b"x" * LONG)])
    assert isinstance(outcome, OutOfRange)
    assert not storage.calls


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
            disk.write(100 * CLUSTER, b"pending")
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
