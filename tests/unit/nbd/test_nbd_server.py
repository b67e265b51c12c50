"""The server over real sockets: many clients, hostile clients, slow disks, limits, and a clean stop."""

from __future__ import annotations

import os
import random
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cowfence.disk.base import Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import Invalid, Locked, NoSpace, OutOfRange, ReadOnly, StorageFailed, Unsupported
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.connection import Connection, Pace
from cowfence.nbd.export import Export
from cowfence.nbd.messages import Command, CommandFlag, NbdErrno
from cowfence.nbd.server import Limits, Server
from cowfence.storage.base import Buffer
from cowfence.units import MIB
from helpers_nbd import BareClient, eventually, serving
from helpers_storage import TinyStorage

SIZE = 4 * MIB


@pytest.fixture
def storage() -> TinyStorage:
    return TinyStorage(SIZE)


@pytest.fixture
def server(tmp_path: Path, storage: TinyStorage) -> Iterator[Server]:
    disk = RawDisk(storage)
    exports = {"": Export(disk, description="a disk"), "ro": Export(disk, read_only=True)}
    with serving(tmp_path, exports, Limits(stop_seconds=1)) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[NbdDisk]:
    with NbdDisk(server.uri()) as disk:
        yield disk


def test_a_disk_through_the_wire(client: NbdDisk, storage: TinyStorage) -> None:
    assert (client.size, client.writable, client.block_bytes) == (SIZE, True, 4096)
    data = random.Random(1).randbytes(3 * MIB + 5)
    client.write(7, data)
    assert client.read(7, len(data)) == data
    buffer = bytearray(10)
    client.read_into(7, buffer)
    assert buffer == data[:10]
    client.zero(1024, 1024)
    client.zero(4096, 512, unmap=False)
    client.discard(8192, 512)
    client.write(0, b"x", fua=True)
    assert storage.fences == 1
    client.flush()
    assert storage.fences == 1
    assert client.read(1024, 1024) == bytes(1024)
    first, second, *_ = client.extents(0, SIZE)
    assert (first.length_bytes, first.data, first.present) == (1024, True, True)
    assert (second.length_bytes, second.zero, second.present) == (1024, True, False)


def test_errors_come_back_as_what_they_were(server: Server, client: NbdDisk, storage: TinyStorage) -> None:
    with pytest.raises(OutOfRange):
        client.read(SIZE, 1)
    storage.failing["writev"] = NoSpace("the host is full")
    with pytest.raises(NoSpace, match="the host is full"):
        client.write(0, b"x")
    storage.failing["readv"] = StorageFailed("tiny", "read", 0, OSError(5, "bad sector"))
    with pytest.raises(StorageFailed, match="bad sector"):
        client.read(0, 1)
    storage.failing.clear()
    with NbdDisk(server.uri("ro")) as read_only:
        with pytest.raises(ReadOnly):
            read_only.write(0, b"x")
        read_only.flush()
    with pytest.raises(Unsupported, match="no such export"):
        NbdDisk(server.uri("nowhere"))


def test_one_batch_of_all_kinds(client: NbdDisk) -> None:
    requests = [Request(Verb.WRITE, index * 1000, 1000, bytes((index,)) * 1000) for index in range(200)]
    assert client.submit(requests) == [None] * 200
    requests = [Request(Verb.READ, index * 1000, 1000) for index in range(200)] + [
        Request(Verb.READ, SIZE, 1),
        Request(Verb.FLUSH),
    ]
    outcomes = client.submit(requests)
    assert outcomes[:200] == [bytes((index,)) * 1000 for index in range(200)]
    assert isinstance(outcomes[200], OutOfRange)
    assert outcomes[201] is None


