"""The writes of a batch that change tables and can be carried out at once, under the lock that the batch holds already.

Those into clusters that the disk does not have yet are planned together: that is what a guest does most when it fills a disk,
and a plan for each costs three times what the host takes for the data. The writes that lie in one cluster each, which nothing
on this disk or beneath it holds yet, reserve all their clusters at once; then the data of each goes out, and its entry and
count enter the pending transaction. Whatever is not that simple, or fails here without a verdict, goes the way of ``write``.

What holds on disk after a data call: bytes in a new cluster, to which nothing leads. Two writes to one new cluster never meet
here: the second finds the first one's entry when it is carried out by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cowfence.disk.base import Outcome, Request, Verb, as_outcome, in_bytes
from cowfence.errors import CowfenceError, NoSpace, WouldBlock
from cowfence.qcow2.allocator import Run
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.reader import Cold, NeedsCommit
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Table
from cowfence.qcow2.write import Writes


class BatchWrites:
    """See the module. ``tables``: L2 tables in memory by their L1 index, whose entries are single words that lead to guest data
    as it is; none where an image has others."""

    def __init__(self, state: State, writes: Writes, tables: Mapping[int, Table]) -> None:
        self._state = state
        self._writes = writes
        self._tables = tables
        geometry = state.geometry
        self._most = min(geometry.l2_entries, state.piece_bytes >> geometry.cluster_bits)
        """The clusters of one operation: so many notes the keeper's journal has room for, see ``State.check_room``."""

    def write(self, requests: Sequence[Request], outcomes: list[Outcome], indices: list[int]) -> list[int]:
        """Carry out those of the requests at ``indices`` that are writes inside one L2 table, and neither wait nor need a
        commit; returns the others."""
        rest: list[int] = []
        write, size, piece_bytes = Verb.WRITE, self._state.size, self._state.piece_bytes
        shift = self._state.geometry.l1_shift
        for index in self._into_new_clusters(requests, outcomes, indices):
            verb, offset, _, data, fua, _ = requests[index]
            length_bytes = len(data := in_bytes(data))
            end = offset + length_bytes
            if (
                verb is write
                and not fua
                and 0 < length_bytes <= piece_bytes
                and offset >= 0
                and end <= size
                and offset >> shift == end - 1 >> shift
            ):
                try:
                    self._writes.write(offset, memoryview(data).cast("B"), wait=False)
                    outcomes[index] = None
                    continue
                except (Cold, NeedsCommit, NoSpace, WouldBlock):
                    pass
                except CowfenceError as error:
                    outcomes[index] = as_outcome(error)
                    continue
            rest.append(index)
        return rest

    def _into_new_clusters(self, requests: Sequence[Request], outcomes: list[Outcome], indices: list[int]) -> list[int]:
        """The writes that are planned together; returns the other indices."""
        found, rest = self._find(requests, indices)
        state = self._state
        if not found:
            return rest
        try:
            state.check_room()
            state.allocator.look_ahead(wait=False)
            runs = state.allocator.reserve(len(found), wait=False)
        except (Cold, NeedsCommit, CowfenceError):
            return indices
        bits, writev = state.geometry.cluster_bits, state.data.writev
        cluster_bytes, within_mask = state.geometry.cluster_bytes, state.geometry.cluster_mask
        pending, increment = state.pending, state.refcounts.increment
        free = {cluster: run.hole for run in runs for cluster in range(run.first, run.first + run.clusters)}
        state.committer.data_written = True
        try:
            for (index, table, l2_index), (cluster, hole) in zip(found, list(free.items()), strict=True):
                _, offset, _, data, _, _ = requests[index]
                host, within, data = cluster << bits, offset & within_mask, in_bytes(data)
                try:
                    if hole:
                        writev(host + within, (data,), "data.write")
                    else:
                        writev(host, (bytes(within), data, bytes(cluster_bytes - within - len(data))), "data.write")
                except NoSpace:
                    # A commit may free something: see ``Plans.mutate``.
                    rest.append(index)
                    continue
                except CowfenceError as error:
                    outcomes[index] = as_outcome(error)
                    continue
                # Nothing below can fail; and Ctrl-C may leave a count without an entry, never an entry without a count.
                del free[cluster]
                increment(cluster)
                pending.set(table, l2_index, host | COPIED)
                outcomes[index] = None
        finally:
            if free:
                state.allocator.give_back([Run(cluster, 1, hole=False) for cluster in free])
        return rest

    def _find(self, requests: Sequence[Request], indices: list[int]) -> tuple[list[tuple[int, Table, int]], list[int]]:
        """The writes that are meant (index, L2 table, index of the entry), and the indices of the others."""
        state, tables = self._state, self._tables
        geometry, l1_entries, write = state.geometry, state.l1.entries, Verb.WRITE
        bits, l2_bits, l2_mask = geometry.cluster_bits, geometry.l2_bits, geometry.l2_entries - 1
        cluster_bytes, within_mask, size = geometry.cluster_bytes, geometry.cluster_mask, state.size
        # What the backing file may hold begins in an earlier cluster.
        first = -(-state.backing_bytes >> bits)
        found: dict[int, tuple[int, Table, int]] = {}
        rest: list[int] = []
        for index in indices:
            verb, offset, _, data, fua, _ = requests[index]
            if verb is write and not fua and 0 <= offset <= size - len(data := in_bytes(data)) and len(found) < self._most:
                cluster = offset >> bits
                table = tables.get(cluster >> l2_bits)
                if (
                    table is not None
                    and not table.entries[cluster & l2_mask]
                    and 0 < len(data) <= cluster_bytes - (offset & within_mask)
                    and cluster >= first
                    and cluster not in found
                    and l1_entries[cluster >> l2_bits] & COPIED
                ):
                    table.used = True
                    found[cluster] = index, table, cluster & l2_mask
                    continue
            rest.append(index)
        return list(found.values()), rest
