"""The face of an image: threads, forks, modes, group commit, and reads that stay outside the lock."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import cowfence
from cowfence.errors import Closed, Locked, OutOfRange, WouldBlock
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import CacheMode, Options, Qcow2Disk, open_image
from cowfence.storage.base import Storage, WritableBuffer
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import OpLog, Write
from cowfence.storage.record import RecordingStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import MIB
from judges import run

CLUSTER = 4096
QUIET = Options(commit_interval=None)


def image(size: int = MIB, cluster_bytes: int = CLUSTER) -> MemoryStorage:
    storage = MemoryStorage(name="image")
    write_new(storage, NewImage(size, cluster_bytes))
    return storage


def opened(storage: Storage, options: Options = QUIET) -> Qcow2Disk:
    return open_image(storage, backing=None, writable=True, options=options)


def counted(options: Options = QUIET) -> tuple[Qcow2Disk, FaultPlan]:
    plan = FaultPlan()
    return opened(FaultyStorage(image(), plan), options), plan


def test_fences_of_a_flush() -> None:
    disk, plan = counted()
    plan.calls.clear()
    disk.flush()
    assert plan.calls[Kind.FENCE] == 0
    disk.write(0, b"new")
    disk.flush()
    assert plan.calls[Kind.FENCE] == 2
    disk.write(0, b"in place")
    disk.flush()
    assert plan.calls[Kind.FENCE] == 3
    disk.flush()
    assert plan.calls[Kind.FENCE] == 3
    disk.write(8, b"fua", fua=True)
    assert plan.calls[Kind.FENCE] == 4


def test_write_through_fences_each_write_and_unsafe_none() -> None:
    through, plan = counted(Options(mode=CacheMode.WRITETHROUGH))
    plan.calls.clear()
    through.write(0, b"new")
    through.write(0, b"in place")
    assert plan.calls[Kind.FENCE] == 3
    unsafe, plan = counted(Options(mode=CacheMode.UNSAFE, commit_interval=None))
    plan.calls.clear()
    unsafe.write(0, b"new", fua=True)
    unsafe.flush()
    unsafe.close()
    assert plan.calls[Kind.FENCE] == 0


def test_an_idle_guest_is_committed_after_the_interval() -> None:
    storage = image()
    disk = opened(storage, Options(commit_interval=0.05))
    disk.write(0, b"idle")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        again = open_image(MemoryStorage(storage.snapshot(), writable=False), backing=None, writable=False)
        if again.read(0, 4) == b"idle":
            break
        time.sleep(0.02)
    else:
        pytest.fail("nothing was committed")
    disk.close()


def test_autoclear_bits_are_gone_before_the_first_write() -> None:
    """R11: cleared and durable before any guest data, and left alone by a guest that only reads."""
    storage = image()
    storage.writev(88, [(1 << 40).to_bytes(8)], "test")
    log = OpLog()
    disk = opened(RecordingStorage(storage, log, "image"))
    disk.read(0, 512)
    disk.flush()
    assert not [entry for entry in log if isinstance(entry, Write)]
    disk.write(0, b"data")
    marks = [operation.mark for operation in log.operations()]
    assert marks.index("header.link") < marks.index("link.fence") < marks.index("data.write")
    assert storage.snapshot()[88:96] == bytes(8)


class _SlowFence(StorageWrapper):
    fences = 0

    def fence(self, mark: str) -> None:
        self.fences += 1
        time.sleep(0.01)
        self.inner.fence(mark)


def test_flushes_of_many_threads_share_commits() -> None:
    storage = _SlowFence(image())
    disk = opened(storage)

    def work(number: int) -> None:
        for turn in range(5):
            disk.write((number * 5 + turn) * CLUSTER, bytes([number]) * 512)
            disk.flush()

    _in_threads(16, work)
    assert storage.fences < 80, "80 flushes of two fences each would be 160"
    disk.close()


def _in_threads(count: int, work: object) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread hangs"
    assert not failures, failures[0]


def test_threads_on_their_own_regions() -> None:
    disk = opened(image(4 * MIB), Options(cache_bytes=2 * CLUSTER, commit_interval=0.01))
    region = 512 * 1024

    def work(number: int) -> None:
        rng = random.Random(number)
        model = bytearray(region)
        for _ in range(150):
            at = rng.randrange(region)
            length = rng.randrange(min(region - at, 20_000) + 1)
            match rng.randrange(5):
                case 0:
                    disk.zero(number * region + at, length)
                    model[at : at + length] = bytes(length)
                case 1:
                    assert disk.read(number * region + at, length) == model[at : at + length]
                case 2:
                    disk.flush()
                case _:
                    data = rng.randbytes(length)
                    disk.write(number * region + at, data)
                    model[at : at + length] = data
        assert disk.read(number * region, region) == model

    _in_threads(8, work)
    disk.close()


class _ColdReads(StorageWrapper):
    """Nothing is in the page cache: a read that may not wait is refused. ``inside`` runs in the next read that waits."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.warm: set[int] = set()
        self.inside: list[object] = []

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        page = offset // CLUSTER
        if not wait and page not in self.warm:
            raise WouldBlock("cold")
        if wait and self.inside:
            self.inside.pop()()  # type: ignore[operator]
        if page % 7:
            self.warm.add(page)
        return self.inner.readv(offset, buffers, wait=True)


