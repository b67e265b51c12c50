"""The writes of a batch that change tables and can be carried out at once.

Those into clusters that the disk does not have yet are planned together: that is what a guest does most when it fills a disk,
and a plan for each costs three times what the host takes for the data. The writes inside one L2 table each, of which nothing
on this disk or beneath it holds anything yet, reserve all their clusters at once; then the data of each goes out, and its
entries and counts enter the pending transaction. Whatever is not that simple, or fails here without a verdict, goes the way of
``write``.

What holds on disk after a data call: bytes in a new cluster, to which nothing leads. So the image's lock is not needed for it,
and where much data goes out, others have it meanwhile. Two writes to one new cluster never meet here: the second finds the
first one's entry when it is carried out by itself, or the first one the second's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cowfence.disk.base import BLOCKED, Outcome, Request, Verb, as_outcome, in_bytes
from cowfence.errors import CowfenceError, NoSpace, WouldBlock
from cowfence.qcow2.allocator import Run
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.reader import Cold, NeedsCommit
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Table
from cowfence.qcow2.write import Writes
from cowfence.storage.base import Buffer


class _New(NamedTuple):
    """A write into clusters that the disk does not have: which request, and the entries that will lead there."""

    number: int
    table: Table
    first: int
    clusters: int


class _Placed(NamedTuple):
    """Writes, each with the clusters reserved for it; and what nothing leads to yet of all these: whether it reads as zeros."""

    writes: list[tuple[_New, list[int]]]
    holes: dict[int, bool]


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
        """Under the lock: carry out those of the requests at ``indices`` that are writes inside one L2 table, and neither wait
        nor need a commit; returns the others."""
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

    def write_long(
        self, requests: Sequence[Request], outcomes: list[Outcome], indices: list[int], may_plan: Callable[[], bool]
    ) -> list[int]:
        """Outside the lock, which is free while the host takes the data: carry out writes in place and into new clusters (of
        those as many as one operation may); returns the indices of the other requests. ``may_plan``, called under the lock:
        whether that is allowed now.

        What was planned holds a ticket. Where the tables that lead to new clusters have changed when the data is there, the
        clusters are given back, and the write is one of the others.
        """
        state = self._state
        with state.lock:
            if not may_plan():
                return indices
            in_place = {index: calls for index in indices if (calls := self._in_place(requests[index]))}
            placed, _ = self._place(requests, [index for index in indices if index not in in_place])
            if not in_place and not placed.writes:
                return indices
            ticket = state.tickets.begin()
        written: list[tuple[_New, list[int]]] = []
        over: list[int] = []

        def enter() -> None:
            try:
                if self._holds(written):
                    self._enter(placed, written, outcomes)
                    for index in over:
                        outcomes[index] = None
            finally:
                self._give_back(placed)
            if state.pending.notes:
                state.pending.publish()

        try:
            over = self._write_over(in_place, outcomes)
            written = self._write_data(placed, requests, outcomes)
        finally:
            state.reclaimer.end_ticket(ticket, enter)
        return [index for index in indices if outcomes[index] is BLOCKED]

    def _in_place(self, request: Request) -> list[tuple[int, Buffer]]:
        """The data calls (host offset, bytes) of a write over clusters that are the disk's alone; none where it is not that."""
        verb, offset, _, data, fua, _ = request
        state, geometry = self._state, self._state.geometry
        if verb is not Verb.WRITE or fua or not 0 <= offset <= state.size - len(data := in_bytes(data)):
            return []
        bits, mask, at, end = geometry.cluster_bits, geometry.cluster_mask, offset, offset + len(data)
        plain_end = state.allocator.never_used << bits
        calls: list[tuple[int, int, int]] = []  # host offset, and the part of the data
        while at < end:
            table = self._tables.get(at >> geometry.l1_shift)
            if table is None:
                return []
            entry = table.entries[at >> bits & geometry.l2_entries - 1]
            host, stop = entry & OFFSET_MASK, min((at | mask) + 1, end)
            if entry & ~OFFSET_MASK != COPIED or host & mask or not 0 < host < plain_end or host >> bits in state.layout.kinds:
                return []
            table.used = True
            start = host | at & mask
            if calls and calls[-1][0] + at - offset - calls[-1][1] == start:
                calls[-1] = *calls[-1][:2], stop - offset
            else:
                calls.append((start, at - offset, stop - offset))
            at = stop
        view = memoryview(data)
        return [(start, view[first:last]) for start, first, last in calls]

    def _write_over(self, in_place: Mapping[int, list[tuple[int, Buffer]]], outcomes: list[Outcome]) -> list[int]:
        """The data calls of writes in place; returns the indices of those that are there."""
        writev = self._state.data.writev
        written = []
        for index, calls in in_place.items():
            try:
                for start, data in calls:
                    writev(start, (data,), "data.write")
            except NoSpace:
                continue  # see _write_data
            except CowfenceError as error:
                outcomes[index] = as_outcome(error)
            else:
                written.append(index)
        return written

    def _holds(self, written: list[tuple[_New, list[int]]]) -> bool:
        """Whether writes can still be entered as they were planned. Under the lock."""
        state, tables, l1_entries = self._state, self._tables, self._state.l1.entries
        if state.committer.broken is not None or state.record is not None:
            return False
        try:
            state.check_room()
            for _, places in written:
                for cluster in places:
                    state.refcounts.load(cluster, 1, wait=False)
        except (Cold, NeedsCommit, CowfenceError):
            return False
        return all(
            tables.get(one.table.index) is one.table
            and l1_entries[one.table.index] & COPIED
            and not any(one.table.entries[one.first : one.first + one.clusters])
            for one, _ in written
        )

    def _into_new_clusters(self, requests: Sequence[Request], outcomes: list[Outcome], indices: list[int]) -> list[int]:
        """The writes that are planned together; returns the other indices."""
        placed, rest = self._place(requests, indices)
        if not placed.writes:
            return rest
        try:
            self._enter(placed, self._write_data(placed, requests, outcomes), outcomes)
        finally:
            self._give_back(placed)
        return rest + [one.number for one, _ in placed.writes if outcomes[one.number] is BLOCKED]

    def _place(self, requests: Sequence[Request], indices: list[int]) -> tuple[_Placed, list[int]]:
        """Reserve clusters for the writes that are meant; returns the indices of the others, too."""
        found, rest = self._find(requests, indices)
        state = self._state
        if not found:
            return _Placed([], {}), rest
        try:
            state.check_room()
            state.allocator.look_ahead(wait=False)
            runs = state.allocator.reserve(sum(one.clusters for one in found), wait=False)
        except (Cold, NeedsCommit, CowfenceError):
            return _Placed([], {}), indices
        holes = {cluster: run.hole for run in runs for cluster in range(run.first, run.first + run.clusters)}
        places, writes, at = list(holes), [], 0
        for one in found:
            writes.append((one, places[at : at + one.clusters]))
            at += one.clusters
        return _Placed(writes, holes), rest

    def _write_data(
        self, placed: _Placed, requests: Sequence[Request], outcomes: list[Outcome]
    ) -> list[tuple[_New, list[int]]]:
        """The data calls; returns the writes that are there. Those for which the host had no space stay without an outcome: a
        commit may free something, see ``Plans.mutate``."""
        writev = self._state.data.writev
        written = []
        for one, places in placed.writes:
            try:
                for start, buffers in self._calls(requests[one.number], places, placed.holes):
                    writev(start, buffers, "data.write")
            except NoSpace:
                continue
            except CowfenceError as error:
                outcomes[one.number] = as_outcome(error)
            else:
                written.append((one, places))
        return written

    def _enter(self, placed: _Placed, written: list[tuple[_New, list[int]]], outcomes: list[Outcome]) -> None:
        """Under the lock: counts and entries of writes whose data is there. Cannot fail."""
        state = self._state
        holes, bits = placed.holes, state.geometry.cluster_bits
        pending, increment = state.pending, state.refcounts.increment
        # A commit that has begun before this does not cover the data.
        state.committer.data_written = True
        for one, places in written:
            # Ctrl-C may leave a count without an entry, never an entry without a count.
            for entry, cluster in enumerate(places, one.first):
                del holes[cluster]
                increment(cluster)
                pending.set(one.table, entry, cluster << bits | COPIED)
            outcomes[one.number] = None

    def _give_back(self, placed: _Placed) -> None:
        """Under the lock: what nothing leads to is free again, and may hold bytes."""
        if placed.holes:
            self._state.allocator.give_back([Run(cluster, 1, hole=False) for cluster in placed.holes])

    def _calls(self, request: Request, places: list[int], holes: Mapping[int, bool]) -> list[tuple[int, tuple[Buffer, ...]]]:
        """The data calls (host offset, buffers) of a write into new clusters: one where they are neighbours, else one for each;
        with zeros for what the write leaves of a cluster, unless that reads as zeros already."""
        geometry, data = self._state.geometry, in_bytes(request.data)
        bits, within = geometry.cluster_bits, request.offset & geometry.cluster_mask
        first, hole, count = places[0], holes[places[0]], len(places)
        if count == 1 or (places == list(range(first, first + count)) and all(holes[place] == hole for place in places)):
            if hole:
                return [(first << bits | within, (data,))]
            left_bytes = (count << bits) - within - len(data)
            return [(first << bits, (bytes(within), data, bytes(left_bytes)))]
        view, calls = memoryview(data), []
        for number, place in enumerate(places):
            start = max((number << bits) - within, 0)
            part = view[start : (number + 1 << bits) - within]
            calls += self._calls(request._replace(offset=request.offset + start, data=part), [place], holes)
        return calls

    def _find(self, requests: Sequence[Request], indices: list[int]) -> tuple[list[_New], list[int]]:
        """The writes that are meant, and the indices of the others."""
        state, tables = self._state, self._tables
        geometry, l1_entries, write = state.geometry, state.l1.entries, Verb.WRITE
        bits, l2_bits, l2_mask = geometry.cluster_bits, geometry.l2_bits, geometry.l2_entries - 1
        size = state.size
        # What the backing file may hold begins in an earlier cluster.
        lowest = -(-state.backing_bytes >> bits)
        left = self._most
        taken: set[int] = set()
        found: list[_New] = []
        rest: list[int] = []
        for index in indices:
            verb, offset, _, data, fua, _ = requests[index]
            if verb is write and not fua and 0 <= offset <= size - len(data := in_bytes(data)) and data:
                cluster, last = offset >> bits, offset + len(data) - 1 >> bits
                table = tables.get(cluster >> l2_bits)
                clusters = last - cluster + 1
                if (
                    table is not None
                    and clusters <= left
                    and cluster >> l2_bits == last >> l2_bits
                    and cluster >= lowest
                    and l1_entries[cluster >> l2_bits] & COPIED
                    and (
                        not table.entries[cluster & l2_mask] and cluster not in taken
                        if clusters == 1
                        else not any(table.entries[cluster & l2_mask : (last & l2_mask) + 1])
                        and taken.isdisjoint(range(cluster, last + 1))
                    )
                ):
                    table.used = True
                    left -= clusters
                    taken.update(range(cluster, last + 1))
                    found.append(_New(index, table, cluster & l2_mask, clusters))
                    continue
            rest.append(index)
        return found, rest
