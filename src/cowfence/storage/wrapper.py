"""``StorageWrapper``: a storage that passes every call on. Recorder and fault injector override what they watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cowfence.extents import Extent
from cowfence.storage.base import Buffer, Capabilities, Storage, WritableBuffer


class StorageWrapper:
    """``Storage`` around ``inner``, which it owns: closing the wrapper closes it."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def writable(self) -> bool:
        return self.inner.writable

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def size(self) -> int:
        return self.inner.size()

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        return self.inner.readv(offset, buffers, wait=wait)

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        # Through our own ``readv``, so that a wrapper that watches reads sees these too.
        buffer = bytearray(length_bytes)
        got = self.readv(offset, (buffer,), wait=False)
        return buffer if got == length_bytes else buffer[:got]

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        self.inner.writev(offset, buffers, mark)

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        self.inner.zero(offset, length_bytes, mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self.inner.discard(offset, length_bytes, mark)

    def truncate(self, size_bytes: int, mark: str) -> None:
        self.inner.truncate(size_bytes, mark)

    def fence(self, mark: str) -> None:
        self.inner.fence(mark)

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        return self.inner.extents(offset, length_bytes)

    def close(self) -> None:
        self.inner.close()
