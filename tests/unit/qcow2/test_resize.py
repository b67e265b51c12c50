"""A disk that is resized holds what it held, and zeros where it is new: whatever was there before, in the image or below it."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

import cowfence
from cowfence.crash.structure import fatal_findings
from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError, Invalid, ReadOnly, Unsupported
from cowfence.ops.resize import resize, resize_disk
from cowfence.ops.snapshot import apply_snapshot, create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.geometry import Geometry
from cowfence.qcow2.image import Qcow2Disk, open_image
from cowfence.qcow2.verify import verify
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage
from cowfence.storage.memory import MemoryStorage
from helpers_check import QUIET


def opened(storage: Storage, below: bytes | None = None) -> Qcow2Disk:
    backing = None if below is None else RawDisk(MemoryStorage(below, name="below", writable=False))
    return open_image(storage, backing=backing, writable=True, options=QUIET)


def new(size_bytes: int, cluster_bytes: int = 512, bits: int = 16, version: int = 3, *, backed: bool = False) -> MemoryStorage:
    memory = MemoryStorage(name="image")
    named = {"backing_name": "below", "backing_format": "raw"} if backed else {}
    write_new(memory, NewImage(size_bytes, cluster_bytes, bits, version, extended_l2=cluster_bytes == 16384, **named))  # type: ignore[arg-type]
    return memory


def check_clean(content: bytes) -> None:
    report = verify(MemoryStorage(content, name="image", writable=False))
    assert report.clean, [str(finding) for finding in report.findings[:3]]
    assert fatal_findings(content) == []


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize(
    ("cluster_bytes", "bits", "version"),
    [(512, 16, 3), (512, 16, 2), (512, 1, 3), (4096, 64, 3), (4096, 16, 2), (65536, 16, 3), (16384, 16, 3)],
)
def test_a_walk_of_sizes(cluster_bytes: int, bits: int, version: int, backed: bool) -> None:
    rng = random.Random(cluster_bytes * bits + version + backed)
    most = 80 * max(cluster_bytes, 1024)
    size = most // 2
    below = rng.randbytes(most * 3 // 4) if backed else None
    memory = new(size, cluster_bytes, bits, version, backed=backed)
    disk = opened(memory, below)
    now = bytearray((below or b"")[:size].ljust(size, b"\0"))
    for _ in range(60):
        verb = rng.choice(["write", "write", "zero", "resize", "resize", "preallocate", "compress", "reopen"])
        at = rng.randrange(len(now))
        length = min(rng.randrange(1, 6 * cluster_bytes), len(now) - at)
        if verb == "write":
            data = rng.randbytes(length)
            disk.write(at, data)
            now[at : at + length] = data
        elif verb == "zero":
            disk.zero(at, length)
            now[at : at + length] = bytes(length)
        elif verb == "compress":
            at -= at % cluster_bytes
            data = bytes([rng.randrange(256)]) * min(cluster_bytes, len(now) - at)
            disk.write_compressed(at, data)
            now[at : at + len(data)] = data
        elif verb == "reopen":
            disk.close()
            check_clean(memory.snapshot())
            memory = MemoryStorage(memory.snapshot(), name="image")
            disk = opened(memory, below)
        else:
            size = rng.randrange(1, most // 512) * 512
            mode = rng.choice(["metadata", "falloc", "full"]) if verb == "preallocate" and size > len(now) else "off"
            resize_disk(disk, size, shrink=True, preallocation=mode)
            now = now[:size].ljust(size, b"\0")
        assert disk.size == len(now)
        assert disk.read(0, disk.size) == now, verb
    disk.close()
    check_clean(memory.snapshot())


def test_tables_of_subclusters_are_dropped_whole() -> None:
    """Data, part of a cluster, compressed and zero clusters behind the new end, in tables of which none is left."""
    coverage = Geometry(14, extended_l2=True).l2_coverage_bytes
    memory = new(4 * coverage, 16384)
    disk = opened(memory)
    for at in (0, coverage + 16384, 2 * coverage, 4 * coverage - 65536):
        disk.write(at, b"d" * 40000)
        disk.write_compressed(at + 49152 - at % 16384, b"c" * 16384)
        disk.zero(at + 512, 1024)
    resize_disk(disk, 16384, shrink=True)
    assert disk.read(0, 512) == b"d" * 512
    resize_disk(disk, 4 * coverage)
    assert disk.read(16384, 65536) == bytes(65536)
    assert disk.read(2 * coverage, 65536) == bytes(65536)
    disk.close()
    check_clean(memory.snapshot())
    assert verify(MemoryStorage(memory.snapshot(), name="image", writable=False)).allocated_clusters == 1


def test_a_snapshot_keeps_its_size_and_comes_back() -> None:
    memory = new(64 * 1024)
    disk = opened(memory)
    disk.write(0, b"x" * 65536)
    create_snapshot(disk, "long")
    resize_disk(disk, 5 * 512, shrink=True)
    resize_disk(disk, 32 * 1024)
    assert disk.read(0, disk.size) == (b"x" * 2560).ljust(32 * 1024, b"\0")
    disk.write(4096, b"y" * 512)
    apply_snapshot(disk, "long")
    assert disk.read(0, disk.size) == b"x" * 65536
    disk.close()
    check_clean(memory.snapshot())


def test_a_bitmap_calls_what_is_new_changed() -> None:
    memory = new(64 * 1024)
    disk = opened(memory)
    disk.bitmaps.add("b", granularity_bytes=512)
    resize_disk(disk, 16 * 1024, shrink=True)
    resize_disk(disk, 24 * 1024)
    assert disk.bitmaps.ranges("b") == [(16 * 1024, 8 * 1024)]
    disk.close()
    check_clean(memory.snapshot())


def test_what_is_refused_changes_nothing() -> None:
    memory = new(64 * 1024, version=2)
    disk = opened(memory)
    before = memory.snapshot()
    for size, mode, shrink in (
        (1000, "off", True),
        (0, "off", True),
        (-512, "off", True),
        (1 << 63, "off", True),
        (1 << 50, "off", True),
        (512, "off", False),
        (512, "full", True),
        (1 << 20, "some", True),
    ):
        with pytest.raises(Invalid):
            resize_disk(disk, size, shrink=shrink, preallocation=mode)
    assert memory.snapshot() == before
    create_snapshot(disk, "s")
    with pytest.raises(Unsupported, match="v2 image which has snapshots"):
        resize_disk(disk, 1 << 20)
    disk.close()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("wanted", [10 * 512, 400 * 512])
def test_the_nth_call_fails(wanted: int, error: int) -> None:
    """The size is the old one or the new one, and what is left of the disk is whole."""
    data = random.Random(1).randbytes(128 * 512)
    for nth in range(1, 60):
        memory = new(128 * 512)
        plan = FaultPlan(None, error=error)
        disk = opened(FaultyStorage(memory, plan))
        disk.write(0, data)
        disk.flush()
        plan.matched, plan.nth = 0, nth
        failed = False
        try:
            resize_disk(disk, wanted, shrink=True, preallocation="metadata" if wanted > 128 * 512 else "off")
        except CowfenceError:
            failed = True
        plan.nth = None
        size = disk.size
        assert size in (128 * 512, wanted)
        assert disk.read(0, size) == data[:size].ljust(size, b"\0")
        try:
            disk.close()
        except ReadOnly:
            assert failed
        assert fatal_findings(memory.snapshot()) == []
        again = opened(MemoryStorage(memory.snapshot(), name="image"))
        assert again.size in (128 * 512, wanted)
        resize_disk(again, 500 * 512)
        kept = min(128 * 512, size)
        assert again.read(0, kept) == data[:kept]
        again.close()
        if not failed:
            return
    pytest.fail("it never came to its end")


def test_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 4096)
    assert resize(path, 4096, relative=1, format="raw", preallocation="full").size_bytes == 8192
    assert path.read_bytes() == b"x" * 4096 + bytes(4096)
    assert resize(path, 1000, format="raw", shrink=True).old_size_bytes == 8192
    assert path.read_bytes() == b"x" * 1000
    resize(path, 2000, format="raw", preallocation="falloc")
    assert path.read_bytes() == b"x" * 1000 + bytes(1000)
    with pytest.raises(Unsupported):
        resize(path, 4096, format="raw", preallocation="metadata")


def test_a_long_growth_is_quick(tmp_path: Path) -> None:
    disk = cowfence.create(tmp_path / "a.qcow2", 1 << 20)
    resize_disk(disk, 64 << 40)
    resize_disk(disk, 1 << 20, shrink=True)
    disk.close()


def test_an_image_without_its_backing_file_does_not_grow(tmp_path: Path) -> None:
    """The backing file may be longer than the disk was: its bytes would show behind the old end."""
    (tmp_path / "base").write_bytes(b"b" * 8192)
    path = tmp_path / "disk.qcow2"
    cowfence.create(path, 4096, backing="base", backing_format="raw").close()
    with cowfence.open(path, writable=True, backing=False) as disk:
        with pytest.raises(Invalid, match="without its backing file"):
            resize_disk(disk, 8192)
        resize_disk(disk, 2048, shrink=True)
    with cowfence.open(path, writable=True) as disk:
        resize_disk(disk, 8192)
        assert disk.read(0, 8192) == b"b" * 2048 + bytes(6144)
