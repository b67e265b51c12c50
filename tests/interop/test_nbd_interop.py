"""The NBD server and client against the programs of others: libnbd's tools, QEMU's and fio as clients, two servers as peers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfence.disk.raw import RawDisk
from cowfence.errors import NoSpace, ReadOnly, StorageFailed
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.export import Export
from cowfence.nbd.server import Server
from cowfence.storage.file import FileStorage
from cowfence.units import KIB, MIB
from helpers_nbd import serving
from judges import require, run

SIZE = 16 * MIB


def patchy(size_bytes: int) -> bytes:
    """Data and zeros in turns of 64 KiB, with a ragged end."""
    chooser = random.Random(5)
    pieces = [chooser.randbytes(64 * KIB) if index % 3 else bytes(64 * KIB) for index in range(size_bytes // (64 * KIB))]
    return b"".join(pieces).ljust(size_bytes, b"\x55")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[Server]:
    disk = RawDisk(FileStorage.open(image, writable=True))
    exports = {"": Export(disk, description="the default"), "read only": Export(disk, read_only=True)}
    with serving(tmp_path, exports) as server:
        yield server
    disk.close()


def test_nbdinfo(server: Server) -> None:
    (shown,) = json.loads(run(["nbdinfo", "--json", server.uri()]).stdout)["exports"]
    assert shown["export-size"] == SIZE
    assert shown["description"] == "the default"
    assert "base:allocation" in shown["contexts"]
    able = {key for key, value in shown.items() if value is True}
    assert able >= {"can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn", "can_cache", "can_df"}
    assert not shown["is_read_only"]
    assert [shown[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")] == [1, 4096, 32 * MIB]
    (shown,) = json.loads(run(["nbdinfo", "--json", server.uri("read only")]).stdout)["exports"]
    assert shown["is_read_only"]
    assert not shown["can_trim"]


def test_nbdinfo_list(server: Server) -> None:
    listed = json.loads(run(["nbdinfo", "--list", "--json", server.uri()]).stdout)
    assert [(shown["export-name"], shown["export-size"]) for shown in listed["exports"]] == [("", SIZE), ("read only", SIZE)]


def test_nbdinfo_map(server: Server) -> None:
    with NbdDisk(server.uri()) as disk:
        disk.write(MIB, b"x" * MIB)
    shown = json.loads(run(["nbdinfo", "--map", "--json", server.uri()]).stdout)
    assert [(line["offset"], line["length"], line["type"]) for line in shown] == [
        (0, MIB, 3),
        (MIB, MIB, 0),
        (2 * MIB, SIZE - 2 * MIB, 3),
    ]


def test_nbdcopy_there_and_back(server: Server, tmp_path: Path, image: Path) -> None:
    (tmp_path / "source").write_bytes(patchy(SIZE))
    run(["nbdcopy", "--flush", tmp_path / "source", server.uri()])
    assert image.read_bytes() == patchy(SIZE)
    run(["nbdcopy", server.uri(), tmp_path / "target"])
    assert (tmp_path / "target").read_bytes() == patchy(SIZE)


def test_nbdcopy_keeps_a_sparse_disk_sparse(server: Server, tmp_path: Path, image: Path) -> None:
    image.write_bytes(b"x" * SIZE)
    with (tmp_path / "source").open("wb") as file:
        file.truncate(SIZE)
        file.seek(MIB)
        file.write(b"y" * MIB)
    run(["nbdcopy", tmp_path / "source", server.uri()])
    assert image.read_bytes() == bytes(MIB) + b"y" * MIB + bytes(SIZE - 2 * MIB)
    assert image.stat().st_blocks * 512 < 3 * MIB


def test_qemu_img_convert_there_and_back(server: Server, tmp_path: Path, image: Path) -> None:
    (tmp_path / "source").write_bytes(patchy(SIZE))
    run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "source", server.uri()])
    assert image.read_bytes() == patchy(SIZE)
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), tmp_path / "target"])
    run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "target", image])
    shown = json.loads(run(["qemu-img", "map", "-f", "raw", "--output=json", server.uri("read only")]).stdout)
    assert shown[0]["zero"]


def test_qemu_io_every_kind_of_request(server: Server, image: Path) -> None:
    commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 512k 64k",
        "write -z 128k 64k",
        "write -z -u 256k 64k",
        "discard 768k 64k",
        "aio_write -P 0x33 3M 5M",
        "aio_flush",
        "flush",
        "read -P 0x22 512k 64k",
        "read -P 0 128k 64k",
        "read -P 0 256k 64k",
        "read -P 0x33 3M 5M",
        "read -P 0x11 0 128k",
    ]
    arguments = [argument for command in commands for argument in ("-c", command)]
    said = run(["qemu-io", "-f", "raw", *arguments, server.uri()])
    assert "failed" not in said.stdout + said.stderr
    assert image.read_bytes()[512 * KIB : 576 * KIB] == b"\x22" * 64 * KIB
    refused = run(["qemu-io", "-f", "raw", "-c", "write 0 512", server.uri("read only")], check=False)
    assert refused.returncode or "failed" in refused.stdout + refused.stderr or "read-only" in refused.stderr


@pytest.mark.parametrize("workload", ["randrw", "rw"])
def test_fio_verifies_what_it_wrote(server: Server, workload: str, tmp_path: Path) -> None:
    run(
        [
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri()}", f"--rw={workload}", "--bsrange=512-64k"),
            *("--iodepth=32", f"--size={SIZE}", "--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--do_verify=1"),
            *("--bs_unaligned", f"--aux-path={tmp_path}"),
        ]
    )


# --- our client, their servers ---


@contextmanager
def foreign_server(argv: list[str], socket_path: Path) -> Iterator[NbdDisk]:
    process = subprocess.Popen([require(argv[0]), *argv[1:]], env={**os.environ, "LC_ALL": "C"})
    try:
        end = time.monotonic() + 10
        while not socket_path.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        with NbdDisk(f"nbd+unix:///?socket={socket_path}") as disk:
            yield disk
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # qemu-nbd misses a signal now and then, on a busy machine; that is its own affair
            process.kill()
            process.wait(10)


def exercise(disk: NbdDisk) -> None:
    data = patchy(5 * MIB)
    disk.write(12_345, data)
    disk.zero(MIB, MIB)
    disk.discard(8 * MIB, MIB)
    disk.write(SIZE - 100, b"z" * 100, fua=True)
    disk.flush()
    expected = bytearray(bytes(12_345) + data)
    expected[MIB : 2 * MIB] = bytes(MIB)
    assert disk.read(0, len(expected)) == expected
    assert disk.read(SIZE - 200, 200) == bytes(100) + b"z" * 100
    extents = list(disk.extents(0, SIZE))
    assert extents[0].start == 0
    assert extents[-1].end == SIZE
    assert any(extent.zero for extent in extents)


def test_our_client_with_qemu_nbd(image: Path, tmp_path: Path) -> None:
    with foreign_server(["qemu-nbd", "-t", "-f", "raw", "-k", str(tmp_path / "s"), str(image)], tmp_path / "s") as disk:
        exercise(disk)
    with foreign_server(["qemu-nbd", "-r", "-f", "raw", "-k", str(tmp_path / "r"), str(image)], tmp_path / "r") as disk:
        assert not disk.writable
        with pytest.raises(ReadOnly):
            disk.write(0, b"x")


@pytest.mark.parametrize(
    "filters", [[], ["--filter=nozero"], ["--filter=noextents"], ["--no-sr"], ["--filter=fua", "fuamode=emulate"]]
)
def test_our_client_with_nbdkit(tmp_path: Path, filters: list[str]) -> None:
    options = [option for option in filters if option.startswith("--")]
    parameters = [option for option in filters if not option.startswith("--")]
    argv = ["nbdkit", "-f", "-U", str(tmp_path / "s"), *options, "memory", str(SIZE), *parameters]
    with foreign_server(argv, tmp_path / "s") as disk:
        if re.search("noextents|no-sr", " ".join(filters)):
            assert [extent.data for extent in disk.extents(0, SIZE)] == [True]
            disk.write(1, b"abc", fua=True)
            assert disk.read(0, 5) == b"\0abc\0"
        else:
            exercise(disk)


def test_errors_of_nbdkit_reach_our_caller(tmp_path: Path) -> None:
    argv = [
        "nbdkit",
        "-f",
        "-U",
        str(tmp_path / "s"),
        "--filter=error",
        "memory",
        str(SIZE),
        "error-pread=EIO",
        "error-pread-rate=1",
    ]
    with foreign_server(argv, tmp_path / "s") as disk, pytest.raises(StorageFailed):
        disk.read(0, 512)
    argv = ["nbdkit", "-f", "-U", str(tmp_path / "t"), "--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC"]
    with foreign_server([*argv, "error-pwrite-rate=1"], tmp_path / "t") as disk, pytest.raises(NoSpace):
        disk.write(0, b"x")
