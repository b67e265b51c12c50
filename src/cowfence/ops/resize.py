"""Resize a disk, qcow2 or raw. What holds on disk meanwhile: see ``qcow2.resize``.

A raw image grows by the length of its file, whose new bytes read as zeros; host space that is asked for is taken before the
length is fenced.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowfence.errors import Invalid, Unsupported
from cowfence.qcow2.describe import JsonValue

if TYPE_CHECKING:
    from cowfence.disk.opener import Refs
    from cowfence.disk.raw import RawDisk
    from cowfence.qcow2.commit import Progress
    from cowfence.qcow2.encryption import Secrets
    from cowfence.qcow2.image import Qcow2Disk
    from cowfence.storage.rehearsal import Rehearsal

PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")
MAX_SIZE_BYTES: Final = (1 << 63) - 1 & ~511


@dataclass(frozen=True, slots=True)
class Resized:
    """The image, and the sizes of its disk before and after."""

    path: str
    old_size_bytes: int
    size_bytes: int

    def to_dict(self) -> dict[str, JsonValue]:
        return {"filename": self.path, "old-virtual-size": self.old_size_bytes, "virtual-size": self.size_bytes}


def resize_disk(
    disk: Qcow2Disk | RawDisk,
    size_bytes: int,
    *,
    shrink: bool = False,
    preallocation: str = "off",
    progress: Progress | None = None,
) -> None:
    """Give an open disk another size, durably; whoever uses it waits meanwhile. Its new part reads as zeros.

    ``shrink``: it may become smaller; what lies behind its new end is gone then. ``preallocation``: see
    ``qcow2.resize.Preallocation``; of a raw disk "off", "falloc" or "full". ``progress`` is told the fraction of it that is
    done.

    Raises Invalid (the size, or a smaller one without ``shrink``), Unsupported, ReadOnly, NoSpace, Corrupt, StorageFailed.
    """
    from cowfence.disk.raw import RawDisk

    if preallocation not in PREALLOCATIONS:
        raise Invalid(f"Invalid preallocation mode '{preallocation}'")
    if not 0 < size_bytes <= MAX_SIZE_BYTES:
        raise Invalid("New image size must be positive")
    if size_bytes <= disk.size and preallocation != "off":
        raise Invalid("Preallocation can only be used for growing images")
    if size_bytes < disk.size and not shrink:
        raise Invalid("Use the --shrink option to perform a shrink operation.")
    if isinstance(disk, RawDisk):
        if preallocation == "metadata":
            raise Unsupported(disk.name, f"Unsupported preallocation mode: {preallocation}")
        disk.resize(size_bytes, reserve=preallocation == "falloc", fill=preallocation == "full", progress=progress)
        return
    from cowfence.qcow2.resize import Preallocation, resize

    mode = Preallocation(preallocation)
    disk.alter(lambda alteration: resize(alteration, size_bytes, mode, progress=progress))


def resize(
    path: str | os.PathLike[str],
    size_bytes: int,
    *,
    relative: int = 0,
    format: str = "qcow2",
    shrink: bool = False,
    preallocation: str = "off",
    refs: Refs | None = None,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
    progress: Progress | None = None,
) -> Resized:
    """Resize the image at ``path``. ``relative``: 1 adds ``size_bytes`` to its size, -1 takes them away, 0 sets it.

    ``rehearsal``: nothing is written to the files. Raises as ``resize_disk`` and ``chain.open_chain`` do.
    """
    from cowfence.chain import open_chain

    with open_chain(
        path,
        format=format,
        writable=True,
        refs=refs,
        assume_backing_format=assume_backing_format,
        secrets=secrets,
        rehearsal=rehearsal,
    ) as disk:
        old_bytes = disk.size
        wanted_bytes = old_bytes + relative * size_bytes if relative else size_bytes
        resize_disk(disk, wanted_bytes, shrink=shrink, preallocation=preallocation, progress=progress)
        return Resized(os.fspath(path), old_bytes, disk.size)
