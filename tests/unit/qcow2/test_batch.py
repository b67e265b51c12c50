"""New clusters for a batch: nothing foreign, nothing lost, nothing kept of what failed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any
from unittest import mock

import pytest

from cowfence.crash.images import snapshotted, tagged
from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import BLOCKED, Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import NoSpace, StorageFailed
from cowfence.qcow2 import allocator, batch, refcounts, tables, transaction, write
from cowfence.qcow2.allocator import Run
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.replay import replay
from cowfence.storage.base import Buffer, Storage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import KIB

CLUSTER = 4 * KIB
DISK_BYTES = 256 * CLUSTER
OPTIONS = Options(commit_interval=None)


class Watched(StorageWrapper):
    """Notes the data calls; ``fail_at``: the number of the one that raises ``error``."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.data_calls: list[int] = []
        self.fail_at = -1
        self.error: BaseException = KeyboardInterrupt()

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if mark == "data.write":
            if len(self.data_calls) == self.fail_at:
                self.fail_at = -1
                raise self.error
            self.data_calls.append(sum(map(len, buffers)))
        super().writev(offset, buffers, mark)


def _new(below: str | None = None) -> MemoryStorage:
    storage = MemoryStorage(name="image")
    write_new(storage, NewImage(DISK_BYTES, CLUSTER, backing_name=below, backing_format="raw" if below else None))
    return storage


def _opened(storage: Storage) -> Qcow2Disk:
    return open_image(storage, backing=None, writable=True, options=OPTIONS)


def _warm(storage: Storage) -> Qcow2Disk:
    """With an L2 table of its own in memory, durable."""
    disk = _opened(storage)
    disk.write(DISK_BYTES - 512, b"\xff" * 512)
    disk.flush()
    return disk


def _writes(clusters: Sequence[int], serial: int = 1, within: int = 512, length: int = 512) -> list[Request]:
    places = [cluster * CLUSTER + within for cluster in clusters]
    return [Request(Verb.WRITE, at, length, tagged(at, length, serial)) for at in places]


def _judge(disk: Qcow2Disk, memory: MemoryStorage, model: bytearray) -> None:
    assert disk.read(0, disk.size) == model
    disk.close()
    assert fatal_findings(memory.snapshot()) == []
    again = open_image(MemoryStorage(memory.snapshot(), "image"), backing=None, writable=False)
    assert again.read(0, again.size) == model


def _model(requests: Sequence[Request]) -> bytearray:
    model = bytearray(DISK_BYTES)
    model[-512:] = b"\xff" * 512
    for request in requests:
        model[request.offset : request.offset + request.length_bytes] = request.data
    return model


def test_one_data_call_each_and_no_more_than_was_asked() -> None:
    memory = _new()
    watched = Watched(memory)
    disk = _warm(watched)
    watched.data_calls.clear()
    requests = _writes(range(0, 60, 2))
    assert disk.submit(requests, wait=False) == [None] * 30
    assert watched.data_calls == [512] * 30
    _judge(disk, memory, _model(requests))


def test_used_clusters_show_nothing_of_what_they_held() -> None:
    memory = _new()
    disk = _warm(memory)
    old = [*_writes(range(40), serial=7, within=0, length=CLUSTER)]
    disk.submit(old)
    disk.flush()
    disk.discard(0, 40 * CLUSTER)
    disk.flush()
    requests = _writes(range(100, 140))
    assert disk.submit(requests, wait=False) == [None] * 40
    _judge(disk, memory, _model(requests))


def test_two_writes_into_one_new_cluster() -> None:
    memory = _new()
    disk = _warm(memory)
    requests = [*_writes([3, 4, 5]), *_writes([3, 4, 5], within=2048), *_writes([3], within=0)]
    assert disk.submit(requests, wait=False) == [None] * 7
    _judge(disk, memory, _model(requests))


