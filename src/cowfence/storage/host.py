"""The host's calls that ``os`` does not offer: ``fallocate`` with a mode, and the alignment that direct I/O needs.

They go through the C library with ctypes, which is loaded at the first use: a program that only reads never pays for it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import mmap
import os
import stat
import struct
from collections.abc import Callable
from typing import Any

from cowfence.errors import Invalid

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

_BLKDISCARD = 0x1277
_BLKSSZGET = 0x1268
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_CACHESTAT = 451  # the same on every architecture
_STATX_DIO_FIELDS = struct.Struct("=152xII96x")  # struct statx: dio_mem_align and dio_offset_align of 256 bytes

_UNKNOWN_ALIGNMENT_BYTES = 4096


def go_direct(fd: int, name: str) -> None:
    """Let an open descriptor go around the page cache (O_DIRECT). Raises Invalid where its filesystem cannot."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        raise Invalid(f"{name}: its filesystem has no direct I/O (O_DIRECT)") from error


def above_standard(fd: int) -> int:
    """``fd``, or in its place one that is neither standard input, output nor error.

    In a program that was started with one of these closed, the next file that is opened gets its number, and what the
    interpreter, a library or a child process then prints there would be written into the image.
    """
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


@functools.cache
def _function(*names: str) -> Callable[..., int] | None:
    """The first of the C library's functions ``names`` that exists, or None."""
    import ctypes

    libc: Any = ctypes.CDLL(None, use_errno=True)
    for name in names:
        if hasattr(libc, name):
            function: Any = getattr(libc, name)
            if name.startswith("fallocate"):
                function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

            def call(*args: object, function: Any = function) -> int:
                while True:
                    result: int = function(*args)
                    code = ctypes.get_errno() if result < 0 else 0
                    if code != errno.EINTR:
                        return -code if result < 0 else result

            return call
    return None


def fallocate(fd: int, mode: int, offset: int, length_bytes: int) -> None:
    """Linux's ``fallocate``. Raises OSError; ENOSYS where the C library has none."""
    # fallocate64 first: on 32-bit hosts plain fallocate takes a 32-bit offset, and musl has only the plain name.
    function = _function("fallocate64", "fallocate")
    result = -errno.ENOSYS if function is None else function(fd, mode, offset, length_bytes)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def discard_blocks(fd: int, offset: int, length_bytes: int) -> None:
    """Discard a range of a block device (BLKDISCARD); both numbers are multiples of its block. Raises OSError."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length_bytes))


def block_bytes(fd: int) -> int:
    """The logical block of an open block device, in bytes; 4096 where it does not say."""
    try:
        size_bytes: int = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, b"\0" * 4))[0]
    except OSError:
        return _UNKNOWN_ALIGNMENT_BYTES
    return size_bytes or _UNKNOWN_ALIGNMENT_BYTES


def direct_alignment(fd: int) -> int:
    """What offsets and lengths of direct I/O on ``fd`` must be multiples of, in bytes: asked of statx, else 4096."""
    import ctypes

    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return block_bytes(fd)
    function = _function("statx")
    answer = ctypes.create_string_buffer(_STATX_DIO_FIELDS.size)
    if function is None or function(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) < 0:
        return _UNKNOWN_ALIGNMENT_BYTES
    _memory_bytes, offset_bytes = _STATX_DIO_FIELDS.unpack(answer.raw)
    return offset_bytes or _UNKNOWN_ALIGNMENT_BYTES


def is_cached(fd: int, offset: int, length_bytes: int) -> bool:
    """True if the whole range of a file is in the page cache (``cachestat``, Linux 6.5); False also where that is not known."""
    import ctypes

    function = _function("syscall")
    if function is None:
        return False
    wanted = (ctypes.c_uint64 * 2)(offset, length_bytes)
    found = (ctypes.c_uint64 * 5)()
    if function(_CACHESTAT, fd, wanted, found, 0) < 0:
        return False
    page_bytes = mmap.PAGESIZE
    return found[0] == (offset + length_bytes - 1) // page_bytes - offset // page_bytes + 1
