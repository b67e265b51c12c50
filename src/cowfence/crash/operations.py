"""The operations of a guest that the explorer tries: the one place where a new operation registers itself.

An operation is a function that does it to the disk of a run, inside ``with run.writing(...)`` or its like, which note for
the guest's model what becomes possible when it begins and what is certain when it has returned. ``places``: it is tried at
every kind of place of the disk; else once. ``request``: the same as a request that may be refused, so that it can be carried
out inside another call (the interleaved model).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from cowfence.crash.images import secrets
from cowfence.crash.structure import active_digest
from cowfence.disk.base import Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError, Invalid
from cowfence.ops.amend import Amendment, amend_disk
from cowfence.ops.backup import BackupPlan, begin_steps, end_steps, left_behind, plan_of
from cowfence.ops.backup import Step as BackupStep
from cowfence.ops.commit import commit_disk
from cowfence.ops.compact import compact_disk
from cowfence.ops.rebase import rebase_disk
from cowfence.ops.resize import resize_disk
from cowfence.ops.snapshot import apply_snapshot, create_snapshot, delete_snapshot
from cowfence.qcow2.encryption import KeyChange, read_luks
from cowfence.qcow2.header import Compatible
from cowfence.qcow2.image import Qcow2Disk
from cowfence.units import SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.crash.runner import Facts, Run
    from cowfence.qcow2.bitmaps import Bitmap


_MOST_SNAPSHOTS: Final = 3
_BACKUP: Final = "backup"
"""The name of the backup that goes on; there is one at most."""


class Step(NamedTuple):
    """One operation at a place. Offset and length in bytes, multiples of 512."""

    verb: str
    offset: int = 0
    length_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.verb}:{self.offset}+{self.length_bytes}" if self.length_bytes else self.verb


def parse_step(text: str) -> Step:
    """The reverse of ``str(step)``. Raises Invalid."""
    verb, _, where = text.partition(":")
    if verb not in OPERATIONS:
        raise Invalid(f"{verb!r} is no operation: {' '.join(OPERATIONS)}")
    if not where:
        return Step(verb)
    offset, plus, length = where.partition("+")
    if not plus or not offset.isdecimal() or not length.isdecimal():
        raise Invalid(f"{text!r}: a place reads OFFSET+LENGTH")
    if int(offset) % 512 or int(length) % 512:
        raise Invalid(f"{text!r}: places are whole sectors of 512 bytes")
    return Step(verb, int(offset), int(length))


@dataclass(frozen=True, slots=True)
class Operation:
    """See the module."""

    name: str
    perform: Callable[[Run, Step], None]
    places: bool
    whole: bool
    """Only whole clusters."""
    request: Callable[[Step, bytes], Request] | None
    combined: bool
    """Tried in sequences of two and three; else alone, and in walks."""


OPERATIONS: Final[dict[str, Operation]] = {}
"""By name, in the order in which they are tried."""


def operation(
    name: str,
    *,
    places: bool = False,
    whole: bool = False,
    request: Callable[[Step, bytes], Request] | None = None,
    combined: bool = True,
) -> Callable[[Callable[[Run, Step], None]], Callable[[Run, Step], None]]:
    """Register the function under a name."""

    def register(perform: Callable[[Run, Step], None]) -> Callable[[Run, Step], None]:
        OPERATIONS[name] = Operation(name, perform, places, whole, request, combined)
        return perform

    return register


@operation("write", places=True, request=lambda step, data: Request(Verb.WRITE, step.offset, len(data), data))
def _write(run: Run, step: Step) -> None:
    data = run.new_data(step)
    with run.writing(step.offset, data):
        run.disk.write(step.offset, data)


@operation("write_batch", places=True, combined=False)
def _write_batch(run: Run, step: Step) -> None:
    """With a sector of each of the next two clusters, in one batch: what a server does that many ask at once."""
    cluster_bytes, end = run.disk.block_bytes, step.offset + step.length_bytes
    after = align_up(end, cluster_bytes)
    ranges = [(step.offset, end)]
    ranges += [(at, at + SECTOR_BYTES) for at in (after, after + cluster_bytes) if at < run.disk.size]
    requests: list[Request] = []
    with ExitStack() as noted:
        for start, stop in ranges:
            data = run.new_data(Step(step.verb, start, stop - start))
            noted.enter_context(run.writing(start, data))
            requests.append(Request(Verb.WRITE, start, len(data), data))
        for outcome in run.disk.submit(requests):
            if isinstance(outcome, CowfenceError):
                raise outcome


@operation("write_fua", places=True)
def _write_fua(run: Run, step: Step) -> None:
    """Forced through: this write is durable when it returns."""
    data = run.new_data(step)
    with run.writing(step.offset, data, durable=True):
        run.disk.write(step.offset, data, fua=True)


@operation("write_compressed", places=True, whole=True)
def _write_compressed(run: Run, step: Step) -> None:
    if not run.spec.external and not run.spec.encrypted:
        data = run.new_data(step)
        with run.writing(step.offset, data):
            run.disk.write_compressed(step.offset, data)


@operation("zero", places=True, request=lambda step, _: Request(Verb.ZERO, step.offset, step.length_bytes, unmap=True))
def _zero(run: Run, step: Step) -> None:
    with run.writing(step.offset, bytes(step.length_bytes)):
        run.disk.zero(step.offset, step.length_bytes, unmap=True)


@operation("keep_zero", places=True, request=lambda step, _: Request(Verb.ZERO, step.offset, step.length_bytes, unmap=False))
def _keep_zero(run: Run, step: Step) -> None:
    with run.writing(step.offset, bytes(step.length_bytes)):
        run.disk.zero(step.offset, step.length_bytes, unmap=False)


@operation("discard", places=True, request=lambda step, _: Request(Verb.DISCARD, step.offset, step.length_bytes))
def _discard(run: Run, step: Step) -> None:
    with run.discarding(step.offset, step.length_bytes):
        run.disk.discard(step.offset, step.length_bytes)


@operation("read", places=True, request=lambda step, _: Request(Verb.READ, step.offset, step.length_bytes))
def _read(run: Run, step: Step) -> None:
    run.read(step.offset, step.length_bytes)


@operation("flush")
def _flush(run: Run, step: Step) -> None:  # noqa: ARG001
    with run.flushing():
        run.disk.flush()


@operation("bitmap_add")
def _bitmap_add(run: Run, step: Step) -> None:  # noqa: ARG001
    if run.disk.header.version >= 3:
        name = _new_bitmap(run, "bitmap")
        with run.cleaning(name):
            run.disk.bitmaps.add(name, granularity_bytes=512)


@operation("bitmap_clear")
def _bitmap_clear(run: Run, step: Step) -> None:  # noqa: ARG001
    """All that there are, one by one."""
    for bitmap in _bitmaps(run):
        if not bitmap.inconsistent:
            with run.cleaning(bitmap.name):
                run.disk.bitmaps.clear(bitmap.name)


@operation("bitmap_toggle")
def _bitmap_toggle(run: Run, step: Step) -> None:  # noqa: ARG001
    """Disabled and enabled again: it has missed nothing."""
    for bitmap in _bitmaps(run):
        if not bitmap.inconsistent:
            run.disk.bitmaps.disable(bitmap.name)
            run.disk.bitmaps.enable(bitmap.name)


@operation("bitmap_remove")
def _bitmap_remove(run: Run, step: Step) -> None:  # noqa: ARG001
    """The last one, in use by a dead writer or not."""
    bitmaps = _bitmaps(run)
    if bitmaps:
        run.disk.bitmaps.remove(bitmaps[-1].name)


def _bitmaps(run: Run) -> list[Bitmap]:
    """Those that no backup is busy with."""
    plan = left_behind(run.disk, _BACKUP)
    busy = () if plan is None else (plan.bitmap, plan.next_bitmap)
    return [bitmap for bitmap in run.disk.bitmaps if bitmap.name not in busy]


def _new_bitmap(run: Run, kind: str) -> str:
    names = [bitmap.name for bitmap in run.disk.bitmaps]
    return next(name for number in count(len(names)) if (name := f"{kind}{number}") not in names)


@operation("reopen")
def _reopen(run: Run, step: Step) -> None:  # noqa: ARG001
    """Close well, and open again."""
    with run.flushing():
        run.disk.close()
    run.open_again()


@operation("kill")
def _kill(run: Run, step: Step) -> None:  # noqa: ARG001
    """The process is killed, and the image opened again; what it wrote stands in the page cache only."""
    run.kill()


@operation("repair")
def _repair(run: Run, step: Step) -> None:  # noqa: ARG001
    """The process is killed, leaks are repaired, and the image opened again."""
    run.kill(repair_leaks=True)


@operation("snapshot_create")
def _snapshot_create(run: Run, step: Step) -> None:  # noqa: ARG001
    """Of small disks three snapshots are enough."""
    if len(run.disk.snapshots()) < _MOST_SNAPSHOTS and not run.spec.external:
        with run.altering() as facts:
            create_snapshot(run.disk, "new", date_nanoseconds=0)
        before, after = _lists(facts)
        if after != before:
            held = active_digest(run.memory.snapshot())
            assert after[:-1] == before, "a new snapshot stands behind the others, which stay as they are"
            assert after[-1][2:] == (run.disk.size, held), "a new snapshot is what the disk is"


@operation("snapshot_apply")
def _snapshot_apply(run: Run, step: Step) -> None:  # noqa: ARG001
    """The oldest."""
    snapshots = run.disk.snapshots()
    if snapshots:
        content = run.snapshot_content(snapshots[0].id)
        with run.altering(content) as facts:
            apply_snapshot(run.disk, snapshots[0].id)
        before, after = _lists(facts)
        assert after == before, "applying a snapshot changes none"


@operation("snapshot_delete")
def _snapshot_delete(run: Run, step: Step) -> None:  # noqa: ARG001
    """One in the middle, where there are three. Not that of a backup."""
    snapshots = [snapshot for snapshot in run.disk.snapshots() if plan_of(snapshot) is None]
    if snapshots:
        at = len(snapshots) // 2
        with run.altering() as facts:
            delete_snapshot(run.disk, snapshots[at].id)
        before, after = _lists(facts)
        assert len(after) == len(before) - 1, "one is gone"
        assert set(after) < set(before), "the others stay as they are"


def _lists(facts: Facts) -> tuple[tuple[tuple[object, ...], ...], ...]:
    """The list of the snapshots, before and after."""
    return facts.before["snapshots"], facts.after["snapshots"]  # type: ignore[return-value]


@operation("backup_begin")
def _backup_begin(run: Run, step: Step) -> None:  # noqa: ARG001
    """Of what has changed, where a bitmap records, else of all. One that goes on, or was left behind, is ended as a failed one
    before; the guest writes between all alterations."""
    if run.spec.external:
        return
    _backup_failed(run, Step("backup_failed"))
    if len(run.disk.snapshots()) >= _MOST_SNAPSHOTS:
        return
    recording = [bitmap.name for bitmap in run.disk.bitmaps if bitmap.enabled and not bitmap.inconsistent]
    plan = BackupPlan(_BACKUP, recording[0], _new_bitmap(run, "next")) if recording else BackupPlan(_BACKUP)
    if recording:
        run.log.note("backup.begin", **_named(plan))
    done = 0
    try:
        for alteration in begin_steps(plan):
            _write_between(run)
            content = run.guest_content()
            later = plan.next_bitmap if run.moment is None else None
            with nullcontext() if later is None else run.cleaning(later):
                if not _altered(run, plan, alteration):
                    break
            done += 1
            if run.moment is None and left_behind(run.disk, _BACKUP) is not None:
                run.moment = content
        else:
            _write_between(run)
            assert left_behind(run.disk, _BACKUP) == plan, "the moment of a backup stands until its end"
            return
    except CowfenceError:
        if done:
            _end_backup(run, plan, failed=True)
        raise
    _end_backup(run, plan, failed=True)


@operation("backup_end")
def _backup_end(run: Run, step: Step) -> None:  # noqa: ARG001
    """It was good: what it left is ended, also where its writer was killed."""
    plan = left_behind(run.disk, _BACKUP)
    if plan is not None:
        _end_backup(run, plan, failed=False)


@operation("backup_failed")
def _backup_failed(run: Run, step: Step) -> None:  # noqa: ARG001
    plan = left_behind(run.disk, _BACKUP)
    if plan is not None:
        _end_backup(run, plan, failed=True)


def _end_backup(run: Run, plan: BackupPlan, *, failed: bool) -> None:
    """Its moment is what it was, to its end."""
    for snapshot in run.disk.snapshots():
        if snapshot.name == plan.snapshot_name and run.moment is not None:
            assert run.snapshot_content(snapshot.id) == run.moment, "the moment of a backup is what the disk was"
    run.moment = None
    if plan.bitmap is not None and not failed:
        run.log.note("backup.good", **_named(plan))
    for alteration in end_steps(plan, failed=failed):
        _write_between(run)
        with run.flushing():
            run.disk.flush()  # where there is nothing to alter, nothing becomes durable by that
        _altered(run, plan, alteration)
    if plan.bitmap is not None:
        run.log.note("backup.over", **_named(plan))


def _altered(run: Run, plan: BackupPlan, alteration: BackupStep) -> bool:
    """Carry a step of a backup out; False where it is refused."""
    with run.altering():
        alteration(run.disk, plan)
        return True
    return False


def _write_between(run: Run) -> None:
    """The guest writes where it has not written between two alterations: over old data first, then into what was free."""
    step = Step("write", run.between * run.spec.cluster_bytes % run.disk.size, SECTOR_BYTES)
    run.between += 1
    _write(run, step)


def _named(plan: BackupPlan) -> dict[str, bytes]:
    assert plan.bitmap is not None
    assert plan.next_bitmap is not None
    return {"bitmap": plan.bitmap.encode(), "next_bitmap": plan.next_bitmap.encode()}


@operation("shrink")
def _shrink(run: Run, step: Step) -> None:  # noqa: ARG001
    """Into the second L2 table of small clusters, then to half: into a cluster where they are large."""
    size, table_end = run.disk.size, 66 * SECTOR_BYTES
    _resize(run, table_end if run.spec.cluster_bytes == SECTOR_BYTES and size > table_end else _half(size))


@operation("grow")
def _grow(run: Run, step: Step) -> None:  # noqa: ARG001
    """To what it was before it shrank, else by an L2 table's clusters where they are small."""
    size, first = run.disk.size, run.built.size_bytes
    more = 70 * SECTOR_BYTES if run.spec.cluster_bytes == SECTOR_BYTES else run.spec.cluster_bytes + SECTOR_BYTES
    if size < first + 2 * more:
        _resize(run, first if size < first else size + more)


