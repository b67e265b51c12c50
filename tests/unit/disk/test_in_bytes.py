"""Data that is counted in items larger than a byte: every disk takes all of its bytes, and none past its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cowfence.disk.base import BLOCKED, Disk, Request, Verb, in_bytes, range_of
from cowfence.disk.detect import DetectZeroes
from cowfence.disk.raw import RawDisk
from cowfence.disk.window import WindowDisk
from cowfence.errors import OutOfRange
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.export import Export
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, open_image
from cowfence.storage.memory import MemoryStorage
from helpers_nbd import serving

SIZE = 64 * 512
WORDS = memoryview(np.arange(1, 257, dtype="<u8").data)
ROWS = memoryview(np.arange(2048, dtype=np.uint8).reshape(4, 512).data)
ZEROS = memoryview(np.zeros(256, dtype="<u8").data)


def _qcow2(written: int) -> Disk:
    storage = MemoryStorage(name="image")
    write_new(storage, NewImage(SIZE, 512))
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
    disk.write(SIZE - written, b"\xff" * written)
    disk.flush()
    return disk


def _raw() -> RawDisk:
    return RawDisk(MemoryStorage(b"\xff" * SIZE, "raw", writable=True))


@pytest.fixture(params=["new clusters", "old clusters", "raw", "window", "detect", "nbd"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "nbd":
        with serving(tmp_path, {"": Export(_raw())}), NbdDisk(f"nbd+unix:///?socket={tmp_path / 'sock'}") as remote:
            yield remote
        return
    made: dict[str, Disk] = {
        "new clusters": _qcow2(512),
        "old clusters": _qcow2(SIZE),
        "raw": _raw(),
        "window": WindowDisk(_raw(), 512),
        "detect": DetectZeroes(_raw(), unmap=False),
    }
    yield made[request.param]
    for one in made.values():
        one.close()


@pytest.mark.parametrize("data", [WORDS, ROWS, ZEROS], ids=["words", "rows", "zeros"])
@pytest.mark.parametrize("by", ["write", "submit", "without waiting"])
def test_all_bytes_and_no_others(disk: Disk, data: memoryview, by: str) -> None:
    model = bytearray(disk.read(0, disk.size))
    model[512 : 512 + 2048] = data.tobytes()
    request = Request(Verb.WRITE, 512, 0, data)
    if by == "write":
        disk.write(512, data)
    elif by == "submit":
        assert disk.submit([request]) == [None]
    elif disk.submit([request], wait=False) == [BLOCKED]:
        disk.write(512, data)
    assert disk.read(0, disk.size) == model


def test_none_past_the_end(disk: Disk) -> None:
    before = disk.read(0, disk.size)
    place = disk.size - 1024
    with pytest.raises(OutOfRange):
        disk.write(place, WORDS)
    for wait in (False, True):
        (outcome,) = disk.submit([Request(Verb.WRITE, place, 0, WORDS)], wait=wait)
        assert isinstance(outcome, OutOfRange)
    assert disk.read(0, disk.size) == before


def test_a_raw_disk_fills_a_buffer_of_words() -> None:
    disk = _raw()
    words = np.zeros(64, dtype="<u8")
    disk.read_into(0, words.data)
    assert words.tobytes() == b"\xff" * 512
    with pytest.raises(OutOfRange):
        disk.read_into(SIZE - 100, words.data)
    disk.close()


def test_lengths_are_in_bytes() -> None:
    assert range_of(Request(Verb.WRITE, 512, 0, WORDS)) == (512, 512 + 2048)
    assert [len(in_bytes(data)) for data in (WORDS, ROWS, b"ab", bytearray(3), memoryview(b"abcd"))] == [2048, 2048, 2, 3, 4]
