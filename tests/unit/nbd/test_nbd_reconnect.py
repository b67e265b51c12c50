"""What a lost connection may cost and what not: every scenario with the client that waits and with that of asyncio."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import pytest

import helpers_nbd
from cowfence.disk.base import Outcome, Request, Verb
from cowfence.errors import Closed, CowfenceError, Invalid, ReadOnly, StorageFailed
from cowfence.nbd import messages as m
from cowfence.nbd.aio import AsyncNbdDisk
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.client_connection import Connection
from cowfence.nbd.messages import BASE_ALLOCATION, Command, CommandFlag, ProtocolError, RequestHeader, TransmissionFlag
from helpers_scripted import MIB, WRITABLE, Answer, Background, Scripted, background, dies_at, fine
from judges import require

UNTIL_LOST = "may be lost"


class Face(Protocol):
    """What both clients can do."""

    @property
    def writable(self) -> bool: ...
    def read(self, offset: int, length_bytes: int) -> bytes: ...
    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None: ...
    def zero(self, offset: int, length_bytes: int) -> None: ...
    def discard(self, offset: int, length_bytes: int) -> None: ...
    def flush(self) -> None: ...
    def submit(self, requests: Sequence[Request]) -> list[Outcome]: ...
    def status(self, context: str, offset: int, length_bytes: int) -> list[tuple[int, int, int]]: ...
    def close(self) -> None: ...


class Waiting:
    """The asyncio client, in the event loop of a thread, as one that waits."""

    def __init__(self, loop: Background, disk: AsyncNbdDisk) -> None:
        self._loop, self._disk = loop, disk

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._disk, name)
        return (lambda *words, **options: self._loop.run(found(*words, **options))) if callable(found) else found

    def status(self, context: str, offset: int, length_bytes: int) -> list[tuple[int, int, int]]:
        async def runs() -> list[tuple[int, int, int]]:
            return [run async for run in self._disk.status(context, offset, length_bytes)]

        return self._loop.run(runs())


class Place:
    """A scripted server and clients of one kind."""

    def __init__(self, folder: Path, loop: Background, kind: str) -> None:
        self.folder, self.loop, self.kind = folder, loop, kind
        self.server: Scripted | None = None

    def serve(self, answer: Answer = fine, flags: int = WRITABLE, **options: int) -> Scripted:
        return self.serve_by(Scripted(self.folder, answer, flags, **options))

    def serve_by(self, server: Scripted) -> Scripted:
        self.server = server
        self.start()
        return server

    def start(self) -> None:
        assert self.server is not None
        self.loop.run(self.server.start())

    def stop(self) -> None:
        """The server goes, and time passes in which the client may notice."""
        if self.server is not None:
            self.loop.run(self.server.stop())
        time.sleep(0.01)

    def connect(self, **options: Any) -> Face:
        assert self.server is not None
        return self.connect_to(self.server.uri, **options)

    def connect_to(self, uri: str, **options: Any) -> Face:
        if self.kind == "waiting":
            return cast("Face", NbdDisk(uri, **options))
        return cast("Face", Waiting(self.loop, self.loop.run(AsyncNbdDisk.connect(uri, **options))))

    @contextmanager
    def connected(self, **options: Any) -> Iterator[Face]:
        """Closed without a word at the end, whatever has happened to it."""
        disk = self.connect(**options)
        try:
            yield disk
        finally:
            with suppress(CowfenceError):
                disk.close()

    def later(self, call: Callable[[], Any]) -> Future[Any]:
        """A call that goes on while the test does something else."""
        pool = ThreadPoolExecutor(1)
        future = pool.submit(call)
        pool.shutdown(wait=False)
        return future


@pytest.fixture(params=["waiting", "asyncio"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with background() as loop:
        found = Place(tmp_path, loop, request.param)
        yield found
        found.stop()


def reads(count: int) -> list[Request]:
    return [Request(Verb.READ, index, 1) for index in range(count)]


# --- what ends a disk ---


@pytest.mark.parametrize("reconnect_seconds", [0, 5])
def test_a_lie_ends_it_for_good(place: Place, reconnect_seconds: float) -> None:
    server = place.serve(lambda *_: b"garbage that is long enough for any header")
    with place.connected(reconnect_seconds=reconnect_seconds) as disk:
        for _ in range(2):
            with pytest.raises(ProtocolError):
                disk.read(0, 1)
    assert server.connections == 1


def test_without_reconnecting_a_lost_connection_ends_it(place: Place) -> None:
    server = place.serve(dies_at(Command.READ))
    disk = place.connect()
    disk.write(0, b"acknowledged")
    for _ in range(2):
        with pytest.raises(StorageFailed, match="closed the connection"):
            disk.read(0, 1)
    with pytest.raises(StorageFailed, match=UNTIL_LOST):
        disk.close()
    assert server.connections == 1


def test_a_server_that_changed_is_another(place: Place) -> None:
    server = place.serve(dies_at(Command.READ))
    with place.connected(reconnect_seconds=5) as disk:
        server.export = replace(server.export, size_bytes=MIB - 512)
        for _ in range(2):
            with pytest.raises(Invalid, match="another export"):
                disk.read(0, 1)
    assert server.connections == 2


def test_less_than_no_patience_is_refused(place: Place) -> None:
    place.serve()
    with pytest.raises(Invalid, match="reconnect_seconds"):
        place.connect(reconnect_seconds=-1)


@pytest.mark.parametrize("way", ["gone", "closes at each read"])
def test_reconnecting_has_an_end(place: Place, way: str) -> None:
    server = place.serve(dies_at(Command.READ, 10_000))
    with place.connected(reconnect_seconds=0.3) as disk:
        if way == "gone":
            place.stop()
        began = time.monotonic()
        assert all(isinstance(outcome, StorageFailed) for outcome in disk.submit(reads(5)))
        assert 0.2 < time.monotonic() - began < 1
    assert server.connections < 20  # the pauses grow


def test_calls_of_several_threads_give_up_together(place: Place) -> None:
    place.serve()
    with place.connected(reconnect_seconds=0.3) as disk:
        place.stop()
        began = time.monotonic()
        calls = [place.later(lambda: disk.read(0, 1)) for _ in range(5)]
        assert all(isinstance(call.exception(5), StorageFailed) for call in calls)
        assert time.monotonic() - began < 0.8


# --- what is done again, and what not ---


def test_reads_and_block_status_are_repeated(place: Place) -> None:
    script = dies_at(Command.READ, 3, dies_at(Command.BLOCK_STATUS, 2))
    server = place.serve(script, most_bytes=65536)
    server.bytes[:] = random.Random(1).randbytes(MIB)
    with place.connected(reconnect_seconds=5) as disk:
        assert disk.read(0, MIB) == server.bytes
        assert list(disk.status(BASE_ALLOCATION, 0, MIB)) == [(0, MIB, 0)]
    assert server.connections == 6


@pytest.mark.parametrize("does_it", [True, False])
@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
def test_changes_are_not_repeated(place: Place, command: Command, does_it: bool) -> None:
    server = place.serve(dies_at(command, does_it=does_it))
    with place.connected(reconnect_seconds=5) as disk:
        change: dict[Command, Callable[[int], None]] = {
            Command.WRITE: lambda at: disk.write(at, b"x" * 512),
            Command.WRITE_ZEROES: lambda at: disk.zero(at, 512),
            Command.TRIM: lambda at: disk.discard(at, 512),
        }
        with pytest.raises(StorageFailed, match="closed the connection"):
            change[command](0)
        disk.read(0, 1)
        # The server may yet do it, so nothing may be written there that it could land upon.
        with pytest.raises(ReadOnly, match="not answered"):
            disk.write(511, b"new")
        disk.write(512, b"elsewhere")
        disk.flush()
    changes = [request.offset for request in server.requests if request.command == command]
    assert changes == ([0, 512] if command is Command.WRITE else [0])


def test_a_message_of_which_a_part_was_sent_counts_as_sent(place: Place) -> None:
    """The server reads a part of the first write; the second one was never begun."""

    class Deaf(Scripted):
        async def receive(self, reader: asyncio.StreamReader, request: RequestHeader) -> bytes:
            if self.connections == 1:
                await reader.readexactly(1000)
                raise asyncio.IncompleteReadError(b"", None)
            return await super().receive(reader, request)

    server = place.serve_by(Deaf(place.folder))
    server.export = replace(server.export, size_bytes=32 * MIB)
    with place.connected(reconnect_seconds=5) as disk:
        first, second, third, fourth = disk.submit(
            [
                Request(Verb.WRITE, 0, 0, b"1" * 8 * MIB),
                Request(Verb.WRITE, MIB, 0, b"2"),
                Request(Verb.READ, 0, 1),
                Request(Verb.WRITE, 8 * MIB, 0, b"4" * 512),
            ]
        )
        assert isinstance(first, StorageFailed)
        assert isinstance(second, ReadOnly)  # over the first
        assert third == b"\0"
        assert fourth is None
        disk.flush()
    assert [request.offset for request in server.requests if request.command == Command.WRITE] == [8 * MIB]


def test_in_one_batch_what_was_answered_stays_answered(place: Place) -> None:
    server = place.serve(dies_at(Command.WRITE, offset=8192))
    server.bytes[:] = random.Random(1).randbytes(MIB)
    with place.connected(reconnect_seconds=5) as disk:
        outcomes = disk.submit(
            [
                Request(Verb.WRITE, 0, 0, b"w" * 512, fua=True),
                Request(Verb.READ, 4096, 512),
                Request(Verb.WRITE, 8192, 0, b"w" * 512),
                Request(Verb.READ, 12288, 512),
                Request(Verb.FLUSH),
                Request(Verb.WRITE, MIB, 0, b"no"),
            ]
        )
        assert outcomes[0] is None
        assert outcomes[1] == server.bytes[4096:4608]
        assert isinstance(outcomes[2], StorageFailed)
        assert outcomes[3] == server.bytes[12288:12800]
        assert outcomes[4] is None  # nothing was at stake
        assert isinstance(outcomes[5], CowfenceError)
    assert server.connections == 2
    asked = [(request.command, request.offset) for request in server.requests]
    assert [asked.count(one) for one in ((Command.WRITE, 0), (Command.READ, 4096), (Command.WRITE, 8192))] == [1, 1, 1]


def test_what_was_never_sent_goes_to_the_new_connection(place: Place) -> None:
    server = place.serve()
    with place.connected(reconnect_seconds=5) as disk:
        place.stop()
        write = place.later(lambda: disk.write(0, b"patience"))
        time.sleep(0.05)
        place.start()
        write.result(5)
        assert server.bytes[:8] == b"patience"
        disk.flush()


def test_nothing_is_sent_to_a_server_that_has_said_goodbye(place: Place) -> None:
    """Over TCP the host would take it, and nobody could tell then whether the server did."""

    class OverTcp(Scripted):
        async def start(self) -> None:
            self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            self.uri = f"nbd://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/"

    server = place.serve_by(OverTcp(place.folder))

    async def say_goodbye() -> None:
        server.writers[0].close()

    with place.connected(reconnect_seconds=5) as disk:
        disk.read(0, 1)
        place.loop.run(say_goodbye())
        time.sleep(0.02)
        disk.write(0, b"x")
        disk.flush()
    assert server.bytes[:1] == b"x"
    assert server.connections == 2


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_that_stops_is_waited_for(place: Place, comes_back: bool) -> None:
    def answer(server: Scripted, request: RequestHeader, data: bytes) -> bytes | Awaitable[bytes] | None:
        if server.connections > 1:
            return fine(server, request, data)
        return helpers_nbd.encode_error_chunk(request.cookie, m.NbdErrno.ESHUTDOWN, "bye")

    server = place.serve(answer)
    with place.connected(reconnect_seconds=0.2) as disk:
        call = place.later(lambda: disk.submit(reads(5)))
        time.sleep(0.02)
        if comes_back:
            place.stop()
            place.start()
            assert call.result(5) == [b"\0"] * 5
        else:
            assert all("stopping" in str(outcome) for outcome in call.result(5))
        assert server.connections == 1 + comes_back
        assert len(server.requests) <= 10


# --- flush ---


def test_a_flush_after_lost_writes_fails_for_good(place: Place) -> None:
    server = place.serve(dies_at(Command.READ))
    disk = place.connect(reconnect_seconds=5)
    disk.write(0, b"acknowledged")
    disk.read(0, 1)  # on the new connection
    assert server.connections == 2
    for _ in range(2):
        with pytest.raises(StorageFailed, match=UNTIL_LOST):
            disk.flush()
    with pytest.raises(ReadOnly, match=UNTIL_LOST):
        disk.write(4096, b"x")
    assert not disk.writable
    assert disk.read(0, 3) == b"ack"
    with pytest.raises(StorageFailed, match=UNTIL_LOST):
        disk.close()
    assert Command.FLUSH not in [request.command for request in server.requests]


@pytest.mark.parametrize("reconnect_seconds", [0, 5])
def test_a_close_says_what_was_lost(place: Place, reconnect_seconds: float) -> None:
    place.serve()
    disk = place.connect(reconnect_seconds=reconnect_seconds)
    disk.write(0, b"acknowledged")
    place.stop()
    with pytest.raises(StorageFailed, match=UNTIL_LOST):
        disk.close()
    disk.close()


@pytest.mark.parametrize("how", ["flushed", "fua", "nothing", "read only"])
def test_a_flush_when_nothing_was_at_stake_succeeds(place: Place, how: str) -> None:
    flags = 0xFFFF if how == "read only" else WRITABLE
    place.serve(dies_at(Command.READ, 1, dies_at(Command.FLUSH) if how == "nothing" else fine), flags)
    with place.connected(reconnect_seconds=5) as disk:
        if how in ("flushed", "fua"):
            disk.write(0, b"safe", fua=how == "fua")
        if how == "flushed":
            disk.flush()
        disk.read(0, 1)
        disk.flush()
        if how != "read only":
            disk.write(0, b"more")
            disk.flush()


def test_what_counts_as_covered_by_a_flush(place: Place) -> None:
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

    place.serve(answer)
    with place.connected(reconnect_seconds=5) as disk:
        assert disk.submit([Request(Verb.WRITE, 0, 0, b"x"), Request(Verb.FLUSH)]) == [None, None]
        disk.read(0, 1)
        with pytest.raises(StorageFailed, match=UNTIL_LOST):
            disk.flush()


def test_an_acknowledgement_with_the_last_breath_counts(place: Place) -> None:
    """The reply and the end of the connection arrive together."""

    def answer(server: Scripted, request: RequestHeader, data: bytes) -> bytes | None:
        reply = fine(server, request, data)
        if server.connections == 1:
            server.writers[0].write(reply)
            return None
        return reply

    place.serve(answer)
    with place.connected(reconnect_seconds=5) as disk:
        disk.write(0, b"x")
        with pytest.raises(StorageFailed, match=UNTIL_LOST):
            disk.flush()


def test_fua_by_a_flush_is_not_true_on_another_connection(place: Place) -> None:
    place.serve(dies_at(Command.FLUSH), WRITABLE & ~int(TransmissionFlag.SEND_FUA))
    with place.connected(reconnect_seconds=5) as disk:
        with pytest.raises(StorageFailed, match=UNTIL_LOST):
            disk.write(0, b"x", fua=True)
        assert disk.read(0, 1) == b"x"


@pytest.mark.parametrize("seed", range(4))
def test_a_flush_that_succeeds_has_kept_everything(place: Place, seed: int) -> None:
    """The server loses what is not flushed, again and again. Each write is of a length of its own, so that one that comes twice
    is seen."""
    rng = random.Random(seed)
    durable = bytearray(MIB)
    lengths = iter(range(1, 4096))
    crashes = 0

    def crashing(server: Scripted, request: RequestHeader, data: bytes) -> bytes | Awaitable[bytes] | None:
        nonlocal crashes
        if rng.random() < 0.03:
            crashes += 1
            if rng.random() < 0.5:
                fine(server, request, data)
            server.bytes[:] = durable
            return None
        reply = fine(server, request, data)
        if request.command == Command.FLUSH or request.flags & CommandFlag.FUA:
            durable[:] = server.bytes
        return reply

    server = place.serve(crashing)
    while crashes < 10:
        with place.connected(reconnect_seconds=5) as disk:
            acknowledged: dict[int, int] = {}
            for version in range(1, 12):
                offsets = [4096 * region for region in rng.sample(range(16), 4)]
                contents = [bytes([version]) * next(lengths) for _ in offsets]
                batch = [
                    Request(Verb.WRITE, offset, 0, content, fua=rng.random() < 0.3)
                    for offset, content in zip(offsets, contents, strict=True)
                ]
                read, *outcomes = disk.submit([Request(Verb.READ, MIB - 1, 1), *batch])
                assert read == b"\0"
                for request, outcome in zip(batch, outcomes, strict=True):
                    if outcome is None:
                        acknowledged[request.offset] = version
                        assert not request.fua or durable[request.offset] == version
                    else:
                        assert isinstance(outcome, StorageFailed | ReadOnly)
                        acknowledged.pop(request.offset, None)
                with suppress(StorageFailed):
                    disk.flush()
                    assert all(durable[offset] == version for offset, version in acknowledged.items())
    writes = [request.length_bytes for request in server.requests if request.command == Command.WRITE]
    assert len(writes) == len(set(writes))


# --- the servers of others ---


@contextmanager
def nbdkit(place: Place, image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Killed at the end."""
    path = place.folder / "sock"
    path.unlink(missing_ok=True)
    process = subprocess.Popen([require("nbdkit"), "-f", "-U", str(path), "file", str(image)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while not listens(path):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_nbdkit_killed_and_started_again(place: Place) -> None:
    image = place.folder / "disk"
    image.write_bytes(b"d" * MIB)
    with nbdkit(place, image):
        disk = place.connect_to(f"nbd+unix:///?socket={place.folder}/sock", reconnect_seconds=10)
        disk.write(0, b"flushed")
        disk.flush()
    read = place.later(lambda: disk.read(0, 8))
    time.sleep(0.05)
    with nbdkit(place, image) as process:
        assert read.result(10) == b"flushedd"
        disk.flush()  # nothing was at stake
        disk.write(0, b"not yet")
        process.kill()
    with nbdkit(place, image):
        assert disk.read(MIB - 1, 1) == b"d"
        with pytest.raises(StorageFailed, match=UNTIL_LOST):
            disk.flush()
        with pytest.raises(StorageFailed, match=UNTIL_LOST):
            disk.close()


# --- the client that waits, alone ---


@pytest.mark.parametrize("reconnect_seconds", [0, 5])
def test_an_interrupted_call_closes_the_disk(tmp_path: Path, reconnect_seconds: float) -> None:
    def interrupt(_server: Scripted, _request: RequestHeader, _data: bytes) -> bytes:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return b""

    with background() as loop:
        server = Scripted(tmp_path, interrupt)
        loop.run(server.start())
        disk = NbdDisk(server.uri, reconnect_seconds=reconnect_seconds)
        with pytest.raises(KeyboardInterrupt):
            disk.read(0, 1)
        with pytest.raises(Closed, match="interrupted"):
            disk.read(0, 1)
        disk.close()
        assert [request.command for request in server.requests] == [Command.READ]
        loop.run(server.stop())


def test_replies_that_came_before_a_message_could_not_be_sent_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers the first write and goes, while the second is about to be sent."""
    send, calls = Connection._send, iter(range(3))

    def too_late(connection: Connection) -> int:
        if next(calls) == 1:
            time.sleep(0.05)
            raise BrokenPipeError
        return send(connection)

    def last_words(server: Scripted, request: RequestHeader, data: bytes) -> None:
        server.writers[0].write(fine(server, request, data))

    with background() as loop:
        server = Scripted(tmp_path, last_words)
        loop.run(server.start())
        disk = NbdDisk(server.uri)
        monkeypatch.setattr("cowfence.nbd.client_connection._VECTOR_MAX", 2)
        monkeypatch.setattr(Connection, "_send", too_late)
        first, second = disk.submit([Request(Verb.WRITE, 0, 0, b"1"), Request(Verb.WRITE, 4096, 0, b"2")])
        assert first is None
        assert isinstance(second, StorageFailed | ReadOnly)
        with pytest.raises(StorageFailed, match=UNTIL_LOST):
            disk.close()
        loop.run(server.stop())


def test_a_message_that_went_out_before_words_of_tls_has_begun(tmp_path: Path) -> None:
    """What TLS says for itself stands behind it in the same call; the message must not be sent again."""
    with background() as loop:
        server = Scripted(tmp_path)
        loop.run(server.start())
        disk = NbdDisk(server.uri)
        connection = disk._connection
        connection._outgoing.extend([(0, memoryview(b"")), (1, memoryview(b"")), (-1, memoryview(bytes(4)))])
        assert connection._send() == 2
        connection.close()
        loop.run(server.stop())


def test_an_interrupted_search_for_a_server_may_go_on(tmp_path: Path) -> None:
    with background() as loop:
        server = Scripted(tmp_path)
        loop.run(server.start())
        disk = NbdDisk(server.uri, reconnect_seconds=5)
        loop.run(server.stop())
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            disk.write(0, b"x")
        timer.join()
        loop.run(server.start())
        disk.write(0, b"x")
        disk.close()
        assert server.bytes[:1] == b"x"
        loop.run(server.stop())


def test_a_close_while_nobody_is_there_looks_for_nobody(place: Place) -> None:
    place.serve()
    disk = place.connect(reconnect_seconds=60)
    place.stop()
    began = time.monotonic()
    disk.close()
    assert time.monotonic() - began < 1
