"""What is special about files: what is refused at open, failed fences, short transfers, holes, cold reads, copying."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfence.errors import Closed, Invalid, NoSpace, StorageFailed, WouldBlock
from cowfence.storage import file as file_module
from cowfence.storage import host
from cowfence.storage.base import read_exact
from cowfence.storage.file import FileStorage, copy_range
from cowfence.storage.memory import MemoryStorage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FileStorage]:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    opened = FileStorage.open(path, writable=True)
    yield opened
    opened.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="nowhere: open at offset 0: No such file") as failed:
        FileStorage.open(tmp_path / "nowhere")
    assert failed.value.errno == errno.ENOENT


def test_what_is_no_image_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, kind in (
            (tmp_path, "a directory"),
            (tmp_path / "fifo", "a FIFO"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/null"), "a character device"),
        ):
            for writable in (False, True):
                with pytest.raises(Invalid, match=f"is {kind}"):
                    FileStorage.open(path, writable=writable)


def test_from_fd_refuses_pipes_and_leaves_them_open() -> None:
    reading, writing = os.pipe()
    with pytest.raises(Invalid, match="FIFO"):
        FileStorage.from_fd(reading, "pipe", writable=False)
    os.close(reading)
    os.close(writing)
    with pytest.raises(StorageFailed):
        FileStorage.from_fd(reading, "closed", writable=False)


def test_descriptors_are_not_inherited(storage: FileStorage) -> None:
    assert not os.get_inheritable(storage.fileno())


def test_a_name_with_a_null_byte_is_an_error_of_ours() -> None:
    with pytest.raises(Invalid):
        FileStorage.open("a\0b")


def test_a_failed_fence_fails_for_ever(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", lost)
    with pytest.raises(StorageFailed) as first:
        storage.fence("test")
    monkeypatch.undo()
    with pytest.raises(StorageFailed) as second:
        storage.fence("test")
    assert second.value is first.value
    assert storage.failed_fence is first.value


def test_short_transfers_are_taken_up_again(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def stingy_read(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        return os.preadv(fd, [memoryview(buffers[0])[:7]], offset, flags)

    def stingy_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwritev(fd, [memoryview(buffers[0])[:7]], offset)

    monkeypatch.setattr(file_module, "preadv", stingy_read)
    monkeypatch.setattr(file_module, "pwritev", stingy_write)
    storage.writev(100, (b"a" * 50, b"b" * 3), "test")
    buffers = (bytearray(20), bytearray(33))
    assert storage.readv(100, buffers) == 53
    assert b"".join(buffers) == b"a" * 50 + b"b" * 3


def test_cold_reads_say_so_and_a_half_cold_read_is_not_taken_for_the_end(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cold_behind_4096(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        if not flags:
            return os.preadv(fd, buffers, offset)
        if offset >= 4096:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.preadv(fd, [memoryview(buffers[0])[: 4096 - offset]], offset)

    monkeypatch.setattr(file_module, "preadv", cold_behind_4096)
    buffer = bytearray(100)
    assert storage.readv(0, (buffer,), wait=False) == 100
    for offset in (4096, 4050):
        with pytest.raises(WouldBlock):
            storage.readv(offset, (buffer,), wait=False)
        assert storage.readv(offset, (buffer,)) == 100


def test_a_file_that_cannot_be_read_without_waiting_is_read_inline(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = 0

    def like_tmpfs(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        nonlocal refusals
        if flags:
            refusals += 1
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(file_module, "preadv", like_tmpfs)
    for _ in range(3):
        assert storage.readv(0, (bytearray(100),), wait=False) == 100
        assert storage.readv(0, (bytearray(10), bytearray(10)), wait=False) == 20
    assert refusals == 1


def test_a_full_host_is_no_space(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_module, "pwritev", full)
    with pytest.raises(NoSpace):
        storage.writev(0, (b"x",), "test")
    monkeypatch.setattr(host, "fallocate", full)
    with pytest.raises(NoSpace):
        storage.zero(0, 1, "test")


@pytest.mark.parametrize("works", [host.FALLOC_PUNCH_HOLE | host.FALLOC_KEEP_SIZE, None])
def test_zero_falls_back_to_what_the_host_can(storage: FileStorage, monkeypatch: pytest.MonkeyPatch, works: int | None) -> None:
    real, tried = host.fallocate, []

    def limited(fd: int, mode: int, offset: int, length_bytes: int) -> None:
        tried.append(mode)
        if mode != works:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        real(fd, mode, offset, length_bytes)

    monkeypatch.setattr(host, "fallocate", limited)
    before = read_exact(storage, 0, storage.size(), "content")
    for start, stop in ((10, 5000), (16000, 20000)):
        storage.zero(start, stop - start, "test")
        before.extend(bytes(max(0, stop - len(before))))
        before[start:stop] = bytes(stop - start)
        assert read_exact(storage, 0, storage.size(), "content") == before
    assert tried.count(host.FALLOC_ZERO_RANGE) == 1


def test_discard_where_the_host_cannot_is_silent_and_told(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(host, "fallocate", cannot)
    assert storage.capabilities().punches_holes
    storage.discard(0, 4096, "test")
    assert not storage.capabilities().punches_holes


def test_discard_gives_space_back(storage: FileStorage) -> None:
    storage.writev(0, (b"\xaa" * (1 << 20),), "test")
    storage.fence("test")
    before = os.fstat(storage.fileno()).st_blocks
    storage.discard(0, 1 << 20, "test")
    if storage.capabilities().punches_holes:
        assert os.fstat(storage.fileno()).st_blocks < before


def test_holes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    storage = FileStorage.open(path, writable=True)
    storage.writev(1 << 20, (b"\xaa" * 65536,), "test")
    storage.truncate(3 << 20, "test")
    states = [(extent.start, extent.end, extent.data) for extent in storage.extents(0, 1 << 40)]
    storage.close()
    assert states in (
        [(0, 1 << 20, False), (1 << 20, (1 << 20) + 65536, True), ((1 << 20) + 65536, 3 << 20, False)],
        [(0, 3 << 20, True)],  # a filesystem that cannot tell
    )


def test_copy_range_between_files_and_others(tmp_path: Path, storage: FileStorage) -> None:
    content = bytes(read_exact(storage, 0, storage.size(), "content"))
    path = tmp_path / "copy"
    path.touch()
    copy = FileStorage.open(path, writable=True)
    memory = MemoryStorage()
    for target in (copy, memory):
        assert copy_range(storage, 100, target, 50, 10_000, "test") == 10_000
        assert copy_range(storage, 16_000, target, 20_000, 1_000_000, "test") == 384
        assert copy_range(storage, 99_999, target, 0, 10, "test") == 0
        assert target.size() == 20_384
        assert read_exact(target, 50, 10_000, "copy") == content[100:10_100]
        assert read_exact(target, 20_000, 384, "copy") == content[16_000:]
    copy.close()
    with pytest.raises(Closed):
        copy_range(storage, 0, copy, 0, 10, "test")


def test_an_unclosed_storage_is_reported_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    storage = FileStorage.open(path, writable=True)
    fd = storage.fileno()
    with pytest.warns(ResourceWarning, match="never closed"):
        del storage
    with pytest.raises(OSError):
        os.fstat(fd)
