"""The write path: plan, write the data, enter the metadata. All three under the image's lock.

A write is planned piece by piece, a piece being what one L2 table maps. Planning changes no table: it decides for every
cluster whether it may be written in place or needs a new one, reserves what it needs, and reads what copy-on-write keeps.
Then the data goes out, head and tail of a new cluster in the same vectored call. Only when that call has returned do counts,
entries and the old clusters enter the pending transaction, and nothing in that last step can fail.

What holds on disk after the data call: in place, the guest's new bytes, which it may or may not find after a crash until it
flushes; in a new cluster, bytes that nothing leads to.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from cowfence.errors import NoSpace, WouldBlock
from cowfence.qcow2.allocator import Run
from cowfence.qcow2.entries import ALL_SUBCLUSTERS, BITMAP_SHIFT, COPIED, decode_l2
from cowfence.qcow2.entries import Compressed as CompressedEntry
from cowfence.qcow2.geometry import MAX_L1_BYTES, OFFSET_MASK, SUBCLUSTERS, Geometry, HostOffset
from cowfence.qcow2.header import l1_patch
from cowfence.qcow2.mapping import RunKind, decode, runs
from cowfence.qcow2.read import Reads
from cowfence.qcow2.reader import Cold, NeedsCommit
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind, Table
from cowfence.storage.base import Buffer
from cowfence.units import SECTOR_BYTES, align_down, align_up

_UNALLOCATED: Final = (RunKind.UNALLOCATED, None)


class Target(NamedTuple):
    """Where one guest cluster of a piece goes."""

    l2_index: int
    host: int
    """Host offset of the cluster's start."""
    old: tuple[RunKind, int] | None
    """What the entry was (kind, entry); None: written in place, no entry changes."""
    start: int
    end: int
    """What of the cluster is defined by the write, kept head and tail included: all of it, or whole subclusters."""
    reserved: bool
    """The cluster is newly reserved; False: one that the entry kept (a preallocated zero cluster)."""
    hole: bool
    """What is not written of it reads as zeros."""


