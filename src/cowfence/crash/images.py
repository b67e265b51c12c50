"""The images that the explorer begins with, described by a line of text: fresh, or aged by every feature there is.

An aged image has written clusters, zero clusters of both kinds, two compressed clusters that share a host cluster, and, where
asked for, internal snapshots of all that. What the engine does not write by itself yet is put there by hand: plain surgery on
small images.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

from cowfence.codec import luks
from cowfence.errors import Invalid
from cowfence.qcow2.assemble import Options
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Qcow2Disk, open_image
from cowfence.storage.memory import MemoryStorage
from cowfence.units import SECTOR_BYTES

IMAGE: Final = "image"
BACKING: Final = "backing"
SECRET: Final = b"open sesame"
"""Of encrypted images."""
DATA: Final = "data"
"""The external data file."""

_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_COPIED: Final = 1 << 63


class ImageSpec(NamedTuple):
    """What an image is like, and how it is opened. ``str`` of it is what ``parse_image`` reads.

    ``cache``: L2 tables in memory: 1, 2 or 64. ``backing``: none, raw or qcow2 (the latter shorter than the overlay).
    """

    version: int = 3
    cluster_bytes: int = 512
    refcount_bits: int = 16
    backing: str = "none"
    snapshots: int = 0
    aged: bool = False
    cache: int = 64
    discards: bool = True
    short_l1: bool = False
    full: bool = False
    """All clusters that the one refcount block covers are nearly used up."""
    cold: bool = False
    """Nothing is in the page cache: every read has to wait."""
    smaller: bool = False
    """The snapshots are of a disk of half the size; what they hold behind it is a machine's saved state."""
    diverged: bool = False
    """The disk went its own way since the snapshots were taken, and flags are set where only these lead (as QEMU does it)."""
    wide: bool = False
    """The L1 table takes two sectors."""
    keeper: bool = False
    """A keeper watches the writer: after a kill the state is judged when it has done its work (C4)."""
    bitmap: bool = False
    """It has a persistent bitmap that records."""
    dirty: bool = False
    """Left by an engine that postpones refcounts: the dirty bit is set, and clusters in use have no count."""
    extended: bool = False
    """L2 entries are extended: clusters have subclusters."""
    data: bool = False
    """The guest's data has a file of its own."""
    rawdata: bool = False
    """It has one that can be read by itself."""

    luks: bool = False
    """Encrypted with LUKS."""
    aes: bool = False
    """Encrypted with the legacy method."""

    @property
    def encrypted(self) -> bool:
        return self.luks or self.aes

    @property
    def external(self) -> bool:
        return self.data or self.rawdata

    def __str__(self) -> str:
        words = [f"v{self.version}", f"c{self.cluster_bytes}", f"r{self.refcount_bits}", f"t{self.cache}"]
        words += [f"s{self.snapshots}"] if self.snapshots else []
        words += [self.backing] if self.backing != "none" else []
        words += [name for name in _FLAGS if getattr(self, name)]
        words += [] if self.discards else ["nodiscard"]
        return ",".join(words)


_FLAGS: Final = (
    "aged",
    "short_l1",
    "full",
    "cold",
    "smaller",
    "diverged",
    "wide",
    "keeper",
    "bitmap",
    "dirty",
    "extended",
    "data",
    "rawdata",
    "luks",
    "aes",
)
_NUMBERS: Final = {"v": "version", "c": "cluster_bytes", "r": "refcount_bits", "t": "cache", "s": "snapshots"}


def parse_image(text: str) -> ImageSpec:
    """The reverse of ``str(spec)``. Raises Invalid."""
    fields: dict[str, object] = {}
    for word in text.split(","):
        if word in _FLAGS:
            fields[word] = True
        elif word in ("raw", "qcow2"):
            fields["backing"] = word
        elif word == "nodiscard":
            fields["discards"] = False
        elif word[:1] in _NUMBERS and word[1:].isdecimal():
            fields[_NUMBERS[word[0]]] = int(word[1:])
        else:
            raise Invalid(f"{word!r} says nothing about an image")
    return ImageSpec(**fields)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Built:
    """The files of an image, and what the guest reads of it."""

    files: dict[str, bytes]
    size_bytes: int


