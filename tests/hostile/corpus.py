"""Images to be mutated, made by QEMU and by us, and the places in them where a hostile value hurts."""

from __future__ import annotations

import functools
import random
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cowfence.crash.images import tagged
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, open_image
from cowfence.storage.memory import MemoryStorage
from crash.scenarios import compressed, image, snapshotted, written
from judges import require, run

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COMPRESSED = 1 << 62

QEMU_RECIPES = {
    "qemu-64k": ["-o", "cluster_size=65536"],
    "qemu-4k": ["-o", "cluster_size=4096"],
    "qemu-512": ["-o", "cluster_size=512"],
    "qemu-v2": ["-o", "cluster_size=4096,compat=0.10"],
    "qemu-1bit": ["-o", "cluster_size=4096,refcount_bits=1"],
}
OWN_RECIPES = ("ours-aged", "ours-2m", "ours-backed", "ours-extended")
NAMES = (*QEMU_RECIPES, *OWN_RECIPES)


def _by_qemu(name: str) -> bytes:
    """Plain, compressed and zero clusters, and (but with 1-bit counts) a snapshot that shares some of them."""
    require("qemu-img")
    with tempfile.TemporaryDirectory() as folder:
        raw, path = Path(folder) / "raw", Path(folder) / "image"
        raw.write_bytes(tagged(0, 96 * 1024, 1) + bytes(160 * 1024))
        run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *QEMU_RECIPES[name], raw, path])
        commands = ["write -P 1 40k 70k", "write -P 2 130k 3k", "discard 130k 1k", "write -z 140k 10k"]
        if name != "qemu-1bit":
            _qemu_io(path, commands)
            run(["qemu-img", "snapshot", "-c", "first", path])
            commands = ["write -P 3 60k 30k", "write -P 4 200k 9k"]
        _qemu_io(path, commands)
        return path.read_bytes()


def _qemu_io(path: Path, commands: list[str]) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run([require("qemu-io"), "-f", "qcow2", *arguments, path], check=True, capture_output=True, timeout=60)


@functools.cache
def corpus(name: str) -> bytes:
    """A sound image by its recipe's name."""
    if name in QEMU_RECIPES:
        return _by_qemu(name)
    if name == "ours-aged":
        return snapshotted(compressed(written(image(), (0, 6 * 512), (70 * 512, 3 * 512)), 512))
    storage = MemoryStorage(name="image")
    if name == "ours-2m":
        write_new(storage, NewImage(5 << 20, 2 << 20, 64))
    elif name == "ours-extended":
        write_new(storage, NewImage(200 << 10, 16384, backing_name="base", backing_format="raw", extended_l2=True))
    else:
        write_new(storage, NewImage(200 << 10, 4096, 8, backing_name="base", backing_format="raw"))
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
    disk.write(4096, tagged(4096, 20 << 10, 3))
    disk.zero(8192, 4096)
    if name == "ours-extended":
        disk.write(100 << 10, tagged(100 << 10, 1024, 4))
        disk.write_compressed(32 << 10, tagged(32 << 10, 16 << 10, 5))
    disk.close()
    return storage.snapshot()


class Field(NamedTuple):
    """A field of the header: name, offset and length in bytes."""

    name: str
    at: int
    length_bytes: int


FIELDS = (
    Field("magic", 0, 4),
    Field("version", 4, 4),
    Field("backing_file_offset", 8, 8),
    Field("backing_file_size", 16, 4),
    Field("cluster_bits", 20, 4),
    Field("size", 24, 8),
    Field("crypt_method", 32, 4),
    Field("l1_size", 36, 4),
    Field("l1_table_offset", 40, 8),
    Field("refcount_table_offset", 48, 8),
    Field("refcount_table_clusters", 56, 4),
    Field("nb_snapshots", 60, 4),
    Field("snapshots_offset", 64, 8),
    Field("incompatible_features", 72, 8),
    Field("compatible_features", 80, 8),
    Field("autoclear_features", 88, 8),
    Field("refcount_order", 96, 4),
    Field("header_length", 100, 4),
    Field("compression_type", 104, 1),
    Field("first extension's type", 112, 4),
    Field("first extension's length", 116, 4),
)