class Writes:
    """Writes of one image. Every method is called under the lock."""

    def __init__(self, state: State, reads: Reads) -> None:
        self._state = state
        self.reads = reads

    def write(self, offset: int, data: memoryview, *, wait: bool) -> int:
        """Write as much of ``data`` at ``offset`` as one L2 table maps; returns how many bytes that was.

        Raises NeedsCommit or Cold with nothing changed; NoSpace and StorageFailed from the data call, after which the old
        mapping stands and, where the write was in place, the range holds old or new bytes.
        """
        state = self._state
        geometry = state.geometry
        l1_index = offset >> geometry.l1_shift
        length_bytes = min(len(data), ((l1_index + 1) << geometry.l1_shift) - offset)
        data = data[:length_bytes]
        if state.cipher is not None and (offset | length_bytes) % SECTOR_BYTES:
            return self._write_sectors(offset, data, wait=wait)
        if l1_index >= len(state.l1.entries):
            raise NeedsCommit(lambda: grow_l1(state, wait=True))
        table = state.l2_table(l1_index, wait=wait, cached=True)
        targets, runs, home = self._plan(table, l1_index, offset, length_bytes, wait=wait)
        try:
            calls = self._vectors(targets, offset, data, wait=wait)
            if not geometry.external_data:
                for target in targets:
                    cluster = target.host >> geometry.cluster_bits
                    state.layout.check_data(cluster, 1)
                    if not target.reserved:
                        state.allocator.check_handed_out(cluster)
            state.committer.data_written = True
            cipher, writev = state.cipher, state.data.writev
            for host, guest, buffers in calls:
                if cipher is not None:
                    buffers = [cipher.encrypt(b"".join(buffers), host, guest)]
                writev(host, buffers, "data.write")
        except BaseException:
            state.allocator.give_back(runs)
            raise
        if any(target.old is not None for target in targets):
            self._enter(home(), targets)
        if state.record is not None:
            state.record(offset, length_bytes)
        return length_bytes

    def _write_sectors(self, offset: int, data: memoryview, *, wait: bool) -> int:
        """Write the whole sectors that ``data`` stands in, with what they hold beside it: ciphers know nothing shorter."""
        state = self._state
        start = align_down(offset, SECTOR_BYTES)
        whole = bytearray(align_up(offset + len(data), SECTOR_BYTES) - start)
        for at in sorted({0, len(whole) - SECTOR_BYTES}):
            sector = memoryview(whole)[at : at + SECTOR_BYTES]
            plan = list(runs(state, start + at, SECTOR_BYTES, wait=wait))
            try:
                self.reads.fill(plan, start + at, sector, wait=wait)
            except WouldBlock:
                copy = memoryview(bytearray(SECTOR_BYTES))
                raise Cold(lambda: self.reads.fill(plan, start + at, copy, wait=True)) from None  # noqa: B023 (it is left here)
        whole[offset - start : offset - start + len(data)] = data
        self.write(start, memoryview(whole), wait=wait)
        return len(data)

    def _plan(
        self, table: Table | None, l1_index: int, offset: int, length_bytes: int, *, wait: bool
    ) -> tuple[list[Target], list[Run], LinkHome]:
        """Decide where every cluster goes, and reserve what is needed."""
        state = self._state
        geometry = state.geometry
        first = offset >> geometry.cluster_bits & geometry.l2_entries - 1
        count = (offset + length_bytes - 1 >> geometry.cluster_bits) - (offset >> geometry.cluster_bits) + 1
        targets: list[Target | None] = []
        fates: list[tuple[int, RunKind, int, int, int]] = []
        start, end = 0, geometry.cluster_bytes
        for l2_index in range(first, first + count):
            entry = table.entry(l2_index) if table is not None else 0
            kind, host = decode(state, l1_index, l2_index, entry) if entry else _UNALLOCATED
            if geometry.external_data:
                # The one place that a guest cluster can have, and nobody else.
                host = (l1_index << geometry.l2_bits | l2_index) << geometry.cluster_bits
                in_place = True
            else:
                in_place = host is not None and kind is not RunKind.COMPRESSED and state.may_write_in_place(entry, wait=wait)
            if geometry.extended_l2:
                part = offset & geometry.cluster_mask if l2_index == first else 0
                rest = (offset + length_bytes - 1 & geometry.cluster_mask) + 1 if l2_index == first + count - 1 else None
                start, end = _span(geometry, kind, entry, part, rest or geometry.cluster_bytes, in_place=in_place)
            if in_place:
                assert host is not None
                old = None if kind is RunKind.DATA or _is_allocated(geometry, entry, start, end) else (kind, entry)
                targets.append(Target(l2_index, host, old, start, end, reserved=False, hole=False))
            else:
                targets.append(None)
                fates.append((l2_index, kind, entry, start, end))
        links = len(fates) + sum(1 for target in targets if target is not None and target.old is not None)
        home = LinkHome(state, l1_index, table, wait=wait)
        if not links:
            return [target for target in targets if target is not None], [], home
        state.check_room()
        home.plan()
        state.allocator.look_ahead(wait=wait)
        runs = state.allocator.reserve(len(fates) + home.clusters, wait=wait)
        if home.clusters:
            try:
                home.take(runs[0].first)
            except BaseException:
                state.allocator.give_back(runs)
                raise
        hosts = _clusters(runs, skip=home.clusters)
        fate = iter(fates)
        whole: list[Target] = []
        for target in targets:
            if target is None:
                l2_index, kind, entry, start, end = next(fate)
                cluster, hole = next(hosts)
                host = cluster << geometry.cluster_bits
                # What is enciphered does not read as zeros because nobody has written it.
                hole = hole and state.cipher is None
                target = Target(l2_index, host, (kind, entry), start, end, reserved=True, hole=hole)
            whole.append(target)
        return whole, runs, home

    def _vectors(
        self, targets: list[Target], offset: int, data: memoryview, *, wait: bool
    ) -> list[tuple[int, int, list[Buffer]]]:
        """The data calls: for each run of neighbouring host bytes its host offset, guest offset and one vector, with the kept
        head and tail in it."""
        geometry = self._state.geometry
        cluster_bytes = geometry.cluster_bytes
        calls: list[tuple[int, int, list[Buffer]]] = []
        next_host = -1
        at = 0
        for target in targets:
            within = offset + at & geometry.cluster_mask
            length_bytes = min(cluster_bytes - within, len(data) - at)
            guest = offset + at - within
            buffers: list[Buffer] = []
            start = target.host + within
            if target.old is not None:
                kind, entry = target.old
                head_at = target.start
                head = self._kept(kind, entry, guest + head_at, within - head_at, hole=target.hole, wait=wait)
                tail_at = within + length_bytes
                tail = self._kept(kind, entry, guest + tail_at, target.end - tail_at, hole=target.hole, wait=wait)
                if head is not None:
                    start = target.host + head_at
                    buffers.append(head)
                buffers.append(data[at : at + length_bytes])
                end = target.host + tail_at
                if tail is not None:
                    end = target.host + target.end
                    buffers.append(tail)
            else:
                buffers.append(data[at : at + length_bytes])
                end = start + length_bytes
            if start == next_host:
                calls[-1][2].extend(buffers)
            else:
                calls.append((start, guest + start - target.host, buffers))
            next_host = end
            at += length_bytes
        return calls

    def _kept(self, kind: RunKind, entry: int, offset: int, length_bytes: int, *, hole: bool, wait: bool) -> Buffer | None:
        """Head or tail of a new cluster: what the guest did not rewrite. None where nothing needs to be written."""
        if not length_bytes:
            return None
        kept = self.reads.source(kind, entry, offset, length_bytes, wait=wait)
        if kept is None and not hole:
            return bytes(length_bytes)
        return kept

    def _enter(self, table: Table, targets: list[Target]) -> None:
        """The data is written: count the new clusters, change the entries, and let go of what they replace."""
        state = self._state
        pending = state.pending
        bits = state.geometry.cluster_bits
        for target in targets:
            if target.old is None:
                continue
            kind, entry = target.old
            linked = target.host | COPIED
            if state.geometry.extended_l2:
                bitmap = entry >> BITMAP_SHIFT if kind is not RunKind.COMPRESSED else 0
                written = _subclusters(state.geometry, target.start, target.end)
                linked |= (bitmap & ~(written << SUBCLUSTERS) | written) << BITMAP_SHIFT
            if target.reserved:
                # First: Ctrl-C in between may leave a count without an entry, never an entry without a count.
                state.refcounts.increment(target.host >> bits)
            pending.link(table, target.l2_index, linked)
            if target.reserved:
                free_entry(state, kind, entry, discard=False)


