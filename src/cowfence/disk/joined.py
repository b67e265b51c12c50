"""``JoinedDisk``: disks one behind the other, as one disk, for reading."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from cowfence.disk.base import Disk, Outcome, Request, Verb, as_outcome
from cowfence.errors import CowfenceError, OutOfRange, ReadOnly
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, WritableBuffer


class JoinedDisk:
    """``Disk`` over ``parts``, which it owns. Writing raises ReadOnly."""

    writable = False

    def __init__(self, parts: Sequence[Disk]) -> None:
        self._parts = list(parts)
        self._starts = list(accumulate((part.size for part in parts), initial=0))
        self.size = self._starts.pop()
        self.block_bytes = max((part.block_bytes for part in parts), default=512)

    def _pieces(self, offset: int, length_bytes: int) -> Iterator[tuple[Disk, int, int, int]]:
        """(part, its start, offset in it, length in bytes) of a range."""
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise OutOfRange(offset, length_bytes, self.size)
        end = offset + length_bytes
        while offset < end:
            number = bisect_right(self._starts, offset) - 1
            part, start = self._parts[number], self._starts[number]
            piece_bytes = min(end, start + part.size) - offset
            yield part, start, offset - start, piece_bytes
            offset += piece_bytes

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        view, at = memoryview(buffer).cast("B"), 0
        for part, _, within, piece_bytes in self._pieces(offset, len(view)):
            part.read_into(within, view[at : at + piece_bytes], wait=wait)
            at += piece_bytes

    def read(self, offset: int, length_bytes: int) -> bytes:
        buffer = bytearray(length_bytes)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        for part, start, within, piece_bytes in self._pieces(offset, length_bytes):
            for extent in part.extents(within, piece_bytes):
                yield extent._replace(start=start + extent.start, host_offset=None)

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for request in requests:
            try:
                if request.verb is not Verb.READ:
                    raise self._refuse()
                buffer = bytearray(request.length_bytes)
                self.read_into(request.offset, buffer, wait=wait)
                outcomes.append(buffer)
            except CowfenceError as error:
                outcomes.append(as_outcome(error))
        return outcomes

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:  # noqa: ARG002
        raise self._refuse()

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:  # noqa: ARG002
        raise self._refuse()

    def discard(self, offset: int, length_bytes: int) -> None:  # noqa: ARG002
        raise self._refuse()

    def _refuse(self) -> ReadOnly:
        return ReadOnly("disks that are joined are for reading")

    def flush(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        for part in self._parts:
            part.close()
