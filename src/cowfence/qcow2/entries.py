"""Table entries: words decoded into a closed set of values, and back.

An entry is one number: of 64 bits, or, of an extended L2 table, of 128. The lower 64 are then the word that plain tables have,
too, so that its flags and its offset are found in the same place; the upper 64 are the bitmap of the subclusters (section
"Extended L2 Entries"): bits 0-31 of it say which are allocated, bits 32-63 which read as zeros.

Sections "Cluster mapping" and "Host cluster management" of the qcow2 specification. A decode rejects every reserved bit and
every misaligned offset with ``BadEntry``, which says what is wrong; the caller knows where the word stands and makes a
``Corrupt`` of it. For every word that decodes, ``encode(decode(word)) == word``.

These functions are for single entries; whole tables are judged by array arithmetic over the same bit constants.

Where the guest's data has a file of its own (``Geometry.external_data``), offset 0 is a place like any other: it is one where
the entry is COPIED. Whether each cluster stands at its guest offset is for the caller to see, who knows the guest offset.

Three choices where the specification leaves room. A compressed entry with the COPIED flag is rejected (its bit is 0 "for
clusters that are unused, compressed or require COW"). The bitmap of a compressed cluster is "not used": it is ignored, and
encoded as 0 (the one case in which encoding gives another number than was decoded). A refcount table entry could hold more than
56 bits, but no table entry could point to the clusters it would count, so offsets from 2**56 are rejected there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from cowfence.qcow2.geometry import MAX_HOST_BITS, OFFSET_MASK, SUBCLUSTERS, Geometry, HostOffset
from cowfence.units import SECTOR_BYTES

COPIED: Final = 1 << 63
"""Set where the refcount of what the entry points to is exactly one, so that it may be written in place."""
COMPRESSED: Final = 1 << 62
BITMAP_SHIFT: Final = 64
"""``entry >> BITMAP_SHIFT`` is the bitmap of an extended L2 entry."""
WORD_MASK: Final = (1 << 64) - 1
ALL_SUBCLUSTERS: Final = (1 << SUBCLUSTERS) - 1
ZERO: Final = 1
"""Standard descriptors of version 3: the cluster reads as zeros, whatever its offset."""

_STANDARD_RESERVED: Final = ((1 << 62) - 1) & ~OFFSET_MASK & ~ZERO
_L1_RESERVED: Final = ((1 << 63) - 1) & ~OFFSET_MASK
_REFCOUNT_TABLE_RESERVED: Final = 0x1FF
_HOST_LIMIT: Final = 1 << MAX_HOST_BITS


class BadEntry(ValueError):
    """A word that is no valid entry, or a value that has no word. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Unallocated:
    """The cluster is read from the backing file, or as zeros where there is none."""


@dataclass(frozen=True, slots=True)
class Data:
    """The cluster stands plainly at ``host_offset``."""

    host_offset: HostOffset
    copied: bool


@dataclass(frozen=True, slots=True)
class Zero:
    """The cluster reads as zeros. ``host_offset``: a cluster kept for it (a preallocation), or None."""

    host_offset: HostOffset | None
    copied: bool


@dataclass(frozen=True, slots=True)
class Subclustered:
    """The subclusters are in different states. Of both bitmaps bit ``n`` is subcluster ``n``, and no bit is set in both.

    ``allocated``: stands at its place in the cluster at ``host_offset``. ``zero``: reads as zeros. Neither: is read from the
    backing file. ``host_offset``: None where no cluster is allocated.
    """

    host_offset: HostOffset | None
    copied: bool
    allocated: int
    zero: int


@dataclass(frozen=True, slots=True)
class Compressed:
    """The cluster stands compressed at ``host_offset`` (not aligned to anything).

    ``length_bytes`` is what may be read for it: up to the end of its last 512-byte sector, so the stream itself is at most
    that long and other data may follow it.
    """

    host_offset: HostOffset
    length_bytes: int


Mapping: TypeAlias = Data | Zero | Compressed | Unallocated | Subclustered

UNALLOCATED: Final = Unallocated()
ZERO_PLAIN: Final = Zero(None, False)


class L1Entry(NamedTuple):
    """Where an L2 table stands (None: there is none), and whether its refcount is exactly one."""

    host_offset: HostOffset | None
    copied: bool


