"""``OverlayStorage``: a storage that keeps every change in memory, over another that it only reads.

What would be done to a file can be done to its overlay in full, and looked at: ``changed`` says which bytes of the file it
would have touched. Zeroed and discarded ranges cost no memory, whatever their length.
"""
# ruff: noqa: ARG002 - memory has no use for marks

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cowfence.errors import Closed, Invalid, ReadOnly
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, Capabilities, Storage, WritableBuffer

_CAPABILITIES = Capabilities()


class _Segment(NamedTuple):
    """``data``: None reads as zeros."""

    start: int
    end: int
    data: bytes | None

    def part(self, start: int, end: int) -> _Segment:
        return _Segment(start, end, None if self.data is None else self.data[start - self.start : end - self.start])


class OverlayStorage:
    """``Storage`` over ``inner``, which it owns (closing the overlay closes it), never changes, and need not be writable."""

    def __init__(self, inner: Storage, *, writable: bool = True) -> None:
        self.inner = inner
        self.writable = writable
        self._guard = threading.RLock()
        self._is_open = True
        self._starts: list[int] = []
        self._segments: list[_Segment] = []
        """What was changed, in order, none over another; ``_starts`` is the start of each."""
        self._inner_bytes = inner.size()
        self._size = self._shown = self._inner_bytes
        """``_shown``: the bytes of ``inner`` from here on were cut away, and read as zeros if the file grows again."""

    @property
    def name(self) -> str:
        return self.inner.name

    def changed(self) -> list[tuple[int, int]]:
        """The ranges (offset, length in bytes) of the file that were written, zeroed, discarded, cut away or added; in order,
        neighbours joined. A range is in it even if its bytes are the same as before."""
        with self._guard:
            ranges = [(segment.start, segment.end) for segment in self._segments]
            ranges.append((self._shown, self._inner_bytes))
            ranges.append((self._inner_bytes, self._size))
        joined: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if start >= end:
                continue
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], end))
            else:
                joined.append((start, end))
        return [(start, end - start) for start, end in joined]

    def capabilities(self) -> Capabilities:
        return _CAPABILITIES

    def size(self) -> int:
        with self._guard:
            self._require_open()
            return self._size

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        with self._guard:
            self._require_open()
            self._require_offset(offset)
            done = 0
            for buffer in buffers:
                length = min(len(buffer), max(0, self._size - offset - done))
                if length:
                    self._read(offset + done, memoryview(buffer).cast("B")[:length], wait=wait)
                    done += length
            return done

    def _read(self, offset: int, view: memoryview, *, wait: bool) -> None:
        below = min(len(view), max(0, self._shown - offset))
        got = self.inner.readv(offset, (view[:below],), wait=wait) if below else 0
        view[got:] = bytes(len(view) - got)
        for segment in self._within(offset, offset + len(view)):
            part = bytes(segment.end - segment.start) if segment.data is None else segment.data
            view[segment.start - offset : segment.end - offset] = part

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        buffer = bytearray(length_bytes)
        got = self.readv(offset, (buffer,), wait=False)
        return buffer[:got]

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        data = b"".join(buffers)
        with self._guard:
            self._require_writable()
            self._require_offset(offset)
            self._replace(_Segment(offset, offset + len(data), data))
            if data:
                self._size = max(self._size, offset + len(data))

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        with self._guard:
            self._require_writable()
            self._require_offset(offset)
            self._replace(_Segment(offset, offset + length_bytes, None))
            if length_bytes:
                self._size = max(self._size, offset + length_bytes)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        with self._guard:
            self._require_writable()
            self._require_offset(offset)
            self._replace(_Segment(offset, min(offset + length_bytes, self._size), None))

    def truncate(self, size_bytes: int, mark: str) -> None:
        with self._guard:
            self._require_writable()
            self._require_offset(size_bytes)
            if size_bytes < self._size:
                self._cut(size_bytes, self._size)
            self._shown = min(self._shown, size_bytes)
            self._size = size_bytes

    def fence(self, mark: str) -> None:
        with self._guard:
            self._require_open()

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        end = min(offset + length_bytes, self.size())
        at = offset
        for segment in self._within(offset, end):
            yield from self._untouched(at, segment.start)
            yield _extent(segment.start, segment.end, zero=segment.data is None)
            at = segment.end
        yield from self._untouched(at, end)

    def _untouched(self, start: int, end: int) -> Iterator[Extent]:
        border = min(end, self._shown)
        if start < border:
            yield from self.inner.extents(start, border - start)
        start = max(start, border)
        if start < end:
            yield _extent(start, end, zero=True)

    def close(self) -> None:
        self._is_open = False
        self.inner.close()

    # The segments

    def _within(self, start: int, end: int) -> list[_Segment]:
        """What was changed of a range, clipped to it."""
        with self._guard:
            first, stop = self._span(start, end)
            return [segment.part(max(segment.start, start), min(segment.end, end)) for segment in self._segments[first:stop]]

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Indices of the segments that share a byte with a range."""
        first = bisect_right(self._starts, start)
        if first and self._segments[first - 1].end > start:
            first -= 1
        return first, max(first, bisect_left(self._starts, end))

    def _cut(self, start: int, end: int) -> int:
        """Forget what was changed of a range; the index where a segment for it would stand."""
        first, stop = self._span(start, end)
        kept: list[_Segment] = []
        at = first
        for segment in self._segments[first:stop]:
            if segment.start < start:
                kept.append(segment.part(segment.start, start))
                at += 1
            if segment.end > end:
                kept.append(segment.part(end, segment.end))
        self._segments[first:stop] = kept
        self._starts[first:stop] = [segment.start for segment in kept]
        return at

    def _replace(self, segment: _Segment) -> None:
        if segment.start < segment.end:
            at = self._cut(segment.start, segment.end)
            self._segments.insert(at, segment)
            self._starts.insert(at, segment.start)

    def _require_open(self) -> None:
        if not self._is_open:
            raise Closed(f"{self.name}: the storage is closed")

    def _require_writable(self) -> None:
        self._require_open()
        if not self.writable:
            raise ReadOnly(f"{self.name}: opened read-only")

    def _require_offset(self, offset: int) -> None:
        if offset < 0:
            raise Invalid(f"{self.name}: negative offset {offset}")


def _extent(start: int, end: int, *, zero: bool) -> Extent:
    return Extent(start, end - start, zero=zero, data=not zero, present=not zero, host_offset=start)
