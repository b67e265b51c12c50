"""Everything with everything, two by two: QEMU makes an image, we read and write it, QEMU judges; and the other way round.

The images cover every pair of options that can be had together. Contents are compared byte by byte on both sides, those of
snapshots too, bitmaps must have what changed, and ``qemu-img check`` must have nothing to say.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import cowfence
from cowfence.codec.luks import NewLuks
from cowfence.errors import Unsupported
from cowfence.ops.snapshot import create_snapshot
from cowfence.qcow2.image import Qcow2Disk
from helpers_cli import cowfence as command
from judges import run

MIB = 1 << 20
SECRET = b"open sesame"


class Kind(NamedTuple):
    """The options of one image."""

    version: int
    cluster_bytes: int
    refcount_bits: int
    lazy: bool
    compression: str
    snapshots: int
    bitmaps: int
    backing: str
    preallocation: str
    extended: bool
    data_file: str
    encryption: str

    def __str__(self) -> str:
        words = [f"v{self.version}", f"c{self.cluster_bytes}", f"r{self.refcount_bits}", self.compression, self.backing]
        words += [f"s{self.snapshots}", f"b{self.bitmaps}", self.preallocation, *(["lazy"] if self.lazy else [])]
        words += ["extended"] if self.extended else []
        words += [f"data-{self.data_file}"] if self.data_file != "none" else []
        words += [self.encryption] if self.encryption != "none" else []
        return "-".join(words)


OPTIONS = {
    "version": (3, 2),
    "cluster_bytes": (65536, 512, 4096, 2 * MIB),
    "refcount_bits": (16, 1, 2, 8, 64),
    "lazy": (False, True),
    "compression": ("zlib", "zstd"),
    "snapshots": (0, 1, 2),
    "bitmaps": (0, 1, 2),
    "backing": ("none", "raw", "qcow2"),
    "preallocation": ("off", "metadata"),
    "extended": (False, True),
    "data_file": ("none", "plain", "raw"),
    "encryption": ("none", "luks", "aes"),
}


def can_be(kind: Kind) -> bool:
    old = kind.version == 2
    return not (
        (old and (kind.refcount_bits != 16 or kind.lazy or kind.compression != "zlib" or kind.bitmaps))
        # A cluster that three compressed ones share is counted as high as two bits can.
        or (kind.snapshots and kind.refcount_bits <= 2)
        or (kind.data_file != "none" and (old or kind.snapshots))
        or (kind.data_file == "raw" and kind.backing != "none")
        # What QEMU allocates ahead in an encrypted image reads as anything.
        or (kind.encryption != "none" and (kind.preallocation != "off" or kind.data_file == "raw"))
        or (kind.encryption == "luks" and old)
        or (kind.extended and (old or kind.cluster_bytes < 16384))
        or (kind.backing != "none" and kind.preallocation != "off" and not kind.extended)
    )


def covering() -> list[Kind]:
    """Few kinds in which every two options that can meet do."""
    rng = random.Random(1)
    pool = [kind for kind in itertools.starmap(Kind, itertools.product(*OPTIONS.values())) if can_be(kind)]

    def pairs(kind: Kind) -> set[tuple[tuple[int, object], ...]]:
        return set(itertools.combinations(enumerate(kind), 2))

    left = set().union(*map(pairs, pool))
    chosen = []
    while left:
        best = max(rng.sample(pool, 400), key=lambda kind: len(pairs(kind) & left))
        if pairs(best) & left:
            chosen.append(best)
            left -= pairs(best)
    return chosen


class Guest:
    """What the guest wrote, and what it must read."""

    def __init__(self, kind: Kind, size: int, below: bytes, seed: int) -> None:
        self.kind = kind
        self.content = bytearray(below[:size].ljust(size, b"\0"))
        self._rng = random.Random(seed)

    def writes(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, byte) of writes, entered as they are given out; byte 0: write zeroes."""
        for _ in range(count):
            length = self._rng.choice([512, 4096, 65536, 100 * 512, 3])
            at = self._rng.randrange((len(self.content) - length) // 512) * 512
            value = self._rng.choice([0, *range(1, 255)])
            self.content[at : at + length] = bytes([value]) * length
            yield at, length, value


def by_us(disk: Qcow2Disk, guest: Guest, count: int) -> None:
    for at, length, value in guest.writes(count):
        if value:
            disk.write(at, bytes([value]) * length)
        else:
            disk.zero(at, length)


def by_qemu(path: Path, guest: Guest, count: int) -> None:
    commands: list[str] = []
    for at, length, value in guest.writes(count):
        commands += ["-c", f"write -P {value} {at} {length}" if value else f"write -z {at} {length}"]
    run(["qemu-io", *commands, *seen_by_qemu(path, guest.kind)])


def seen_by_qemu(path: Path, kind: Kind) -> list[str]:
    """How QEMU's tools are told of the image."""
    if kind.encryption == "none":
        return [str(path)]
    return [*secret_of(path), "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"]


def secret_of(path: Path) -> list[str]:
    secret = path.with_suffix(".secret")
    secret.write_bytes(SECRET)
    return ["--object", f"secret,id=s,file={secret}"]


def compared(path: Path, expected: bytes, kind: Kind) -> None:
    if kind.data_file == "raw":
        assert path.with_suffix(".data").read_bytes() == expected
    raw = path.with_suffix(".expected")
    raw.write_bytes(expected)
    seen = seen_by_qemu(path, kind)
    run(["qemu-img", "check", *seen])
    if kind.encryption == "none":
        run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw])
    else:
        run(["qemu-img", "compare", *seen, f"driver=raw,file.filename={raw}"])
    with cowfence.open(path, secret=SECRET) as disk:
        assert disk.read(0, disk.size) == expected
    for words in (
        ["info"],
        ["info", "--output=json"],
        ["info", "--backing-chain"],
        ["info", "--backing-chain", "--output=json"],
    ):
        assert command(*words, str(path)).stdout == run(["qemu-img", *words, path]).stdout


