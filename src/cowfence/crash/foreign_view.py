"""What the files of a crash state show: the guest's bytes, the snapshots', and what is fatally wrong with the structure.

A foreign image with the dirty bit (lazy refcounts) is judged after its rebuild, made on a copy in memory, as the program itself
would make it at its next open. Backing files are other files of the same state; no path is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cowfence.disk.base import Disk
from cowfence.disk.raw import RawDisk
from cowfence.errors import Corrupt, CowfenceError, Unsupported
from cowfence.qcow2.assemble import assemble
from cowfence.qcow2.findings import Grade
from cowfence.qcow2.header import Header, Incompatible, read_header
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.repair import rebuild_dirty
from cowfence.qcow2.snapshot_table import read_snapshots
from cowfence.qcow2.verify import verify
from cowfence.storage.memory import MemoryStorage
from cowfence.units import SECTOR_BYTES

_OPTIONS = Options(commit_interval=None)
_DEPTH_MAX = 8
DISK_MAX_BYTES = 1 << 30
"""Larger disks and files are not judged: every state is held in memory, and a log may come from anywhere."""


@dataclass(frozen=True, slots=True)
class View:
    """What a state shows. ``error``: why it does not open; then the rest is empty.

    ``unreadable``: guest sectors whose reading fails, and why (in ``guest`` they are zeros). ``snapshots``: (id, name) to
    (size in bytes, digest or error). ``findings``: fatal ones. ``backing``: the name of the backing file.
    """

    error: str | None = None
    size_bytes: int = 0
    guest: bytes = b""
    unreadable: Mapping[int, str] | None = None
    snapshots: Mapping[tuple[str, str], tuple[int, str]] | None = None
    findings: tuple[str, ...] = ()
    backing: str | None = None


def look(files: Mapping[str, bytes], image: str) -> View:
    """Open the image of a state, read all of it and check it. Raises Unsupported: what we cannot read, we cannot judge."""
    try:
        storage, header = _storage(files, image)
        disk = _open(files, image, "qcow2")
    except Unsupported:
        raise
    except CowfenceError as error:
        return View(error=str(error))
    if disk.size > DISK_MAX_BYTES:
        return View(error=f"a disk of {disk.size} bytes: more than {DISK_MAX_BYTES} are not judged")
    guest, unreadable = _read(disk)
    snapshots: dict[tuple[str, str], tuple[int, str]] = {}
    findings: tuple[str, ...]
    try:
        backing = _backing(files, header)
        for snapshot in read_snapshots(storage, header):
            below = replace(
                header,
                l1_offset=snapshot.l1_offset,
                l1_entries=snapshot.l1_entries,
                size_bytes=snapshot.disk_size_bytes,
                incompatible=header.incompatible & ~Incompatible.DIRTY,
            )
            snapshots[snapshot.id, snapshot.name] = _digest(storage, below, backing)
        findings = tuple(str(finding) for finding in verify(storage).findings if finding.grade is Grade.FATAL)
    except CowfenceError as error:
        findings = (str(error),)
    return View(None, disk.size, guest, unreadable, snapshots, findings, header.backing_file)


def _storage(files: Mapping[str, bytes], name: str) -> tuple[MemoryStorage, Header]:
    content = files.get(name)
    if content is None:
        raise Corrupt(name, "the run has no such file")
    storage = MemoryStorage(content, name=name)
    header = read_header(storage)
    if header.incompatible & Incompatible.DIRTY:
        rebuild_dirty(storage)
        header = read_header(storage)
    return storage, header


def _open(files: Mapping[str, bytes], name: str, format_name: str, depth: int = 0) -> Disk:
    if depth > _DEPTH_MAX:
        raise Corrupt(name, "the chain of backing files is too deep")
    if format_name == "raw":
        return RawDisk(MemoryStorage(files.get(name, b""), name=name, writable=False))
    storage, header = _storage(files, name)
    return open_image(storage, backing=_backing(files, header, depth), writable=False, options=_OPTIONS)


def _backing(files: Mapping[str, bytes], header: Header, depth: int = 0) -> Disk | None:
    if header.backing_file is None:
        return None
    name = header.backing_file.rsplit("/", 1)[-1]
    return _open(files, name, header.backing_format or "raw", depth + 1)


def _digest(storage: MemoryStorage, header: Header, backing: Disk | None) -> tuple[int, str]:
    try:
        disk = Qcow2Disk(assemble(storage, header, backing, _OPTIONS), _OPTIONS, writable=False)
        if disk.size > DISK_MAX_BYTES:
            return disk.size, "too large to be judged"
        return disk.size, hashlib.blake2b(disk.read(0, disk.size), digest_size=8).hexdigest()
    except CowfenceError as error:
        return header.size_bytes, str(error)


def _read(disk: Disk) -> tuple[bytes, dict[int, str]]:
    try:
        return disk.read(0, disk.size), {}
    except CowfenceError:
        pass
    guest, unreadable = bytearray(disk.size), {}
    for offset in range(0, disk.size, disk.block_bytes):
        length_bytes = min(disk.block_bytes, disk.size - offset)
        try:
            guest[offset : offset + length_bytes] = disk.read(offset, length_bytes)
        except CowfenceError as error:
            for sector in range(offset // SECTOR_BYTES, -(-(offset + length_bytes) // SECTOR_BYTES)):
                unreadable[sector] = str(error)
    return bytes(guest), unreadable
