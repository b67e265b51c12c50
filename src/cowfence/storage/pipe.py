"""Files that can only be written from their start to their end: a pipe, and nothing at all.

What a new image is written into when nobody wants to keep it in a file: the standard output of a tool, or a count of what the
image would take.
"""
# ruff: noqa: ARG002 - a pipe has no use for marks; wrappers around it have

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Final

from cowfence.errors import Invalid, from_os_error
from cowfence.storage.base import Buffer
from cowfence.units import MIB

_ZEROS: Final = bytes(MIB)


class PipeWriter:
    """Bytes into a descriptor, in the order of their offsets. What no call wrote arrives as zeros. One thread at a time."""

    def __init__(self, fd: int, name: str) -> None:
        """The descriptor stays the caller's."""
        self.name = name
        self._fd = fd
        self._position = 0

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        """Raises Invalid for an offset that has been passed, and StorageFailed (the reader has gone)."""
        if offset < self._position:
            raise Invalid(f"{self.name}: offset {offset} has been passed; {self._position} bytes are written")
        self._pad(offset)
        for buffer in buffers:
            self._write(memoryview(buffer))

    def truncate(self, size_bytes: int, mark: str) -> None:
        """Zeros up to ``size_bytes``, the end."""
        self._pad(size_bytes)

    def _pad(self, offset: int) -> None:
        while self._position < offset:
            self._write(memoryview(_ZEROS)[: offset - self._position])

    def _write(self, view: memoryview) -> None:
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError as error:
                raise from_os_error(self.name, "write", self._position, error) from error
            self._position += written
            view = view[written:]


class Nowhere:
    """Takes everything, and keeps nothing but the length in bytes that the file would have. Many threads at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size_bytes = 0
        self._guard = threading.Lock()

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        self._reach(offset + sum(map(len, buffers)))

    def truncate(self, size_bytes: int, mark: str) -> None:
        self._reach(size_bytes)

    def _reach(self, end: int) -> None:
        with self._guard:
            self.size_bytes = max(self.size_bytes, end)
