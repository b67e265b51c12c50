"""Amend an image: version, lazy refcounts, width of refcounts, size, data file. What holds on disk meanwhile: `qcow2.amend`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfence.errors import Invalid, Unsupported
from cowfence.qcow2.describe import JsonValue

if TYPE_CHECKING:
    from cowfence.disk.opener import Refs
    from cowfence.qcow2.encryption import KeyChange, Secrets
    from cowfence.qcow2.image import Qcow2Disk
    from cowfence.storage.rehearsal import Rehearsal


@dataclass(frozen=True, slots=True)
class Amendment:
    """What shall be otherwise; None: as it is. ``version``: 2 (compat 0.10) or 3 (1.1)."""

    version: int | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    size_bytes: int | None = None
    data_file: str | None = None
    """Another name of the external data file; "": none is stored, and whoever opens the image has to know it."""
    keys: KeyChange | None = None
    """Passphrases to add or erase."""
    data_file_raw: bool | None = None
    """Whether the external data file can be read by itself; it can only be given up."""


@dataclass(frozen=True, slots=True)
class Amended:
    """The image as it is now."""

    path: str
    version: int
    lazy_refcounts: bool
    refcount_bits: int
    size_bytes: int

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "filename": self.path,
            "compat": "0.10" if self.version == 2 else "1.1",
            "lazy-refcounts": self.lazy_refcounts,
            "refcount-bits": self.refcount_bits,
            "virtual-size": self.size_bytes,
        }


def amend_disk(disk: Qcow2Disk, wanted: Amendment, secrets: Secrets | None = None) -> None:
    """Amend an open disk; whoever uses it waits meanwhile. Each change is old or new after a crash; of several, the first ones
    may be done. ``secrets``: of which one opens the image, where a passphrase is added.

    Raises Invalid (what contradicts the version, or does not fit), Unsupported, ReadOnly, NoSpace, Corrupt, StorageFailed.
    """
    from cowfence.ops.resize import resize_disk
    from cowfence.qcow2 import amend

    if wanted.version not in (None, 2, 3):
        raise Invalid(f"there is no version {wanted.version} of qcow2")
    version = wanted.version or disk.header.version
    if version == 2 and wanted.lazy_refcounts:
        raise Invalid("Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)")
    if version == 2 and wanted.refcount_bits not in (None, 16):
        raise Invalid("Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)")
    keys = wanted.keys
    if keys is not None:
        from cowfence.qcow2.encryption import change_keys

        given = [] if secrets is None else list(secrets(disk.storage.name))
        disk.alter(lambda alteration: change_keys(alteration, keys, given))
    if (wanted.data_file, wanted.data_file_raw) != (None, None):
        disk.alter(lambda alteration: amend.set_data_file(alteration, wanted.data_file, raw=wanted.data_file_raw))
    if version == 3:
        disk.alter(amend.upgrade)
    lazy, bits = wanted.lazy_refcounts, wanted.refcount_bits
    if lazy is not None:
        disk.alter(lambda alteration: amend.set_lazy_refcounts(alteration, lazy))
    if bits is not None:
        disk.alter(lambda alteration: amend.change_refcount_bits(alteration, bits))
    if wanted.size_bytes is not None:
        resize_disk(disk, wanted.size_bytes, shrink=True)
    if version == 2:
        disk.alter(amend.downgrade)


def amend(
    path: str | os.PathLike[str],
    wanted: Amendment,
    *,
    refs: Refs | None = None,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
    direct: bool = False,
) -> Amended:
    """Amend the qcow2 image at ``path``. ``rehearsal``: nothing is written to the files. ``direct``: see ``chain.open_chain``.
    Raises as that and ``amend_disk`` do."""
    from cowfence.chain import open_chain
    from cowfence.qcow2.extensions import Compatible

    with open_chain(
        path,
        writable=True,
        refs=refs,
        assume_backing_format=assume_backing_format,
        secrets=secrets,
        rehearsal=rehearsal,
        direct=direct,
    ) as disk:
        amend_disk(disk, wanted, secrets)
        header = disk.header
        lazy = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
        return Amended(os.fspath(path), header.version, lazy, 1 << header.refcount_order, disk.size)


def amend_luks(
    path: str | os.PathLike[str],
    wanted: Amendment,
    *,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
) -> None:
    """Change the keys of the LUKS file at ``path``; nothing else of it can be amended. Raises Invalid, Unsupported, Corrupt,
    Locked, StorageFailed."""
    from cowfence.ops.luks_keys import change_keys
    from cowfence.storage.file import FileStorage

    if wanted.keys is None or wanted != Amendment(keys=wanted.keys):
        raise Unsupported(os.fspath(path), "amending anything but the keys of a LUKS file")
    storage = FileStorage.open(path, writable=True) if rehearsal is None else rehearsal.open(path)
    try:
        change_keys(storage, wanted.keys, [] if secrets is None else list(secrets(storage.name)))
    finally:
        storage.close()
