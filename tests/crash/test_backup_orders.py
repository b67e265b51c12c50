"""Backups of a live disk, whole and incremental, with a guest that writes between all of their alterations: ended, failed, and
begun again after a kill; every state that a crash can leave keeps the moment, and loses no change to the next backup.

The broken orders are patches of ``ops.backup``, like those of ``orders``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from cowfence.crash import operations
from cowfence.crash.cases import parse_case, record, walk
from cowfence.crash.explore import Model
from cowfence.crash.images import ImageSpec
from cowfence.crash.workloads import backups
from cowfence.errors import Invalid
from cowfence.ops import backup
from cowfence.ops.backup import BackupPlan, Step
from cowfence.qcow2.bitmaps import Bitmaps
from cowfence.qcow2.image import Qcow2Disk

_IMAGE = "v3,c512,r16,t64,aged,bitmap"
CASES = {
    "ended": f"{_IMAGE} | backup_begin write:0+512 flush discard:512+512 backup_end reopen",
    "failed": f"{_IMAGE} | backup_begin write:0+512 flush backup_failed reopen",
    "killed": f"{_IMAGE} | backup_begin write:512+512 flush kill backup_begin backup_end reopen",
    "killed, and taken back": f"{_IMAGE} | backup_begin write:35840+512 flush kill write:0+512 backup_failed reopen",
    "killed, and good": f"{_IMAGE} | backup_begin write:35840+512 kill write:512+512 backup_end reopen",
    "whole, of version 2": "v2,c512,r16,t64,aged,raw | backup_begin write:0+1024 kill backup_begin backup_end",
    "whole, with a keeper": "v3,c512,r16,t64,aged,s1,keeper | backup_begin write:0+512 backup_end",
    "whole, of subclusters": "v3,c65536,r16,t2,s2,aged,extended | backup_begin",
    "of another disk meanwhile": f"{_IMAGE},s1,diverged | backup_begin snapshot_apply backup_failed reopen",
    "of a longer disk meanwhile": f"{_IMAGE} | backup_begin grow kill backup_failed reopen",
}


@pytest.mark.parametrize(
    ("name", "model"), [*((name, "kill") for name in CASES), ("ended", "power"), ("killed, and taken back", "power")]
)
def test_a_backup_keeps_the_contract(name: str, model: Model) -> None:
    case = parse_case(CASES[name])
    verdicts = walk(case, record(case), model, limit=12)
    assert not verdicts.violations, str(verdicts.violations[0])
    assert verdicts.distinct > 40


def _begin(*steps: Step) -> Any:
    return mock.patch.object(operations, "begin_steps", return_value=steps)


def _end(*steps: Step) -> Any:
    return mock.patch.object(operations, "end_steps", return_value=steps)


def _record_all_the_same(disk: Qcow2Disk, plan: BackupPlan) -> None:
    assert plan.next_bitmap is not None
    disk.bitmaps.add(plan.next_bitmap, granularity_bytes=512)


def _only_enabled(disk: Qcow2Disk, plan: BackupPlan) -> None:
    assert plan.bitmap is not None
    assert plan.next_bitmap is not None
    disk.bitmaps.enable(plan.bitmap)
    disk.bitmaps.remove(plan.next_bitmap)


BROKEN: dict[str, tuple[str, Callable[[], Any]]] = {
    "the next bitmap comes after the first has stopped": (
        "backup_begin reopen",
        lambda: _begin(backup._keep, backup._stop, _record_all_the_same),
    ),
    "the first bitmap stops before the moment": (
        "backup_begin",
        lambda: _begin(backup._record_next, backup._stop, backup._keep),
    ),
    "the first bitmap is removed before the end": (
        "backup_begin",
        lambda: _begin(backup._record_next, backup._keep, backup._replace),
    ),
    "the next bitmap begins after the moment": (
        "backup_begin backup_end reopen",
        lambda: _begin(backup._keep, backup._record_next, backup._stop),
    ),
    "taken back, it only records again": ("backup_begin backup_failed reopen", lambda: _end(_only_enabled, backup._let_go)),
    "ended, the moment goes before the first bitmap": (
        "backup_begin backup_end",
        lambda: _end(backup._let_go, backup._replace),
    ),
    "failed, the moment goes before the bitmaps are one": (
        "backup_begin backup_failed",
        lambda: _end(backup._let_go, backup._take_back),
    ),
    "after a kill, what the moment tells is not asked": (
        "backup_begin kill backup_failed reopen",
        lambda: mock.patch.object(Bitmaps, "_mark_changed_since"),
    ),
    "after a kill, the next bitmap is taken for what it was on disk": (
        "backup_begin kill backup_end reopen",
        lambda: mock.patch.object(Bitmaps, "_mark_changed_since"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_order_is_caught(name: str) -> None:
    steps, patch = BROKEN[name]
    case = parse_case(f"{_IMAGE} | {steps}")
    with patch():
        recording = record(case)
    found = walk(case, recording, "kill").violations
    assert found
    assert found[0].clause == "C14", str(found[0])


def test_a_moment_that_is_let_go_too_early_is_caught() -> None:
    """While somebody may still read it; or it is not what the disk was."""
    case = parse_case(f"{_IMAGE} | backup_begin backup_end")
    early = _begin(backup._record_next, backup._keep, backup._stop, backup._let_go)
    with early, pytest.raises(AssertionError, match="until its end"):
        record(case)
    other = mock.patch("cowfence.crash.runner.Run.snapshot_content", return_value=b"what the disk holds now")
    with other, pytest.raises(AssertionError, match="what the disk was"):
        record(case)


def test_what_the_judge_says_of_a_backup_that_cannot_be_taken_back() -> None:
    """A tool that refuses although it could go on is no better than one that forgets."""
    case = parse_case(f"{_IMAGE} | backup_begin")
    recording = record(case)
    with mock.patch.object(Bitmaps, "resume", side_effect=Invalid("no")):
        found = walk(case, recording, "kill").violations
    assert found
    assert "cannot be taken back" in str(found[0])


def test_the_suite_has_both_kinds() -> None:
    whole = [case.script[0].verb for case in backups([ImageSpec(version=2)])]
    incremental = [case.script[0].verb for case in backups([ImageSpec()])]
    assert set(whole) == {"backup_begin"}
    assert set(incremental) == {"bitmap_add"}
    assert len(whole) == len(incremental)
