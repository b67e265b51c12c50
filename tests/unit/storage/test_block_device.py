"""Block devices, through a loop device: only root can make one, so elsewhere these are skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfence.errors import Locked, NoSpace, Refused, Unsupported
from cowfence.storage.base import read_exact
from cowfence.storage.file import FileStorage
from cowfence.storage.publish import NewFile

DEVICE_BYTES = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    losetup = shutil.which("losetup", path="/usr/sbin:/sbin:/usr/bin")
    if os.geteuid() != 0 or losetup is None:
        pytest.skip("a loop device needs root and losetup (Debian: mount)")
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xaa" * DEVICE_BYTES)
    made = subprocess.run([losetup, "-f", "--show", backing], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run([losetup, "-d", made.stdout.strip()], check=True)


@pytest.mark.parametrize("direct", [False, True])
def test_a_device_is_read_written_and_zeroed_at_any_offset(device: str, direct: bool) -> None:
    storage = FileStorage.open(device, writable=True, direct=direct)
    try:
        assert storage.size() == DEVICE_BYTES
        assert not storage.capabilities().holes_past_end
        storage.writev(1000, (b"b" * 5000,), "test")
        storage.zero(3000, 9000, "test")
        storage.fence("test")
        expected = (b"\xaa" * 1000 + b"b" * 2000 + bytes(9000)).ljust(DEVICE_BYTES, b"\xaa")
        assert read_exact(storage, 0, DEVICE_BYTES, "content") == expected
        storage.discard(100, 70_000, "test")
        assert read_exact(storage, 0, 100, "head") == expected[:100]
        assert read_exact(storage, 70_100, 1000, "tail") == expected[70_100:71_100]
        assert [(extent.start, extent.end, extent.data) for extent in storage.extents(0, 1 << 40)] == [(0, DEVICE_BYTES, True)]
    finally:
        storage.close()


def test_its_length_is_fixed(device: str) -> None:
    storage = FileStorage.open(device, writable=True)
    try:
        storage.truncate(DEVICE_BYTES, "test")
        with pytest.raises(Unsupported):
            storage.truncate(DEVICE_BYTES // 2, "test")
        with pytest.raises(NoSpace):
            storage.truncate(DEVICE_BYTES * 2, "test")
        with pytest.raises(NoSpace):
            storage.writev(DEVICE_BYTES - 2, (b"1234",), "test")
    finally:
        storage.close()


def test_it_can_be_refused(device: str) -> None:
    with pytest.raises(Refused):
        FileStorage.open(device, allow_devices=False)


def test_a_new_image_is_written_in_place_under_lock(device: str) -> None:
    with NewFile(device) as new:
        assert new.in_place
        with pytest.raises(Locked):
            FileStorage.open(device)
        new.storage.writev(0, (b"new",), "test")
        new.publish()
    reader = FileStorage.open(device)
    assert read_exact(reader, 0, 4, "content") == b"new\xaa"
    reader.close()
