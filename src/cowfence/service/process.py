"""The server as a process of its host: put into the background, named in a file, handed its sockets by the service manager."""

from __future__ import annotations

import os
import socket
import stat
import sys
from contextlib import suppress
from typing import Final

from cowfence.disk.opener import printable
from cowfence.errors import Invalid, from_os_error

_STANDARD_ERROR: Final = 2
_FIRST_ACTIVATED_FD: Final = 3
_PID_DIGITS_MAX: Final = 20
_READY: Final = b"ready"


class Background:
    """``--fork``: what is left of the program goes on in a child; its parent waits until ``ready``, or else fails as it does.

    To be made before any thread is started and any image opened.
    """

    def __init__(self) -> None:
        told, self._tell = os.pipe()
        child = os.fork()
        if child:
            os.close(self._tell)
            with os.fdopen(told, "rb") as waiting:
                is_ready = waiting.read() == _READY
            if is_ready:
                os._exit(0)
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) or 1)
        os.close(told)
        os.set_inheritable(self._tell, False)
        os.setsid()
        # What is started from here on keeps no pipe of our caller's open; what we have to say still gets there.
        self._told = [os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="backslashreplace") for fd in (1, 2)]
        sys.stdout, sys.stderr = self._told
        self._leave(0, 1, 2)

    def ready(self) -> None:
        """Let go of the terminal and of all else that our caller had open, and let the parent say that all is well."""
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the program runs
        for file in self._told:
            file.close()
        # What we open ourselves is not inheritable; somebody may wait for the end of a pipe, or for a lock.
        for fd in _open_fds():
            with suppress(OSError):  # the directory's own
                if fd > _STANDARD_ERROR and os.get_inheritable(fd):
                    os.close(fd)
        os.write(self._tell, _READY)
        os.close(self._tell)

    @staticmethod
    def _leave(*fds: int) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in fds:
            os.dup2(nowhere, fd)
        os.close(nowhere)


def _open_fds() -> list[int]:
    try:
        return list(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        return []


class PidFile:
    """A file with the number of this process. ``path``: None makes none. What is no such file is left as it is."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._written = False

    def write(self) -> None:
        """Raises Invalid where another file stands there, and StorageFailed."""
        if self._path is None:
            return
        try:
            found = self._content()
            if found is None or (found and not found.strip().isdigit()):
                raise Invalid(f"{printable(self._path)}: there is a file that holds no number of a process")
            with open(self._path, "w", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
        except OSError as error:
            raise from_os_error(self._path, "create", 0, error) from error
        self._written = True

    def remove(self) -> None:
        """The last thing that is done: whoever waits for it may use the image then."""
        if self._path is not None and self._written:
            with suppress(OSError):
                if self._content() == b"%d\n" % os.getpid():
                    os.unlink(self._path)

    def _content(self) -> bytes | None:
        """What stands there, if that may be a number; nothing of it where there is no file. Raises OSError."""
        assert self._path is not None
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                return None
        except FileNotFoundError:
            return b""
        with open(self._path, "rb") as file:
            found = file.read(_PID_DIGITS_MAX + 1)
        return found if len(found) <= _PID_DIGITS_MAX else None


def activated_sockets() -> list[socket.socket]:
    """The listening sockets that the service manager made for this process (sd_listen_fds(3)); none where it made none.

    Raises Invalid for what cannot be listened at.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    words = [os.environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")]
    count = int(words[0]) if words[0].isascii() and words[0].isdigit() else 0
    found: list[socket.socket] = []
    for fd in range(_FIRST_ACTIVATED_FD, _FIRST_ACTIVATED_FD + count):
        try:
            os.set_inheritable(fd, False)
            made = socket.socket(fileno=fd)
            if made.type != socket.SOCK_STREAM or not made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise Invalid(f"socket activation: descriptor {fd} is no listening stream socket")
        except OSError as error:
            raise Invalid(f"socket activation: descriptor {fd}: {error.strerror}") from None
        found.append(made)
    return found
