"""The face of an open image: threads, forks, modes, fences, full hosts, and what happens outside the lock."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cowfence.crash.images import tagged
from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import BLOCKED, Request, Verb
from cowfence.errors import Closed, CowfenceError, NoSpace, ReadOnly, WouldBlock
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import CacheMode, Options, Qcow2Disk, open_image
from cowfence.storage.base import Buffer, Storage, WritableBuffer
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Fence, OpLog, Write
from cowfence.storage.record import RecordingStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import KIB, MIB, SECTOR_BYTES
from crash.scenarios import CLUSTER, OPTIONS, TIGHT, compressed, image, short_l1, written
from judges import run

WAIT_SECONDS = 20.0


def fresh(size: int, cluster_bytes: int) -> bytes:
    storage = MemoryStorage(name="image")
    write_new(storage, NewImage(size, cluster_bytes))
    return storage.snapshot()


def opened(storage: Storage, options: Options = OPTIONS) -> Qcow2Disk:
    return open_image(storage, backing=None, writable=True, options=options)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(number)`` in ``count`` threads; the first error of any is raised here."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def check(path: Path) -> None:
    run(["qemu-img", "check", "-q", "-f", "qcow2", path])


# Threads


@pytest.mark.parametrize("cache_tables", [1, 2, 64])
def test_threads_on_disjoint_regions(cache_tables: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    region, threads = 160 * KIB, 8
    path.write_bytes(fresh(region * threads, 512))
    options = Options(cache_bytes=cache_tables * 512, commit_interval=0.01)
    disk = opened(FileStorage.open(path, writable=True), options)
    models = [bytearray(region) for _ in range(threads)]

    def work(number: int) -> None:
        chance, model, base = random.Random(number), models[number], number * region
        for _ in range(120):
            offset = chance.randrange(region)
            length = min(chance.randrange(1, 6000), region - offset)
            match chance.randrange(7):
                case 0 | 1 | 2:
                    data = chance.randbytes(length)
                    disk.write(base + offset, data)
                    model[offset : offset + length] = data
                case 3:
                    disk.zero(base + offset, length, unmap=chance.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                case 4:
                    disk.flush()
                case 5:
                    data = chance.randbytes(min(length, 512))
                    outcome = disk.submit([Request(Verb.WRITE, base + offset, len(data), data)], wait=False)[0]
                    if outcome is BLOCKED:
                        disk.write(base + offset, data)
                    model[offset : offset + len(data)] = data
                case _:
                    assert disk.read(base + offset, length) == model[offset : offset + length]

    in_threads(threads, work)
    assert disk.read(0, disk.size) == b"".join(models)
    disk.close()
    check(path)
    with open_image(FileStorage.open(path), backing=None, writable=False) as again:
        assert again.read(0, again.size) == b"".join(models)


class SlowFences(StorageWrapper):
    """Fences that take a while, as on a disk."""

    def fence(self, mark: str) -> None:
        time.sleep(0.004)
        self.inner.fence(mark)


def test_flushes_share_commits() -> None:
    disk = opened(SlowFences(MemoryStorage(fresh(2 * MIB, 4096), "image")))
    threads, rounds = 8, 10

    def work(number: int) -> None:
        for at in range(rounds):
            disk.write((number * rounds + at) * 8192, b"x" * 8192)
            disk.flush()

    in_threads(threads, work)
    assert disk.fences < threads * rounds, "alone each flush makes two fences"
    disk.close()


# Forks


def in_child(disk: Qcow2Disk, ask: Callable[[Qcow2Disk], list[str]]) -> list[str]:
    """What ``ask`` answers in a forked child, which then closes the disk and lets it go."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        answers = ask(disk)
        disk.close()
        gc.collect()
        sender.send(answers)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert receiver.poll(WAIT_SECONDS), "the child hangs"
    answers = receiver.recv()
    process.join(WAIT_SECONDS)
    assert process.exitcode == 0
    assert isinstance(answers, list)
    return answers


