"""Where the bytes of a disk stand: runs of one state, over the whole chain, as ``qemu-img map`` (7.2) tells them.

A run is of the layer that decides it: depth 0 is the image itself. Two of QEMU's ways are kept because scripts rely on them:

- A hole of a raw file counts as present, at its offset: the raw layer has all of its bytes.
- Allocated clusters of a qcow2 file read as zeros where the file itself has holes (metadata preallocation makes such). That is
  looked for only where the file takes clearly less space than its clusters claim: otherwise every partly written cluster
  would fall into pieces.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cowfence.disk.base import Disk
from cowfence.extents import Extent, merge
from cowfence.qcow2.describe import JsonValue, allocated_bytes
from cowfence.qcow2.image import Qcow2Disk


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A run of the guest's disk, in bytes. ``filename``: the file of the layer where ``offset`` counts, if that is known."""

    start: int
    length_bytes: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None = None
    filename: str | None = None
    compressed: bool = False

    def to_dict(self) -> dict[str, JsonValue]:
        """With the keys of ``qemu-img map --output=json``, in its order."""
        found: dict[str, JsonValue] = {
            "start": self.start,
            "length": self.length_bytes,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
        }
        if self.offset is not None:
            found["offset"] = self.offset
        return found


@dataclass(frozen=True, slots=True)
class _Layer:
    """A file of the chain. ``disk``: of a qcow2 layer; a raw one needs no second look."""

    filename: str
    disk: Qcow2Disk | None = None


def map_disk(disk: Disk, name: str, *, start_offset: int = 0, max_length_bytes: int | None = None) -> tuple[MapEntry, ...]:
    """The runs of the disk whose file has this ``name``, from ``start_offset`` on, clipped to it; none where nothing is left.

    Raises Corrupt for tables that break the format, StorageFailed.
    """
    end = disk.size if max_length_bytes is None else min(disk.size, start_offset + max_length_bytes)
    if start_offset >= end:
        return ()
    layers = _layers(disk, name)
    extents = disk.extents(start_offset, end - start_offset)
    sparse = {depth for depth, layer in enumerate(layers) if layer.disk is not None and _has_hidden_holes(layer.disk)}
    if sparse:
        extents = merge(_with_holes(extents, layers, sparse))
    return tuple(_entry(extent, layers) for extent in extents)


def _layers(disk: Disk | None, name: str) -> list[_Layer]:
    """The files of the chain from the top, by their names as seen from here."""
    layers: list[_Layer] = []
    while isinstance(disk, Qcow2Disk):
        external = disk.header.geometry.external_data and disk.header.data_file
        layers.append(_Layer(os.path.join(os.path.dirname(name), external) if external else name, disk))
        name = os.path.join(os.path.dirname(name), disk.header.backing_file or "")
        disk = disk.backing
    if disk is not None:
        layers.append(_Layer(name))
    return layers


def _has_hidden_holes(disk: Qcow2Disk) -> bool:
    """Whether the file takes less than nine tenths of the bytes that are mapped into it, and two clusters less."""
    allocated = allocated_bytes(disk.storage)
    if allocated is None:
        return False
    clusters = allocated // disk.block_bytes
    enough = max(clusters * 10 // 9, clusters + 2) * disk.block_bytes
    if disk.storage.size() < enough:
        return False
    if disk.header.geometry.external_data:
        # Nothing of the guest's is mapped into it: what is missing is the tables' own.
        return True
    own = (extent for extent in disk.extents(0, disk.size) if extent.depth == 0 and extent.host_offset is not None)
    return sum(extent.length_bytes for extent in own) >= enough


def _with_holes(extents: Iterable[Extent], layers: list[_Layer], sparse: set[int]) -> Iterator[Extent]:
    for extent in extents:
        disk = layers[extent.depth].disk
        if extent.depth not in sparse or disk is None or not extent.data or extent.host_offset is None:
            yield extent
            continue
        at, shift = extent.start, extent.start - extent.host_offset
        for piece in disk.data.extents(extent.host_offset, extent.length_bytes):
            yield extent._replace(
                start=piece.start + shift, length_bytes=piece.length_bytes, zero=piece.zero, host_offset=piece.start
            )
            at = piece.end + shift
        if at < extent.end:  # a last cluster that the file does not reach
            yield extent._replace(start=at, length_bytes=extent.end - at, zero=True, host_offset=at - shift)


def _entry(extent: Extent, layers: list[_Layer]) -> MapEntry:
    return MapEntry(
        start=extent.start,
        length_bytes=extent.length_bytes,
        depth=extent.depth,
        present=extent.present or (layers[extent.depth].disk is None and extent.host_offset is not None),
        zero=extent.zero,
        data=extent.data,
        offset=extent.host_offset,
        filename=None if extent.host_offset is None else layers[extent.depth].filename,
        compressed=extent.compressed,
    )
