"""A small judge of structure (crash contract, C5), written apart from the engine and its checker.

It counts the references of an image of a few dozen clusters in plain Python, which for such images is faster than arrays are,
and it reads what each internal snapshot holds. It shares no code with what it judges. Fatal are: a count below the references,
a COPIED flag on a cluster with more than one reference, an entry that leads past the end of the file or onto another table,
reserved bits. A count above the references is a leak. In an image with the dirty bit counts mean nothing until it is rebuilt,
which opening it for writing does; there they are not judged.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, NamedTuple

_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_BACKING_FORMAT: Final = 0xE2792ACA
_BITMAPS: Final = 0x23852875
_ENCRYPTION: Final = 0x0537BE77
_SLOT_IN_USE: Final = 0x00AC71F3
_DIRTY: Final = 1
_DATA_FILE: Final = 4
_EXTENDED_L2: Final = 16
_RAW_DATA: Final = 2
_SUBCLUSTERS: Final = 32
_BITMAPS_VALID: Final = 1
_IN_USE: Final = 1
_MOMENT: Final = b"cowfence-backup:"
_AUTO: Final = 2

Touch = Callable[[int, int], None]
"""(offset, length in bytes): told of every range that the verdict rests on."""


class Finding(NamedTuple):
    """What is fatally wrong. ``pointer_at``: where in the file the entry stands that leads to ``target_at``, if known."""

    text: str
    pointer_at: int | None = None
    target_at: int | None = None
    name: str = ""
    """Of the entry, where it is a count that is missing."""


class Bitmap(NamedTuple):
    """A persistent bitmap as it stands."""

    name: bytes
    granularity_bits: int
    flags: int
    bits: bytes

    @property
    def true(self) -> bool:
        """It says of itself that it has recorded every write until now."""
        return self.records and not self.in_use

    @property
    def records(self) -> bool:
        return bool(self.flags & _AUTO)

    @property
    def in_use(self) -> bool:
        """It says of itself that it is not to be trusted."""
        return bool(self.flags & _IN_USE)

    def covers(self, sector: int) -> bool:
        """True if the sector is dirty by it."""
        bit = sector * 512 >> self.granularity_bits
        return bool(self.bits[bit >> 3] >> (bit & 7) & 1)


@dataclass(slots=True)
class Structure:
    """What an image says about itself."""

    findings: list[Finding] = field(default_factory=list)
    cluster_bytes: int = 512
    leaks: int = 0
    """Clusters counted higher than they are referred to."""
    blocks: list[int] = field(default_factory=list)
    """Host offsets of the refcount blocks."""
    data: list[tuple[int, int]] = field(default_factory=list)
    """(guest offset, host offset) of each plain data cluster, or subcluster, of the active disk."""
    data_bytes: int = 512
    """Length of each of them."""
    external: bool = False
    """They stand in an external data file."""
    encrypted: bool = False
    """They do not stand there as the guest reads them."""
    raw: bool = False
    """Which can be read by itself."""
    dirty: bool = False
    """The dirty bit is set."""
    bitmaps: list[Bitmap] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    """``size``, ``backing`` (name, format), ``features`` (version, incompatible, compatible, autoclear), ``snapshots``
    ((id, name, size, digest of contents), ...): each is old or new after a crash, never a mix."""

    @property
    def has_moment(self) -> bool:
        """Whether one of the snapshots is the moment of a backup."""
        snapshots = self.facts.get("snapshots", ())
        assert isinstance(snapshots, tuple)
        return any(name.startswith(_MOMENT) for _, name, *_ in snapshots)


class Place(NamedTuple):
    """Where a guest cluster's entry stands and what it leads to."""

    name: str
    entry_at: int
    host_offset: int | None
    external: bool = False
    """It leads into the data file."""


def inspect(content: bytes, touch: Touch | None = None) -> Structure:
    """Judge the image in ``content``."""
    return _Judge(content, touch or _untouched).judge()


def fatal_findings(content: bytes) -> list[str]:
    """The texts of what is fatally wrong; empty for a sound image, leaks or not."""
    return [finding.text for finding in inspect(content).findings]


def active_digest(content: bytes, touch: Touch | None = None) -> bytes:
    """Of what the active disk holds: that of a snapshot which was taken of it now."""
    digest = blake2b(digest_size=16)
    l1_size, l1_offset = struct.unpack_from(">IQ", content, 36)
    judge = _Judge(content, touch or _untouched)
    judge.prepare()
    judge.tree(l1_offset, l1_size, "", active=False, data=digest.update)
    return digest.digest()


