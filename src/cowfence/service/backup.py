"""Exports of a live disk as it was at one moment, while it goes on being written: of a backup, and of internal snapshots.

What a backup keeps, and in which order: see ``ops.backup``. If the server ends before the backup does, it counts as one that
failed.
"""

from __future__ import annotations

import os

import cowfence
from cowfence.chain import open_chain
from cowfence.disk.opener import Refs, printable
from cowfence.errors import CowfenceError, Invalid, Unsupported
from cowfence.nbd.export import Export
from cowfence.ops.backup import BackupPlan, begin_backup, end_backup
from cowfence.qcow2.dirty_bits import DirtyBits
from cowfence.qcow2.encryption import Secrets
from cowfence.qcow2.snapshot_table import Snapshot
from cowfence.storage.file import FileStorage


class Backup:
    """An export of ``disk``, the open image at ``path``, as it is now. What the plan's bitmap has recorded is told with it.
    ``clients``: see ``Export``.

    Raises Unsupported for images that cannot have snapshots, and as ``begin_backup`` does; then no backup has begun.
    """

    def __init__(
        self,
        plan: BackupPlan,
        disk: cowfence.Qcow2Disk | cowfence.RawDisk,
        path: str,
        *,
        refs: Refs | None = None,
        secrets: Secrets | None = None,
        assume_backing_format: str | None = None,
        clients: frozenset[str] | None = None,
    ) -> None:
        if not isinstance(disk, cowfence.Qcow2Disk):
            raise Unsupported(printable(path), "a backup of a moment of a raw image, which has no snapshots")
        self.disk, self.plan = disk, plan
        self.failed = True
        """What it counts as when it is closed."""
        self.failure: CowfenceError | None = None
        """What closing it raised."""
        begin_backup(disk, plan)
        view: cowfence.Qcow2Disk | None = None
        try:
            view = open_moment(
                disk, path, plan.snapshot_name, refs=refs, secrets=secrets, assume_backing_format=assume_backing_format
            )
            bitmaps = {} if plan.bitmap is None else {plan.bitmap: _bits(disk, plan.bitmap, view.size).ranges}
        except BaseException:
            if view is not None:
                view.close()
            end_backup(disk, plan, failed=True)
            raise
        self._view = view
        self.export = Export(
            self._view,
            read_only=True,
            description=f"as it was when the backup {plan.name} began",
            bitmaps=bitmaps,
            allocation_depth=True,
            clients=clients,
        )

    def close(self) -> None:
        """Nothing of the moment is kept any more. Raises as ``end_backup`` does."""
        self._view.close()
        try:
            end_backup(self.disk, self.plan, failed=self.failed)
        except CowfenceError as error:
            self.failure = error
            raise


def _bits(disk: cowfence.Qcow2Disk, bitmap: str, size_bytes: int) -> DirtyBits:
    """A bitmap's bits for the disk as it was at the moment. It may have become smaller before the bitmap stopped: of what was
    cut off nothing is known any more, so all of it is copied."""
    bits = disk.bitmaps.bits_of(bitmap)
    known_bytes = bits.size_bytes
    if known_bytes < size_bytes:
        bits.resize(size_bytes)
        bits.mark(known_bytes, size_bytes - known_bytes)
    return bits


class Moment:
    """An export of an internal snapshot of ``disk``, the open image at ``path``, which must not be deleted meanwhile.

    Raises as ``open_moment`` does.
    """

    def __init__(
        self,
        disk: cowfence.Qcow2Disk,
        path: str,
        snapshot: Snapshot,
        *,
        refs: Refs | None = None,
        secrets: Secrets | None = None,
        assume_backing_format: str | None = None,
        clients: frozenset[str] | None = None,
    ) -> None:
        self.disk, self.snapshot = disk, snapshot
        self._view = open_moment(
            disk, path, snapshot.id, refs=refs, secrets=secrets, assume_backing_format=assume_backing_format
        )
        self.export = Export(self._view, read_only=True, description=f"the snapshot {snapshot.name}", clients=clients)

    def close(self) -> None:
        self._view.close()


def open_moment(
    disk: cowfence.Qcow2Disk,
    path: str,
    snapshot: str,
    *,
    refs: Refs | None,
    secrets: Secrets | None,
    assume_backing_format: str | None,
) -> cowfence.Qcow2Disk:
    """The disk as it was when a snapshot was taken, beside ``disk``, which goes on being written: what a snapshot leads to is
    never changed in place. Raises Invalid where ``path`` leads to another file by now, and as ``chain.open_chain`` does."""
    view = open_chain(
        path,
        refs=refs,
        lock=False,  # held by the disk
        assume_backing_format=assume_backing_format,
        snapshot=snapshot,
        secrets=secrets,
    )
    found = [os.fstat(one.storage.fileno()) for one in (view, disk) if isinstance(one.storage, FileStorage)]
    if len(found) != 2 or not os.path.samestat(*found):
        view.close()
        raise Invalid(f"{printable(path)}: another file stands there now")
    return view
