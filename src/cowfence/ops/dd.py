"""Copy a range of one disk into a new image, raw or qcow2; zeros stay holes.

The target is made under a temporary name and appears whole when all is copied and durable; a block device is written in place.
Any error, of the source too, fails the whole copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowfence.disk.base import Disk
from cowfence.disk.opener import printable
from cowfence.disk.raw import RawDisk
from cowfence.errors import Invalid, NoSpace, Unsupported
from cowfence.ops.create import CreateOptions, settle, write_empty
from cowfence.qcow2.describe import JsonValue
from cowfence.qcow2.image import Options, open_image
from cowfence.storage.publish import NewFile
from cowfence.units import KIB, MIB

if TYPE_CHECKING:
    from cowfence.storage.rehearsal import Rehearsal

MAX_BLOCK_BYTES: Final = (1 << 31) - 1
_PIECE_BYTES: Final = MIB
_ZERO_BYTES: Final = 4 * KIB
"""Zeros are looked for in units of this."""
_ZEROS: Final = bytes(_PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied: the size of the new disk, and how many of its bytes were written (the rest are holes)."""

    source: str
    target: str
    size_bytes: int
    written_bytes: int

    def to_dict(self) -> dict[str, JsonValue]:
        return {"source": self.source, "target": self.target, "size": self.size_bytes, "written": self.written_bytes}


def dd(
    disk: Disk,
    source: str,
    target: str | os.PathLike[str],
    *,
    target_format: str = "raw",
    block_bytes: int = 512,
    count: int | None = None,
    skip: int = 0,
    rehearsal: Rehearsal | None = None,
    progress: Callable[[float], None] | None = None,
) -> Copied:
    """Copy ``count`` blocks (None: all), after ``skip`` blocks, of ``disk``, whose name is ``source``, into a new image at
    ``target``.

    ``rehearsal``: nothing is written to the files. Raises Invalid (the numbers, or ``skip`` past the end), NoSpace, Corrupt,
    StorageFailed, and as ``storage.publish`` does.
    """
    if not 1 <= block_bytes <= MAX_BLOCK_BYTES:
        raise Invalid(f"a block size of {block_bytes} bytes; must be between 1 and {MAX_BLOCK_BYTES}")
    if skip < 0 or (count is not None and count < 0):
        raise Invalid("the numbers of blocks to skip and to copy must not be negative")
    start = skip * block_bytes
    if start > disk.size:
        raise Invalid(f"{printable(source)}: cannot skip {start} bytes, the disk has {disk.size}")
    length_bytes = disk.size - start if count is None else min(disk.size - start, count * block_bytes)
    written_bytes = _copy_into_new(disk, start, length_bytes, target, target_format, rehearsal, progress)
    return Copied(source, os.fspath(target), length_bytes, written_bytes)


def _copy_into_new(
    disk: Disk,
    start: int,
    length_bytes: int,
    path: str | os.PathLike[str],
    target_format: str,
    rehearsal: Rehearsal | None,
    progress: Callable[[float], None] | None,
) -> int:
    with NewFile(path) if rehearsal is None else rehearsal.new_file(path) as new:
        if target_format == "raw":
            if not new.in_place:
                new.storage.truncate(length_bytes, "create.size")
            elif new.storage.size() < length_bytes:
                raise NoSpace(f"{new.path}: the device has {new.storage.size()} bytes, {length_bytes} are needed")
            target: Disk = RawDisk(new.storage)
        else:
            if new.in_place:
                raise Unsupported(new.path, "a qcow2 image on a block device as the target of dd")
            write_empty(new.storage, settle(path, CreateOptions(target_format, length_bytes)))
            target = open_image(new.storage, backing=None, writable=True, options=Options(commit_interval=None))
        written_bytes = _copy(disk, start, length_bytes, target, zero_first=new.in_place, progress=progress)
        target.close()
        new.publish()
        return written_bytes


def _copy(
    disk: Disk,
    start: int,
    length_bytes: int,
    target: Disk,
    *,
    zero_first: bool,
    progress: Callable[[float], None] | None,
) -> int:
    """Copy into a target that reads as zeros, or is made so first. Returns the bytes written."""
    written_bytes = 0
    buffer = memoryview(bytearray(_PIECE_BYTES))
    if zero_first:
        target.zero(0, length_bytes)
    for extent in disk.extents(start, length_bytes):
        if extent.zero:
            continue
        for at in range(extent.start, extent.end, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, extent.end - at)]
            disk.read_into(at, piece)
            for first, last in _data_runs(piece):
                target.write(at - start + first, piece[first:last])
                written_bytes += last - first
            if progress is not None:
                progress((at - start + len(piece)) / length_bytes)
    return written_bytes


def _data_runs(piece: memoryview) -> list[tuple[int, int]]:
    """The parts of ``piece`` that are not all zeros, as (start, end), in units of 4 KiB."""
    if piece == _ZEROS[: len(piece)]:
        return []
    runs: list[tuple[int, int]] = []
    for at in range(0, len(piece), _ZERO_BYTES):
        unit = piece[at : at + _ZERO_BYTES]
        if unit != _ZEROS[: len(unit)]:
            if runs and runs[-1][1] == at:
                runs[-1] = (runs[-1][0], at + len(unit))
            else:
                runs.append((at, at + len(unit)))
    return runs
