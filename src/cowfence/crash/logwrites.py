"""Reader of dm-log-writes logs, as the Linux target of that name and QEMU's ``blklogwrites`` driver write them.

Little-endian. The first sector holds magic, version 1, the number of entries and the sector size S. Then comes one sector of S
bytes for each entry (place, count, flags, length of a mark), followed by count * S bytes of data but for a discard; the text
of a mark stands in the entry's own sector. Places and counts are in sectors of S bytes.

The number of entries in the first sector is written now and then only (QEMU: at every 4096th entry and at close), so that a log
of a process that was killed goes on behind it. Entries that it counts must be whole. Behind them the log ends where the file
does, or at the first thing that is no entry: a torn tail is what a crash leaves there.

What the flags say about order: FLUSH covers what completed before the entry, whose own data comes after. FUA makes the entry's
own data durable; the operation log knows only fences of a whole file, so that it becomes a write and a fence, which keeps fewer
states than there may be and accuses nobody wrongly.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import Final, Literal, NamedTuple

from cowfence.errors import Corrupt, Invalid
from cowfence.storage.oplog import Discard, Done, Entry, Fence, Operation, Write

MAGIC: Final = 0x006A_7366_7773_6872
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_SECTOR_MIN: Final = 512
_SECTOR_MAX: Final = 64 * 1024
_FILE_MAX: Final = 1 << 62
"""No entry may lead past this offset, in bytes."""

Discards = Literal["zeroed", "unchanged"]
"""What a discarded range reads as: the log does not say, so a judge tries both."""


class Flag(IntFlag):
    """Flags of an entry. METADATA is a hint of newer kernels and changes nothing."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


class LogEntry(NamedTuple):
    """One entry. ``offset`` and ``length_bytes`` in the logged device; ``data`` is empty for a discard, the text for a mark."""

    number: int
    offset: int
    length_bytes: int
    flags: Flag
    data: bytes


def is_log(content: bytes) -> bool:
    """True where ``content`` starts like a dm-log-writes log."""
    return content[:8] == MAGIC.to_bytes(8, "little")


def read_log(content: bytes, name: str = "log", *, sector_bytes: int | None = None) -> Iterator[LogEntry]:
    """The entries of a log. Raises Corrupt, with the entry and its offset, where a counted entry is not whole.

    ``sector_bytes``: read a log that is still being written, whose first sector may be missing yet.
    """
    if sector_bytes is not None:
        counted = 0
    else:
        counted, sector_bytes = _read_super(content, name)
    at, number = sector_bytes, 0
    while at < len(content):
        entry, length_bytes = _read_entry(content, at, number, sector_bytes)
        if isinstance(entry, str):
            if number < counted:
                raise Corrupt(f"{name}: entry {number} at offset {at:#x}", entry)
            return
        yield entry
        at += length_bytes
        number += 1
    if number < counted:
        raise Corrupt(name, f"the log ends after {number} entries, but counts {counted}")


def _read_super(content: bytes, name: str) -> tuple[int, int]:
    """The number of entries that the first sector counts, and the sector size."""
    if len(content) < _SUPER.size or not is_log(content):
        raise Corrupt(name, "not a dm-log-writes log (no magic number at offset 0)")
    _, version, counted, sector_bytes = _SUPER.unpack_from(content)
    if version != 1:
        raise Corrupt(name, f"version {version} of the log format is not known")
    if not _SECTOR_MIN <= sector_bytes <= _SECTOR_MAX or sector_bytes & sector_bytes - 1:
        raise Corrupt(name, f"a sector size of {sector_bytes} bytes")
    return counted, sector_bytes


def _read_entry(content: bytes, at: int, number: int, sector_bytes: int) -> tuple[LogEntry | str, int]:
    """The entry at ``at`` and how far the next is, or what is wrong with it."""
    if len(content) - at < min(sector_bytes, _ENTRY.size):
        return "the file ends inside of it", 0
    sector, sectors, word, data_bytes = _ENTRY.unpack_from(content, at)
    if word & ~sum(Flag):
        return f"unknown flags {word:#x}", 0
    flags = Flag(word)
    if (sector + sectors) * sector_bytes > _FILE_MAX:
        return f"{sectors} sectors at sector {sector} lie past any file's end", 0
    offset, length_bytes = sector * sector_bytes, sectors * sector_bytes
    start = at + sector_bytes
    if flags & Flag.MARK:
        if data_bytes > sector_bytes - _ENTRY.size:
            return f"a mark of {data_bytes} bytes", 0
        text = content[at + _ENTRY.size : at + _ENTRY.size + data_bytes]
        return LogEntry(number, 0, 0, flags, text), sector_bytes
    if flags & Flag.DISCARD:
        return LogEntry(number, offset, length_bytes, flags, b""), sector_bytes
    if start + length_bytes > len(content):
        return f"it needs {length_bytes} bytes of data, and the file has {max(0, len(content) - start)}", 0
    return LogEntry(number, offset, length_bytes, flags, content[start : start + length_bytes]), sector_bytes + length_bytes


def operations_of(entry: LogEntry, file: str, *, discards: Discards = "zeroed") -> Iterator[Operation]:
    """What an entry did to the file that it was logged for, in order. Raises Invalid for a discard policy that is none."""
    if discards not in ("zeroed", "unchanged"):
        raise Invalid(f"a discard is either zeroed or unchanged, not {discards!r}")
    mark = f"log entry {entry.number}"
    if entry.flags & Flag.FLUSH:
        yield Fence(file, f"{mark} (flush)")
    if entry.flags & Flag.DISCARD:
        if discards == "zeroed":
            yield Discard(file, entry.offset, entry.length_bytes, f"{mark} (discard)")
    elif entry.length_bytes:
        yield Write(file, entry.offset, entry.data, mark)
    if entry.flags & Flag.FUA and not entry.flags & Flag.MARK:
        yield Fence(file, f"{mark} (FUA)")


def entries_of(content: bytes, file: str, *, discards: Discards = "zeroed", name: str = "log") -> list[Entry]:
    """A whole log as entries of an operation log, each operation followed by its end. Raises Corrupt."""
    found: list[Entry] = []
    for entry in read_log(content, name):
        for operation in operations_of(entry, file, discards=discards):
            found += [operation, Done(len(found))]
    return found
