"""``DirectFileStorage``: a file around the page cache (O_DIRECT), for any offset, length and buffer.

The host takes only whole blocks, in memory that is aligned as well. Aligned calls are tried as they are. Others go through
a page-aligned bounce buffer: a read of the blocks around the range; a write that first reads the blocks at its two edges.

Such a read-modify-write would put back old bytes over a neighbour's write to the same block. So unaligned writes have the
file to themselves: every other change goes through a gate that lets either many of those pass, or one unaligned write.

A write that ends inside the last block writes that block whole, padded with zeros, and then cuts the file to its true
length. A crash between the two leaves a file that is longer by less than a block of zeros.
"""
# ruff: noqa: ARG002 - a file has no use for marks; wrappers around it have

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cowfence.errors import WouldBlock
from cowfence.storage import host
from cowfence.storage.base import Buffer, Capabilities, WritableBuffer
from cowfence.storage.file import FileStorage
from cowfence.storage.locks import ImageLock
from cowfence.units import MIB, align_down, align_up

_BOUNCE_BYTES = MIB


class _Gate:
    """Many at once, or one alone. Whoever stands inside must not enter again."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._inside == 0)
            yield


class DirectFileStorage(FileStorage):
    """``FileStorage`` without the page cache. Made by ``FileStorage.open(..., direct=True)``. Thread-safe like it."""

    __slots__ = ("_block_bytes", "_bounces", "_gate")

    def __init__(self, fd: int, name: str, *, writable: bool, lock: ImageLock | None) -> None:
        self._block_bytes = host.direct_alignment(fd)
        self._bounces: list[mmap.mmap] = []
        self._gate = _Gate()
        super().__init__(fd, name, writable=writable, lock=lock)

    def capabilities(self) -> Capabilities:
        plain = super().capabilities()
        return Capabilities(self._block_bytes, plain.atomic_bytes, plain.holes_past_end, plain.punches_holes)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        if offset < 0:
            raise self._negative(offset)
        if not wait:
            raise WouldBlock(f"{self.name}: direct reads always wait for the disk")
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        length_bytes = sum(view.nbytes for view in views)
        try:
            if len(views) == 1 and self._is_aligned(offset, length_bytes):
                try:
                    got = os.preadv(self._fd, views, offset)
                except OSError as exc:
                    if exc.errno != errno.EINVAL:
                        raise
                else:
                    if got == length_bytes:
                        return got
            return self._read_bounced(offset, views, length_bytes)
        except OSError as exc:
            raise self._failed("read", offset, exc) from exc

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if offset < 0:
            raise self._negative(offset)
        data = memoryview(buffers[0] if len(buffers) == 1 else b"".join(buffers)).cast("B")
        if not data.nbytes:
            return
        self._require_writable("write", offset)
        try:
            if not self._is_aligned(offset, data.nbytes):
                with self._gate.alone():
                    self._write_unaligned(offset, data)
                return
            with self._gate.shared():
                try:
                    done = os.pwritev(self._fd, (data,), offset)
                except OSError as exc:
                    if exc.errno != errno.EINVAL:  # EINVAL: this memory is not aligned
                        raise
                    done = 0
                done = align_down(done, self._block_bytes)
                if done < data.nbytes:
                    self._write_bounced(offset + done, data[done:])
        except OSError as exc:
            raise self._failed("write", offset, exc) from exc

    def truncate(self, size_bytes: int, mark: str) -> None:
        with self._gate.shared():
            super().truncate(size_bytes, mark)

    def _fallocate(self, mode: int, offset: int, length_bytes: int) -> None:
        with self._gate.shared():
            super()._fallocate(mode, offset, length_bytes)

    def _is_aligned(self, offset: int, length_bytes: int) -> bool:
        return offset % self._block_bytes == 0 and length_bytes % self._block_bytes == 0

    @contextmanager
    def _bounce(self) -> Iterator[memoryview]:
        try:
            area = self._bounces.pop()
        except IndexError:
            area = mmap.mmap(-1, _BOUNCE_BYTES)
        view = memoryview(area)
        try:
            yield view
        finally:
            view.release()
            self._bounces.append(area)

    def _read_blocks(self, offset: int, area: memoryview) -> int:
        """Fill a stretch of a bounce buffer from an aligned ``offset``; short at the end of the file only."""
        done = 0
        while done < area.nbytes:
            got = os.preadv(self._fd, (area[done:],), offset + done)
            done += got
            if not got or done % self._block_bytes:
                break
        return done

    def _read_bounced(self, offset: int, views: list[memoryview], length_bytes: int) -> int:
        end = offset + length_bytes
        position = offset
        with self._bounce() as bounce:
            while position < end:
                start = align_down(position, self._block_bytes)
                stop = min(align_up(end, self._block_bytes), start + _BOUNCE_BYTES)
                got_end = min(start + self._read_blocks(start, bounce[: stop - start]), end)
                if got_end <= position:
                    break
                _scatter(bounce[position - start : got_end - start], views)
                position = got_end
                if got_end < min(stop, end):
                    break
        return position - offset

    def _write_unaligned(self, offset: int, data: memoryview) -> None:
        size_bytes = self.size()
        end = offset + data.nbytes
        position = offset
        while position < end:
            start = align_down(position, self._block_bytes)
            stop = min(align_up(end, self._block_bytes), start + _BOUNCE_BYTES)
            piece_end = min(end, stop)
            with self._bounce() as bounce:
                # The whole window is read back where an edge is cut: it is at most 1 MiB, and only the edges matter.
                if position > start:
                    self._read_padded_block(start, bounce)
                if piece_end < stop and (stop - self._block_bytes > start or position == start):
                    self._read_padded_block(stop - self._block_bytes, bounce[stop - self._block_bytes - start :])
                bounce[position - start : piece_end - start] = data[position - offset : piece_end - offset]
                self._write_blocks(start, bounce[: stop - start])
            position = piece_end
        if not self._is_device and align_up(end, self._block_bytes) > max(size_bytes, end):
            os.ftruncate(self._fd, max(size_bytes, end))

    def _read_padded_block(self, offset: int, area: memoryview) -> None:
        block = area[: self._block_bytes]
        got = self._read_blocks(offset, block)
        block[got:] = bytes(self._block_bytes - got)

    def _write_bounced(self, offset: int, data: memoryview) -> None:
        with self._bounce() as bounce:
            for done in range(0, data.nbytes, _BOUNCE_BYTES):
                piece = data[done : done + _BOUNCE_BYTES]
                bounce[: piece.nbytes] = piece
                self._write_blocks(offset + done, bounce[: piece.nbytes])

    def _write_blocks(self, offset: int, area: memoryview) -> None:
        done = 0
        while done < area.nbytes:
            # A short write is taken up again from its last whole block.
            written = os.pwritev(self._fd, (area[done:],), offset + done)
            if written < min(self._block_bytes, area.nbytes - done):
                raise OSError(errno.EIO, "the host wrote less than a block and gave no reason")
            done += align_down(written, self._block_bytes)


def _scatter(data: memoryview, views: list[memoryview]) -> None:
    """Copy ``data`` into the views in turn, and take what is filled off the front of the list."""
    while data.nbytes and views:
        count = min(data.nbytes, views[0].nbytes)
        views[0][:count] = data[:count]
        data = data[count:]
        if count == views[0].nbytes:
            views.pop(0)
        else:
            views[0] = views[0][count:]
