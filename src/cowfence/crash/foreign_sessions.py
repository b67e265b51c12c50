"""Ways to send a guest's commands to a program: qemu-io over its pipes, any NBD server over a socket.

Each notes the guest's side in the log: a command begins before it is sent, and is acknowledged after its answer. A command that
failed gets no end: what it wrote may have arrived or not.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from cowfence.crash import qemu
from cowfence.crash.foreign_run import GuestNotes
from cowfence.crash.script import Command
from cowfence.disk.base import Request, Verb
from cowfence.errors import CowfenceError, Invalid
from cowfence.nbd.client import NbdDisk

_START_SECONDS: Final = 30.0
SERVERS: Final = {
    "qemu-nbd": "qemu-nbd --cache=writeback --discard=unmap -f qcow2 -k {socket} {image}",
    "cowfence": f"{shlex.quote(sys.executable)} -m cowfence.cli.main serve {{image}} --socket {{socket}}",
}
"""Servers that need no command line."""


class Serials:
    """Serial numbers of the writes of a whole run, preparation included, so that no two writes carry the same tag."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last


class Session(Protocol):
    """A program that has the image open."""

    def run(self, command: Command, after: Callable[[], None]) -> None:
        """Carry out one command; ``after`` is called between its answer and the note of its end."""
        ...

    def close(self) -> None:
        """End it cleanly."""
        ...

    def kill(self) -> None:
        """End it by SIGKILL."""
        ...


class QemuIoSession:
    """qemu-io on one image. ``notes`` None: nothing is noted, and a failing command raises ProgramFailed (preparation)."""

    def __init__(self, arguments: Sequence[str], directory: Path, serials: Serials, notes: GuestNotes | None) -> None:
        self._pattern = directory / "pattern"
        self._serials = serials
        self._notes = notes
        self._io = qemu.QemuIo(arguments)

    def run(self, command: Command, after: Callable[[], None]) -> None:
        serial = self._serials.next()
        data = command.data(serial)
        if command.verb == "write":
            self._pattern.write_bytes(data)
        token = _begin(self._notes, command, data)
        answer = self._io.command(command.qemu_io(serial, str(self._pattern)))
        after()
        succeeded = _succeeded(command, answer)
        if self._notes is not None:
            _end(self._notes, command, token, succeeded=succeeded)
        elif not succeeded:
            raise qemu.ProgramFailed(f"{command.text}: {answer.strip()}")

    def close(self) -> None:
        self._io.close()

    def kill(self) -> None:
        self._io.kill()


def _succeeded(command: Command, answer: str) -> bool:
    if command.verb in ("write", "zero", "discard"):
        return answer.startswith(("wrote", "discard "))
    return "failed" not in answer and "rror" not in answer


class NbdSession:
    """The server at an NBD URI. ``server``: its process, where it was started for this session."""

    def __init__(self, uri: str, serials: Serials, notes: GuestNotes, server: subprocess.Popen[bytes] | None = None) -> None:
        self._serials = serials
        self._notes = notes
        self._server = server
        self._disk = self._connect(uri)
        self._queued: list[tuple[Command, int, Request]] = []

    @classmethod
    def start(cls, program: str, image: str, directory: Path, serials: Serials, notes: GuestNotes) -> NbdSession:
        """Start the server that ``program`` gives: a command line with ``{image}`` and ``{socket}``."""
        socket = directory / f"nbd-{serials.next()}"
        words = [word.replace("{image}", image).replace("{socket}", str(socket)) for word in shlex.split(program)]
        if not words or "{socket}" not in program:
            raise Invalid(f"{program!a}: a server's command line needs {{socket}} and {{image}}")
        path = qemu.find(words[0]) if words[0].startswith("qemu-") else words[0]
        try:
            server = subprocess.Popen([path, *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError as error:
            raise qemu.ProgramFailed(f"{words[0]}: {error.strerror}") from None
        try:
            return cls(f"nbd+unix:///?socket={socket}", serials, notes, server)
        except BaseException:
            server.kill()
            server.wait()
            raise

    def _connect(self, uri: str) -> NbdDisk:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return NbdDisk(uri)
            except CowfenceError as error:
                ended = self._server is not None and self._server.poll() is not None
                if isinstance(error, Invalid) or ended or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def run(self, command: Command, after: Callable[[], None]) -> None:
        serial = self._serials.next()
        data = command.data(serial)
        token = _begin(self._notes, command, data)
        if command.verb in ("aio_write", "aio_zero"):
            self._queued.append((command, token, _request(command, data)))
            return
        if command.verb == "aio_flush":
            outcomes = self._disk.submit([request for _, _, request in self._queued])
            after()
            for (queued, one, _), outcome in zip(self._queued, outcomes, strict=True):
                if not isinstance(outcome, CowfenceError):
                    _end(self._notes, queued, one, succeeded=True)
            self._queued.clear()
            self._notes.end_postponed()
            return
        (outcome,) = self._disk.submit([_request(command, data)])
        after()
        _end(self._notes, command, token, succeeded=not isinstance(outcome, CowfenceError))

    def close(self) -> None:
        self._disk.close()
        if self._server is not None:
            try:
                # A server that serves one client ends by itself; others are asked to.
                self._server.wait(0.2)
            except subprocess.TimeoutExpired:
                self._server.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(_START_SECONDS)
            self._kill_server()

    def kill(self) -> None:
        if self._server is None:
            raise Invalid("only a server that was started here can be killed")
        self._kill_server()

    def _kill_server(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()


def _request(command: Command, data: bytes) -> Request:
    fua = "f" in command.flags
    if command.verb in ("write", "aio_write"):
        if "c" in command.flags:
            raise Invalid(f"{command.text}: NBD has no compressed writes")
        return Request(Verb.WRITE, command.offset, len(data), data, fua=fua)
    if command.verb in ("zero", "aio_zero"):
        return Request(Verb.ZERO, command.offset, command.length_bytes, fua=fua, unmap="u" in command.flags)
    if command.verb == "discard":
        return Request(Verb.DISCARD, command.offset, command.length_bytes)
    return Request(Verb.FLUSH)


def _begin(notes: GuestNotes | None, command: Command, data: bytes) -> int:
    if notes is None:
        return 0
    if command.verb == "flush":
        return notes.begin_flush(command.text)
    if command.verb == "discard":
        return notes.begin_discard(command.text, command.offset, command.length_bytes)
    return notes.begin_write(command.text, command.offset, data) if data else 0


def _end(notes: GuestNotes, command: Command, token: int, *, succeeded: bool) -> None:
    if not succeeded:
        return
    if command.verb == "flush":
        notes.end_flush(token)
    elif command.verb == "aio_flush":
        notes.end_postponed()
    elif command.verb in ("aio_write", "aio_zero"):
        notes.postpone(token)
    else:
        notes.end(token)
