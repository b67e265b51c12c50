"""Images with an external data file: what is refused, what is said, and what stands in which file."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

import cowfence
from cowfence.disk.opener import Refs
from cowfence.errors import Corrupt, CowfenceError, Invalid, Locked, NoSpace, ReadOnly, Refused, Unsupported
from cowfence.ops.amend import Amendment, amend
from cowfence.ops.convert import How, convert
from cowfence.ops.create import CreateOptions
from cowfence.ops.resize import resize, resize_disk
from cowfence.ops.snapshot import create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import open_image
from cowfence.qcow2.verify import verify
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from helpers_check import QUIET
from helpers_cli import cowfence as command

KIB, MIB = 1 << 10, 1 << 20


def made(folder: Path, name: str = "data", *, raw: bool = False) -> Path:
    path = folder / "image"
    cowfence.create(path, MIB, data_file=name, data_file_raw=raw).close()
    return path


def renamed(path: Path, name: str) -> None:
    """The image names another data file, whatever that is."""
    stored = name.encode("utf-8", "surrogateescape")
    content = bytearray(path.read_bytes())
    at = content.index(b"DATA")
    content[at + 4 : at + 8] = len(stored).to_bytes(4, "big")
    tail = bytes(content[at + 16 : 4096])
    content[at + 8 : at + 8 + len(stored) + -len(stored) % 8] = stored.ljust(len(stored) + -len(stored) % 8, b"\0")
    start = at + 8 + len(stored) + -len(stored) % 8
    content[start : start + len(tail)] = tail
    path.write_bytes(content)


def test_data_and_metadata_are_apart(tmp_path: Path) -> None:
    path = made(tmp_path)
    data = random.Random(1).randbytes(100 * KIB)
    with cowfence.open(path, writable=True) as disk:
        disk.write(0, data)
        disk.write(700 * KIB + 3, data)
    assert path.stat().st_size < 400 * KIB
    stored = (tmp_path / "data").read_bytes()
    assert stored[: 100 * KIB] == data
    assert stored[700 * KIB + 3 :][: 100 * KIB] == data
    with cowfence.open(path) as disk:
        assert disk.read(0, 100 * KIB) == data


@pytest.mark.parametrize("name", ["../data", "/etc/passwd", "json:{}", "nbd://host/x", "a\0b", "image", "x/../../data"])
def test_untrusted_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "data").write_bytes(b"secret" * 1000)
    path = made(tmp_path / "in")
    renamed(path, name)
    before = path.read_bytes()
    for writable in (False, True):
        with pytest.raises(CowfenceError) as refused:
            cowfence.open(path, writable=writable)
        assert isinstance(refused.value, Refused)
    assert path.read_bytes() == before
    assert (tmp_path / "data").read_bytes() == b"secret" * 1000
    assert command("info", str(path)).returncode == 0


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    path = made(tmp_path / "in")
    (tmp_path / "in" / "data").unlink()
    (tmp_path / "in" / "data").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused, match="symbolic link"):
        cowfence.open(path)
    with cowfence.open(path, refs=Refs.trust_all()) as disk:
        assert disk.read(0, 10) == bytes(10)


def test_a_missing_data_file_is_said_in_one_line(tmp_path: Path) -> None:
    path = made(tmp_path)
    (tmp_path / "data").unlink()
    done = command("map", str(path), check=False)
    assert done.returncode == 1
    assert done.stderr == "cowfence: data: open at offset 0: No such file or directory\n"
    assert command("info", str(path), check=False).returncode == 0
    assert command("check", str(path)).returncode == 0


def test_without_its_data_file_an_image_is_looked_at_only(tmp_path: Path) -> None:
    path = made(tmp_path)
    with cowfence.open(path, writable=True) as disk:
        disk.write(0, b"x" * 512)
    with open_image(FileStorage.open(path), backing=None, writable=False) as disk:
        assert disk.read(512 * KIB, 10) == bytes(10)
        with pytest.raises(Unsupported, match="external data file"):
            disk.read(0, 10)


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    with cowfence.open(path, writable=True) as disk:
        with pytest.raises(Unsupported, match="external data file"):
            disk.write_compressed(0, bytes(64 * KIB))
        with pytest.raises(Unsupported, match="external data file"):
            create_snapshot(disk, "s")
    with pytest.raises(Invalid, match="Compression not supported"):
        convert(path, tmp_path / "c", CreateOptions(data_file="d"), how=How(compress=True))
    for options in (
        {"data_file_raw": True},
        {"data_file": "d", "data_file_raw": True, "backing": "b", "backing_format": "raw"},
    ):
        (tmp_path / "b").write_bytes(bytes(MIB))
        with pytest.raises(Invalid):
            cowfence.create(tmp_path / "new", MIB, **options)
        assert not (tmp_path / "new").exists()
    with pytest.raises(Invalid, match="its own"):
        cowfence.create(tmp_path / "new", MIB, data_file="./new")


def test_both_files_are_locked(tmp_path: Path) -> None:
    path = made(tmp_path)
    (tmp_path / "other").write_bytes(path.read_bytes())
    with cowfence.open(path, writable=True), pytest.raises(Locked):
        cowfence.open(tmp_path / "other", writable=True)


@pytest.mark.parametrize("raw", [False, True])
def test_resizing_hides_what_was_behind_the_end(tmp_path: Path, raw: bool) -> None:
    path = made(tmp_path, raw=raw)
    with cowfence.open(path, writable=True) as disk:
        disk.write(0, b"d" * MIB)
    resize(path, 100 * KIB + 512, shrink=True)
    assert (tmp_path / "data").stat().st_size == 100 * KIB + 512
    with (tmp_path / "data").open("ab") as file:
        file.write(b"behind the end" * 10000)
    resize(path, 2 * MIB)
    with cowfence.open(path) as disk:
        content = disk.read(0, 2 * MIB)
    assert content == (b"d" * (100 * KIB + 512)).ljust(2 * MIB, b"\0")
    if raw:
        assert (tmp_path / "data").read_bytes() == content
    assert verify(FileStorage.open(path)).clean


def test_zeros_of_a_raw_data_file_are_its_own(tmp_path: Path) -> None:
    path = made(tmp_path, raw=True)
    with cowfence.open(path, writable=True) as disk:
        disk.write(0, b"d" * MIB)
        disk.zero(64 * KIB, 128 * KIB)
        disk.zero(300 * KIB, 100, unmap=False)
        disk.discard(512 * KIB, 64 * KIB)
        content = disk.read(0, MIB)
    assert content[64 * KIB : 192 * KIB] == bytes(128 * KIB)
    assert (tmp_path / "data").read_bytes() == content


def in_memory(data: FaultyStorage) -> cowfence.Disk:
    image = MemoryStorage(name="image")
    write_new(image, NewImage(MIB, data_file="data"))
    return open_image(image, backing=None, data=data, writable=True, options=QUIET)


def test_a_failed_fence_of_the_data_file_is_the_end(tmp_path: Path) -> None:  # noqa: ARG001
    plan = FaultPlan()
    disk = in_memory(FaultyStorage(MemoryStorage(bytes(MIB), name="data"), plan))
    disk.write(0, b"x" * 512)
    plan.kinds, plan.nth, plan.matched = frozenset({Kind.FENCE}), 1, 0
    with pytest.raises(CowfenceError):
        disk.flush()
    with pytest.raises(ReadOnly, match="fence failed"):
        disk.write(0, b"y" * 512)
    with pytest.raises(ReadOnly):
        disk.close()


def test_entries_that_lead_elsewhere_are_corrupt() -> None:
    image = MemoryStorage(name="image")
    write_new(image, NewImage(MIB, data_file="data", preallocate_metadata=True))
    content = bytearray(image.snapshot())
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & (1 << 56) - 512
    for entry in (1 << 63 | 0x20000, 0x10000, 1 << 62 | 512, 1 << 63 | 0x10200):
        content[l2 + 8 : l2 + 16] = entry.to_bytes(8, "big")
        disk = open_image(
            MemoryStorage(bytes(content), name="image"),
            backing=None,
            data=MemoryStorage(bytes(MIB), name="data"),
            writable=True,
            options=QUIET,
        )
        if entry == 0x10000:  # At its place, without the flag: QEMU reads it, too.
            assert disk.read(65536, 10) == bytes(10)
            continue
        for work in (lambda: disk.read(65536, 10), lambda: disk.write(65536, b"x"), lambda: disk.read(0, MIB)):  # noqa: B023
            with pytest.raises(Corrupt):
                work()
        disk.close()


def test_amend(tmp_path: Path) -> None:
    path = made(tmp_path, raw=True)
    os.rename(tmp_path / "data", tmp_path / "moved")
    with pytest.raises(CowfenceError, match="No such file"):
        amend(path, Amendment(data_file="moved"))
    os.link(tmp_path / "moved", tmp_path / "data")
    amend(path, Amendment(data_file="moved", data_file_raw=False))
    (tmp_path / "data").unlink()
    with cowfence.open(path) as disk:
        assert disk.header.data_file == "moved"
        assert not disk.header.autoclear
    with pytest.raises(Invalid, match="cannot be set on existing"):
        amend(path, Amendment(data_file_raw=True))
    cowfence.create(tmp_path / "plain", MIB).close()
    with pytest.raises(Invalid, match="can only be set for images"):
        amend(tmp_path / "plain", Amendment(data_file="x"))


@pytest.mark.parametrize("raw", [False, True])
def test_convert(tmp_path: Path, raw: bool) -> None:
    content = bytearray(MIB)
    content[0:70000] = random.Random(2).randbytes(70000)
    content[900000:] = b"e" * (MIB - 900000)
    (tmp_path / "source").write_bytes(content)
    convert(tmp_path / "source", tmp_path / "image", CreateOptions(data_file="data", data_file_raw=raw), format="raw")
    with cowfence.open(tmp_path / "image") as disk:
        assert disk.read(0, MIB) == content
    assert (tmp_path / "data").read_bytes() == content
    assert verify(FileStorage.open(tmp_path / "image")).clean
    convert(tmp_path / "image", tmp_path / "back", CreateOptions(format="raw"))
    assert (tmp_path / "back").read_bytes() == content


def test_a_full_host_loses_nothing() -> None:
    plan = FaultPlan()
    data = MemoryStorage(bytes(MIB), name="data")
    disk = in_memory(FaultyStorage(data, plan))
    disk.write(0, b"x" * 65536)
    plan.kinds, plan.nth, plan.matched, plan.error = frozenset({Kind.WRITE}), 1, 0, errno.ENOSPC
    with pytest.raises(NoSpace):
        disk.write(65536, b"y" * 65536)
    disk.write(131072, b"z" * 65536)
    disk.close()
    assert data.snapshot()[:65536] == b"x" * 65536
    assert data.snapshot()[131072:196608] == b"z" * 65536


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_growing_ahead_touches_nothing_of_what_is_there(mode: str) -> None:
    """The new L2 table takes a cluster of the image, used before; in the data file, guest data stands at its offset."""
    image, data = MemoryStorage(name="image"), MemoryStorage(name="data")
    write_new(image, NewImage(64 * KIB, 512, data_file="data"))
    image.truncate(48 * KIB, "old")
    content = random.Random(3).randbytes(64 * KIB)
    with open_image(image, backing=None, writable=True, data=data, options=QUIET) as disk:
        disk.write(0, content)
        disk.flush()
        resize_disk(disk, 200 * KIB, preallocation=mode)
        assert disk.read(0, 200 * KIB) == content + bytes(136 * KIB)
    assert data.snapshot()[: 64 * KIB] == content
