"""Alterations of an image that several guests write to all the while, tables of which grow and move."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

import cowfence
from cowfence.disk.base import Request, Verb
from cowfence.ops.resize import resize_disk
from cowfence.qcow2.image import Qcow2Disk
from judges import run

SIZE = 16 << 20
SECONDS = 3.0


class Guests:
    """Threads on a disk, each with a part of its own that it knows the content of."""

    def __init__(self, disk: Qcow2Disk, seed: int) -> None:
        self.disk, self.seed = disk, seed
        self.content = bytearray(SIZE)
        self.errors: list[BaseException] = []
        self._until = time.monotonic() + SECONDS

    def run(self) -> None:
        threads = [threading.Thread(target=self._guarded, args=(self._write, number)) for number in range(3)]
        threads.append(threading.Thread(target=self._guarded, args=(self._alter, 3)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _guarded(self, work: object, number: int) -> None:
        rng = random.Random(self.seed * 10 + number)
        try:
            while time.monotonic() < self._until and not self.errors:
                work(number, rng)  # type: ignore[operator]
        except BaseException as error:
            self.errors.append(error)

    def _write(self, number: int, rng: random.Random) -> None:
        disk, content = self.disk, self.content
        start = number * (SIZE // 4) + rng.randrange(SIZE // 4 - 70_000)
        length, kind = rng.choice([512, 4096, 3, 65536]), rng.random()
        data = bytes([rng.randrange(1, 255)]) * length
        if kind < 0.5:
            disk.write(start, data)
        elif kind < 0.6:
            data = bytes(length)
            disk.zero(start, length)
        elif kind < 0.7:
            start -= start % disk.block_bytes
            data = data[:1] * disk.block_bytes
            disk.write_compressed(start, data)
        elif kind < 0.85:
            outcomes = disk.submit([Request(Verb.READ, start, length), Request(Verb.WRITE, start, length, data)])
            assert outcomes[1] is None, outcomes
        elif kind < 0.9:
            disk.flush()
            return
        else:
            assert disk.read(start, length) == content[start : start + length]
            return
        content[start : start + len(data)] = data

    def _alter(self, number: int, rng: random.Random) -> None:  # noqa: ARG002
        disk = self.disk
        snapshots, bitmaps = disk.snapshots(), [bitmap.name for bitmap in disk.bitmaps]
        match rng.randrange(7):
            case 0 if len(snapshots) < 3:
                cowfence.create_snapshot(disk, f"s{rng.randrange(10**6)}")
            case 1 if snapshots:
                cowfence.delete_snapshot(disk, snapshots[0].name)
            case 2 if len(bitmaps) < 3:
                disk.bitmaps.add(f"b{rng.randrange(10**6)}", granularity_bytes=rng.choice([512, 65536]))
            case 3 if bitmaps:
                disk.bitmaps.remove(bitmaps[0])
            case 4 if bitmaps:
                disk.bitmaps.clear(bitmaps[-1])
            case 5 if bitmaps:
                disk.bitmaps.disable(bitmaps[-1])
                disk.bitmaps.enable(bitmaps[-1])
            case 6:
                resize_disk(disk, SIZE + rng.randrange(64) * 512, shrink=True)
        time.sleep(rng.random() * 0.03)


@pytest.mark.parametrize(("cluster_bytes", "refcount_bits"), [(512, 64), (512, 16), (4096, 8), (65536, 16)])
def test_guests_find_what_they_wrote(tmp_path: Path, cluster_bytes: int, refcount_bits: int) -> None:
    """With 512-byte clusters the refcount table grows and moves several times."""
    path = tmp_path / "disk.qcow2"
    disk = cowfence.create(path, SIZE, cluster_size=cluster_bytes, refcount_bits=refcount_bits)
    guests = Guests(disk, cluster_bytes + refcount_bits)
    guests.run()
    assert disk.read(0, SIZE) == guests.content
    disk.close()
    run(["qemu-img", "check", path])
    with cowfence.open(path) as again:
        assert again.read(0, SIZE) == guests.content


def test_the_header_is_changed_as_it_is_on_disk(tmp_path: Path) -> None:
    """The refcount table moved after the image was opened, and the next change of the header leaves it where it is."""
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE, cluster_size=512, refcount_bits=64) as disk:
        before = disk.header.refcount_table_offset
        disk.write(0, b"x" * (4 << 20))
        disk.flush()
        disk.bitmaps.add("b")
        assert disk.header.refcount_table_offset != before
        disk.write(8 << 20, b"y" * (4 << 20))
        disk.bitmaps.add("c")
        assert disk.read(0, 4 << 20) == b"x" * (4 << 20)
    run(["qemu-img", "check", path])
