"""The buffer that a connection receives into.

Requests are read where they stand in it, and the data of a WRITE is a slice of it. Where that data is needed for longer than
until the next receive, the whole buffer is left to it and another one taken. A stream of long writes gets its buffers back, and
goes round in a few of them: new memory costs as much as the copy into it does.
"""

from __future__ import annotations

from typing import Final

from cowfence.units import KIB, MIB, align_up

USUAL_BYTES: Final = 256 * KIB
_KEEP_BYTES: Final = 4 * MIB
"""Longer ones are not kept for what may come."""


class Inbox:
    """Bytes ``start`` to ``end`` of ``view`` have arrived and are not done with."""

    __slots__ = ("_buffer", "_spare", "end", "start", "view")

    def __init__(self) -> None:
        self._buffer = bytearray(USUAL_BYTES)
        self._spare: list[bytearray] = []
        self.view = memoryview(self._buffer)
        self.start = 0
        self.end = 0

    def space(self, need_bytes: int, more_bytes: int) -> memoryview:
        """Where the next receive puts its bytes; never empty. ``need_bytes``: what has to stand in one piece from ``start`` on
        before anything can be done; ``more_bytes`` is room beyond it for what may come next."""
        start, end = self.start, self.end
        if start == end:
            self.start = self.end = start = end = 0
            if len(self.view) > _KEEP_BYTES and need_bytes <= USUAL_BYTES:
                self._replace(USUAL_BYTES)
        capacity = len(self.view)
        if capacity - start < need_bytes or end == capacity:
            if capacity < need_bytes:
                self._replace(max(need_bytes + more_bytes, 2 * capacity))
            else:
                self.view[: end - start] = bytes(self.view[start:end])
                self.start, self.end = 0, end - start
        if need_bytes >= USUAL_BYTES:
            # What comes behind a long payload would have to be moved when that one's buffer is left.
            return self.view[self.end : self.start + need_bytes + more_bytes]
        return self.view[self.end :]

    def put(self, data: bytes | bytearray | memoryview, need_bytes: int) -> None:
        """Bytes that arrived by another way than ``space()``."""
        if len(self.view) - self.end < len(data):
            # Room for all that is waited for: else each piece of a long payload would copy what is there of it.
            self._replace(max(USUAL_BYTES, need_bytes, self.end - self.start) + len(data))
        self.view[self.end : self.end + len(data)] = data
        self.end += len(data)

    def leave(self, need_bytes: int) -> None:
        """Leave the buffer, for good, to whoever needs what stands before ``start`` in it."""
        self._replace(max(USUAL_BYTES, need_bytes, self.end - self.start))

    def lend(self) -> bytearray:
        """The same until ``take_back``: much of the kind is coming, and a buffer of the same length takes its place."""
        lent = self._buffer
        self._replace(max(USUAL_BYTES, min(len(lent), _KEEP_BYTES), self.end - self.start))
        return lent

    def take_back(self, buffer: bytearray) -> None:
        """What was lent is done with."""
        if sum(map(len, self._spare)) + len(buffer) <= _KEEP_BYTES:
            self._spare.append(buffer)

    def _replace(self, capacity_bytes: int) -> None:
        # Of few sizes: of many, hardly one would do for another payload, and the allocator's heap would grow by the gaps.
        capacity_bytes = align_up(capacity_bytes, USUAL_BYTES if capacity_bytes <= MIB else MIB)
        arrived = self.view[self.start : self.end]
        buffer = self._spare.pop() if self._spare else bytearray()
        if len(buffer) < capacity_bytes:
            buffer = bytearray(capacity_bytes)
        self._buffer, self.view = buffer, memoryview(buffer)
        self.view[: len(arrived)] = arrived
        self.start, self.end = 0, len(arrived)
