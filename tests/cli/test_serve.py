"""``cowfence serve``: ready with one line, serves what a client asks, and loses nothing when it is told to stop."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import cowfence
from cowfence.errors import StorageFailed
from cowfence.nbd.client import NbdDisk
from cowfence.units import MIB
from helpers_cli import running
from judges import run

Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ``cowfence serve`` with these words; the process and the URI that it printed."""
    with running(tmp_path) as begin:

        def start(*words: str) -> tuple[subprocess.Popen[str], str]:
            server = begin(*words)
            assert server.stdout is not None
            return server, server.stdout.readline().strip()

        yield start


def stop(server: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    server.send_signal(number)
    assert server.communicate(timeout=30) == ("", "")
    assert server.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("cache", ["writeback", "writethrough", "unsafe"])
def test_everything_is_committed_when_it_stops(tmp_path: Path, start: Start, number: int, cache: str) -> None:
    cowfence.create(tmp_path / "a", MIB).close()
    server, uri = start("--port", "0", "--cache", cache, "a")
    client = NbdDisk(uri)
    client.write(1000, b"written, not flushed")
    stop(server, number)
    with suppress(StorageFailed):  # it would flush, but nobody is there any more
        client.close()
    with cowfence.open(tmp_path / "a") as disk:
        assert disk.read(1000, 20) == b"written, not flushed"
    run(["qemu-img", "check", tmp_path / "a"])


def test_a_unix_socket_and_a_name(tmp_path: Path, start: Start) -> None:
    cowfence.create(tmp_path / "a", MIB).close()
    server, uri = start("--socket", "sock", "--name", "disk 1", "--cache-size", "1M", "--commit-interval", "0.5", "a")
    assert uri == "nbd+unix:///disk%201?socket=sock"
    assert "size: 1048576" in run(["nbdinfo", f"nbd+unix:///disk%201?socket={tmp_path}/sock"]).stdout.replace("export-", "")
    stop(server)
    assert not (tmp_path / "sock").exists()


def test_read_only_changes_nothing(tmp_path: Path, start: Start) -> None:
    cowfence.create(tmp_path / "a", MIB).close()
    before = (tmp_path / "a").read_bytes()
    with cowfence.open(tmp_path / "a", writable=True):
        server, uri = start("--port", "0", "--read-only", "--force-share", "a")
        assert "is_read_only: true" in run(["nbdinfo", uri]).stdout
        stop(server)
    assert (tmp_path / "a").read_bytes() == before


def test_a_raw_image_is_served_as_it_is(tmp_path: Path, start: Start) -> None:
    cowfence.create(tmp_path / "a", MIB).close()
    server, uri = start("--port", "0", "-f", "raw", "a")
    client = NbdDisk(uri)
    assert client.read(0, 4) == b"QFI\xfb"
    client.close()
    stop(server)


def test_without_options_it_is_the_port_of_nbd_at_the_loopback_address(tmp_path: Path, start: Start) -> None:
    cowfence.create(tmp_path / "a", MIB).close()
    server, uri = start("a")
    if not uri:
        assert server.stderr is not None
        pytest.skip(f"port 10809 is taken: {server.stderr.readline()}")
    assert uri == "nbd://127.0.0.1:10809/"
    stop(server)
