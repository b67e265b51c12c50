"""``MemoryStorage``: a file that is bytes in memory. The crash explorer opens millions of them.

The initial bytes are not copied until the first change: a crash state that is opened and only read costs nothing but its
object, and a snapshot of an unchanged file is the very same bytes. Every call is one step under the interpreter's lock.
"""
# ruff: noqa: ARG002 - memory has no use for marks; wrappers around it have

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cowfence.errors import Closed, Invalid, ReadOnly
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, Capabilities, WritableBuffer

_CAPABILITIES = Capabilities()


class MemoryStorage:
    """``Storage`` in memory. ``snapshot`` gives its bytes, after ``close`` too."""

    __slots__ = ("_data", "_is_open", "name", "writable")

    def __init__(self, initial: bytes = b"", name: str = "memory", writable: bool = True) -> None:
        self._data: bytes | bytearray = initial
        self._is_open = True
        self.name = name
        self.writable = writable

    def snapshot(self) -> bytes:
        """The whole file as it is now."""
        return bytes(self._data)

    def capabilities(self) -> Capabilities:
        return _CAPABILITIES

    def size(self) -> int:
        self._require_open()
        return len(self._data)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        self._require_open()
        _require_offset(self.name, offset)
        done = 0
        for buffer in buffers:
            piece = self._data[offset + done : offset + done + len(buffer)]
            memoryview(buffer)[: len(piece)] = piece
            done += len(piece)
        return done

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        self._require_open()
        _require_offset(self.name, offset)
        return self._data[offset : offset + length_bytes]

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        data = self._changeable()
        _require_offset(self.name, offset)
        new = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        if not len(new):
            return
        if offset > len(data):
            data.extend(bytes(offset - len(data)))
        data[offset : offset + len(new)] = new

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        self.writev(offset, (bytes(length_bytes),), mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        data = self._changeable()
        _require_offset(self.name, offset)
        end = min(offset + length_bytes, len(data))
        if offset < end:
            data[offset:end] = bytes(end - offset)

    def truncate(self, size_bytes: int, mark: str) -> None:
        data = self._changeable()
        _require_offset(self.name, size_bytes)
        del data[size_bytes:]
        data.extend(bytes(size_bytes - len(data)))

    def fence(self, mark: str) -> None:
        self._require_open()

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        end = min(offset + length_bytes, self.size())
        if offset < end:
            yield Extent(offset, end - offset, zero=False, data=True, present=True, depth=0, host_offset=offset)

    def close(self) -> None:
        self._is_open = False

    def _require_open(self) -> None:
        if not self._is_open:
            raise Closed(f"{self.name}: the storage is closed")

    def _changeable(self) -> bytearray:
        self._require_open()
        if not self.writable:
            raise ReadOnly(f"{self.name}: opened read-only")
        if not isinstance(self._data, bytearray):
            self._data = bytearray(self._data)
        return self._data


def _require_offset(name: str, offset: int) -> None:
    if offset < 0:
        raise Invalid(f"{name}: negative offset {offset}")
