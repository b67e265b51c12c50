"""RECLAIM: counts down, host space back, clusters free again.

On disk before this stage: nothing that is durable leads to the clusters any more. A crash in the middle leaks some of them.
Counts are written without a fence of their own (R3). A cluster becomes available only when the last read that was planned
against it has ended (R4); until then it waits in quarantine. Its host space is punched before it becomes available, so that a
late punch cannot hit new data (known trap 5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowfence.errors import CowfenceError
from cowfence.qcow2.reader import Cold
from cowfence.qcow2.tables import RefcountBlock
from cowfence.qcow2.transaction import Change, Freed, Stage, write_changes
from cowfence.units import SECTOR_BYTES

if TYPE_CHECKING:
    from cowfence.qcow2.state import State


class ClusterReclaimer:
    """Takes freed clusters from durable unlink to availability."""

    def __init__(self) -> None:
        self.state: State
        self.forget: Callable[[], None] = lambda: None
        """Called before clusters become available: whoever remembers their contents forgets them."""
        self._quarantine: deque[tuple[int, list[int], list[int]]] = deque()
        """(mark of the tickets, clusters, those of them to punch), oldest first."""

    @property
    def waiting_clusters(self) -> int:
        """Freed, and not available yet: a crash now would leak them."""
        return sum(len(clusters) for _, clusters, _ in list(self._quarantine))

    def reclaim(self, freed: list[Freed]) -> None:
        """Take one reference from every cluster named. Never fails: what cannot be counted down is leaked."""
        if freed:
            self._count_down(freed)
        self.release()

    def _count_down(self, freed: list[Freed]) -> None:
        state = self.state
        blocks: dict[int, tuple[RefcountBlock, set[int]]] = {}
        emptied: list[int] = []
        punch: list[int] = []
        mask = state.geometry.refcounts_per_block - 1
        shift = state.geometry.refcount_block_shift - state.geometry.cluster_bits
        self._warm({cluster >> shift for entry in freed for cluster in (entry.first, entry.first + entry.clusters - 1)})
        with state.lock:
            for first, count, discard, table in freed:
                for cluster in range(first, first + count):
                    if table:
                        state.layout.drop(cluster)
                    try:
                        block = state.refcounts.block_of(cluster, wait=True)
                    except CowfenceError:
                        continue
                    at = cluster & mask
                    stored = block.get(at) if block else 0
                    if not stored or block is None:
                        # The image was damaged before we came; check reports it, and a count never goes below 0.
                        continue
                    if stored == 1 and cluster in state.layout.kinds:
                        # A damaged image, where a guest's entry led onto a table that is in use: the table stays.
                        continue
                    dirty = block.dirty
                    block.dirty = blocks.setdefault(block.offset, (block, set()))[1]
                    block.set(at, stored - 1)
                    block.dirty = dirty
                    # Its new counts are not on disk before the writes below: the cache must keep it.
                    block.frozen = True
                    if stored == 1:
                        emptied.append(cluster)
                        if discard and state.discards:
                            punch.append(cluster)
            changes = [
                Change(
                    Stage.RECLAIM,
                    0,
                    block.offset + sector * SECTOR_BYTES,
                    block.sector(sector),
                    "refcount.decrement",
                    block.kind,
                )
                for block, sectors in blocks.values()
                for sector in sectors
            ]
            state.allocator.hold(emptied)
            self._quarantine.append((state.tickets.now(), emptied, punch))
        try:
            write_changes(state.storage, state.layout, changes)
            written = True
        except CowfenceError:
            # Too high counts on disk are leaks. The sectors ride in the next transaction.
            written = False
        with state.lock:
            for block, sectors in blocks.values():
                block.frozen = False
                if not written:
                    block.dirty |= sectors
                    state.pending.touch(block)

    def _warm(self, indices: set[int]) -> None:
        """Read blocks that are not cached into the page cache, outside the lock."""
        for index in indices:
            with self.state.lock:
                try:
                    self.state.refcounts.block(index, wait=False)
                    continue
                except Cold as cold:
                    warm = cold.warm
                except CowfenceError:
                    continue
            try:
                warm()
            except CowfenceError:
                continue

    def end_ticket(self, ticket: int, body: Callable[[], None] | None = None) -> None:
        """A ticket ends, and what waited for it is released. ``body`` is called under the lock, before.

        Whoever waits for all tickets, to alter the image or to close it, waits for the release too: it may punch clusters that
        another allocator would find free.
        """
        state, tickets, waiting = self.state, self.state.tickets, True
        try:
            with state.lock:
                try:
                    if body is not None:
                        body()
                finally:
                    tickets.end(ticket)
                    # What comes from now on is released by who brings it: this ticket has ended.
                    waiting = bool(self._quarantine)
                    if not waiting:
                        tickets.settle(ticket)
        finally:
            if waiting:
                try:
                    self.release()
                finally:
                    with state.lock:
                        tickets.settle(ticket)

    def start_anew(self) -> None:
        """Under the lock: the tables are read again, and who reads the counts finds free what waited here."""
        self._quarantine.clear()
        self.forget()

    def release(self) -> None:
        """Make available what no planned read holds any more. Called outside the lock."""
        state = self.state
        while True:
            with state.lock:
                if state.committer.broken is not None:
                    # After a failed fence nothing more reaches the host, and nothing is allocated either.
                    return
                if not self._quarantine or not state.tickets.all_ended_before(self._quarantine[0][0]):
                    return
                _, emptied, punch = self._quarantine.popleft()
            try:
                self._punch(punch)
            finally:
                with state.lock:
                    self.forget()
                    state.allocator.release(emptied)

    def _punch(self, clusters: list[int]) -> None:
        bits = self.state.geometry.cluster_bits
        clusters = sorted(clusters)
        at = 0
        while at < len(clusters):
            first = at
            while at + 1 < len(clusters) and clusters[at + 1] == clusters[at] + 1:
                at += 1
            at += 1
            try:
                self.state.storage.discard(clusters[first] << bits, (at - first) << bits, "host.discard")
            except CowfenceError:
                # Space that the host would not take back costs nothing but space.
                return
