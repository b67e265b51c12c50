"""The bitmap directory: one entry of variable length for each persistent bitmap (section "Bitmap directory").

What an entry leads to, its table and the bits themselves, is the matter of ``bitmaps``. Extra data that we do not know is kept
byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from cowfence.errors import Corrupt
from cowfence.qcow2.extensions import BitmapsPointer
from cowfence.qcow2.geometry import MAX_HOST_BITS, TABLE_ENTRY_BYTES, Geometry
from cowfence.storage.base import Storage, read_exact
from cowfence.units import align_up

_ENTRY = struct.Struct(">QIIBBHI")
IN_USE: Final = 1 << 0
"""Somebody is writing, or died writing: the bits on disk are not to be trusted."""
AUTO: Final = 1 << 1
"""It records writes."""
EXTRA_DATA_COMPATIBLE: Final = 1 << 2
"""Who does not know its extra data may use it all the same."""
DIRTY_TRACKING: Final = 1
"""The only type there is."""
MAX_NAME_BYTES: Final = 1023
_KNOWN_FLAGS: Final = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE
_MAX_TABLE_ENTRIES: Final = 1 << 27
"""QEMU's limit (``BME_MAX_TABLE_SIZE``)."""


class BitmapEntry(NamedTuple):
    """A bitmap's entry: its name as stored, and where its table of ``table_entries`` words stands."""

    name: bytes
    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int
    kind: int = DIRTY_TRACKING
    extra: bytes = b""

    @property
    def text(self) -> str:
        """The name, for people."""
        return self.name.decode("utf-8", "surrogateescape")

    @property
    def table_bytes(self) -> int:
        return self.table_entries * TABLE_ENTRY_BYTES


def read_bitmap_directory(storage: Storage, pointer: BitmapsPointer, geometry: Geometry) -> tuple[BitmapEntry, ...]:
    """All entries. Raises Corrupt where one breaks the format or its limits, or the directory is cut short."""
    where = f"{storage.name}: bitmap directory"
    data = bytes(read_exact(storage, pointer.directory_offset, pointer.directory_bytes, "bitmap directory"))
    entries = []
    at = 0
    for number in range(pointer.count):
        if at + _ENTRY.size > len(data):
            raise Corrupt(f"{where}: entry {number}", f"the directory ends after {number} of {pointer.count} entries")
        table_offset, table_entries, flags, kind, granularity_bits, name_bytes, extra_bytes = _ENTRY.unpack_from(data, at)
        start = at + _ENTRY.size + extra_bytes
        if start + name_bytes > len(data):
            raise Corrupt(f"{where}: entry {number}", "it reaches past the end of the directory")
        if table_offset & geometry.cluster_mask or table_offset >= 1 << MAX_HOST_BITS:
            raise Corrupt(
                f"{where}: entry {number}", f"table offset {table_offset:#x} is misaligned, or beyond 2**{MAX_HOST_BITS}"
            )
        if table_entries > _MAX_TABLE_ENTRIES or flags & ~_KNOWN_FLAGS:
            raise Corrupt(f"{where}: entry {number}", f"{table_entries} table entries or flags {flags:#x} are not valid")
        extra = data[at + _ENTRY.size : start]
        name = data[start : start + name_bytes]
        entries.append(BitmapEntry(name, table_offset, table_entries, flags, granularity_bits, kind, extra))
        at = align_up(start + name_bytes, 8)
    return tuple(entries)


def encode_bitmap_directory(entries: Iterable[BitmapEntry]) -> bytes:
    """The directory as it stands on disk: the reverse of ``read_bitmap_directory``."""
    parts = []
    for entry in entries:
        head = _ENTRY.pack(
            entry.table_offset,
            entry.table_entries,
            entry.flags,
            entry.kind,
            entry.granularity_bits,
            len(entry.name),
            len(entry.extra),
        )
        whole = head + entry.extra + entry.name
        parts.append(whole.ljust(align_up(len(whole), 8), b"\0"))
    return b"".join(parts)
