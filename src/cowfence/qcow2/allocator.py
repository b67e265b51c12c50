"""The allocator: free host clusters, and the refcount blocks that cover more of them.

It hands out only clusters whose refcount block is linked and durable, so that no LINK ever relies on another pointer of the
same LINK (crash contract, R2). Free clusters are found by scanning blocks in order; what a transaction frees comes back
through ``release``, after its unlink is durable and the reads planned against it have ended (R4).

Coverage grows ahead of need: when the last block is scanned and little is left, the block for the next range rides in the
pending transaction and stands in the range already covered. Only where nothing covered is free does a block (or, when the
refcount table is full, a new table) stand in the very range that it begins to cover, in a transaction of its own; see
``grow_alone``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import NamedTuple

from cowfence.errors import Corrupt, NoSpace
from cowfence.qcow2.geometry import MAX_HOST_BITS, MAX_REFCOUNT_TABLE_BYTES, Geometry, HostOffset
from cowfence.qcow2.header import refcount_table_patch
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.reader import NeedsCommit
from cowfence.qcow2.refcounts import Refcounts
from cowfence.qcow2.tables import Kind, RefcountBlock, Table
from cowfence.qcow2.transaction import Pending
from cowfence.storage.base import Storage
from cowfence.units import align_up, div_up

_LOOKAHEAD_CLUSTERS = 1024


class Run(NamedTuple):
    """Clusters handed out. ``hole``: they lie past all that was ever written to the file, so they read as zeros."""

    first: int
    clusters: int
    hole: bool


class Allocator:
    """Free clusters of one image."""

    def __init__(
        self,
        storage: Storage,
        refcounts: Refcounts,
        layout: Layout,
        geometry: Geometry,
        pending: Pending,
    ) -> None:
        self._storage = storage
        self._name = storage.name
        self._refcounts = refcounts
        self._layout = layout
        self._geometry = geometry
        self._pending = pending
        self._holes = storage.capabilities().holes_past_end
        self.never_used = div_up(storage.size(), geometry.cluster_bytes)
        """Clusters from here on were never handed out and lie past the end of the file as it was opened."""
        self._runs: deque[tuple[int, int]] = deque()
        """Free clusters found by scanning, as (first, end)."""
        self._returned: list[int] = []
        """Free clusters that came back; used first, so that the file does not grow while old space lies idle."""
        self._to_scan: deque[int] = deque(i for i, entry in enumerate(refcounts.table.entries) if entry)
        self._held: dict[int, set[int]] = {}
        """By block still to be scanned: clusters whose count is 0 already, but which are not free before ``release``."""
        self.free = 0
        """Clusters at hand: found or come back."""
        self._block_pending = False
        self._lookahead = min(_LOOKAHEAD_CLUSTERS, geometry.refcounts_per_block // 4)

    def check_handed_out(self, cluster: int) -> None:
        """Raise Corrupt for a cluster past the end of the file that was never handed out: no image leads there by right, and
        to write there would make the file as long as a hostile entry says, too long for any check."""
        if cluster >= self.never_used:
            offset = cluster << self._geometry.cluster_bits
            raise Corrupt(f"{self._name}: data cluster at offset {offset:#x}", "it lies past the end of the file")

    def reserve(self, count: int, *, wait: bool) -> list[Run]:
        """``count`` clusters in as few runs as can be, their refcount blocks loaded; they belong to the caller.

        Give them back with ``give_back`` if the operation fails before it counts them. Raises NeedsCommit where coverage
        must grow first; then nothing is reserved.
        """
        while self.free < count:
            if not self._to_scan:
                raise NeedsCommit(self.grow_alone)
            self._scan(wait=wait)
        return self._ready(self._take(count), wait=wait)

    def reserve_contiguous(self, count: int, *, wait: bool) -> Run:
        """``count`` neighbouring clusters. Raises NeedsCommit where coverage must grow first."""
        while self._to_scan:
            self._scan(wait=wait)
        for at, (first, end) in enumerate(self._runs):
            if end - first >= count:
                del self._runs[at]
                self._runs.appendleft((first, end))
                # What came back earlier would be handed out first and is in pieces.
                returned, self._returned = self._returned, []
                runs = self._take(count)
                self._returned = returned
                self._ready(runs, wait=wait)
                return Run(first, count, hole=False)
        raise NeedsCommit(lambda: self.grow_alone(count))

    def _ready(self, runs: list[Run], *, wait: bool) -> list[Run]:
        try:
            for run in runs:
                self._layout.check_data(run.first, run.clusters)
                self._refcounts.load(run.first, run.clusters, wait=wait)
        except BaseException:
            self.give_back(runs)
            raise
        return runs

    def _take(self, count: int) -> list[Run]:
        runs: list[Run] = []
        self.free -= count
        returned = self._returned
        if returned:
            returned.sort(reverse=True)
            while returned and count:
                first = end = returned.pop()
                end += 1
                count -= 1
                while count and returned and returned[-1] == end:
                    returned.pop()
                    end += 1
                    count -= 1
                runs.append(Run(first, end - first, hole=False))
        while count:
            first, end = self._runs[0]
            if end - first > count:
                end = first + count
                self._runs[0] = end, self._runs[0][1]
            else:
                self._runs.popleft()
            count -= end - first
            border = min(max(first, self.never_used), end) if self._holes else end
            if border > first:
                runs.append(Run(first, border - first, hole=False))
            if end > border:
                runs.append(Run(border, end - border, hole=True))
            self.never_used = max(self.never_used, end)
        return runs

    def give_back(self, runs: list[Run]) -> None:
        """Clusters that were reserved and never counted are free again. They may hold bytes by now."""
        for run in runs:
            self._returned.extend(range(run.first, run.first + run.clusters))
            self.free += run.clusters

    def hold(self, clusters: list[int]) -> None:
        """Clusters whose count fell to 0; each comes to ``release`` later, and until then no scan may find it free."""
        if self._to_scan:
            waiting = set(self._to_scan)
            per_block = self._geometry.refcounts_per_block
            for cluster in clusters:
                if cluster // per_block in waiting:
                    self._held.setdefault(cluster // per_block, set()).add(cluster)

    def release(self, clusters: list[int]) -> None:
        """Clusters that were held, whose unlink is durable, and which no planned read holds."""
        if self._to_scan:
            # A block that is still to be scanned will show them then.
            waiting = set(self._to_scan)
            per_block = self._geometry.refcounts_per_block
            scanned = []
            for cluster in clusters:
                if cluster // per_block in waiting:
                    self._held[cluster // per_block].discard(cluster)
                else:
                    scanned.append(cluster)
            clusters = scanned
        self._returned.extend(clusters)
        self.free += len(clusters)

    def _scan(self, *, wait: bool) -> None:
        index = self._to_scan[0]
        self._refcounts.blocks.room_for(1)
        block = self._refcounts.block(index, wait=wait)
        self._to_scan.popleft()
        if block is None:
            return
        base = index * self._geometry.refcounts_per_block
        limit = 1 << MAX_HOST_BITS - self._geometry.cluster_bits
        held = sorted(self._held.pop(index, ()))
        for first, count in block.free_runs():
            start, stop = base + first, min(base + first + count, limit)
            for end in (*held[bisect_left(held, start) : bisect_left(held, stop)], stop):
                if start < end:
                    self.free += end - start
                    if self._runs and self._runs[-1][1] == start:
                        start = self._runs.pop()[0]
                    self._runs.append((start, end))
                start = end + 1

    def look_ahead(self, *, wait: bool) -> None:
        """Add the block for the next range to the pending transaction if little is left of the ranges covered."""
        if self._block_pending or self._to_scan or not 1 <= self.free <= self._lookahead:
            return
        index = self._next_index()
        if index is None:
            return
        run = self.reserve(1, wait=wait)
        try:
            self.occupy(run[0].first)
        except NoSpace:
            # It was not needed yet. Whoever needs it makes it alone, and hears of it.
            self.give_back(run)
            return
        self._add_block(index, run[0].first)
        self._refcounts.increment(run[0].first)

    def occupy(self, cluster: int) -> None:
        """Take the host's space for a new table before any write that will rely on it is acknowledged. Raises NoSpace.

        Its content comes with the commit: on a full disk that would be too late, and with a killed process all that was
        acknowledged since the last flush would be lost, keeper or not.
        """
        self._storage.writev(cluster << self._geometry.cluster_bits, (bytes(self._geometry.cluster_bytes),), "host.occupy")

    def _next_index(self) -> int | None:
        """The first entry of the refcount table that has no block; None where the table is full."""
        try:
            index = self._refcounts.table.entries.index(0)
        except ValueError:
            return None
        if index * self._geometry.block_coverage_bytes >= 1 << MAX_HOST_BITS:
            raise NoSpace(f"{self._name}: the image file cannot grow past 2**{MAX_HOST_BITS} bytes")
        return index

    def _add_block(self, index: int, cluster: int) -> RefcountBlock:
        geometry = self._geometry
        offset = cluster << geometry.cluster_bits
        block = RefcountBlock(index, offset, geometry.refcount_bits, bytes(geometry.cluster_bytes), fresh=True)
        self._layout.claim_new(offset, 1, Kind.REFCOUNT_BLOCK)
        self._refcounts.blocks.put(block)
        self._pending.add(block)
        self._pending.set(self._refcounts.table, index, offset)
        self._pending.on_linked.append(lambda: self._covered(index))
        self._block_pending = True
        return block

    def _covered(self, index: int) -> None:
        """The block at ``index`` is linked and durable: its clusters may be handed out."""
        self._to_scan.append(index)
        self._block_pending = False

    def grow_alone(self, contiguous: int = 1) -> None:
        """Cover more clusters, at least ``contiguous`` of them neighbours; the caller commits this before anything uses it.

        One block finds room in what is covered, where there is room. Otherwise the new blocks, or the new blocks and the new
        refcount table, stand at the start of the range that they begin to cover and count themselves. Nothing relies on them
        until the one LINK that leads to them is durable.
        """
        geometry = self._geometry
        if self._block_pending or self._to_scan:
            return
        index = self._next_index()
        if index is None:
            self._grow_table()
            return
        blocks = 1
        if self.free and contiguous <= geometry.refcounts_per_block:
            run = self.reserve(1, wait=True)
            self._add_block(index, run[0].first)
            self._refcounts.increment(run[0].first)
            return
        while blocks * (geometry.refcounts_per_block - 1) < contiguous:
            blocks += 1
        entries = self._refcounts.table.entries
        if index + blocks > len(entries) or any(entries[index : index + blocks]):
            self._grow_table(blocks)
            return
        self._add_self_counting(index, blocks, blocks)

    def _add_self_counting(self, index: int, blocks: int, used: int) -> None:
        """Blocks at the start of the range that they cover; the first ``used`` clusters of it are in use."""
        per_block = self._geometry.refcounts_per_block
        first = index * per_block
        for number in range(blocks):
            block = self._add_block(index + number, first + number)
            for at in range(min(per_block, used - number * per_block)):
                self._pending.set(block, at, 1)
        self.never_used = max(self.never_used, first + used)

    def _grow_table(self, more_blocks: int = 0) -> None:
        geometry = self._geometry
        old = self._refcounts.table
        old_length = len(old.entries)
        clusters = div_up(old_length * 3 // 2 + 1 + more_blocks, geometry.table_entries_per_cluster)
        if clusters * geometry.cluster_bytes > MAX_REFCOUNT_TABLE_BYTES:
            clusters = align_up(MAX_REFCOUNT_TABLE_BYTES, geometry.cluster_bytes) // geometry.cluster_bytes
        blocks = 1
        while blocks * geometry.refcounts_per_block < blocks + clusters:
            blocks += 1
        first = old_length * geometry.refcounts_per_block
        if (
            clusters * geometry.table_entries_per_cluster <= old_length + blocks
            or first + blocks + clusters > 1 << MAX_HOST_BITS - geometry.cluster_bits
        ):
            raise NoSpace(f"{self._name}: the refcount table cannot grow any more")
        table_offset = first + blocks << geometry.cluster_bits
        table = Table.empty(Kind.REFCOUNT_TABLE, 0, table_offset, clusters * geometry.cluster_bytes)
        table.entries[:old_length] = old.entries
        self._layout.claim_new(table_offset, clusters, Kind.REFCOUNT_TABLE)
        self._pending.add(table, copied=old)
        self._refcounts.table = table
        self._add_self_counting(old_length, blocks, blocks + clusters)
        self._pending.patch_header(*refcount_table_patch(HostOffset(table_offset), clusters), "header.link")
        self._pending.free(old.offset >> geometry.cluster_bits, old_length // geometry.table_entries_per_cluster, table=True)
