"""A live disk kept as it was at one moment, to be copied while it goes on being written; whole, or what changed since a backup.

The moment is an internal snapshot: from then on every cluster that the guest overwrites is copied first. An incremental backup
has two bitmaps besides. ``bitmap`` has recorded since the last good backup, ``next_bitmap`` takes over:

    begin     next_bitmap records | the snapshot | bitmap stops
    end       bitmap is removed | the snapshot is deleted
    failed    bitmap records again, with all that was changed meanwhile, and next_bitmap is removed | the snapshot is deleted

Each is one alteration (``qcow2.alteration``), so a crash leaves what stands before it or after it, and guests write between
them. What they write until both first steps of ``begin`` are done stands in both bitmaps: more is copied than has to be, never
less. Until the end, the two together have all that changed since the last good backup. The snapshot's name tells of what backup
it is, bitmaps included, and it is deleted last: so whoever finds it after a crash can end the backup.

A bitmap that records is not to be trusted after a crash. That is ``next_bitmap``; what it had recorded is told all the same by
the snapshot, which says what is other now than it was at the moment (``qcow2.since``): so a backup can be ended, either way,
after its writer was killed. Only where the one bitmap that is left recorded when the writer died, it is not known what has
changed. Then it is marked so, using it is refused, and a full backup is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, quote, unquote, urlencode

from cowfence.errors import Invalid
from cowfence.ops.snapshot import create_snapshot, delete_snapshot
from cowfence.qcow2.snapshot_table import Snapshot

if TYPE_CHECKING:
    from cowfence.qcow2.bitmaps import Bitmap
    from cowfence.qcow2.image import Qcow2Disk

_PREFIX: Final = "cowfence-backup:"


class BackupPlan(NamedTuple):
    """A backup by its name; with both bitmaps, or with none, then it is a whole one."""

    name: str
    bitmap: str | None = None
    next_bitmap: str | None = None

    @property
    def snapshot_name(self) -> str:
        """Of the moment: the plan, written like the end of a URI."""
        text = _PREFIX + quote(self.name, safe="", errors="surrogateescape")
        if self.bitmap is None or self.next_bitmap is None:
            return text
        bitmaps = {"bitmap": self.bitmap, "next-bitmap": self.next_bitmap}
        return f"{text}?{urlencode(bitmaps, quote_via=quote, errors='surrogateescape')}"


def plan_of(snapshot: Snapshot) -> BackupPlan | None:
    """Of what backup it is the moment; None: of none."""
    if not snapshot.name.startswith(_PREFIX):
        return None
    name, _, query = snapshot.name.removeprefix(_PREFIX).partition("?")
    bitmaps = dict(parse_qsl(query, errors="surrogateescape"))
    pair = (bitmaps["bitmap"], bitmaps["next-bitmap"]) if {"bitmap", "next-bitmap"} <= bitmaps.keys() else ()
    return BackupPlan(unquote(name, errors="surrogateescape"), *pair)


def left_behind(disk: Qcow2Disk, name: str) -> BackupPlan | None:
    """The backup of a name whose moment is in the image, though nobody may be copying it any more."""
    plans = (plan_of(snapshot) for snapshot in disk.snapshots())
    return next((plan for plan in plans if plan is not None and plan.name == name), None)


def begin_backup(disk: Qcow2Disk, plan: BackupPlan) -> None:
    """Keep the disk as it is now. What a backup of that name left behind is ended first, as one that failed.

    Raises Invalid (no such bitmap, or it does not record, or the next one is there already; names too long for a snapshot's),
    and else as ``create_snapshot`` and ``Bitmaps`` do; then no backup has begun.
    """
    if (plan.bitmap is None) != (plan.next_bitmap is None):
        raise Invalid("an incremental backup needs a bitmap, and the name of the next one")
    left = left_behind(disk, plan.name)
    if left is not None:
        clear_away(disk, left)
    begun = False
    try:
        for step in begin_steps(plan):
            step(disk, plan)
            begun = True
    except BaseException:
        if begun:
            end_backup(disk, plan, failed=True)
        raise


def end_backup(disk: Qcow2Disk, plan: BackupPlan, *, failed: bool) -> None:
    """Give up what was kept. ``failed``: the next backup copies, too, what this one should have. What is done already, or never
    was begun, is passed over.

    Raises Invalid where it failed and what has changed is not known any more; then all is as it was. Else as ``Bitmaps`` and
    ``delete_snapshot`` do.
    """
    for step in end_steps(plan, failed=failed):
        step(disk, plan)


def clear_away(disk: Qcow2Disk, plan: BackupPlan) -> None:
    """End one that nobody will end: as one that failed, where that can be. Raises as ``delete_snapshot`` does."""
    try:
        end_backup(disk, plan, failed=True)
    except Invalid:
        # Its bitmap is marked as not to be trusted, or gone: who wants to use it is told.
        _let_go(disk, plan)


Step: TypeAlias = "Callable[[Qcow2Disk, BackupPlan], None]"


def begin_steps(plan: BackupPlan) -> tuple[Step, ...]:
    """The alterations that begin a backup, in their order."""
    return (_keep,) if plan.bitmap is None else (_record_next, _keep, _stop)


def end_steps(plan: BackupPlan, *, failed: bool) -> tuple[Step, ...]:
    """Those that end it."""
    return (_let_go,) if plan.bitmap is None else (_take_back if failed else _replace, _let_go)


def _pair(plan: BackupPlan) -> tuple[str, str]:
    assert plan.bitmap is not None
    assert plan.next_bitmap is not None
    return plan.bitmap, plan.next_bitmap


def _bitmap(disk: Qcow2Disk, name: str) -> Bitmap | None:
    return next((bitmap for bitmap in disk.bitmaps if bitmap.name == name), None)


def _record_next(disk: Qcow2Disk, plan: BackupPlan) -> None:
    old, new = _pair(plan)
    held = _bitmap(disk, old)
    if held is None:
        raise Invalid(f"Dirty bitmap '{old}' not found")
    if held.inconsistent:
        raise Invalid(_unknown(old))
    if not held.enabled:
        raise Invalid(f"bitmap {old!a} does not record")
    for other in map(plan_of, disk.snapshots()):
        # Ending that one would take this bitmap for its own, and what has changed since its moment for what it had.
        if other is not None and other.name != plan.name and new in (other.bitmap, other.next_bitmap):
            raise Invalid(f"the backup {other.name!a}, which has a bitmap {new!a}, has not been ended")
    disk.bitmaps.add(new, granularity_bytes=held.granularity_bytes)


def _keep(disk: Qcow2Disk, plan: BackupPlan) -> None:
    create_snapshot(disk, plan.snapshot_name)


def _stop(disk: Qcow2Disk, plan: BackupPlan) -> None:
    disk.bitmaps.disable(_pair(plan)[0])


def _replace(disk: Qcow2Disk, plan: BackupPlan) -> None:
    old, new = _pair(plan)
    later = _bitmap(disk, new)
    if _bitmap(disk, old) is not None or (later is not None and later.inconsistent):
        disk.bitmaps.hand_over(old, new, plan.snapshot_name)


def _take_back(disk: Qcow2Disk, plan: BackupPlan) -> None:
    old, new = _pair(plan)
    held = _bitmap(disk, old)
    if held is None:
        raise Invalid(f"bitmap {old!a} is gone: a full backup is needed")
    if held.inconsistent:
        raise Invalid(_unknown(old))
    if held.enabled and _bitmap(disk, new) is None:
        return
    later = _bitmap(disk, new)
    if (later is None or later.inconsistent or not later.enabled) and left_behind(disk, plan.name) is None:
        raise Invalid(_unknown(new))
    disk.bitmaps.resume(old, new, plan.snapshot_name)


def _let_go(disk: Qcow2Disk, plan: BackupPlan) -> None:
    if any(snapshot.name == plan.snapshot_name for snapshot in disk.snapshots()):
        delete_snapshot(disk, plan.snapshot_name)


def _unknown(bitmap: str) -> str:
    return f"bitmap {bitmap!a} was in use when its writer died: what has changed is not known, and a full backup is needed"
