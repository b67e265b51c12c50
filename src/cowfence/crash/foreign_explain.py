"""One sentence that names the missing edge: who freed a cluster, who reused it, and which entry still leads there.

Works on the crash state's own tables with a few lines of decoding, apart from the engine: where does the L2 entry of a guest
sector stand, where does it lead, which operation of the log wrote there last, and when is the entry replaced.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from cowfence.crash.foreign_run import ForeignRun, operation_range
from cowfence.storage.oplog import Discard, Done, Fence, Note, Operation, Write, Zero
from cowfence.units import SECTOR_BYTES

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_EXTENDED_L2 = 1 << 4
_TAG = re.compile(rb"sector (\d+) write (\d+) \.*")


class Place(NamedTuple):
    """Where a guest sector's entry stands and where it leads, in bytes of the image file; ``end`` - ``start`` 0: nowhere."""

    entry_at: int
    start: int
    end: int
    compressed: bool


def value_words(value: bytes, sector: int) -> str:
    """A sector's bytes in words."""
    tag = _TAG.fullmatch(value)
    if tag:
        origin = "" if int(tag[1]) == sector else f", which is foreign data of guest sector {int(tag[1])}"
        return f"{value[: tag.end(2)].decode()!r}{origin}"
    if not value.strip(b"\0"):
        return "zeros"
    if len(set(value)) == 1:
        return f"0x{value[0]:02x} throughout"
    return f"other bytes ({value[:8].hex()}...)"


def place_of(content: bytes, guest_offset: int) -> Place | None:
    """Where ``guest_offset`` stands in an image; None where the tables do not lead to an entry."""
    if len(content) < 104:
        return None
    bits, l1_size, l1_offset = (
        struct.unpack_from(">I", content, 20)[0],
        struct.unpack_from(">I", content, 36)[0],
        struct.unpack_from(">Q", content, 40)[0],
    )
    if not 9 <= bits <= 21:
        return None
    version, features = struct.unpack_from(">I", content, 4)[0], struct.unpack_from(">Q", content, 72)[0]
    entry_bytes = 16 if version >= 3 and features & _EXTENDED_L2 else 8
    per_table = (1 << bits) // entry_bytes
    cluster = guest_offset >> bits
    l1_index, l2_index = divmod(cluster, per_table)
    l1_at = l1_offset + l1_index * 8
    if l1_index >= l1_size or l1_at + 8 > len(content):
        return None
    table = struct.unpack_from(">Q", content, l1_at)[0] & _OFFSET
    at = table + l2_index * entry_bytes
    if not table or at + entry_bytes > len(content):
        return Place(l1_at, 0, 0, compressed=False)
    word = struct.unpack_from(">Q", content, at)[0]
    if word & _COMPRESSED:
        shift = 62 - (bits - 8)
        start = word & (1 << shift) - 1
        sectors = (word >> shift & (1 << bits - 8) - 1) + 1
        return Place(at, start, (start & ~511) + sectors * 512, compressed=True)
    start = word & _OFFSET
    return Place(at, start, start + (1 << bits) if start else 0, compressed=False)


def explain(run: ForeignRun, content: bytes, position: int, sector: int) -> str:
    """Why a guest sector does not read as it must in the image that a crash behind entry ``position`` left, as far as the log
    tells. Empty where it tells nothing."""
    place = place_of(content, sector * SECTOR_BYTES)
    if place is None:
        return "no entry leads to it any more"
    if place.start == place.end:
        return f"its entry at {place.entry_at:#x} leads nowhere" + _replaced(run, position, place.entry_at)
    kind = "compressed data" if place.compressed else "cluster"
    reused = _last_write(run, position, place.start, place.end)
    if reused is None:
        return f"its L2 entry at {place.entry_at:#x} leads to {kind} at {place.start:#x}, which the run never wrote"
    if not isinstance(run.entries[reused], Write):
        return (
            f"{kind} at {place.start:#x} was given back to the host by {_command_at(run, reused)!r} ({_mark(run, reused)}) "
            f"before the L2 entry at {place.entry_at:#x} that still leads to it was replaced on disk"
            + _replaced(run, position, place.entry_at)
        )
    freed = _last_command_on(run, reused, _cluster_of(content, sector * SECTOR_BYTES))
    reuser = _command_at(run, reused)
    told = _mark(run, reused)
    if freed is None or freed == reuser:
        return (
            f"its L2 entry at {place.entry_at:#x} leads to {kind} at {place.start:#x}, last written by {told}"
            + (f" of {reuser!r}" if reuser else "")
            + _replaced(run, position, place.entry_at)
        )
    return (
        f"{kind} at {place.start:#x} was freed by {freed!r} and reused by {reuser!r} ({told}) before the L2 entry at "
        f"{place.entry_at:#x} that still leads to it was replaced on disk" + _replaced(run, position, place.entry_at)
    )


def _operations(run: ForeignRun) -> list[tuple[int, Operation]]:
    return [
        (position, entry)
        for position, entry in enumerate(run.entries)
        if not isinstance(entry, Note | Done | Fence) and entry.file == run.image
    ]


def _last_write(run: ForeignRun, position: int, start: int, end: int) -> int | None:
    found = None
    for at, operation in _operations(run):
        first, last = operation_range(operation)
        if at <= _issued(run, position) and isinstance(operation, Write | Zero | Discard) and first < end and start < last:
            found = at
    return found


def _issued(run: ForeignRun, position: int) -> int:
    entry = run.entries[position]
    return entry.position if isinstance(entry, Done) else position


def _replaced(run: ForeignRun, position: int, entry_at: int) -> str:
    for at, operation in _operations(run):
        first, last = operation_range(operation)
        if at > _issued(run, position) and first <= entry_at < last:
            return f" (it is replaced by {operation.mark})"
    return ""


def _mark(run: ForeignRun, position: int) -> str:
    entry = run.entries[position]
    return "an entry" if isinstance(entry, Note | Done) else entry.mark


def _command_at(run: ForeignRun, position: int) -> str | None:
    """The command in which the operation at ``position`` was issued."""
    for entry in reversed(run.entries[:position]):
        if isinstance(entry, Note) and "command" in entry.fields:
            return str(entry.fields["command"])
    return None


def _cluster_of(content: bytes, guest_offset: int) -> range:
    """The guest's bytes that share a cluster with ``guest_offset``."""
    cluster_bytes = 1 << struct.unpack_from(">I", content, 20)[0]
    start = guest_offset // cluster_bytes * cluster_bytes
    return range(start, start + cluster_bytes)


def _last_command_on(run: ForeignRun, position: int, cluster: range) -> str | None:
    """The last command before ``position`` that changed something of a guest cluster: it is who gave up what that had."""
    for entry in reversed(run.entries[:position]):
        if isinstance(entry, Note) and entry.event in ("write.begin", "discard.begin"):
            start = int(str(entry.fields["offset"]))
            data = entry.fields.get("data")
            length_bytes = len(data) if isinstance(data, bytes) else int(str(entry.fields.get("length_bytes", 0)))
            if start < cluster.stop and cluster.start < start + length_bytes:
                return str(entry.fields["command"])
    return None
