"""A disk as a file: the rules of file objects at the edges, and the standard library's users of files."""

from __future__ import annotations

import array
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.disk.base import Outcome, Request
from cowfence.disk.fileview import DiskFile, as_file
from cowfence.errors import Invalid, NoSpace
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, WritableBuffer


class MemoryDisk:
    """As much of a disk as a file view uses."""

    block_bytes = 512

    def __init__(self, size_bytes: int, *, writable: bool = True) -> None:
        self.content = bytearray(size_bytes)
        self.writable = writable
        self.flushes = 0
        self.closed = False

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        assert wait
        assert offset + len(buffer) <= self.size
        memoryview(buffer)[:] = memoryview(self.content)[offset : offset + len(buffer)]

    def read(self, offset: int, length_bytes: int) -> bytes:
        return bytes(self.content[offset : offset + length_bytes])

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        assert not fua
        assert offset + len(data) <= self.size
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushes += 1

    def close(self) -> None:
        self.closed = True

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        raise NotImplementedError

    def discard(self, offset: int, length_bytes: int) -> None:
        raise NotImplementedError

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        raise NotImplementedError

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        raise NotImplementedError


def test_tar_archives_are_written_and_read() -> None:
    disk = MemoryDisk(1 << 20)
    with as_file(disk) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = 70000
            archive.addfile(info, io.BytesIO(name.encode() * 70000))
    assert disk.flushes
    with as_file(disk) as stream, tarfile.open(fileobj=stream) as archive:
        assert archive.getnames() == ["a", "b"]
        member = archive.extractfile("b")
        assert member is not None
        assert member.read() == b"b" * 70000


def test_zip_archives_are_written_and_read() -> None:
    disk = MemoryDisk(40000)
    with zipfile.ZipFile(as_file(disk), "w") as archive:
        archive.writestr("name", b"content" * 1000)
    with as_file(disk, 512) as stream, zipfile.ZipFile(stream) as archive:
        assert archive.read("name") == b"content" * 1000


def test_digest_of_a_disk() -> None:
    disk = MemoryDisk(300001, writable=False)
    disk.content[150000] = 1
    with as_file(disk) as stream:
        assert hashlib.file_digest(stream, "sha256").digest() == hashlib.sha256(disk.content).digest()


@given(
    st.lists(
        st.tuples(st.sampled_from(["seek", "read", "write", "tell"]), st.integers(0, 1500), st.binary(max_size=700)),
        max_size=30,
    )
)
def test_a_view_behaves_like_a_file_of_fixed_size(steps: list[tuple[str, int, bytes]]) -> None:
    model = bytearray(1000)
    position = 0
    disk = MemoryDisk(1000)
    with DiskFile(disk) as raw:
        for verb, number, data in steps:
            match verb:
                case "seek":
                    assert raw.seek(number) == number
                    position = number
                case "read":
                    expected = bytes(model[position : position + number])
                    assert raw.read(number) == expected
                    position += len(expected)
                case "write" if position >= 1000 and data:
                    with pytest.raises(NoSpace):
                        raw.write(data)
                case "write":
                    fits = data[: max(0, 1000 - position)]
                    assert raw.write(data) == len(fits)
                    model[position : position + len(fits)] = fits
                    position += len(fits)
                case _:
                    assert raw.tell() == position
    assert disk.content == model


def test_buffers_of_any_item_size() -> None:
    disk = MemoryDisk(64)
    raw = DiskFile(disk)
    assert raw.write(array.array("I", [1, 2, 3])) == 12
    raw.seek(0)
    numbers = array.array("I", [0] * 3)
    assert raw.readinto(numbers) == 12
    assert numbers.tolist() == [1, 2, 3]


def test_seeking() -> None:
    raw = DiskFile(MemoryDisk(100))
    assert raw.seek(-10, os.SEEK_END) == 90
    assert raw.seek(5, os.SEEK_CUR) == 95
    assert raw.seek(1000) == 1000
    assert raw.read(1) == b""
    with pytest.raises(Invalid):
        raw.seek(-1)
    with pytest.raises(Invalid):
        raw.seek(0, 3)
    assert raw.tell() == 1000


def test_a_full_buffered_disk_says_so() -> None:
    stream = as_file(MemoryDisk(100), 16)
    stream.write(bytes(100))
    stream.flush()
    assert stream.write(bytes(8)) == 8
    with pytest.raises(NoSpace):
        stream.flush()
    with pytest.raises(NoSpace):
        stream.close()
    assert stream.raw.closed


def test_what_a_disk_does_not_do() -> None:
    read_only = DiskFile(MemoryDisk(100, writable=False))
    with pytest.raises(io.UnsupportedOperation):
        read_only.write(b"x")
    with pytest.raises(io.UnsupportedOperation):
        DiskFile(MemoryDisk(100)).truncate(50)
    with pytest.raises(Invalid):
        as_file(MemoryDisk(100), 0)
    assert isinstance(as_file(MemoryDisk(100, writable=False)), io.BufferedReader)


def test_closing() -> None:
    disk = MemoryDisk(100)
    raw = DiskFile(disk)
    raw.close()
    raw.close()
    assert disk.flushes == 1
    assert not disk.closed
    for call in (raw.tell, lambda: raw.seek(0), lambda: raw.read(1), lambda: raw.write(b"x")):
        with pytest.raises(ValueError, match="closed"):
            call()
    as_file(disk, close_disk=True).close()
    assert disk.closed


def test_closing_a_reader_flushes_nothing() -> None:
    disk = MemoryDisk(100, writable=False)
    as_file(disk).close()
    assert disk.flushes == 0