@pytest.mark.parametrize("reused", [False, True], ids=["new", "reused"])
def test_writes_of_many_clusters(reused: bool) -> None:
    """Whole ones and parts at both ends, in neighbours or, where clusters came back, in pieces between those in use."""
    memory = _new()
    watched = Watched(memory)
    disk = _warm(watched)
    if reused:
        disk.submit(_writes(range(100, 160), serial=7, within=0, length=CLUSTER))
        disk.flush()
        for cluster in (100, 101, 104, 107, 108, 109, 113, *range(120, 140, 2)):
            disk.discard(cluster * CLUSTER, CLUSTER)
        disk.flush()
    places = [(512, 5 * CLUSTER), (8 * CLUSTER, 3 * CLUSTER), (13 * CLUSTER - 512, 1024), (20 * CLUSTER, 9 * CLUSTER + 512)]
    requests = [Request(Verb.WRITE, at, length, tagged(at, length, 3)) for at, length in places]
    watched.data_calls.clear()
    assert disk.submit(requests, wait=False) == [None] * 4
    assert reused or watched.data_calls == [length for _, length in places]
    model = _model(requests)
    if reused:
        for cluster in set(range(100, 160)) - {100, 101, 104, 107, 108, 109, 113, *range(120, 140, 2)}:
            at = cluster * CLUSTER
            model[at : at + CLUSTER] = tagged(at, CLUSTER, 7)
    _judge(disk, memory, model)


def test_neighbours_only_by_their_ends() -> None:
    """Reserved clusters whose first and last stand as far apart as in one run, and do not."""
    memory = _new()
    disk = _warm(memory)
    allocator = disk._state.allocator
    first = allocator.never_used
    order = [first + 5, first + 9, first + 2, first + 8]
    runs = [Run(cluster, 1, hole=True) for cluster in order]
    with mock.patch.object(allocator, "reserve", return_value=runs):
        request = Request(Verb.WRITE, 512, 3 * CLUSTER, tagged(512, 3 * CLUSTER, 4))
        assert disk.submit([request], wait=False) == [None]
    allocator.never_used = first + 10
    assert disk.read(0, disk.size) == _model([request])
    disk.flush()
    left = open_image(MemoryStorage(memory.snapshot(), "image"), backing=None, writable=False)
    assert left.read(0, left.size) == _model([request])


def test_with_reads_flushes_and_writes_over_a_border() -> None:
    memory = _new()
    disk = _warm(memory)
    across = Request(Verb.WRITE, 10 * CLUSTER - 512, 1024, tagged(10 * CLUSTER - 512, 1024, 3))
    forced = _writes([20])[0]._replace(fua=True)
    late = Request(Verb.WRITE, DISK_BYTES - 256, 512, bytes(512))
    requests = [*_writes([1]), across, forced, Request(Verb.READ, 512 * KIB, 512), late, *_writes([2])]
    outcomes = disk.submit(requests, wait=False)
    assert outcomes[:2] == [None, None]
    assert outcomes[2] is BLOCKED
    assert outcomes[3] == bytes(512)
    assert isinstance(outcomes[4], Exception)
    assert outcomes[5] is None
    assert disk.submit([forced]) == [None]
    _judge(disk, memory, _model([*requests[:3], requests[5]]))


def test_shared_table_is_not_changed_in_place() -> None:
    memory = _new()
    disk = _warm(memory)
    disk.close()
    content = snapshotted(memory.snapshot())
    memory = MemoryStorage(content, "image")
    disk = _opened(memory)
    disk.read(DISK_BYTES - 512, 512)
    requests = _writes(range(8))
    disk.submit(requests)
    disk.flush()
    then = open_image(MemoryStorage(memory.snapshot(), "image"), backing=None, writable=False, snapshot="1")
    assert then.read(0, then.size) == _model([])
    _judge(disk, memory, _model(requests))


def test_over_a_backing_file_that_ends_inside_a_cluster() -> None:
    below = bytes(range(1, 251)) * 400
    memory = _new("base")
    backing = RawDisk(MemoryStorage(below, "base"))
    disk = open_image(memory, backing=backing, writable=True, options=OPTIONS)
    disk.write(DISK_BYTES - 512, b"\xff" * 512)
    end = -(-len(below) // CLUSTER)
    requests = _writes([0, end - 2, end - 1, end, end + 1])
    assert disk.submit(requests, wait=False) == [None] * 5
    model = bytearray(DISK_BYTES)
    model[: len(below)] = below
    model[-512:] = b"\xff" * 512
    for request in requests:
        model[request.offset : request.offset + 512] = request.data
    assert disk.read(0, disk.size) == model
    disk.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageFailed("image", "write", 0, OSError(5, "I/O error"))])
