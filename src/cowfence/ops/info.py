"""Describe an image. Opens exactly one file: the name of a backing or data file in it is shown, never followed.

Only ``info_chain`` goes on to backing files, under the same policy as opening a disk. Light: no numpy, no engine.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cowfence.errors import Unsupported
from cowfence.qcow2.describe import ImageInfo, describe, describe_luks, describe_other, probe
from cowfence.storage.file import FileStorage
from cowfence.units import SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.disk.base import Disk
    from cowfence.disk.opener import Refs

__all__ = ["ImageInfo", "info", "info_chain", "info_disk"]


def info(path: str | os.PathLike[str], *, format: str | None = None, lock: bool = True, force_share: bool = False) -> ImageInfo:
    """Describe the image at ``path``. ``format``: None looks at the file, and says "unknown" for what is no qcow2 image.

    Raises NotThisFormat, Corrupt, Unsupported, Locked, Invalid (no regular file), StorageFailed.
    """
    storage = FileStorage.open(path, lock=lock, force_share=force_share)
    try:
        return _describe(storage, format)
    finally:
        storage.close()


def info_chain(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    refs: Refs,
    lock: bool = True,
    force_share: bool = False,
    assume_backing_format: str | None = None,
) -> tuple[ImageInfo, ...]:
    """Describe the image and the backing files below it, from the top. Each is opened as ``refs`` allows, one at a time.

    A backing file's ``filename`` is the stored name, seen from here. Raises as ``info`` does, and Refused.
    """
    from cowfence.chain import backing_format_of, lock_reference
    from cowfence.disk.opener import Place, printable
    from cowfence.qcow2.header import read_header

    found: list[ImageInfo] = []
    storage = FileStorage.open(path, lock=lock, force_share=force_share)
    try:
        place = Place.of_top(storage.fileno(), path, printable(os.fspath(path)))
        while True:
            found.append(_describe(storage, format))
            if found[-1].backing_filename is None:
                return tuple(found)
            format = backing_format_of(read_header(storage), place.name, assume_backing_format)
            opened = refs.follow(found[-1].backing_filename, place)
            place = opened.place
            storage.close()
            shown = found[-1].full_backing_filename or opened.name
            storage = lock_reference(opened, name=shown, lock=lock, force_share=force_share)
    finally:
        storage.close()


def info_disk(disk: Disk, name: str) -> ImageInfo:
    """Describe an open disk that is no local file. Raises as ``describe`` does."""
    from cowfence.qcow2.image import Qcow2Disk

    if isinstance(disk, Qcow2Disk):
        return describe(disk.storage, disk.header)
    return ImageInfo(name, "raw", align_up(disk.size, SECTOR_BYTES), dirty=None)


def _describe(storage: FileStorage, format_name: str | None) -> ImageInfo:
    if format_name is None:
        format_name = probe(storage)
    if format_name == "qcow2":
        return describe(storage)
    if format_name == "raw":
        return describe_other(storage, "raw")
    if format_name == "luks":
        return describe_luks(storage)
    if format_name == "unknown":
        return describe_other(storage, "unknown")
    raise Unsupported(storage.name, f"image format {format_name!a}; cowfence knows qcow2, raw and luks")
