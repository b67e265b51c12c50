"""Internal snapshots of an image: list, create, apply, delete. What holds on disk meanwhile: see ``qcow2.snapshots``.

The changes are made on an open disk, which may be in use: whoever reads or writes it waits until the change is made, and
all that was written before is durable then. Light to import, for ``snapshot -l``: no numpy before something changes.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from cowfence.qcow2.header import read_header
from cowfence.qcow2.snapshot_table import Snapshot, check_name, read_snapshots
from cowfence.storage.file import FileStorage

if TYPE_CHECKING:
    from cowfence.qcow2.image import Qcow2Disk

__all__ = ["Snapshot", "apply_snapshot", "create_snapshot", "delete_snapshot", "list_snapshots"]


def list_snapshots(path: str | os.PathLike[str], *, lock: bool = True, force_share: bool = False) -> tuple[Snapshot, ...]:
    """The snapshots of the qcow2 image at ``path``, in the order of its table; opens exactly that file.

    Raises NotThisFormat, Corrupt, Unsupported, Locked, Invalid (no regular file), StorageFailed.
    """
    storage = FileStorage.open(path, lock=lock, force_share=force_share)
    try:
        header = read_header(storage)
        return read_snapshots(storage, header) if header.snapshot_count else ()
    finally:
        storage.close()


def create_snapshot(disk: Qcow2Disk, name: str, *, date_nanoseconds: int | None = None) -> Snapshot:
    """Take a snapshot of the disk as it is now. ``date_nanoseconds``: since the Epoch (default: now).

    Raises Invalid (a name that cannot be, refcounts too narrow for one more snapshot), Corrupt (the image is damaged, and must
    be repaired first), ReadOnly, NoSpace, StorageFailed; then nothing has happened.
    """
    from cowfence.qcow2 import snapshots

    check_name(name)
    date = time.time_ns() if date_nanoseconds is None else date_nanoseconds
    return disk.alter(lambda alteration: snapshots.create(alteration, name, date))


def apply_snapshot(disk: Qcow2Disk, which: str) -> Snapshot:
    """Make the disk what it was when a snapshot was taken, its size included: what was written since is gone. ``which``: an id,
    or else a name.

    Raises Invalid (there is none, refcounts too narrow), and else as ``create_snapshot`` does.
    """
    from cowfence.qcow2 import snapshots

    return disk.alter(lambda alteration: snapshots.apply(alteration, which))


def delete_snapshot(disk: Qcow2Disk, which: str) -> Snapshot:
    """Delete a snapshot. ``which``: a name, or else an id (in this order, as ``qemu-img snapshot -d`` takes it).

    Raises Invalid (there is none), and else as ``create_snapshot`` does.
    """
    from cowfence.qcow2 import snapshots

    return disk.alter(lambda alteration: snapshots.delete(alteration, which))
