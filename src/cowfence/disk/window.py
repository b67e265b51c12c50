"""``WindowDisk``: a disk from some offset on, as a disk of its own (a partition, or what follows a header)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cowfence.disk.base import Disk, Outcome, Request, Verb, as_outcome, in_bytes
from cowfence.disk.wrapped import WrappedDisk
from cowfence.errors import CowfenceError, Invalid, OutOfRange
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, WritableBuffer


class WindowDisk(WrappedDisk):
    """``Disk`` over what ``inner`` has from ``start`` on: ``length_bytes``, or all. Raises Invalid where that is outside."""

    def __init__(self, inner: Disk, start: int, length_bytes: int | None = None) -> None:
        super().__init__(inner)
        room_bytes = inner.size - start
        self._start = start
        self._length_bytes = room_bytes if length_bytes is None else length_bytes
        if start < 0 or not 0 <= self._length_bytes <= room_bytes:
            raise Invalid(f"a window at {start} of a disk of {inner.size} bytes")

    @property
    def size(self) -> int:
        return self._length_bytes

    def _inside(self, offset: int, length_bytes: int) -> int:
        """The offset in the inner disk. Raises OutOfRange."""
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self._length_bytes:
            raise OutOfRange(offset, length_bytes, self._length_bytes)
        return self._start + offset

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        self.inner.read_into(self._inside(offset, len(buffer)), buffer, wait=wait)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        data = in_bytes(data)
        self.inner.write(self._inside(offset, len(data)), data, fua=fua)

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        self.inner.zero(self._inside(offset, length_bytes), length_bytes, unmap=unmap, fua=fua)

    def discard(self, offset: int, length_bytes: int) -> None:
        self.inner.discard(self._inside(offset, length_bytes), length_bytes)

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        for extent in self.inner.extents(self._inside(offset, length_bytes), length_bytes):
            yield extent._replace(start=extent.start - self._start)

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(requests)
        passed: list[Request] = []
        places: list[int] = []
        for index, request in enumerate(requests):
            if request.verb is not Verb.FLUSH:
                length_bytes = len(in_bytes(request.data)) if request.verb is Verb.WRITE else request.length_bytes
                try:
                    request = request._replace(offset=self._inside(request.offset, length_bytes))
                except CowfenceError as error:
                    outcomes[index] = as_outcome(error)
                    continue
            passed.append(request)
            places.append(index)
        for index, outcome in zip(places, self.inner.submit(passed, wait=wait), strict=True):
            outcomes[index] = outcome
        return outcomes