def base_of(kind: Kind, folder: Path, size: int) -> bytes:
    """The backing file, longer or shorter than the overlay."""
    if kind.backing == "none":
        return b""
    content = random.Random(7).randbytes(size // 2 if kind.backing == "qcow2" else size + 65536)
    raw = folder / "base.raw"
    raw.write_bytes(content)
    if kind.backing == "qcow2":
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / "base.qcow2"])
    return content


def options(kind: Kind) -> str:
    found = [f"compat={'0.10' if kind.version == 2 else '1.1'}", f"cluster_size={kind.cluster_bytes}"]
    if kind.version == 3:
        found += [f"refcount_bits={kind.refcount_bits}", f"lazy_refcounts={'on' if kind.lazy else 'off'}"]
        found += [f"compression_type={kind.compression}", f"extended_l2={'on' if kind.extended else 'off'}"]
    if kind.data_file != "none":
        found += ["data_file=disk.data", f"data_file_raw={'on' if kind.data_file == 'raw' else 'off'}"]
    if kind.encryption != "none":
        found += [f"encrypt.format={kind.encryption},encrypt.key-secret=s"]
    if kind.encryption == "luks":
        found += ["encrypt.iter-time=10"]
    return ",".join([*found, f"preallocation={kind.preallocation}"])


def compresses(disk: Qcow2Disk, kind: Kind, at: int, data: bytes) -> None:
    """What is there already, written compressed, where there can be compressed clusters."""
    if kind.data_file == "none" and kind.encryption == "none":
        disk.write_compressed(at, data)
    else:
        with pytest.raises(Unsupported, match="compressed clusters"):
            disk.write_compressed(at, data)


