"""Disks that come once, out of a pipe: a raw one, or a qcow2 image (``qcow2.stream``). What a conversion takes pieces from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from cowfence.codec import decompressor
from cowfence.errors import from_os_error
from cowfence.qcow2.stream import DEFAULT_SPOOL_BYTES, Arrived, ImageStream, content_of
from cowfence.units import MIB

_PIECE_BYTES: Final = 2 * MIB


class Pipe:
    """A descriptor to read from once, which stays the caller's. ``peek`` looks at what comes first."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self._ahead = b""
        self._position = 0

    def peek(self, length_bytes: int) -> bytes:
        """The first bytes, fewer where there are no more. Before anything is read. Raises StorageFailed."""
        while len(self._ahead) < length_bytes and (data := self._some(length_bytes - len(self._ahead))):
            self._ahead += data
        return self._ahead[:length_bytes]

    def read(self, length_bytes: int) -> bytes:
        """Up to so many bytes of what comes next; empty at the end. Raises StorageFailed."""
        if self._ahead:
            data, self._ahead = self._ahead[:length_bytes], self._ahead[length_bytes:]
            return data
        return self._some(length_bytes)

    def _some(self, length_bytes: int) -> bytes:
        try:
            data = os.read(self._fd, length_bytes)
        except OSError as error:
            raise from_os_error(self.name, "read", self._position, error) from error
        self._position += len(data)
        return data


class RawStream:
    """The bytes of a disk, one after the other. Its size is known at the end."""

    whole_bytes = 1 << 62
    """Pieces are whole units of a target up to this size."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._held: dict[int, memoryview] = {}
        self.size_bytes = 0
        self.known_bytes: int | None = None

    def pieces(self, unit_bytes: int) -> Iterator[tuple[int, int]]:
        while True:
            piece = bytearray()
            wanted = max(_PIECE_BYTES, unit_bytes)
            while len(piece) < wanted and (data := self._pipe.read(wanted - len(piece))):
                piece += data
            start = self.size_bytes
            self.size_bytes += len(piece)
            if piece:
                self._held[start] = memoryview(piece)
                yield start, len(piece)
            if len(piece) < wanted:
                return

    def load(self, start: int, length_bytes: int) -> memoryview:  # noqa: ARG002 (pieces come as they are)
        return self._held.pop(start)


class Qcow2Stream:
    """The disk of a qcow2 image."""

    def __init__(self, pipe: Pipe, *, spool_bytes: int = DEFAULT_SPOOL_BYTES) -> None:
        """Raises as ``ImageStream`` does."""
        self._image = ImageStream(pipe.read, pipe.name, spool_bytes=spool_bytes)
        self._decompress = decompressor(self._image.header.compression_type)
        self._held: dict[int, list[Arrived]] = {}
        self.size_bytes = self.known_bytes = self._image.header.size_bytes
        self.whole_bytes = self._image.geometry.cluster_bytes

    def pieces(self, unit_bytes: int) -> Iterator[tuple[int, int]]:  # noqa: ARG002 (whole_bytes says what can be had)
        cluster_bytes = self._image.geometry.cluster_bytes
        held: list[Arrived] = []
        for arrived in self._image.clusters():
            follows = held and arrived.guest_offset == held[-1].guest_offset + cluster_bytes
            if held and (not follows or len(held) * cluster_bytes >= _PIECE_BYTES):
                yield self._hold(held)
                held = []
            held.append(arrived)
        if held:
            yield self._hold(held)

    def _hold(self, held: list[Arrived]) -> tuple[int, int]:
        start = held[0].guest_offset
        self._held[start] = held
        return start, min(len(held) * self._image.geometry.cluster_bytes, self.size_bytes - start)

    def load(self, start: int, length_bytes: int) -> memoryview:
        cluster_bytes = self._image.geometry.cluster_bytes
        parts = [content_of(arrived, cluster_bytes, self._decompress, self._image.name) for arrived in self._held.pop(start)]
        return memoryview(b"".join(parts))[:length_bytes]
