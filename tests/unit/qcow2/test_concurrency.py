"""What other threads do at the worst instants: between a count that fell and the release, and while the disk is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from cowfence import Request, Verb
from cowfence.errors import Closed
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.interval import IntervalCommit
from cowfence.storage.base import Buffer
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper
from helpers_check import QUIET

CLUSTER = 512
DISK_BYTES = 512 * 1024


class Interrupting(StorageWrapper):
    """Calls ``meanwhile`` once, as another thread would, before the first write or discard with ``mark``."""

    def __init__(self, inner: MemoryStorage, mark: str) -> None:
        super().__init__(inner)
        self._mark = mark
        self.meanwhile: Callable[[], None] | None = None

    def _interrupt(self, mark: str) -> None:
        if mark == self._mark and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        self._interrupt(mark)
        super().writev(offset, buffers, mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self._interrupt(mark)
        super().discard(offset, length_bytes, mark)


def _aged() -> MemoryStorage:
    """An image of many refcount blocks (64 counts each), which whoever opens it has still to scan."""
    storage = MemoryStorage(writable=True)
    write_new(storage, NewImage(DISK_BYTES, cluster_bytes=CLUSTER, refcount_bits=64))
    with open_image(storage, backing=None, writable=True, options=QUIET) as disk:
        for cluster in range(512):
            disk.write(cluster * CLUSTER, bytes([cluster % 251 + 1]) * CLUSTER)
    return MemoryStorage(storage.snapshot(), writable=True)


def _fill(disk: Qcow2Disk, first: int, count: int, value: int) -> None:
    for cluster in range(first, first + count):
        disk.write(cluster * CLUSTER, bytes([value]) * CLUSTER)


def _scan_all(disk: Qcow2Disk) -> None:
    """What writes do that need more clusters than the blocks scanned so far have free."""
    allocator = disk._state.allocator
    with disk._state.lock:
        while allocator._to_scan:
            allocator._scan(wait=True)


def _scan_between(mark: str) -> None:
    """Clusters are freed whose blocks were never scanned; a scan in the middle of their reclaim must not find them."""
    inner = _aged()
    storage = Interrupting(inner, mark)
    with open_image(storage, backing=None, writable=True, options=QUIET) as disk:
        disk.discard(300 * CLUSTER, 100 * CLUSTER)
        storage.meanwhile = lambda: _scan_all(disk)
        disk.flush()
        assert storage.meanwhile is None
        _fill(disk, 512, 200, 201)
        _fill(disk, 712, 200, 202)
        disk.flush()
        wanted = b"".join(bytes([cluster % 251 + 1]) * CLUSTER for cluster in range(300))
        wanted += bytes(100 * CLUSTER)
        wanted += b"".join(bytes([cluster % 251 + 1]) * CLUSTER for cluster in range(400, 512))
        wanted += bytes([201]) * (200 * CLUSTER) + bytes([202]) * (200 * CLUSTER) + bytes(112 * CLUSTER)
        assert disk.read(0, DISK_BYTES) == wanted
    with open_image(MemoryStorage(inner.snapshot()), backing=None, writable=False, options=QUIET) as disk:
        assert disk.read(0, DISK_BYTES) == wanted


def test_a_scan_while_counts_go_down_finds_no_cluster_that_is_not_released() -> None:
    _scan_between("refcount.decrement")


def test_a_scan_before_the_punch_finds_no_cluster_that_will_be_punched() -> None:
    _scan_between("host.discard")


def test_a_write_that_comes_while_the_disk_is_closed_is_refused_or_kept() -> None:
    """A batch that passed the first look and then waited for the lock until ``close`` had committed."""
    inner = MemoryStorage(writable=True)
    write_new(inner, NewImage(DISK_BYTES, cluster_bytes=CLUSTER))
    disk = open_image(inner, backing=None, writable=True, options=QUIET)
    disk.write(0, b"first")
    disk.flush()
    lock = disk._state.lock
    outcomes: list[object] = []
    calls = [
        lambda: outcomes.extend(disk.submit([Request(Verb.WRITE, CLUSTER, 6, b"second")])),
        lambda: outcomes.extend(disk.submit([Request(Verb.ZERO, 0, CLUSTER)], wait=False)),
    ]
    with lock:
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        # Both passed the first look or are about to: from here on the disk counts as closed.
        for thread in threads:
            thread.join(0.2)
        disk._unready = Closed("closed")
    for thread in threads:
        thread.join()
    assert [type(outcome) for outcome in outcomes] == [Closed, Closed]
    disk._unready = None
    disk.close()
    with open_image(MemoryStorage(inner.snapshot()), backing=None, writable=False, options=QUIET) as again:
        assert again.read(0, 5) == b"first"
        assert again.read(CLUSTER, 6) == bytes(6)


class _Slow:
    def commit(self) -> None:
        raise AssertionError("the interval is too long for this")


def test_the_first_writes_of_several_threads_start_one_interval_and_stop_joins_it() -> None:
    for _ in range(50):
        interval = IntervalCommit(_Slow(), 1000.0)
        threads = [threading.Thread(target=interval.start) for _ in range(4)] + [threading.Thread(target=interval.stop)]
        before = threading.active_count()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        interval.stop()
        assert threading.active_count() == before
        interval.start()
        assert threading.active_count() == before, "started again after its end"


def test_close_ends_the_interval_that_a_write_begins() -> None:
    inner = MemoryStorage(writable=True)
    write_new(inner, NewImage(DISK_BYTES, cluster_bytes=CLUSTER))
    disk = open_image(inner, backing=None, writable=True, options=Options(commit_interval=1000.0))
    disk.write(0, b"kept")
    disk.close()
    with open_image(MemoryStorage(inner.snapshot()), backing=None, writable=False, options=QUIET) as again:
        assert again.read(0, 4) == b"kept"
