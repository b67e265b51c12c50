"""Mapping: which runs of guest bytes lie where. Read only; it changes no table.

Ranges inside one L2 table are decoded entry by entry; long ones with array arithmetic over the whole table. Both give the
same runs, so that a plan costs what it covers, not what the disk claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from cowfence.errors import Corrupt
from cowfence.qcow2.entries import (
    ALL_SUBCLUSTERS,
    BITMAP_SHIFT,
    COPIED,
    ZERO,
    BadEntry,
    Compressed,
    Data,
    Subclustered,
    Unallocated,
    Zero,
    decode_l2,
)
from cowfence.qcow2.geometry import OFFSET_MASK, SUBCLUSTERS, Geometry
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Table

_VECTOR_CLUSTERS = 128


class RunKind(IntEnum):
    UNALLOCATED = 0
    ZERO = 1
    DATA = 2
    COMPRESSED = 3
    SUBCLUSTERED = 4
    """Of an entry only: the runs are those of its subclusters."""


class GuestRun(NamedTuple):
    """Guest bytes in one state. ``host``: where they begin in the file that holds the data (DATA; COMPRESSED; ZERO and
    UNALLOCATED with a place that is kept for them), or None."""

    kind: RunKind
    offset: int
    length_bytes: int
    host: int | None
    entry: int
    """The L2 entry of its first cluster."""


def decode(state: State, l1_index: int, l2_index: int, entry: int) -> tuple[RunKind, int | None]:
    """Kind and host offset of an L2 entry. Raises Corrupt for one that breaks the format's rules."""
    try:
        mapping = decode_l2(entry, state.geometry)
    except BadEntry as bad:
        raise Corrupt(f"{state.storage.name}: L2[{l1_index}][{l2_index}]", str(bad)) from None
    if state.geometry.external_data and not isinstance(mapping, Unallocated):
        _check_identity(state, l1_index, l2_index, mapping.host_offset)
    match mapping:
        case Unallocated():
            return RunKind.UNALLOCATED, None
        case Zero(host_offset, _):
            return RunKind.ZERO, host_offset
        case Data(host_offset, _):
            return RunKind.DATA, host_offset
        case Compressed(host_offset, _):
            return RunKind.COMPRESSED, host_offset
        case Subclustered(host_offset, _, _, _):
            return RunKind.SUBCLUSTERED, host_offset


def _check_identity(state: State, l1_index: int, l2_index: int, host_offset: int | None) -> None:
    """In an external data file every guest cluster stands at its guest offset."""
    geometry = state.geometry
    expected = (l1_index << geometry.l2_bits | l2_index) << geometry.cluster_bits
    if host_offset is not None and host_offset != expected:
        raise Corrupt(
            f"{state.storage.name}: L2[{l1_index}][{l2_index}]",
            f"it leads to offset {host_offset:#x} of the data file instead of {expected:#x}",
        )


def reads_zero(state: State, run: GuestRun) -> bool:
    """True if all of a run that is no longer than its cluster is zeros by its entry, nothing of a backing file being below."""
    return run.kind is RunKind.ZERO or (run.kind is RunKind.UNALLOCATED and state.reads_zero_below(run.offset))


def runs(state: State, offset: int, length_bytes: int, *, wait: bool) -> Iterator[GuestRun]:
    """The runs of a guest range, in order and without gaps; neighbours of one state are joined.

    Call it under the lock, to its end. Raises Corrupt, or Cold where ``wait`` is false.
    """
    geometry = state.geometry
    end = offset + length_bytes
    pending: GuestRun | None = None
    while offset < end:
        l1_index = offset >> geometry.l1_shift
        table_end = min(end, (l1_index + 1) << geometry.l1_shift)
        table = state.l2_table(l1_index, wait=wait, cached=False)
        if table is None:
            table_end = min(end, _end_of_gap(state.l1.entries, l1_index, end >> geometry.l1_shift) << geometry.l1_shift)
            pieces: Iterator[GuestRun] = iter((GuestRun(RunKind.UNALLOCATED, offset, table_end - offset, None, 0),))
        elif table_end - offset > _VECTOR_CLUSTERS << geometry.cluster_bits:
            pieces = _table_runs(state, table, l1_index, offset, table_end)
        else:
            pieces = _entry_runs(state, table, l1_index, offset, table_end)
        for run in pieces:
            if pending is None:
                pending = run
            elif _joins(pending, run):
                pending = pending._replace(length_bytes=pending.length_bytes + run.length_bytes)
            else:
                yield pending
                pending = run
        offset = table_end
    if pending is not None:
        yield pending


def _end_of_gap(l1: Sequence[int], l1_index: int, last: int) -> int:
    """The first L1 entry behind ``l1_index`` that leads somewhere, or one behind ``last``: a hostile header can claim a disk
    of millions of tables that do not exist, and each must cost next to nothing.
    """
    index = l1_index + 1
    stop = min(last + 1, len(l1))
    while index < stop and not l1[index]:
        index += 1
    return index if index < stop else last + 1


