"""Measure: how large the file of a new image would be, before it is made.

Worked out with the engine's own sums: what ``create`` and ``convert`` would lay out for so many clusters of data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cowfence.disk.base import Disk
from cowfence.errors import Invalid
from cowfence.extents import Extent
from cowfence.ops.create import CreateOptions
from cowfence.qcow2.create import NewImage, geometry_of
from cowfence.qcow2.describe import JsonValue
from cowfence.qcow2.geometry import MAX_L1_BYTES, Geometry
from cowfence.qcow2.image import Qcow2Disk
from cowfence.units import SECTOR_BYTES, align_up, div_up

_MAX_SIZE_BYTES: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Measured:
    """``required_bytes``: of the file that holds what the source holds; ``full_bytes``: if the whole disk is written;
    ``bitmaps_bytes``: what its persistent bitmaps would add (None: the format has none)."""

    required_bytes: int
    full_bytes: int
    bitmaps_bytes: int | None = None

    def to_dict(self) -> dict[str, JsonValue]:
        found: dict[str, JsonValue] = {} if self.bitmaps_bytes is None else {"bitmaps": self.bitmaps_bytes}
        return found | {"required": self.required_bytes, "fully-allocated": self.full_bytes}


def measure(options: CreateOptions, source: Disk | None = None) -> Measured:
    """For an image of the given size, or of what ``source``, an open disk, holds. Raises Invalid (options, size) and what
    reading the extents raises."""
    size_bytes = options.size_bytes if source is None else source.size
    if size_bytes is None or not 0 <= size_bytes <= _MAX_SIZE_BYTES:
        raise Invalid("Invalid image size specified. Must be between 0 and 9223372036854775807.")
    size_bytes = align_up(size_bytes, SECTOR_BYTES)
    if options.format == "raw":
        return Measured(size_bytes, size_bytes)
    wanted = NewImage(
        size_bytes=size_bytes,
        cluster_bytes=options.cluster_bytes,
        refcount_bits=options.refcount_bits,
        version=options.version,
        extended_l2=options.extended_l2,
    )
    geometry = geometry_of(wanted)
    if geometry.l1_entries_for(size_bytes) * 8 > MAX_L1_BYTES:
        raise Invalid("The image size is too large (try using a larger cluster size)")
    whole = align_up(size_bytes, geometry.cluster_bytes)
    metadata = _metadata_bytes(geometry, whole)
    if options.encryption is not None:
        metadata += align_up(options.encryption.payload_sector * SECTOR_BYTES, geometry.cluster_bytes)
    # What the new image would share with its backing file nobody has looked at.
    if options.preallocation in ("falloc", "full") or (source is not None and options.backing is not None):
        data = whole
    else:
        data = 0 if source is None else _data_bytes(source.extents(0, source.size), geometry.cluster_bytes)
    return Measured(metadata + data, metadata + whole, _bitmaps_bytes(source, geometry))


def _metadata_bytes(geometry: Geometry, whole: int) -> int:
    """Header, mapping and refcounts of an image all of whose clusters are allocated, in bytes."""
    cluster_bytes = geometry.cluster_bytes
    clusters = whole // cluster_bytes
    l2_clusters = div_up(clusters * geometry.l2_entry_bytes, cluster_bytes)
    l1_clusters = div_up(l2_clusters * 8, cluster_bytes)
    counted = 1 + clusters + l2_clusters + l1_clusters
    blocks = tables = 0
    while True:
        total = counted + blocks + tables
        need_blocks = div_up(total * geometry.refcount_bits, 8 * cluster_bytes)
        need_tables = div_up(need_blocks * 8, cluster_bytes)
        if (need_blocks, need_tables) == (blocks, tables):
            return (total - clusters) * cluster_bytes
        blocks, tables = need_blocks, need_tables


def _data_bytes(extents: Iterable[Extent], cluster_bytes: int) -> int:
    """Whole clusters that hold data."""
    clusters, counted_to = 0, 0
    for extent in extents:
        if extent.zero:
            continue
        first = max(extent.start // cluster_bytes, counted_to)
        last = div_up(extent.end, cluster_bytes)
        clusters += max(0, last - first)
        counted_to = max(counted_to, last)
    return clusters * cluster_bytes


def _bitmaps_bytes(source: Disk | None, geometry: Geometry) -> int | None:
    """None where the source, or the new image, cannot have any."""
    if not isinstance(source, Qcow2Disk) or 2 in (source.header.version, geometry.version):
        return None
    total = directory = 0
    for bitmap in source.bitmaps:
        bits = div_up(source.size, bitmap.granularity_bytes)
        clusters = div_up(div_up(bits, 8), geometry.cluster_bytes)
        total += clusters * geometry.cluster_bytes + align_up(clusters * 8, geometry.cluster_bytes)
        directory += align_up(24 + len(bitmap.name.encode("utf-8", "surrogateescape")), 8)
    return total + align_up(directory, geometry.cluster_bytes)
