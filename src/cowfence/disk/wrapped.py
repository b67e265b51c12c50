"""``WrappedDisk``: a disk that passes everything on to another; what changes requests on their way begins here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cowfence.disk.base import Disk, Outcome, Request
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, WritableBuffer


class WrappedDisk:
    """``Disk`` over ``inner``, which it owns."""

    def __init__(self, inner: Disk) -> None:
        self.inner = inner

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def writable(self) -> bool:
        return self.inner.writable

    @property
    def block_bytes(self) -> int:
        return self.inner.block_bytes

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        self.inner.read_into(offset, buffer, wait=wait)

    def read(self, offset: int, length_bytes: int) -> bytes:
        buffer = bytearray(length_bytes)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        self.inner.write(offset, data, fua=fua)

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        self.inner.zero(offset, length_bytes, unmap=unmap, fua=fua)

    def discard(self, offset: int, length_bytes: int) -> None:
        self.inner.discard(offset, length_bytes)

    def flush(self) -> None:
        self.inner.flush()

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        return self.inner.extents(offset, length_bytes)

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        return self.inner.submit(requests, wait=wait)

    def close(self) -> None:
        self.inner.close()
