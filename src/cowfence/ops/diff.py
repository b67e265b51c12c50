"""Diff: the ranges of a guest's disk in which two disks differ: what an incremental backup has to copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from cowfence.disk.base import Disk
from cowfence.errors import Invalid
from cowfence.ops.compare import pairs_of
from cowfence.qcow2.describe import JsonValue
from cowfence.units import KIB, MIB

_PIECE_BYTES: Final = 2 * MIB


@dataclass(frozen=True, slots=True)
class Change:
    """A range of the second disk that is not what the first has there. ``zero``: it reads as zeros now."""

    start: int
    length_bytes: int
    zero: bool

    def to_dict(self) -> dict[str, JsonValue]:
        return {"start": self.start, "length": self.length_bytes, "zero": self.zero}


def diff(first: Disk, second: Disk, *, unit_bytes: int = 64 * KIB) -> Iterator[Change]:
    """In order, in units of ``unit_bytes``, neighbours joined; what the second disk has past the end of the first counts as
    changed where it is not zeros. Raises Invalid (the unit), and what reading raises."""
    if unit_bytes < 512 or unit_bytes & unit_bytes - 1 or unit_bytes > _PIECE_BYTES:
        raise Invalid(f"the unit of a difference is a power of two from 512 to {_PIECE_BYTES} bytes")
    held: Change | None = None
    for change in _units(first, second, unit_bytes):
        if held is not None and held.start + held.length_bytes == change.start and held.zero == change.zero:
            held = Change(held.start, held.length_bytes + change.length_bytes, held.zero)
            continue
        if held is not None:
            yield held
        held = change
    if held is not None:
        yield held


def _units(first: Disk, second: Disk, unit_bytes: int) -> Iterator[Change]:
    shared = min(first.size, second.size)
    for at, length_bytes in _to_read(first, second, shared, unit_bytes):
        ours, theirs = first.read(at, length_bytes), second.read(at, length_bytes)
        yield from _compared(at, ours, theirs, unit_bytes)
    start = shared - shared % unit_bytes
    if second.size > shared:
        for at in range(start, second.size, _PIECE_BYTES):
            length_bytes = min(_PIECE_BYTES, second.size - at)
            inside = max(0, min(length_bytes, shared - at))
            ours = (first.read(at, inside) if inside else b"").ljust(length_bytes, b"\0")
            yield from _compared(at, ours, second.read(at, length_bytes), unit_bytes)


def _to_read(first: Disk, second: Disk, shared: int, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """Pieces, of whole units, of what is not zeros in both; the last unit that both share in part is left to who goes on."""
    end_of_all = shared if second.size <= shared else shared - shared % unit_bytes
    done = 0
    for one, other in pairs_of(first, second, shared):
        if one.zero and other.zero:
            continue
        at = max(done, one.start - one.start % unit_bytes)
        end = min(end_of_all, one.end + -one.end % unit_bytes)
        while at < end:
            length_bytes = min(_PIECE_BYTES, end - at)
            yield at, length_bytes
            at += length_bytes
        done = max(done, end)


def _compared(at: int, ours: bytes, theirs: bytes, unit_bytes: int) -> Iterator[Change]:
    if ours == theirs:
        return
    for start in range(0, len(theirs), unit_bytes):
        now = theirs[start : start + unit_bytes]
        if ours[start : start + unit_bytes] != now:
            yield Change(at + start, len(now), not np.frombuffer(now, np.uint8).any())
