"""Long writes, which a thread carries out while the loop receives more: nothing of them is lost, torn or taken for another."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

import cowfence
from cowfence.disk.base import Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import NoSpace
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.export import Export
from cowfence.nbd.messages import Command, CommandFlag, NbdErrno
from cowfence.nbd.server import Server
from cowfence.storage.base import Buffer
from cowfence.units import KIB, MIB
from helpers_nbd import BareClient, eventually, serving
from helpers_storage import TinyStorage
from judges import run

SIZE = 32 * MIB


class SlowStorage(TinyStorage):
    """Long writes take a while, and what they are given is looked at late. ``threads``: who carried them out."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.threads: set[str] = set()
        self.seconds = 0.002
        self.failing_at: int | None = None

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if sum(map(len, buffers)) >= 256 * KIB:
            self.threads.add(threading.current_thread().name)
            time.sleep(self.seconds)
            if offset == self.failing_at:
                raise NoSpace("the host is full")
        super().writev(offset, buffers, mark)


@pytest.fixture
def storage() -> SlowStorage:
    return SlowStorage()


@pytest.fixture
def server(tmp_path: Path, storage: SlowStorage) -> Iterator[Server]:
    with serving(tmp_path, {"": Export(RawDisk(storage))}) as server:
        yield server


def test_everything_arrives_where_it_belongs(server: Server, storage: SlowStorage) -> None:
    """Long and short ones, reads and flushed ones in between; their buffers go round meanwhile."""
    rng = random.Random(5)
    model = bytearray(SIZE)
    with NbdDisk(server.uri()) as disk:
        for _ in range(6):
            # What is under way at the same time does not overlap: it may take effect in any order.
            edges = sorted(rng.sample(range(0, SIZE, 512), 24))
            requests: list[Request] = []
            wanted: list[bytes | None] = []
            for start, end in pairwise(edges):
                length_bytes = min(end - start, 3 * MIB)
                if rng.random() < 0.2:
                    requests.append(Request(Verb.READ, start, length_bytes))
                    wanted.append(bytes(model[start : start + length_bytes]))
                else:
                    data = rng.randbytes(length_bytes)
                    requests.append(Request(Verb.WRITE, start, length_bytes, data, fua=rng.random() < 0.1))
                    wanted.append(None)
            outcomes = disk.submit(requests)
            assert [outcome if outcome is None else bytes(outcome) for outcome in outcomes] == wanted  # type: ignore[arg-type]
            for request in requests:
                if request.verb is Verb.WRITE:
                    model[request.offset : request.offset + request.length_bytes] = request.data
        assert disk.read(0, SIZE // 2) == model[: SIZE // 2]
    assert storage.bytes == model
    assert any(name.startswith("nbd-") for name in storage.threads)


def _sending(client: BareClient, count: int, fill: bytes) -> threading.Thread:
    """A thread that sends so many writes of a MiB, without waiting for replies."""

    def send() -> None:
        for number in range(count):
            client.send(Command.WRITE, number, offset=number * MIB, length=MIB, data=fill * MIB)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.usefixtures("server")
def test_others_are_served_meanwhile(storage: SlowStorage, tmp_path: Path) -> None:
    storage.seconds = 0.3
    storage.bytes[-512:] = b"y" * 512
    with BareClient(tmp_path / "sock") as long, BareClient(tmp_path / "sock") as short:
        sender = _sending(long, 4, b"x")
        eventually(lambda: bool(storage.threads), "nothing was begun")
        began = time.monotonic()
        for _ in range(10):
            assert short.ask(Command.READ, offset=SIZE - 512, length=512) == (1, 0, b"y" * 512)
        assert time.monotonic() - began < 0.25
        sender.join()
        assert sorted(long.reply()[0] for _ in range(4)) == [0, 1, 2, 3]
    assert bytes(storage.bytes[: 4 * MIB]) == b"x" * 4 * MIB


def test_who_sends_many_does_not_fill_the_queue(server: Server, storage: SlowStorage, tmp_path: Path) -> None:
    """Another client's long write waits for a few of them, not for all that a client may have under way."""
    storage.seconds = 0.05
    done: list[float] = []
    with BareClient(tmp_path / "sock") as greedy, BareClient(tmp_path / "sock") as other:
        sender = _sending(greedy, 30, b"g")
        eventually(lambda: len(storage.marks) > 2, "nothing was begun")
        began = time.monotonic()
        other.send(Command.WRITE, offset=31 * MIB, length=MIB, data=b"o" * MIB)
        assert other.reply()[1] == 0
        done.append(time.monotonic() - began)
        assert all(connection.lent <= 9 for connection in server._connections.values())
        assert sorted(greedy.reply()[0] for _ in range(30)) == list(range(30))
        sender.join()
        eventually(lambda: all(not connection.lent for connection in server._connections.values()), "some are still lent")
    assert done[0] < 12 * 0.05 + 0.3


@pytest.mark.usefixtures("server")
def test_one_that_is_alone_stays_in_the_loop(storage: SlowStorage, tmp_path: Path) -> None:
    """Its client waits for it: handing it over would only add to that."""
    with BareClient(tmp_path / "sock") as bare:
        for _ in range(3):
            bare.send(Command.WRITE, length=MIB, data=b"z" * MIB)
            assert bare.reply() == (1, 0, b"")
    assert not any(name.startswith("nbd-") for name in storage.threads)


@pytest.mark.usefixtures("server")
def test_one_that_fails_fails_alone(storage: SlowStorage, tmp_path: Path) -> None:
    storage.failing_at = 2 * MIB
    with BareClient(tmp_path / "sock") as bare:
        for number in range(5):
            bare.send(Command.WRITE, number, offset=number * MIB, length=MIB, data=b"w" * MIB)
        answers = {cookie: error for cookie, error, _ in (bare.reply() for _ in range(5))}
    assert answers == {0: 0, 1: 0, 2: NbdErrno.ENOSPC, 3: 0, 4: 0}


def test_who_goes_in_the_middle_is_not_overtaken_by_itself(server: Server, storage: SlowStorage, tmp_path: Path) -> None:
    storage.seconds = 0.2
    lost = BareClient(tmp_path / "sock")
    for number in range(3):
        lost.send(Command.WRITE, number, offset=0, length=MIB, data=b"o" * MIB)
    eventually(lambda: bool(storage.threads), "nothing was begun")
    lost.sock.close()
    with NbdDisk(server.uri()) as disk:
        disk.write(0, b"n" * MIB)
        assert disk.read(0, MIB) == b"n" * MIB
    assert bytes(storage.bytes[:MIB]) == b"n" * MIB


@pytest.mark.usefixtures("server")
def test_a_flush_covers_what_was_answered(storage: SlowStorage, tmp_path: Path) -> None:
    with BareClient(tmp_path / "sock") as bare:
        for number in range(4):
            bare.send(Command.WRITE, number, offset=number * MIB, length=MIB, data=b"f" * MIB)
        for _ in range(4):
            assert bare.reply()[1] == 0
        assert len([mark for mark in storage.marks if "write" in mark]) >= 4
        assert bare.ask(Command.FLUSH) == (1, 0, b"")
        bare.send(Command.WRITE, offset=0, length=MIB, data=b"g" * MIB, flags=CommandFlag.FUA)
        assert bare.reply() == (1, 0, b"")
    assert storage.fences >= 2


@pytest.mark.parametrize("cluster_bytes", [512, 64 * KIB, 2 * MIB])
def test_into_an_image(tmp_path: Path, cluster_bytes: int) -> None:
    """New clusters and old ones, of every size."""
    rng = random.Random(7)
    path = tmp_path / "image.qcow2"
    cowfence.create(path, SIZE, cluster_size=cluster_bytes).close()
    model = bytearray(SIZE)
    with cowfence.open(path, writable=True) as image, serving(tmp_path, {"": Export(image)}) as server:
        with NbdDisk(server.uri()) as disk:
            for _ in range(4):
                starts = rng.sample(range(0, SIZE - 2 * MIB, 2 * MIB), 12)
                requests = []
                for start in starts:
                    data = rng.randbytes(rng.choice((MIB, 2 * MIB, 600 * KIB + 7)))
                    requests.append(Request(Verb.WRITE, start, len(data), data))
                    model[start : start + len(data)] = data
                assert disk.submit(requests) == [None] * len(requests)
        assert image.read(0, SIZE) == model
    with cowfence.open(path) as image:
        assert image.read(0, SIZE) == model
    run(["qemu-img", "check", path])