def locate(content: bytes, guest_offset: int) -> Place | None:
    """The L2 entry of a guest offset; None where the tables cannot be followed. ``host_offset`` None: it leads nowhere."""
    try:
        bits, l1_at = struct.unpack_from(">I", content, 20)[0], struct.unpack_from(">Q", content, 40)[0]
        step = _step(content)
        l2_bits = bits - step.bit_length() + 1
        l1_index, l2_index = guest_offset >> bits + l2_bits, guest_offset >> bits & (1 << l2_bits) - 1
        l2_at = struct.unpack_from(">Q", content, l1_at + l1_index * 8)[0] & _OFFSET
        if not l2_at:
            return Place(f"L1[{l1_index}]", l1_at + l1_index * 8, None)
        entry = struct.unpack_from(">Q", content, l2_at + l2_index * step)[0]
    except struct.error:
        return None
    host = entry & (1 << 62 - (bits - 8)) - 1 & ~511 if entry & _COMPRESSED else entry & _OFFSET
    external = bool(content[79] & _DATA_FILE) and struct.unpack_from(">I", content, 4)[0] >= 3
    leads = bool(entry & _COPIED) if external else bool(host)
    return Place(f"L2[{l1_index}][{l2_index}]", l2_at + l2_index * step, host if leads else None, external)


def _step(content: bytes) -> int:
    """Bytes of an L2 entry."""
    version, incompatible = struct.unpack_from(">I", content, 4)[0], struct.unpack_from(">Q", content, 72)[0]
    return 16 if version >= 3 and incompatible & _EXTENDED_L2 else 8


def _untouched(offset: int, length_bytes: int) -> None:
    pass


