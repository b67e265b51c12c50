"""Rebasing, committing and amending leave the disk what it is, whatever the files below are like."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import cowfence
from cowfence.crash.structure import fatal_findings
from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError, Invalid, ReadOnly, Refused, Unsupported
from cowfence.ops.amend import Amendment, amend_disk
from cowfence.ops.commit import commit, commit_disk
from cowfence.ops.rebase import rebase, rebase_disk
from cowfence.ops.resize import resize_disk
from cowfence.ops.snapshot import create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Qcow2Disk, open_image
from cowfence.qcow2.verify import verify
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage
from cowfence.storage.memory import MemoryStorage
from helpers_check import QUIET

GEOMETRIES = [(512, 16, 3), (512, 16, 2), (4096, 1, 3), (65536, 64, 3), (16384, 16, 3)]
"""Clusters of 16 KiB have subclusters here."""


def new(size_bytes: int, cluster_bytes: int = 512, bits: int = 16, version: int = 3, *, backed: bool = True) -> MemoryStorage:
    memory = MemoryStorage(name="image")
    named = {"backing_name": "below", "backing_format": "raw"} if backed else {}
    write_new(memory, NewImage(size_bytes, cluster_bytes, bits, version, extended_l2=cluster_bytes == 16384, **named))  # type: ignore[arg-type]
    return memory


def raw(content: bytes, *, writable: bool = False) -> RawDisk:
    return RawDisk(MemoryStorage(content, name="below", writable=writable))


def opened(storage: Storage, below: Qcow2Disk | RawDisk | None) -> Qcow2Disk:
    return open_image(storage, backing=below, writable=True, options=QUIET)


def check_clean(content: bytes) -> None:
    report = verify(MemoryStorage(content, name="image", writable=False))
    assert report.clean, [str(finding) for finding in report.findings[:3]]
    assert fatal_findings(content) == []


def scribble(disk: Qcow2Disk, rng: random.Random, now: bytearray, *, packed: bool = True) -> None:
    """Writes, zeros and (``packed``) compressed clusters here and there."""
    cluster = disk.block_bytes
    for _ in range(12):
        at = rng.randrange(len(now))
        length = min(rng.randrange(1, 3 * cluster), len(now) - at)
        data = rng.choice([rng.randbytes(length), bytes(length)])
        if packed and rng.random() < 0.3:
            at -= at % cluster
            data = bytes([at % 251]) * min(cluster, len(now) - at)
            disk.write_compressed(at, data)
        elif not any(data):
            disk.zero(at, length)
        else:
            disk.write(at, data)
        now[at : at + len(data)] = data


def below_of(rng: random.Random, length_bytes: int) -> bytes:
    """Random clusters and zeros."""
    return b"".join(rng.choice([rng.randbytes(512), bytes(512), b"same" * 128]) for _ in range(length_bytes // 512))


@pytest.mark.parametrize(("cluster_bytes", "bits", "version"), GEOMETRIES)
def test_rebase_keeps_the_disk(cluster_bytes: int, bits: int, version: int) -> None:
    """Over longer and shorter files, and over none."""
    rng = random.Random(cluster_bytes + bits + version)
    size = 40 * max(cluster_bytes, 1024) + 512
    for lengths in [(size, size), (size // 2 + 512, size), (size, size // 3), (2 * size, size // 2), (size // 2, 2 * size)]:
        old, newer = below_of(rng, lengths[0]), below_of(rng, lengths[1])
        memory = new(size, cluster_bytes, bits, version)
        disk = opened(memory, raw(old))
        now = bytearray(old[:size].ljust(size, b"\0"))
        scribble(disk, rng, now)
        rebase_disk(disk, "newer", "raw", raw(newer))
        assert disk.read(0, size) == now
        scribble(disk, rng, now)
        disk.close()
        check_clean(memory.snapshot())
        disk = opened(MemoryStorage(memory.snapshot(), name="image"), raw(newer))
        assert (disk.header.backing_file, disk.header.backing_format) == ("newer", "raw")
        assert disk.read(0, size) == now
        rebase_disk(disk, None, None, None)
        assert disk.backing is None
        content = bytes(disk.read(0, size))
        disk.close()
        assert content == now


def test_rebase_allocates_only_what_differs() -> None:
    rng = random.Random(5)
    content = rng.randbytes(64 * 512)
    other = content[: 7 * 512] + bytes(512) + content[8 * 512 :]
    memory = new(64 * 512)
    disk = opened(memory, raw(content))
    rebase_disk(disk, "other", "raw", raw(other))
    own = [(extent.start, extent.length_bytes) for extent in disk.extents(0, disk.size) if extent.depth == 0]
    assert own == [(7 * 512, 512)]
    disk.close()


def base_disk(kind: str, content: bytes, cluster_bytes: int = 1024) -> tuple[RawDisk | Qcow2Disk, Callable[[], bytes]]:
    """A base for commits, and how to read what its file holds."""
    memory = MemoryStorage(content if kind == "raw" else b"", name="below")
    if kind == "raw":
        return RawDisk(memory), memory.snapshot
    write_new(memory, NewImage(len(content), cluster_bytes, 16, 3))
    disk = opened(memory, None)
    disk.write(0, content)
    disk.flush()

    def read() -> bytes:
        check_clean(memory.snapshot())
        with open_image(MemoryStorage(memory.snapshot(), name="below"), backing=None, writable=False) as again:
            return again.read(0, again.size)

    return disk, read


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize(("cluster_bytes", "bits", "version"), GEOMETRIES)
def test_commit_moves_the_disk_into_its_base(cluster_bytes: int, bits: int, version: int, kind: str) -> None:
    rng = random.Random(cluster_bytes + bits + version)
    size = 40 * max(cluster_bytes, 1024) + 512
    for length, keep in [(size, False), (size // 2 + 512, False), (size + 2048, False), (size, True)]:
        content = below_of(rng, length)
        base, read_base = base_disk(kind, content)
        memory = new(size, cluster_bytes, bits, version)
        disk = opened(memory, base)
        now = bytearray(content[:size].ljust(size, b"\0"))
        scribble(disk, rng, now)
        commit_disk(disk, base, keep=keep)
        assert disk.read(0, size) == now
        own = any(extent.depth == 0 and extent.present for extent in disk.extents(0, size))
        assert own is keep
        assert base.size == max(size, length)
        scribble(disk, rng, now) if not keep else None
        commit_disk(disk, base)
        disk.close()
        check_clean(memory.snapshot())
        assert read_base() == bytes(now) + content[size:]


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536])
def test_amend_keeps_the_disk(cluster_bytes: int, backed: bool) -> None:
    """Every width after every other, and both versions."""
    rng = random.Random(cluster_bytes)
    size = 80 * max(cluster_bytes, 1024)
    below = below_of(rng, size // 2)
    memory = new(size, cluster_bytes, backed=backed)
    disk = opened(memory, raw(below) if backed else None)
    now = bytearray((below if backed else b"").ljust(size, b"\0"))
    for bits in (16, 1, 64, 2, 32, 4, 8, 16, 64, 16):
        # Compressed clusters that share a host cluster need more than one bit.
        scribble(disk, rng, now, packed=False)
        amend_disk(disk, Amendment(refcount_bits=bits, lazy_refcounts=bits > 8))
        assert disk.header.geometry.refcount_bits == bits
        assert bool(disk.header.compatible & 1) is (bits > 8)
        assert disk.read(0, size) == now
    for version in (2, 3, 2, 2, 3, 3):
        scribble(disk, rng, now)
        if version == 2:
            resize_disk(disk, size - 512, shrink=True)
            resize_disk(disk, size)
            now[-512:] = bytes(512)
        amend_disk(disk, Amendment(version=version))
        assert disk.header.version == version
        assert disk.read(0, size) == now
        disk.flush()
        assert fatal_findings(memory.snapshot()) == []
    disk.close()
    check_clean(memory.snapshot())


def test_what_version_2_cannot_hold_is_refused_by_name() -> None:
    disk = opened(new(64 * 512, backed=False), None)
    for wanted in (Amendment(version=2, lazy_refcounts=True), Amendment(version=2, refcount_bits=8), Amendment(version=4)):
        with pytest.raises(Invalid):
            amend_disk(disk, wanted)
    with pytest.raises(Invalid):
        amend_disk(disk, Amendment(refcount_bits=12))
    amend_disk(disk, Amendment(refcount_bits=8))
    with pytest.raises(Invalid, match="requires refcount_bits=16"):
        amend_disk(disk, Amendment(version=2))
    amend_disk(disk, Amendment(refcount_bits=16))
    disk.zero(0, 512)
    disk.write(0, b"x" * 1024)
    create_snapshot(disk, "s")
    with pytest.raises(Invalid, match="has a refcount of 2"):
        amend_disk(disk, Amendment(refcount_bits=1))
    disk.write(2048, b"y" * 512)
    disk.zero(2048, 512, unmap=False)
    create_snapshot(disk, "t")
    with pytest.raises(Unsupported, match="zero clusters in an internal snapshot"):
        amend_disk(disk, Amendment(version=2))
    resize_disk(disk, 65 * 512)
    with pytest.raises(Unsupported, match="Internal snapshots prevent downgrade"):
        amend_disk(disk, Amendment(version=2))
    disk.close()


def test_snapshots_forbid_what_would_change_them() -> None:
    disk = opened(new(64 * 512), base := raw(bytes(64 * 512), writable=True))
    create_snapshot(disk, "s")
    with pytest.raises(Unsupported, match="internal snapshots"):
        rebase_disk(disk, None, None, None)
    with pytest.raises(Unsupported, match="internal snapshots"):
        commit_disk(disk, base)
    disk.close()


OPERATIONS: dict[str, Callable[[Qcow2Disk, RawDisk], None]] = {
    "rebase": lambda disk, _: rebase_disk(disk, None, None, None),
    "commit": commit_disk,
    "refcounts": lambda disk, _: amend_disk(disk, Amendment(refcount_bits=64)),
    "version": lambda disk, _: amend_disk(disk, Amendment(version=2)),
}


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_nth_call_fails(name: str, error: int) -> None:
    """The disk is what it was, and whole."""
    rng = random.Random(7)
    content = below_of(rng, 40 * 512)
    for nth in range(1, 200):
        memory, below = new(48 * 512), MemoryStorage(content, name="below")
        plan = FaultPlan(None, error=error)
        base = RawDisk(FaultyStorage(below, plan))
        disk = opened(FaultyStorage(memory, plan), base)
        now = bytearray(content.ljust(48 * 512, b"\0"))
        scribble(disk, random.Random(3), now)
        disk.flush()
        plan.matched, plan.nth = 0, nth
        failed = False
        try:
            OPERATIONS[name](disk, base)
        except CowfenceError:
            failed = True
        plan.nth = None
        assert disk.read(0, disk.size) == now
        try:
            disk.close()
        except (ReadOnly, CowfenceError):
            assert failed
        assert fatal_findings(memory.snapshot()) == []
        again = MemoryStorage(memory.snapshot(), name="image")
        with opened(again, RawDisk(MemoryStorage(below.snapshot(), name="below"))) as disk:
            if disk.header.backing_name is None:
                continue_with = open_image(MemoryStorage(again.snapshot(), name="image"), backing=None, writable=False)
                assert continue_with.read(0, disk.size) == now
            else:
                assert disk.read(0, disk.size) == now
        if not failed:
            return
    pytest.fail("it never came to its end")


def test_by_path(tmp_path: Path) -> None:
    """Chains of three: the name is found from the image's directory; commit -b leaves the image as it is."""
    cowfence.create(tmp_path / "base.qcow2", 1 << 20).close()
    cowfence.create(tmp_path / "middle.qcow2", 1 << 20, backing="base.qcow2", backing_format="qcow2").close()
    top = tmp_path / "top.qcow2"
    cowfence.create(top, 2 << 20, backing="middle.qcow2", backing_format="qcow2").close()
    with cowfence.open(tmp_path / "middle.qcow2", writable=True) as disk:
        disk.write(0, b"m" * 65536)
    with cowfence.open(top, writable=True) as disk:
        disk.write(1 << 20, b"t" * 65536)
        before = disk.read(0, disk.size)
    assert not commit(top, base=tmp_path / "base.qcow2").emptied
    with cowfence.open(top) as disk:
        assert disk.read(0, disk.size) == before
    with cowfence.open(tmp_path / "base.qcow2") as disk:
        assert disk.read(0, disk.size) == before
    rebase(top, "base.qcow2", backing_format="qcow2")
    assert commit(top).emptied
    with cowfence.open(top) as disk:
        assert disk.header.backing_file == "base.qcow2"
        assert disk.read(0, disk.size) == before
    with pytest.raises(Invalid, match="Did not find"):
        commit(top, base=tmp_path / "nothing")
    with pytest.raises(Invalid, match="does not have a backing file"):
        commit(tmp_path / "base.qcow2")
    with pytest.raises(Invalid, match="backing format must be specified"):
        rebase(top, "base.qcow2")
    with pytest.raises(Refused, match="loop"):
        rebase(top, "top.qcow2", backing_format="qcow2")
    rebase(top, "not-there", backing_format="raw", unsafe=True)
    rebase(top, None, unsafe=True)
    with cowfence.open(top) as disk:
        assert disk.read(0, disk.size) == bytes(2 << 20)


def test_amending_keeps_bits_that_are_unknown_here() -> None:
    """Compatible bits that nobody here knows stay; autoclear bits go, those of the bitmaps stay."""
    memory = new(1 << 16, backed=False)
    disk = opened(memory, None)
    disk.bitmaps.add("b", granularity_bytes=512)
    disk.close()
    content = bytearray(memory.snapshot())
    content[80:88] = (1 << 40 | int.from_bytes(content[80:88])).to_bytes(8)
    content[88:96] = (1 << 41 | int.from_bytes(content[88:96])).to_bytes(8)
    memory = MemoryStorage(bytes(content), name="image")
    disk = opened(memory, None)
    amend_disk(disk, Amendment(lazy_refcounts=True))
    amend_disk(disk, Amendment(lazy_refcounts=False))
    assert disk.header.compatible == 1 << 40
    assert disk.header.autoclear == 1
    disk.close()
