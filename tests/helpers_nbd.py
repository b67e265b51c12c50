"""A server in a thread, a bare socket that has gone through the handshake, and the patience that both ask for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cowfence.nbd.client_handshake import ClientHandshake
from cowfence.nbd.export import Export
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import (
    CHUNK_HEADER,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    ChunkHeader,
    Command,
    RequestHeader,
    encode_error_payload,
    encode_hole_payload,
    encode_status_payload,
)
from cowfence.nbd.negotiation import Negotiated
from cowfence.nbd.server import Limits, Server


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until ``condition`` holds; fails with ``what`` where it does not within ten seconds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


@contextmanager
def serving(folder: Path, exports: Mapping[str, Export], limits: Limits | None = None) -> Iterator[Server]:
    """A server at ``folder/sock``, stopped at the end."""
    server = Server(exports, limits=limits)
    server.listen_unix(str(folder / "sock"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


class BareClient:
    """A client that sends what it is told to, right or wrong."""

    def __init__(self, path: Path, export: str = "", *, negotiate: bool = True, style: Style = Style.STRUCTURED) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        self.agreed: Negotiated | None = None
        if negotiate:
            handshake = ClientHandshake(export, style=style)
            while not handshake.ended:
                self.sock.sendall(handshake.receive(self.sock.recv(4096)))
            self.agreed = handshake.result

    def send(self, command: int, cookie: int = 1, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> None:
        self.sock.sendall(RequestHeader(flags, command, cookie, offset, length).encode() + data)

    def receive(self, count: int) -> bytes:
        """Exactly ``count`` bytes; fewer only where the server closes."""
        got = b""
        while len(got) < count:
            piece = self.sock.recv(count - len(got))
            if not piece:
                break
            got += piece
        return got

    def reply(self) -> tuple[int, int, bytes]:
        """Cookie, error and data of the next reply; structured ones have one chunk here."""
        magic = self.receive(4)
        if magic == bytes.fromhex("67446698"):
            rest = self.receive(12)
            return int.from_bytes(rest[4:], "big"), int.from_bytes(rest[:4], "big"), b""
        assert magic == bytes.fromhex("668e33ef"), magic
        fixed = self.receive(16)
        header = ChunkHeader(
            int.from_bytes(fixed[:2], "big"),
            int.from_bytes(fixed[2:4], "big"),
            int.from_bytes(fixed[4:12], "big"),
            int.from_bytes(fixed[12:], "big"),
        )
        assert header.done
        payload = self.receive(header.length_bytes)
        if header.is_error:
            return header.cookie, int.from_bytes(payload[:4], "big"), payload[6:]
        return header.cookie, 0, payload[8:] if header.kind == 1 else payload

    def ask(self, command: int, **fields: int) -> tuple[int, int, bytes]:
        self.send(command, **fields)  # type: ignore[arg-type]
        return self.reply()

    def closed_by_server(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def disconnect(self) -> None:
        self.send(Command.DISC)
        assert self.closed_by_server()
        self.sock.close()

    def __enter__(self) -> BareClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def encode_chunk(cookie: int, kind: int, payload: bytes, *, done: bool = True) -> bytes:
    """A structured reply chunk."""
    return CHUNK_HEADER.pack(STRUCTURED_REPLY_MAGIC, 1 if done else 0, kind, cookie, len(payload)) + payload


def encode_simple_reply(cookie: int, error: int = 0) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def encode_error_chunk(cookie: int, error: int, message: str) -> bytes:
    return encode_chunk(cookie, Chunk.ERROR, encode_error_payload(error, message))


def encode_hole_chunk(cookie: int, offset: int, length_bytes: int, *, done: bool = True) -> bytes:
    return encode_chunk(cookie, Chunk.OFFSET_HOLE, encode_hole_payload(offset, length_bytes), done=done)


def encode_status_chunk(cookie: int, context_id: int, descriptors: Iterable[tuple[int, int]]) -> bytes:
    return encode_chunk(cookie, Chunk.BLOCK_STATUS, encode_status_payload(context_id, descriptors))