class _Judge:
    def __init__(self, content: bytes, touch: Touch) -> None:
        self.content = content
        self.touch = touch
        self.result = Structure()
        self.references: dict[int, list[tuple[str, int]]] = {}
        self.copied: dict[int, tuple[str, int]] = {}
        self.tables: dict[int, str] = {}

    def prepare(self) -> None:
        """Read from the header what entries look like."""
        self.version, self.bits = (struct.unpack_from(">I", self.content, at)[0] for at in (4, 20))
        self.step = _step(self.content)
        self.result.cluster_bytes = 1 << self.bits
        self.result.data_bytes = (1 << self.bits) // (_SUBCLUSTERS if self.step == 16 else 1)
        self.end = -(-len(self.content) // (1 << self.bits))

    def judge(self) -> Structure:
        content = self.content
        self.touch(0, 112)
        if len(content) < 72 or content[:4] != b"QFI\xfb":
            self._find("the header is gone")
            return self.result
        version, _, _, bits, size, _, l1_size, l1_offset, table, clusters, snapshots, snapshots_at = struct.unpack_from(
            ">IQIIQIIQQIIQ", content, 4
        )
        order = struct.unpack_from(">I", content, 96)[0] if version >= 3 else 4
        self.order = order
        self.prepare()
        self.result.external = version >= 3 and bool(content[79] & _DATA_FILE)
        self.result.raw = self.result.external and bool(content[95] & _RAW_DATA)
        self.result.encrypted = struct.unpack_from(">I", content, 32)[0] != 0
        self.table_at = table
        self._header_facts(version, size)
        self._table(0, 1, "header", 0)
        self._table(table, clusters, "refcount table", 48)
        self._table(l1_offset, -(-l1_size * 8 >> bits), "L1 table", 40)
        blocks = self._words(table, clusters << bits >> 3)
        self.result.blocks = [entry for entry in blocks if entry]
        for index, entry in enumerate(blocks):
            if entry:
                self._table(entry, 1, f"refcount block {index}", table + index * 8)
        self.tree(l1_offset, l1_size, "", active=True)
        at = snapshots_at
        found = []
        for number in range(snapshots):
            self.touch(at, 64)
            if at + 40 > len(content):
                self._find(f"the snapshot table ends before snapshot {number}", 64, at)
                break
            l1_at, entries, id_length, name_length = struct.unpack_from(">QIHH", content, at)
            extra = struct.unpack_from(">I", content, at + 36)[0]
            strings = at + 40 + extra
            self.touch(strings, id_length + name_length)
            ident, name = content[strings : strings + id_length], content[strings + id_length :][:name_length]
            held = struct.unpack_from(">Q", content, at + 48)[0] if extra >= 16 and at + 56 <= len(content) else size
            self._table(l1_at, -(-entries * 8 >> bits), f"L1 table of snapshot {number}", at)
            digest = blake2b(digest_size=16)
            self.tree(l1_at, entries, f"snapshot {number}: ", active=False, data=digest.update)
            found.append((ident, name, held, digest.digest()))
            at = strings + id_length + name_length + 7 & ~7
        if snapshots:
            self._table(snapshots_at, -(-(at - snapshots_at) >> bits), "snapshot table", 64)
        self.result.facts["snapshots"] = tuple(found)
        self._counts(blocks)
        return self.result

    def _header_facts(self, version: int, size: int) -> None:
        content, facts = self.content, self.result.facts
        facts["size"] = size
        name_at, name_length = struct.unpack_from(">QI", content, 8)
        self.touch(name_at, name_length)
        backing_format, bitmaps, luks = b"", None, None
        at = struct.unpack_from(">I", content, 100)[0] if version >= 3 else 72
        while at + 8 <= min(len(content), 1 << self.bits):
            self.touch(at, 8)
            kind, length = struct.unpack_from(">II", content, at)
            if not kind:
                break
            self.touch(at, 8 + length)
            if kind == _BACKING_FORMAT:
                backing_format = content[at + 8 : at + 8 + length]
            elif kind == _BITMAPS and length == 24:
                bitmaps = struct.unpack_from(">I4xQQ", content, at + 8)
            elif kind == _ENCRYPTION and length == 16:
                luks = struct.unpack_from(">QQ", content, at + 8)
            at += 8 + (length + 7 & ~7)
        facts["backing"] = (content[name_at : name_at + name_length] if name_at else b"", backing_format)
        incompatible, compatible, autoclear = struct.unpack_from(">QQQ", content, 72) if version >= 3 else (0, 0, 0)
        self.result.dirty = bool(incompatible & _DIRTY)
        # The dirty bit and the bitmaps' bit come and go by right.
        facts["features"] = (version, incompatible & ~_DIRTY, compatible, autoclear & ~_BITMAPS_VALID)
        if luks is not None:
            self._luks(*luks)
        if bitmaps is not None and autoclear & _BITMAPS_VALID:
            self._bitmaps(*bitmaps)

    def _luks(self, offset: int, length: int) -> None:
        """The LUKS header's clusters; its fields, and the material of the slots in use."""
        self._table(offset, -(-length >> self.bits), "encryption header", 0)
        digest = blake2b(digest_size=16)
        slots = [struct.unpack_from(">I36xI", self.content, offset + 208 + slot * 48) for slot in range(8)]
        key_bytes = struct.unpack_from(">I", self.content, offset + 108)[0]
        parts = [(offset, 592), *((offset + at * 512, key_bytes * 4000) for active, at in slots if active == _SLOT_IN_USE)]
        for start, count in parts:
            self.touch(start, count)
            digest.update(self.content[start : start + count])
        self.result.facts["keys"] = digest.digest()

    def _bitmaps(self, count: int, length: int, offset: int) -> None:
        """The directory, and for each bitmap its table and its bits: all of them hold references."""
        content, cluster_bytes = self.content, 1 << self.bits
        self._table(offset, -(-length >> self.bits), "bitmap directory", 0)
        self.touch(offset, length)
        at = offset
        for number in range(count):
            if at + 24 > len(content):
                self._find(f"the bitmap directory ends before bitmap {number}", 0, at)
                return
            table, entries, flags, _, granularity, name_length, extra = struct.unpack_from(">QIIBBHI", content, at)
            name = content[at + 24 + extra :][:name_length]
            if table + entries * 8 > len(content) or extra or not 9 <= granularity <= 31:
                self._find(f"the bitmap directory's entry {number} is none", 0, at)
                return
            if entries:
                self._table(table, -(-entries * 8 >> self.bits), f"table of bitmap {number}", at)
            bits = b""
            for index, word in enumerate(self._words(table, entries)):
                host = word & _OFFSET
                if host:
                    self._refer(host >> self.bits, f"bitmap {number}[{index}]", table + index * 8)
                    self.touch(host, cluster_bytes)
                    bits += content[host : host + cluster_bytes].ljust(cluster_bytes, b"\0")
                else:
                    bits += (b"\xff" if word & 1 else b"\0") * cluster_bytes
            self.result.bitmaps.append(Bitmap(name, granularity, flags, bits))
            at = at + 24 + extra + name_length + 7 & ~7

    def _find(self, text: str, pointer_at: int | None = None, target_at: int | None = None, name: str = "") -> None:
        self.result.findings.append(Finding(text, pointer_at, target_at, name))

    def _words(self, offset: int, count: int) -> tuple[int, ...]:
        self.touch(offset, count * 8)
        if offset + count * 8 > len(self.content):
            have = max(0, len(self.content) - offset) // 8
            return struct.unpack_from(f">{have}Q", self.content, offset) + (0,) * (count - have)
        return struct.unpack_from(f">{count}Q", self.content, offset)

    def _table(self, offset: int, clusters: int, what: str, pointer_at: int) -> None:
        for cluster in range(offset >> self.bits, (offset >> self.bits) + clusters):
            holder = self.tables.setdefault(cluster, what)
            if holder is not what:
                self._find(f"{what} stands on the {holder} (cluster {cluster})", pointer_at, offset)
            self._refer(cluster, what, pointer_at)

    def _refer(self, cluster: int, what: str, at: int) -> None:
        if cluster >= self.end:
            self._find(f"{what} leads to cluster {cluster}, past the end of the file", at, cluster << self.bits)
        holders = self.references.get(cluster)
        if holders is None:
            self.references[cluster] = [(what, at)]
        else:
            holders.append((what, at))

    def tree(
        self, l1_offset: int, l1_size: int, prefix: str, *, active: bool, data: Callable[[bytes], None] | None = None
    ) -> None:
        cluster_bytes = 1 << self.bits
        for l1_index, l1_entry in enumerate(self._words(l1_offset, l1_size)):
            if not l1_entry:
                continue
            l2_offset = l1_entry & _OFFSET
            what, at = f"{prefix}L1[{l1_index}]", l1_offset + l1_index * 8
            if l1_entry & ~(_OFFSET | _COPIED) or l2_offset & cluster_bytes - 1 or not l2_offset:
                self._find(f"{what} is {l1_entry:#x}", at)
                continue
            self._refer(l2_offset >> self.bits, what, at)
            if active and l1_entry & _COPIED:
                self.copied[l2_offset >> self.bits] = (what, at)
            words = self._words(l2_offset, cluster_bytes >> 3)
            entries = cluster_bytes // self.step
            for l2_index in range(entries):
                entry = words[l2_index * (self.step >> 3)]
                bitmap = words[2 * l2_index + 1] if self.step == 16 else None
                if entry or bitmap:
                    guest = (l1_index * entries + l2_index) << self.bits
                    what, at = f"{prefix}L2[{l1_index}][{l2_index}]", l2_offset + l2_index * self.step
                    self._entry(entry, bitmap, what, at, guest, active=active)
                    for start, held in self._held(entry, bitmap) if data is not None else ():
                        assert data is not None
                        data(b"%d:" % (guest + start) + held)

    def _held(self, entry: int, bitmap: int | None) -> list[tuple[int, bytes]]:
        """(offset, bytes) of what a cluster of a snapshot holds itself; the rest is the backing file's, and stays as it is."""
        if bitmap is None or entry & _COMPRESSED:
            held = self._cluster(entry)
            return [] if held is None else [(0, held)]
        size, found = self.result.data_bytes, []
        for number in range(_SUBCLUSTERS):
            if bitmap >> number & 1:
                host = (entry & _OFFSET) + number * size
                self.touch(host, size)
                found.append((number * size, self.content[host : host + size].ljust(size, b"\0")))
            elif bitmap >> _SUBCLUSTERS + number & 1:
                found.append((number * size, bytes(size)))
        return found

    def _cluster(self, entry: int) -> bytes | None:
        """What a cluster of a snapshot reads as; None where it is the backing file's, which stays as it is."""
        cluster_bytes = 1 << self.bits
        if entry & _COMPRESSED:
            shift = 62 - (self.bits - 8)
            offset, sectors = entry & (1 << shift) - 1, (entry >> shift & (1 << 62 - shift) - 1) + 1
            length = (offset & ~511) + sectors * 512 - offset
            self.touch(offset, length)
            try:
                return zlib.decompressobj(-12).decompress(self.content[offset : offset + length], cluster_bytes)
            except zlib.error:
                return b"not to be inflated"
        if entry & 1:
            return bytes(cluster_bytes)
        if not entry & _OFFSET:
            return None
        self.touch(entry & _OFFSET, cluster_bytes)
        return self.content[entry & _OFFSET :][:cluster_bytes].ljust(cluster_bytes, b"\0")

    def _entry(self, entry: int, bitmap: int | None, what: str, at: int, guest: int, *, active: bool) -> None:
        if entry & _COMPRESSED and not self.result.external:
            shift = 62 - (self.bits - 8)
            offset = entry & (1 << shift) - 1
            sectors = (entry >> shift & (1 << 62 - shift) - 1) + 1
            last = (offset & ~511) + sectors * 512 - 1
            if entry & _COPIED:
                self._find(f"{what} is compressed and COPIED", at)
            # What can be inflated decides whether the disk can be read.
            self.touch(offset, (offset & ~511) + sectors * 512 - offset)
            for cluster in range(offset >> self.bits, (last >> self.bits) + 1):
                self._refer(cluster, what, at)
            return
        host = entry & _OFFSET
        zero = entry & 1
        if self.result.external:
            self._external(entry, bitmap, what, at, guest)
            return
        whole = (1 << _SUBCLUSTERS) - 1
        # As if a plain cluster were one subcluster.
        allocated = (0 if zero else 1) if bitmap is None else bitmap & whole
        zeroed = zero if bitmap is None else bitmap >> _SUBCLUSTERS
        if (
            entry & ~(_OFFSET | _COPIED | 1)
            or host & (1 << self.bits) - 1
            or (zero and (self.version < 3 or bitmap is not None))
            or (not host and (allocated or not zeroed))
            or allocated & zeroed
        ):
            self._find(f"{what} is {entry:#x}" + (f" with the bitmap {bitmap:#x}" if bitmap else ""), at)
        elif host:
            cluster = host >> self.bits
            self._refer(cluster, what, at)
            if active:
                if entry & _COPIED:
                    self.copied[cluster] = (what, at)
                if self.result.encrypted:
                    allocated = 0
                size = self.result.data_bytes
                self.result.data += [
                    (guest + n * size, host + n * size) for n in range(allocated.bit_length()) if allocated >> n & 1
                ]
            if cluster in self.tables:
                self._find(f"{what} leads onto the {self.tables[cluster]}", at, host)

    def _external(self, entry: int, bitmap: int | None, what: str, at: int, guest: int) -> None:
        """An entry that leads into the data file: nothing is counted there, and every cluster has its one place."""
        leads = bool(entry & _COPIED)
        zero = entry & 1
        if bitmap is None:
            allocated, zeroed = (1 if leads and not zero else 0), zero
        else:
            allocated, zeroed = bitmap & (1 << _SUBCLUSTERS) - 1, bitmap >> _SUBCLUSTERS
        if (
            entry & ~(_OFFSET | _COPIED | 1)
            or entry & _OFFSET != (guest if leads else 0)
            or (zero and bitmap is not None)
            or (not leads and (allocated or not zeroed))
            or allocated & zeroed
        ):
            self._find(f"{what} is {entry:#x}, in an image with a data file", at)
            return
        size = self.result.data_bytes
        self.result.data += [(guest + n * size, guest + n * size) for n in range(allocated.bit_length()) if allocated >> n & 1]

    def _counts(self, blocks: tuple[int, ...]) -> None:
        """Every count against the references. A count of 64 bits is as good as any: only differences matter."""
        if self.result.dirty:
            return
        width = 1 << self.order
        per_block = (1 << self.bits) * 8 // width
        references = self.references
        stored: dict[int, int] = {}
        for index, block in enumerate(blocks):
            if not block:
                continue
            first = index * per_block
            for at, count in enumerate(self._block(block, width, min(per_block, max(0, self.end - first)))):
                if count:
                    stored[first + at] = count
        for cluster, holders in references.items():
            count = stored.get(cluster, 0)
            if count < len(holders):
                index = cluster // per_block
                block = blocks[index] if index < len(blocks) else 0
                what, at = holders[-1]
                missing = block + cluster % per_block * width // 8 if block else self.table_at + index * 8
                self._find(
                    f"cluster {cluster} has refcount {count} and {len(holders)} references: {what}",
                    at,
                    missing,
                    what,
                )
            if len(holders) > 1 and cluster in self.copied:
                what, at = self.copied[cluster]
                self._find(f"{what} is COPIED, but cluster {cluster} has {len(holders)} references", at)
        self.result.leaks = sum(1 for cluster, count in stored.items() if count > len(references.get(cluster, ())))

    def _block(self, block: int, width: int, count: int) -> tuple[int, ...]:
        length = -(-count * width // 8)
        self.touch(block, length)
        data = self.content[block : block + length].ljust(length, b"\0")
        if width >= 8:
            return struct.unpack(f">{count}{ {8: 'B', 16: 'H', 32: 'I', 64: 'Q'}[width] }", data)
        mask, per_byte = (1 << width) - 1, 8 // width
        return tuple(byte >> at * width & mask for byte in data for at in range(per_byte))[:count]
