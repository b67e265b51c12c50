"""A server that goes while the command line reads from it: ``--reconnect``, and ``reconnect-delay`` of ``--image-opts``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfence.cli.sources import parse_source
from cowfence.errors import Invalid, Unsupported
from cowfence.nbd.messages import Command
from helpers_cli import cowfence
from helpers_scripted import MIB, Scripted, background, dies_at


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Scripted]:
    """Ends two connections at a read."""
    found = Scripted(tmp_path, dies_at(Command.READ, 2), most_bytes=65536)
    found.bytes[:] = random.Random(1).randbytes(MIB)
    with background() as loop:
        loop.run(found.start())
        yield found
        loop.run(found.stop())


def test_a_conversion_goes_on_when_the_server_comes_back(server: Scripted, tmp_path: Path) -> None:
    cowfence("convert", "--reconnect", "5", server.uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == server.bytes
    assert server.connections == 3


def test_without_it_the_conversion_ends(server: Scripted, tmp_path: Path) -> None:
    done = cowfence("convert", server.uri, tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "the server closed the connection" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "described", ["driver=nbd,path={},reconnect-delay=5", "driver=raw,file.driver=nbd,file.path={},file.reconnect-delay=5"]
)
def test_reconnect_delay(server: Scripted, tmp_path: Path, described: str) -> None:
    cowfence("convert", "--image-opts", described.format(server.path), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == server.bytes


def test_what_is_said_of_one_source_counts_more_than_the_option(server: Scripted, tmp_path: Path) -> None:
    described = f"driver=nbd,path={server.path},reconnect-delay=0"
    assert cowfence("convert", "--image-opts", "--reconnect", "5", described, tmp_path / "out", check=False).returncode == 1


@pytest.mark.parametrize("value", ["", "x", "-1", "nan"])
def test_what_is_no_time_is_refused(value: str) -> None:
    with pytest.raises(Invalid, match="reconnect-delay"):
        parse_source(f"driver=nbd,path=a,reconnect-delay={value}", image_opts=True)


def test_a_file_has_no_reconnect_delay() -> None:
    with pytest.raises(Unsupported, match="reconnect-delay"):
        parse_source("driver=file,filename=a,reconnect-delay=5", image_opts=True)
