"""Compact an image in place: its file becomes as short as its content allows.

What holds on disk meanwhile: see ``qcow2.compact``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfence.qcow2.describe import JsonValue

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import Secrets
    from cowfence.qcow2.image import Qcow2Disk
    from cowfence.storage.base import Storage


@dataclass(frozen=True, slots=True)
class CompactResult:
    """Lengths of the file in bytes. ``moved``: clusters, and streams of compressed data. ``dry_run``: nothing was changed."""

    path: str
    old_bytes: int
    new_bytes: int
    moved: int
    dry_run: bool

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "filename": self.path,
            "old-file-size": self.old_bytes,
            "file-size": self.new_bytes,
            "moved-clusters": self.moved,
            "dry-run": self.dry_run,
        }


def compact_disk(disk: Qcow2Disk, *, progress: Callable[[float], None] | None = None) -> tuple[int, int, int]:
    """Compact the image of an open disk; whoever uses it waits meanwhile. Returns the file's length before and after, in bytes,
    and how many clusters were moved. Raises as ``qcow2.compact`` does."""
    from cowfence.qcow2.compact import compact as compact_image

    done = disk.alter(lambda alteration: compact_image(alteration, progress=progress))
    return done.old_bytes, done.new_bytes, done.moved


def compact(
    path: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    secrets: Secrets | None = None,
    progress: Callable[[float], None] | None = None,
) -> CompactResult:
    """Compact the image at ``path``. ``dry_run``: do it in memory only, and say how short the file would become.

    Where bitmaps record, closing the image stores their bits anew, behind what was compacted.

    Raises as ``qcow2.compact`` does, and what opening it for writing raises.
    """
    from cowfence.qcow2.image import open_image
    from cowfence.storage.file import FileStorage
    from cowfence.storage.rehearsal import Rehearsal

    storage: Storage = FileStorage.open(path, writable=not dry_run)
    try:
        if dry_run:
            storage = Rehearsal().over(storage)
        # Nothing of a backing file is read or moved.
        disk = open_image(storage, backing=None, writable=True, secrets=secrets)
    except BaseException:
        storage.close()
        raise
    with disk:
        old_bytes = storage.size()
        _, new_bytes, moved = compact_disk(disk, progress=progress)
    return CompactResult(os.fspath(path), old_bytes, new_bytes, moved, dry_run)
