"""Resizing: the disk becomes longer or shorter (crash contract, R8, C8).

What lies behind the end of a disk must never show when it grows: neither what an earlier shrinking had no time to free, nor the
rest of its last cluster, nor a longer backing file. So growing first makes all that zeros, durably, and the size comes last;
shrinking takes the size first, and only what nobody can reach any more is freed. Each line is a transaction or several:

=========  ==================================================================  =================================================
operation  transactions                                                        a crash after each
=========  ==================================================================  =================================================
grow       1 LINK     a longer L1 table, where one is needed                   the disk is as it was
           2 LINK     entries behind the end lead nowhere; RECLAIM frees       the same
           3 data     zeros in the rest of the last cluster                    the same: nobody reads it
           4 LINK     zero clusters where the backing file is longer           the same
           5 LINK     clusters allocated ahead, where that is asked for        the same; growing again frees them first
           6 LINK     the size, in sector 0                                    the disk is longer
shrink     1 LINK     the size, in sector 0                                    the disk is shorter; entries behind its end
           2 LINK     these entries lead nowhere; RECLAIM frees                the disk is shorter
=========  ==================================================================  =================================================

The L1 table keeps its length when the disk shrinks. Entries behind the end can also be the saved state of a machine that came
with an applied snapshot; the snapshot keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from cowfence.errors import Invalid, Unsupported
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.census import runs_of
from cowfence.qcow2.data_file import lengthen, shorten
from cowfence.qcow2.entries import COPIED, ZERO, whole, zeroed
from cowfence.qcow2.geometry import MAX_L1_BYTES, OFFSET_MASK, TABLE_ENTRY_BYTES
from cowfence.qcow2.header import size_patch
from cowfence.qcow2.mapping import RunKind, decode, runs
from cowfence.qcow2.state import State
from cowfence.qcow2.write import LinkHome, free_entry, grow_l1
from cowfence.units import MIB, SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.qcow2.commit import Progress
    from cowfence.qcow2.zero import Zeroes

_ZEROS: Final = bytes(MIB)


class Preallocation(Enum):
    """What a disk that grows has of its new part. METADATA: clusters, with entries that lead to them. FALLOC: their host space
    is reserved, too. FULL: it is written."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


def resize(
    alteration: Alteration,
    size_bytes: int,
    preallocation: Preallocation = Preallocation.OFF,
    *,
    progress: Progress | None = None,
) -> None:
    """Give the disk another size, a multiple of 512 bytes; its new part reads as zeros. ``progress`` is told the fraction of
    its preallocation that is done, 0 to 1.

    Raises Invalid (the size, or too large for an L1 table), Unsupported (version 2 with snapshots, which do not know their
    size), NoSpace and what the storage raises: then the disk has its old size, or, where the size had changed, its new one.
    """
    state = alteration.state
    old_bytes = state.size
    _check(state, size_bytes)
    if size_bytes > old_bytes and state.backing is None and state.header.backing_name is not None:
        name = state.storage.name
        raise Invalid(f"{name}: it was opened without its backing file, which may be longer and would show through")
    if size_bytes == old_bytes:
        return
    alteration.before_other_disk(size_bytes)
    if size_bytes > old_bytes:
        _prepare_growth(alteration, size_bytes, preallocation, progress)
    alteration.transaction(lambda: state.pending.patch_header(*size_patch(size_bytes), "header.link"))
    alteration.read_again()
    try:
        if size_bytes < old_bytes:
            unlink_behind(alteration, size_bytes)
            if state.geometry.external_data:
                shorten(state.data, size_bytes)
    finally:
        alteration.after_resize()  # it has its new size, whatever became of the rest


def _check(state: State, size_bytes: int) -> None:
    name = state.storage.name
    if size_bytes % SECTOR_BYTES:
        raise Invalid(f"{name}: The new size must be a multiple of {SECTOR_BYTES}")
    if state.header.version < 3 and state.header.snapshot_count:
        raise Unsupported(name, "Can't resize a v2 image which has snapshots")
    if size_bytes < 0 or state.geometry.l1_entries_for(size_bytes) * TABLE_ENTRY_BYTES > MAX_L1_BYTES:
        raise Invalid(f"{name}: a disk of {size_bytes} bytes is too large for clusters of {state.geometry.cluster_bytes} bytes")


