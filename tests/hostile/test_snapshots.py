"""Hostile images under the operations on snapshots: carried out, or refused with nothing changed but the autoclear bits."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cowfence.crash.structure import fatal_findings
from cowfence.ops.snapshot import apply_snapshot, create_snapshot, delete_snapshot
from cowfence.qcow2.header import read_header
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.snapshot_table import read_snapshots
from cowfence.storage.memory import MemoryStorage
from hostile.corpus import corpus, header_mutants, hostile_entries, patched, tables_of
from hostile.test_corpus import ALLOWED, MEMORY_BYTES, READ_BYTES, SECONDS, TooSlow, Watched, bounded, check_tables

NAMES = ("qemu-512", "qemu-v2", "ours-aged")
_AUTOCLEAR = slice(88, 96)

OPERATIONS: dict[str, Callable[[Qcow2Disk], object]] = {
    "create": lambda disk: create_snapshot(disk, "new"),
    "apply": lambda disk: apply_snapshot(disk, "1"),
    "delete": lambda disk: delete_snapshot(disk, "1"),
}


def exercise(content: bytes, what: str) -> None:
    for name, operate in OPERATIONS.items():
        memory = MemoryStorage(content, "hostile")
        storage = Watched(memory)
        done = False
        try:
            with bounded():
                disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
                operate(disk)
                done = True
                disk.close()
        except ALLOWED:
            pass
        except TooSlow:
            pytest.fail(f"{what}: {name} took more than {SECONDS} s")
        except MemoryError:
            pytest.fail(f"{what}: {name} took more than {MEMORY_BYTES} bytes")
        after = memory.snapshot()
        if done:
            assert fatal_findings(after) == [], f"{what}: {name}"
        else:
            same = after[: _AUTOCLEAR.start] + content[_AUTOCLEAR] + after[_AUTOCLEAR.stop :]
            assert same == content, f"{what}: {name} was refused, and changed the image"
        check_tables(content, after, storage.written, f"{what}: {name}")
    read_all(content, what)


def read_all(content: bytes, what: str) -> None:
    """Every snapshot is listed and read, or refused."""
    storage = MemoryStorage(content, "hostile", writable=False)
    try:
        with bounded():
            for snapshot in read_snapshots(storage, read_header(storage))[:2]:
                again = MemoryStorage(content, "hostile", writable=False)
                with open_image(again, backing=None, writable=False, snapshot=snapshot.id) as disk:
                    disk.read(0, min(disk.size, READ_BYTES))
    except ALLOWED:
        pass
    except (TooSlow, MemoryError) as failure:
        pytest.fail(f"{what}: reading its snapshots: {failure!r}")


@pytest.mark.parametrize("name", NAMES)
def test_header_fields(name: str) -> None:
    for content, what in header_mutants(name, random.Random(name)):
        exercise(content, what)


@pytest.mark.parametrize("kind", ["L1 table", "L2 table", "refcount table", "refcount block", "snapshot's L1 table"])
@pytest.mark.parametrize("name", NAMES)
def test_table_entries(name: str, kind: str) -> None:
    content = corpus(name)
    tables = tables_of(content)
    chance = random.Random(f"{name} {kind}")
    for offset, length_bytes in list(tables.of(kind))[:2]:
        for value in chance.sample(hostile_entries(content, tables), 8):
            at = offset + chance.randrange(min(length_bytes, 64) // 8) * 8
            exercise(patched(content, at, value.to_bytes(8)), f"{name}: {kind} at {at:#x} = {value:#x}")


@pytest.mark.parametrize("name", NAMES)
def test_snapshot_table(name: str) -> None:
    content = corpus(name)
    tables = tables_of(content)
    for offset, _ in tables.of("snapshot table"):
        for at, length_bytes in ((0, 8), (8, 4), (12, 2), (14, 2), (36, 4), (48, 8)):
            bits = length_bytes * 8
            values = {0, 1, (1 << bits) - 1, 1 << bits - 1, 1 << bits // 2, 1 << 22, 1025}
            if not at:
                values |= set(random.Random(name).sample(hostile_entries(content, tables), 6))
            for value in sorted(value for value in values if value < 1 << bits):
                data = value.to_bytes(length_bytes)
                exercise(patched(content, offset + at, data), f"{name}: byte {at} of the snapshot = {value:#x}")


@pytest.mark.parametrize("name", NAMES)
def test_noise_in_the_tables_of_a_snapshot(name: str) -> None:
    """What only the snapshot leads to: its L2 tables, as far as they are its own."""
    content = corpus(name)
    chance = random.Random(name)
    storage = MemoryStorage(content, "sound", writable=False)
    snapshot = read_snapshots(storage, read_header(storage))[0]
    for word in range(min(snapshot.l1_entries, 2)):
        at = snapshot.l1_offset + word * 8
        table = int.from_bytes(content[at : at + 8]) & 0x00FF_FFFF_FFFF_FE00
        for _ in range(8 if table else 0):
            place = table + chance.randrange(64) * 8
            value = chance.choice([chance.getrandbits(64), 1 << 63 | chance.randrange(200) << 9, chance.randrange(64) << 12])
            exercise(patched(content, place, value.to_bytes(8)), f"{name}: L2 of the snapshot at {place:#x} = {value:#x}")
