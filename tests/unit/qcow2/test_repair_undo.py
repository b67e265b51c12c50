"""Repair with a plan and a way back: the same bytes after an undo, from every place where a crash may have stopped it."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_repair import REPAIRABLE, UNREPAIRABLE, Damage, leak, too_low_and_leaked

from cowfence.errors import Corrupt, CowfenceError, Invalid, StorageFailed
from cowfence.ops.meanings import explain
from cowfence.ops.repair import Mode, apply_storage, plan_storage, read_plan, undo, undo_storage, write_plan
from cowfence.qcow2.findings import Finding, Grade, Problem
from cowfence.storage.base import Buffer
from cowfence.storage.fault import Arrived, FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import OpLog, Write
from cowfence.storage.record import RecordingStorage
from cowfence.storage.undo import GuardedStorage, UndoLog
from helpers_check import Scalpel, new_image


def damaged(damage: Damage) -> bytes:
    image = Scalpel(new_image())
    damage(image)
    return bytes(image.data)


def log_of(data: bytes) -> UndoLog:
    storage = MemoryStorage(data, writable=False)
    planned = plan_storage(storage)
    return UndoLog.of(storage, planned.operations, planned.new_bytes)


@pytest.mark.parametrize("damage", [*REPAIRABLE, *UNREPAIRABLE], ids=lambda damage: damage.__name__)
def test_the_plan_is_what_the_repair_does_and_undo_takes_it_back(damage: Damage, tmp_path: Path) -> None:
    before = damaged(damage)
    storage, log = MemoryStorage(before), OpLog()
    planned = plan_storage(storage)
    assert storage.snapshot() == before
    done = apply_storage(RecordingStorage(storage, log), undo_file=tmp_path / "undo")
    assert done.plan.digest == planned.digest
    repaired = storage.snapshot()
    covered = bytearray(max(len(before), len(repaired)))
    for offset, length_bytes in planned.ranges:
        covered[offset : offset + length_bytes] = b"\1" * length_bytes
    for operation in log.operations():
        if isinstance(operation, Write):
            assert all(covered[operation.offset : operation.offset + len(operation.data)])
    if planned.empty:
        assert repaired == before
        assert not (tmp_path / "undo").exists()
        return
    undo_storage(storage, UndoLog.decode((tmp_path / "undo").read_bytes(), "undo"))
    assert storage.snapshot() == before


@pytest.mark.parametrize("damage", REPAIRABLE, ids=lambda damage: damage.__name__)
def test_undo_from_every_state_that_a_crash_leaves(damage: Damage) -> None:
    """Any sector may hold any of its versions, and the file any length between."""
    before = damaged(damage)
    log = log_of(before)
    for number in itertools.count(1):
        # The repair stops at its n-th write, of which half arrives; then the undo stops at its n-th write, and runs again.
        storage = MemoryStorage(before)
        faults = FaultPlan(number, kinds={Kind.WRITE}, arrived=Arrived.HALF)
        try:
            apply_storage(FaultyStorage(storage, faults))
            finished = True
        except StorageFailed:
            finished = False
        half = storage.snapshot()
        for stop in itertools.count(1):
            again = MemoryStorage(half)
            log.check(again)
            try:
                undo_storage(FaultyStorage(again, FaultPlan(stop, kinds={Kind.WRITE}, arrived=Arrived.HALF)), log)
                complete = True
            except StorageFailed:
                complete = False
            undo_storage(again, log)
            assert again.snapshot() == before
            if complete or stop > 6:
                break
        if finished:
            break


@pytest.mark.parametrize("damage", REPAIRABLE, ids=lambda damage: damage.__name__)
def test_undo_from_any_mix_that_a_power_cut_leaves(damage: Damage) -> None:
    """Each sector in any of its versions, independently: more than the fences allow."""
    before = damaged(damage)
    log, dice = log_of(before), random.Random(7)
    versions: dict[int, list[bytes]] = {}
    storage = MemoryStorage(before)
    for operation in plan_storage(MemoryStorage(before)).operations:
        if isinstance(operation, Write):
            end = operation.offset + len(operation.data)
            for step in (0, 1):
                content = storage.snapshot().ljust(end + 511 & ~511, b"\0")
                for number in range(operation.offset // 512, (end + 511) // 512):
                    if not step:
                        versions.setdefault(number, [content[number * 512 : number * 512 + 512]])
                    else:
                        versions[number].append(content[number * 512 : number * 512 + 512])
                storage.writev(operation.offset, (operation.data,), "test")
    for _ in range(50):
        cut = MemoryStorage(before)
        for number, contents in versions.items():
            cut.writev(number * 512, (dice.choice(contents),), "test")
        cut.truncate(dice.randrange(log.old_bytes, log.new_bytes + 1, 512), "test")
        undo_storage(cut, log)
        assert cut.snapshot() == before


def test_the_undo_file_is_durable_before_the_first_change(tmp_path: Path) -> None:
    before = damaged(too_low_and_leaked)

    class Watching(MemoryStorage):
        def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
            log = UndoLog.decode((tmp_path / "undo").read_bytes(), "undo")
            log.check(self)
            super().writev(offset, buffers, mark)

    apply_storage(Watching(before), undo_file=tmp_path / "undo")


def test_what_was_not_planned_is_not_written() -> None:
    before = damaged(leak)
    storage = MemoryStorage(before)
    guard = GuardedStorage(storage, log_of(before))
    changes: tuple[Callable[[], None], ...] = (
        lambda: guard.writev(0, (b"QFI\0",), "test"),
        lambda: guard.writev(len(before), (b"x",), "test"),
        lambda: guard.zero(0, 1, "test"),
        lambda: guard.discard(0, 1, "test"),
        lambda: guard.truncate(0, "test"),
    )
    for change in changes:
        with pytest.raises(Corrupt, match="not in the plan"):
            change()
    assert storage.snapshot() == before


def test_a_stale_plan_is_refused(tmp_path: Path) -> None:
    path, kept = tmp_path / "image", tmp_path / "plan"
    path.write_bytes(damaged(leak))
    write_plan(plan_storage(MemoryStorage(path.read_bytes())), kept, path)
    stored = read_plan(kept)
    changed = Scalpel(path.read_bytes())
    changed.append(1)
    storage = MemoryStorage(bytes(changed.data))
    with pytest.raises(Invalid, match="no longer the one"):
        apply_storage(storage, stored=stored, undo_file=tmp_path / "undo")
    assert storage.snapshot() == changed.data
    assert not (tmp_path / "undo").exists()
    with pytest.raises(Invalid, match="-r all"):
        apply_storage(storage, Mode.LEAKS, stored=stored)
    storage = MemoryStorage(path.read_bytes())
    assert apply_storage(storage, stored=stored).exit_code == 0
    with pytest.raises(Invalid, match="image itself"):
        write_plan(plan_storage(storage), path, path)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"\xff", b'{"format": "cowfence-repair-plan", "version": 2}', b"[" * 100_000]
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "plan").write_bytes(text)
    with pytest.raises(Corrupt, match="no repair plan"):
        read_plan(tmp_path / "plan")


def test_foreign_and_changed_images_are_refused() -> None:
    before = damaged(too_low_and_leaked)
    log = log_of(before)
    repaired = MemoryStorage(before)
    apply_storage(repaired)
    number = next(iter(log.sectors))
    changed = bytearray(repaired.snapshot())
    changed[number * 512 + 100] ^= 1
    for other in (bytes(changed), new_image(writes=9), b"", repaired.snapshot() + bytes(512)):
        storage = MemoryStorage(other)
        with pytest.raises(Invalid):
            undo_storage(storage, log)
        assert storage.snapshot() == other


@pytest.mark.parametrize("damage", REPAIRABLE, ids=lambda damage: damage.__name__)
def test_later_work_on_any_sector_that_the_repair_wrote_is_seen(damage: Damage) -> None:
    """In a new refcount block of several sectors most are zeros on zeros; a count that comes there later must not be lost."""
    image = Scalpel(new_image(cluster_bytes=4096, size_bytes=1 << 20))
    damage(image)
    before = bytes(image.data)
    log, repaired = log_of(before), MemoryStorage(before)
    apply_storage(repaired)
    for operation in plan_storage(MemoryStorage(before)).operations:
        if isinstance(operation, Write):
            for number in range(operation.offset // 512, (operation.offset + len(operation.data) + 511) // 512):
                later = bytearray(repaired.snapshot())
                later[number * 512 + 511] ^= 0x5A
                storage = MemoryStorage(bytes(later))
                with pytest.raises(Invalid, match="not as it was left"):
                    undo_storage(storage, log)
                assert storage.snapshot() == later


def test_damaged_undo_files_are_refused(tmp_path: Path) -> None:
    whole = log_of(damaged(too_low_and_leaked)).encode()
    image = tmp_path / "image"
    image.write_bytes(b"untouched")
    for data in (b"", whole[:7], whole[:-1], whole + b"x", b"x" + whole, whole[:100] + b"\xee" + whole[101:]):
        (tmp_path / "undo").write_bytes(data)
        with pytest.raises(Corrupt):
            undo(image, tmp_path / "undo")
    assert image.read_bytes() == b"untouched"


def test_hostile_undo_files_with_a_right_sum_are_refused() -> None:
    log = log_of(damaged(leak))
    body = log.encode()[64:]
    record = body[: 10 + 512 + 16 * int.from_bytes(body[8:10])]

    def made(old: int, new: int, count: int, content: bytes) -> bytes:
        return struct.pack(">8sQQQ32s", b"cowundo1", old, new, count, hashlib.sha256(content).digest()) + content

    size = log.new_bytes
    UndoLog.decode(made(size, size, 1, record), "undo")
    for data in (
        made(size, size - 1, 1, record),
        made(size, 1 << 63, 1, record),
        made(size, size, 2, record),
        made(size, size, 2, record + record),
        made(size, size, 1, b"\xff" * 8 + record[8:]),
        made(size, size, 1, record[:8] + b"\0\0" + record[10:]),
        made(size, size, 1, record[:8] + b"\xff\xff" + record[10:]),
        made(size, size, 1, record[:-1] + bytes([record[-1] ^ 1])),
        made(size, size, 1, record[:5]),
    ):
        with pytest.raises(Corrupt):
            UndoLog.decode(data, "undo")


def test_an_undo_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "undo").write_bytes(b"precious")
    storage = MemoryStorage(damaged(leak))
    with pytest.raises(Invalid, match="never overwritten"):
        apply_storage(storage, undo_file=tmp_path / "undo")
    with pytest.raises(CowfenceError):
        apply_storage(storage, undo_file=tmp_path / "nowhere" / "undo")
    assert storage.snapshot() == damaged(leak)


def test_every_problem_is_explained() -> None:
    for problem in Problem:
        for grade in Grade:
            assert all(explain(Finding(problem, grade, "L2")))
