"""Change the persistent dirty bitmaps of an image, or list what one of them has recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from cowfence.chain import open_chain
from cowfence.disk.opener import Refs
from cowfence.errors import CowfenceError, Invalid
from cowfence.qcow2.bitmaps import Bitmap
from cowfence.qcow2.dirty_bits import DirtyBits
from cowfence.qcow2.image import Options, Qcow2Disk

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import Secrets
    from cowfence.storage.rehearsal import Rehearsal


class Verb(Enum):
    ADD = "add"
    REMOVE = "remove"
    CLEAR = "clear"
    ENABLE = "enable"
    DISABLE = "disable"
    MERGE = "merge"


class Action(NamedTuple):
    """One change. ``source``: for MERGE, the name of the bitmap that is merged in."""

    verb: Verb
    source: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """The bitmaps of the image afterwards."""

    bitmaps: tuple[Bitmap, ...]

    def to_dict(self) -> dict[str, object]:
        return {"bitmaps": [bitmap._asdict() for bitmap in self.bitmaps]}


def change_bitmap(
    path: str | os.PathLike[str],
    name: str,
    actions: Sequence[Action],
    *,
    format: str = "qcow2",
    granularity_bytes: int | None = None,
    source: str | os.PathLike[str] | None = None,
    source_format: str = "qcow2",
    refs: Refs | None = None,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
) -> Changed:
    """Carry out the actions on the bitmap ``name``, in their order, each atomic.

    ``source``: the image that MERGE takes its bitmap from (default: the same one). ``secrets``: of an encrypted image; without,
    its bitmaps are changed all the same. ``rehearsal``: nothing is written. Raises Invalid, and what opening the images raises.
    """
    options = Options(commit_interval=None)
    _only_qcow2(path, format)
    with ExitStack() as images:
        disk = images.enter_context(
            open_chain(path, writable=True, refs=refs, options=options, backing=False, secrets=secrets, rehearsal=rehearsal)
        )
        other = disk
        if source is not None:
            # Before anything is changed.
            _only_qcow2(source, source_format)
            other = images.enter_context(open_chain(source, refs=refs, backing=False))
        for action in actions:
            bitmaps = disk.bitmaps
            try:
                match action.verb:
                    case Verb.ADD:
                        bitmaps.add(name, granularity_bytes=granularity_bytes)
                    case Verb.REMOVE:
                        bitmaps.remove(name)
                    case Verb.CLEAR:
                        bitmaps.clear(name)
                    case Verb.ENABLE:
                        bitmaps.enable(name)
                    case Verb.DISABLE:
                        bitmaps.disable(name)
                    case Verb.MERGE:
                        bitmaps.merge(name, [_bits_to_merge(disk, other, action.source)])
            except Invalid as error:
                raise Invalid(f"Operation {action.verb.value} on bitmap {name} failed: {error}") from None
        return Changed(tuple(disk.bitmaps))


def dirty_extents(
    path: str | os.PathLike[str],
    name: str,
    *,
    format: str = "qcow2",
    refs: Refs | None = None,
    force_share: bool = False,
) -> list[tuple[int, int]]:
    """The ranges (offset, length in bytes) that a bitmap has recorded. Raises Invalid, and what opening raises."""
    _only_qcow2(path, format)
    with open_chain(path, refs=refs, force_share=force_share, backing=False) as disk:
        return disk.bitmaps.ranges(name)


def _bits_to_merge(disk: Qcow2Disk, source: Qcow2Disk, name: str) -> DirtyBits:
    bits = source.bitmaps.bits_of(name)
    if source.size != disk.size:
        sizes = f"destination size is {disk.size}, source size is {source.size}"
        raise Invalid(f"Bitmaps are of different sizes ({sizes}) and can't be merged")
    return bits


def _only_qcow2(path: str | os.PathLike[str], format: str) -> None:
    if format != "qcow2":
        raise CowfenceError(f"{os.fspath(path)}: format {format} has no persistent bitmaps")
