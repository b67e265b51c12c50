"""Image locks that QEMU understands: who may read, write and resize a file, said with byte-range locks.

The scheme is that of QEMU's file driver. Each permission has a bit. A user of the file holds a *read* lock on byte
``100 + bit`` for each permission that it uses, and on byte ``200 + bit`` for each permission that it does *not* share with
others. Nobody takes a write lock: having set its own read locks, a user asks (F_OFD_GETLK) whether a write lock on the
opposite byte would be possible. If not, someone else holds that byte, and the two conflict. Two that start at the same time
may both be refused; they never both succeed.

=======================  ======================  =================
opened for               uses (100+)             not shared (200+)
=======================  ======================  =================
writing                  read, write, resize     write, resize
reading                  read                    write, resize
reading, force-share     read                    (all shared)
=======================  ======================  =================

These are the bytes that qemu-io and qemu-nbd 7.2 hold on a qcow2 file, so that refusal is mutual: writer against writer,
writer against reader; readers coexist; a reader that forces goes beside a writer and may see a torn image.

The locks are of the open file description: they end when its last descriptor closes, in whichever process that is. This is
what lets the keeper hold a dead writer's lock. It also means that an explicit unlock in a forked child would unlock the
parent; so a lock remembers who took it, and releases nothing in any other process.

Whoever meets a lock wants to know if it is worth waiting. Two bytes more, which QEMU does not look at, tell: a keeper holds a
read lock on ``KEEPER_BYTE`` for as long as it lives, and a writer that has a keeper holds one on ``WRITER_BYTE``, by a
description of its own that nobody shares. The first held without the second is a keeper at work for a dead writer: an opener
waits for it, up to ``KEEPER_SECONDS``. In every other case it is refused at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from enum import IntFlag
from typing import Final

from cowfence.errors import CowfenceError, Invalid, Locked, from_os_error

_USED_BASE = 100
_UNSHARED_BASE = 200
KEEPER_BYTE: Final = 300
WRITER_BYTE: Final = 301
KEEPER_SECONDS: Final = 10.0
_RETRY_SECONDS = 0.02
_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


class Permission(IntFlag):
    """QEMU's block permissions, as far as files know them."""

    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8


_WRITER = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
_UNSHARED = Permission.WRITE | Permission.RESIZE
_LOCKED_BITS = (Permission.CONSISTENT_READ, Permission.WRITE, Permission.WRITE_UNCHANGED, Permission.RESIZE)


def _flock(kind: int, start: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0)


def _byte(base: int, bit: Permission) -> int:
    return base + bit.bit_length() - 1


class ImageLock:
    """A lock on an open file. Made by ``acquire``; ``release`` ends it, and so does closing the last descriptor."""

    __slots__ = ("_bytes", "_fd", "_owner_pid")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._owner_pid = os.getpid()
        self._bytes: list[int] = []

    @classmethod
    def acquire(cls, fd: int, name: str, *, writable: bool, force_share: bool = False) -> ImageLock:
        """Lock the file open at ``fd`` (which must be open for reading) against others, by the table above.

        ``writable`` asks for the writer's lock; the descriptor itself may be read-only (a file about to be replaced).
        Waits for the keeper of a dead writer. Raises ``Locked`` where another user conflicts, ``Invalid`` for a writer that
        would force sharing, and ``StorageFailed`` where the filesystem has no such locks.
        """
        try:
            return cls._acquire(fd, name, writable=writable, force_share=force_share)
        except Locked:
            deadline = time.monotonic() + KEEPER_SECONDS
        while True:
            # Asked before the lock is tried: a keeper that ends in between has left the lock free.
            works = keeper_works(fd)
            try:
                return cls._acquire(fd, name, writable=writable, force_share=force_share)
            except Locked:
                if not works:
                    raise
                if time.monotonic() > deadline:
                    raise Locked(name, "the keeper of a killed process still completes its writes; try again later") from None
            time.sleep(_RETRY_SECONDS)

    @classmethod
    def _acquire(cls, fd: int, name: str, *, writable: bool, force_share: bool) -> ImageLock:
        if writable and force_share:
            raise Invalid(f"{name}: force-share is for reading only")
        used = _WRITER if writable else Permission.CONSISTENT_READ
        unshared = Permission(0) if force_share else _UNSHARED
        lock = cls(fd)
        try:
            lock._hold(used, unshared)
            conflict = lock._conflict(used, unshared)
        except OSError as exc:
            lock.release()
            if exc.errno in (errno.EAGAIN, errno.EACCES):
                raise Locked(name, "is locked by another process") from exc
            raise from_os_error(name, "lock", 0, exc) from exc
        if conflict is not None:
            lock.release()
            raise _refusal(name, conflict, writable=writable)
        return lock

    def release(self) -> None:
        """Unlock; in a process other than the one that locked (a forked child) nothing happens. May be called again."""
        if os.getpid() != self._owner_pid:
            return
        while self._bytes:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, self._bytes.pop()))

    def _hold(self, used: Permission, unshared: Permission) -> None:
        for base, bits in ((_USED_BASE, used), (_UNSHARED_BASE, unshared)):
            for bit in _LOCKED_BITS:
                if bit & bits:
                    fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, _byte(base, bit)))
                    self._bytes.append(_byte(base, bit))

    def _conflict(self, used: Permission, unshared: Permission) -> Permission | None:
        """The first permission that another user withholds from us or uses against our will."""
        for base, bits in ((_UNSHARED_BASE, used), (_USED_BASE, unshared)):
            for bit in _LOCKED_BITS:
                if bit & bits and _is_held(self._fd, _byte(base, bit)):
                    return bit
        return None


def hold_byte(fd: int, byte: int) -> None:
    """Hold a read lock on ``byte`` until the last descriptor of this description closes. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))


def _is_held(fd: int, byte: int) -> bool:
    """True if any other description than that of ``fd`` holds a lock on ``byte``."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def keeper_works(fd: int) -> bool:
    """True if a keeper works on the file open at ``fd`` for a writer that is dead."""
    return _is_held(fd, KEEPER_BYTE) and not _is_held(fd, WRITER_BYTE)


def holds_writers_lock(shared: int, own: int) -> bool:
    """True if the description of ``shared`` holds the writer's lock, so that nobody else may write to the file.

    ``own`` is another description of the file. The two see each other's locks, and neither its own.
    """
    byte = _byte(_USED_BASE, Permission.WRITE)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        if _is_held(own, byte) and not _is_held(shared, byte):
            return True
        # Somebody who tries to open the file holds the byte, too, for an instant, before he sees that he may not.
        time.sleep(_RETRY_SECONDS)
    return False


def release_all(fd: int) -> None:
    """Release every image lock of the description of ``fd``, whoever took it: the keeper's end of a dead writer's lock."""
    for base in (_USED_BASE, _UNSHARED_BASE):
        for bit in _LOCKED_BITS:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, _byte(base, bit)))


def _refusal(name: str, conflict: Permission, *, writable: bool) -> CowfenceError:
    lock_name = (conflict.name or "").lower().replace("_", " ")
    text = f'is in use by another process (its "{lock_name}" lock conflicts)'
    if not writable:
        text += "; use --force-share (-U) to read it anyway, at the risk of seeing it half changed"
    return Locked(name, text)
