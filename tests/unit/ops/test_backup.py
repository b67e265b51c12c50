"""What a backup of a live disk is called, and what the tables tell of the time since its moment."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cowfence
from cowfence.errors import Invalid
from cowfence.ops import backup as ops_backup
from cowfence.ops.backup import BackupPlan, begin_backup, end_backup, left_behind, plan_of
from cowfence.ops.diff import diff
from cowfence.ops.resize import resize_disk
from cowfence.qcow2.since import changed_since
from cowfence.qcow2.snapshot_table import new_snapshot
from cowfence.service.backup import Backup
from cowfence.units import KIB, MIB

SIZE = 8 * MIB
_SNAPSHOT = new_snapshot("1", "", l1_offset=0, l1_entries=0, disk_size_bytes=0, date_nanoseconds=0)
_NAMES = st.binary(min_size=1).map(lambda name: name.decode("utf-8", "surrogateescape"))


@given(_NAMES, st.none() | st.tuples(_NAMES, _NAMES))
@settings(max_examples=50)
def test_the_name_of_a_moment_is_its_plan(name: str, bitmaps: tuple[str, str] | None) -> None:
    plan = BackupPlan(name, *(bitmaps or ()))
    assert plan_of(replace(_SNAPSHOT, name=plan.snapshot_name)) == plan
    assert plan.snapshot_name.isascii()


def test_any_other_snapshot_is_of_no_backup() -> None:
    assert plan_of(replace(_SNAPSHOT, name="backup")) is None


@pytest.mark.parametrize("end", ["b", "b?bitmap=one", "b?next-bitmap=one&bitmap=", "b?&=&%", "b?bitmap"])
def test_a_name_that_somebody_else_has_made_is_that_of_a_whole_backup(end: str) -> None:
    assert plan_of(replace(_SNAPSHOT, name=f"cowfence-backup:{end}")) == BackupPlan("b")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("extended", [False, True])
def test_what_has_changed_since_a_snapshot(tmp_path: Path, seed: int, extended: bool) -> None:
    """All that differs is in it; and nothing of clusters that nobody touched."""
    rng = random.Random(seed)
    cluster = 16 * KIB
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE, cluster_size=cluster, extended_l2=extended) as disk:
        disk.write(0, rng.randbytes(MIB))
        disk.write_compressed(2 * MIB, b"c" * 2 * cluster)
        begin_backup(disk, BackupPlan("b"))
        (moment,) = disk.snapshots()
        touched = set()
        for _ in range(rng.randrange(12)):
            at, length = rng.randrange(SIZE - 70_000), rng.randrange(1, 70_000)
            touched |= set(range(at // cluster, (at + length - 1) // cluster + 1))
            if rng.randrange(2):
                disk.write(at, rng.randbytes(length))
            else:
                disk.zero(at, length)
        if seed:
            resize_disk(disk, SIZE + MIB)
            touched |= set(range(SIZE // cluster, (SIZE + MIB) // cluster))
        with cowfence.open(path, snapshot=moment.id, lock=False) as then:
            disk.flush()
            differing = {change.start // cluster for change in diff(then, disk, unit_bytes=cluster)}
        told = disk.alter(lambda alteration: list(changed_since(alteration.state, moment)))
        found = {at // cluster for start, length in told for at in range(start, start + length, cluster)}
        assert differing <= found <= touched
        end_backup(disk, BackupPlan("b"), failed=False)
        assert left_behind(disk, "b") is None


def test_a_backup_that_cannot_begin_changes_nothing(tmp_path: Path) -> None:
    with cowfence.create(tmp_path / "disk.qcow2", SIZE) as disk:
        disk.bitmaps.add("mon")
        disk.bitmaps.add("still", enabled=False)
        before = list(disk.bitmaps)
        for plan in (
            BackupPlan("b", "mon"),
            BackupPlan("b", "none", "tue"),
            BackupPlan("b", "still", "tue"),
            BackupPlan("b", "mon", "still"),
            BackupPlan("b", "mon", "n" * 250),  # too long to be remembered
        ):
            with pytest.raises(Invalid):
                begin_backup(disk, plan)
            assert list(disk.bitmaps) == before
            assert not disk.snapshots()


def test_a_backup_that_failed_after_the_next_one_began_has_all_that_was_written(tmp_path: Path) -> None:
    """Its second bitmap stopped when the next backup took over, so it does not have what came after that."""
    first, second = BackupPlan("x", "a", "b"), BackupPlan("y", "b", "c")
    with cowfence.create(tmp_path / "disk.qcow2", SIZE) as disk:
        disk.bitmaps.add("a")
        disk.write(0, b"before")
        begin_backup(disk, first)
        disk.write(2 * MIB, b"between")
        begin_backup(disk, second)
        disk.write(5 * MIB, b"after")
        end_backup(disk, first, failed=True)
        assert [at for at, _ in disk.bitmaps.ranges("a")] == [0, 2 * MIB, 5 * MIB]
        end_backup(disk, second, failed=False)
        assert [(bitmap.name, bitmap.enabled) for bitmap in disk.bitmaps] == [("a", True), ("c", True)]


def test_what_is_cut_off_and_grows_again_is_dirty_also_where_nothing_records(tmp_path: Path) -> None:
    """What had been there is in the last backup, and the tables know nothing of it: they hold nothing there, now as at the
    moment."""
    plan, path = BackupPlan("tue", "mon", "tue"), tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE) as disk:
        disk.write(6 * MIB, b"saved")
        disk.bitmaps.add("mon")
        disk.discard(6 * MIB, MIB)
        begin_backup(disk, plan)
        resize_disk(disk, 4 * MIB, shrink=True)
        resize_disk(disk, SIZE)
        disk.bitmaps.add("other")  # stores the bits of mon
        killed = Path(shutil.copy(path, tmp_path / "killed.qcow2"))
    with cowfence.open(killed, writable=True) as disk:
        end_backup(disk, plan, failed=True)
        assert disk.bitmaps.ranges("mon") == [(4 * MIB, 4 * MIB)]


def test_of_what_is_cut_off_while_a_backup_begins_all_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE) as disk:
        disk.bitmaps.add("mon")
        disk.write(6 * MIB, b"changed")
        true_stop = ops_backup._stop

        def stop(disk: cowfence.Qcow2Disk, plan: BackupPlan) -> None:
            resize_disk(disk, 4 * MIB, shrink=True)
            true_stop(disk, plan)

        monkeypatch.setattr(ops_backup, "_stop", stop)
        backup = Backup(BackupPlan("tue", "mon", "tue"), disk, str(path))
        assert backup.export.disk.size == SIZE
        assert list(backup.export.bitmaps["mon"](0, SIZE)) == [(4 * MIB, 4 * MIB)]
        backup.close()


def test_a_bitmap_of_a_backup_that_was_not_wholly_ended_is_not_made_anew(tmp_path: Path) -> None:
    """Its moment is still there; after a kill, its end would tell by that what a bitmap had that began later."""
    left = BackupPlan("x", "a", "b")
    with cowfence.create(tmp_path / "disk.qcow2", SIZE) as disk:
        disk.bitmaps.add("a")
        begin_backup(disk, left)
        disk.bitmaps.hand_over("a", "b", left.snapshot_name)  # the first step of its end
        for bitmap in ("a", "b"):
            with pytest.raises(Invalid, match="'x'"):
                begin_backup(disk, BackupPlan("y", "b", bitmap))
        end_backup(disk, left, failed=False)
        begin_backup(disk, BackupPlan("y", "b", "a"))
