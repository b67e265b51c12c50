"""Reads that are answered out of a file's page cache: the same bytes, and only where nobody changes them."""

from __future__ import annotations

import mmap
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowfence
from cowfence.disk.base import Verb
from cowfence.nbd import steady
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import Command
from cowfence.nbd.server import Limits, Server
from cowfence.nbd.steady import FilePart, SteadyFile
from cowfence.service.exports import ExportSpec, OpenedExport
from cowfence.storage.host import is_cached
from cowfence.units import KIB, MIB
from helpers_nbd import BareClient, eventually, serving
from judges import run

SIZE = 16 * MIB
CLUSTER = 64 * KIB


@pytest.fixture(scope="module")
def content() -> bytes:
    """Data, holes, and data again; some of it worth compressing."""
    data = bytearray(random.Random(1).randbytes(SIZE))
    data[10 * MIB : 12 * MIB] = b"cow " * (2 * MIB // 4)
    data[3 * MIB : 5 * MIB + 100] = bytes(2 * MIB + 100)
    return bytes(data)


@pytest.fixture(params=["qcow2", "compressed", "in pieces", "raw"])
def image(request: pytest.FixtureRequest, tmp_path: Path, content: bytes) -> tuple[Path, str]:
    raw = tmp_path / "raw"
    raw.write_bytes(content)
    path = tmp_path / request.param
    if path == raw:
        return raw, "raw"
    if path.name == "in pieces":
        run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)])
        places = [place for place in range(0, SIZE, CLUSTER) if any(content[place : place + CLUSTER])]
        random.Random(2).shuffle(places)
        with cowfence.open(path, writable=True) as disk:
            for place in places:
                disk.write(place, content[place : place + CLUSTER])
        return path, "qcow2"
    run(
        ["qemu-img", "convert", *(["-c"] if path.name == "compressed" else []), "-O", "qcow2", "-f", "raw", str(raw), str(path)]
    )
    return path, "qcow2"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much was answered out of files, read by read."""
    found: list[int] = []
    plain = SteadyFile.part

    def part(self: SteadyFile, offset: int, length_bytes: int) -> FilePart | None:
        made = plain(self, offset, length_bytes)
        if made is not None:
            found.append(length_bytes)
        return made

    monkeypatch.setattr(SteadyFile, "part", part)
    return found


def _opened(path: Path, format_name: str = "qcow2", **more: object) -> OpenedExport:
    return OpenedExport(ExportSpec(str(path), format=format_name, read_only=True, **more))  # type: ignore[arg-type]


@pytest.fixture
def served(tmp_path: Path, image: tuple[Path, str]) -> Iterator[Server]:
    opened = _opened(*image)
    with serving(tmp_path, {"": opened.export}) as server:
        yield server
    opened.close()


@pytest.mark.parametrize("style", Style)
def test_the_same_bytes(served: Server, content: bytes, style: Style, image: tuple[Path, str], sent: list[int]) -> None:
    rng = random.Random(3)
    with NbdDisk(served.uri(), style=style) as disk:
        assert disk.read(0, SIZE) == content
        for _ in range(60):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 4096, CLUSTER, CLUSTER + 1, 300_000, 2 * MIB, 5 * MIB]), SIZE - offset)
            assert disk.read(offset, length) == content[offset : offset + length]
        assert sent or image[0].name == "in pieces"
        cluster = 7 * MIB // CLUSTER * CLUSTER
        assert disk.read(cluster, CLUSTER) == content[cluster : cluster + CLUSTER]
        assert sent


def test_what_stands_in_one_piece_is_sent_from_the_file(tmp_path: Path, content: bytes, sent: list[int]) -> None:
    (tmp_path / "raw").write_bytes(content)
    opened = _opened(tmp_path / "raw", "raw")
    with serving(tmp_path, {"": opened.export}) as server, NbdDisk(server.uri()) as disk:
        assert disk.read(8 * MIB, 2 * MIB) == content[8 * MIB : 10 * MIB]
        assert sum(sent) == 2 * MIB
        assert disk.read(8 * MIB, 4096) == content[8 * MIB : 8 * MIB + 4096]
        assert sum(sent) == 2 * MIB
    assert opened.export.stats.requests[Verb.READ] == 2
    opened.close()


def test_a_client_that_reads_slowly(tmp_path: Path, content: bytes) -> None:
    """The socket takes a reply in many parts, and other replies wait behind it."""
    (tmp_path / "raw").write_bytes(content)
    opened = _opened(tmp_path / "raw", "raw")
    with serving(tmp_path, {"": opened.export}), BareClient(tmp_path / "sock") as bare:
        wanted = [(MIB, 2 * MIB), (0, 512), (8 * MIB, 3 * MIB), (5, CLUSTER), (SIZE - 7, 7)]
        for cookie, (offset, length) in enumerate(wanted):
            bare.send(Command.READ, cookie=cookie, offset=offset, length=length)
        got = {cookie: data for cookie, _, data in (bare.reply() for _ in wanted)}
        assert got == {cookie: content[offset : offset + length] for cookie, (offset, length) in enumerate(wanted)}
    opened.close()


def test_a_file_that_becomes_shorter_ends_the_connection_only(tmp_path: Path, content: bytes) -> None:
    """Its length was announced; nothing else may be sent in place of what is gone."""
    (tmp_path / "raw").write_bytes(content)
    opened = _opened(tmp_path / "raw", "raw")
    with serving(tmp_path, {"": opened.export}), BareClient(tmp_path / "sock") as bare:
        bare.send(Command.READ, offset=0, length=8 * MIB)
        bare.receive(1000)
        os.truncate(tmp_path / "raw", 4 * KIB)
        rest = bare.receive(8 * MIB)
        assert len(rest) < 8 * MIB - 1000
        with BareClient(tmp_path / "sock") as other:
            assert other.ask(Command.READ, length=512) == (1, 0, content[:512])
    opened.close()


def test_a_file_that_ends_inside_its_last_cluster(tmp_path: Path, sent: list[int]) -> None:
    """The last page of the file is in the page cache, and not all of it is there to be sent."""
    path = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"])
    with cowfence.open(path, writable=True) as disk:
        disk.write(0, b"first" * CLUSTER)
        disk.write(5 * CLUSTER, b"x" * (CLUSTER - 2 * KIB))
    assert path.stat().st_size % mmap.PAGESIZE == 2 * KIB
    opened = _opened(path)
    wanted = opened.image.read(4 * CLUSTER, 2 * CLUSTER)
    with serving(tmp_path, {"": opened.export}), BareClient(tmp_path / "sock") as bare:
        assert bare.ask(Command.READ, offset=4 * CLUSTER, length=2 * CLUSTER) == (1, 0, wanted)
        assert sent == []
        assert bare.ask(Command.READ, offset=4 * CLUSTER, length=CLUSTER) == (1, 0, wanted[:CLUSTER])
        assert bare.ask(Command.READ, offset=5 * CLUSTER, length=CLUSTER) == (1, 0, wanted[CLUSTER:])
    opened.close()


def test_only_where_nobody_changes_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "raw").write_bytes(content)
    run(["qemu-img", "convert", "-O", "qcow2", "-f", "raw", str(tmp_path / "raw"), str(tmp_path / "image")])
    path = str(tmp_path / "image")
    for steady_wanted, spec in (
        (True, ExportSpec(path, read_only=True)),
        (False, ExportSpec(path)),
        (False, ExportSpec(path, read_only=True, force_share=True)),
        (False, ExportSpec(path, read_only=True, cache="none")),
        (False, ExportSpec(path, temporary=True)),
        (False, ExportSpec(path, read_only=True, offset=512)),
    ):
        try:
            opened = OpenedExport(spec)
        except cowfence.Invalid:
            assert spec.cache == "none"  # this filesystem has no direct I/O
            continue
        assert (opened.export.steady is not None) == steady_wanted, spec
        opened.close()


def test_over_tcp_it_is_copied(tmp_path: Path, content: bytes, sent: list[int]) -> None:
    (tmp_path / "raw").write_bytes(content)
    opened = _opened(tmp_path / "raw", "raw")
    with serving(tmp_path, {"": opened.export}) as server:
        host, port = server.listen_tcp()
        with NbdDisk(f"nbd://{host}:{port}") as disk:
            assert disk.read(0, SIZE) == content
        assert not sent
        with NbdDisk(server.uri()) as disk:
            assert disk.read(0, SIZE) == content
    assert sent
    opened.close()


def test_what_is_not_in_the_page_cache_is_read(
    tmp_path: Path, content: bytes, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raw").write_bytes(content)
    monkeypatch.setattr(steady, "is_cached", lambda *_: False)
    opened = _opened(tmp_path / "raw", "raw")
    with serving(tmp_path, {"": opened.export}) as server, NbdDisk(server.uri()) as disk:
        assert disk.read(0, SIZE) == content
    opened.close()
    assert not sent


def test_a_table_that_is_not_in_memory_is_not_waited_for(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "raw").write_bytes(content)
    run(["qemu-img", "convert", "-O", "qcow2", "-f", "raw", str(tmp_path / "raw"), str(tmp_path / "image")])
    with cowfence.open(tmp_path / "image") as disk:
        assert disk.locate(0, CLUSTER) is None
        disk.read(0, 1)
        host = disk.locate(100, 2 * CLUSTER)
        assert host is not None
        with open(tmp_path / "image", "rb") as file:
            file.seek(host)
            assert file.read(2 * CLUSTER) == content[100 : 100 + 2 * CLUSTER]
        for offset, length in ((3 * MIB, CLUSTER), (2 * MIB, 2 * MIB), (SIZE - 1, 2), (SIZE, 1), (-1, 2)):
            assert disk.locate(offset, length) is None
    assert disk.locate(0, CLUSTER) is None


def test_what_is_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(b"x" * 64 * KIB)
        file.truncate(MIB)
    fd = os.open(path, os.O_RDONLY)
    try:
        if not is_cached(fd, 0, 64 * KIB):
            pytest.skip("this kernel does not tell (cachestat)")
        assert is_cached(fd, 5000, 1)
        assert not is_cached(fd, 0, 68 * KIB)
        assert not is_cached(fd, 2 * MIB, 4096)
        os.fsync(fd)
        subprocess.run(["sync", str(path)], check=True)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not is_cached(fd, 0, 64 * KIB):  # a tmpfs keeps it
            os.pread(fd, 4096, 0)
            assert is_cached(fd, 0, 4096)
    finally:
        os.close(fd)


def test_no_part_is_made_of_short_reads() -> None:
    assert SteadyFile(0, lambda offset, _: offset).part(0, steady.LEAST_BYTES - 1) is None


def test_the_file_is_held_until_what_was_sent_is_read(tmp_path: Path, content: bytes, sent: list[int]) -> None:
    """What waits in the socket are the file's pages: whoever changes it would change the reply."""
    (tmp_path / "raw").write_bytes(content)
    opened = _opened(tmp_path / "raw", "raw")
    with serving(tmp_path, {"": opened.export}):
        bare = BareClient(tmp_path / "sock")
        bare.send(Command.READ, offset=MIB, length=CLUSTER)
        assert bare.sock.recv(1, socket.MSG_PEEK)  # it has been answered
    assert sent == [CLUSTER]
    closing = threading.Thread(target=opened.close)
    closing.start()
    time.sleep(0.1)
    assert closing.is_alive()
    with pytest.raises(cowfence.Locked):
        cowfence.open(tmp_path / "raw", writable=True, format="raw")
    assert bare.reply() == (1, 0, content[MIB : MIB + CLUSTER])
    closing.join(10)
    assert not closing.is_alive()
    assert bare.closed_by_server()
    cowfence.open(tmp_path / "raw", writable=True, format="raw").close()


