"""``compare`` and ``diff`` of disks in memory, against what a look at every byte says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import cowfence
from cowfence.disk.joined import JoinedDisk
from cowfence.disk.raw import RawDisk
from cowfence.errors import Invalid, OutOfRange, ReadOnly
from cowfence.ops.bench import Load, bench
from cowfence.ops.compare import compare
from cowfence.ops.diff import diff
from cowfence.storage.memory import MemoryStorage
from helpers_cli import cowfence as command


def raw(content: bytes) -> RawDisk:
    return RawDisk(MemoryStorage(content, name="disk", writable=False))


@pytest.mark.parametrize("seed", range(12))
def test_against_every_byte(seed: int) -> None:
    rng = random.Random(seed)
    before = bytearray(rng.choice([b"\0" * 512, b"a" * 512, rng.randbytes(512)]) * 400)
    after = bytearray(before)
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(after))
        length = min(rng.choice([1, 512, 5000]), len(after) - at)
        after[at : at + length] = rng.choice([bytes(length), rng.randbytes(length)])
    after = after[: rng.choice([len(after), len(after) - 512 * rng.randrange(20)])]
    if rng.random() < 0.4:
        after += rng.choice([bytes(3000), b"more" * 300])
    after = after[: len(after) - len(after) % 512]
    first, second = raw(bytes(before)), raw(bytes(after))
    shorter, longer = sorted((bytes(before), bytes(after)), key=len)
    padded = shorter.ljust(len(longer), b"\0")
    wrong = next((at for at in range(len(longer)) if padded[at] != longer[at]), None)
    found = compare(first, second)
    assert found.mismatch_offset == (None if wrong is None else wrong & ~511)
    assert found.identical is (wrong is None)
    unit = rng.choice([512, 4096])
    old = bytes(before).ljust(len(after), b"\0")
    expected = {at for at in range(0, len(after), unit) if old[at : min(at + unit, len(after))] != after[at : at + unit]}
    changes = list(diff(first, second, unit_bytes=unit))
    assert {at for change in changes for at in range(change.start, change.start + change.length_bytes, unit)} == expected
    patched = bytearray(old[: len(after)])
    for change in changes:
        end = change.start + change.length_bytes
        assert change.zero is not any(after[change.start : end])
        patched[change.start : end] = after[change.start : end]
    assert patched == after


def test_the_unit_is_checked() -> None:
    for unit in (0, 100, 513, 1 << 30):
        with pytest.raises(Invalid):
            list(diff(raw(bytes(512)), raw(bytes(512)), unit_bytes=unit))


def test_joined_disks_are_one() -> None:
    parts = [b"a" * 1024, b"b" * 512, b"c" * 2048]
    disk = JoinedDisk([raw(part) for part in parts])
    whole = b"".join(parts)
    assert disk.size == len(whole)
    for at in range(0, disk.size, 100):
        assert disk.read(at, min(700, disk.size - at)) == whole[at : at + 700]
    assert sum(extent.length_bytes for extent in disk.extents(0, disk.size)) == disk.size
    with pytest.raises(OutOfRange):
        disk.read(disk.size, 1)
    with pytest.raises(ReadOnly):
        disk.write(0, b"x")


def test_bench_sends_what_it_says() -> None:
    storage = MemoryStorage(bytes(65536), name="disk")
    done = bench(
        RawDisk(storage),
        Load(count=10, depth=3, request_bytes=512, step_bytes=1024, is_write=True, pattern=7, flush_interval=5),
    )
    assert done.seconds >= 0
    assert storage.snapshot() == b"".join((b"\7" * 512 if n < 10 else bytes(512)) + bytes(512) for n in range(64))
    with pytest.raises(Invalid, match="larger than the image"):
        bench(RawDisk(storage), Load(request_bytes=1 << 20))


def test_diff_of_a_snapshot_and_now(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with cowfence.create(path, 1 << 20) as disk:
        disk.write(0, b"a" * 200_000)
        cowfence.create_snapshot(disk, "s")
        disk.write(70_000, b"b" * 10)
        disk.zero(131_072, 65_536)
    done = json.loads(command("diff", "--output", "json", "-l", "s", str(path)).stdout)
    assert done == [
        {"start": 65536, "length": 65536, "zero": False},
        {"start": 131072, "length": 65536, "zero": True},
    ]
    human = command("diff", "--unit", "512", "-l", "s", str(path)).stdout.splitlines()
    assert human[1].split() == ["0x11000", "0x200", "data"]
