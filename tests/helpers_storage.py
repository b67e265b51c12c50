"""A storage for tests: bytes in memory, with holes known by the page, and switches that make it wait or fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from cowfence.errors import CowfenceError, WouldBlock
from cowfence.extents import Extent, merge
from cowfence.storage.base import Buffer, Capabilities, WritableBuffer

PAGE_BYTES = 512


class TinyStorage:
    """Bytes in memory. ``cold``: reads wait for the host. ``failing``: what every call of that name raises."""

    def __init__(self, size_bytes: int, *, writable: bool = True) -> None:
        self.name = "tiny"
        self.writable = writable
        self.bytes = bytearray(size_bytes)
        self.present: set[int] = set()
        self.cold = False
        self.failing: dict[str, CowfenceError] = {}
        self.gate: threading.Event | None = None
        self.fences = 0
        self.marks: list[str] = []
        self.closed = False

    def _call(self, name: str, mark: str = "") -> None:
        if self.gate is not None:
            self.gate.wait(10)
        if name in self.failing:
            raise self.failing[name]
        if mark:
            self.marks.append(mark)

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def size(self) -> int:
        return len(self.bytes)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        if self.cold and not wait:
            raise WouldBlock("cold")
        self._call("readv")
        done = 0
        for buffer in buffers:
            piece = self.bytes[offset + done : offset + done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        buffer = bytearray(length_bytes)
        return buffer[: self.readv(offset, (buffer,), wait=False)]

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        self._call("writev", mark)
        for buffer in buffers:
            self._grow(offset + len(buffer))
            self.bytes[offset : offset + len(buffer)] = buffer
            self.present.update(range(offset // PAGE_BYTES, -(-(offset + len(buffer)) // PAGE_BYTES)))
            offset += len(buffer)

    def _grow(self, size_bytes: int) -> None:
        if size_bytes > len(self.bytes):
            self.bytes += bytes(size_bytes - len(self.bytes))

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        self.writev(offset, (bytes(length_bytes),), mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self._call("discard", mark)
        end = min(offset + length_bytes, len(self.bytes))
        if offset < end:
            self.bytes[offset:end] = bytes(end - offset)
            self.present.difference_update(range(-(-offset // PAGE_BYTES), end // PAGE_BYTES))

    def truncate(self, size_bytes: int, mark: str) -> None:
        self._call("truncate", mark)
        del self.bytes[size_bytes:]
        self._grow(size_bytes)

    def fence(self, mark: str) -> None:
        self._call("fence", mark)
        self.fences += 1

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        self._call("extents")
        end = min(offset + length_bytes, len(self.bytes))
        runs = []
        for page in range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)) if offset < end else ():
            start, stop = max(offset, page * PAGE_BYTES), min(end, (page + 1) * PAGE_BYTES)
            there = page in self.present
            runs.append(Extent(start, stop - start, zero=not there, data=there, present=there, host_offset=start))
        return merge(runs)

    def close(self) -> None:
        self.closed = True
