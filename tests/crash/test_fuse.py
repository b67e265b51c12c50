"""The FUSE recorder: what programs do through the mount stands in the log, and arrives in the files."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowfence.crash.foreign_run import apply
from cowfence.crash.fuse import FuseRecorder, NoFuse
from cowfence.crash.qemu import QemuIo
from cowfence.errors import Invalid
from cowfence.storage.oplog import Discard, Done, Fence, Note, Truncate, Write, Zero
from helpers_fuse import require_fuse
from judges import run


class Mount:
    """A mount of two files, with their contents before."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "mount"
        self.directory.mkdir()
        self.files = {"a": directory / "file-a", "b": directory / "file-b"}
        self.before = {"a": b"A" * 8192, "b": b"B" * 4096}
        for name, path in self.files.items():
            path.write_bytes(self.before[name])
        self.recorder = FuseRecorder(self.directory, self.files)
        self.recorder.__enter__()
        self.log = self.recorder.log

    def replayed(self) -> dict[str, bytes]:
        contents = {name: bytearray(content) for name, content in self.before.items()}
        for operation in self.log.operations():
            apply(contents[operation.file], operation)
        return {name: bytes(content) for name, content in contents.items()}

    def agrees(self) -> bool:
        return self.replayed() == {name: path.read_bytes() for name, path in self.files.items()}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    require_fuse()
    found = Mount(tmp_path)
    yield found
    found.recorder.__exit__(None, None, None)
    assert not os.path.ismount(found.directory)


def test_files_are_shown_and_read(mount: Mount) -> None:
    assert sorted(os.listdir(mount.directory)) == ["a", "b"]
    assert (mount.directory / "a").read_bytes() == mount.before["a"]
    assert os.stat(mount.directory / "b").st_size == 4096
    assert len(mount.log) == 0


def test_each_call_is_logged_with_its_end(mount: Mount) -> None:
    fd = os.open(mount.directory / "a", os.O_RDWR)
    os.pwrite(fd, b"x" * 700, 100)
    os.fdatasync(fd)
    os.ftruncate(fd, 10000)
    os.fsync(fd)
    os.close(fd)
    operations = mount.log.operations()
    assert [type(one) for one in operations] == [Write, Fence, Truncate, Fence]
    assert (operations[0].file, operations[0].offset) == ("a", 100)  # type: ignore[union-attr]
    assert [type(one) for one in mount.log][1::2] == [Done] * 4
    assert mount.agrees()


def test_several_files_stand_in_one_order(mount: Mount) -> None:
    a, b = (os.open(mount.directory / name, os.O_RDWR) for name in "ab")
    for fd in (a, b, a):
        os.pwrite(fd, b"y" * 512, 0)
        os.fsync(fd)
    os.close(a)
    os.close(b)
    assert [one.file for one in mount.log.operations()] == ["a", "a", "b", "b", "a", "a"]


def test_punching_zeroing_and_growing(mount: Mount) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = libc.fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    fd = os.open(mount.directory / "a", os.O_RDWR)
    assert fallocate(fd, 3, 512, 1024) == 0
    assert fallocate(fd, 16, 8000, 1000) == 0
    assert fallocate(fd, 0, 9000, 1000) == 0
    assert fallocate(fd, 8, 0, 4096) == -1
    os.close(fd)
    assert [type(one) for one in mount.log.operations()] == [Discard, Zero, Truncate]
    assert mount.files["a"].stat().st_size == 10000
    assert mount.agrees()


def test_opening_with_truncation_and_synchronous_descriptors(mount: Mount) -> None:
    (mount.directory / "b").write_bytes(b"new")
    fd = os.open(mount.directory / "a", os.O_RDWR | os.O_DSYNC)
    os.pwrite(fd, b"z" * 512, 0)
    os.close(fd)
    assert [type(one) for one in mount.log.operations()] == [Truncate, Write, Write, Fence]
    assert mount.agrees()


def test_nothing_is_created_renamed_or_removed(mount: Mount) -> None:
    with pytest.raises(OSError):
        (mount.directory / "c").write_bytes(b"")
    with pytest.raises(OSError):
        os.rename(mount.directory / "a", mount.directory / "c")
    with pytest.raises(OSError):
        os.unlink(mount.directory / "a")


def test_calls_in_flight_together_are_in_flight_in_the_log(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    meet = threading.Barrier(2, timeout=10)
    write = os.pwrite

    def slow(fd: int, data: bytes, offset: int) -> int:
        meet.wait()
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)

    def work(name: str) -> None:
        with open(mount.directory / name, "r+b", buffering=0) as file:
            file.write(name.encode() * 512)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [type(one) for one in mount.log] == [Write, Write, Done, Done]


def test_qemu_locks_and_writes_through_it(mount: Mount, tmp_path: Path) -> None:
    run(["qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4k", tmp_path / "i", "128k"])
    mount.files["a"].write_bytes((tmp_path / "i").read_bytes())
    mount.before["a"] = mount.files["a"].read_bytes()
    image = mount.directory / "a"
    for mode in ("writeback", "none"):
        run(["qemu-io", "-t", mode, "-f", "qcow2", "-c", "write -P 5 4k 8k", "-c", "flush", "-c", "read -P 5 4k 8k", image])
    assert mount.agrees()
    assert run(["qemu-img", "check", image]).returncode == 0
    holder = QemuIo(["-f", "qcow2", str(image)])
    refused = run(["qemu-io", "-f", "qcow2", "-c", "length", image], check=False)
    holder.close()
    assert "lock" in refused.stdout + refused.stderr


def test_what_cannot_be_mounted_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").touch()
    real: Any = sys.modules.get("mfusepy")
    monkeypatch.setitem(sys.modules, "mfusepy", None)
    with pytest.raises(NoFuse, match=r"cowfence\[fuse\]"):
        FuseRecorder(tmp_path, {"f": tmp_path / "f"})
    if real is not None:
        monkeypatch.setitem(sys.modules, "mfusepy", real)
        with pytest.raises(Invalid, match="not a regular file"):
            FuseRecorder(tmp_path, {"g": tmp_path / "missing"})
        with pytest.raises(Invalid, match="not a directory"):
            FuseRecorder(tmp_path / "none", {"f": tmp_path / "f"})


def test_the_working_directory_stays(mount: Mount) -> None:
    assert Path.cwd() != Path("/")
    assert not [one for one in mount.log if isinstance(one, Note)]