@pytest.mark.parametrize("kind", covering(), ids=str)
def test_qemu_makes_and_we_work(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # QEMU looks for a data file where it stands, we beside the image.
    path, size = tmp_path / "disk.qcow2", 8 * MIB
    guest = Guest(kind, size, base_of(kind, tmp_path, size), 1)
    backing = ["-b", f"base.{kind.backing}", "-F", kind.backing] if kind.backing != "none" else []
    secret = secret_of(path) if kind.encryption != "none" else []
    run(["qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options(kind), *backing, path, str(size)])
    by_qemu(path, guest, 12)
    held = []
    for number in range(kind.snapshots):
        run(["qemu-img", "snapshot", "-c", f"s{number}", *seen_by_qemu(path, kind)])
        held.append(bytes(guest.content))
        by_qemu(path, guest, 4)
    for number in range(kind.bitmaps):
        run(["qemu-img", "bitmap", "--add", "-g", "64k", *seen_by_qemu(path, kind), f"b{number}"])
    before = bytes(guest.content)
    with cowfence.open(path, writable=True, secret=SECRET) as disk:
        assert disk.read(0, size) == before
        by_us(disk, guest, 20)
        cluster = max(65536, kind.cluster_bytes)
        compresses(disk, kind, cluster, bytes(guest.content[cluster : 2 * cluster]))
        assert disk.read(0, size) == guest.content
    compared(path, bytes(guest.content), kind)
    for number, content in enumerate(held):
        with cowfence.open(path, snapshot=f"s{number}", secret=SECRET) as disk:
            assert disk.read(0, size) == content
    with cowfence.open(path) as disk:
        for number in range(kind.bitmaps):
            covers(disk.bitmaps.ranges(f"b{number}"), before, bytes(guest.content))
    by_qemu(path, guest, 6)
    compared(path, bytes(guest.content), kind)


@pytest.mark.parametrize("kind", [kind for kind in covering() if kind.encryption != "aes"], ids=str)
def test_we_make_and_qemu_works(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, size = tmp_path / "disk.qcow2", 8 * MIB
    guest = Guest(kind, size, base_of(kind, tmp_path, size), 2)
    backing = {"backing": f"base.{kind.backing}", "backing_format": kind.backing} if kind.backing != "none" else {}
    with cowfence.create(
        path,
        size,
        cluster_size=kind.cluster_bytes,
        refcount_bits=kind.refcount_bits,
        version=kind.version,
        lazy_refcounts=kind.lazy,
        compression_type=kind.compression,  # type: ignore[arg-type]
        preallocation=kind.preallocation,  # type: ignore[arg-type]
        extended_l2=kind.extended,
        data_file="disk.data" if kind.data_file != "none" else None,
        data_file_raw=kind.data_file == "raw",
        encryption=NewLuks(iter_time_ms=1) if kind.encryption == "luks" else None,
        secret=SECRET,
        **backing,  # type: ignore[arg-type]
    ) as disk:
        by_us(disk, guest, 12)
        compresses(disk, kind, 0, bytes(guest.content[: max(65536, kind.cluster_bytes)]))
        held = []
        for number in range(kind.snapshots):
            create_snapshot(disk, f"s{number}")
            held.append(bytes(guest.content))
            by_us(disk, guest, 4)
        for number in range(kind.bitmaps):
            disk.bitmaps.add(f"b{number}", granularity_bytes=65536)
        before = bytes(guest.content)
    compared(path, bytes(guest.content), kind)
    by_qemu(path, guest, 20)
    compared(path, bytes(guest.content), kind)
    for number, content in enumerate(held):
        out = tmp_path / "snapshot.raw"
        run(["qemu-img", "convert", "-l", f"s{number}", "-O", "raw", *seen_by_qemu(path, kind), out])
        assert out.read_bytes() == content
    with cowfence.open(path, writable=True, secret=SECRET) as disk:
        for number in range(kind.bitmaps):
            covers(disk.bitmaps.ranges(f"b{number}"), before, bytes(guest.content))
        by_us(disk, guest, 6)
    compared(path, bytes(guest.content), kind)


def covers(ranges: list[tuple[int, int]], before: bytes, after: bytes) -> None:
    """Every 64 KiB that differ are dirty."""
    dirty = {at for start, length in ranges for at in range(start, start + length, 65536)}
    changed = {at for at in range(0, len(before), 65536) if before[at : at + 65536] != after[at : at + 65536]}
    assert changed <= dirty
