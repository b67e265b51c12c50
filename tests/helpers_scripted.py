"""An NBD server that does what a test says: it answers, or not, and ends connections. It runs in an event loop: that of the
test, or one in a thread (``Background``)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import helpers_nbd
from cowfence.nbd import messages as m
from cowfence.nbd.handshake import ServerHandshake
from cowfence.nbd.messages import Command, RequestHeader, TransmissionFlag
from cowfence.nbd.negotiation import ExportInfo

MIB = 1 << 20
WRITABLE = 0xFFFF & ~int(TransmissionFlag.READ_ONLY)

Answer = Callable[["Scripted", RequestHeader, bytes], bytes | Awaitable[bytes] | None]


class OlderHandshake(ServerHandshake):
    """Of a server that does not know extended headers."""

    _ANSWERS = {option: answer for option, answer in ServerHandshake._ANSWERS.items() if option != m.Option.EXTENDED_HEADERS}


def fine(server: Scripted, request: RequestHeader, data: bytes) -> bytes:
    """What an honest server answers, which keeps its bytes in memory."""
    start, end = request.offset, request.offset + request.length_bytes
    if request.command == Command.READ:
        payload = start.to_bytes(8, "big") + server.bytes[start:end]
        return helpers_nbd.encode_chunk(request.cookie, m.Chunk.OFFSET_DATA, payload)
    if request.command == Command.BLOCK_STATUS:
        return helpers_nbd.encode_status_chunk(request.cookie, 1, [(request.length_bytes, 0)])
    if request.command == Command.WRITE:
        server.bytes[start:end] = data
    elif request.command == Command.WRITE_ZEROES:
        server.bytes[start:end] = bytes(end - start)
    return helpers_nbd.encode_simple_reply(request.cookie)


class Scripted:
    """A server in this event loop. ``answer`` says what each request gets; None ends the connection; what is to be awaited does
    not keep the others waiting."""

    def __init__(self, folder: Path, answer: Answer = fine, flags: int = WRITABLE, most_bytes: int = 32 * MIB) -> None:
        self.path = folder / "sock"
        self.uri = f"nbd+unix:///?socket={self.path}"
        self.answer = answer
        self.export = ExportInfo("", MIB, flags, maximum_block_bytes=most_bytes)
        self.requests: list[RequestHeader] = []
        self.connections = 0
        self.bytes = bytearray(MIB)
        self.writers: list[asyncio.StreamWriter] = []
        self.late: list[asyncio.Task[None]] = []
        self.server: asyncio.Server | None = None

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.server = await asyncio.start_unix_server(self.serve, self.path)

    async def stop(self) -> None:
        assert self.server is not None
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def __aenter__(self) -> Scripted:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        handshake = OlderHandshake({"": self.export})
        writer.write(handshake.receive())
        try:
            while not handshake.ended:
                writer.write(handshake.receive(await reader.readexactly(1)))
            while True:
                request = RequestHeader.decode(await reader.readexactly(28))
                data = await self.receive(reader, request) if request.command == Command.WRITE else b""
                if request.command == Command.DISC:
                    return
                self.requests.append(request)
                reply = self.answer(self, request, data)
                if isinstance(reply, bytes):
                    writer.write(reply)
                elif reply is None:
                    return
                else:
                    self.late.append(asyncio.create_task(self.later(reply, writer)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def receive(self, reader: asyncio.StreamReader, request: RequestHeader) -> bytes:
        """The data of a WRITE; an IncompleteReadError ends the connection."""
        return await reader.readexactly(request.length_bytes)

    async def later(self, reply: Awaitable[bytes], writer: asyncio.StreamWriter) -> None:
        writer.write(await reply)

    def commands(self) -> list[tuple[int, int, int]]:
        return [(request.command, request.offset, request.length_bytes) for request in self.requests]


def dies_at(command: Command, times: int = 1, answer: Answer = fine, *, does_it: bool = False, offset: int = -1) -> Answer:
    """The connection ends at the first requests of a kind (at an offset), after they were carried out or before."""
    left = [times]

    def script(server: Scripted, request: RequestHeader, data: bytes) -> bytes | Awaitable[bytes] | None:
        if request.command != command or not left[0] or offset not in (-1, request.offset):
            return answer(server, request, data)
        left[0] -= 1
        if does_it:
            answer(server, request, data)
        return None

    return script


T = TypeVar("T")


class Background:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@contextmanager
def background() -> Iterator[Background]:
    found = Background()
    try:
        yield found
    finally:
        found.stop()
