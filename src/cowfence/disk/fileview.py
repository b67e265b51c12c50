"""A disk as a Python file object, for everything that reads or writes files: tarfile, zipfile, shutil, hashlib.file_digest.

It behaves like a block device: the size is fixed, reading at the end gives nothing, writing there raises ``NoSpace``, and
``truncate`` is refused. The position belongs to the file object; the disk has none, so that many views may share one disk.

``flush`` and ``close`` of the raw view flush the disk, so that what was written then survives a power cut. A buffered view
empties its buffer with ``flush`` but does not hand the flush on (Python's own classes work so): call ``disk.flush()`` for that,
or close the view.

Errors of the disk pass through as they are.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from cowfence.disk.base import Disk
from cowfence.errors import Invalid, NoSpace
from cowfence.units import KIB

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class DiskFile(io.RawIOBase):
    """An unbuffered view of ``disk``; see ``as_file`` for a buffered one. ``close_disk``: closing it closes the disk too."""

    def __init__(self, disk: Disk, *, close_disk: bool = False) -> None:
        super().__init__()
        self._disk = disk
        self._close_disk = close_disk
        self._position = 0

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._disk.size

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._disk.writable

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._disk.size}
        if whence not in bases:
            raise Invalid(f"seek: whence is {whence}, must be 0, 1 or 2")
        position = bases[whence] + offset
        if position < 0:
            raise Invalid(f"seek: position {position} lies before the start of the disk")
        self._position = position
        return position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill ``buffer`` from the position; returns the bytes read, fewer than asked for only at the end of the disk."""
        self._check_open()
        with memoryview(buffer) as view, view.cast("B") as octets:
            length_bytes = self._length_to_end(len(octets))
            if length_bytes:
                with octets[:length_bytes] as part:
                    self._disk.read_into(self._position, part)
        self._position += length_bytes
        return length_bytes

    def write(self, data: ReadableBuffer, /) -> int:
        """Write at the position; returns the bytes written, fewer than given at the end of the disk. NoSpace behind it."""
        self._check_open()
        if not self._disk.writable:
            raise io.UnsupportedOperation("write: the disk is open for reading only")
        with memoryview(data) as view, view.cast("B") as octets:
            length_bytes = self._length_to_end(len(octets))
            if len(octets) and not length_bytes:
                raise NoSpace(
                    f"write at {self._position}: the disk ends at {self._disk.size} bytes and does not grow by writing"
                )
            if length_bytes:
                with octets[:length_bytes] as part:
                    self._disk.write(self._position, part)
        self._position += length_bytes
        return length_bytes

    def truncate(self, size: int | None = None, /) -> int:  # noqa: ARG002 (any size is refused)
        raise io.UnsupportedOperation("truncate: the size of a disk is changed by resize")

    def flush(self) -> None:
        """Flush the disk: what was written through this view survives a power cut afterwards."""
        super().flush()
        if self._disk.writable:
            self._disk.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
        finally:
            if self._close_disk:
                self._disk.close()

    def _length_to_end(self, length_bytes: int) -> int:
        return max(0, min(length_bytes, self._disk.size - self._position))

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


def as_file(disk: Disk, buffering: int = 64 * KIB, *, close_disk: bool = False) -> io.BufferedRandom | io.BufferedReader:
    """A buffered view of ``disk``: readable and writable, or readable only where the disk is. ``buffering`` in bytes."""
    if buffering < 1:
        raise Invalid(f"buffering is {buffering} bytes, must be at least 1; DiskFile is the unbuffered view")
    raw = DiskFile(disk, close_disk=close_disk)
    return io.BufferedRandom(raw, buffering) if disk.writable else io.BufferedReader(raw, buffering)
