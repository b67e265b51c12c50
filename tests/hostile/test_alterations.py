"""Hostile images under resizing, rebasing, committing and amending: carried out, or refused; no table is written over."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cowfence.disk.raw import RawDisk
from cowfence.ops.amend import Amendment, amend_disk
from cowfence.ops.commit import commit_disk
from cowfence.ops.rebase import rebase_disk
from cowfence.ops.resize import resize_disk
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.storage.memory import MemoryStorage
from hostile.corpus import corpus, header_mutants, hostile_entries, patched, tables_of
from hostile.test_corpus import ALLOWED, MEMORY_BYTES, SECONDS, TooSlow, Watched, bounded, check_tables

NAMES = ("qemu-512", "qemu-v2", "ours-aged")
_BELOW_BYTES = 8192

OPERATIONS: dict[str, Callable[[Qcow2Disk, RawDisk], object]] = {
    "shrink": lambda disk, _: resize_disk(disk, 1024, shrink=True),
    "grow": lambda disk, _: resize_disk(disk, disk.size // 512 * 512 + 100 * 512),
    "rebase": lambda disk, _: rebase_disk(disk, None, None, None),
    "commit": commit_disk,
    "refcounts": lambda disk, _: amend_disk(disk, Amendment(refcount_bits=32)),
    "version": lambda disk, _: amend_disk(disk, Amendment(version=5 - disk.header.version)),
}


def exercise(content: bytes, what: str, chance: random.Random) -> None:
    """Two of the operations, each on a copy."""
    for name in chance.sample(list(OPERATIONS), 2):
        memory = MemoryStorage(content, "hostile")
        storage = Watched(memory)
        base = RawDisk(MemoryStorage(bytes(_BELOW_BYTES), "below"))
        try:
            with bounded():
                disk = open_image(storage, backing=base, writable=True, options=Options(commit_interval=None))
                OPERATIONS[name](disk, base)
                disk.close()
        except ALLOWED:
            pass
        except TooSlow:
            pytest.fail(f"{what}: {name} took more than {SECONDS} s")
        except MemoryError:
            pytest.fail(f"{what}: {name} took more than {MEMORY_BYTES} bytes")
        check_tables(content, memory.snapshot(), storage.written, f"{what}: {name}")


@pytest.mark.parametrize("name", NAMES)
def test_header_fields(name: str) -> None:
    chance = random.Random(name)
    for content, what in header_mutants(name, chance):
        exercise(content, what, chance)


@pytest.mark.parametrize("kind", ["L1 table", "L2 table", "refcount table", "refcount block"])
@pytest.mark.parametrize("name", NAMES)
def test_table_entries(name: str, kind: str) -> None:
    content = corpus(name)
    tables = tables_of(content)
    chance = random.Random(f"{name} {kind}")
    for offset, length_bytes in list(tables.of(kind))[:2]:
        for value in chance.sample(hostile_entries(content, tables), 12):
            at = offset + chance.randrange(min(length_bytes, 64) // 8) * 8
            exercise(patched(content, at, value.to_bytes(8)), f"{name}: {kind} at {at:#x} = {value:#x}", chance)