def _joins(earlier: GuestRun, later: GuestRun) -> bool:
    if earlier.kind is not later.kind or earlier.kind is RunKind.COMPRESSED:
        return False
    if earlier.host is None or later.host is None:
        return earlier.host == later.host
    return later.host == earlier.host + earlier.length_bytes


def _entry_runs(state: State, table: Table, l1_index: int, offset: int, end: int) -> Iterator[GuestRun]:
    geometry = state.geometry
    mask = geometry.l2_entries - 1
    while offset < end:
        l2_index = offset >> geometry.cluster_bits & mask
        stop = min(end, (offset | geometry.cluster_mask) + 1)
        yield from cluster_runs(state, l1_index, l2_index, table.entry(l2_index), offset, stop)
        offset = stop


def cluster_runs(state: State, l1_index: int, l2_index: int, entry: int, offset: int, end: int) -> Iterator[GuestRun]:
    """The runs of guest bytes inside one cluster. Raises Corrupt for a bad entry."""
    kind, host = decode(state, l1_index, l2_index, entry)
    if kind is RunKind.SUBCLUSTERED:
        yield from subcluster_runs(state.geometry, entry, host, offset, end)
        return
    if host is not None and kind is not RunKind.COMPRESSED:
        host += offset & state.geometry.cluster_mask
    yield GuestRun(kind, offset, end - offset, host, entry)


def subcluster_runs(geometry: Geometry, entry: int, host: int | None, offset: int, end: int) -> Iterator[GuestRun]:
    """The same where the subclusters are in different states. ``host``: of the cluster."""
    bitmap = entry >> BITMAP_SHIFT
    allocated, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
    states = (
        (RunKind.DATA, allocated),
        (RunKind.ZERO, zero),
        (RunKind.UNALLOCATED, ALL_SUBCLUSTERS & ~(allocated | zero)),
    )
    cluster = offset & ~geometry.cluster_mask
    while offset < end:
        subcluster = (offset - cluster) // geometry.subcluster_bytes
        kind, same = next((kind, bits >> subcluster) for kind, bits in states if bits >> subcluster & 1)
        # The lowest bit that is clear ends the run.
        count = (~same & same + 1).bit_length() - 1
        stop = min(end, cluster + (subcluster + count) * geometry.subcluster_bytes)
        yield GuestRun(kind, offset, stop - offset, None if host is None else host + offset - cluster, entry)
        offset = stop


def _table_runs(state: State, table: Table, l1_index: int, offset: int, end: int) -> Iterator[GuestRun]:
    """The same by array arithmetic: entries are split where the kind changes or the host offset does not go on."""
    import numpy as np

    geometry = state.geometry
    bits = geometry.cluster_bits
    first = offset >> bits & geometry.l2_entries - 1
    count = (end - 1 >> bits) - (offset >> bits) + 1
    view = table.view()[first * table.words : (first + count) * table.words]
    part = view[:: table.words]
    host = part & np.uint64(OFFSET_MASK)
    plain = np.uint64(COPIED | OFFSET_MASK & ~geometry.cluster_mask | (0 if geometry.extended_l2 else ZERO))
    odd = (part & ~plain) != 0
    copied = part & np.uint64(COPIED) != 0
    if geometry.external_data:
        led = (host != 0) | copied
        identity = (np.arange(count, dtype=np.uint64) + np.uint64(offset >> bits)) << np.uint64(bits)
        odd |= led & (host != identity)
    else:
        led = host != 0
        odd |= ~led & copied
    if geometry.extended_l2:
        bitmap = view[1::2]
        zero = bitmap == np.uint64(ALL_SUBCLUSTERS << SUBCLUSTERS)
        odd |= ~zero & (bitmap != np.where(led, np.uint64(ALL_SUBCLUSTERS), np.uint64(0)))
    else:
        zero = (part & np.uint64(ZERO)) != 0
        if geometry.version < 3:
            odd |= zero
    # 0 unallocated, 1 zero, 2 data, 3 odd (compressed, subclusters, or one for the careful decoder): odd ones stand alone.
    kind = np.where(odd, 3, np.where(zero, 1, np.where(led, 2, 0)))
    follows = (kind[1:] == kind[:-1]) & (kind[1:] != 3)
    contiguous = (host[1:] == host[:-1] + np.uint64(geometry.cluster_bytes)) & led[:-1] & led[1:]
    follows &= contiguous | ~(led[1:] | led[:-1])
    starts = np.concatenate(([0], np.flatnonzero(~follows) + 1)).tolist()
    base = offset >> bits
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else count
        run_start = max(offset, base + start << bits)
        run_end = min(end, base + stop << bits)
        yield from cluster_runs(state, l1_index, first + start, table.entry(first + start), run_start, run_end)
