"""Put an image over another backing file. What holds on disk meanwhile: see ``qcow2.rebase``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfence.chain import FORMATS, open_backing, open_chain
from cowfence.disk.opener import Refs, check_name, printable
from cowfence.errors import Invalid, Unsupported
from cowfence.qcow2.describe import JsonValue
from cowfence.qcow2.rebase import Progress
from cowfence.qcow2.rebase import rebase as rebase_image

if TYPE_CHECKING:
    from cowfence.disk.base import Disk
    from cowfence.qcow2.encryption import Secrets
    from cowfence.qcow2.image import Qcow2Disk
    from cowfence.storage.rehearsal import Rehearsal


@dataclass(frozen=True, slots=True)
class Rebased:
    """The image and what it stands over now (None: nothing)."""

    path: str
    backing: str | None
    backing_format: str | None

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "filename": self.path,
            "backing-filename": self.backing,
            "backing-filename-format": self.backing_format,
        }


def rebase_disk(
    disk: Qcow2Disk, backing: str | None, backing_format: str | None, new: Disk | None, *, progress: Progress | None = None
) -> None:
    """Put an open disk over ``new``, which it owns when this returns; whoever uses it waits meanwhile and sees no difference.

    Raises Invalid, Unsupported, ReadOnly, NoSpace, Corrupt, StorageFailed; then it stands over the old one, and ``new`` stays
    the caller's.
    """
    disk.alter(lambda alteration: rebase_image(alteration, backing, backing_format, new, progress=progress))


def rebase(
    path: str | os.PathLike[str],
    backing: str | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    direct: bool = False,
    direct_backing: bool = False,
    refs: Refs | None = None,
    new_refs: Refs | None = None,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
    progress: Progress | None = None,
    rehearsal: Rehearsal | None = None,
) -> Rebased:
    """Put the image at ``path`` over the file that it shall call ``backing`` (None: over none, it holds all of its disk then).

    ``unsafe``: only the name changes; neither file is opened. ``direct``: the image goes around the page cache;
    ``direct_backing``: both backing files do. ``refs``: the policy for the old backing files, ``new_refs`` for
    the new ones (default: trusted, because the caller names them). ``rehearsal``: nothing is written to them. Raises as
    ``rebase_disk`` and ``chain.open_chain`` do.
    """
    name = printable(os.fspath(path))
    if backing is not None:
        check_name(backing)
        if backing_format is None:
            raise Invalid(f"Could not change the backing file to '{printable(backing)}': backing format must be specified")
        if backing_format not in FORMATS:
            raise Unsupported(name, f"backing file format {backing_format!a}; cowfence opens qcow2 and raw")
    else:
        backing_format = None
    with open_chain(
        path,
        writable=True,
        refs=refs,
        direct=direct,
        direct_backing=direct_backing,
        assume_backing_format=assume_backing_format,
        secrets=secrets,
        backing=not unsafe,
        rehearsal=rehearsal,
    ) as disk:
        if unsafe:
            disk.alter(lambda alteration: rebase_image(alteration, backing, backing_format, None, merge=False))
        else:
            new = None
            if backing is not None:
                assert backing_format is not None
                new = open_backing(
                    disk,
                    path,
                    backing,
                    backing_format,
                    refs=new_refs,
                    direct=direct_backing,
                    assume_backing_format=assume_backing_format,
                    secrets=secrets,
                )
            try:
                rebase_disk(disk, backing, backing_format, new, progress=progress)
            except BaseException:
                if new is not None:
                    new.close()
                raise
        return Rebased(os.fspath(path), backing, backing_format)
