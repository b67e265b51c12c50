"""How persistent bitmaps are stored: what is written, and what is left where it stands."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

import pytest

import cowfence
from cowfence.qcow2.bitmap_directory import BitmapEntry, read_bitmap_directory
from cowfence.units import KIB, MIB

SIZE = 64 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """With a bitmap, ``b``, in which every second 4 KiB of the first half is dirty."""
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE) as disk:
        disk.bitmaps.add("b", granularity_bytes=4 * KIB)
        for at in range(0, SIZE // 2, 8 * KIB):
            disk.write(at, b"x")
    return path


def entry(path: Path) -> BitmapEntry:
    with cowfence.open(path) as disk:
        assert disk.header.bitmaps is not None
        (found,) = read_bitmap_directory(disk.storage, disk.header.bitmaps, disk._state.geometry)
    return found


def test_bits_that_did_not_change_are_not_stored_anew(image: Path) -> None:
    before, content = entry(image), image.read_bytes()
    with cowfence.open(image, writable=True) as disk:
        disk.write(0, b"dirty already")
        disk.write(16 * KIB, b"this too")
    assert entry(image) == before
    with cowfence.open(image) as disk:
        assert len(disk.bitmaps.ranges("b")) == SIZE // 2 // (8 * KIB)
        table = disk.storage.size()
    at = before.table_offset
    assert image.read_bytes()[at : at + 64 * KIB] == content[at : at + 64 * KIB]
    assert table < len(content) + 256 * KIB


def test_bits_that_changed_are(image: Path) -> None:
    before = entry(image)
    with cowfence.open(image, writable=True) as disk:
        disk.write(SIZE - 1, b"x")
    after = entry(image)
    assert after.table_offset != before.table_offset
    with cowfence.open(image) as disk:
        assert disk.bitmaps.ranges("b")[-1] == (SIZE - 4 * KIB, 4 * KIB)


def test_a_cleared_bitmap_is_stored(image: Path) -> None:
    with cowfence.open(image, writable=True) as disk:
        disk.bitmaps.clear("b")
        disk.bitmaps.disable("b")
    with cowfence.open(image) as disk:
        assert disk.bitmaps.ranges("b") == []


def test_a_disk_of_another_size_has_a_table_of_another_length(image: Path) -> None:
    from cowfence.ops.resize import resize_disk

    with cowfence.open(image, writable=True) as disk:
        resize_disk(disk, 64 * SIZE)
    with cowfence.open(image, writable=True) as disk:
        assert disk.bitmaps.ranges("b")[-1] == (SIZE, 63 * SIZE)
        resize_disk(disk, SIZE, shrink=True)
    with cowfence.open(image) as disk:
        assert disk.bitmaps.ranges("b")[-1] == (SIZE // 2 - 8 * KIB, 4 * KIB)


@pytest.mark.parametrize(
    ("where", "command"),
    [
        ("Bitmaps.__init__", lambda disk: disk.bitmaps.add("other")),
        ("_entries", lambda disk: disk.bitmaps.add("other")),
        ("_entries", lambda disk: list(disk.bitmaps)),
        ("_read_bits", lambda disk: disk.bitmaps.enable("mon")),
    ],
)
def test_a_command_that_comes_with_the_first_write_does_not_stop_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, command: Callable[[cowfence.Qcow2Disk], object]
) -> None:
    """Both look at what is on disk, one of them slowly."""
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, 4 * MIB) as disk:
        disk.bitmaps.add("mon")
    target = f"cowfence.qcow2.bitmaps.{where}"
    function = resolve_name(target.replace("bitmaps.", "bitmaps:", 1))
    looked, written = threading.Event(), threading.Event()

    def slowly(*args: object, **keywords: object) -> object:
        found = function(*args, **keywords)
        if threading.current_thread() is slow and not looked.is_set():
            looked.set()
            written.wait(0.3)
        return found

    monkeypatch.setattr(target, slowly)
    with cowfence.open(path, writable=True) as disk:
        slow = threading.Thread(target=command, args=(disk,))
        slow.start()
        assert looked.wait(10)
        disk.write(0, b"first")
        written.set()
        slow.join(10)
        disk.write(2 * MIB, b"second")
    with cowfence.open(path) as disk:
        assert [at for at, _ in disk.bitmaps.ranges("mon")] == [0, 2 * MIB]
