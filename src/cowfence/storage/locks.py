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
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import IntFlag

from cowfence.errors import CowfenceError, Invalid, Locked, from_os_error

_USED_BASE = 100
_UNSHARED_BASE = 200
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
        Raises ``Locked`` where another user conflicts, ``Invalid`` for a writer that would force sharing, and
        ``StorageFailed`` where the filesystem has no such locks.
        """
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
                if bit & bits:
                    answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, _byte(base, bit)))
                    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                        return bit
        return None


def _refusal(name: str, conflict: Permission, *, writable: bool) -> CowfenceError:
    lock_name = (conflict.name or "").lower().replace("_", " ")
    text = f'is in use by another process (its "{lock_name}" lock conflicts)'
    if not writable:
        text += "; use --force-share (-U) to read it anyway, at the risk of seeing it half changed"
    return Locked(name, text)
