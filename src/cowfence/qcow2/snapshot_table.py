"""The snapshot table: one entry of variable length for each internal snapshot (section "Snapshots" of the specification).

The header gives the table's start and the number of entries, not its length, so that it is read in slices and bounded twice:
by the limits of ``geometry``, and by the bytes that the file has. An entry keeps the bytes that it was read from, so that the
table can be written again without losing anything of those that stay, unknown extra data included.

Names and ids are those of QEMU: a new id is one more than the highest number among them, names may occur twice. What is looked
for is taken for an id first, then for a name (``find_snapshot``). A delete takes it for a name first, as ``qemu-img snapshot
-d`` does, so that the two never delete different snapshots (``find_for_delete``).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cowfence.errors import Corrupt, Invalid
from cowfence.qcow2.geometry import (
    MAX_HOST_BITS,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_EXTRA_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    TABLE_ENTRY_BYTES,
    Geometry,
    HostOffset,
)
from cowfence.qcow2.header import Header
from cowfence.storage.base import Storage
from cowfence.units import KIB, align_up

_ENTRY = struct.Struct(">QIHHIIQII")
_U64 = struct.Struct(">Q")
_SLICE_BYTES: Final = 64 * KIB
_ICOUNT_DISABLED: Final = (1 << 64) - 1
_MAX_NAME_BYTES: Final = 255
"""QEMU's limit for a new one; it reads longer ones."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry. Times: ``date_seconds`` and ``date_nanoseconds`` since the Epoch, ``vm_clock_nanoseconds`` of running time.

    ``disk_size_bytes``: of the disk when the snapshot was taken; entries of version 2 may lack it, then it is the size of the
    image. ``icount``: the record/replay instruction count, None where there is none. ``extra``: the extra data as stored;
    ``stored``: the whole entry, without padding.
    """

    id: str
    name: str
    l1_offset: HostOffset
    l1_entries: int
    date_seconds: int
    date_nanoseconds: int
    vm_clock_nanoseconds: int
    vm_state_bytes: int
    disk_size_bytes: int
    icount: int | None
    extra: bytes
    stored: bytes = field(default=b"", repr=False, compare=False)


def read_snapshots(storage: Storage, header: Header) -> tuple[Snapshot, ...]:
    """All entries of the snapshot table that ``header`` points to, in the order of the table.

    Raises Corrupt where an entry breaks the format or its limits, or the file ends before the table does.
    """
    where = f"{storage.name}: snapshot table"
    window = _Window(storage, header.snapshots_offset, where)
    return tuple(_read_entry(window, header, f"{where}: entry {index}") for index in range(header.snapshot_count))


class _Window:
    """A cursor over the table that reads the file in slices and refuses to go beyond the limit of the table's length."""

    def __init__(self, storage: Storage, start: int, where: str) -> None:
        self._storage = storage
        self._read_at = start
        self._where = where
        self._pending = bytearray()
        self._at = 0
        self._left_bytes = MAX_SNAPSHOT_TABLE_BYTES

    def take(self, length_bytes: int) -> bytes:
        """The next bytes of the table."""
        self._left_bytes -= length_bytes
        if self._left_bytes < 0:
            raise Corrupt(self._where, f"is longer than {MAX_SNAPSHOT_TABLE_BYTES} bytes")
        if not self._fill(length_bytes):
            raise Corrupt(self._where, "the file ends before the table does")
        taken = bytes(self._pending[self._at : self._at + length_bytes])
        self._at += length_bytes
        return taken

    def skip_padding(self, length_bytes: int) -> None:
        """Go past padding, which the file may lack behind the last entry."""
        self._fill(length_bytes)
        self._at += length_bytes

    def _fill(self, length_bytes: int) -> bool:
        """Read on until ``length_bytes`` are pending; False where the file ends before."""
        while len(self._pending) - self._at < length_bytes:
            piece = bytearray(_SLICE_BYTES)
            got = self._storage.readv(self._read_at, (piece,))
            if not got:
                return False
            self._read_at += got
            del self._pending[: self._at]
            self._at = 0
            self._pending += piece[:got]
        return True


def _read_entry(window: _Window, header: Header, where: str) -> Snapshot:
    (
        l1_offset,
        l1_entries,
        id_bytes,
        name_bytes,
        date_seconds,
        date_nanoseconds,
        vm_clock_nanoseconds,
        vm_state_bytes,
        extra_bytes,
    ) = _ENTRY.unpack(fixed := window.take(_ENTRY.size))
    if extra_bytes > MAX_SNAPSHOT_EXTRA_BYTES:
        raise Corrupt(where, f"has {extra_bytes} bytes of extra data, must be at most {MAX_SNAPSHOT_EXTRA_BYTES}")
    if l1_offset & (header.cluster_bytes - 1) or l1_offset >= 1 << MAX_HOST_BITS:
        raise Corrupt(where, f"L1 table offset {l1_offset:#x} is not aligned to the cluster size, or beyond 2**{MAX_HOST_BITS}")
    if l1_entries * TABLE_ENTRY_BYTES > MAX_L1_BYTES:
        raise Corrupt(where, f"an L1 table of {l1_entries} entries exceeds {MAX_L1_BYTES} bytes")
    extra = window.take(extra_bytes)
    snapshot_id = window.take(id_bytes)
    name = window.take(name_bytes)
    entry_bytes = _ENTRY.size + extra_bytes + id_bytes + name_bytes
    window.skip_padding(align_up(entry_bytes, 8) - entry_bytes)
    stored_vm_state_bytes = _extra_field(extra, 0)
    disk_size_bytes = _extra_field(extra, 8)
    icount = _extra_field(extra, 16)
    return Snapshot(
        id=snapshot_id.decode("utf-8", "surrogateescape"),
        name=name.decode("utf-8", "surrogateescape"),
        l1_offset=HostOffset(l1_offset),
        l1_entries=l1_entries,
        date_seconds=date_seconds,
        date_nanoseconds=date_nanoseconds,
        vm_clock_nanoseconds=vm_clock_nanoseconds,
        vm_state_bytes=vm_state_bytes if stored_vm_state_bytes is None else stored_vm_state_bytes,
        disk_size_bytes=header.size_bytes if disk_size_bytes is None else disk_size_bytes,
        icount=None if icount == _ICOUNT_DISABLED else icount,
        extra=extra,
        stored=fixed + extra + snapshot_id + name,
    )


