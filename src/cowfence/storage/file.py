"""``FileStorage``: a local file or block device.

Reads and writes are positional vectored calls on one descriptor, so that any number of threads may use it at once; the
descriptor's own position is used by nothing but the search for holes, which gives it anew in each call.

The good case of ``readv`` and ``writev`` is one system call and two comparisons: errors (closed, read-only, cold
page cache) are told apart only after the host has reported one. A short read goes on until the host says 0, so "short"
always means the end of the file, also where a read that must not wait found only its first half in the cache.

A fence that failed once stays failed. Linux reports a lost write to one ``fdatasync`` and then forgets it: the pages are
marked clean, and the next call succeeds although the bytes never reached the disk. So fences of one file run one at a time
(of two that run together only one would hear of the loss), and the first failure is raised again by each later one.

A block device differs from a file in three ways: its length is fixed, what lies past the end of what was written is old
content instead of zeros, and discard is another call.
"""
# ruff: noqa: ARG002 - a file has no use for marks; wrappers around it have

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from os import pread, preadv, pwritev
from typing import Final

from cowfence.errors import Closed, CowfenceError, Invalid, NoSpace, ReadOnly, Refused, Unsupported, WouldBlock, from_os_error
from cowfence.extents import Extent
from cowfence.storage import host
from cowfence.storage.base import Buffer, Capabilities, Storage, WritableBuffer
from cowfence.storage.locks import ImageLock
from cowfence.units import MIB, align_down, align_up

_IOV_MAX = 1024
_ZEROS: Final = bytes(MIB)
_NOT_SUPPORTED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY))
# A block device also answers EINVAL (unaligned) or EBUSY (claimed, e.g. mounted) where it cannot do the cheap thing.
_CHEAP_WAY_CLOSED = _NOT_SUPPORTED | {errno.EINVAL, errno.EBUSY, errno.ENODEV, errno.EPERM}

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
)


def require_image_kind(name: str, mode: int, *, allow_devices: bool) -> None:
    """Raise ``Invalid`` or ``Refused`` unless a file of this ``st_mode`` can hold an image: a regular file or block device."""
    if stat.S_ISREG(mode):
        return
    if stat.S_ISBLK(mode):
        if not allow_devices:
            raise Refused(name, "it is a block device; only regular files are allowed here")
        return
    kind = next((text for test, text in _KINDS if test(mode)), "neither")
    raise Invalid(f"{name}: is {kind}; an image is a regular file or a block device")