def _prepare_growth(alteration: Alteration, size_bytes: int, preallocation: Preallocation, progress: Progress | None) -> None:
    """All but the size."""
    state, zeroes = alteration.state, alteration.zeroes
    assert zeroes is not None
    geometry = state.geometry
    old_bytes = state.size
    if geometry.l1_entries_for(size_bytes) > len(state.l1.entries):
        alteration.transaction(lambda: grow_l1(state, wait=True, size_bytes=size_bytes))
    unlink_behind(alteration, old_bytes)
    backing_bytes = state.backing.size if state.backing is not None else 0
    cluster_end = align_up(old_bytes, geometry.cluster_bytes)
    if cluster_end > old_bytes:
        alteration.transaction(lambda: _zero_rest(state, zeroes, old_bytes, cluster_end, backing_bytes))
    if backing_bytes > cluster_end:
        with state.lock:
            # From here on as the longer disk will see it, so that what reads as zeros is not what lies below.
            state.backing_bytes = min(backing_bytes, size_bytes)
        hidden_end = align_up(min(backing_bytes, size_bytes), geometry.cluster_bytes)
        at = cluster_end
        while at < hidden_end:
            at += alteration.transaction(lambda at=at: zeroes.zero(at, hidden_end - at, unmap=True, wait=True))  # type: ignore[misc]
    if geometry.external_data:
        alteration.transaction(lambda: _lengthen_data(state, old_bytes, size_bytes))
    if state.raw_data and preallocation is Preallocation.OFF:
        # What can be read by itself is allocated as a whole (as QEMU has it).
        preallocation = Preallocation.METADATA
    if preallocation is not Preallocation.OFF:
        if state.cipher is not None and geometry.version < 3:
            raise Unsupported(
                state.storage.name, "preallocation of an encrypted image of version 2, which has no zero clusters"
            )
        at = cluster_end
        while at < size_bytes:
            at += alteration.transaction(lambda at=at: _allocate(state, at, size_bytes, preallocation))  # type: ignore[misc]
            if progress is not None:
                progress(min(at, size_bytes) / size_bytes)


def _lengthen_data(state: State, old_bytes: int, size_bytes: int) -> None:
    state.committer.data_written = True
    lengthen(state.data, old_bytes, size_bytes)


def _zero_rest(state: State, zeroes: Zeroes, start: int, end: int, backing_bytes: int) -> None:
    """Zeros from the end of the disk to that of its last cluster."""
    rest = list(runs(state, start, end - start, wait=True))
    if any(run.kind is not RunKind.ZERO and (run.kind is not RunKind.UNALLOCATED or backing_bytes > start) for run in rest):
        zeroes.write(start, memoryview(bytes(end - start)), wait=True)


def unlink_behind(alteration: Alteration, size_bytes: int) -> None:
    """Let the entries behind a disk of ``size_bytes`` lead nowhere: inside the last L2 table, then whole tables."""
    state, zeroes = alteration.state, alteration.zeroes
    assert zeroes is not None
    geometry = state.geometry
    at = align_up(size_bytes, geometry.cluster_bytes)
    with state.lock:
        # Whatever lies below, there is no disk here.
        known_bytes, state.backing_bytes = state.backing_bytes, 0
    table_end = align_up(at, geometry.l2_coverage_bytes)
    while at < table_end and state.l2_offset(at >> geometry.l1_shift) is not None:
        at += alteration.transaction(lambda at=at: zeroes.discard(at, table_end - at, wait=True))  # type: ignore[misc]
    for index in range(table_end >> geometry.l1_shift, len(state.l1.entries)):
        if state.l1.entries[index]:
            alteration.transaction(lambda index=index: _drop_table(state, index))  # type: ignore[misc]
    with state.lock:
        state.backing_bytes = known_bytes