def decode_l2(entry: int, geometry: Geometry) -> Mapping:
    """The mapping that an L2 entry describes. Raises ``BadEntry``."""
    if not entry:
        return UNALLOCATED
    if geometry.extended_l2:
        return _decode_extended(entry, geometry)
    if entry & COMPRESSED:
        return _decode_compressed(entry, geometry)
    if entry & _STANDARD_RESERVED:
        raise BadEntry(f"reserved bits {entry & _STANDARD_RESERVED:#x} are set in L2 entry {entry:#018x}")
    host_offset = entry & OFFSET_MASK
    if host_offset & geometry.cluster_mask:
        raise BadEntry(f"host offset {host_offset:#x} is not aligned to the cluster size")
    copied = bool(entry & COPIED)
    host = _host(host_offset, copied, geometry)
    if copied and host is None:
        raise BadEntry(f"the COPIED flag is set without a host offset in L2 entry {entry:#018x}")
    if entry & ZERO:
        if geometry.version < 3:
            raise BadEntry("the zero flag is set, which version 2 does not have")
        return Zero(host, copied)
    assert host is not None
    return Data(host, copied)


def _host(host_offset: int, copied: bool, geometry: Geometry) -> HostOffset | None:
    """The place that an entry leads to; None where it leads nowhere."""
    return HostOffset(host_offset) if host_offset or (copied and geometry.external_data) else None


def _decode_extended(entry: int, geometry: Geometry) -> Mapping:
    if entry & COMPRESSED:
        return _decode_compressed(entry & WORD_MASK, geometry)
    if entry & _STANDARD_RESERVED:
        raise BadEntry(f"reserved bits {entry & _STANDARD_RESERVED:#x} are set in L2 entry {entry & WORD_MASK:#018x}")
    if entry & ZERO:
        raise BadEntry("the zero flag is set, which extended L2 entries do not have")
    host_offset = entry & OFFSET_MASK
    if host_offset & geometry.cluster_mask:
        raise BadEntry(f"host offset {host_offset:#x} is not aligned to the cluster size")
    copied = bool(entry & COPIED)
    bitmap = entry >> BITMAP_SHIFT
    allocated, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
    if allocated & zero:
        raise BadEntry(f"subclusters {allocated & zero:#x} are allocated and read as zeros")
    host = _host(host_offset, copied, geometry)
    if host is None and (copied or allocated):
        raise BadEntry("the COPIED flag is set, or subclusters are allocated, without a host offset")
    if host is not None and allocated == ALL_SUBCLUSTERS:
        return Data(host, copied)
    if zero == ALL_SUBCLUSTERS:
        return Zero(host, copied)
    return Subclustered(host, copied, allocated, zero)


def _decode_compressed(entry: int, geometry: Geometry) -> Compressed:
    if geometry.external_data:
        raise BadEntry("a compressed cluster, which an image with an external data file does not have")
    if entry & COPIED:
        raise BadEntry("the COPIED flag is set on a compressed cluster")
    host_offset = entry & geometry.compressed_offset_mask
    if host_offset >= _HOST_LIMIT:
        raise BadEntry(f"compressed data at {host_offset:#x} lies beyond 2**{MAX_HOST_BITS}")
    # The field counts the sectors after the one that holds the first byte.
    sectors = ((entry >> geometry.compressed_shift) & geometry.compressed_sectors_mask) + 1
    return Compressed(HostOffset(host_offset), sectors * SECTOR_BYTES - host_offset % SECTOR_BYTES)


def encode_l2(mapping: Mapping, geometry: Geometry) -> int:
    """The L2 entry for a mapping. Raises ``BadEntry`` for values that have no entry."""
    match mapping:
        case Unallocated():
            return 0
        case Data(host_offset, copied):
            if _host(host_offset, copied, geometry) is None:
                raise BadEntry("a data cluster at host offset 0 would be the header")
            bitmap = ALL_SUBCLUSTERS if geometry.extended_l2 else 0
            return _checked_offset(host_offset, geometry) | (COPIED if copied else 0) | bitmap << BITMAP_SHIFT
        case Subclustered(host_offset, copied, allocated, zero):
            return _encode_subclustered(host_offset, copied, allocated, zero, geometry)
        case Zero(host_offset, copied):
            if geometry.extended_l2:
                return _encode_subclustered(host_offset, copied, 0, ALL_SUBCLUSTERS, geometry)
            if geometry.version < 3:
                raise BadEntry("this image has no zero flag in its L2 entries")
            if host_offset is None or _host(host_offset, copied, geometry) is None:
                if copied or host_offset is not None:
                    raise BadEntry("a zero cluster needs a host offset above 0 to be COPIED")
                return ZERO
            return _checked_offset(host_offset, geometry) | ZERO | (COPIED if copied else 0)
        case Compressed(host_offset, length_bytes):
            return _encode_compressed(host_offset, length_bytes, geometry)