def _extra_field(extra: bytes, at: int) -> int | None:
    """A 64-bit field of the extra data, or None where the entry does not have it."""
    if len(extra) < at + _U64.size:
        return None
    value: int = _U64.unpack_from(extra, at)[0]
    return value


def find_snapshot(snapshots: Sequence[Snapshot], which: str) -> Snapshot | None:
    """The snapshot with the id ``which``; where there is none, the first of that name."""
    by_id = (snapshot for snapshot in snapshots if snapshot.id == which)
    return next(by_id, next((snapshot for snapshot in snapshots if snapshot.name == which), None))


def find_for_delete(snapshots: Sequence[Snapshot], which: str) -> Snapshot | None:
    """The first snapshot named ``which``; where there is none, the one with that id (which qemu-img would not find)."""
    by_name = (snapshot for snapshot in snapshots if snapshot.name == which)
    return next(by_name, next((snapshot for snapshot in snapshots if snapshot.id == which), None))


def new_id(snapshots: Sequence[Snapshot]) -> str:
    """One more than the highest number that an id begins with."""
    numbers = (re.match(r"\s*\+?([0-9]{1,20})(?![0-9])", snapshot.id, re.ASCII) for snapshot in snapshots)
    number = 1 + max((int(found[1]) for found in numbers if found), default=0)
    taken = {snapshot.id for snapshot in snapshots}
    while str(number) in taken:
        number += 1
    return str(number)


def check_name(name: str) -> bytes:
    """The bytes of a new snapshot's name. Raises Invalid for one that is too long, or has a NUL byte."""
    stored = name.encode("utf-8", "surrogateescape")
    if len(stored) > _MAX_NAME_BYTES or b"\0" in stored:
        raise Invalid(f"the name of a snapshot has at most {_MAX_NAME_BYTES} bytes, and no NUL byte")
    return stored


def new_snapshot(
    snapshot_id: str, name: str, *, l1_offset: int, l1_entries: int, disk_size_bytes: int, date_nanoseconds: int
) -> Snapshot:
    """A snapshot of the disk alone, without the state of a machine, as an entry of the table. Raises Invalid (the name)."""
    stored_name, stored_id = check_name(name), snapshot_id.encode("utf-8", "surrogateescape")
    seconds, nanoseconds = divmod(date_nanoseconds, 10**9)
    # No machine ran: qemu-img counts no instructions then, and says 0.
    extra = struct.pack(">QQQ", 0, disk_size_bytes, 0)
    fixed = _ENTRY.pack(
        l1_offset, l1_entries, len(stored_id), len(stored_name), seconds & 0xFFFF_FFFF, nanoseconds, 0, 0, len(extra)
    )
    return Snapshot(
        id=snapshot_id,
        name=name,
        l1_offset=HostOffset(l1_offset),
        l1_entries=l1_entries,
        date_seconds=seconds & 0xFFFF_FFFF,
        date_nanoseconds=nanoseconds,
        vm_clock_nanoseconds=0,
        vm_state_bytes=0,
        disk_size_bytes=disk_size_bytes,
        icount=0,
        extra=extra,
        stored=fixed + extra + stored_id + stored_name,
    )


def encode_table(snapshots: Sequence[Snapshot], name: str) -> bytes:
    """The table as it stands on disk. Raises Invalid where it would exceed the limits of the format; ``name``: of the image."""
    table = b"".join(snapshot.stored.ljust(align_up(len(snapshot.stored), 8), b"\0") for snapshot in snapshots)
    if len(snapshots) > MAX_SNAPSHOTS or len(table) > MAX_SNAPSHOT_TABLE_BYTES:
        raise Invalid(
            f"{name}: {len(snapshots)} snapshots do not fit into the snapshot table (at most {MAX_SNAPSHOTS}, in "
            f"{MAX_SNAPSHOT_TABLE_BYTES} bytes)"
        )
    return table


def snapshot_view(storage: Storage, header: Header, which: str) -> Header:
    """The header of the disk as it was when a snapshot was taken (by id, or else by name): to read it without applying it.

    Raises Invalid where there is none, Corrupt.
    """
    snapshot = find_snapshot(read_snapshots(storage, header), which)
    if snapshot is None:
        raise Invalid(f"{storage.name}: there is no snapshot {which!a}")
    check_disk_size(snapshot, header.geometry, storage.name)
    return replace(header, size_bytes=snapshot.disk_size_bytes, l1_offset=snapshot.l1_offset, l1_entries=snapshot.l1_entries)


def check_disk_size(snapshot: Snapshot, geometry: Geometry, name: str) -> None:
    """Raises Corrupt for a snapshot of a disk that no image can have. ``name``: of the image."""
    if geometry.l1_entries_for(snapshot.disk_size_bytes) * TABLE_ENTRY_BYTES > MAX_L1_BYTES:
        raise Corrupt(
            f"{name}: snapshot {snapshot.id!a}",
            f"a disk of {snapshot.disk_size_bytes} bytes needs an L1 table of more than {MAX_L1_BYTES} bytes",
        )
