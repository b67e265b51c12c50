"""Extents: runs of a disk that share one state. Used by map, NBD block status, copying and comparing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """A run of guest bytes in one state.

    ``zero``: reads as zeros. ``data``: bytes are read from a host file. ``present``: some layer of the chain has an
    allocation for it (false: a hole all the way down). ``depth``: 0 is the top image, 1 its backing file, and so on.
    ``host_offset``: where the bytes stand in that layer's file, if they stand there plainly.
    """

    start: int
    length_bytes: int
    zero: bool
    data: bool
    present: bool
    depth: int = 0
    host_offset: int | None = None
    compressed: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length_bytes

    def follows(self, earlier: Extent) -> bool:
        """True if this extent goes on where ``earlier`` ends, in the same state."""
        if self.start != earlier.end or self[2:6] != earlier[2:6] or self.compressed != earlier.compressed:
            return False
        if self.host_offset is None or earlier.host_offset is None:
            return self.host_offset is earlier.host_offset
        return self.host_offset == earlier.host_offset + earlier.length_bytes


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same runs with neighbours of one state joined; empty ones dropped."""
    pending: Extent | None = None
    for extent in extents:
        if not extent.length_bytes:
            continue
        if pending is not None and extent.follows(pending):
            pending = pending._replace(length_bytes=pending.length_bytes + extent.length_bytes)
            continue
        if pending is not None:
            yield pending
        pending = extent
    if pending is not None:
        yield pending
