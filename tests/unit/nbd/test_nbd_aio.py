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
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

import cowfence.aio
import helpers_nbd
from cowfence.disk.base import Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import Closed, CowfenceError, Invalid, ReadOnly, StorageFailed, Unsupported
from cowfence.nbd.aio import AsyncNbdDisk
from cowfence.nbd.export import Export
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import BASE_ALLOCATION, Command, CommandFlag, ProtocolError, RequestHeader, TransmissionFlag
from cowfence.nbd.server import Server
from cowfence.nbd.tls import server_context
from helpers_aio import SIZE, exercise
from helpers_scripted import Scripted, fine
from helpers_storage import TinyStorage
from helpers_tls import Authority
from judges import require

MIB = 1 << 20
UNTIL_LOST = "may be lost"


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
