"""Compaction: the disk, its snapshots and bitmaps stay what they are, the file becomes as short as its content, and what
cannot be moved stays."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from cowfence.errors import Corrupt, CowfenceError, Unsupported
from cowfence.ops.compact import compact_disk
from cowfence.ops.snapshot import create_snapshot, delete_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.header import read_header
from cowfence.qcow2.image import Qcow2Disk, open_image
from cowfence.qcow2.verify import verify
from cowfence.storage.fault import CHANGES, FaultPlan, FaultyStorage
from cowfence.storage.memory import MemoryStorage
from helpers_check import QUIET, Scalpel, new_image

DISK_BYTES = 96 * 1024


def opened(storage: Any, *, snapshot: str | None = None, writable: bool = True) -> Qcow2Disk:
    return open_image(storage, backing=None, writable=writable and snapshot is None, options=QUIET, snapshot=snapshot)


def contents(data: bytes) -> dict[str, bytes]:
    """What can be read: the disk, each snapshot, each bitmap."""
    found: dict[str, bytes] = {}
    with opened(MemoryStorage(data, writable=False), writable=False) as disk:
        found["disk"] = disk.read(0, disk.size)
        for bitmap in disk.bitmaps:
            found[f"bitmap {bitmap.name}"] = repr(disk.bitmaps.ranges(bitmap.name)).encode()
        names = [snapshot.id for snapshot in disk.snapshots()]
    for name in names:
        with opened(MemoryStorage(data, writable=False), snapshot=name) as disk:
            found[f"snapshot {name}"] = disk.read(0, disk.size)
    return found


def worked_on(seed: int, *, compressed: bool = True, snapshots: bool = True, bitmaps: bool = True, **options: Any) -> bytes:
    """An image with holes between all that it has."""
    dice = random.Random(seed)
    storage = MemoryStorage()
    cluster_bytes = options.pop("cluster_bytes", 512)
    disk_bytes = max(DISK_BYTES, 24 * cluster_bytes)
    write_new(storage, NewImage(disk_bytes, cluster_bytes=cluster_bytes, **options))
    with opened(storage) as disk:
        if bitmaps and disk.header.version >= 3:
            disk.bitmaps.add("first", granularity_bytes=512)
        for _ in range(60):
            cluster = dice.randrange(disk_bytes // cluster_bytes)
            at = cluster * cluster_bytes
            length_bytes = min(dice.randrange(1, 6) * cluster_bytes, disk_bytes - at)
            verb = dice.randrange(12)
            if verb < 5:
                disk.write(at, dice.randbytes(length_bytes))
            elif verb < 7 and compressed:
                text = b"".join(dice.choice((b"aaaaaaaa", b"bbbbbbbb", dice.randbytes(8))) for _ in range(cluster_bytes // 8))
                disk.write_compressed(at, text)
            elif verb < 9:
                disk.discard(at, length_bytes)
            elif verb == 9:
                disk.zero(at, length_bytes, unmap=False)
            elif snapshots and verb == 10 and len(disk.snapshots()) < 3:
                create_snapshot(disk, f"s{dice.randrange(100)}", date_nanoseconds=0)
            elif snapshots and disk.snapshots():
                delete_snapshot(disk, disk.snapshots()[0].id)
        disk.discard(disk_bytes // 3, disk_bytes // 3)
    return storage.snapshot()


def compacted(data: bytes) -> bytes:
    storage = MemoryStorage(data)
    with opened(storage) as disk:
        compact_disk(disk)
    return storage.snapshot()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"version": 2},
    {"refcount_bits": 1, "snapshots": False},
    {"refcount_bits": 2, "snapshots": False},
    {"refcount_bits": 64},
    {"cluster_bytes": 1024},
    {"cluster_bytes": 4096},
    {"cluster_bytes": 16384, "extended_l2": True},
    {"compressed": False, "bitmaps": False},
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_that_can_be_read_stays(options: dict[str, Any], seed: int) -> None:
    before = worked_on(seed, **options)
    after = compacted(before)
    assert contents(after) == contents(before)
    report = verify(MemoryStorage(after, writable=False))
    assert not report.totals, report.findings
    # Closing the disk stores the bits of a bitmap anew: its directory, table and bits.
    assert len(after) <= len(before) + (3 << read_header(MemoryStorage(before)).cluster_bits if "version" not in options else 0)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_that_is_free_is_left(seed: int) -> None:
    """Without what can be pinned, each cluster of the file is in use."""
    after = compacted(worked_on(seed, compressed=False, bitmaps=False))
    image = Scalpel(after)
    assert all(image.count(cluster) for cluster in range(len(after) // 512))
    assert compacted(after) == after


def test_the_disk_goes_on_living() -> None:
    storage = MemoryStorage(worked_on(3))
    with opened(storage) as disk:
        expected = bytearray(disk.read(0, disk.size))
        compact_disk(disk)
        for at in range(0, disk.size, 1536):
            disk.write(at, b"new" * 100)
            expected[at : at + 300] = b"new" * 100
        disk.discard(4096, 4096)
        expected[4096:8192] = bytes(4096)
        compact_disk(disk)
        assert disk.read(0, disk.size) == expected
    assert contents(storage.snapshot())["disk"] == expected
    assert not verify(storage.__class__(storage.snapshot())).totals


def test_leaks_are_given_back() -> None:
    image = Scalpel(new_image())
    image.append(3)
    after = compacted(bytes(image.data))
    assert not verify(MemoryStorage(after)).totals
    assert len(after) <= len(image.data) - 3 * 512


def test_an_external_data_file_is_refused() -> None:
    storage, data = MemoryStorage(), MemoryStorage()
    write_new(storage, NewImage(DISK_BYTES, cluster_bytes=512, data_file="data"))
    with open_image(storage, backing=None, writable=True, options=QUIET, data=data) as disk:
        disk.write(0, b"x")
        before = storage.snapshot()
        with pytest.raises(Unsupported, match="external data file"):
            compact_disk(disk)
        assert disk.read(0, 1) == b"x"
    assert len(storage.snapshot()) == len(before)


def test_a_damaged_image_is_refused() -> None:
    image = Scalpel(worked_on(1))
    image.set_count(image.cluster_of(image.l1_at(0)), 0)
    storage = MemoryStorage(bytes(image.data))
    with opened(storage) as disk, pytest.raises(Corrupt, match="repaired first"):
        compact_disk(disk)
    assert contents(storage.snapshot())["disk"] == contents(bytes(image.data))["disk"]


def failures(data: bytes) -> Iterator[tuple[int, bool]]:
    storage = FaultyStorage(MemoryStorage(data), counted := FaultPlan())
    with opened(storage) as disk:
        counted.nth = None
        compact_disk(disk)
    total = sum(counted.calls[kind] for kind in CHANGES)
    for nth in range(2, total, max(1, total // 60)):
        for keep_failing in (False, True):
            yield nth, keep_failing


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_fails_the_image_is_whole(seed: int) -> None:
    data = worked_on(seed, bitmaps=False)
    before = contents(data)
    for nth, keep_failing in failures(data):
        memory = MemoryStorage(data)
        disk = opened(FaultyStorage(memory, FaultPlan(nth, keep_failing=keep_failing)))
        try:
            compact_disk(disk)
            disk.close()
        except CowfenceError:
            with suppress(CowfenceError):
                disk.close()
        after = memory.snapshot()
        assert contents(after) == before
        report = verify(MemoryStorage(after))
        assert not report.fatal, report.findings
        assert read_header(MemoryStorage(after)).size_bytes == DISK_BYTES
