"""The asyncio client: many requests in flight, cancellations, and what a lost connection may cost and what not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import cowfence.aio
import helpers_nbd
from cowfence.disk.base import Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import Closed, CowfenceError, Invalid, ReadOnly, StorageFailed, Unsupported
from cowfence.nbd import messages as m
from cowfence.nbd.aio import AsyncNbdDisk
from cowfence.nbd.export import Export
from cowfence.nbd.framing import Style
from cowfence.nbd.handshake import ServerHandshake
from cowfence.nbd.messages import BASE_ALLOCATION, Command, CommandFlag, ProtocolError, RequestHeader, TransmissionFlag
from cowfence.nbd.negotiation import ExportInfo
from cowfence.nbd.server import Server
from cowfence.nbd.tls import server_context
from helpers_aio import SIZE, exercise
from helpers_storage import TinyStorage
from helpers_tls import Authority
from judges import require

MIB = 1 << 20
WRITABLE = 0xFFFF & ~int(TransmissionFlag.READ_ONLY)
UNTIL_LOST = "may be lost"

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
                data = await reader.readexactly(request.length_bytes) if request.command == Command.WRITE else b""
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

    async def later(self, reply: Awaitable[bytes], writer: asyncio.StreamWriter) -> None:
        writer.write(await reply)

    def commands(self) -> list[tuple[int, int, int]]:
        return [(request.command, request.offset, request.length_bytes) for request in self.requests]


def dies_at(command: Command, times: int = 1, answer: Answer = fine, *, does_it: bool = False) -> Answer:
    """The connection ends at the first requests of a kind, after they were carried out or before."""
    left = [times]

    def script(server: Scripted, request: RequestHeader, data: bytes) -> bytes | Awaitable[bytes] | None:
        if request.command != command or not left[0]:
            return answer(server, request, data)
        left[0] -= 1
        if does_it:
            answer(server, request, data)
        return None

    return script


@asynccontextmanager
async def connected(server: Scripted, **options: object) -> AsyncIterator[AsyncNbdDisk]:
    """Closed without a word at the end, whatever has happened to it."""
    disk = await AsyncNbdDisk.connect(server.uri, **options)  # type: ignore[arg-type]
    try:
        yield disk
    finally:
        with suppress(CowfenceError):
            await disk.close()


# --- requests ---


@pytest.mark.parametrize("style", list(Style))
def test_everything(tmp_path: Path, style: Style) -> None:
    storage = TinyStorage(SIZE)

    async def main() -> None:
        async with await AsyncNbdDisk.connect(server.uri(), style=style) as disk:
            assert disk.style is style
            await exercise(disk)
            if style >= Style.STRUCTURED:
                runs = [run async for run in disk.status(BASE_ALLOCATION, 0, SIZE)]
                assert sum(run[1] for run in runs) == SIZE
            else:
                assert [(e.start, e.length_bytes, e.data) async for e in disk.extents(5, 100)] == [(5, 100, True)]
            with pytest.raises(Invalid, match="no metadata context"):
                disk.status("other:context", 0, 1)
        with pytest.raises(Closed):
            await disk.read(0, 1)
        async with cowfence.aio.open_nbd(server.uri()) as again:
            assert await again.read(100, 5) == b"hello"

    with helpers_nbd.serving(tmp_path, {"": Export(RawDisk(storage))}) as server:
        asyncio.run(main())
    assert storage.bytes[100:105] == b"hello"


def test_requests_are_cut_and_what_lacks_is_done_by_other_means(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path, flags=TransmissionFlag.HAS_FLAGS | 4, most_bytes=65536) as server:
            server.bytes[:] = random.Random(1).randbytes(MIB)
            async with connected(server) as disk:
                assert await disk.read(10, 200_000) == server.bytes[10:200_010]
                await disk.write(10, bytes(100_000), fua=True)
                await disk.discard(0, 5)
            assert server.bytes[10:100_010] == bytes(100_000)
            assert server.commands() == [
                *((Command.READ, 10 + 65536 * index, 65536) for index in range(3)),
                (Command.READ, 10 + 65536 * 3, 200_000 - 3 * 65536),
                (Command.WRITE, 10, 65536),
                (Command.WRITE, 65546, 34464),
                (Command.FLUSH, 0, 0),
                (Command.FLUSH, 0, 0),  # of the close
            ]

    asyncio.run(main())


def test_requests_are_in_flight_together_up_to_a_bound(tmp_path: Path) -> None:
    async def main() -> None:
        waiting: list[bytes] = []

        def answer(server: Scripted, request: RequestHeader, data: bytes) -> bytes:
            waiting.append(fine(server, request, data))
            if len(server.requests) not in (64, 100):
                return b""
            replies = b"".join(reversed(waiting))  # in any order
            waiting.clear()
            return replies

        async with Scripted(tmp_path, answer) as server, connected(server) as disk:
            server.bytes[:100] = bytes(range(100))
            read = await asyncio.gather(*(disk.read(index, 1) for index in range(100)))
            assert b"".join(read) == bytes(range(100))
            server.answer = fine

    asyncio.run(main())


def test_errors(tmp_path: Path) -> None:
    def answer(_server: Scripted, request: RequestHeader, _data: bytes) -> bytes:
        return helpers_nbd.encode_error_chunk(request.cookie, 5, "bad sector")

    async def main() -> None:
        async with Scripted(tmp_path, answer) as server:
            disk = await AsyncNbdDisk.connect(server.uri)
            for request in (disk.read(0, 1), disk.write(0, b"x"), disk.flush()):
                with pytest.raises(StorageFailed, match="bad sector"):
                    await request
            (outcome,) = await disk.submit([Request(Verb.READ, 0, 1)])
            assert isinstance(outcome, StorageFailed)
            with pytest.raises(StorageFailed, match="bad sector"):
                await disk.close()
            await disk.close()
        with pytest.raises(StorageFailed):
            await AsyncNbdDisk.connect(server.uri)
        async with Scripted(tmp_path) as server:
            with pytest.raises(Unsupported):
                await AsyncNbdDisk.connect(f"nbd+unix:///nothing?socket={server.path}")
            with pytest.raises(Invalid):
                await AsyncNbdDisk.connect(server.uri, reconnect_seconds=-1)

    asyncio.run(main())


@pytest.mark.parametrize("reconnect_seconds", [0, 5])
def test_a_lie_ends_it_for_good(tmp_path: Path, reconnect_seconds: float) -> None:
    async def main() -> None:
        async with Scripted(tmp_path, lambda *_: b"garbage that is long enough for any header") as server:
            async with connected(server, reconnect_seconds=reconnect_seconds) as disk:
                for _ in range(2):
                    with pytest.raises(ProtocolError):
                        await disk.read(0, 1)
            assert server.connections == 1

    asyncio.run(main())


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path, lambda *_: b"") as server, connected(server, timeout_seconds=0.1) as disk:
            await asyncio.sleep(0.15)  # idle, it may say nothing
            with pytest.raises(StorageFailed, match="does not answer"):
                await disk.read(0, 1)

    asyncio.run(main())


# --- cancellation ---


@pytest.mark.parametrize("step", range(12))
def test_a_cancelled_write_never_tears(tmp_path: Path, step: int) -> None:
    """It needs more messages than are allowed in flight, and the server does them in any order."""
    old, new, later = b"o" * 400_000, bytearray(b"n" * 400_000), b"l" * 1000
    rng = random.Random(step)

    async def slowly(server: Scripted, request: RequestHeader, data: bytes) -> bytes:
        await asyncio.sleep(rng.random() * 0.005)
        return fine(server, request, data)

    async def main() -> None:
        async with Scripted(tmp_path, slowly, most_bytes=4096) as server:
            async with connected(server) as disk:
                await disk.write(0, old)
                task = asyncio.create_task(disk.write(0, new))
                await asyncio.sleep(step * 0.001)
                done = not task.cancel()
                await asyncio.sleep(0.0005)
                assert task.done()
                new[:] = b"?" * len(new)
                found = await disk.read(0, len(old))
                assert found == b"n" * len(old) if done else found in (old, b"n" * len(old))
                last = asyncio.create_task(disk.write(200_000, b"!" * 200_000))
                await asyncio.sleep(0.001)
                last.cancel()
                await asyncio.wait((last,))
                await disk.write(300_000, later)
            assert server.bytes[:200_000] == found[:200_000]
            assert server.bytes[300_000:301_000] == later
            assert server.bytes[301_000:400_000] == b"!" * 99_000

    asyncio.run(main())


def test_what_was_not_begun_is_not_sent_and_close_waits(tmp_path: Path) -> None:
    held: list[tuple[RequestHeader, bytes]] = []

    def hold(_server: Scripted, request: RequestHeader, data: bytes) -> bytes:
        held.append((request, data))
        return b""

    async def main() -> None:
        async with Scripted(tmp_path, hold) as server:
            disk = await AsyncNbdDisk.connect(server.uri)
            writes = [asyncio.create_task(disk.write(10 * index, b"w" * 10)) for index in range(100)]
            while len(held) < 64:
                await asyncio.sleep(0.001)
            for task in writes:
                task.cancel()
            await asyncio.wait(writes)
            closing = asyncio.create_task(disk.close())
            await asyncio.sleep(0.02)
            assert not closing.done()
            assert len(held) == 64
            server.answer = fine
            server.writers[0].write(b"".join(fine(server, *one) for one in held))
            await closing
            assert len(server.requests) == 65  # and the flush
            assert server.bytes[:1000] == (b"w" * 640).ljust(1000, b"\0")

    asyncio.run(main())


def test_the_reply_of_a_cancelled_read_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path) as server, connected(server) as disk:
            server.bytes[:] = random.Random(1).randbytes(MIB)
            for _ in range(30):
                tasks = [asyncio.create_task(disk.read(1000 * index, 1000)) for index in range(20)]
                await asyncio.sleep(random.random() * 0.001)
                for task in tasks[::2]:
                    task.cancel()
                for index, task in enumerate(tasks):
                    if index % 2:
                        assert await task == server.bytes[1000 * index : 1000 * index + 1000]
            assert server.connections == 1

    asyncio.run(main())


# --- a lost connection ---


def test_without_reconnecting_a_lost_connection_ends_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path, dies_at(Command.READ)) as server:
            async with connected(server) as disk:
                for _ in range(2):
                    with pytest.raises(StorageFailed, match="closed the connection"):
                        await disk.read(0, 1)
            assert server.connections == 1

    asyncio.run(main())


def test_reads_and_block_status_are_repeated(tmp_path: Path) -> None:
    async def main() -> None:
        script = dies_at(Command.READ, 3, dies_at(Command.BLOCK_STATUS, 2))
        async with Scripted(tmp_path, script, most_bytes=65536) as server, connected(server, reconnect_seconds=5) as disk:
            server.bytes[:] = random.Random(1).randbytes(MIB)
            assert await disk.read(0, MIB) == server.bytes
            assert [run async for run in disk.status(BASE_ALLOCATION, 0, MIB)] == [(0, MIB, 0)]
            assert server.connections == 6

    asyncio.run(main())


@pytest.mark.parametrize("does_it", [True, False])
@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
def test_changes_are_not_repeated(tmp_path: Path, command: Command, does_it: bool) -> None:
    async def main() -> None:
        async with (
            Scripted(tmp_path, dies_at(command, does_it=does_it)) as server,
            connected(server, reconnect_seconds=5) as disk,
        ):
            change: dict[Command, Callable[[int], Awaitable[None]]] = {
                Command.WRITE: lambda at: disk.write(at, b"x" * 512),
                Command.WRITE_ZEROES: lambda at: disk.zero(at, 512),
                Command.TRIM: lambda at: disk.discard(at, 512),
            }
            with pytest.raises(StorageFailed, match="closed the connection"):
                await change[command](0)
            await disk.read(0, 1)
            # The server may yet do it, so nothing may be written there that it could land upon.
            with pytest.raises(ReadOnly, match="not answered"):
                await disk.write(511, b"new")
            await disk.write(512, b"elsewhere")
            await disk.flush()
            changes = [request.offset for request in server.requests if request.command == command]
            assert changes == ([0, 512] if command is Command.WRITE else [0])

    asyncio.run(main())


def test_what_was_never_sent_goes_to_the_new_connection(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path) as server, connected(server, reconnect_seconds=5) as disk:
            await server.stop()
            await asyncio.sleep(0.01)
            write = asyncio.create_task(disk.write(0, b"patience"))
            await asyncio.sleep(0.05)
            await server.start()
            await write
            assert server.bytes[:8] == b"patience"

    asyncio.run(main())


def test_a_flush_after_lost_writes_fails_for_good(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path, dies_at(Command.READ)) as server:
            disk = await AsyncNbdDisk.connect(server.uri, reconnect_seconds=5)
            await disk.write(0, b"acknowledged")
            await disk.read(0, 1)  # on the new connection
            assert server.connections == 2
            for _ in range(2):
                with pytest.raises(StorageFailed, match=UNTIL_LOST):
                    await disk.flush()
            with pytest.raises(ReadOnly, match=UNTIL_LOST):
                await disk.write(4096, b"x")
            assert not disk.writable
            assert await disk.read(0, 3) == b"ack"
            with pytest.raises(StorageFailed, match=UNTIL_LOST):
                await disk.close()
            assert Command.FLUSH not in [request.command for request in server.requests]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["flushed", "fua", "nothing", "read only"])
def test_a_flush_when_nothing_was_at_stake_succeeds(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        flags = 0xFFFF if how == "read only" else WRITABLE
        script = dies_at(Command.READ, 1, dies_at(Command.FLUSH) if how == "nothing" else fine)
        async with Scripted(tmp_path, script, flags) as server, connected(server, reconnect_seconds=5) as disk:
            if how in ("flushed", "fua"):
                await disk.write(0, b"safe", fua=how == "fua")
            if how == "flushed":
                await disk.flush()
            await disk.read(0, 1)
            await disk.flush()
            if how != "read only":
                await disk.write(0, b"more")
                await disk.flush()

    asyncio.run(main())


def test_what_counts_as_covered_by_a_flush(tmp_path: Path) -> None:
    """A write that is acknowledged after the flush was sent is not covered by it, even if it was sent first."""
    held: list[bytes] = []

    def answer(server: Scripted, request: RequestHeader, data: bytes) -> bytes | None:
        reply = fine(server, request, data)
        if request.command == Command.WRITE:
            held.append(reply)
            return b""
        if request.command == Command.FLUSH:
            return held.pop() + reply
        return None if server.connections == 1 else reply

    async def main() -> None:
        async with Scripted(tmp_path, answer) as server, connected(server, reconnect_seconds=5) as disk:
            write = asyncio.create_task(disk.write(0, b"x"))
            while not held:
                await asyncio.sleep(0.001)
            await disk.flush()
            await write
            await disk.read(0, 1)
            with pytest.raises(StorageFailed, match=UNTIL_LOST):
                await disk.flush()

    asyncio.run(main())


def test_an_acknowledgement_with_the_last_breath_counts(tmp_path: Path) -> None:
    """The reply and the end of the connection arrive together, before the task that waits for it runs."""

    def answer(server: Scripted, request: RequestHeader, data: bytes) -> bytes | None:
        reply = fine(server, request, data)
        if server.connections == 1:
            server.writers[0].write(reply)
            return None
        return reply

    async def main() -> None:
        async with Scripted(tmp_path, answer) as server, connected(server, reconnect_seconds=5) as disk:
            await disk.write(0, b"x")
            with pytest.raises(StorageFailed, match=UNTIL_LOST):
                await disk.flush()

    asyncio.run(main())


def test_fua_by_a_flush_is_not_true_on_another_connection(tmp_path: Path) -> None:
    async def main() -> None:
        flags = WRITABLE & ~int(TransmissionFlag.SEND_FUA)
        async with Scripted(tmp_path, dies_at(Command.FLUSH), flags) as server, connected(server, reconnect_seconds=5) as disk:
            with pytest.raises(StorageFailed, match=UNTIL_LOST):
                await disk.write(0, b"x", fua=True)
            assert await disk.read(0, 1) == b"x"

    asyncio.run(main())


def test_a_server_that_changed_is_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path, dies_at(Command.READ)) as server, connected(server, reconnect_seconds=5) as disk:
            server.export = replace(server.export, size_bytes=MIB - 512)
            for _ in range(2):
                with pytest.raises(Invalid, match="another export"):
                    await disk.read(0, 1)
            assert server.connections == 2

    asyncio.run(main())


@pytest.mark.parametrize("way", ["gone", "closes at each read"])
def test_reconnecting_has_an_end(tmp_path: Path, way: str) -> None:
    async def main() -> None:
        async with Scripted(tmp_path, dies_at(Command.READ, 10_000)) as server:
            async with connected(server, reconnect_seconds=0.3) as disk:
                if way == "gone":
                    await server.stop()
                    await asyncio.sleep(0.01)
                began = time.monotonic()
                failed = await asyncio.gather(*(disk.read(index, 1) for index in range(5)), return_exceptions=True)
                assert all(isinstance(error, StorageFailed) for error in failed)
                assert 0.2 < time.monotonic() - began < 1
            assert server.connections < 20  # the pauses grow

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(8))
def test_a_flush_that_succeeds_has_kept_everything(tmp_path: Path, seed: int) -> None:
    """The server loses what is not flushed, again and again, while tasks write, flush, read and are cancelled."""
    rng = random.Random(seed)
    durable = bytearray(MIB)
    crashes = 0
    length = 3 * 4096 // 2

    async def answer(server: Scripted, request: RequestHeader, data: bytes, connection: int) -> bytes:
        await asyncio.sleep(rng.random() * 0.001)
        if connection != server.connections:
            return b""  # died with its process
        reply = fine(server, request, data)
        if request.command == Command.FLUSH or request.flags & CommandFlag.FUA:
            durable[:] = server.bytes
        return reply

    def crashing(server: Scripted, request: RequestHeader, data: bytes) -> bytes | Awaitable[bytes] | None:
        nonlocal crashes
        if rng.random() > 0.01:
            return answer(server, request, data, server.connections)
        crashes += 1
        server.bytes[:] = durable
        server.connections += 1
        return None

    async def write(disk: AsyncNbdDisk, region: int, acknowledged: dict[int, int]) -> None:
        for version in range(durable[region * length] + 1, 256):
            fua = rng.random() < 0.1
            await disk.write(region * length, bytes([version]) * length, fua=fua)
            acknowledged[region] = version
            assert not fua or durable[region * length] == version
            if rng.random() < 0.2:
                before = dict(acknowledged)
                await disk.flush()
                for other, least in before.items():
                    assert durable[other * length] >= least

    async def read(disk: AsyncNbdDisk, region: int) -> None:
        while True:
            assert len(await disk.read(region * length, length)) == length

    async def main() -> None:
        async with Scripted(tmp_path, crashing, most_bytes=4096) as server:
            while crashes < 12:
                async with connected(server, reconnect_seconds=5) as disk:
                    acknowledged: dict[int, int] = {}
                    tasks = [asyncio.create_task(write(disk, region, acknowledged)) for region in range(6)]
                    tasks += [asyncio.create_task(read(disk, region)) for region in range(6)]
                    await asyncio.sleep(0.02)
                    for task in tasks:
                        task.cancel()
                    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                        assert outcome is None or isinstance(outcome, StorageFailed | ReadOnly | asyncio.CancelledError), (
                            outcome
                        )

    asyncio.run(main())


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_that_stops_is_waited_for(tmp_path: Path, comes_back: bool) -> None:
    def answer(server: Scripted, request: RequestHeader, data: bytes) -> bytes:
        if server.connections > 1:
            return fine(server, request, data)
        return helpers_nbd.encode_error_chunk(request.cookie, m.NbdErrno.ESHUTDOWN, "bye")

    async def main() -> None:
        async with Scripted(tmp_path, answer) as server, connected(server, reconnect_seconds=0.2) as disk:
            reads = [asyncio.create_task(disk.read(index, 1)) for index in range(5)]
            await asyncio.sleep(0.02)
            if comes_back:
                await server.stop()
                await server.start()
                assert await asyncio.gather(*reads) == [b"\0"] * 5
            else:
                assert all("stopping" in str(error) for error in await asyncio.gather(*reads, return_exceptions=True))
            assert server.connections == 1 + comes_back
            assert len(server.requests) <= 10

    asyncio.run(main())


def test_a_cancelled_task_does_not_end_the_reconnecting_of_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path) as server, connected(server, reconnect_seconds=5) as disk:
            await server.stop()
            await asyncio.sleep(0.01)
            reads = [asyncio.create_task(disk.read(index, 1)) for index in range(10)]
            await asyncio.sleep(0.02)
            for task in reads[::2]:
                task.cancel()
            await server.start()
            assert await asyncio.gather(*reads[1::2]) == [b"\0"] * 5
            assert server.connections == 2

    asyncio.run(main())


def test_a_close_while_nobody_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path) as server:
            disk = await AsyncNbdDisk.connect(server.uri, reconnect_seconds=60)
            await server.stop()
            await asyncio.sleep(0.01)
            task = asyncio.create_task(disk.read(0, 1))
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.wait_for(disk.close(), 1)

    asyncio.run(main())


def test_in_a_forked_child(tmp_path: Path) -> None:
    async def main() -> None:
        async with Scripted(tmp_path) as server, connected(server) as disk:
            await disk.write(0, b"ours")
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    with pytest.raises(Closed, match="process"):
                        disk.read(0, 1).send(None)
                    with pytest.raises(StopIteration):
                        disk.close().send(None)
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
            assert await disk.read(0, 4) == b"ours"

    asyncio.run(main())


# --- TLS, and the servers of others ---


def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    directory = authority.directory("server", "localhost", known_by="server")
    authority.directory("client", "alice")
    uri = f"nbds+unix:///?socket={tmp_path}/sock&tls-certificates={tmp_path}/alice&tls-hostname=localhost"
    data = random.Random(1).randbytes(3 * MIB)

    def served(storage: TinyStorage) -> tuple[Server, threading.Thread]:
        server = Server({"": Export(RawDisk(storage))}, tls=server_context(str(directory)), tls_required=True)
        server.listen_unix(f"{tmp_path}/sock")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        return server, thread

    async def main() -> None:
        storage = TinyStorage(SIZE)
        server, thread = served(storage)
        async with cowfence.aio.open_nbd(uri, reconnect_seconds=5) as disk:
            await exercise(disk)
            await asyncio.gather(*(disk.write(at, data[at : at + 100_000]) for at in range(0, len(data), 100_000)))
            await disk.flush()
            server.stop()
            await asyncio.to_thread(thread.join)
            server, thread = served(storage)
            assert await disk.read(0, len(data)) == data
        with pytest.raises(Unsupported, match="TLS"):
            await AsyncNbdDisk.connect(f"nbd+unix:///?socket={tmp_path}/sock")
        with pytest.raises((ProtocolError, Invalid)):
            await AsyncNbdDisk.connect(uri.replace("tls-hostname=localhost", "tls-hostname=elsewhere"))
        server.stop()
        await asyncio.to_thread(thread.join)

    asyncio.run(main())


@asynccontextmanager
async def foreign(argv: list[str], socket_path: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A server of others; killed at the end."""
    socket_path.unlink(missing_ok=True)
    process = subprocess.Popen([require(argv[0]), *argv[1:]], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while not listens(socket_path):
            assert process.poll() is None
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def nbdkit(path: Path, *arguments: str) -> list[str]:
    return ["nbdkit", "-f", "-U", str(path), *arguments]


def test_nbdkit_killed_and_started_again(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    (tmp_path / "disk").write_bytes(b"d" * SIZE)

    async def main() -> None:
        command = nbdkit(path, "file", str(tmp_path / "disk"))
        async with foreign(command, path):
            disk = await AsyncNbdDisk.connect(f"nbd+unix:///?socket={path}", reconnect_seconds=10)
            await disk.write(0, b"flushed")
            await disk.flush()
        read = asyncio.create_task(disk.read(0, 8))
        await asyncio.sleep(0.05)
        async with foreign(command, path) as process:
            assert await read == b"flushedd"
            await disk.flush()  # nothing was at stake
            await disk.write(0, b"not yet")
            process.kill()
        async with foreign(command, path):
            assert await disk.read(SIZE - 1, 1) == b"d"
            with pytest.raises(StorageFailed, match=UNTIL_LOST):
                await disk.flush()
            with pytest.raises(StorageFailed, match=UNTIL_LOST):
                await disk.close()

    asyncio.run(main())


def test_nbdkit_slow_and_failing(tmp_path: Path) -> None:
    path = tmp_path / "sock"

    async def main() -> None:
        command = nbdkit(path, "--filter=error", "--filter=delay", "memory", str(SIZE), "rdelay=100ms", "error-pwrite=ENOSPC")
        async with (
            foreign([*command, "error-pwrite-rate=1"], path),
            cowfence.aio.open_nbd(f"nbd+unix:///?socket={path}") as disk,
        ):
            began = time.monotonic()
            await asyncio.gather(*(disk.read(4096 * index, 4096) for index in range(16)))
            assert time.monotonic() - began < 0.8  # one after the other: 1.6
            with pytest.raises(cowfence.NoSpace):
                await disk.write(0, b"x")
            await disk.zero(0, 4096)
            await disk.flush()

    asyncio.run(main())


def test_qemu_nbd(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    (tmp_path / "disk").write_bytes(bytes(SIZE))

    async def main() -> None:
        command = ["qemu-nbd", "-f", "raw", "-k", str(path), "-t", "--discard=unmap", str(tmp_path / "disk")]
        async with foreign(command, path) as process:
            async with cowfence.aio.open_nbd(f"nbd+unix:///?socket={path}") as disk:
                await exercise(disk)
            process.send_signal(signal.SIGTERM)

    asyncio.run(main())
    assert (tmp_path / "disk").read_bytes()[100:105] == b"hello"
