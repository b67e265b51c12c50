"""Commit an image into a backing file. What holds on disk meanwhile: see ``qcow2.commit``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfence.chain import open_for_commit
from cowfence.ops.pace import Pace
from cowfence.ops.resize import resize_disk
from cowfence.qcow2.commit import Progress
from cowfence.qcow2.commit import commit as commit_image
from cowfence.qcow2.describe import JsonValue

if TYPE_CHECKING:
    from cowfence.disk.opener import Refs
    from cowfence.disk.raw import RawDisk
    from cowfence.qcow2.encryption import Secrets
    from cowfence.qcow2.image import Qcow2Disk
    from cowfence.storage.rehearsal import Rehearsal


@dataclass(frozen=True, slots=True)
class Committed:
    """The image, and the size of the base now. ``emptied``: the image holds nothing any more."""

    path: str
    base_size_bytes: int
    emptied: bool

    def to_dict(self) -> dict[str, JsonValue]:
        return {"filename": self.path, "base-virtual-size": self.base_size_bytes, "emptied": self.emptied}


def commit_disk(
    disk: Qcow2Disk,
    base: Qcow2Disk | RawDisk,
    *,
    keep: bool = False,
    rate_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write what an open disk holds into ``base``, which is open for writing and below it; then, unless ``keep``, empty it.
    ``rate_bytes``: at most so many a second are written.

    Whoever uses the disk waits meanwhile and sees no difference. ``keep`` where others stand between it and the base. Raises
    Unsupported (internal snapshots), ReadOnly, NoSpace, Corrupt, StorageFailed; then the disk is what it was.
    """
    disk.alter(
        lambda alteration: commit_image(
            alteration,
            base,
            lambda size_bytes: resize_disk(base, size_bytes),
            keep=keep,
            progress=progress,
            pace=Pace(rate_bytes).wait,
        )
    )


def commit(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    keep: bool = False,
    direct: bool = False,
    rate_bytes: int | None = None,
    refs: Refs | None = None,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
    progress: Progress | None = None,
    rehearsal: Rehearsal | None = None,
) -> Committed:
    """Commit the qcow2 image at ``path`` into its backing file, or into ``base``, a file further below (and keep it then).
    ``direct``: around the page cache. ``rehearsal``: nothing is written to the files.

    Raises Invalid where there is none, and as ``commit_disk`` and ``chain.open_chain`` do.
    """
    disk, below = open_for_commit(
        path,
        base=base,
        direct=direct,
        refs=refs,
        assume_backing_format=assume_backing_format,
        secrets=secrets,
        rehearsal=rehearsal,
    )
    with disk:
        keep = keep or base is not None
        commit_disk(disk, below, keep=keep, rate_bytes=rate_bytes, progress=progress)
        return Committed(os.fspath(path), below.size, not keep)