class FileStorage:
    """``Storage`` over a local file or block device. Thread-safe, but for ``close``: call that when no other call runs.

    A forked child may go on using it; closing it there unlocks nothing in the parent.
    """

    __slots__ = (
        "__weakref__",
        "_cheap_zeros",
        "_fd",
        "_fence_guard",
        "_is_device",
        "_lock",
        "_no_wait_flag",
        "_punches",
        "failed_fence",
        "name",
        "writable",
    )

    def __init__(self, fd: int, name: str, *, writable: bool, lock: ImageLock | None) -> None:
        """Use ``open`` or ``from_fd``. Takes the descriptor over."""
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.name = name
        self.writable = writable
        self.failed_fence: CowfenceError | None = None
        """The first fence that failed; None while all went well. Kept after ``close``."""
        self._lock = lock
        self._fence_guard = threading.Lock()
        self._no_wait_flag = os.RWF_NOWAIT
        self._punches = True
        self._cheap_zeros = [host.FALLOC_ZERO_RANGE, host.FALLOC_PUNCH_HOLE | host.FALLOC_KEEP_SIZE]
        self._fd = fd  # last: a half-made object owns nothing

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        direct: bool = False,
        lock: bool = True,
        force_share: bool = False,
        allow_devices: bool = True,
    ) -> FileStorage:
        """Open an existing file. ``direct`` goes around the page cache (O_DIRECT; any offset and length still works).

        ``lock`` takes the image lock that QEMU knows too; ``force_share`` reads beside a writer (see ``locks``).
        Raises ``StorageFailed`` (missing, no permission), ``Invalid`` (a directory, FIFO, socket or character device, or a
        filesystem without direct I/O), ``Refused`` (a block device without ``allow_devices``), ``Locked``.
        """
        name = os.fspath(path)
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY
        try:
            # Looked at before it is opened, because opening some devices does something (tapes rewind); and O_NONBLOCK,
            # because a FIFO put there in between would make open wait for ever.
            require_image_kind(name, os.stat(path).st_mode, allow_devices=allow_devices)
            fd = host.above_standard(os.open(path, flags | os.O_NONBLOCK | (os.O_DIRECT if direct else 0)))
        except OSError as exc:
            if direct and exc.errno == errno.EINVAL:
                raise Invalid(f"{name}: its filesystem has no direct I/O (O_DIRECT)") from exc
            raise from_os_error(name, "open", 0, exc) from exc
        except ValueError as exc:
            raise Invalid(f"{name!r}: {exc}") from exc
        try:
            os.set_blocking(fd, True)
            require_image_kind(name, os.fstat(fd).st_mode, allow_devices=allow_devices)
            held = ImageLock.acquire(fd, name, writable=writable, force_share=force_share) if lock else None
            return cls._over(fd, name, writable=writable, lock=held)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(cls, fd: int, name: str, *, writable: bool, lock: ImageLock | None = None) -> FileStorage:
        """Take over an open descriptor, with its open mode (O_DIRECT too), and ``lock``, which the caller acquired on it.

        Raises like ``open``, and then leaves both to the caller.
        """
        try:
            require_image_kind(name, os.fstat(fd).st_mode, allow_devices=True)
        except OSError as exc:
            raise from_os_error(name, "open", 0, exc) from exc
        return cls._over(fd, name, writable=writable, lock=lock)

    @classmethod
    def _over(cls, fd: int, name: str, *, writable: bool, lock: ImageLock | None) -> FileStorage:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            from cowfence.storage.direct import DirectFileStorage

            return DirectFileStorage(fd, name, writable=writable, lock=lock)
        return cls(fd, name, writable=writable, lock=lock)

    def fileno(self) -> int:
        """The descriptor, for handing it to another process. Raises ``Closed``."""
        if self._fd < 0:
            raise self._closed()
        return self._fd

    def capabilities(self) -> Capabilities:
        return Capabilities(holes_past_end=not self._is_device, punches_holes=self._punches)

    def size(self) -> int:
        try:
            return os.lseek(self._fd, 0, os.SEEK_END) if self._is_device else os.fstat(self._fd).st_size
        except OSError as exc:
            raise self._failed("size", 0, exc) from exc

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        if offset < 0:
            raise self._negative(offset)
        count = len(buffers)
        if count > _IOV_MAX:
            return self._read_on(offset, buffers, 0, wait)
        try:
            got = preadv(self._fd, buffers, offset, 0 if wait else self._no_wait_flag)
        except OSError as exc:
            self._judge_read(offset, exc, wait)
            return self.readv(offset, buffers)
        if got == (len(buffers[0]) if count == 1 else sum(map(len, buffers))):
            return got
        return self._read_on(offset, buffers, got, wait)

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        if self._no_wait_flag or offset < 0:
            buffer = bytearray(length_bytes)
            got = self.readv(offset, (buffer,), wait=False)
            return buffer if got == length_bytes else buffer[:got]
        try:
            return pread(self._fd, length_bytes, offset)
        except OSError as exc:
            raise self._failed("read", offset, exc) from exc

    def _read_on(self, offset: int, buffers: Sequence[WritableBuffer], done: int, wait: bool) -> int:
        """Fill what is left of the buffers after ``done`` bytes; returns all bytes read."""
        left = _Unfinished(buffers, done)
        while left.views:
            try:
                got = preadv(self._fd, left.next_views(), offset + done, 0 if wait else self._no_wait_flag)
            except OSError as exc:
                self._judge_read(offset + done, exc, wait)
                continue
            if not got:
                break
            done += got
            left.advance(got)
        return done

    def _judge_read(self, offset: int, cause: OSError, wait: bool) -> None:
        """Raise what a failed read means; return where it only means that this file cannot be read without waiting.

        tmpfs is such a file: it says EOPNOTSUPP to RWF_NOWAIT, and is memory anyway. It is remembered, and read inline.
        """
        if not wait and cause.errno == errno.EAGAIN:
            raise WouldBlock(f"{self.name}: offset {offset} is not in the page cache") from None
        if not wait and self._no_wait_flag and cause.errno in _NOT_SUPPORTED:
            self._no_wait_flag = 0
            return
        raise self._failed("read", offset, cause) from cause

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if offset < 0:
            raise self._negative(offset)
        try:
            count = len(buffers)
            done = pwritev(self._fd, buffers if count <= _IOV_MAX else buffers[:_IOV_MAX], offset)
            if done == (len(buffers[0]) if count == 1 else sum(map(len, buffers))):
                return
            left = _Unfinished(buffers, done)
            while left.views:
                written = pwritev(self._fd, left.next_views(), offset + done)
                if not written:
                    raise OSError(errno.EIO, "the host wrote nothing and gave no reason")
                done += written
                left.advance(written)
        except OSError as exc:
            raise self._failed("write", offset, exc) from exc

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        """See ``Storage.zero``: by ZERO_RANGE, else by punching a hole, else by writing zeros."""
        self._require_writable("zero", offset)
        if not length_bytes:
            return
        start, stop = offset, offset + length_bytes
        if self._is_device:
            block_bytes = host.block_bytes(self._fd)
            start, stop = align_up(start, block_bytes), align_down(stop, block_bytes)
        if start >= stop or not self._zero_cheaply(start, stop - start, mark):
            self._write_zeros(offset, length_bytes, mark)
            return
        self._write_zeros(offset, start - offset, mark)
        self._write_zeros(stop, offset + length_bytes - stop, mark)

    def _zero_cheaply(self, offset: int, length_bytes: int, mark: str) -> bool:
        for mode in tuple(self._cheap_zeros):
            try:
                self._fallocate(mode, offset, length_bytes)
            except OSError as exc:
                if exc.errno not in _CHEAP_WAY_CLOSED:
                    raise self._failed("zero", offset, exc) from exc
                if exc.errno in _NOT_SUPPORTED:
                    self._cheap_zeros = [other for other in self._cheap_zeros if other != mode]
                continue
            if mode & host.FALLOC_KEEP_SIZE and offset + length_bytes > self.size():
                # Grown by a byte of the range itself, never by ftruncate: that could cut off what another thread wrote.
                self.writev(offset + length_bytes - 1, (b"\0",), mark)
            return True
        return False

    def _write_zeros(self, offset: int, length_bytes: int, mark: str) -> None:
        end = offset + length_bytes
        for position in range(offset, end, MIB):
            piece = _ZEROS if end - position >= MIB else memoryview(_ZEROS)[: end - position]
            self.writev(position, (piece,), mark)

    def _fallocate(self, mode: int, offset: int, length_bytes: int) -> None:
        host.fallocate(self._fd, mode, offset, length_bytes)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self._require_writable("discard", offset)
        if not self._punches or not length_bytes:
            return
        try:
            if not self._is_device:
                self._fallocate(host.FALLOC_PUNCH_HOLE | host.FALLOC_KEEP_SIZE, offset, length_bytes)
                return
            block_bytes = host.block_bytes(self._fd)
            start = align_up(offset, block_bytes)
            stop = align_down(min(offset + length_bytes, self.size()), block_bytes)
            if start < stop:
                host.discard_blocks(self._fd, start, stop - start)
        except OSError as exc:
            if exc.errno not in _NOT_SUPPORTED:
                raise self._failed("discard", offset, exc) from exc
            self._punches = False

    def truncate(self, size_bytes: int, mark: str) -> None:
        """See ``Storage.truncate``. The length of a block device is fixed: to grow it is ``NoSpace``, else ``Unsupported``."""
        self._require_writable("truncate", size_bytes)
        if self._is_device:
            device_bytes = self.size()
            if size_bytes > device_bytes:
                raise NoSpace(f"{self.name}: the device has {device_bytes} bytes, {size_bytes} are needed")
            if size_bytes < device_bytes:
                raise Unsupported(self.name, "changing the length of a block device")
            return
        try:
            os.ftruncate(self._fd, size_bytes)
        except OSError as exc:
            raise self._failed("truncate", size_bytes, exc) from exc

    def fence(self, mark: str) -> None:
        with self._fence_guard:
            if self.failed_fence is not None:
                raise self.failed_fence
            fd = self.fileno()
            try:
                os.fdatasync(fd)
            except OSError as exc:
                self.failed_fence = self._failed("fence", 0, exc)
                raise self.failed_fence from exc

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        end = min(offset + length_bytes, self.size())
        position = offset
        while position < end:
            data = self._seek(position, os.SEEK_DATA, end)
            if data is None:
                yield _extent(position, end, data=True)
                return
            if data > position:
                yield _extent(position, data, data=False)
            if data >= end:
                return
            hole = self._seek(data, os.SEEK_HOLE, end) or end
            yield _extent(data, hole, data=True)
            position = hole

    def _seek(self, position: int, what: int, end: int) -> int | None:
        """The next data or hole from ``position``, at most ``end``; None where the filesystem cannot tell."""
        try:
            return min(os.lseek(self._fd, position, what), end)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # no more data: a hole up to the end (or the file has just been cut)
                return end
            if exc.errno == errno.EINVAL or exc.errno in _NOT_SUPPORTED:
                return None
            raise self._failed("extents", position, exc) from exc

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        # What close itself reports is of no use: only a fence makes a promise. The lock is released by hand, because the
        # keeper or a forked child may still hold the description open.
        with suppress(OSError):
            if self._lock is not None:
                self._lock.release()
        with suppress(OSError):
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"{self.name}: storage was never closed", ResourceWarning, stacklevel=2, source=self)
            # Not unlocked by hand: a keeper that shares the lock has work to do before anybody else may open the file.
            with suppress(OSError):
                os.close(self._fd)

    def _negative(self, offset: int) -> Invalid:
        # Asked in every call, because the host does not refuse it: to preadv2, offset -1 means the descriptor's position.
        return Invalid(f"{self.name}: negative offset {offset}")

    def _closed(self) -> Closed:
        return Closed(f"{self.name}: the storage is closed")

    def _require_writable(self, operation: str, offset: int) -> None:
        if self._fd < 0:
            raise self._closed()
        if not self.writable:
            raise ReadOnly(f"{self.name}: {operation} at offset {offset}: opened read-only")

    def _failed(self, operation: str, offset: int, cause: OSError) -> CowfenceError:
        """What a failed call means; only here are closed and read-only files recognised, so that good calls pay nothing."""
        if self._fd < 0:
            return self._closed()
        if cause.errno == errno.EBADF and not self.writable:
            return ReadOnly(f"{self.name}: {operation} at offset {offset}: opened read-only")
        return from_os_error(self.name, operation, offset, cause)


