"""Reading metadata under the image's lock without making others wait for a disk.

A call made under the lock first tries with ``wait=False``: what is in the host's page cache is read at once. What is not
raises ``Cold``; the caller leaves the lock, warms the bytes (a blocking read that fills the page cache) and begins again.
"""

from __future__ import annotations

from collections.abc import Callable

from cowfence.errors import Corrupt, WouldBlock
from cowfence.storage.base import Storage


class Cold(Exception):
    """Bytes that the plan needs are not in memory. ``warm`` reads them, blocking; call it outside the lock."""

    def __init__(self, warm: Callable[[], object]) -> None:
        super().__init__("cold")
        self.warm = warm


class NeedsCommit(Exception):
    """The plan needs tables or clusters that only a commit can free.

    ``then``: what to do under the lock once everything pending is committed, before the plan begins again; it is committed
    too. None of the plan was carried out.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        super().__init__("needs a commit")
        self.then = then


class MetadataReader:
    """Whole reads of metadata from the image file."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.name = storage.name

    def read(self, offset: int, length_bytes: int, what: str, *, wait: bool) -> bytearray:
        """``length_bytes`` at ``offset``; bytes past the end of the file are zeros if at least one byte was there.

        Raises Corrupt if all of it lies past the end, Cold if it is not in the page cache and ``wait`` is false.
        """
        buffer = bytearray(length_bytes)
        try:
            got = self._storage.readv(offset, (buffer,), wait=wait)
        except WouldBlock:
            raise Cold(lambda: self._storage.readv(offset, (bytearray(length_bytes),))) from None
        if not got and length_bytes:
            raise Corrupt(f"{self.name}: {what} at offset {offset:#x}", "it lies past the end of the file")
        return buffer