class LinkHome:
    """The L2 table that will hold the changed entries: the one there is, or a new one made when the data is written.

    A missing table is new and empty; one that is shared with a snapshot is copied (its data clusters keep their counts: each
    L1 table that leads to them was counted when the snapshot was made).
    """

    def __init__(self, state: State, l1_index: int, table: Table | None, *, wait: bool) -> None:
        self._state = state
        self._l1_index = l1_index
        self._table = table
        self._wait = wait
        self.clusters = 0
        """Clusters that the table needs reserved: 0 or 1."""
        self._cluster = 0

    def plan(self) -> None:
        """Decide whether a new table is needed. Raises NeedsCommit where the cache has no room for it."""
        state = self._state
        if self._table is None:
            # Each new table is kept twice while it is committed: not more of them than a part of the cache at a time.
            if len(state.pending.changed) > max(4, state.l2.limit // 4) or not state.l2.room_for(1):
                raise NeedsCommit
            self.clusters = 1
        elif not state.may_write_in_place(state.l1.entries[self._l1_index], wait=self._wait):
            self.clusters = 1

    def take(self, cluster: int) -> None:
        """The cluster for it. Raises NoSpace."""
        self._state.allocator.occupy(cluster)
        self._cluster = cluster

    def __call__(self) -> Table:
        """The table, made and entered into the pending transaction if it is new. Cannot fail."""
        if not self.clusters:
            assert self._table is not None
            return self._table
        state = self._state
        offset, words = self._cluster << state.geometry.cluster_bits, state.geometry.l2_entry_words
        if self._table is None:
            table = Table.empty(Kind.L2, self._l1_index, offset, state.geometry.cluster_bytes, words=words)
            state.pending.add(table)
        else:
            table = Table(Kind.L2, self._l1_index, offset, array("Q", self._table.entries), words=words, fresh=True)
            state.pending.add(table, copied=self._table)
            state.pending.free(self._table.offset >> state.geometry.cluster_bits, table=True)
        state.layout.claim_new(offset, 1, Kind.L2)
        state.refcounts.increment(self._cluster)
        state.l2.put(table)
        state.pending.set(state.l1, self._l1_index, offset | COPIED)
        return table


def grow_l1(state: State, *, wait: bool, size_bytes: int | None = None) -> None:
    """Make the L1 table as long as the disk's size asks for (an image may come with a shorter one), or a disk of
    ``size_bytes``, in the pending transaction.

    PREPARE: a longer copy in fresh clusters. LINK: the header's L1 fields, one write inside sector 0. RECLAIM: the old table.
    """
    geometry = state.geometry
    old = state.l1
    entries = geometry.l1_entries_for(state.size if size_bytes is None else size_bytes)
    clusters = geometry.clusters_for(entries * 8)
    if clusters * geometry.cluster_bytes > MAX_L1_BYTES:
        raise NoSpace(f"{state.storage.name}: the L1 table cannot grow past {MAX_L1_BYTES} bytes")
    run = state.allocator.reserve_contiguous(clusters, wait=wait)
    offset = run.first << geometry.cluster_bits
    # The copy reaches to the end of its last cluster, so that all it holds is defined; the header's length is what counts.
    table = Table.empty(Kind.L1, 0, offset, clusters * geometry.cluster_bytes)
    table.entries[: len(old.entries)] = old.entries
    state.layout.claim_new(offset, clusters, Kind.L1)
    state.refcounts.increment(run.first, clusters)
    state.pending.add(table, copied=old)
    state.pending.patch_header(*l1_patch(HostOffset(offset), entries), "header.link")
    if old.offset:
        state.pending.free(old.offset >> geometry.cluster_bits, geometry.clusters_for(len(old.entries) * 8), table=True)
    state.l1 = table


def free_entry(state: State, kind: RunKind, entry: int, *, discard: bool) -> None:
    """The host clusters that an L2 entry led to lose a reference, once the entry's change is durable. In an external data file
    they have none."""
    bits = state.geometry.cluster_bits
    if kind is RunKind.COMPRESSED:
        mapping = decode_l2(entry, state.geometry)
        assert isinstance(mapping, CompressedEntry)
        first = mapping.host_offset >> bits
        last = mapping.host_offset + mapping.length_bytes - 1 >> bits
        state.pending.free(first, last - first + 1, discard=discard)
    elif entry & OFFSET_MASK and not state.geometry.external_data:
        state.pending.free((entry & OFFSET_MASK) >> bits, discard=discard)


def _subclusters(geometry: Geometry, start: int, end: int) -> int:
    """The bits of the subclusters that a part of a cluster touches."""
    first, stop = start // geometry.subcluster_bytes, -(-end // geometry.subcluster_bytes)
    return (1 << stop) - (1 << first)


def _is_allocated(geometry: Geometry, entry: int, start: int, end: int) -> bool:
    """True if an extended entry has a part of its cluster as data already."""
    return geometry.extended_l2 and not _subclusters(geometry, start, end) & ~(entry >> BITMAP_SHIFT)


def _span(geometry: Geometry, kind: RunKind, entry: int, start: int, end: int, *, in_place: bool) -> tuple[int, int]:
    """What of a cluster with subclusters a write of ``start`` to ``end`` defines: whole subclusters; in a new cluster also all
    that the old one holds, and what lies between."""
    if kind is RunKind.DATA or kind is RunKind.COMPRESSED:
        return (start, end) if in_place else (0, geometry.cluster_bytes)
    allocated = entry >> BITMAP_SHIFT & ALL_SUBCLUSTERS
    size = geometry.subcluster_bytes
    first, last = start // size, (end - 1) // size
    if not in_place and allocated:
        return min(first, (allocated & -allocated).bit_length() - 1) * size, max(last + 1, allocated.bit_length()) * size
    # What the subcluster at either end holds already stays where it is.
    return (
        start if allocated >> first & 1 else first * size,
        end if allocated >> last & 1 else (last + 1) * size,
    )


def _clusters(runs: list[Run], skip: int) -> Iterator[tuple[int, bool]]:
    """The clusters of ``runs`` one by one, with whether each is a hole, without the first ``skip``."""
    for run in runs:
        for cluster in range(run.first, run.first + run.clusters):
            if skip:
                skip -= 1
                continue
            yield cluster, run.hole
