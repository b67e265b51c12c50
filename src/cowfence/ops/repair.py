"""Repair with a plan, and a way back.

The plan is the repair itself, carried out on an overlay in memory: what it would write, in order, and where its fences are.
To apply it is to run the same repair on the file, behind a guard that lets nothing through that was not in the plan. Where an
undo file is wanted, it is complete and durable before the first change of the image.

On disk at every instant: the image as it was, or on the way of a repair (see ``qcow2.repair``), and from before the first
change an undo file that leads back from each of these states.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cowfence.errors import Corrupt, Invalid, NotThisFormat
from cowfence.ops.check import CheckResult, NoCheck, check_storage
from cowfence.qcow2.findings import Mode
from cowfence.qcow2.verify import Progress
from cowfence.storage.base import Storage, read_padded
from cowfence.storage.file import FileStorage
from cowfence.storage.oplog import Fence, Operation, OpLog, Write
from cowfence.storage.overlay import OverlayStorage
from cowfence.storage.publish import NewFile
from cowfence.storage.record import RecordingStorage
from cowfence.storage.undo import MAX_LOG_BYTES, GuardedStorage, UndoLog
from cowfence.units import MIB, SECTOR_BYTES

if TYPE_CHECKING:
    from cowfence.qcow2.describe import JsonValue
    from cowfence.storage.rehearsal import Rehearsal

__all__ = [
    "Mode",
    "Plan",
    "Repaired",
    "apply",
    "apply_storage",
    "plan",
    "plan_storage",
    "read_plan",
    "undo",
    "undo_storage",
    "write_plan",
]

PLAN_FORMAT: Final = "cowfence-repair-plan"
_PLAN_VERSION: Final = 1
_MAX_PLAN_BYTES: Final = 256 * MIB
_PIECE_BYTES: Final = MIB
_WORDS: Final = {
    "refcount.decrement": "lower stored refcounts to the references there are",
    "refcount_table.new": "write a new refcount table where nothing leads yet",
    "refcount_block.new": "write new refcount blocks where nothing leads yet",
    "header.link": "change fields of the header, in one sector",
    "l1.link": "set COPIED flags of the L1 table to what the refcounts say",
    "l2.link": "set COPIED flags of L2 tables to what the refcounts say",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of write up to the next, or up to a fence. ``ranges``: (offset, length) of the host file, in bytes."""

    mark: str
    ranges: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, JsonValue]:
        if not self.ranges:
            return {"step": self.mark, "what": "make all of it durable"}
        return {"step": self.mark, "what": _WORDS.get(self.mark, self.mark), "ranges": _ranges_list(self.ranges)}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a repair would do. ``digest``: of every byte that it changes, before and after, and of the file's length."""

    result: CheckResult
    mode: Mode
    old_bytes: int
    new_bytes: int
    steps: tuple[Step, ...]
    ranges: tuple[tuple[int, int], ...]
    digest: str
    operations: Sequence[Operation] = field(repr=False)

    @property
    def empty(self) -> bool:
        """True if the repair would change nothing."""
        return not self.ranges

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "format": PLAN_FORMAT,
            "version": _PLAN_VERSION,
            "filename": self.result.filename,
            "mode": self.mode.value,
            "file-size": self.old_bytes,
            "file-size-after": self.new_bytes,
            "corruptions-fixed": self.result.corruptions_fixed,
            "leaks-fixed": self.result.leaks_fixed,
            "corruptions-left": self.result.report.corruptions,
            "leaks-left": self.result.report.leaks,
            "not-repaired": list(self.result.unrepairable),
            "steps": [step.to_dict() for step in self.steps],
            "ranges": _ranges_list(self.ranges),
            "digest": self.digest,
        }


