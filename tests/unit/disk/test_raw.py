"""``RawDisk``: bytes one to one, flushes that are free when nothing was written, and what a failed fence means."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.disk.base import BLOCKED, Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import Closed, Invalid, NoSpace, OutOfRange, ReadOnly, StorageFailed, WouldBlock
from cowfence.storage.file import FileStorage
from helpers_storage import TinyStorage

LOST = StorageFailed("tiny", "fence", 0, OSError(errno.EIO, "lost"))


def test_bytes_and_marks() -> None:
    storage = TinyStorage(10_000)
    disk = RawDisk(storage)
    disk.write(100, b"hello")
    disk.zero(102, 1)
    disk.zero(103, 1, unmap=False)
    disk.discard(0, 512)
    disk.write(9_995, b"x" * 5, fua=True)
    assert disk.read(9_993, 7) == b"\0\0xxxxx"
    assert storage.fences == 1
    assert storage.marks == [
        "data.write",
        *["data.zero"] * 3,  # a discard, and the part that did not become a hole
        "data.discard",
        "data.write",
        "flush.fence",
    ]


def test_a_disk_larger_than_its_file_ends_in_zeros() -> None:
    disk = RawDisk(TinyStorage(100), 1000)
    disk.write(50, b"a" * 50)
    assert disk.read(90, 20) == b"a" * 10 + bytes(10)
    assert disk.submit([Request(Verb.READ, 90, 20)]) == [b"a" * 10 + bytes(10)]
    (end,) = [extent for extent in disk.extents(0, 1000) if extent.end == 1000]
    assert (end.zero, end.present) == (True, False)
    disk.write(990, b"b" * 10)
    assert disk.read(989, 11) == b"\0" + b"b" * 10


@pytest.mark.parametrize(("offset", "length"), [(1000, 1), (999, 2), (-1, 1), (0, -1), (1 << 63, 1)])
def test_ranges_past_the_end(offset: int, length: int) -> None:
    disk = RawDisk(TinyStorage(1000))
    with pytest.raises(OutOfRange):
        disk.read(offset, length)
    with pytest.raises(OutOfRange):
        disk.zero(offset, length)
    with pytest.raises(OutOfRange):
        disk.discard(offset, length)
    with pytest.raises(OutOfRange):
        disk.extents(offset, length)
    with pytest.raises(OutOfRange):
        disk.write(offset if length > 0 else 1001, b"xy"[: max(length, 0)])
    verbs = (Verb.READ, Verb.ZERO, Verb.DISCARD)
    for wait in (True, False):
        outcomes = disk.submit([Request(verb, offset, length) for verb in verbs], wait=wait)
        assert [type(outcome) for outcome in outcomes] == [OutOfRange] * 3


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(Invalid):
        RawDisk(TinyStorage(0), -1)


def test_flush_fences_only_what_was_written_since() -> None:
    storage = TinyStorage(1000)
    disk = RawDisk(storage)
    disk.flush()
    assert storage.fences == 0
    disk.submit([Request(Verb.WRITE, 0, 1, b"x"), Request(Verb.WRITE, 1, 1, b"x")])
    disk.flush()
    disk.flush()
    assert storage.fences == 1
    disk.zero(0, 5)
    disk.close()
    disk.close()
    assert storage.fences == 2
    assert storage.closed


def test_what_would_wait_is_blocked_and_not_done() -> None:
    storage = TinyStorage(8192)
    disk = RawDisk(storage)
    quick = [Request(Verb.WRITE, 0, 1, b"x"), Request(Verb.READ, 0, 1)]
    slow = [
        Request(Verb.WRITE, 0, 1, b"y", fua=True),
        Request(Verb.ZERO, 0, 1),
        Request(Verb.DISCARD, 0, 1),
        Request(Verb.FLUSH),
    ]
    assert disk.submit([Request(Verb.FLUSH)], wait=False) == [None]  # nothing to flush
    assert disk.submit(quick + slow, wait=False) == [None, b"x", *[BLOCKED] * 4]
    assert storage.bytes[0] == ord("x")
    assert disk.submit(slow, wait=True) == [None] * 4
    storage.cold = True
    assert disk.submit([Request(Verb.READ, 0, 1)], wait=False) == [BLOCKED]
    with pytest.raises(WouldBlock):
        disk.read_into(0, bytearray(1), wait=False)
    assert disk.submit([Request(Verb.READ, 0, 1)], wait=True) == [b"\0"]


def test_a_flush_waits_for_the_fence_under_way_that_carries_its_writes() -> None:
    storage = TinyStorage(1000)
    disk = RawDisk(storage)
    disk.write(0, b"x")
    storage.gate = threading.Event()
    first = threading.Thread(target=disk.flush)
    first.start()
    while not disk._flush_lock.locked():
        pass
    assert disk.submit([Request(Verb.FLUSH)], wait=False) == [BLOCKED]
    second = threading.Thread(target=disk.flush)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    storage.gate.set()
    first.join()
    second.join()
    assert storage.fences == 1


def test_a_failed_fence_makes_the_disk_read_only_for_good() -> None:
    storage = TinyStorage(1000)
    disk = RawDisk(storage)
    disk.write(0, b"x")
    storage.failing["fence"] = LOST
    with pytest.raises(StorageFailed):
        disk.flush()
    storage.failing.clear()
    assert not disk.writable
    assert disk.read(0, 1) == b"x"
    for request in (
        Request(Verb.FLUSH),
        Request(Verb.WRITE, 0, 1, b"y"),
        Request(Verb.ZERO, 0, 1),
        Request(Verb.DISCARD, 0, 1),
    ):
        (outcome,) = disk.submit([request])
        assert isinstance(outcome, ReadOnly)
    with pytest.raises(ReadOnly, match="fence failed"):
        disk.flush()
    disk.close()
    assert storage.closed


def test_errors_of_the_storage_are_the_outcome_of_their_request_alone() -> None:
    storage = TinyStorage(1000)
    disk = RawDisk(storage)
    full = storage.failing["writev"] = NoSpace("full")
    assert disk.submit([Request(Verb.WRITE, 0, 1, b"x"), Request(Verb.READ, 0, 1)]) == [full, b"\0"]


def test_a_read_only_storage() -> None:
    disk = RawDisk(TinyStorage(1000, writable=False))
    assert not disk.writable
    with pytest.raises(ReadOnly, match="opened read-only"):
        disk.write(0, b"x")
    disk.close()


def test_a_closed_disk_refuses() -> None:
    disk = RawDisk(TinyStorage(1000))
    disk.close()
    for call in (lambda: disk.read(0, 1), lambda: disk.write(0, b"x"), disk.flush, lambda: disk.submit([])):
        with pytest.raises(Closed):
            call()


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1000))
    disk = RawDisk(FileStorage.open(tmp_path / "disk", writable=True))
    disk.write(0, b"x")
    if not (child := os.fork()):
        code = 1
        try:
            disk.write(0, b"y")
        except Closed:
            disk.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert disk.read(0, 1) == b"x"
    disk.close()


def test_zeroing_a_file_gives_its_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (1 << 20))
    disk = RawDisk(FileStorage.open(path, writable=True))
    before = path.stat().st_blocks
    disk.zero(100, (1 << 20) - 200)
    assert disk.read(0, 200) == b"x" * 100 + bytes(100)
    assert disk.read((1 << 20) - 200, 200) == bytes(100) + b"x" * 100
    assert path.stat().st_blocks < before
    disk.close()


ranges = st.tuples(st.integers(0, 5000), st.integers(0, 5000)).map(lambda pair: (min(pair), max(pair) - min(pair)))
steps = st.tuples(st.sampled_from(list(Verb)), ranges, st.integers(1, 255), st.booleans(), st.booleans())


@given(st.lists(steps, max_size=30), st.booleans())
def test_it_behaves_like_a_bytearray(steps: list[tuple[Verb, tuple[int, int], int, bool, bool]], short_file: bool) -> None:
    disk, model = RawDisk(TinyStorage(1000 if short_file else 5000), 5000), bytearray(5000)
    for verb, (offset, length), value, fua, unmap in steps:
        data = bytes((value,)) * length if verb is Verb.WRITE else b""
        (outcome,) = disk.submit([Request(verb, offset, length, data, fua, unmap)])
        if verb is Verb.READ:
            assert outcome == model[offset : offset + length]
        else:
            assert outcome is None
        if verb is Verb.WRITE:
            model[offset : offset + length] = data
        elif verb is Verb.ZERO:
            model[offset : offset + length] = bytes(length)
        elif verb is Verb.DISCARD:
            model[offset : offset + length] = disk.read(offset, length)
    assert disk.read(0, 5000) == model
    covered = list(disk.extents(0, 5000))
    assert [extent.start for extent in covered] == [0, *[extent.end for extent in covered[:-1]]]
    assert covered[-1].end == 5000
    for extent in covered:
        assert not extent.zero or not any(model[extent.start : extent.end])
