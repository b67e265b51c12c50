"""Writing compressed clusters: streams of any length, packed one behind the other into host clusters.

A stream is written where the last one ended, and may reach into the next host cluster if that one is its neighbour. Every host
cluster that a stream touches counts one reference for it (specification, "Compressed Clusters Descriptor"). The order is the
write path's: the stream, then counts and entry in the pending transaction (crash contract, R7); what the guest cluster was
before is freed when the new entry is durable.

Into a cluster that holds streams already only bytes behind them are written: those before are the same before and after, also
within the sector that both share. A cluster is packed further only while somebody counts it (R1: by the stored count, pending
decrements not deducted), and never after it came back to the allocator: then it may be anybody's.
"""

from __future__ import annotations

from collections.abc import Callable

from cowfence.codec import compressor
from cowfence.errors import Unsupported
from cowfence.qcow2.entries import Compressed, encode_l2
from cowfence.qcow2.geometry import HostOffset
from cowfence.qcow2.mapping import RunKind, decode
from cowfence.qcow2.reader import NeedsCommit
from cowfence.qcow2.state import State
from cowfence.qcow2.write import LinkHome, Writes, free_entry, grow_l1
from cowfence.units import SECTOR_BYTES


class CompressedWrites:
    """Compressed writes of one image. Every method but ``plan`` is called under the lock."""

    def __init__(self, state: State, writes: Writes) -> None:
        self._state = state
        self._writes = writes
        self._compress = compressor(state.header.compression_type)
        self._next = 0
        """Where the last stream ended; 0: nowhere to go on."""

    def forget(self) -> None:
        """Clusters become available again: the one that is being packed may be among them."""
        self._next = 0

    def plan(self, offset: int, data: memoryview) -> Callable[[bool], int]:
        """Compress a guest cluster, and give the plan that writes it: plainly, where the stream does not pay.

        Raises Unsupported where the data has a file of its own, in which every cluster has its one place, or is encrypted.
        """
        if self._state.cipher is not None:
            raise Unsupported(self._state.storage.name, "compressed clusters in an encrypted image")
        if self._state.geometry.external_data:
            raise Unsupported(self._state.storage.name, "compressed clusters with an external data file")
        stream = self._compress(bytes(data).ljust(self._state.geometry.cluster_bytes, b"\0"))
        if self._fits(stream):
            return lambda wait: self.write(offset, stream, wait=wait)
        return lambda wait: self._writes.write(offset, data, wait=wait)

    def _fits(self, stream: bytes) -> bool:
        """True if an entry can describe the stream, and it saves space at all."""
        geometry = self._state.geometry
        end = self._state.allocator.never_used + 2 << geometry.cluster_bits
        return len(stream) < geometry.cluster_bytes and end <= geometry.compressed_offset_mask

    def write(self, offset: int, stream: bytes, *, wait: bool) -> int:
        """The guest cluster at ``offset`` is what ``stream`` inflates to. Returns the cluster's size; raises as
        ``Writes.write`` does."""
        state = self._state
        geometry = state.geometry
        l1_index = offset >> geometry.l1_shift
        if l1_index >= len(state.l1.entries):
            raise NeedsCommit(lambda: grow_l1(state, wait=True))
        table = state.l2_table(l1_index, wait=wait, cached=True)
        l2_index = offset >> geometry.cluster_bits & geometry.l2_entries - 1
        old = table.entry(l2_index) if table is not None else 0
        kind, _ = decode(state, l1_index, l2_index, old)
        state.check_room()
        home = LinkHome(state, l1_index, table, wait=wait)
        home.plan()
        state.allocator.look_ahead(wait=wait)
        shared = self._shared(wait=wait)
        room = -self._next & geometry.cluster_mask if shared else 0
        fresh = 0 if len(stream) <= room else 1
        reserved = state.allocator.reserve(fresh + home.clusters, wait=wait)
        try:
            clusters = [cluster for run in reserved for cluster in range(run.first, run.first + run.clusters)]
            if home.clusters:
                home.take(clusters[0])
            start, touched = self._place(shared, room, clusters[home.clusters :])
            self._put(start, stream, touched)
        except BaseException:
            state.allocator.give_back(reserved)
            raise
        self._next = start + len(stream)
        mapping = Compressed(HostOffset(start), len(stream))
        state.pending.link(home(), l2_index, encode_l2(mapping, geometry))
        for cluster in touched:
            state.refcounts.increment(cluster)
        if kind is not RunKind.UNALLOCATED:
            free_entry(state, kind, old, discard=False)
        if state.record is not None:
            state.record(offset, min(geometry.cluster_bytes, state.size - offset))
        return geometry.cluster_bytes

    def _shared(self, *, wait: bool) -> int:
        """The host cluster that is packed further; 0 where there is none."""
        state = self._state
        cluster = self._next >> state.geometry.cluster_bits
        if not self._next & state.geometry.cluster_mask or not cluster:
            return 0
        state.refcounts.load(cluster, 1, wait=wait)
        return cluster if 1 <= state.refcounts.count(cluster, wait=wait) < state.geometry.refcount_max else 0

    def _place(self, shared: int, room: int, fresh: list[int]) -> tuple[int, list[int]]:
        """Where the stream begins, and the clusters it touches."""
        if not fresh:
            return self._next, [shared]
        if room and fresh[0] == shared + 1:
            return self._next, [shared, *fresh]
        return fresh[0] << self._state.geometry.cluster_bits, fresh

    def _put(self, start: int, stream: bytes, touched: list[int]) -> None:
        """Write the stream, and zeros up to the end of its last sector, so that the file holds all that an entry describes."""
        state = self._state
        for cluster in touched:
            state.layout.check_data(cluster, 1)
        state.committer.data_written = True
        padding = bytes(-(start + len(stream)) % SECTOR_BYTES)
        state.storage.writev(start, (stream, padding) if padding else (stream,), "data.write")