def test_nobody_is_waited_for_for_ever(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").write_bytes(content)
    monkeypatch.setattr(steady, "PATIENCE_SECONDS", 0.2)
    opened = _opened(tmp_path / "raw", "raw")
    with serving(tmp_path, {"": opened.export}, Limits(stop_seconds=0.2)):
        stalled, gone = BareClient(tmp_path / "sock"), BareClient(tmp_path / "sock")
        for bare in (stalled, gone):
            bare.send(Command.READ, offset=MIB, length=MIB)
            assert bare.sock.recv(1, socket.MSG_PEEK)
        gone.sock.close()
    began = time.monotonic()
    opened.close()
    assert 0.15 < time.monotonic() - began < 5
    stalled.sock.close()


def test_who_leaves_things_unread_costs_no_end_of_descriptors(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks, says goodbye and reads nothing: no limit of connections would hold that back."""
    (tmp_path / "raw").write_bytes(content)
    monkeypatch.setattr(steady, "MOST_LEFT", 3)
    monkeypatch.setattr(steady, "PATIENCE_SECONDS", 0.1)
    opened = _opened(tmp_path / "raw", "raw")
    assert opened.export.steady is not None
    let_go = opened.export.steady.let_go
    left: list[socket.socket] = []

    def note(sock: socket.socket) -> None:
        left.append(sock)
        let_go(sock)

    monkeypatch.setattr(opened.export.steady, "let_go", note)
    rude = []
    with serving(tmp_path, {"": opened.export}):
        for number in range(8):
            rude.append(BareClient(tmp_path / "sock"))
            rude[-1].send(Command.READ, offset=MIB, length=CLUSTER)
            rude[-1].send(Command.DISC)
            eventually(lambda number=number: len(left) == number + 1, "it is not let go of")  # type: ignore[misc]
            eventually(lambda: sum(sock.fileno() >= 0 for sock in left) == min(len(left), 3), "not so many are held")
    opened.close()
    assert all(sock.fileno() < 0 for sock in left)
    for bare in rude:
        bare.sock.close()