def _drop_table(state: State, l1_index: int) -> None:
    """Enter into the pending transaction: an L1 entry leads nowhere, its table and all that this leads to lose a reference."""
    geometry = state.geometry
    offset = state.l2_offset(l1_index)
    if offset is None:
        return
    state.check_room()
    table = state.l2_table(l1_index, wait=True, cached=False)
    assert table is not None
    words = table.view()[:: table.words]
    plain = words & ~np.uint64(COPIED | ZERO | OFFSET_MASK & ~geometry.cluster_mask) == 0
    for l2_index in np.flatnonzero(~plain).tolist():
        entry = table.entry(l2_index)
        free_entry(state, decode(state, l1_index, l2_index, entry)[0], entry, discard=True)
    hosts = ((words & np.uint64(OFFSET_MASK)) >> np.uint64(geometry.cluster_bits)).view(np.int64)[plain]
    hosts = hosts[hosts != 0]
    for start, stop in runs_of(hosts) if len(hosts) and not geometry.external_data else ():
        state.pending.free(int(hosts[start]), stop - start, discard=True)
    state.pending.set(state.l1, l1_index, 0)
    state.pending.free(offset >> geometry.cluster_bits, table=True)
    state.l2.forget(l1_index)


def _allocate(state: State, at: int, size_bytes: int, preallocation: Preallocation) -> int:
    """Give the clusters of a piece from ``at`` on their host clusters, which read as zeros; returns the bytes of it."""
    geometry = state.geometry
    l1_index = at >> geometry.l1_shift
    end = min(align_up(size_bytes, geometry.cluster_bytes), l1_index + 1 << geometry.l1_shift, at + state.piece_bytes)
    count = end - at >> geometry.cluster_bits
    state.check_room()
    home = LinkHome(state, l1_index, state.l2_table(l1_index, wait=True, cached=True), wait=True)
    home.plan()
    state.allocator.look_ahead(wait=True)
    reserved = state.allocator.reserve(home.clusters + (0 if geometry.external_data else count), wait=True)
    try:
        if home.clusters:
            home.take(reserved[0].first)
        hosts = [cluster for run in reserved for cluster in range(run.first, run.first + run.clusters)][home.clusters :]
        state.committer.data_written = True
        if geometry.external_data:
            # Reserved is at most a cluster of the image, for the table: nothing of the data file stands at its offset.
            hosts = [at + (number << geometry.cluster_bits) >> geometry.cluster_bits for number in range(count)]
            if preallocation is not Preallocation.METADATA:
                _clear(state, at, min(end, size_bytes), False, preallocation)
        else:
            for run in reserved:
                start, stop = run.first << geometry.cluster_bits, run.first + run.clusters << geometry.cluster_bits
                _clear(state, start, stop, run.hole, preallocation)
    except BaseException:
        state.allocator.give_back(reserved)
        raise
    table = home()
    ahead: Callable[[int], int] = int
    if state.cipher is not None:
        ahead = partial(zeroed, geometry=geometry)
    elif geometry.extended_l2:
        # A cluster of subclusters is kept for them, and each is allocated when it is written.
        ahead = partial(whole if state.raw_data else zeroed, geometry=geometry)
    first = at >> geometry.cluster_bits & geometry.l2_entries - 1
    for number, cluster in enumerate(hosts):
        free_entry(state, RunKind.ZERO, table.entry(first + number), discard=False)
        state.pending.link(table, first + number, ahead(cluster << geometry.cluster_bits | COPIED))
        if not geometry.external_data:
            state.refcounts.increment(cluster)
    return end - at


def _clear(state: State, start: int, end: int, hole: bool, preallocation: Preallocation) -> None:
    """Host clusters that nobody uses yet read as zeros, and lie inside the file."""
    storage = state.data
    if preallocation is Preallocation.FULL:
        for at in range(start, end, MIB):
            storage.writev(at, (memoryview(_ZEROS)[: end - at],), "data.write")
    elif not hole or preallocation is Preallocation.FALLOC:
        storage.zero(start, end - start, "data.write")
    elif end > storage.size():
        storage.truncate(end, "data.write")