@operation("grow_allocated")
def _grow_allocated(run: Run, step: Step) -> None:  # noqa: ARG001
    """By a few clusters that are allocated ahead. Encrypted, version 2 cannot."""
    if run.spec.encrypted and run.disk.header.version < 3:
        return
    if run.disk.size < run.built.size_bytes + 9 * run.spec.cluster_bytes:
        _resize(run, run.disk.size + 3 * run.spec.cluster_bytes, preallocation="metadata")


def _half(size: int) -> int:
    return max(SECTOR_BYTES, size // 2 // SECTOR_BYTES * SECTOR_BYTES - SECTOR_BYTES)


def _resize(run: Run, size_bytes: int, *, preallocation: str = "off") -> None:
    """What is left of the disk stays, and what is new reads as zeros. Version 2 with snapshots refuses it."""
    if run.disk.header.version < 3 and run.disk.header.snapshot_count:
        return
    content = run.guest_content()[:size_bytes].ljust(size_bytes, b"\0")
    with run.altering(content) as facts:
        try:
            resize_disk(run.disk, size_bytes, shrink=True, preallocation=preallocation)
        except CowfenceError:
            if run.disk.size != size_bytes:
                raise
            # The size is durable, unless the image is read-only now; what failed was to free what lay behind.
            run.disk.flush()
    refused = facts.after["size"] == facts.before["size"]
    assert refused or facts.after["size"] == size_bytes, "the size is what was asked for"


@operation("compact")
def _compact(run: Run, step: Step) -> None:  # noqa: ARG001
    """Nothing that anybody reads changes, and the file becomes no longer."""
    if not run.spec.external:
        before = run.memory.size()
        with run.altering() as facts:
            compact_disk(run.disk)
        assert run.memory.size() <= before, "the file is no longer"
        assert facts.after == facts.before, "compacting changes nothing"


@operation("rebase")
def _rebase(run: Run, step: Step) -> None:  # noqa: ARG001
    """Away from its backing file, and back over it by another name. With snapshots it is refused."""
    if run.below is None or run.disk.header.snapshot_count:
        return
    with run.altering():
        if run.disk.header.backing_name is not None:
            rebase_disk(run.disk, None, None, None)
        else:
            rebase_disk(run.disk, "another", run.spec.backing, run.open_below())


@operation("commit")
def _commit(run: Run, step: Step) -> None:  # noqa: ARG001
    """Into the backing file, which is open for writing just as long. With snapshots it is refused."""
    if run.disk.header.backing_name is None or run.disk.header.snapshot_count:
        return
    with run.flushing():
        run.disk.close()
    run.open_again(writable_below=True)
    base = run.disk.backing
    assert isinstance(base, RawDisk | Qcow2Disk)
    with run.altering():
        commit_disk(run.disk, base)
    with run.flushing():
        run.disk.close()
    run.open_again()


@operation("amend_refcounts")
def _amend_refcounts(run: Run, step: Step) -> None:  # noqa: ARG001
    """Wider and narrower. Version 2 has one width only."""
    header = run.disk.header
    if header.version >= 3:
        with run.altering():
            amend_disk(run.disk, Amendment(refcount_bits={16: 8, 8: 16}.get(1 << header.refcount_order, 16)))


@operation("amend_version")
def _amend_version(run: Run, step: Step) -> None:  # noqa: ARG001
    """Back and forth, where version 2 can hold the image."""
    header = run.disk.header
    if header.version < 3 or not (
        header.snapshot_count or header.bitmaps or header.encryption or header.geometry.extended_l2 or run.spec.external
    ):
        with run.altering():
            amend_disk(run.disk, Amendment(version=5 - header.version))


@operation("amend_keys")
def _amend_keys(run: Run, step: Step) -> None:  # noqa: ARG001
    """A second passphrase is added, and erased."""
    if run.spec.luks:
        second = b"second"
        has_two = len(read_luks(run.memory, run.disk.header).active) > 1
        change = KeyChange(old_secret=second) if has_two else KeyChange(new_secret=second, iter_time_ms=1)
        with run.altering():
            amend_disk(run.disk, Amendment(keys=change), secrets)


@operation("amend_lazy")
def _amend_lazy(run: Run, step: Step) -> None:  # noqa: ARG001
    header = run.disk.header
    if header.version >= 3:
        with run.altering():
            amend_disk(run.disk, Amendment(lazy_refcounts=not header.compatible & Compatible.LAZY_REFCOUNTS))