def use_in_every_way(disk: Qcow2Disk) -> list[str]:
    """Every call that is not refused, by name."""
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: disk.read(0, 512),
        "read_into": lambda: disk.read_into(0, bytearray(512)),
        "write": lambda: disk.write(0, b"child"),
        "fua": lambda: disk.write(0, b"child", fua=True),
        "zero": lambda: disk.zero(0, 4096),
        "discard": lambda: disk.discard(0, 4096),
        "flush": disk.flush,
        "commit": disk.commit,
        "extents": lambda: list(disk.extents(0, 4096)),
        "info": disk.info,
    }
    accepted = []
    for name, call in calls.items():
        try:
            call()
        except Closed:
            continue
        accepted.append(name)
    requests = [Request(verb, 0, 512, bytes(512)) for verb in Verb]
    for wait in (False, True):
        accepted += ["submit" for outcome in disk.submit(requests, wait=wait) if not isinstance(outcome, Closed)]
    return accepted


def test_fork_under_load(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(fresh(2 * MIB, 4096))
    disk = opened(FileStorage.open(path, writable=True), Options(cache_bytes=4096, commit_interval=0.01))
    ended = threading.Event()
    models = [bytearray(512 * KIB) for _ in range(4)]

    def work(number: int) -> None:
        chance = random.Random(number)
        while not ended.is_set():
            at = chance.randrange(511) * KIB
            data = chance.randbytes(KIB)
            disk.write(number * 512 * KIB + at, data)
            models[number][at : at + KIB] = data
            if chance.random() < 0.2:
                disk.flush()

    def fork_often(_: int) -> None:
        try:
            for _ in range(5):
                assert in_child(disk, use_in_every_way) == []
        finally:
            ended.set()

    in_threads(5, lambda number: work(number) if number < 4 else fork_often(number))
    assert disk.read(0, disk.size) == b"".join(models)
    disk.close()
    check(path)


def test_child_writes_nothing_and_unlocks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(fresh(MIB, 4096))
    disk = opened(FileStorage.open(path, writable=True))
    disk.write(0, b"flushed")
    disk.flush()
    disk.write(64 * KIB, b"pending")
    before = path.read_bytes()
    assert in_child(disk, use_in_every_way) == []
    assert path.read_bytes() == before
    refused = run(["qemu-img", "info", path], check=False)
    assert refused.returncode
    assert "lock" in refused.stderr
    disk.flush()
    assert disk.read(64 * KIB, 7) == b"pending"
    disk.close()
    check(path)


# Modes and fences


@contextmanager
def counted(content: bytes, options: Options = OPTIONS) -> Iterator[tuple[Qcow2Disk, Callable[[], int]]]:
    """A disk, and how many fences its storage has seen since the last question."""
    plan = FaultPlan()
    disk = opened(FaultyStorage(MemoryStorage(content, "image"), plan), options)
    seen = 0

    def fences() -> int:
        nonlocal seen
        new, seen = plan.calls[Kind.FENCE] - seen, plan.calls[Kind.FENCE]
        return new

    assert fences() == 1, "opening for writing begins with a fence"
    yield disk, fences
    disk.close()


def test_fences_of_a_flush() -> None:
    with counted(image()) as (disk, fences):
        disk.flush()
        assert fences() == 0
        disk.write(0, b"a" * 8 * CLUSTER)
        assert fences() == 0
        disk.flush()
        assert fences() == 2
        disk.write(0, b"b" * 2 * CLUSTER)
        disk.flush()
        assert fences() == 1
        disk.write(0, b"c" * CLUSTER)
        disk.write(20 * CLUSTER, b"c" * CLUSTER)
        disk.discard(2 * CLUSTER, CLUSTER)
        disk.zero(3 * CLUSTER, CLUSTER)
        disk.flush()
        assert fences() == 2
        disk.flush()
        assert fences() == 0
        disk.discard(4 * CLUSTER, CLUSTER)
        disk.flush()
        fences()
        disk.close()
        assert fences() == 1, "what was freed is fenced at the end"


def test_write_through_fences_each_write() -> None:
    with counted(image(), Options(cache_bytes=64 * CLUSTER, mode=CacheMode.WRITETHROUGH)) as (disk, fences):
        for change, expected in (
            (lambda: disk.write(0, b"a" * CLUSTER), 2),
            (lambda: disk.write(0, b"b" * CLUSTER), 1),
            (lambda: disk.zero(0, CLUSTER), 2),
            (lambda: disk.discard(0, CLUSTER), 0),
            (lambda: disk.write(0, b"a" * CLUSTER), 2),
            (lambda: disk.discard(0, CLUSTER), 2),
            (lambda: disk.submit([Request(Verb.WRITE, 0, CLUSTER, b"c" * CLUSTER)]), 2),
            (lambda: disk.submit([Request(Verb.WRITE, 0, CLUSTER, b"d" * CLUSTER)]), 1),
        ):
            change()
            assert fences() == expected
        assert disk.submit([Request(Verb.WRITE, 0, CLUSTER, b"e" * CLUSTER)], wait=False) == [BLOCKED]


def test_unsafe_makes_no_fence() -> None:
    with counted(image(), Options(cache_bytes=CLUSTER, mode=CacheMode.UNSAFE, commit_interval=0.01)) as (disk, fences):
        for cluster in (0, 70, 1, 71):
            disk.write(cluster * CLUSTER, b"a" * CLUSTER, fua=True)
            disk.flush()
        disk.discard(0, 4 * CLUSTER)
        assert disk.submit([Request(Verb.FLUSH)], wait=False) == [None]
        disk.close()
        assert fences() == 0


def test_forced_unit_access() -> None:
    with counted(image()) as (disk, fences):
        disk.write(0, b"a" * CLUSTER, fua=True)
        assert fences() == 2
        disk.write(0, b"b" * CLUSTER, fua=True)
        assert fences() == 1
        disk.zero(0, CLUSTER, fua=True)
        assert fences() == 2
        request = Request(Verb.WRITE, 0, CLUSTER, b"c" * CLUSTER, fua=True)
        assert disk.submit([request], wait=False) == [BLOCKED]
        assert fences() == 0
        assert disk.submit([request]) == [None]
        assert fences() == 2
        assert disk.submit([Request(Verb.DISCARD, 0, CLUSTER, fua=True)]) == [None]
        assert fences() == 2


def test_idle_writes_are_committed() -> None:
    memory = MemoryStorage(image(), "image")
    disk = opened(memory, Options(cache_bytes=64 * CLUSTER, commit_interval=0.03))
    for round_ in range(3):
        fences = disk.fences
        data = tagged(0, 4 * CLUSTER, round_)
        if round_ == 1:
            assert disk.submit([Request(Verb.WRITE, 0, 512, data[:512])], wait=False) == [None]
        disk.write(0, data)
        disk.write((10 + round_) * CLUSTER, b"new" * 100)
        until(lambda fences=fences: disk.fences >= fences + 2)  # type: ignore[misc]
        left = open_image(MemoryStorage(memory.snapshot(), "copy", writable=False), backing=None, writable=False)
        assert left.read(0, 4 * CLUSTER) == data
    disk.close()


# Autoclear


@pytest.mark.parametrize("how", ["in place", "new", "zero", "discard", "submit", "submit later"])
def test_autoclear_bits_are_cleared_before_the_first_change(how: str) -> None:
    content = bytearray(written(image(), (0, 4 * CLUSTER)))
    struct.pack_into(">Q", content, 88, 1 << 5)
    log = OpLog()
    disk = opened(RecordingStorage(MemoryStorage(bytes(content), "image"), log))
    assert disk.read(0, CLUSTER)
    disk.flush()
    assert len(log.operations()) == 1, "reading changes nothing"
    request = Request(Verb.WRITE, 0, CLUSTER, b"w" * CLUSTER)
    match how:
        case "in place":
            disk.write(0, b"w" * CLUSTER)
        case "new":
            disk.write(20 * CLUSTER, b"w" * CLUSTER)
        case "zero":
            disk.zero(0, CLUSTER)
        case "discard":
            disk.discard(0, CLUSTER)
        case "submit":
            assert disk.submit([request]) == [None]
        case _:
            assert disk.submit([request], wait=False) == [BLOCKED]
            assert len(log.operations()) == 1
            assert disk.submit([request]) == [None]
    disk.flush()
    operations = log.operations()
    cleared = next(at for at, operation in enumerate(operations) if isinstance(operation, Write) and operation.offset == 72)
    write = operations[cleared]
    assert isinstance(write, Write)
    assert write.data[16:24] == bytes(8)
    assert not any(isinstance(operation, Write) for operation in operations[:cleared])
    assert isinstance(operations[cleared + 1], Fence)
    headers = [operation for operation in operations if isinstance(operation, Write) and operation.offset == 72]
    assert len(headers) == 1
    disk.close()


# Caches and full hosts


def test_read_with_a_pinned_cache_needs_no_commit() -> None:
    content = written(image(), (0, 2 * CLUSTER), (70 * CLUSTER, 2 * CLUSTER))
    with counted(content, TIGHT) as (disk, fences):
        disk.write(10 * CLUSTER, b"pins the one table")
        for offset in (0, 70 * CLUSTER, 71 * CLUSTER + 5, CLUSTER):
            assert disk.read(offset, 300) == tagged(offset // 512 * 512, CLUSTER * 2, 90)[offset % 512 :][:300]
            assert disk.submit([Request(Verb.READ, offset, 5)], wait=False) != [BLOCKED]
        assert len(list(disk.extents(0, disk.size))) > 3
        assert fences() == 0
        disk.write(72 * CLUSTER, b"another table")
        assert fences() == 2


class FullHost(StorageWrapper):
    """A host without room behind ``end``."""

    def __init__(self, inner: Storage, end: int) -> None:
        super().__init__(inner)
        self.end = end

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if offset + sum(map(len, buffers)) > self.end:
            raise NoSpace(f"{self.name}: no room")
        self.inner.writev(offset, buffers, mark)


@pytest.mark.parametrize("release", ["discard", "zero"])
def test_full_host_gets_the_space_of_what_was_freed(release: str) -> None:
    memory = MemoryStorage(image(), "image")
    storage = FullHost(memory, 60 * CLUSTER)
    disk = opened(storage)
    cluster = 0
    with suppress(NoSpace):
        while True:
            disk.write(cluster * CLUSTER, tagged(cluster * CLUSTER, CLUSTER, 1))
            cluster += 1
    assert cluster > 40
    disk.flush()
    with pytest.raises(NoSpace):
        disk.write(cluster * CLUSTER, b"x" * CLUSTER)
    if release == "discard":
        disk.discard(0, 20 * CLUSTER)
    else:
        disk.zero(0, 20 * CLUSTER)
    # Not flushed: what was freed is in use on disk until the write itself has it committed.
    for at in range(cluster, cluster + 15):
        disk.write(at * CLUSTER, tagged(at * CLUSTER, CLUSTER, 2))
    disk.close()
    assert fatal_findings(memory.snapshot()) == []
    again = open_image(MemoryStorage(memory.snapshot(), "image"), backing=None, writable=False)
    assert again.read(0, 20 * CLUSTER) == bytes(20 * CLUSTER)
    assert again.read(cluster * CLUSTER, 15 * CLUSTER) == tagged(cluster * CLUSTER, 15 * CLUSTER, 2)


class SmallHost(StorageWrapper):
    """A host with room for ``blocks`` blocks of 512 bytes more than the file has."""

    def __init__(self, inner: Storage, blocks: int) -> None:
        super().__init__(inner)
        self._held = set(range(inner.size() // SECTOR_BYTES))
        self._most = len(self._held) + blocks

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        end = offset + sum(map(len, buffers))
        held = self._held | set(range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)))
        if len(held) > self._most:
            raise NoSpace(f"{self.name}: no room")
        self._held = held
        self.inner.writev(offset, buffers, mark)


@pytest.mark.parametrize("blocks", range(6, 90, 3))
def test_what_was_acknowledged_on_a_host_that_fills_up_can_be_committed(blocks: int) -> None:
    """New tables and refcount blocks have their host space before a write that relies on them returns."""
    memory = MemoryStorage(image(refcount_bits=64, size=4096 * CLUSTER), "image")
    disk = opened(SmallHost(memory, blocks))
    rng = random.Random(blocks)
    kept = {}
    failures = 0
    while failures < 5:
        at = rng.randrange(4096) if rng.random() < 0.3 else rng.randrange(64)
        try:
            disk.write(at * CLUSTER, tagged(at * CLUSTER, CLUSTER, 1))
            kept[at] = tagged(at * CLUSTER, CLUSTER, 1)
        except NoSpace:
            failures += 1
    disk.close()
    assert fatal_findings(memory.snapshot()) == []
    again = open_image(MemoryStorage(memory.snapshot(), "image"), backing=None, writable=False)
    assert {at: again.read(at * CLUSTER, CLUSTER) for at in kept} == kept


def test_batch_on_a_full_host() -> None:
    """Only what does not fit fails; the rest of the batch is done."""
    disk = opened(FullHost(MemoryStorage(image(), "image"), 40 * CLUSTER))
    requests = [Request(Verb.WRITE, at * CLUSTER, CLUSTER, tagged(at * CLUSTER, CLUSTER, 1)) for at in range(60)]
    outcomes = disk.submit(requests)
    failed = [at for at, outcome in enumerate(outcomes) if outcome is not None]
    assert 15 < len(failed) < 45
    assert all(isinstance(outcomes[at], NoSpace) for at in failed)
    for at in range(60):
        expected = bytes(CLUSTER) if at in failed else tagged(at * CLUSTER, CLUSTER, 1)
        assert disk.read(at * CLUSTER, CLUSTER) == expected
    disk.flush()
    disk.close()


# Outside the lock


class ColdHost(StorageWrapper):
    """Pages are in memory once they were written, or read by a call that waits; a seeded hand throws some of them out.

    ``delay_seconds``: how long a read that has to wait takes.
    """

    def __init__(self, inner: Storage, seed: int, *, forget: float, delay_seconds: float = 0.0) -> None:
        super().__init__(inner)
        self._chance = random.Random(seed)
        self._forget = forget
        self._delay_seconds = delay_seconds
        self._warm: set[int] = set()
        self.refused = 0

    def _pages(self, offset: int, length_bytes: int) -> range:
        return range(offset // SECTOR_BYTES, (offset + length_bytes - 1) // SECTOR_BYTES + 1)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        pages = self._pages(offset, sum(map(len, buffers)))
        if not wait and not self._warm.issuperset(pages):
            self.refused += 1
            raise WouldBlock(f"{self.name}: cold")
        if wait:
            if self._delay_seconds:
                time.sleep(self._delay_seconds * self._chance.random())
            self._warm.update(pages)
        if self._chance.random() < self._forget:
            self._warm = {page for page in list(self._warm) if self._chance.random() < 0.5}
        return self.inner.readv(offset, buffers, wait=wait)

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        self.inner.writev(offset, buffers, mark)
        self._warm.update(self._pages(offset, sum(map(len, buffers))))


def aged(size: int = 256 * CLUSTER) -> bytes:
    return compressed(written(image(size=size), (0, 100 * CLUSTER)), 3 * CLUSTER)


@pytest.mark.parametrize("forget", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("cache_tables", [1, 64])
def test_cold_host_against_a_model(cache_tables: int, forget: float) -> None:
    memory = MemoryStorage(aged(), "image")
    storage = ColdHost(memory, 1, forget=forget)
    disk = opened(storage, Options(cache_bytes=cache_tables * CLUSTER, commit_interval=None))
    model = bytearray(disk.read(0, disk.size))
    chance = random.Random(2)
    for _ in range(500):
        offset = chance.randrange(disk.size)
        length = min(chance.randrange(1, 5 * CLUSTER), disk.size - offset)
        match chance.randrange(6):
            case 0:
                buffer = bytearray(length)
                try:
                    disk.read_into(offset, buffer, wait=False)
                except WouldBlock:
                    disk.read_into(offset, buffer)
                assert buffer == model[offset : offset + length]
            case 1:
                data = chance.randbytes(length)
                disk.write(offset, data)
                model[offset : offset + length] = data
            case 2:
                disk.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            case 3:
                data = chance.randbytes(length)
                requests = [Request(Verb.WRITE, offset, length, data), Request(Verb.READ, (offset + length) % disk.size, 1)]
                for at, outcome in enumerate(disk.submit(requests, wait=False)):
                    if outcome is BLOCKED:
                        outcome = disk.submit([requests[at]])[0]
                    assert not isinstance(outcome, CowfenceError)
                model[offset : offset + length] = data
            case 4:
                assert sum(extent.length_bytes for extent in disk.extents(offset, length)) == length
                disk.flush()
            case _:
                assert disk.read(offset, length) == model[offset : offset + length]
    assert storage.refused > (20 if forget else 0)
    assert disk.read(0, disk.size) == model
    disk.close()
    assert fatal_findings(memory.snapshot()) == []


def test_cold_readers_meet_no_foreign_data() -> None:
    """Readers wait for the host outside the lock while writers replace, discard and flush what they read: a sector holds what
    was written to that very sector, or zeros."""
    memory = MemoryStorage(aged(), "image")
    disk = opened(ColdHost(memory, 3, forget=0.5, delay_seconds=0.002), Options(cache_bytes=2 * CLUSTER, commit_interval=None))
    clusters = disk.size // CLUSTER
    end = time.monotonic() + 2.0

    def work(number: int) -> None:
        chance, serial = random.Random(number), 0
        while time.monotonic() < end:
            cluster = chance.randrange(clusters)
            span = min(chance.randrange(1, 12), clusters - cluster)
            offset, length = cluster * CLUSTER, span * CLUSTER
            if number < 3:
                data = disk.read(offset, length)
                for at in range(span):
                    sector = data[at * CLUSTER : (at + 1) * CLUSTER]
                    assert sector == bytes(CLUSTER) or sector.startswith(f"sector {cluster + at} write ".encode())
                continue
            serial += 1
            match chance.randrange(4):
                case 0:
                    disk.discard(offset, length)
                case 1:
                    disk.flush()
                case _:
                    disk.write(offset, tagged(offset, length, number * 1000 + serial))

    in_threads(6, work)
    disk.close()
    assert fatal_findings(memory.snapshot()) == []


class Gate(StorageWrapper):
    """Reads of one host range wait at a gate, outside the lock; without waiting it is cold."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.range = range(0)
        self.reached = threading.Event()
        self.opened = threading.Event()

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        if offset in self.range and threading.current_thread() is not threading.main_thread():
            if not wait:
                raise WouldBlock(f"{self.name}: cold")
            self.reached.set()
            assert self.opened.wait(WAIT_SECONDS)
        return self.inner.readv(offset, buffers, wait=wait)


@pytest.mark.parametrize("what", ["plain", "compressed"])
@pytest.mark.parametrize("change", ["discard", "zero", "zero and write", "write"])
def test_cluster_of_a_read_is_not_reused_before_it_ends(what: str, change: str) -> None:
    content = written(image(), (0, 4 * CLUSTER))
    if what == "compressed":
        content = compressed(content, 0)
    l1 = struct.unpack_from(">Q", content, 40)[0]
    l2 = struct.unpack_from(">Q", content, l1)[0] & (1 << 56) - 512
    host = struct.unpack_from(">Q", content, l2)[0] & (1 << 50) - 1
    gate = Gate(MemoryStorage(content, "image"))
    gate.range = range(host // CLUSTER * CLUSTER, host // CLUSTER * CLUSTER + CLUSTER)
    disk = opened(gate)
    old, new = tagged(0, CLUSTER, 90), tagged(0, CLUSTER, 1)
    answer: list[bytes] = []
    reader = threading.Thread(target=lambda: answer.append(disk.read(0, CLUSTER)))
    reader.start()
    assert gate.reached.wait(WAIT_SECONDS)
    match change:
        case "discard":
            disk.discard(0, CLUSTER)
        case "write":
            disk.write(0, new)
        case _:
            disk.zero(0, CLUSTER)
            disk.flush()
    if change == "zero and write":
        disk.write(0, new)
    disk.flush()
    # Foreign data for every cluster that is free: the freed one must not be among them yet.
    for cluster in range(10, 30):
        disk.write(cluster * CLUSTER, tagged(cluster * CLUSTER, CLUSTER, 2))
    disk.flush()
    gate.opened.set()
    reader.join(WAIT_SECONDS)
    assert answer
    assert answer[0] in (old, new), answer[0][:30]
    if not (what == "plain" and change == "write"):
        assert answer[0] == old
        # Now it is free, and used first.
        disk.write(40 * CLUSTER, tagged(40 * CLUSTER, CLUSTER, 3))
        disk.flush()
        extent = next(iter(disk.extents(40 * CLUSTER, CLUSTER)))
        assert extent.host_offset == gate.range.start
    disk.close()


def test_space_freed_in_the_call_that_needs_it_is_handed_out_once() -> None:
    """The commit that a write needs frees clusters of a block that was never scanned. The write's own scan then found them,
    while they were on their way to be punched and handed out: the new L1 table was punched.
    """
    memory = MemoryStorage(short_l1(written(image(), (0, 4 * CLUSTER))), "image")
    disk = opened(memory)
    disk.discard(0, 4 * CLUSTER)
    disk.write(70 * CLUSTER, tagged(70 * CLUSTER, 3 * CLUSTER, 1))
    disk.write(0, tagged(0, 4 * CLUSTER, 2))
    disk.flush()
    assert disk.read(0, 4 * CLUSTER) == tagged(0, 4 * CLUSTER, 2)
    disk.close()
    assert fatal_findings(memory.snapshot()) == []
    again = opened(memory := MemoryStorage(memory.snapshot(), "image"))
    assert again.read(70 * CLUSTER, 3 * CLUSTER) == tagged(70 * CLUSTER, 3 * CLUSTER, 1)
    assert again.read(0, 4 * CLUSTER) == tagged(0, 4 * CLUSTER, 2)
    again.close()


def test_nothing_reaches_the_host_after_a_failed_fence() -> None:
    """Not even space that a read gives free when it ends."""
    content = written(image(), (0, 4 * CLUSTER))
    plan = FaultPlan(kinds={Kind.FENCE}, error=errno.EIO)
    gate = Gate(FaultyStorage(MemoryStorage(content, "image"), plan))
    l1 = struct.unpack_from(">Q", content, 40)[0]
    l2 = struct.unpack_from(">Q", content, l1)[0] & (1 << 56) - 512
    host = struct.unpack_from(">Q", content, l2)[0] & (1 << 56) - 512
    gate.range = range(host, host + CLUSTER)
    disk = opened(gate)
    reader = threading.Thread(target=lambda: disk.read(0, CLUSTER))
    reader.start()
    assert gate.reached.wait(WAIT_SECONDS)
    disk.discard(0, CLUSTER)
    disk.flush()
    disk.write(20 * CLUSTER, b"new" * 100)
    plan.nth = plan.matched + 1
    with pytest.raises(CowfenceError, match="fence"):
        disk.flush()
    changes = {kind: count for kind, count in plan.calls.items() if kind is not Kind.READ}
    gate.opened.set()
    reader.join(WAIT_SECONDS)
    with pytest.raises(ReadOnly, match="a fence failed"):
        disk.close()
    assert {kind: count for kind, count in plan.calls.items() if kind is not Kind.READ} == changes


def test_calls_meet_a_close() -> None:
    """A close while others work: each call is done or raises Closed, and what was acknowledged is there."""
    for seed in range(12):
        memory = MemoryStorage(image(size=512 * CLUSTER), "image")
        disk = opened(memory, Options(cache_bytes=CLUSTER, commit_interval=None))
        done: list[tuple[int, bytes]] = []

        def work(number: int, disk: Qcow2Disk = disk, done: list[tuple[int, bytes]] = done, seed: int = seed) -> None:
            if not number:
                time.sleep(random.Random(seed).random() * 0.03)
                disk.close()
                return
            for cluster in range((number - 1) * 128, number * 128):
                data = tagged(cluster * CLUSTER, CLUSTER, number)
                try:
                    disk.write(cluster * CLUSTER, data)
                    done.append((cluster, data))
                    if not cluster % 5:
                        disk.flush()
                        disk.read(cluster * CLUSTER, CLUSTER)
                except Closed:
                    return

        in_threads(5, work)
        again = open_image(MemoryStorage(memory.snapshot(), "image"), backing=None, writable=False)
        for cluster, data in done:
            assert again.read(cluster * CLUSTER, CLUSTER) == data
        assert fatal_findings(memory.snapshot()) == []


def test_open_file_is_the_callers_when_opening_fails(tmp_path: Path) -> None:
    path = tmp_path / "image"
    content = bytearray(image())
    struct.pack_into(">Q", content, 40, 1 << 40)
    path.write_bytes(content)
    storage = FileStorage.open(path, writable=True)
    with pytest.raises(CowfenceError):
        opened(storage)
    assert os.fstat(storage.fileno())
    storage.close()
