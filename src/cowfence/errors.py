"""One tree of errors, sorted by what the caller can do about each. Every error carries its facts as fields.

Nothing from ``struct``, ``zlib``, ``numpy`` or a bare ``OSError`` leaves the package: each is turned into one of these where
it arises.
"""

from __future__ import annotations

import errno as _errno


class CowfenceError(Exception):
    """Anything that cowfence reports. ``errno`` is the nearest POSIX error number."""

    errno: int = _errno.EIO


class Invalid(CowfenceError):
    """The caller asked for something that makes no sense: an option, a size, a range past the end of the disk."""

    errno = _errno.EINVAL


class OutOfRange(Invalid):
    """A guest range does not lie inside the disk."""

    def __init__(self, offset: int, length_bytes: int, size_bytes: int) -> None:
        super().__init__(f"range {offset}+{length_bytes} does not lie inside the disk of {size_bytes} bytes")
        self.offset = offset
        self.length_bytes = length_bytes
        self.size_bytes = size_bytes


class NotThisFormat(CowfenceError):
    """The file is not what the caller said it is."""

    errno = _errno.EINVAL

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {what}")
        self.name = name
        self.what = what


class Unsupported(CowfenceError):
    """A valid image uses a feature that this version cannot read or write. ``feature`` is its name."""

    errno = _errno.ENOTSUP

    def __init__(self, name: str, feature: str) -> None:
        super().__init__(f"{name}: unsupported: {feature}")
        self.name = name
        self.feature = feature


class Corrupt(CowfenceError):
    """The image breaks the format's rules. ``where`` names the structure and offset, ``what`` says what is wrong there."""

    errno = _errno.EIO

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


class NoSpace(CowfenceError):
    """The host (or the image's own limits) has no room for this write. The image is whole; free space and try again."""

    errno = _errno.ENOSPC


class ReadOnly(CowfenceError):
    """The image cannot be written, and why: opened so, marked corrupt, or a fence failed earlier."""

    errno = _errno.EROFS


class Locked(CowfenceError):
    """Another process has the image open in a way that conflicts."""

    errno = _errno.EAGAIN

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {what}")
        self.name = name
        self.what = what


class Refused(CowfenceError):
    """The safe-open policy does not allow a file that the image names. ``policy`` says which rule, and what would widen it."""

    errno = _errno.EACCES

    def __init__(self, name: str, policy: str) -> None:
        super().__init__(f"{name}: refused: {policy}")
        self.name = name
        self.policy = policy


class StorageFailed(CowfenceError):
    """The host failed a read, write, fence or other call. ``operation``, ``offset`` and ``errno`` say which and how."""

    def __init__(self, name: str, operation: str, offset: int, cause: OSError) -> None:
        super().__init__(f"{name}: {operation} at offset {offset}: {cause.strerror or cause}")
        self.name = name
        self.operation = operation
        self.offset = offset
        self.errno = cause.errno or _errno.EIO


class Closed(CowfenceError):
    """The disk was closed, or belongs to another process (it was opened before a fork)."""

    errno = _errno.EBADF


class WouldBlock(CowfenceError):
    """A call made with ``wait=False`` would have had to wait for the host. Nothing was changed; call it with ``wait=True``."""

    errno = _errno.EAGAIN


def from_os_error(name: str, operation: str, offset: int, cause: OSError) -> CowfenceError:
    """The error of this tree for a failed system call: NoSpace where the host is full, else StorageFailed."""
    if cause.errno in (_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG):
        return NoSpace(f"{name}: {operation} at offset {offset}: {cause.strerror}")
    return StorageFailed(name, operation, offset, cause)