def _ranges_list(ranges: Sequence[tuple[int, int]]) -> list[JsonValue]:
    return [{"offset": offset, "length": length_bytes} for offset, length_bytes in ranges]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did. ``undo_file``: None where none was asked for, or nothing was changed."""

    plan: Plan
    undo_file: str | None

    @property
    def exit_code(self) -> int:
        """Of what is left, as of ``check``."""
        return self.plan.result.exit_code

    def to_dict(self) -> dict[str, JsonValue]:
        return {**self.plan.to_dict(), "applied": not self.plan.empty, "undo-file": self.undo_file}


def plan(
    path: str | os.PathLike[str], mode: Mode = Mode.ALL, *, force_share: bool = False, progress: Progress | None = None
) -> Plan:
    """What a repair of the image at ``path`` would do; the image is only read. Raises what ``check`` raises."""
    storage = FileStorage.open(path, force_share=force_share)
    try:
        return plan_storage(storage, mode, progress=progress)
    finally:
        storage.close()


def plan_storage(storage: Storage, mode: Mode = Mode.ALL, *, progress: Progress | None = None) -> Plan:
    """The same for an image in an open storage, which stays open."""
    log, overlay = OpLog(), OverlayStorage(storage)
    try:
        result = check_storage(RecordingStorage(overlay, log), repair=mode, progress=progress)
    except NotThisFormat:
        raise NoCheck(storage.name) from None
    operations, ranges = log.operations(), overlay.changed()
    return Plan(
        result=result,
        mode=mode,
        old_bytes=storage.size(),
        new_bytes=overlay.size(),
        steps=_steps(operations) if ranges else (),
        ranges=tuple(ranges),
        digest=_digest(storage, overlay, ranges),
        operations=operations,
    )


def _steps(operations: Sequence[Operation]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for operation in operations:
        if isinstance(operation, Write):
            place = (operation.offset, len(operation.data))
            if steps and steps[-1].mark == operation.mark:
                steps[-1] = Step(operation.mark, (*steps[-1].ranges, place))
            else:
                steps.append(Step(operation.mark, (place,)))
        elif isinstance(operation, Fence):
            steps.append(Step(operation.mark, ()))
    return tuple(steps)


def _digest(before: Storage, after: Storage, ranges: Sequence[tuple[int, int]]) -> str:
    digest = hashlib.sha256(b"%d %d" % (before.size(), after.size()))
    for offset, length_bytes in ranges:
        digest.update(b"|%d %d|" % (offset, length_bytes))
        for at in range(offset, offset + length_bytes, _PIECE_BYTES):
            piece = bytearray(min(_PIECE_BYTES, offset + length_bytes - at))
            for storage in (before, after):
                read_padded(storage, at, piece)
                digest.update(piece)
    return digest.hexdigest()


def write_plan(planned: Plan, path: str | os.PathLike[str], image: str | os.PathLike[str]) -> None:
    """Keep a plan in a file, whole or not at all. Raises Invalid where that is the ``image``, and StorageFailed."""
    if os.path.realpath(path) == os.path.realpath(image):
        raise Invalid(f"{os.fspath(path)}: it is the image itself")
    text = json.dumps(planned.to_dict(), indent=4) + "\n"
    with NewFile(path) as new:
        new.storage.writev(0, (text.encode(),), "plan.write")
        new.publish()


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """What has to be known of a plan that was kept in a file, to see whether it is still the plan."""

    mode: Mode
    digest: str


def read_plan(path: str | os.PathLike[str]) -> StoredPlan:
    """A plan out of the file that it was kept in. Raises Corrupt for anything else, and StorageFailed."""
    name = os.fspath(path)
    try:
        value = json.loads(_whole_file(path, _MAX_PLAN_BYTES, "a repair plan"))
        if value["format"] == PLAN_FORMAT and value["version"] == _PLAN_VERSION and isinstance(value["digest"], str):
            return StoredPlan(Mode(value["mode"]), value["digest"])
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise Corrupt(name, "it is no repair plan of this version")


def apply(
    path: str | os.PathLike[str],
    mode: Mode | None = None,
    *,
    stored: StoredPlan | None = None,
    undo_file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    rehearsal: Rehearsal | None = None,
) -> Repaired:
    """Repair the image at ``path`` (``mode``: that of the plan, else all). ``stored``: only if this is still the plan.
    ``undo_file``: where the way back is kept; it must not exist, and is made only if something is changed.
    ``rehearsal``: nothing is written.

    Raises Invalid where it is not, or the undo file exists, and what ``check`` raises; then nothing was changed.
    """
    storage = FileStorage.open(path, writable=True) if rehearsal is None else rehearsal.open(path)
    try:
        return apply_storage(storage, mode, stored=stored, undo_file=undo_file, progress=progress, rehearsal=rehearsal)
    finally:
        storage.close()


def apply_storage(
    storage: Storage,
    mode: Mode | None = None,
    *,
    stored: StoredPlan | None = None,
    undo_file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    rehearsal: Rehearsal | None = None,
) -> Repaired:
    """The same for an image in an open storage, which stays open."""
    if stored is not None and mode not in (None, stored.mode):
        raise Invalid(f"{storage.name}: the plan is one of -r {stored.mode.value}")
    if undo_file is not None and os.path.lexists(undo_file):
        raise Invalid(f"{os.fspath(undo_file)}: it exists already; an undo file is never overwritten")
    # What the plan relies on, and the undo file keeps, must be what a power cut would leave.
    storage.fence("repair.fence")
    planned = plan_storage(storage, stored.mode if stored else mode or Mode.ALL, progress=progress)
    if stored is not None and stored.digest != planned.digest:
        raise Invalid(f"{storage.name}: the image is no longer the one that was planned for; make a new plan")
    if planned.empty:
        return Repaired(planned, None)
    log = UndoLog.of(storage, planned.operations, planned.new_bytes)
    if undo_file is not None:
        with NewFile(undo_file) if rehearsal is None else rehearsal.new_file(undo_file) as new:
            new.storage.writev(0, (log.encode(),), "undo.write")
            new.publish()
    check_storage(GuardedStorage(storage, log), repair=planned.mode)
    return Repaired(planned, None if undo_file is None else os.fspath(undo_file))


def undo(path: str | os.PathLike[str], undo_file: str | os.PathLike[str], *, rehearsal: Rehearsal | None = None) -> int:
    """Take a repair of the image at ``path`` back, also one that a crash stopped; returns the bytes put back. Run again after
    a crash, it comes to its end. ``rehearsal``: nothing is written.

    Raises Corrupt for what is no undo file, Invalid where the image is not as the repair left it, StorageFailed.
    """
    log = UndoLog.decode(_whole_file(undo_file, MAX_LOG_BYTES, "an undo file"), os.fspath(undo_file))
    storage = FileStorage.open(path, writable=True) if rehearsal is None else rehearsal.open(path)
    try:
        return undo_storage(storage, log)
    finally:
        storage.close()


def undo_storage(storage: Storage, log: UndoLog) -> int:
    """The same for an image in an open storage, which stays open."""
    log.check(storage)
    log.restore(storage)
    return len(log.sectors) * SECTOR_BYTES


def _whole_file(path: str | os.PathLike[str], limit_bytes: int, what: str) -> bytes:
    file = FileStorage.open(path, lock=False, allow_devices=False)
    try:
        if file.size() > limit_bytes:
            raise Corrupt(file.name, f"it is too long for {what}")
        data = bytearray(file.size())
        read_padded(file, 0, data)
        return bytes(data)
    finally:
        file.close()
