"""The control socket: changes of images that are being served, while they are.

A Unix socket that only its owner may use. A request is a line of JSON, ``{"command": NAME, ...}``, the answer another:
``{"result": ...}`` or ``{"error": TEXT, "kind": NAME}``. Each client has a thread, which waits for what it asked for; guests
wait only as long as an alteration of their image needs (``qcow2.alteration``), and each of those is atomic, as everywhere.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import cowfence
from cowfence.errors import CowfenceError, Invalid, StorageFailed
from cowfence.nbd.listening import Listener, listen_unix

_log = logging.getLogger(__name__)
_LINE_MAX_BYTES: Final = 64 * 1024
_AGAIN_SECONDS: Final = 0.1
_LAST_SECONDS: Final = 10.0
_OWNER_ONLY: Final = 0o177

Command = Callable[[Mapping[str, Any]], object]


class ControlServer:
    """Answers at ``path`` by calling ``commands``, which return what JSON can say and raise CowfenceError.

    Raises as ``listening.listen_unix`` does. To be made before other threads make files: it sets the umask for a moment.
    """

    def __init__(self, path: str, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        before = os.umask(_OWNER_ONLY)
        try:
            self._listener: Listener = listen_unix(path)
        finally:
            os.umask(before)
        self._listener.sock.setblocking(True)
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._guard = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.sock.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.warning("accept: %s", error)
                time.sleep(_AGAIN_SECONDS)  # out of descriptors, for instance
                continue
            thread = threading.Thread(target=self._serve, args=(client,), name="control-client", daemon=True)
            with self._guard:
                self._clients[client] = thread
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, client.makefile("rb") as lines:
                while line := lines.readline(_LINE_MAX_BYTES):
                    client.sendall(json.dumps(self._answer(line)).encode() + b"\n")
                    if not line.endswith(b"\n"):
                        return  # too long, or cut off
        except OSError:
            pass  # it left
        finally:
            with self._guard:
                self._clients.pop(client, None)

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or not isinstance(request.get("command"), str):
                raise Invalid("a request is an object with a command")
            command = self._commands.get(request["command"])
            if command is None:
                raise Invalid(f"unknown command {request['command']!a}; there are {', '.join(sorted(self._commands))}")
            return {"result": command(request)}
        except CowfenceError as error:
            return {"error": str(error), "kind": type(error).__name__}
        except (ValueError, RecursionError):
            return {"error": "no line of JSON", "kind": "Invalid"}
        except Exception as error:
            # A defect of ours must cost the request, not the server.
            _log.error("a command met a defect", exc_info=error)
            return {"error": f"internal error: {type(error).__name__}", "kind": "CowfenceError"}

    def close(self) -> None:
        """Take no more requests. What is being done comes to its end, and who asked for it is told, if that takes no longer
        than ``_LAST_SECONDS``."""
        self._closed = True
        # Closing alone would leave the thread waiting in accept.
        with suppress(OSError):
            self._listener.sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._guard:
            clients = dict(self._clients)
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + _LAST_SECONDS
        for client, thread in clients.items():
            with suppress(RuntimeError):  # not started yet
                thread.join(max(0.0, deadline - time.monotonic()))
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


def ask(path: str, request: Mapping[str, object], *, timeout_seconds: float | None = None) -> object:
    """The answer of the server whose control socket is at ``path``. Raises StorageFailed where there is none, and CowfenceError
    of the kind that it reports."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_seconds)
            sock.connect(path)
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                line = lines.readline()
    except OSError as error:
        raise StorageFailed(path, "connect", 0, error) from error
    if not line:
        raise StorageFailed(path, "ask", 0, ConnectionResetError("the server has ended"))
    answer = json.loads(line)
    if "error" in answer:
        raise CowfenceError(answer["error"])
    return answer.get("result")


class Fields:
    """The fields of a request, taken by their names. Raises Invalid for those that are missing, wrong, or left over."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._left = {key: value for key, value in request.items() if key != "command"}

    def text(self, name: str) -> str:
        found = self.optional_text(name)
        if found is None:
            raise Invalid(f"{name} is missing")
        return found

    def optional_text(self, name: str) -> str | None:
        found = self._left.pop(name, None)
        if found is not None and not isinstance(found, str):
            raise Invalid(f"{name} is a string")
        return found

    def optional_number(self, name: str) -> int | None:
        found = self._left.pop(name, None)
        if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
            raise Invalid(f"{name} is a number")
        return found

    def flag(self, name: str) -> bool:
        found = self._left.pop(name, False)
        if not isinstance(found, bool):
            raise Invalid(f"{name} is true or false")
        return found

    def end(self) -> None:
        if self._left:
            raise Invalid(f"unknown field {sorted(self._left)[0]!a}")


def qcow2_of(image: cowfence.Qcow2Disk | cowfence.RawDisk, name: str) -> cowfence.Qcow2Disk:
    """Raises Invalid where the image of the export is no qcow2 image, or is not written to."""
    if not isinstance(image, cowfence.Qcow2Disk):
        raise Invalid(f"the export {name!a} is no qcow2 image")
    if not image.writable:
        raise Invalid(f"the export {name!a} is read-only")
    return image
