"""``OverlayStorage``: changes in memory over a file that stays as it is. What an operation would do, without doing it.

Memory is what is changed, in pages of 4 KiB.
"""
# ruff: noqa: ARG002 - memory has no use for marks; wrappers around it have

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from cowfence.errors import Closed, Invalid
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, Capabilities, Storage, WritableBuffer

_PAGE: Final = 4096


class Changed(NamedTuple):
    """A range of the file that is no longer what it was. ``before`` is shorter where the file ended."""

    offset: int
    before: bytes
    after: bytes


class OverlayStorage:
    """``Storage`` over another one, which is only read and stays the caller's. One thread at a time."""

    writable = True

    def __init__(self, below: Storage) -> None:
        self.name = below.name
        self._below = below
        self._size = self._below_end = below.size()
        """``_below_end``: what lies below counts up to here; a file that was cut off and grew again has zeros there."""
        self._pages: dict[int, bytearray] = {}
        self._open = True

    def capabilities(self) -> Capabilities:
        return Capabilities(punches_holes=False)

    def size(self) -> int:
        self._check_open()
        return self._size

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        self._check_open()
        done = 0
        for buffer in buffers:
            view = memoryview(buffer)
            length = min(len(view), self._size - offset - done)
            if length <= 0:
                break
            self._fill(offset + done, view[:length])
            done += length
        return done

    def _fill(self, offset: int, view: memoryview) -> None:
        from_below = max(0, min(len(view), self._below_end - offset))
        got = self._below.readv(offset, (view[:from_below],)) if from_below else 0
        view[got:] = bytes(len(view) - got)
        for number in range(offset // _PAGE, (offset + len(view) - 1) // _PAGE + 1):
            page = self._pages.get(number)
            if page is not None:
                start, end = max(offset, number * _PAGE), min(offset + len(view), (number + 1) * _PAGE)
                view[start - offset : end - offset] = page[start - number * _PAGE : end - number * _PAGE]

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        buffer = bytearray(max(0, min(length_bytes, self._size - offset)))
        self.readv(offset, (buffer,))
        return buffer

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        self._check_open()
        if offset < 0:
            raise Invalid(f"{self.name}: negative offset {offset}")
        for buffer in buffers:
            data = memoryview(buffer)
            at = 0
            while at < len(data):
                number, within = divmod(offset + at, _PAGE)
                count = min(_PAGE - within, len(data) - at)
                self._page(number)[within : within + count] = data[at : at + count]
                at += count
            offset += len(data)
            self._size = max(self._size, offset)

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            page = bytearray(_PAGE)
            from_below = max(0, min(_PAGE, self._below_end - number * _PAGE))
            if from_below:
                self._below.readv(number * _PAGE, (memoryview(page)[:from_below],))
            self._pages[number] = page
        return page

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        for at in range(offset, offset + length_bytes, 1 << 20):
            self.writev(at, (bytes(min(1 << 20, offset + length_bytes - at)),), mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        """What is given back may read as it did before."""
        self._check_open()

    def truncate(self, size_bytes: int, mark: str) -> None:
        self._check_open()
        self._below_end = min(self._below_end, size_bytes)
        for number in [number for number in self._pages if (number + 1) * _PAGE > size_bytes]:
            if number * _PAGE >= size_bytes:
                del self._pages[number]
            else:
                self._pages[number][size_bytes - number * _PAGE :] = bytes((number + 1) * _PAGE - size_bytes)
        self._size = size_bytes

    def fence(self, mark: str) -> None:
        self._check_open()

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        end = min(offset + length_bytes, self._size)
        if offset < end:
            yield Extent(offset, end - offset, zero=False, data=True, present=True, depth=0, host_offset=offset)

    def close(self) -> None:
        self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise Closed(f"{self.name}: the storage is closed")

    def changes(self) -> list[Changed]:
        """What would be different, in order, in pages that are joined; also after ``close``. What is cut off is not listed."""
        found: list[Changed] = []
        # What was cut off, and grew again.
        for number in range(self._below_end // _PAGE, -(-min(self._below.size(), self._size) // _PAGE)):
            self._page(number)
        for number in sorted(self._pages):
            offset = number * _PAGE
            after = bytes(self._pages[number][: max(0, self._size - offset)])
            before = bytearray(_PAGE)
            got = self._below.readv(offset, (before,))
            old = bytes(before[: min(got, len(after))])
            if old == after:
                continue
            last = found[-1] if found else None
            if last is not None and last.offset + len(last.after) == offset and len(last.before) == len(last.after):
                found[-1] = Changed(last.offset, last.before + old, last.after + after)
            else:
                found.append(Changed(offset, old, after))
        return found
