"""Sockets that a server listens at: made here, or handed over by who started us."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from cowfence.errors import Locked, StorageFailed
from cowfence.nbd.uri import NbdUri

_BACKLOG: Final = 128


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket, which does not block, and where clients find it. ``made``: path and inode of the socket's file, where
    it is ours to remove."""

    sock: socket.socket
    address: NbdUri
    made: tuple[str, int] | None = None

    def close(self) -> None:
        """Close it, and remove its file if that is still the one."""
        self.sock.close()
        if self.made is not None:
            path, inode = self.made
            with suppress(OSError):
                if os.lstat(path).st_ino == inode:
                    os.unlink(path)


def listen_unix(path: str) -> Listener:
    """At a Unix socket, whose access the umask decides. A socket file that nobody listens at any more is replaced.

    Raises ``Locked`` where a server listens, ``StorageFailed`` where the path cannot be used.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind_unix(sock, path)
        inode = os.stat(path).st_ino
    except OSError as error:
        sock.close()
        raise StorageFailed(path, "listen", 0, error) from error
    except Locked:
        sock.close()
        raise
    sock.setblocking(False)
    return Listener(sock, NbdUri(socket_path=path), (path, inode))


def _bind_unix(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise Locked(path, "another server listens at this socket") from error
        sock.bind(path)
    sock.listen(_BACKLOG)


def listen_tcp(host: str, port: int) -> Listener:
    """At a TCP port; 0 lets the host choose one. Raises ``StorageFailed``."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise StorageFailed(f"{host}:{port}", "listen", 0, error) from error
    return listen_on(sock)


def listen_on(sock: socket.socket) -> Listener:
    """At a listening socket made elsewhere (socket activation), which is taken over."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        address = NbdUri(socket_path=name if isinstance(name, str) else os.fsdecode(name))
    else:
        address = NbdUri(host=name[0], port=name[1])
    sock.setblocking(False)
    return Listener(sock, address)


class Entrance:
    """A server's sockets, ``open`` or shut together: whether ``epoll`` watches them. ``addresses``: where clients find them,
    in the order in which they were added. ``handlers``: who is told what ``epoll`` finds, by descriptor.

    ``knocked``: those at which somebody waits. To be let in when a round of the loop is over: a new connection could get the
    number of one that was closed in it, and with it an event that was meant for that one.
    """

    def __init__(self, epoll: select.epoll, handlers: dict[int, Callable[[int], None]]) -> None:
        self.open = False
        self.addresses: list[NbdUri] = []
        self.knocked: list[socket.socket] = []
        self._epoll = epoll
        self._handlers = handlers
        self._listeners: list[Listener] = []

    def add(self, listener: Listener) -> None:
        self._listeners.append(listener)
        self.addresses.append(listener.address)
        self._handlers[listener.sock.fileno()] = lambda _events: self.knocked.append(listener.sock)
        if self.open:
            self._epoll.register(listener.sock, select.EPOLLIN)

    def set_open(self, wanted: bool) -> None:
        if wanted == self.open:
            return
        self.open = wanted
        for listener in self._listeners:
            if wanted:
                self._epoll.register(listener.sock, select.EPOLLIN)
            else:
                self._epoll.unregister(listener.sock)

    def close(self) -> None:
        """For good."""
        self.set_open(False)
        for listener in self._listeners:
            self._handlers.pop(listener.sock.fileno(), None)
            listener.close()
        self._listeners.clear()
