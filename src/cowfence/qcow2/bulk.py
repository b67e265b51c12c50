"""Filling a new image in one go: data first, tables last.

Nobody can open the file yet (see ``cowfence.storage.publish``), so nothing has an order and nothing is a transaction:
clusters are handed out from the start of the file on, the mapping stays in memory, and the tables and the header are written
when all data is. What is in memory is 8 bytes for each guest cluster that has data, and 4 for each host cluster.

Thread-safe: places are handed out under a lock, and whoever got one writes there by himself.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cowfence.errors import Invalid, NoSpace
from cowfence.qcow2.create import NewImage, geometry_of, header_of, refcount_shape
from cowfence.qcow2.entries import ALL_SUBCLUSTERS, BITMAP_SHIFT, COPIED, WORD_MASK, Compressed, encode_l2, zeroed
from cowfence.qcow2.geometry import MAX_L1_BYTES, HostOffset
from cowfence.qcow2.header import encode
from cowfence.qcow2.tables import Table, counts_bytes
from cowfence.storage.base import Storage


class BulkImage:
    """A new image in the making, in an empty file."""

    def __init__(self, storage: Storage, wanted: NewImage) -> None:
        """Raises Invalid for options that make no image."""
        self.geometry = geometry_of(wanted)
        self._storage = storage
        self._wanted = wanted
        self._l1_entries = self.geometry.l1_entries_for(wanted.size_bytes)
        if self._l1_entries * 8 > MAX_L1_BYTES:
            cluster_bytes = self.geometry.cluster_bytes
            raise Invalid(f"an image of {wanted.size_bytes} bytes is too large for clusters of {cluster_bytes} bytes")
        self._luks_clusters = self.geometry.clusters_for(len(wanted.luks_area or b""))
        self._guard = threading.Lock()
        self._l2: dict[int, NDArray[np.uint64]] = {}
        self._counts = array("I", [1] * (1 + self._luks_clusters))
        """References of each host cluster; the first is the header, a LUKS header comes next."""
        self._next = 0
        """Where the last stream ended; 0: in no cluster that has room."""
        if wanted.data_file_raw:
            # What can be read by itself is allocated as a whole.
            self.place_data(0, self.geometry.clusters_for(wanted.size_bytes))

    def place_data(self, guest_cluster: int, count: int) -> int:
        """Host offset for ``count`` guest clusters, one behind the other: in the external data file, if there is one."""
        with self._guard:
            if self.geometry.external_data:
                first = guest_cluster
            else:
                first = len(self._counts)
                self._counts.extend([1] * count)
            words = np.arange(first, first + count, dtype=np.uint64) << np.uint64(self.geometry.cluster_bits)
            self._map(guest_cluster, words | np.uint64(COPIED), ALL_SUBCLUSTERS)
        return first << self.geometry.cluster_bits

    def place_zeros(self, guest_cluster: int, count: int) -> None:
        """Guest clusters that read as zeros over whatever a backing file has there."""
        entry = zeroed(0, self.geometry)
        with self._guard:
            self._map(guest_cluster, np.full(count, entry & WORD_MASK, np.uint64), entry >> BITMAP_SHIFT)

    def place_streams(self, guest_clusters: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Host offsets for the streams of some guest clusters, packed one behind the other."""
        geometry = self.geometry
        bits, mask = geometry.cluster_bits, geometry.cluster_mask
        places = []
        with self._guard:
            for guest_cluster, length_bytes in zip(guest_clusters, lengths, strict=True):
                start = self._next
                # A stream goes on where the last one ended, if what is left of the cluster is the end of the file.
                packable = start & mask and start >> bits == len(self._counts) - 1
                if not packable or self._counts[start >> bits] >= geometry.refcount_max:
                    start = len(self._counts) << bits
                end = start + length_bytes
                if end > geometry.compressed_offset_mask:
                    raise NoSpace(f"{self._storage.name}: compressed data would stand past what an entry can tell")
                for cluster in range(start >> bits, (end - 1 >> bits) + 1):
                    if cluster == len(self._counts):
                        self._counts.append(0)
                    self._counts[cluster] += 1
                entry = encode_l2(Compressed(HostOffset(start), length_bytes), geometry)
                self._map(guest_cluster, np.array([entry], np.uint64), 0)
                self._next = end
                places.append(start)
        return places

    def _map(self, guest_cluster: int, words: NDArray[np.uint64], bitmap: int) -> None:
        """Enter words of neighbouring guest clusters. ``bitmap``: of each, where entries are extended."""
        entries, step = self.geometry.l2_entries, self.geometry.l2_entry_words
        at = 0
        while at < len(words):
            l1_index, first = divmod(guest_cluster + at, entries)
            count = min(entries - first, len(words) - at)
            table = self._l2.get(l1_index)
            if table is None:
                table = self._l2[l1_index] = np.zeros(entries * step, np.uint64)
            part = table[first * step : (first + count) * step]
            part[::step] = words[at : at + count]
            if step == 2:
                part[1::2] = bitmap
            at += count

    def finish(self) -> None:
        """Write the tables and the header, and give the file its length."""
        geometry, storage = self.geometry, self._storage
        bits, cluster_bytes = geometry.cluster_bits, geometry.cluster_bytes
        l1_clusters = geometry.clusters_for(self._l1_entries * 8)
        used = len(self._counts) + len(self._l2) + l1_clusters
        table_clusters, blocks = refcount_shape(geometry, used)
        self._counts.extend([1] * (len(self._l2) + l1_clusters + table_clusters + blocks))
        total = len(self._counts)
        l2_at = used - l1_clusters - len(self._l2)
        l1_at, table_at = used - l1_clusters, used
        storage.truncate(total << bits, "create.size")
        l1 = Table.empty_table(l1_clusters * cluster_bytes)
        for number, index in enumerate(sorted(self._l2)):
            offset = l2_at + number << bits
            l1.entries[index] = offset | COPIED
            storage.writev(offset, (self._l2[index].astype(">u8").tobytes(),), "create.l2")
        if l1_clusters:
            storage.writev(l1_at << bits, (l1.content(),), "create.l1")
        table = Table.empty_table(table_clusters * cluster_bytes)
        counts = np.zeros(blocks * geometry.refcounts_per_block, np.uint64)
        counts[:total] = np.frombuffer(self._counts, np.uint32)
        for index in range(blocks):
            offset = table_at + table_clusters + index << bits
            table.entries[index] = offset
            part = counts[index * geometry.refcounts_per_block : (index + 1) * geometry.refcounts_per_block]
            storage.writev(offset, (counts_bytes(part, geometry.refcount_bits),), "create.refcounts")
        storage.writev(table_at << bits, (table.content(),), "create.refcounts")
        l1_offset = HostOffset(l1_at << bits)
        header = header_of(self._wanted, geometry, table_clusters, self._l1_entries, l1_offset, luks_offset=cluster_bytes)
        if self._wanted.luks_area is not None:
            storage.writev(cluster_bytes, (self._wanted.luks_area,), "create.luks")
        header = replace(header, refcount_table_offset=HostOffset(table_at << bits))
        if not l1_clusters:
            header = replace(header, l1_offset=HostOffset(l1_at << bits))
        storage.writev(0, (encode(header),), "create.header")
