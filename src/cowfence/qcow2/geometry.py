"""Geometry: the sizes that follow from a header's few exponents, the two kinds of address, and the limits of the format.

Everything that turns an offset into an index, or counts entries of a table, asks here, so that the arithmetic of "Cluster
mapping" and "Host cluster management" in the qcow2 specification stands in one place. Derived values are computed once, when
the geometry is made: they are read for every request.

The limits are those of QEMU (``block/qcow2.h``), not of the format: an image beyond them opens nowhere else, and they bound
what a hostile header can make us do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NewType

from cowfence.units import KIB, MIB, div_up

GuestOffset = NewType("GuestOffset", int)
"""A byte address on the guest's disk."""

HostOffset = NewType("HostOffset", int)
"""A byte address in the image file."""

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_CLUSTER_BITS_EXTENDED_L2: Final = 14
MAX_REFCOUNT_ORDER: Final = 6
REFCOUNT_ORDER_V2: Final = 4
MAX_L1_BYTES: Final = 32 * MIB
MAX_REFCOUNT_TABLE_BYTES: Final = 8 * MIB
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_TABLE_BYTES: Final = 64 * MIB
MAX_SNAPSHOT_EXTRA_BYTES: Final = 1 * KIB
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = 64 * MIB
MAX_BACKING_NAME_BYTES: Final = 1023
MAX_HOST_BITS: Final = 56
"""Host offsets are below 2**56: an L1 or L2 entry has no room for more."""

OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9-55 of an L1 or L2 entry: the host offset."""

SUBCLUSTERS: Final = 32
"""Of a cluster, where L2 entries are extended."""

TABLE_ENTRY_BYTES: Final = 8
"""Size of an entry of the L1 table, the refcount table and a plain L2 table."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of an image. Raises ValueError for exponents outside the limits above.

    ``cluster_bits``: log2 of the cluster size in bytes. ``refcount_order``: log2 of the width of a refcount in bits.
    ``extended_l2``: L2 entries are 16 bytes, with a bitmap of 32 subclusters. ``version``: 2 or 3. ``external_data``: guest
    clusters stand in a file of their own, each at its guest offset.
    """

    cluster_bits: int
    refcount_order: int = REFCOUNT_ORDER_V2
    extended_l2: bool = False
    version: int = 3
    external_data: bool = False

    cluster_bytes: int = field(init=False, repr=False, compare=False)
    cluster_mask: int = field(init=False, repr=False, compare=False)
    """``offset & cluster_mask`` is the offset inside the cluster."""
    l2_entry_bytes: int = field(init=False, repr=False, compare=False)
    l2_entry_words: int = field(init=False, repr=False, compare=False)
    """64-bit words of an L2 entry: 1, or 2 where there are subclusters."""
    subclusters: int = field(init=False, repr=False, compare=False)
    """Of a cluster, each allocated by itself: 1, or 32 where L2 entries are extended."""
    subcluster_bytes: int = field(init=False, repr=False, compare=False)
    l2_entries: int = field(init=False, repr=False, compare=False)
    l2_bits: int = field(init=False, repr=False, compare=False)
    l1_shift: int = field(init=False, repr=False, compare=False)
    """``guest_offset >> l1_shift`` is the index into the L1 table."""
    l2_coverage_bytes: int = field(init=False, repr=False, compare=False)
    """Guest bytes that one L2 table maps."""
    refcount_bits: int = field(init=False, repr=False, compare=False)
    refcount_max: int = field(init=False, repr=False, compare=False)
    refcounts_per_block: int = field(init=False, repr=False, compare=False)
    refcount_block_shift: int = field(init=False, repr=False, compare=False)
    """``host_offset >> refcount_block_shift`` is the index into the refcount table."""
    block_coverage_bytes: int = field(init=False, repr=False, compare=False)
    """Host bytes whose refcounts stand in one refcount block."""
    table_entries_per_cluster: int = field(init=False, repr=False, compare=False)
    """Entries of the L1 or refcount table in one cluster."""
    compressed_shift: int = field(init=False, repr=False, compare=False)
    """``x`` of the compressed cluster descriptor: bits 0 to x-1 are the host offset, x to 61 the sector count."""
    compressed_offset_mask: int = field(init=False, repr=False, compare=False)
    compressed_sectors_mask: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            raise ValueError(f"cluster_bits is {self.cluster_bits}, must be {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
        if self.extended_l2 and self.cluster_bits < MIN_CLUSTER_BITS_EXTENDED_L2:
            raise ValueError(
                f"cluster_bits is {self.cluster_bits}, must be at least {MIN_CLUSTER_BITS_EXTENDED_L2} with extended L2 entries"
            )
        if not 0 <= self.refcount_order <= MAX_REFCOUNT_ORDER:
            raise ValueError(f"refcount_order is {self.refcount_order}, must be 0 to {MAX_REFCOUNT_ORDER}")
        if self.version not in (2, 3):
            raise ValueError(f"version is {self.version}, must be 2 or 3")
        if self.version == 2 and (self.extended_l2 or self.external_data or self.refcount_order != REFCOUNT_ORDER_V2):
            raise ValueError("version 2 has 16-bit refcounts, plain L2 entries and no external data file")
        cluster_bytes = 1 << self.cluster_bits
        refcount_bits = 1 << self.refcount_order
        l2_bits = self.cluster_bits - (4 if self.extended_l2 else 3)
        block_bits = self.cluster_bits + 3 - self.refcount_order
        compressed_shift = 62 - (self.cluster_bits - 8)
        for name, value in (
            ("cluster_bytes", cluster_bytes),
            ("cluster_mask", cluster_bytes - 1),
            ("l2_entry_bytes", 16 if self.extended_l2 else TABLE_ENTRY_BYTES),
            ("l2_entry_words", 2 if self.extended_l2 else 1),
            ("subclusters", SUBCLUSTERS if self.extended_l2 else 1),
            ("subcluster_bytes", cluster_bytes // SUBCLUSTERS if self.extended_l2 else cluster_bytes),
            ("l2_entries", 1 << l2_bits),
            ("l2_bits", l2_bits),
            ("l1_shift", self.cluster_bits + l2_bits),
            ("l2_coverage_bytes", 1 << (self.cluster_bits + l2_bits)),
            ("refcount_bits", refcount_bits),
            ("refcount_max", (1 << refcount_bits) - 1),
            ("refcounts_per_block", 1 << block_bits),
            ("refcount_block_shift", self.cluster_bits + block_bits),
            ("block_coverage_bytes", 1 << (self.cluster_bits + block_bits)),
            ("table_entries_per_cluster", cluster_bytes // TABLE_ENTRY_BYTES),
            ("compressed_shift", compressed_shift),
            ("compressed_offset_mask", (1 << compressed_shift) - 1),
            ("compressed_sectors_mask", (1 << (62 - compressed_shift)) - 1),
        ):
            object.__setattr__(self, name, value)

    def clusters_for(self, length_bytes: int) -> int:
        """How many clusters hold ``length_bytes``."""
        return div_up(length_bytes, self.cluster_bytes)

    def l1_entries_for(self, size_bytes: int) -> int:
        """How many L1 entries map a disk of ``size_bytes``."""
        return div_up(size_bytes, self.l2_coverage_bytes)

    def l1_index(self, guest_offset: GuestOffset) -> int:
        return guest_offset >> self.l1_shift

    def l2_index(self, guest_offset: GuestOffset) -> int:
        return (guest_offset >> self.cluster_bits) & (self.l2_entries - 1)

    def refcount_table_index(self, host_offset: HostOffset) -> int:
        return host_offset >> self.refcount_block_shift

    def refcount_block_index(self, host_offset: HostOffset) -> int:
        return (host_offset >> self.cluster_bits) & (self.refcounts_per_block - 1)

    def is_cluster_aligned(self, offset: int) -> bool:
        return not offset & self.cluster_mask
