"""Compare two disks: what a guest would read of them, byte for byte.

What both call zeros is not read. Of two disks of different sizes the longer one has to be zeros past the end of the shorter; in
*strict* mode sizes and block status have to agree, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from cowfence.disk.base import Disk
from cowfence.extents import Extent
from cowfence.qcow2.describe import JsonValue
from cowfence.units import MIB, SECTOR_BYTES, align_down

Progress: TypeAlias = Callable[[float], None]
"""Told the fraction that is done, 0 to 1."""

_PIECE_BYTES: Final = 2 * MIB
_ZEROS: Final = bytes(_PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Comparison:
    """``mismatch_offset``: where the first difference is, in bytes, at the start of its sector; None: there is none.

    ``sizes_differ``: one disk is longer. ``status_differs``: in strict mode, what differs at the offset is the block status.
    """

    sizes_differ: bool = False
    mismatch_offset: int | None = None
    status_differs: bool = False
    strict: bool = False

    @property
    def identical(self) -> bool:
        return self.mismatch_offset is None and not (self.strict and self.sizes_differ)

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "identical": self.identical,
            "sizes-differ": self.sizes_differ,
            "mismatch-offset": self.mismatch_offset,
            "status-differs": self.status_differs,
        }


def compare(first: Disk, second: Disk, *, strict: bool = False, progress: Progress | None = None) -> Comparison:
    """Compare two open disks up to their first difference. Raises what reading them raises."""
    sizes_differ = first.size != second.size
    if strict and sizes_differ:
        return Comparison(sizes_differ, strict=True)
    shared, longest = min(first.size, second.size), max(first.size, second.size)
    for one, other in pairs_of(first, second, shared):
        if strict and _status(one) != _status(other):
            return Comparison(sizes_differ, one.start, status_differs=True, strict=True)
        offset = _difference(first, second, one, other)
        if offset is not None:
            return Comparison(sizes_differ, offset, strict=strict)
        if progress is not None:
            progress(one.end / longest)
    if sizes_differ:
        longer = first if first.size > second.size else second
        for extent in longer.extents(shared, longest - shared):
            offset = None if extent.zero else _not_zero(longer, extent.start, extent.length_bytes)
            if offset is not None:
                return Comparison(sizes_differ, offset, strict=strict)
            if progress is not None:
                progress(extent.end / longest)
    return Comparison(sizes_differ, strict=strict)


def pairs_of(first: Disk, second: Disk, length_bytes: int) -> Iterator[tuple[Extent, Extent]]:
    """The extents of both, cut so that each pair covers the same range."""
    if not length_bytes:
        return
    ones, others = first.extents(0, length_bytes), second.extents(0, length_bytes)
    one, other = next(ones), next(others)
    while True:
        end = min(one.end, other.end)
        yield one._replace(length_bytes=end - one.start), other._replace(length_bytes=end - other.start)
        if end >= length_bytes:
            return
        one, other = _rest(one, end, ones), _rest(other, end, others)


def _rest(extent: Extent, start: int, following: Iterator[Extent]) -> Extent:
    return next(following) if extent.end == start else extent._replace(start=start, length_bytes=extent.end - start)


def _status(extent: Extent) -> tuple[bool, bool, bool, bool]:
    """With a place in the file: what is compressed has none, nor has what is not allocated, but a hole of a raw file has."""
    return extent.zero, extent.data, extent.present, extent.host_offset is not None


def _difference(first: Disk, second: Disk, one: Extent, other: Extent) -> int | None:
    if one.zero and other.zero:
        return None
    if one.zero or other.zero:
        return _not_zero(second if one.zero else first, one.start, one.length_bytes)
    for at in range(one.start, one.end, _PIECE_BYTES):
        length_bytes = min(_PIECE_BYTES, one.end - at)
        ours, theirs = first.read(at, length_bytes), second.read(at, length_bytes)
        if ours != theirs:
            return at + _first_difference(ours, theirs)
    return None


def _not_zero(disk: Disk, start: int, length_bytes: int) -> int | None:
    """The first sector of a range that is not zeros."""
    for at in range(start, start + length_bytes, _PIECE_BYTES):
        data = disk.read(at, min(_PIECE_BYTES, start + length_bytes - at))
        zeros = _ZEROS if len(data) == _PIECE_BYTES else bytes(len(data))
        if data != zeros:
            return at + _first_difference(data, zeros)
    return None


def _first_difference(ours: bytes, theirs: bytes) -> int:
    """Where two pieces of one length differ first, at the start of its sector."""
    low, high = 0, len(ours)
    while high - low > 1:
        middle = (low + high) // 2
        if ours[low:middle] != theirs[low:middle]:
            high = middle
        else:
            low = middle
    return align_down(low, SECTOR_BYTES)
