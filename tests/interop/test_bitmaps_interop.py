"""Persistent bitmaps, both ways: QEMU makes and we record, we make and QEMU records; what each finds in the other's."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import cowfence
from cowfence.errors import Corrupt, Invalid, ReadOnly, Unsupported
from helpers_cli import cowfence as command
from judges import require, run

MIB = 1 << 20
SIZE = 64 * MIB


def recorded_by_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    """The dirty ranges of a disabled bitmap as qemu-nbd exports them."""
    socket = path.with_suffix(".sock")
    server = subprocess.Popen([require("qemu-nbd"), "-r", "-t", "-f", "qcow2", "-B", name, "-k", str(socket), str(path)])
    try:
        for _ in range(200):
            if socket.exists():
                break
            time.sleep(0.02)
        meta = f"--map=qemu:dirty-bitmap:{name}"
        found = json.loads(run(["nbdinfo", "--json", meta, f"nbd+unix:///?socket={socket}"]).stdout)
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)
    return [(extent["offset"], extent["length"]) for extent in found if extent["type"] & 1]


def info_of(path: Path) -> list[dict[str, object]]:
    data = json.loads(run(["qemu-img", "info", "--output=json", path]).stdout)["format-specific"]["data"]
    found: list[dict[str, object]] = data.get("bitmaps", [])
    return found


@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("granularity", [512, 65536, 8 * MIB])
def test_what_qemu_made_records_what_we_write_and_the_other_way_round(
    tmp_path: Path, cluster_bytes: int, granularity: int
) -> None:
    path = tmp_path / "disk.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_bytes}", path, str(SIZE)])
    run(["qemu-img", "bitmap", "--add", "-g", str(granularity), path, "theirs"])
    rng = random.Random(granularity + cluster_bytes)
    with cowfence.open(path, writable=True) as disk:
        disk.bitmaps.add("ours", granularity_bytes=granularity)
        for _ in range(20):
            disk.write(rng.randrange(SIZE - 100_000), bytes([rng.randrange(1, 255)]) * rng.randrange(1, 100_000))
        disk.zero(8 * MIB, MIB)
        disk.bitmaps.disable("theirs")
        disk.bitmaps.disable("ours")
        expected = disk.bitmaps.ranges("theirs")
        assert disk.bitmaps.ranges("ours") == expected
    run(["qemu-img", "check", path])
    assert recorded_by_qemu(path, "theirs") == expected
    assert recorded_by_qemu(path, "ours") == expected
    run(["qemu-img", "bitmap", "--enable", path, "ours"])
    run(["qemu-io", "-c", "write -P 1 48M 64k", path])
    run(["qemu-img", "bitmap", "--disable", path, "ours"])
    with cowfence.open(path) as disk:
        assert any(start <= 48 * MIB < start + length for start, length in disk.bitmaps.ranges("ours"))
        assert disk.bitmaps.ranges("theirs") == expected
    assert command("check", str(path)).returncode == 0


def test_merge_clear_and_remove(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE) as disk:
        disk.bitmaps.add("a", granularity_bytes=4096)
        disk.write(0, b"x")
        disk.bitmaps.disable("a")
        disk.bitmaps.add("b")
        disk.write(10 * MIB, b"x" * 65536)
        disk.bitmaps.merge("a", [disk.bitmaps.bits_of("b")])
        disk.bitmaps.merge("b", [disk.bitmaps.bits_of("a")])
        assert disk.bitmaps.ranges("a") == [(0, 4096), (10 * MIB, 65536)]
        assert disk.bitmaps.ranges("b") == [(0, 65536), (10 * MIB, 65536)]
        disk.bitmaps.clear("b")
        assert disk.bitmaps.ranges("b") == []
        disk.write(SIZE - 1, b"x")
    assert [one["name"] for one in info_of(path)] == ["a", "b"]
    run(["qemu-img", "bitmap", "--remove", path, "a"])
    with cowfence.open(path, writable=True) as disk:
        assert disk.bitmaps.ranges("b") == [(SIZE - 65536, 65536)]
        disk.bitmaps.remove("b")
        assert list(disk.bitmaps) == []
    assert info_of(path) == []
    run(["qemu-img", "check", path])


def test_a_killed_writer_leaves_it_inconsistent_and_it_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE) as disk:
        disk.bitmaps.add("b")
        disk.bitmaps.add("asleep", enabled=False)
    program = f"""
import os, signal, cowfence
disk = cowfence.open({str(path)!r}, writable=True)
disk.write(0, b"x" * 65536)
disk.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False).returncode == -signal.SIGKILL
    assert {str(one["name"]): one["flags"] for one in info_of(path)} == {"b": ["in-use", "auto"], "asleep": []}
    with cowfence.open(path, writable=True) as disk:
        assert [(bitmap.name, bitmap.inconsistent) for bitmap in disk.bitmaps] == [("b", True), ("asleep", False)]
        with pytest.raises(Invalid, match="inconsistent"):
            disk.bitmaps.ranges("b")
        with pytest.raises(Invalid, match="inconsistent"):
            disk.bitmaps.enable("b")
        disk.write(0, b"y")
    assert {str(one["name"]): one["flags"] for one in info_of(path)} == {"b": ["in-use", "auto"], "asleep": []}
    command("bitmap", "--remove", str(path), "b")
    assert [one["name"] for one in info_of(path)] == ["asleep"]
    run(["qemu-img", "check", path])


