"""Zeroing and discarding whole clusters. Both change entries only: no data is written, and what the old entries led to is
freed once the change is durable.

Version 3 has an entry that reads as zeros whatever lies below. Version 2 has none: there a cluster can only be unallocated,
which reads as zeros where no backing file lies under it; elsewhere zeros are written as data, and a discard does nothing
(crash contract, C3).
"""

from __future__ import annotations

from cowfence.qcow2.entries import ALL_SUBCLUSTERS, BITMAP_SHIFT, zeroed
from cowfence.qcow2.geometry import SUBCLUSTERS
from cowfence.qcow2.mapping import RunKind, cluster_runs, decode, reads_zero
from cowfence.qcow2.reader import NeedsCommit
from cowfence.qcow2.state import State
from cowfence.qcow2.write import LinkHome, Writes, free_entry, grow_l1

_ZERO_PIECE_BYTES = 1 << 20


class Zeroes:
    """Zero and discard of one image. Every method is called under the lock and does one piece; it returns its length."""

    def __init__(self, state: State, writes: Writes) -> None:
        self._state = state
        self._writes = writes
        self.reads = writes.reads

    def write(self, offset: int, data: memoryview, *, wait: bool) -> int:
        """See ``Writes.write``."""
        return self._writes.write(offset, data, wait=wait)

    def zero(self, offset: int, length_bytes: int, *, unmap: bool, wait: bool) -> int:
        """Make a piece of the range read as zeros. Raises as ``Writes.write`` does."""
        geometry = self._state.geometry
        within = offset & geometry.cluster_mask
        if within or length_bytes < geometry.cluster_bytes:
            if not within and offset + length_bytes == self._state.size:
                # The last cluster of the disk is cut short by its end: all that the guest has of it becomes zero.
                self._clusters(offset, geometry.cluster_bytes, unmap=unmap, discard=False, wait=wait)
                return length_bytes
            return self._zero_part(offset, min(length_bytes, geometry.cluster_bytes - within), unmap=unmap, wait=wait)
        return self._clusters(offset, length_bytes & ~geometry.cluster_mask, unmap=unmap, discard=False, wait=wait)

    def discard(self, offset: int, length_bytes: int, *, wait: bool) -> int:
        """Let go of the whole clusters in a piece of the range; parts of clusters stay as they are."""
        geometry = self._state.geometry
        within = offset & geometry.cluster_mask
        if within:
            return min(length_bytes, geometry.cluster_bytes - within)
        if length_bytes < geometry.cluster_bytes:
            # The last cluster of the disk may be cut short by its end: all the guest has of it is discarded.
            if offset + length_bytes < self._state.size:
                return length_bytes
            self._clusters(offset, geometry.cluster_bytes, unmap=True, discard=True, wait=wait)
            return length_bytes
        return self._clusters(offset, length_bytes & ~geometry.cluster_mask, unmap=True, discard=True, wait=wait)

    def forget(self, offset: int, length_bytes: int, *, wait: bool) -> int:
        """Zero clusters, which must read as zeros below, become unallocated: for version 2, which has none. A piece of the
        range, whole clusters."""
        state = self._state
        geometry = state.geometry
        l1_index = offset >> geometry.l1_shift
        length_bytes = min(length_bytes, ((l1_index + 1) << geometry.l1_shift) - offset, state.piece_bytes)
        table = state.l2_table(l1_index, wait=wait, cached=True)
        first = offset >> geometry.cluster_bits & geometry.l2_entries - 1
        clusters = range(first, first + (length_bytes >> geometry.cluster_bits))
        entries = [table.entry(at) if table is not None else 0 for at in clusters]
        self._enter(
            l1_index,
            [(at, 0, RunKind.ZERO, entry) for at, entry in zip(clusters, entries, strict=True) if entry],
            discard=False,
            wait=wait,
        )
        return length_bytes

    def _zero_part(self, offset: int, length_bytes: int, *, unmap: bool, wait: bool) -> int:
        """Zeros inside one cluster: nothing to do where it reads as zeros, else data."""
        state = self._state
        geometry = state.geometry
        l1_index = offset >> geometry.l1_shift
        table = state.l2_table(l1_index, wait=wait, cached=False)
        l2_index = offset >> geometry.cluster_bits & geometry.l2_entries - 1
        entry = table.entry(l2_index) if table is not None else 0
        found = list(cluster_runs(state, l1_index, l2_index, entry, offset, offset + length_bytes))
        if all(reads_zero(state, run) for run in found):
            return length_bytes
        if geometry.extended_l2 and found[0].kind is not RunKind.COMPRESSED and not state.raw_data:
            return self._subclusters(l1_index, l2_index, entry, offset, length_bytes, unmap=unmap, wait=wait)
        return self._writes.write(offset, memoryview(bytes(length_bytes)), wait=wait)

    def _subclusters(
        self, l1_index: int, l2_index: int, entry: int, offset: int, length_bytes: int, *, unmap: bool, wait: bool
    ) -> int:
        """Zeros inside one cluster that has subclusters: whole ones by its entry, which keeps its host cluster, parts as
        data."""
        state = self._state
        geometry = state.geometry
        size = geometry.subcluster_bytes
        lead = -offset % size
        if lead or (length_bytes < size and offset + length_bytes != state.size):
            return self._writes.write(offset, memoryview(bytes(min(lead or length_bytes, length_bytes))), wait=wait)
        first = (offset & geometry.cluster_mask) // size
        count = max(1, length_bytes // size)
        bits = (1 << first + count) - (1 << first)
        changed = entry & ~(bits << BITMAP_SHIFT) | bits << BITMAP_SHIFT + SUBCLUSTERS
        if unmap and changed >> BITMAP_SHIFT == ALL_SUBCLUSTERS << SUBCLUSTERS:
            change = (l2_index, zeroed(0, geometry), RunKind.SUBCLUSTERED, entry)
        else:
            change = (l2_index, changed, RunKind.UNALLOCATED, 0)
        self._enter(l1_index, [change], discard=False, wait=wait)
        done = min(count * size, length_bytes)
        if state.record is not None:
            state.record(offset, min(done, state.size - offset))
        return done

    def _clusters(self, offset: int, length_bytes: int, *, unmap: bool, discard: bool, wait: bool) -> int:
        state = self._state
        geometry = state.geometry
        bits = geometry.cluster_bits
        l1_index = offset >> geometry.l1_shift
        length_bytes = min(length_bytes, ((l1_index + 1) << geometry.l1_shift) - offset, state.piece_bytes)
        if state.l2_offset(l1_index) is None and l1_index not in state.l2.tables and state.reads_zero_below(offset):
            return length_bytes
        inside = max(0, min(length_bytes, state.size - offset))
        if state.raw_data and inside:
            self._zero_data(offset, inside)
        table = state.l2_table(l1_index, wait=wait, cached=True)
        first = offset >> bits & geometry.l2_entries - 1
        changes: list[tuple[int, int, RunKind, int]] = []
        for number in range(length_bytes >> bits):
            entry = table.entry(first + number) if table is not None else 0
            kind, host = decode(state, l1_index, first + number, entry)
            below_zero = state.reads_zero_below(offset + (number << bits))
            if kind is RunKind.DATA and state.raw_data and number << bits < inside:
                continue
            if kind is RunKind.UNALLOCATED and (below_zero or discard):
                continue
            if kind is RunKind.ZERO and not (host is not None and unmap):
                continue
            if geometry.version < 3 and not (unmap and below_zero):
                if discard:
                    continue
                # Everything before this cluster is done by its entries; this cluster needs zeros as data.
                if number:
                    length_bytes = number << bits
                    break
                # Behind the end of the disk, where an alteration may work, whole clusters are zeroed.
                return self._write_zeros(offset, inside or length_bytes, wait=wait)
            keeps = kind is RunKind.DATA or kind is RunKind.SUBCLUSTERED
            if keeps and host is not None and not unmap and self._may_keep(entry, wait=wait):
                changes.append((first + number, zeroed(entry, geometry), RunKind.UNALLOCATED, 0))
            else:
                changes.append((first + number, 0 if below_zero else zeroed(0, geometry), kind, entry))
        if changes:
            if geometry.external_data and not state.raw_data and unmap and inside and state.discards:
                self._zero_data(offset, inside)
            self._enter(l1_index, changes, discard=discard, wait=wait)
        if state.record is not None and inside and (changes or state.raw_data):
            state.record(offset, inside)
        return length_bytes

    def _may_keep(self, entry: int, *, wait: bool) -> bool:
        return self._state.geometry.external_data or self._state.may_write_in_place(entry, wait=wait)

    def _zero_data(self, offset: int, length_bytes: int) -> None:
        """Zeros in the external data file, ahead of the entries: whoever finds the old ones finds old bytes or zeros, as he may
        of what was zeroed or discarded and not flushed. (To punch it later could hit what was written since.)"""
        self._state.committer.data_written = True
        self._state.data.zero(offset, length_bytes, "data.write")

    def _write_zeros(self, offset: int, length_bytes: int, *, wait: bool) -> int:
        piece = min(length_bytes, max(_ZERO_PIECE_BYTES, self._state.geometry.cluster_bytes))
        return self._writes.write(offset, memoryview(bytes(piece)), wait=wait)

    def _enter(self, l1_index: int, changes: list[tuple[int, int, RunKind, int]], *, discard: bool, wait: bool) -> None:
        state = self._state
        state.check_room()
        if l1_index >= len(state.l1.entries):
            raise NeedsCommit(lambda: grow_l1(state, wait=True))
        home = LinkHome(state, l1_index, state.l2_table(l1_index, wait=wait, cached=True), wait=wait)
        home.plan()
        if home.clusters:
            state.allocator.look_ahead(wait=wait)
            runs = state.allocator.reserve(1, wait=wait)
            try:
                home.take(runs[0].first)
            except BaseException:
                state.allocator.give_back(runs)
                raise
        table = home()
        for l2_index, entry, kind, old in changes:
            state.pending.link(table, l2_index, entry)
            free_entry(state, kind, old, discard=discard)
