"""``EncryptedStorage``: what lies in a file behind a cipher of sectors, as plain bytes.

For files that are encrypted as a whole (LUKS without qcow2). What does not begin or end with a sector is read, changed and
written with its sectors, one such write at a time. Nothing of the file reads as zeros by itself, so there are no holes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol

from cowfence.extents import Extent
from cowfence.storage.base import Buffer, Capabilities, Storage, WritableBuffer
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import MIB, SECTOR_BYTES, align_down, align_up

_PIECE_BYTES: Final = MIB


class Cipher(Protocol):
    """Enciphers whole sectors, the first of which has the given number."""

    def encrypt(self, first_sector: int, data: Buffer) -> bytes: ...

    def decrypt(self, first_sector: int, data: Buffer) -> bytes: ...


class EncryptedStorage(StorageWrapper):
    """The plain bytes of ``inner`` from offset ``start`` on, which is sector 0 of the cipher."""

    def __init__(self, inner: Storage, cipher: Cipher, start: int) -> None:
        super().__init__(inner)
        self._cipher = cipher
        self._start = start
        self._partial = threading.Lock()
        """Held from the reading to the writing of sectors that are written in part."""

    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities(), holes_past_end=False, punches_holes=False)

    def size(self) -> int:
        return align_down(max(0, self.inner.size() - self._start), SECTOR_BYTES)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        length_bytes = min(sum(map(len, views)), max(0, self.size() - offset))
        plain = memoryview(self._plain(offset, length_bytes, wait=wait))
        at = 0
        for view in views:
            part = plain[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return length_bytes

    def _plain(self, offset: int, length_bytes: int, *, wait: bool = True) -> bytes:
        first = align_down(offset, SECTOR_BYTES)
        buffer = bytearray(align_up(offset + length_bytes, SECTOR_BYTES) - first)
        self.inner.readv(self._start + first, (buffer,), wait=wait)
        return self._cipher.decrypt(first // SECTOR_BYTES, buffer)[offset - first : offset - first + length_bytes]

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        data = b"".join(buffers)
        with self._partial:
            first, end = align_down(offset, SECTOR_BYTES), offset + len(data)
            last = align_down(end, SECTOR_BYTES)
            if first < offset:
                data = self._plain(first, offset - first) + data
            if last < end:
                data += self._plain(end, last + SECTOR_BYTES - end)
            self.inner.writev(self._start + first, (self._cipher.encrypt(first // SECTOR_BYTES, data),), mark)

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        for at in range(offset, offset + length_bytes, _PIECE_BYTES):
            self.writev(at, (bytes(min(_PIECE_BYTES, offset + length_bytes - at)),), mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        """Nothing: what would come back deciphered is nobody's data."""

    def truncate(self, size_bytes: int, mark: str) -> None:
        self.inner.truncate(self._start + size_bytes, mark)

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        end = min(offset + length_bytes, self.size())
        if end > offset:
            yield Extent(offset, end - offset, zero=False, data=True, present=True)