def test_the_command_line_does_what_qemu_img_does(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for path in (ours, theirs):
        run(["qemu-img", "create", "-q", "-f", "qcow2", path, "10M"])
    for words in (
        ["--add", "-g", "4k", "IMAGE", "a"],
        ["--add", "--disable", "IMAGE", "b"],
        ["--merge", "a", "--clear", "IMAGE", "b"],
        ["--add", "IMAGE", "a"],
        ["--remove", "IMAGE", "c"],
        ["--add", "-g", "1000", "IMAGE", "d"],
        ["--clear", "-g", "4k", "IMAGE", "a"],
        ["--merge", "zz", "IMAGE", "a"],
        ["--clear", "-b", "x", "IMAGE", "a"],
        ["--merge", "a", "-F", "qcow2", "IMAGE", "b"],
        ["IMAGE", "a"],
    ):
        a = command("bitmap", *(str(ours) if word == "IMAGE" else word for word in words), check=False)
        b = run(["qemu-img", "bitmap", *(theirs if word == "IMAGE" else word for word in words)], check=False)
        assert (a.returncode, a.stdout) == (b.returncode, b.stdout), words
        assert bool(a.stderr) == bool(b.stderr)
        assert len(a.stderr.splitlines()) <= 1
        assert info_of(ours) == info_of(theirs), words
    run(["qemu-io", "-c", "write 1M 4k", ours])
    extents = json.loads(command("bitmap", "--extents", "--output=json", str(ours), "a").stdout)
    assert extents == [{"start": MIB, "length": 4096, "dirty": True}]
    command("bitmap", "--add", "--merge", "a", "-b", str(ours), str(theirs), "copy")
    assert json.loads(command("bitmap", "--extents", "--output=json", str(theirs), "copy").stdout) == [
        {"start": MIB, "length": 65536, "dirty": True}
    ]


def test_an_incremental_backup(tmp_path: Path) -> None:
    """A full copy, then only what the bitmap has: the copy is equal again."""
    path, copy = tmp_path / "disk.qcow2", tmp_path / "copy.raw"
    rng = random.Random(5)
    with cowfence.create(path, SIZE) as disk:
        disk.write(0, rng.randbytes(3 * MIB))
        copy.write_bytes(disk.read(0, SIZE))
        disk.bitmaps.add("since")
        for _ in range(10):
            disk.write(rng.randrange(SIZE - 70_000), rng.randbytes(70_000))
        disk.discard(MIB, MIB)
    with cowfence.open(path) as disk, copy.open("r+b") as target:
        changed = disk.bitmaps.ranges("since")
        assert sum(length for _, length in changed) < SIZE / 10
        for start, length in changed:
            target.seek(start)
            target.write(disk.read(start, length))
    run(["qemu-img", "compare", path, copy])


def test_read_only_and_version_2(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    cowfence.create(path, MIB, version=2).close()
    with cowfence.open(path, writable=True) as disk, pytest.raises(Invalid, match=r"1\.1"):
        disk.bitmaps.add("b")
    cowfence.create(path, MIB).close()
    with cowfence.open(path) as disk, pytest.raises(ReadOnly):
        disk.bitmaps.add("b")


@pytest.mark.parametrize("seed", range(40))
def test_hostile_bitmaps(tmp_path: Path, seed: int) -> None:
    """Bytes of the directory, the tables and the extension are overwritten: refused, or read, and the disk goes on."""
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE, cluster_size=4096) as disk:
        disk.bitmaps.add("a", granularity_bytes=512)
        disk.bitmaps.add("b", enabled=False)
        disk.write(0, b"x" * 5000)
        disk.write(20 * MIB, b"x" * 5000)
    content = bytearray(path.read_bytes())
    with cowfence.open(path) as disk:
        pointer = disk.header.bitmaps
        assert pointer is not None
        table = int.from_bytes(content[pointer.directory_offset : pointer.directory_offset + 8])
    rng = random.Random(seed)
    extension = content.index(bytes.fromhex("23852875"))
    areas = [(extension, 32), (pointer.directory_offset, 60), (table, 64)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        start, length = rng.choice(areas)
        at = start + rng.randrange(length)
        content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    path.write_bytes(content)
    with suppress(Corrupt, Invalid, Unsupported), cowfence.open(path, writable=True) as disk:
        with suppress(Corrupt, Invalid, Unsupported):
            for bitmap in list(disk.bitmaps):
                disk.bitmaps.ranges(bitmap.name)
        disk.write(MIB, b"the guest goes on")
        disk.flush()
        assert disk.read(MIB, 3) == b"the"