def _encode_subclustered(host_offset: HostOffset | None, copied: bool, allocated: int, zero: int, geometry: Geometry) -> int:
    if not geometry.extended_l2:
        raise BadEntry("this image has no subclusters")
    if allocated & zero or not 0 <= allocated | zero <= ALL_SUBCLUSTERS:
        raise BadEntry(f"subclusters {allocated:#x} cannot be allocated while {zero:#x} read as zeros")
    bitmap = (zero << SUBCLUSTERS | allocated) << BITMAP_SHIFT
    if host_offset is None or _host(host_offset, copied, geometry) is None:
        if copied or allocated or host_offset is not None:
            raise BadEntry("subclusters need a host offset above 0 to be allocated or COPIED")
        return bitmap
    return _checked_offset(host_offset, geometry) | (COPIED if copied else 0) | bitmap


def _encode_compressed(host_offset: int, length_bytes: int, geometry: Geometry) -> int:
    if not 0 <= host_offset < min(_HOST_LIMIT, geometry.compressed_offset_mask + 1):
        raise BadEntry(f"compressed data cannot stand at {host_offset:#x} with clusters of {geometry.cluster_bytes} bytes")
    if length_bytes < 1:
        raise BadEntry("compressed data cannot be empty")
    last_byte = host_offset % SECTOR_BYTES + length_bytes - 1
    additional_sectors = last_byte // SECTOR_BYTES
    if additional_sectors > geometry.compressed_sectors_mask:
        raise BadEntry(f"{length_bytes} bytes are too many for a compressed cluster")
    return COMPRESSED | additional_sectors << geometry.compressed_shift | host_offset


def whole(entry: int, geometry: Geometry) -> int:
    """The entry of a cluster all of which is data where ``entry``, a standard one, leads."""
    return entry & (COPIED | OFFSET_MASK) | (ALL_SUBCLUSTERS << BITMAP_SHIFT if geometry.extended_l2 else 0)


def zeroed(entry: int, geometry: Geometry) -> int:
    """The entry of a cluster that reads as zeros and keeps the host cluster of ``entry``, a standard one, if that has one."""
    if geometry.extended_l2:
        return entry & (COPIED | OFFSET_MASK) | ALL_SUBCLUSTERS << SUBCLUSTERS + BITMAP_SHIFT
    return entry | ZERO


def decode_l1(entry: int, geometry: Geometry) -> L1Entry:
    """Where the L2 table of an L1 entry stands. Raises ``BadEntry``."""
    if entry & _L1_RESERVED:
        raise BadEntry(f"reserved bits {entry & _L1_RESERVED:#x} are set in L1 entry {entry:#018x}")
    host_offset = entry & OFFSET_MASK
    if host_offset & geometry.cluster_mask:
        raise BadEntry(f"L2 table offset {host_offset:#x} is not aligned to the cluster size")
    copied = bool(entry & COPIED)
    if copied and not host_offset:
        raise BadEntry("the COPIED flag is set on an L1 entry without an L2 table")
    return L1Entry(HostOffset(host_offset) if host_offset else None, copied)


def encode_l1(entry: L1Entry, geometry: Geometry) -> int:
    """The L1 entry for the place of an L2 table. Raises ``BadEntry`` for values that have no entry."""
    if not entry.host_offset:
        if entry.copied or entry.host_offset is not None:
            raise BadEntry("an L1 entry needs a host offset above 0 to be COPIED")
        return 0
    return _checked_offset(entry.host_offset, geometry) | (COPIED if entry.copied else 0)


def decode_refcount_table_entry(entry: int, geometry: Geometry) -> HostOffset | None:
    """Where a refcount block stands; None where there is none and all its refcounts are 0. Raises ``BadEntry``."""
    if not entry:
        return None
    if entry & _REFCOUNT_TABLE_RESERVED:
        raise BadEntry(f"reserved bits {entry & _REFCOUNT_TABLE_RESERVED:#x} are set in refcount table entry {entry:#018x}")
    return HostOffset(_checked_offset(entry, geometry))


def encode_refcount_table_entry(host_offset: HostOffset | None, geometry: Geometry) -> int:
    """The refcount table entry for the place of a refcount block. Raises ``BadEntry``."""
    return _checked_offset(host_offset, geometry) if host_offset else 0


def _checked_offset(host_offset: int, geometry: Geometry) -> int:
    if host_offset & geometry.cluster_mask:
        raise BadEntry(f"host offset {host_offset:#x} is not aligned to the cluster size")
    if not 0 <= host_offset < _HOST_LIMIT:
        raise BadEntry(f"host offset {host_offset:#x} lies beyond 2**{MAX_HOST_BITS}")
    return host_offset
