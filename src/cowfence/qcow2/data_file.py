"""The external data file: the guest's data in a file of its own, the metadata in the image (section "External data file").

Every guest cluster has one place there, its guest offset, so nothing of it is allocated, counted, shared or freed; an entry
that is COPIED leads to it. What holds on disk is the transaction's order over two files: the data file is fenced before any
LINK of the image (crash contract, R6, C15).

The data file is *raw* where the autoclear bit says so: read by itself it is the guest's disk. Then zeros are data (see
``zero``), so that the two views never differ.

A relative name is meant relative to the image's directory, as that of a backing file is (QEMU 7.2: to where it was
started).

Where an image is only looked at, its data file may be absent: ``AbsentDataFile`` refuses every read by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cowfence.errors import Unsupported
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, Capabilities, Storage, WritableBuffer


class AbsentDataFile:
    """Stands in for a data file that was not opened. Reading it raises Unsupported; it is never written."""

    writable = False

    def __init__(self, name: str) -> None:
        """``name``: of the image."""
        self.name = name

    def _refuse(self) -> Unsupported:
        return Unsupported(self.name, "reading or writing without its external data file")

    def capabilities(self) -> Capabilities:
        return Capabilities(punches_holes=False)

    def size(self) -> int:
        raise self._refuse()

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:  # noqa: ARG002
        raise self._refuse()

    def read_cached(self, offset: int, length_bytes: int) -> bytes:  # noqa: ARG002
        raise self._refuse()

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:  # noqa: ARG002
        raise self._refuse()

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:  # noqa: ARG002
        raise self._refuse()

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:  # noqa: ARG002
        raise self._refuse()

    def truncate(self, size_bytes: int, mark: str) -> None:  # noqa: ARG002
        raise self._refuse()

    def fence(self, mark: str) -> None:
        """Nothing was written."""

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:  # noqa: ARG002
        raise self._refuse()

    def close(self) -> None:
        """Nothing is open."""


def lengthen(data: Storage, old_bytes: int, new_bytes: int) -> None:
    """The disk is about to grow: what is new of it reads as zeros in the data file, whatever stood behind its end."""
    end = min(data.size(), new_bytes)
    if end > old_bytes:
        data.zero(old_bytes, end - old_bytes, "data.write")
    if data.size() < new_bytes:
        data.truncate(new_bytes, "data.size")


def shorten(data: Storage, new_bytes: int) -> None:
    """The disk has become shorter, durably. The length of a block device stays what it is."""
    if data.size() > new_bytes:
        try:
            data.truncate(new_bytes, "data.size")
        except Unsupported:
            return
