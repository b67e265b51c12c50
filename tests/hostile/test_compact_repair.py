"""Hostile images under compaction, and under a repair that is taken back: no byte that could be read is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowfence.errors import CowfenceError
from cowfence.ops.compact import compact_disk
from cowfence.ops.repair import apply_storage, plan_storage, undo_storage
from cowfence.qcow2.image import Options, open_image
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.undo import UndoLog
from helpers_check import guest_clusters
from hostile.corpus import corpus, header_mutants, hostile_entries, patched, tables_of
from hostile.test_corpus import ALLOWED, SECONDS, TooSlow, bounded

NAMES = ("qemu-512", "qemu-v2", "ours-aged")


def readable(content: bytes) -> list[bytes | None]:
    try:
        # A damaged header may claim a disk of any size.
        return guest_clusters(content, most=20_000)
    except CowfenceError:
        return []


def compact(content: bytes, what: str) -> bool:
    """True if it was carried out. What could be read before can be read afterwards, carried out or refused."""
    memory, done = MemoryStorage(content, "hostile"), False
    try:
        with (
            bounded(),
            open_image(memory, backing=None, writable=True, options=Options(commit_interval=None)) as disk,
        ):
            compact_disk(disk)
            done = True
    except ALLOWED:
        pass
    except TooSlow:
        pytest.fail(f"{what}: more than {SECONDS} s")
    before = readable(content)
    if before:
        assert [old for old in before if old is not None] == [
            new for old, new in zip(before, readable(memory.snapshot()), strict=True) if old is not None
        ], what
    return done


def repair_and_undo(content: bytes, what: str, folder: Path) -> None:
    memory, kept = MemoryStorage(content, "hostile"), folder / "undo"
    try:
        with bounded():
            planned = plan_storage(memory)
            assert memory.snapshot() == content, what
            apply_storage(memory, undo_file=kept)
    except ALLOWED:
        assert memory.snapshot() == content, what
        return
    if planned.empty:
        assert memory.snapshot() == content, what
        return
    undo_storage(memory, UndoLog.decode(kept.read_bytes(), "undo"))
    kept.unlink()
    assert memory.snapshot() == content, what


@pytest.mark.parametrize("name", NAMES)
def test_header_fields(name: str, tmp_path: Path) -> None:
    content, dice = corpus(name), random.Random(name)
    assert compact(content, name)
    for damaged, what in header_mutants(name, dice):
        compact(damaged, what)
        repair_and_undo(damaged, what, tmp_path)


@pytest.mark.parametrize("kind", ["L1 table", "L2 table", "refcount table", "refcount block"])
@pytest.mark.parametrize("name", NAMES)
def test_table_entries(name: str, kind: str, tmp_path: Path) -> None:
    content, dice = corpus(name), random.Random(f"{name} {kind}")
    tables = tables_of(content)
    for offset, length_bytes in list(tables.of(kind))[:2]:
        for value in dice.sample(hostile_entries(content, tables), 12):
            at = offset + dice.randrange(min(length_bytes, 64) // 8) * 8
            damaged = patched(content, at, value.to_bytes(8))
            compact(damaged, f"{name}: {kind} at {at:#x} = {value:#x}")
            repair_and_undo(damaged, f"{name}: {kind} at {at:#x} = {value:#x}", tmp_path)