def copy_range(source: Storage, source_offset: int, target: Storage, target_offset: int, length_bytes: int, mark: str) -> int:
    """Copy bytes between two storages (or two ranges of one that do not overlap); returns the bytes copied, short only at
    the end of the source.

    Two plain files are copied by the host (``copy_file_range``, which shares blocks where the filesystem can). Anything
    else, a recorder or fault injector around a file too, is read and written.
    """
    done = 0
    if type(source) is FileStorage and type(target) is FileStorage:
        done = _copy_by_host(source, source_offset, target, target_offset, length_bytes)
    buffer = bytearray(min(length_bytes - done, MIB))
    while done < length_bytes:
        view = memoryview(buffer)[: length_bytes - done]
        got = source.readv(source_offset + done, (view,))
        if not got:
            break
        target.writev(target_offset + done, (view[:got],), mark)
        done += got
    return done


def _copy_by_host(source: FileStorage, source_offset: int, target: FileStorage, target_offset: int, length_bytes: int) -> int:
    """How much of the range the host copied; what it did not is the caller's, who also meets the error again, if any."""
    done = 0
    with suppress(OSError):
        while done < length_bytes:
            got = os.copy_file_range(
                source.fileno(), target.fileno(), length_bytes - done, source_offset + done, target_offset + done
            )
            if not got:
                break
            done += got
    return done


def _extent(start: int, end: int, *, data: bool) -> Extent:
    return Extent(start, end - start, zero=not data, data=data, present=data, depth=0, host_offset=start)


class _Unfinished:
    """The bytes of some buffers that a vectored call has still to move, as views in order."""

    __slots__ = ("_first", "views")

    def __init__(self, buffers: Sequence[Buffer], done: int) -> None:
        self.views = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]
        self._first = 0
        self.advance(done)

    def next_views(self) -> list[memoryview]:
        """As many views as one call takes."""
        return self.views[self._first : self._first + _IOV_MAX]

    def advance(self, count: int) -> None:
        """``count`` bytes more are done. Empties ``views`` when all are."""
        first, views = self._first, self.views
        while first < len(views) and count >= views[first].nbytes:
            count -= views[first].nbytes
            first += 1
        if first == len(views):
            views.clear()
            first = 0
        elif count:
            views[first] = views[first][count:]
        self._first = first
