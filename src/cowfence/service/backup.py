"""A live disk as it was at one moment, while it goes on being written.

An internal snapshot is taken, which is one transaction, and exported read-only. From then on every cluster that the guest
overwrites is copied first, as for any snapshot. At the end the snapshot is deleted, again in one transaction. If the server is
killed meanwhile, the snapshot is still there, and costs nothing but space: the next backup of that name deletes it.

Incremental backups: a bitmap that records is replaced by a new one, which records from before the snapshot on; the old one
stops after it, and tells what has changed up to the moment. It stays until the backup is known to be good: if it is not, both
become one again (``take_back``), and nothing is lost.
"""

from __future__ import annotations

import os
from typing import Final

import cowfence
from cowfence.chain import open_chain
from cowfence.disk.opener import Refs, printable
from cowfence.errors import Invalid, Unsupported
from cowfence.nbd.export import Export
from cowfence.ops.snapshot import create_snapshot, delete_snapshot
from cowfence.qcow2.encryption import Secrets
from cowfence.qcow2.snapshot_table import Snapshot
from cowfence.storage.file import FileStorage

BACKUP_PREFIX: Final = "cowfence-backup:"


class Backup:
    """An export of ``disk``, the open image at ``path``, as it is now. ``bitmap``: what it has recorded is told with it, and it
    records no more; ``next_bitmap`` begins to record. ``clients``: see ``Export``.

    Raises Unsupported for images that cannot have snapshots, and as ``create_snapshot`` and ``Bitmaps`` do; then no backup has
    begun.
    """

    def __init__(
        self,
        name: str,
        disk: cowfence.Qcow2Disk | cowfence.RawDisk,
        path: str,
        *,
        refs: Refs | None = None,
        secrets: Secrets | None = None,
        assume_backing_format: str | None = None,
        bitmap: str | None = None,
        next_bitmap: str | None = None,
        clients: frozenset[str] | None = None,
    ) -> None:
        if not isinstance(disk, cowfence.Qcow2Disk):
            raise Unsupported(printable(path), "a backup of a moment of a raw image, which has no snapshots")
        if (bitmap is None) != (next_bitmap is None):
            raise Invalid("an incremental backup needs a bitmap, and the name of the next one")
        self.disk = disk
        self.bitmap, self.next_bitmap = bitmap, next_bitmap
        self._snapshot = BACKUP_PREFIX + name
        self._end()  # what a backup of this name left when its server was killed
        # What is written until both are done stands in both bitmaps: more is copied than has to be, never less.
        if bitmap is not None and next_bitmap is not None:
            _begin_next(disk, bitmap, next_bitmap)
        view: cowfence.Qcow2Disk | None = None
        try:
            create_snapshot(disk, self._snapshot)
            if bitmap is not None:
                disk.bitmaps.disable(bitmap)
            view = open_moment(
                disk, path, self._snapshot, refs=refs, secrets=secrets, assume_backing_format=assume_backing_format
            )
            ranges = None if bitmap is None else disk.bitmaps.bits_of(bitmap).ranges
        except BaseException:
            if view is not None:
                view.close()
            self._end()
            if bitmap is not None and next_bitmap is not None:
                take_back(disk, bitmap, next_bitmap)
            raise
        self._view = view
        self.export = Export(
            self._view,
            read_only=True,
            description=f"as it was when the backup {name} began",
            bitmaps={} if bitmap is None or ranges is None else {bitmap: ranges},
            allocation_depth=True,
            clients=clients,
        )

    def _end(self) -> None:
        if self.disk.writable and any(snapshot.name == self._snapshot for snapshot in self.disk.snapshots()):
            delete_snapshot(self.disk, self._snapshot)

    def close(self) -> None:
        """Nothing of the moment is kept any more. Raises what deleting the snapshot raises."""
        self._view.close()
        self._end()


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


def _begin_next(disk: cowfence.Qcow2Disk, old: str, new: str) -> None:
    """``new`` records what ``old`` does. Raises Invalid where that does not record."""
    held = next((bitmap for bitmap in disk.bitmaps if bitmap.name == old), None)
    if held is None:
        raise Invalid(f"Dirty bitmap '{old}' not found")
    if not held.enabled:
        raise Invalid(f"bitmap {old!a} does not record")
    disk.bitmaps.add(new, granularity_bytes=held.granularity_bytes)


def take_back(disk: cowfence.Qcow2Disk, old: str, new: str) -> None:
    """A backup did not come to be: ``old`` records again, all that ``new`` has recorded too, which is removed."""
    disk.bitmaps.enable(old)
    disk.bitmaps.merge(old, [disk.bitmaps.bits_of(new)])
    disk.bitmaps.remove(new)