def test_cold_reads_read_the_same() -> None:
    rng = random.Random(3)
    disk = opened(_ColdReads(image()), Options(cache_bytes=CLUSTER, commit_interval=None))
    model = bytearray(MIB)
    for _ in range(300):
        at = rng.randrange(MIB)
        length = rng.randrange(min(MIB - at, 3 * CLUSTER) + 1)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            disk.write(at, data)
            model[at : at + length] = data
        else:
            assert disk.read(at, length) == model[at : at + length]
        if rng.random() < 0.2:
            disk.flush()


def _read_while_its_cluster_is_freed(disk: Qcow2Disk, storage: _ColdReads) -> bytes:
    old, new = b"o" * CLUSTER, b"n" * CLUSTER
    disk.write(0, old)
    disk.flush()
    storage.warm.clear()
    disk.read(64 * CLUSTER, 1)
    storage.warm.clear()

    def meanwhile() -> None:
        disk.discard(0, CLUSTER)
        disk.flush()
        for cluster in range(1, 40):
            disk.write(cluster * CLUSTER, new)
        disk.flush()

    storage.inside.append(meanwhile)
    return disk.read(0, CLUSTER)


def test_a_planned_read_keeps_its_cluster() -> None:
    """M37: while a read is on its way, its cluster is freed, and others write; the read still gets old bytes, or zeros."""
    storage = _ColdReads(image())
    got = _read_while_its_cluster_is_freed(opened(storage, Options(commit_interval=None, discards=False)), storage)
    assert got in (b"o" * CLUSTER, bytes(CLUSTER))


def test_a_cluster_released_under_a_read_is_foreign_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the mutant: nobody waits for reads, and the read gets another cluster's bytes."""
    from cowfence.qcow2.state import Tickets

    monkeypatch.setattr(Tickets, "all_ended_before", lambda self, mark: True)  # noqa: ARG005
    storage = _ColdReads(image())
    got = _read_while_its_cluster_is_freed(opened(storage, Options(commit_interval=None, discards=False)), storage)
    assert got == b"n" * CLUSTER


def test_ctrl_c_inside_a_fence_loses_nothing() -> None:
    """The commit is taken back and done again by the next flush."""
    for mark in ("prepare.fence", "link.fence"):
        storage = image()
        interrupted: list[str] = []

        def interrupt(_kind: Kind, called: str, mark: str = mark, interrupted: list[str] = interrupted) -> None:
            if called == mark and not interrupted:
                interrupted.append(called)
                raise KeyboardInterrupt

        disk = opened(FaultyStorage(storage, FaultPlan(on_call=interrupt)))
        disk.write(0, b"kept")
        with pytest.raises(KeyboardInterrupt):
            disk.flush()
        disk.write(CLUSTER, b"later")
        disk.flush()
        disk.discard(0, CLUSTER)
        disk.write(2 * CLUSTER, b"last")
        disk.close()
        again = opened(MemoryStorage(storage.snapshot(), name="image"))
        assert again.read(CLUSTER, 5) == b"later"
        assert again.read(2 * CLUSTER, 4) == b"last"
        assert again.read(0, 4) == bytes(4)


def test_ranges_are_checked() -> None:
    disk = opened(image())
    for offset, length in ((-1, 1), (MIB, 1), (MIB - 1, 2), (1 << 70, 1)):
        with pytest.raises(OutOfRange):
            disk.read(offset, length)
        with pytest.raises(OutOfRange):
            disk.write(offset, bytes(length))
        with pytest.raises(OutOfRange):
            disk.discard(offset, length)
    assert disk.read(MIB, 0) == b""


def _child(disk: Qcow2Disk, results: multiprocessing.SimpleQueue[str]) -> None:
    for attempt in (
        lambda: disk.read(0, 512),
        lambda: disk.write(0, b"child"),
        lambda: disk.flush(),
        lambda: disk.discard(0, 4096),
        lambda: list(disk.extents(0, 4096)),
    ):
        try:
            attempt()
            results.put("no error")
        except Closed:
            results.put("Closed")
    disk.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_owns_nothing(tmp_path: Path) -> None:
    """Under load: the child's calls raise, and its close, collection and exit write nothing and unlock nothing."""
    path = tmp_path / "disk.qcow2"
    disk = cowfence.create(path, 8 * MIB)
    stop = threading.Event()
    written: dict[int, int] = {}

    def load() -> None:
        rng = random.Random(5)
        turn = 0
        while not stop.is_set():
            turn += 1
            block = rng.randrange(2000)
            disk.write(block * 4096, turn.to_bytes(4) * 1024)
            written[block] = turn
            if not turn % 50:
                disk.flush()

    worker = threading.Thread(target=load)
    worker.start()
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        results: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
        child = context.Process(target=_child, args=(disk, results))
        child.start()
        child.join(timeout=60)
        assert child.exitcode == 0
        assert [results.get() for _ in range(5)] == ["Closed"] * 5
        with pytest.raises(Locked):
            cowfence.open(path, writable=True)
    stop.set()
    worker.join()
    disk.close()
    assert run(["qemu-img", "check", str(path)]).returncode == 0
    with cowfence.open(path) as again:
        for block, turn in written.items():
            assert again.read(block * 4096, 4096) == turn.to_bytes(4) * 1024
