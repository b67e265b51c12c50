"""The client against servers that lie, vanish or lack features: every error fails the call, none is repaired in silence."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import helpers_nbd
from cowfence.disk.base import Request, Verb
from cowfence.errors import Closed, CowfenceError, StorageFailed, Unsupported
from cowfence.nbd import messages as m
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.messages import Command, ProtocolError, RequestHeader, TransmissionFlag
from cowfence.nbd.negotiation import ExportInfo
from helpers_scripted import OlderHandshake

ALL = 0xFFFF
Answer = Callable[[RequestHeader, bytes], bytes | None]


class LyingServer:
    """One connection; a negotiated handshake, then ``answer`` for each request. None closes."""

    def __init__(self, folder: Path, answer: Answer, flags: int = ALL, most_bytes: int = m.PAYLOAD_MAX_BYTES) -> None:
        self.path = folder / "sock"
        self.answer = answer
        self.export = ExportInfo("", 1 << 20, flags & ~TransmissionFlag.READ_ONLY, maximum_block_bytes=most_bytes)
        self.requests: list[RequestHeader] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        self.uri = f"nbd+unix:///?socket={self.path}"

    def serve(self) -> None:
        sock, _ = self.listener.accept()
        with sock, self.listener, sock.makefile("rb") as stream:
            handshake = OlderHandshake({"": self.export})
            sock.sendall(handshake.receive())
            while not handshake.ended:
                sock.sendall(handshake.receive(stream.read(1)))
            while raw := stream.read(28):
                request = RequestHeader.decode(raw)
                if request.command == Command.DISC:
                    return
                self.requests.append(request)
                data = stream.read(request.length_bytes) if request.command == Command.WRITE else b""
                reply = self.answer(request, data)
                if reply is None:
                    return
                sock.sendall(reply)


def fine(request: RequestHeader, _data: bytes = b"") -> bytes:
    if request.command == Command.READ:
        data = request.offset.to_bytes(8, "big") + b"r" * request.length_bytes
        return helpers_nbd.encode_chunk(request.cookie, m.Chunk.OFFSET_DATA, data)
    return helpers_nbd.encode_simple_reply(request.cookie)


def commands(server: LyingServer) -> list[tuple[int, int, int, int]]:
    return [(r.command, r.flags, r.offset, r.length_bytes) for r in server.requests]


def test_an_error_fails_the_call_and_not_the_connection(tmp_path: Path) -> None:
    server = LyingServer(tmp_path, lambda request, _: helpers_nbd.encode_error_chunk(request.cookie, 5, "bad sector"))
    disk = NbdDisk(server.uri)
    for _ in range(2):
        with pytest.raises(StorageFailed, match="bad sector"):
            disk.read(0, 512)
    with pytest.raises(StorageFailed, match="bad sector"):
        disk.close()  # the flush failed, and the caller must hear of it
    with pytest.raises(Closed):
        disk.read(0, 1)
    disk.close()


@pytest.mark.parametrize(
    "lie",
    [
        lambda *_: b"garbage that is long enough for any header",
        lambda request, _: helpers_nbd.encode_simple_reply(request.cookie + 1),
        lambda request, _: helpers_nbd.encode_chunk(request.cookie, 1, bytes(8) + b"x"),
        lambda *_: None,
    ],
)
def test_a_lie_or_a_lost_connection_ends_it_for_good(tmp_path: Path, lie: Answer) -> None:
    disk = NbdDisk(LyingServer(tmp_path, lie).uri)
    for _ in range(2):
        with pytest.raises((ProtocolError, StorageFailed)):
            disk.read(0, 512)
    disk.close()


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    disk = NbdDisk(LyingServer(tmp_path, lambda *_: b"").uri, timeout_seconds=0.1)
    with pytest.raises(StorageFailed, match="does not answer"):
        disk.flush()
    disk.close()


@pytest.mark.parametrize(
    "greeting", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(200)]
)
def test_what_is_no_nbd_server(tmp_path: Path, greeting: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(greeting)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(CowfenceError):
            NbdDisk(f"nbd+unix:///?socket={tmp_path / 'sock'}")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed):
        NbdDisk(f"nbd+unix:///?socket={tmp_path / 'sock'}")
    with pytest.raises(StorageFailed):
        NbdDisk("nbd://127.0.0.1:1/")


def test_requests_are_cut_to_what_the_server_takes(tmp_path: Path) -> None:
    server = LyingServer(tmp_path, fine, most_bytes=65536)
    with NbdDisk(server.uri) as disk:
        assert disk.read(10, 100_000) == b"r" * 100_000
        disk.write(10, bytes(100_000), fua=True)
        disk.zero(0, 100_000)
        disk.discard(0, 100_000)
    assert commands(server)[:-1] == [
        (Command.READ, 0, 10, 65536),
        (Command.READ, 0, 65546, 34464),
        (Command.WRITE, 1, 10, 65536),
        (Command.WRITE, 1, 65546, 34464),
        (Command.WRITE_ZEROES, 0, 0, 65536),
        (Command.WRITE_ZEROES, 0, 65536, 34464),
        (Command.TRIM, 0, 0, 100_000),
    ]


def test_what_the_server_lacks_is_done_by_other_means_or_refused(tmp_path: Path) -> None:
    server = LyingServer(tmp_path, fine, flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH)
    with NbdDisk(server.uri) as disk:
        disk.write(0, b"x", fua=True)
        disk.zero(0, 100_000)
        disk.discard(0, 100_000)
    assert [(command, flags, length) for command, flags, _, length in commands(server)] == [
        (Command.WRITE, 0, 1),
        (Command.FLUSH, 0, 0),
        (Command.WRITE, 0, 65536),
        (Command.WRITE, 0, 34464),
        (Command.FLUSH, 0, 0),
    ]


def test_no_flush_is_an_error(tmp_path: Path) -> None:
    with NbdDisk(LyingServer(tmp_path, fine, flags=TransmissionFlag.HAS_FLAGS).uri) as disk:
        with pytest.raises(Unsupported, match="flush"):
            disk.flush()
        (outcome,) = disk.submit([Request(Verb.FLUSH)])
        assert isinstance(outcome, Unsupported)


def test_extreme_block_status_is_cut_to_the_range(tmp_path: Path) -> None:
    def answer(request: RequestHeader, _data: bytes) -> bytes:
        if request.command != Command.BLOCK_STATUS:
            return fine(request)
        return helpers_nbd.encode_status_chunk(request.cookie, 1, [(512, 0), (0xFFFF_FFFF, 3), (0xFFFF_FFFF, 0)])

    with NbdDisk(LyingServer(tmp_path, answer).uri) as disk:
        extents = list(disk.extents(0, 1 << 20))
    assert [(extent.start, extent.length_bytes, extent.present) for extent in extents] == [
        (0, 512, True),
        (512, (1 << 20) - 512, False),
    ]