def test_cache_and_fast_zero(server: Server, tmp_path: Path) -> None:
    with BareClient(tmp_path / "sock") as bare:
        assert bare.ask(Command.CACHE, offset=1, length=3 * MIB) == (1, 0, b"")
        assert bare.ask(Command.WRITE_ZEROES, offset=0, length=4096, flags=CommandFlag.FAST_ZERO) == (1, 0, b"")
        assert bare.ask(Command.WRITE_ZEROES, offset=1, length=4096, flags=CommandFlag.FAST_ZERO)[1] == NbdErrno.ENOTSUP
        bare.disconnect()
    assert server.uri().startswith("nbd+unix://")


def test_what_is_flushed_by_one_client_was_written_by_another(server: Server, storage: TinyStorage) -> None:
    with NbdDisk(server.uri()) as one, NbdDisk(server.uri()) as other:
        one.write(0, b"x")
        other.flush()
        assert storage.fences == 1


@pytest.mark.usefixtures("server")
def test_who_comes_again_is_not_overtaken_by_what_it_had_asked_for(tmp_path: Path, storage: TinyStorage) -> None:
    """A write that waits for the host when its client goes is done before anything of those that come after; who was there
    already does not wait."""
    gate, arrived = threading.Event(), threading.Event()
    writev = storage.writev

    def waits(offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if not arrived.is_set():
            arrived.set()
            gate.wait(10)
        writev(offset, buffers, mark)

    with BareClient(tmp_path / "sock") as other:
        with BareClient(tmp_path / "sock") as gone:
            storage.writev = waits  # type: ignore[method-assign]
            gone.send(Command.WRITE, length=4, flags=CommandFlag.FUA, data=b"past")
            assert arrived.wait(10)
        for _ in range(2):  # the first may be answered in the round in which the server hears that the other one is gone
            assert other.ask(Command.READ, offset=8, length=1) == (1, 0, b"\0")
        with BareClient(tmp_path / "sock") as again:
            again.send(Command.WRITE, length=4, data=b"next")
            again.sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                again.reply()
            again.sock.settimeout(10)
            gate.set()
            assert again.reply() == (1, 0, b"")
            assert again.ask(Command.READ, length=4) == (1, 0, b"next")
        assert storage.bytes[:4] == b"next"


def test_which_fences_are_waited_for_in_the_loop() -> None:
    """Not before some were quick, nor while one that was slow is remembered; longer ones where nobody else would wait."""
    pace = Pace()
    assert not pace.quick(alone=True)
    for _ in range(40):
        pace.note(0.0001)
    assert pace.quick(alone=False)
    pace.note(0.1)
    assert not pace.quick(alone=True)
    for _ in range(80):
        pace.note(0.0005)
    assert pace.quick(alone=True)
    assert not pace.quick(alone=False)


@pytest.mark.usefixtures("server")
def test_a_slow_disk_holds_back_only_who_waits_for_it(tmp_path: Path, storage: TinyStorage) -> None:
    with BareClient(tmp_path / "sock") as slow, BareClient(tmp_path / "sock") as quick:
        slow.send(Command.WRITE, length=4, data=b"data")
        assert slow.reply() == (1, 0, b"")
        gate = threading.Event()
        fence = storage.fence

        def waits(mark: str) -> None:
            gate.wait(10)
            fence(mark)

        storage.fence = waits  # type: ignore[method-assign]
        slow.send(Command.FLUSH, cookie=2)
        slow.send(Command.READ, cookie=3, length=4)
        assert slow.reply() == (3, 0, b"data")
        assert quick.ask(Command.READ, length=4) == (1, 0, b"data")
        gate.set()
        assert slow.reply() == (2, 0, b"")


@pytest.mark.usefixtures("server")
def test_data_of_waiting_writes_is_not_overwritten_by_what_comes_next(tmp_path: Path, storage: TinyStorage) -> None:
    with BareClient(tmp_path / "sock") as bare:
        stream = b""
        for index in range(300):
            data = bytes((index % 251,)) * 4096
            bare.send(Command.WRITE, cookie=index, offset=index * 4096, length=4096, flags=CommandFlag.FUA, data=data)
            stream += data
        assert sorted(bare.reply() for _ in range(300)) == [(index, 0, b"") for index in range(300)]
    assert storage.bytes[: 300 * 4096] == stream


def test_quick_flushes_stay_in_the_loop(client: NbdDisk, storage: TinyStorage) -> None:
    for count in range(60):
        client.write(count, b"x", fua=bool(count % 2))
        client.flush()
    assert storage.fences == 60


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, os.urandom(10_000)])
def test_garbage_costs_its_own_connection_only(tmp_path: Path, client: NbdDisk, data: bytes) -> None:
    for negotiate in (False, True):
        with BareClient(tmp_path / "sock", negotiate=negotiate) as bare:
            bare.receive(0 if negotiate else 18)
            bare.sock.sendall(data)
            assert bare.closed_by_server()
    assert client.read(0, 1) == b"\0"


