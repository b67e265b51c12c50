"""The snapshot table: one entry of variable length for each internal snapshot (section "Snapshots" of the specification).

The header gives the table's start and the number of entries, not its length, so that it is read in slices and bounded twice:
by the limits of ``geometry``, and by the bytes that the file has. Unknown extra data is kept with its entry, for the day the
table is written again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from cowfence.errors import Corrupt
from cowfence.qcow2.geometry import (
    MAX_HOST_BITS,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_EXTRA_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    TABLE_ENTRY_BYTES,
    HostOffset,
)
from cowfence.qcow2.header import Header
from cowfence.storage.base import Storage
from cowfence.units import KIB, align_up

_ENTRY = struct.Struct(">QIHHIIQII")
_U64 = struct.Struct(">Q")
_SLICE_BYTES: Final = 64 * KIB
_ICOUNT_DISABLED: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry. Times: ``date_seconds`` and ``date_nanoseconds`` since the Epoch, ``vm_clock_nanoseconds`` of running time.

    ``disk_size_bytes``: of the disk when the snapshot was taken; entries of version 2 may lack it, then it is the size of the
    image. ``icount``: the record/replay instruction count, None where there is none. ``extra``: the extra data as stored.
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
    ) = _ENTRY.unpack(window.take(_ENTRY.size))
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
    )


def _extra_field(extra: bytes, at: int) -> int | None:
    """A 64-bit field of the extra data, or None where the entry does not have it."""
    if len(extra) < at + _U64.size:
        return None
    value: int = _U64.unpack_from(extra, at)[0]
    return value