def tagged(offset: int, length_bytes: int, serial: int) -> bytes:
    """Data whose every sector names its place and its write, so that foreign bytes show. Whole sectors only."""
    return b"".join(
        f"sector {sector} write {serial} ".encode().ljust(SECTOR_BYTES, b".")
        for sector in range(offset // SECTOR_BYTES, (offset + length_bytes) // SECTOR_BYTES)
    )


def options(spec: ImageSpec) -> Options:
    """How the image is opened."""
    # Batches of three sectors are short ones, those of more are long ones: both are explored.
    return Options(
        cache_bytes=spec.cache * spec.cluster_bytes,
        commit_interval=None,
        discards=spec.discards,
        long_write_bytes=4 * SECTOR_BYTES,
    )


def disk_bytes(spec: ImageSpec) -> int:
    """The guest's disk: two L2 tables where clusters are small, a dozen clusters where they are not."""
    if spec.full:
        return 256 * spec.cluster_bytes
    if spec.wide:
        return 66 * (spec.cluster_bytes // 8) * spec.cluster_bytes
    return 128 * spec.cluster_bytes if spec.cluster_bytes == SECTOR_BYTES else 12 * spec.cluster_bytes


@functools.lru_cache(maxsize=2048)
def build(spec: ImageSpec) -> Built:
    """The image of a description. Raises Invalid for what cannot be."""
    if spec.version == 2 and spec.refcount_bits != 16:
        raise Invalid("version 2 has refcounts of 16 bits")
    if spec.version == 2 and (spec.dirty or spec.bitmap or spec.extended or spec.external):
        raise Invalid("version 2 has neither dirty bit, nor bitmaps, nor subclusters, nor data files")
    if spec.version == 2 and spec.luks:
        raise Invalid("version 2 has no LUKS")
    if spec.external and spec.snapshots:
        raise Invalid("with a data file there are no snapshots")
    if spec.rawdata and spec.backing != "none":
        raise Invalid("a data file that can be read by itself has nothing below it")
    if spec.cluster_bytes < SECTOR_BYTES:
        raise Invalid(f"clusters of {spec.cluster_bytes} bytes are too small")
    if spec.snapshots > 2:
        raise Invalid("these small images have room for two snapshots")
    if spec.diverged and not spec.snapshots:
        raise Invalid("a disk diverges from its snapshots")
    if spec.snapshots and spec.refcount_bits == 1:
        raise Invalid("a snapshot needs refcounts of two bits or more")
    size = disk_bytes(spec)
    cluster = spec.cluster_bytes
    backing = _backing(spec, size)
    storage = MemoryStorage(name=IMAGE)
    wanted = NewImage(
        size,
        cluster,
        spec.refcount_bits,
        spec.version,
        extended_l2=spec.extended,
        data_file=DATA if spec.external else None,
        data_file_raw=spec.rawdata,
        luks_area=_luks_area() if spec.luks else None,
        preallocate_metadata=spec.rawdata,
        backing_name=BACKING if backing is not None else None,
        backing_format=spec.backing if backing is not None else None,
    )
    write_new(storage, wanted)
    files = {IMAGE: storage.snapshot()}
    if spec.aes:
        files[IMAGE] = files[IMAGE][:32] + struct.pack(">I", 1) + files[IMAGE][36:]
    if spec.external:
        files[DATA] = bytes(size)
    if spec.aged:
        _age(files, spec)
    elif spec.full:
        block = cluster * 8 // spec.refcount_bits
        _work(files, [("write", 0, (block - 18) * cluster)])
    elif spec.short_l1 or spec.snapshots:
        _work(files, [("write", 0, 4 * cluster)])
    for number in range(spec.snapshots):
        files[IMAGE] = snapshotted(files[IMAGE], number, size // 2 if spec.smaller else size)
    if spec.diverged:
        _work(files, [("write", 0, 2 * cluster), ("write", 6 * cluster, cluster)], serial=91)
        files[IMAGE] = _flagged(files[IMAGE])
    if spec.short_l1:
        files[IMAGE] = files[IMAGE][:36] + struct.pack(">I", 1) + files[IMAGE][40:]
    if spec.bitmap:
        _add_bitmap(files)
    if spec.dirty:
        files[IMAGE] = _dirty(files[IMAGE])
    if backing is not None:
        files[BACKING] = backing
    return Built(files, size)


def _backing(spec: ImageSpec, size: int) -> bytes | None:
    if spec.backing == "none":
        return None
    if spec.backing == "raw":
        return tagged(0, size, 80)
    storage = MemoryStorage(name=BACKING)
    shorter = size * 3 // 4
    write_new(storage, NewImage(shorter, spec.cluster_bytes, 16, 3))
    files = {IMAGE: storage.snapshot()}
    _work(files, [("write", 0, shorter // 2)], serial=81)
    return files[IMAGE]


def secrets(_: str) -> list[bytes]:
    """What opens encrypted images."""
    return [SECRET]


@functools.cache
def _luks_area() -> bytes:
    return luks.create(luks.NewLuks(key_bits=128, chaining="cbc", iter_time_ms=1), SECRET)[0]


@contextmanager
def _opened(files: dict[str, bytes]) -> Iterator[Qcow2Disk]:
    """The image, without its backing file, as a disk; ``files`` are what they have become when it is closed."""
    storage = {file: MemoryStorage(content, name=file) for file, content in files.items()}
    options = Options(commit_interval=None)
    disk = open_image(storage[IMAGE], backing=None, writable=True, options=options, data=storage.get(DATA), secrets=secrets)
    yield disk
    disk.close()
    files.update((file, memory.snapshot()) for file, memory in storage.items())


def _work(files: dict[str, bytes], steps: list[tuple[str, int, int]], serial: int = 90) -> None:
    with _opened(files) as disk:
        for verb, offset, length_bytes in steps:
            if verb == "write":
                disk.write(offset, tagged(offset, length_bytes, serial))
            else:
                disk.zero(offset, length_bytes, unmap=verb == "zero")


AGED: Final = {"allocated": 0, "zero": 2, "zero_allocated": 3, "compressed": 4, "compressed_too": 5, "free": 6}
"""By kind, a guest cluster of an aged image."""


def _age(files: dict[str, bytes], spec: ImageSpec) -> None:
    cluster = spec.cluster_bytes
    steps = [("write", 0, 6 * cluster)]
    if spec.version >= 3:
        steps += [("zero", 2 * cluster, cluster), ("keep", 3 * cluster, cluster)]
    if cluster == SECTOR_BYTES:
        steps += [("write", 70 * cluster, cluster)]
    if spec.extended:
        # Subclusters of every state side by side: in one cluster that was whole, and in one that never was.
        part = cluster // 32
        steps += [("keep", part, 2 * part), ("write", (AGED["free"] + 1) * cluster + 3 * part, part)]
        steps += [("keep", (AGED["free"] + 1) * cluster + 5 * part, part)]
    _work(files, steps)
    if not spec.external and not spec.encrypted:
        files[IMAGE] = compressed(files[IMAGE], [4 * cluster, 5 * cluster], share=spec.refcount_bits > 1)


class Patch:
    """Surgery on a small image with one refcount block."""

    def __init__(self, content: bytes) -> None:
        self.data = bytearray(content)
        self.bits = int(struct.unpack_from(">I", content, 20)[0])
        version = struct.unpack_from(">I", content, 4)[0]
        self.step = 16 if version >= 3 and content[79] & 16 else 8
        """Bytes of an L2 entry."""
        self.width = 1 << (struct.unpack_from(">I", content, 96)[0] if version >= 3 else 4)

    def word(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.data, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.data, at, value)

    def counted(self, cluster: int) -> int:
        """One refcount."""
        at, shift = self._count_at(cluster)
        if self.width >= 8:
            return int.from_bytes(self.data[at : at + self.width // 8], "big")
        return self.data[at] >> shift & (1 << self.width) - 1

    def count(self, cluster: int, change: int) -> None:
        """Change one refcount."""
        at, shift = self._count_at(cluster)
        value = self.counted(cluster) + change
        if self.width >= 8:
            self.data[at : at + self.width // 8] = value.to_bytes(self.width // 8, "big")
        else:
            mask = (1 << self.width) - 1
            self.data[at] = self.data[at] & ~(mask << shift) | value << shift

    def _count_at(self, cluster: int) -> tuple[int, int]:
        """Where it stands: the byte, and the bit in it."""
        per_block = (8 << self.bits) // self.width
        block = self.word(self.word(48) + cluster // per_block * 8)
        index = cluster % per_block
        return block + index * self.width // 8, index * self.width % 8

    def l2_at(self, guest: int) -> int:
        """Where the L2 entry of a guest offset stands."""
        l1, l2_bits = self.word(40), self.bits - self.step.bit_length() + 1
        l2 = self.word(l1 + (guest >> self.bits + l2_bits) * 8) & _OFFSET
        return l2 + (guest >> self.bits & (1 << l2_bits) - 1) * self.step

    def append(self, data: bytes) -> int:
        """Put ``data`` into new clusters at the end; returns its offset. The counts are the caller's."""
        cluster = 1 << self.bits
        offset = -(-len(self.data) // cluster) * cluster
        self.data.extend(bytes(offset - len(self.data)))
        self.data.extend(data.ljust(-(-len(data) // cluster) * cluster, b"\0"))
        return offset


def compressed(content: bytes, guests: list[int], *, share: bool = True) -> bytes:
    """``content`` with the written clusters at these guest offsets compressed: into one host cluster, where they fit and
    ``share`` says so, else each into one of its own."""
    patch = Patch(content)
    cluster = 1 << patch.bits
    packed = b""
    places: list[tuple[int, int, int]] = []
    for guest in guests:
        host = patch.word(patch.l2_at(guest)) & _OFFSET
        deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
        data = deflate.compress(bytes(patch.data[host : host + cluster])) + deflate.flush()
        if not share or len(packed) + len(data) > cluster:
            packed = b""
        if not packed:
            base = patch.append(bytes(cluster))
        patch.data[base + len(packed) : base + len(packed) + len(data)] = data
        places.append((guest, base + len(packed), len(data)))
        packed += data
        patch.count(host // cluster, -1)
        patch.count(base // cluster, 1)
    shift = 62 - (patch.bits - 8)
    for guest, offset, length in places:
        sectors = (offset + length - 1) // 512 - offset // 512
        patch.put(patch.l2_at(guest), 1 << 62 | sectors << shift | offset)
        if patch.step == 16:
            patch.put(patch.l2_at(guest) + 8, 0)
    return bytes(patch.data)


def snapshotted(content: bytes, number: int = 0, size_bytes: int | None = None) -> bytes:
    """``content`` with one more internal snapshot of all of it: counts up, COPIED off, the L1 table copied. ``size_bytes``: of
    its disk (default: that of the image)."""
    patch = Patch(content)
    cluster = 1 << patch.bits
    l1, entries = patch.word(40), struct.unpack_from(">I", patch.data, 36)[0]
    for index in range(entries):
        l1_entry = patch.word(l1 + index * 8) & ~_COPIED
        patch.put(l1 + index * 8, l1_entry)
        if l1_entry:
            patch.count(l1_entry // cluster, 1)
            for at in range(l1_entry, l1_entry + cluster, patch.step):
                _count_entry(patch, at)
    copy = patch.append(bytes(patch.data[l1 : l1 + entries * 8]))
    for shared in range(copy // cluster, -(-(copy + entries * 8) // cluster)):
        patch.count(shared, 1)
    count, old = struct.unpack_from(">IQ", patch.data, 60)
    ident, name = b"%d" % (number + 1), b"snap%d" % number
    record = struct.pack(">QIHHIIQII", copy, entries, len(ident), len(name), 0, 0, 0, 0, 16)
    record += struct.pack(">QQ", 0, patch.word(24) if size_bytes is None else size_bytes) + ident + name
    record = record.ljust(-(-len(record) // 8) * 8, b"\0")
    before = bytes(patch.data[old : old + _snapshot_table_bytes(patch.data, old, count)]) if count else b""
    table = patch.append(before + record)
    patch.count(table // cluster, 1)
    if count:
        patch.count(old // cluster, -1)
    struct.pack_into(">IQ", patch.data, 60, count + 1, table)
    return bytes(patch.data)


def _add_bitmap(files: dict[str, bytes]) -> None:
    """A bitmap that has just been made."""
    with _opened(files) as disk:
        disk.bitmaps.add("bitmap", granularity_bytes=SECTOR_BYTES)


def _dirty(content: bytes) -> bytes:
    """``content`` as lazy refcounts leave it: marked dirty; a cluster of data and its L2 table are counted too low, and one
    that was let go still has a count."""
    patch = Patch(content)
    cluster = 1 << patch.bits
    l2 = patch.word(patch.word(40)) & _OFFSET
    if l2:
        patch.count(l2 // cluster, -1)
        patch.count((patch.word(l2) & _OFFSET) // cluster, -1)
    patch.count(patch.append(bytes(cluster)) // cluster, 1)
    for at, bit in ((72, 1), (80, 1)):
        patch.put(at, patch.word(at) | bit)
    return bytes(patch.data)


def _flagged(content: bytes) -> bytes:
    """``content`` with COPIED set in the L2 tables of its snapshots, where they alone lead to a cluster."""
    patch = Patch(content)
    at = patch.word(64)
    for _ in range(struct.unpack_from(">I", patch.data, 60)[0]):
        l1, entries = struct.unpack_from(">QI", patch.data, at)
        for l1_entry in struct.unpack_from(f">{entries}Q", patch.data, l1):
            for entry_at in range(l1_entry, l1_entry + (1 << patch.bits) if l1_entry else 0, patch.step):
                entry = patch.word(entry_at)
                if entry & _OFFSET and not entry >> 62 and patch.counted((entry & _OFFSET) >> patch.bits) == 1:
                    patch.put(entry_at, entry | _COPIED)
        at += _snapshot_table_bytes(patch.data, at, 1)
    return bytes(patch.data)


def _count_entry(patch: Patch, at: int) -> None:
    """One reference more for what an L2 entry leads to, and its COPIED flag off."""
    cluster = 1 << patch.bits
    entry = patch.word(at)
    if entry >> 62 & 1:
        shift = 62 - (patch.bits - 8)
        offset = entry & (1 << shift) - 1
        last = (offset & ~511) + ((entry >> shift & (1 << 62 - shift) - 1) + 1) * 512 - 1
        for shared in range(offset // cluster, last // cluster + 1):
            patch.count(shared, 1)
        return
    patch.put(at, entry & ~_COPIED)
    if entry & _OFFSET:
        patch.count((entry & _OFFSET) // cluster, 1)


def _snapshot_table_bytes(data: bytearray, start: int, count: int) -> int:
    at = start
    for _ in range(count):
        ident, name = struct.unpack_from(">HH", data, at + 12)
        extra = struct.unpack_from(">I", data, at + 36)[0]
        at = at + 40 + extra + ident + name + 7 & ~7
    return at - start
