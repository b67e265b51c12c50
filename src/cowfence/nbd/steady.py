"""Reads that are answered straight out of a file's page cache (sendfile), for exports that nobody changes.

A socket that has taken such a reply holds the file's pages, not a copy. So it must not be done where a cluster could be given
to another place of the disk before a slow client has read: the client would get what was written there since. And when the
server lets go of the file, others may change it: so it waits for its last clients to read what they were sent, for a while. It
pays on Unix sockets: half the CPU time of long reads. Over TCP on loopback it measured the same as a copy, and TLS needs the
bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from cowfence.storage.host import is_cached
from cowfence.units import KIB

LEAST_BYTES: Final = 64 * KIB
"""Shorter reads are cheaper copied."""
PATIENCE_SECONDS: Final = 10.0
MOST_LEFT: Final = 100
"""Clients that are gone and have not read everything: each costs a descriptor, and no limit of connections counts them."""


class FilePart:
    """Bytes of an open file that are to be sent. Its length is what is left of them."""

    __slots__ = ("_fd", "_left_bytes", "_offset")

    def __init__(self, fd: int, offset: int, length_bytes: int) -> None:
        self._fd = fd
        self._offset = offset
        self._left_bytes = length_bytes

    def __len__(self) -> int:
        return self._left_bytes

    def send(self, sock: socket.socket) -> int:
        """Send what the socket takes now; returns how much that was. Raises OSError, BlockingIOError where it takes nothing."""
        sent = os.sendfile(sock.fileno(), self._fd, self._offset, self._left_bytes)
        if not sent:
            # The length of the reply has been announced: nothing can take the place of these bytes.
            raise OSError(errno.EIO, "the file has become shorter")
        self._offset += sent
        self._left_bytes -= sent
        return sent


class SteadyFile:
    """The file behind a disk that nobody changes. ``locate``: where a range of the disk stands in it, as it is and in one
    piece; None where it does not, or where that is not known without waiting."""

    def __init__(self, fd: int, locate: Callable[[int, int], int | None]) -> None:
        self._fd = fd
        self._locate = locate
        self._left: list[socket.socket] = []
        """Clients that are gone for us, and have not read all of their replies yet."""

    def part(self, offset: int, length_bytes: int) -> FilePart | None:
        """The answer to a read of a range; None where it has to be read: it is short, in pieces, or not in the page cache."""
        if length_bytes < LEAST_BYTES:
            return None
        place = self._locate(offset, length_bytes)
        if place is None or not is_cached(self._fd, place, length_bytes):
            return None
        return FilePart(self._fd, place, length_bytes)

    def let_go(self, sock: socket.socket) -> None:
        """A client has no more business here: its socket says so, and is closed once all is read, or by ``settle``. Where too
        many have left things unread, those that went first are not waited for."""
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        self._left = [other for other in (*self._left, sock) if not _closed_when_read(other)]
        while len(self._left) > MOST_LEFT:
            self._left.pop(0).close()

    def settle(self) -> None:
        """Before the file is let go: wait until what was sent has been read, for ``PATIENCE_SECONDS`` at most."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while left := [sock for sock in self._left if not _closed_when_read(sock)]:
            self._left = left
            if time.monotonic() >= deadline:
                for sock in left:
                    sock.close()
                break
            time.sleep(0.01)
        self._left = []


def _closed_when_read(sock: socket.socket) -> bool:
    """Close a socket of which the other side has read everything (or is gone); False where it has not."""
    unread_bytes: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    if not unread_bytes:
        sock.close()
    return not unread_bytes