class Tables(NamedTuple):
    """Where the tables of an image stand, as far as its header and tables can be followed: (kind, offset, length in bytes)."""

    cluster_bytes: int
    places: list[tuple[str, int, int]]

    def of(self, kind: str) -> Iterator[tuple[int, int]]:
        return ((offset, length_bytes) for name, offset, length_bytes in self.places if name == kind)

    def clusters(self) -> dict[int, str]:
        """The kind of each cluster of metadata."""
        found: dict[int, str] = {}
        for kind, offset, length_bytes in self.places:
            for cluster in range(offset // self.cluster_bytes, (offset + length_bytes - 1) // self.cluster_bytes + 1):
                found.setdefault(cluster, kind)
        return found


def words(content: bytes, offset: int, count: int) -> tuple[int, ...]:
    """Big-endian words; those past the end of the file are left out."""
    count = max(0, min(count, (len(content) - offset) // 8))
    return struct.unpack_from(f">{count}Q", content, offset) if count else ()


def tables_of(content: bytes) -> Tables:
    """Follow the header to every table of the active disk, and to the snapshot table and its L1 tables."""
    bits, l1_size, l1_offset, table, clusters, snapshots, snapshots_at = (
        *struct.unpack_from(">I", content, 20),
        *struct.unpack_from(">IQQIIQ", content, 36),
    )
    bits = min(max(bits, 9), 21)
    cluster_bytes = 1 << bits
    places = [("header", 0, cluster_bytes)]
    places.append(("refcount table", table, clusters * cluster_bytes))
    places += [
        ("refcount block", entry, cluster_bytes) for entry in words(content, table, clusters * cluster_bytes // 8) if entry
    ]
    places.append(("L1 table", l1_offset, l1_size * 8))
    for entry in words(content, l1_offset, l1_size):
        if entry & OFFSET_MASK:
            places.append(("L2 table", entry & OFFSET_MASK, cluster_bytes))
    at = snapshots_at
    for _ in range(min(snapshots, 64)):
        if at + 40 > len(content):
            break
        snapshot_l1, entries, id_bytes, name_bytes = struct.unpack_from(">QIHH", content, at)
        extra = struct.unpack_from(">I", content, at + 36)[0]
        places.append(("snapshot's L1 table", snapshot_l1, entries * 8))
        at += 40 + extra + id_bytes + name_bytes + 7 & ~7
    if snapshots:
        places.append(("snapshot table", snapshots_at, at - snapshots_at))
    return Tables(cluster_bytes, [place for place in places if 0 <= place[1] < len(content)])


def hostile_offsets(content: bytes, tables: Tables) -> list[int]:
    """Host offsets that an entry should not have: other tables, the header, past the end, misaligned, huge."""
    cluster_bytes = tables.cluster_bytes
    end = -(-len(content) // cluster_bytes) * cluster_bytes
    kinds: dict[str, int] = {}
    for kind, offset, _ in tables.places:
        kinds.setdefault(kind, offset)
    return sorted(
        {
            *kinds.values(),
            end - cluster_bytes,
            end,
            end + cluster_bytes,
            end + (1 << 30),
            512,
            cluster_bytes + 512,
            1 << 45,
            1 << 55,
        }
    )


def hostile_entries(content: bytes, tables: Tables) -> list[int]:
    """Words for an entry of any table: every hostile offset with the flags that change its meaning, and loose bits."""
    cluster_bits = tables.cluster_bytes.bit_length() - 1
    shift = 62 - (cluster_bits - 8)
    found: list[int] = []
    for offset in hostile_offsets(content, tables):
        found += [offset, offset | 1 << 63, offset | 1, offset | 1 << 63 | 1]
        if offset < 1 << shift:
            found += [COMPRESSED | offset, COMPRESSED | offset + 3 | (1 << 62 - shift) - 1 << shift]
    return [*found, 0, 1, 2, 1 << 63, COMPRESSED, 1 << 56, 1 << 61, (1 << 64) - 1, (1 << 63) - 1]


def patched(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at] + data + content[at + len(data) :]


def header_mutants(name: str, chance: random.Random) -> Iterator[tuple[bytes, str]]:
    """The image with each field of its header changed to something else, and what was changed; but for the fields without which
    it is no image at all."""
    content = corpus(name)
    for field in FIELDS:
        if field.name in ("magic", "version", "cluster_bits", "crypt_method"):
            continue
        bits = field.length_bytes * 8
        old = int.from_bytes(content[field.at : field.at + field.length_bytes])
        values = {0, 1, old + 1, old ^ 1 << chance.randrange(bits), chance.randrange(1 << bits), (1 << bits - 1) - 1}
        for value in sorted(value for value in values if value < 1 << bits):
            yield patched(content, field.at, value.to_bytes(field.length_bytes)), f"{name}: {field.name} = {value:#x}"