@pytest.mark.usefixtures("server")
def test_an_oversize_write_is_refused_and_an_absurd_one_closes(tmp_path: Path) -> None:
    with BareClient(tmp_path / "sock") as bare:
        size = 33 * MIB
        bare.send(Command.WRITE, length=size)
        for _ in range(33):
            bare.sock.sendall(bytes(MIB))
        assert bare.reply()[1] == NbdErrno.EINVAL
        assert bare.ask(Command.READ, length=1) == (1, 0, b"\0")
        bare.send(Command.WRITE, length=0xFFFF_FFFF)
        assert bare.closed_by_server()


def test_disconnects_in_the_middle_of_everything(tmp_path: Path, client: NbdDisk, storage: TinyStorage) -> None:
    for count in (0, 5, 18):
        with BareClient(tmp_path / "sock", negotiate=False) as bare:
            bare.receive(count)
            bare.sock.sendall(b"\0\0\0\3IHAVE"[:count])
    for stream in (b"\x25", b"\x25\x60\x95\x13" + bytes(10)):
        with BareClient(tmp_path / "sock") as bare:
            bare.sock.sendall(stream)
    with BareClient(tmp_path / "sock") as bare:
        bare.send(Command.WRITE, length=1000, data=b"half of it")
    gate = storage.gate = threading.Event()
    with BareClient(tmp_path / "sock") as bare:
        bare.send(Command.WRITE, length=4, data=b"gone", flags=CommandFlag.FUA)
    gate.set()
    assert client.read(500, 10) == bytes(10)


@pytest.mark.usefixtures("server")
def test_a_client_that_reads_nothing_fills_only_its_own_limit(tmp_path: Path, storage: TinyStorage, client: NbdDisk) -> None:
    storage.bytes[:] = b"x" * SIZE
    with BareClient(tmp_path / "sock") as bare:
        bare.sock.setblocking(False)
        request = b"".join(
            bytes.fromhex("25609513 0000 0000") + cookie.to_bytes(8, "big") + bytes(8) + (4 * MIB).to_bytes(4, "big")
            for cookie in range(10_000)
        )
        with suppress(BlockingIOError):
            while True:
                bare.sock.send(request)
        assert client.read(0, 1) == b"x"
        # It may still take its replies later.
        bare.sock.settimeout(10)
        for cookie in range(20):
            assert bare.reply() == (cookie, 0, b"x" * (4 * MIB))


def test_goodbye_after_the_last_reply(tmp_path: Path, storage: TinyStorage, server: Server) -> None:
    storage.gate = threading.Event()
    with BareClient(tmp_path / "sock") as bare:
        bare.send(Command.WRITE, length=4, data=b"last", flags=CommandFlag.FUA)
        bare.send(Command.DISC)
        storage.gate.set()
        assert bare.reply() == (1, 0, b"")
        assert bare.closed_by_server()
    assert storage.bytes[:4] == b"last"
    assert server.uri()