def test_what_failed_keeps_no_cluster(error: BaseException) -> None:
    memory = _new()
    watched = Watched(memory)
    disk = _warm(watched)
    before = disk._state.allocator.free
    watched.fail_at, watched.error = len(watched.data_calls) + 2, error
    requests = _writes(range(5))
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            disk.submit(requests, wait=False)
        done = []
    else:
        outcomes = disk.submit(requests, wait=False)
        assert [outcome is None for outcome in outcomes] == [True, True, False, True, True]
        done = [*requests[:2], *requests[3:]]
    assert disk._state.allocator.free == before - len(done)
    # What did not get in may stand in the clusters that are given back: it must show nowhere.
    more = _writes(range(10, 30))
    assert disk.submit(more, wait=False) == [None] * 20
    _judge(disk, memory, _model([*done, *more]))


def test_full_host_leaves_a_write_to_those_who_may_commit() -> None:
    memory = _new()
    watched = Watched(memory)
    disk = _warm(watched)
    watched.fail_at, watched.error = len(watched.data_calls) + 2, NoSpace("image: no room")
    requests = _writes(range(5))
    # By itself it is tried again at once, and the host has room again.
    assert disk.submit(requests, wait=False) == [None] * 5
    assert len(watched.data_calls) == 1 + 5
    _judge(disk, memory, _model(requests))


def test_a_keeper_hears_of_the_whole_batch() -> None:
    """A death right after the batch: what was acknowledged is there."""
    memory = _new()
    journal = Journal.new(bytearray(256 * KIB))
    disk = open_image(memory, backing=None, writable=True, options=OPTIONS, journal=journal)
    disk.write(DISK_BYTES - 512, b"\xff" * 512)
    requests = _writes(range(100))
    assert disk.submit(requests, wait=False) == [None] * 100
    left = MemoryStorage(memory.snapshot(), "image")
    replay(left, Journal(bytearray(journal.snapshot())))
    assert fatal_findings(left.snapshot()) == []
    again = open_image(MemoryStorage(left.snapshot(), "image"), backing=None, writable=False)
    assert again.read(0, again.size) == _model(requests)


@contextmanager
def _interrupted_at(point: int) -> Iterator[None]:
    """Ctrl-C before the instruction of that number of those that plan, write and enter."""
    files = {module.__file__ for module in (allocator, batch, refcounts, tables, transaction, write)}
    left = point

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:  # noqa: ARG001
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if not left:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("together", [True, False])
def test_interrupted_anywhere(together: bool) -> None:
    """What is acknowledged afterwards is there: after a flush, and for a keeper. No entry is left without its count."""
    requests, later = _writes([0, 1]), _writes(range(8), serial=5)
    for point in count(1, 7):
        memory = _new()
        journal = Journal.new(bytearray(256 * KIB))
        disk = open_image(memory, backing=None, writable=True, options=OPTIONS, journal=journal)
        disk.write(DISK_BYTES - 512, b"\xff" * 512)
        disk.flush()
        try:
            with _interrupted_at(point):
                if together:
                    disk.submit(requests)
                else:
                    disk.write(requests[0].offset, requests[0].data)
            break
        except KeyboardInterrupt:
            pass
        # What it had begun may be there, and is written to in place.
        assert disk.submit(later[:1]) == [None]
        left = MemoryStorage(memory.snapshot(), "image")
        replay(left, Journal(bytearray(journal.snapshot())))
        assert fatal_findings(left.snapshot()) == []
        again = open_image(left, backing=None, writable=False)
        assert again.read(512, 512) == later[0].data
        assert disk.submit(later[1:]) == [None] * (len(later) - 1)
        disk.flush()
        assert fatal_findings(memory.snapshot()) == []
        _judge(disk, memory, _model(later))
    assert point > 500