def test_connections_are_limited_and_idle_ones_are_closed(tmp_path: Path, storage: TinyStorage) -> None:
    limits = Limits(connections=5, handshake_seconds=0.2)
    with serving(tmp_path, {"": Export(RawDisk(storage))}, limits) as server:
        idle = [BareClient(tmp_path / "sock", negotiate=False) for _ in range(20)]
        with NbdDisk(server.uri()) as disk:  # its turn comes when the idle ones have been closed
            assert disk.read(0, 1) == b"\0"
            assert all(bare.receive(18) and bare.closed_by_server() for bare in idle)
            time.sleep(0.3)
            assert disk.read(0, 1) == b"\0"  # a finished handshake has no time limit


def test_two_hundred_connections(tmp_path: Path, storage: TinyStorage) -> None:
    with serving(tmp_path, {"": Export(RawDisk(storage))}, Limits(connections=250)):
        clients = [BareClient(tmp_path / "sock") for _ in range(200)]
        for number, bare in enumerate(clients):
            bare.send(Command.WRITE, offset=number, length=1, data=bytes((number,)))
        assert all(bare.reply() == (1, 0, b"") for bare in clients)
        for bare in clients:
            bare.disconnect()
    assert storage.bytes[:200] == bytes(range(200))


def test_a_defect_of_a_disk_costs_one_request(tmp_path: Path, storage: TinyStorage) -> None:
    disk = RawDisk(storage)
    with serving(tmp_path, {"": Export(disk)}), BareClient(tmp_path / "sock") as bare:
        storage.readv = None  # type: ignore[assignment,method-assign]
        cookie, error, _ = bare.ask(Command.READ, length=1)
        assert (cookie, error) == (1, NbdErrno.EIO)
        assert bare.ask(Command.CACHE, length=1)[1] == NbdErrno.EIO
        del storage.readv
        assert bare.ask(Command.READ, length=1) == (1, 0, b"\0")


# --- listening and stopping ---


def test_stop_finishes_what_is_under_way(tmp_path: Path, storage: TinyStorage) -> None:
    gate = storage.gate = threading.Event()
    with serving(tmp_path, {"": Export(RawDisk(storage))}) as server, BareClient(tmp_path / "sock") as bare:
        bare.send(Command.WRITE, length=4, data=b"last", flags=CommandFlag.FUA)
        time.sleep(0.05)
        server.stop()
        time.sleep(0.05)
        assert not (tmp_path / "sock").exists()
        gate.set()
        assert bare.reply() == (1, 0, b"")
        assert bare.closed_by_server()
    assert storage.bytes[:4] == b"last"
    assert storage.fences == 1


def test_stop_does_not_wait_for_ever_for_a_client_that_reads_nothing(tmp_path: Path, storage: TinyStorage) -> None:
    limits = Limits(stop_seconds=0.2)
    with serving(tmp_path, {"": Export(RawDisk(storage))}, limits) as server, BareClient(tmp_path / "sock") as bare:
        for cookie in range(10):
            bare.send(Command.READ, cookie=cookie, length=SIZE)
        time.sleep(0.05)
        began = time.monotonic()
        server.stop()
        eventually(lambda: server._closed, "the server waits for a client that is gone")
        assert time.monotonic() - began < 5


def test_stop_waits_for_the_disk_however_long_it_takes(tmp_path: Path, storage: TinyStorage) -> None:
    gate = storage.gate = threading.Event()
    with serving(tmp_path, {"": Export(RawDisk(storage))}, Limits(stop_seconds=0.1)) as server:
        with BareClient(tmp_path / "sock") as bare:
            bare.send(Command.WRITE, length=4, data=b"last", flags=CommandFlag.FUA)
            time.sleep(0.05)
            server.stop()
            assert bare.closed_by_server()
        assert not server._closed
        gate.set()
        eventually(lambda: server._closed, "the server does not end")
    assert storage.fences == 1


def test_cold_reads_are_answered_by_the_pool(client: NbdDisk, storage: TinyStorage) -> None:
    data = random.Random(3).randbytes(SIZE)
    client.write(0, data)
    storage.cold = True
    outcomes = client.submit([Request(Verb.READ, offset, 4096) for offset in range(0, SIZE, 4096)])
    assert b"".join(bytes(outcome) for outcome in outcomes if isinstance(outcome, bytearray)) == data


def test_stop_before_serving() -> None:
    server = Server({})
    server.listen_tcp()
    server.stop()
    server.serve_forever()


def test_tcp(storage: TinyStorage) -> None:
    server = Server({"my disk": Export(RawDisk(storage))})
    host, port = server.listen_tcp()
    assert host == "127.0.0.1"
    assert server.uri("my disk") == f"nbd://127.0.0.1:{port}/my%20disk"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with NbdDisk(server.uri("my disk")) as disk:
        disk.write(5, b"over TCP")
        assert disk.read(5, 8) == b"over TCP"
    server.stop()
    thread.join()


def test_socket_files(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    server = Server({})
    assert server.listen_unix(path) == path  # nobody listened there
    with pytest.raises(Locked):
        Server({}).listen_unix(path)
    server.stop()
    server.serve_forever()
    assert not os.path.exists(path)
    (tmp_path / "sock").write_text("precious")
    with pytest.raises(StorageFailed):
        Server({}).listen_unix(path)
    assert (tmp_path / "sock").read_text() == "precious"
    with pytest.raises(StorageFailed):
        Server({}).listen_unix(str(tmp_path / "nowhere" / "sock"))


def test_a_socket_file_that_another_server_took_over_is_left(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    server, other = Server({}), Server({})
    server.listen_unix(path)
    os.unlink(path)
    other.listen_unix(path)
    server.stop()
    server.serve_forever()
    assert os.path.exists(path)
    other.stop()
    other.serve_forever()


def test_no_address_no_uri() -> None:
    server = Server({})
    with pytest.raises(Invalid):
        server.uri()
    server.stop()
    server.serve_forever()


def test_a_socket_made_elsewhere(tmp_path: Path, storage: TinyStorage) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()
    server = Server({"": Export(RawDisk(storage))})
    server.listen_on(listener)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with NbdDisk(server.uri()) as disk:
        assert disk.read(0, 1) == b"\0"
    server.stop()
    thread.join()
    assert (tmp_path / "sock").exists()  # whoever made it removes it


@pytest.mark.parametrize("drained", [True, False])
def test_it_ends_although_the_last_connection_never_used_an_export(tmp_path: Path, storage: TinyStorage, drained: bool) -> None:
    """Somebody who only looked, or whose handshake took too long."""
    limits = Limits(handshake_seconds=0.3)
    server = Server({"": Export(RawDisk(storage))}, limits=limits, until_unused=not drained)
    server.listen_unix(str(tmp_path / "sock"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with NbdDisk(server.uri()) as disk, BareClient(tmp_path / "sock", negotiate=False) as bare:
        assert bare.receive(18)
        assert disk.read(0, 1) == b"\0"
        disk.close()
        if drained:
            server.call(server.drain)
        thread.join(10)
    assert not thread.is_alive()


def test_who_takes_no_replies_is_idle(tmp_path: Path, storage: TinyStorage) -> None:
    limits = Limits(connections=1, idle_seconds=0.3)
    with serving(tmp_path, {"": Export(RawDisk(storage))}, limits) as server, BareClient(tmp_path / "sock") as bare:
        for cookie in range(4):
            bare.send(Command.READ, cookie=cookie, length=SIZE, flags=CommandFlag.DF)
        with NbdDisk(server.uri()) as disk:  # its turn comes when the other was sent away
            assert disk.read(0, 1) == b"\0"


def test_who_takes_its_replies_slowly_is_not_idle(tmp_path: Path, storage: TinyStorage) -> None:
    limits = Limits(idle_seconds=0.5)
    with serving(tmp_path, {"": Export(RawDisk(storage))}, limits), BareClient(tmp_path / "sock") as bare:
        bare.send(Command.READ, length=SIZE, flags=CommandFlag.DF)
        for _ in range(8):
            time.sleep(0.15)
            assert len(bare.receive(SIZE // 8)) == SIZE // 8


def test_nothing_is_kept_of_exports_that_nobody_uses(tmp_path: Path) -> None:
    """Backups come and go for as long as a server lives."""
    exports: dict[str, Export] = {}
    before = threading.active_count()
    with serving(tmp_path, exports) as server:
        for number in range(5):
            exports[str(number)] = Export(RawDisk(TinyStorage(SIZE)))
            with NbdDisk(server.uri(str(number))) as disk:
                disk.write(0, b"x", fua=True)
                assert list(disk.extents(0, SIZE))
            eventually(lambda: not server._pools, "a pool is kept")
            del exports[str(number)]
        # In mid-request, too.
        storage = TinyStorage(SIZE)
        storage.gate = threading.Event()
        exports["slow"] = Export(RawDisk(storage))
        bare = BareClient(tmp_path / "sock", "slow")
        bare.send(Command.WRITE, length=4, data=b"late", flags=CommandFlag.FUA)
        eventually(lambda: bool(server._pools), "nothing was begun")
        bare.sock.close()
        storage.gate.set()
        eventually(lambda: not server._pools, "a pool is kept")
        eventually(lambda: threading.active_count() == before + 1, "a thread is kept")


class _OneRound:
    """An epoll with one round that has what a test wants, in that order: it comes once all of it is there."""

    def __init__(self, inner: select.epoll) -> None:
        self.inner = inner
        self.wanted: list[int] = []
        self.going_on = False
        """That round is."""

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        self.going_on = False
        events = self.inner.poll(timeout)
        found = dict(events)
        if not self.wanted:
            return events
        if not all(fd in found for fd in self.wanted):
            time.sleep(0.005)
            return []
        order, self.wanted, self.going_on = self.wanted, [], True
        return [(fd, found[fd]) for fd in order]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_new_connection_does_not_get_the_event_of_one_whose_number_it_has(
    tmp_path: Path, storage: TinyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round of the loop the old one is closed and the new one comes; only then the old one's event has its turn."""
    server = Server({"": Export(RawDisk(storage))})
    server.listen_unix(str(tmp_path / "sock"))
    rounds = _OneRound(server._epoll)
    monkeypatch.setattr(server, "_epoll", rounds)
    misled: list[Connection] = []
    true_ready = server._on_ready

    def on_ready(connection: Connection, events: int) -> None:
        if rounds.going_on:
            misled.append(connection)
        true_ready(connection, events)

    monkeypatch.setattr(server, "_on_ready", on_ready)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with BareClient(tmp_path / "sock", negotiate=False) as bare:
            bare.receive(16)
            let_in = threading.Event()
            server.call(let_in.set)
            assert let_in.wait(10)  # and nobody else is, before the round that is wanted
            (old,) = server._connections.values()
            rounds.wanted = [server._bell.fd, server._entrance._listeners[0].sock.fileno(), old.fd]
            bare.sock.sendall(b"x")
            server.call(lambda: server._drop(old))
            with NbdDisk(server.uri()) as disk:
                disk.write(0, b"here")
                (new,) = server._connections.values()
                assert new.fd == old.fd
    finally:
        server.stop()
        thread.join(20)
    assert not misled


def test_who_came_when_there_were_no_descriptors_gets_in_though_no_client_leaves(
    server: Server, client: NbdDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client that is there may stay for months."""
    monkeypatch.setattr("cowfence.nbd.server._ACCEPT_AGAIN_SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(5)
        os.close(free := os.dup(late.fileno()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            late.connect(server.uri().partition("socket=")[2])
            assert not select.select([late], [], [], 0.1)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert late.recv(8) == b"NBDMAGIC"
    assert client.read(0, 4) == bytes(4)
