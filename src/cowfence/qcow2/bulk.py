"""Filling a new image in one go: data first, tables last.

Nobody can open the file yet (see ``cowfence.storage.publish``), so nothing has an order and nothing is a transaction:
clusters are handed out from the start of the file on, the mapping stays in memory, and the tables and the header are written
when all data is. What is in memory is 8 bytes for each guest cluster that has data, and 4 for each host cluster.

A pipe wants its tables before the data. So the same data is placed twice: in a first pass that writes nothing
(``storage.pipe.Nowhere``), and in a second one behind the head that the first one's places make (``write_head``).

Thread-safe: places are handed out under a lock, and whoever got one writes there by himself.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cowfence.errors import Invalid, NoSpace
from cowfence.qcow2.create import NewImage, encoded_header, geometry_of, header_of, refcount_shape
from cowfence.qcow2.entries import ALL_SUBCLUSTERS, BITMAP_SHIFT, COMPRESSED, COPIED, WORD_MASK, Compressed, encode_l2, zeroed
from cowfence.qcow2.geometry import MAX_L1_BYTES, HostOffset
from cowfence.qcow2.tables import Table, counts_bytes
from cowfence.storage.base import Buffer


class Target(Protocol):
    """What a new image is written into: the part of ``storage.Storage`` that it takes."""

    @property
    def name(self) -> str: ...

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None: ...

    def truncate(self, size_bytes: int, mark: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the tables stand, as clusters, one kind behind the other, each behind what leads to it, so that who reads them once
    knows what comes; ``end``: the cluster behind them."""

    l1: int
    refcount_table: int
    refcount_blocks: int
    l2: int
    end: int


class BulkImage:
    """A new image in the making, in an empty file."""

    def __init__(self, storage: Target, wanted: NewImage, *, head: BulkImage | None = None) -> None:
        """``head``: the first pass over the same data, whose ``write_head`` has been called. Raises Invalid for options that
        make no image."""
        self.geometry = geometry_of(wanted)
        self._storage = storage
        self._wanted = wanted
        self._luks_clusters = self.geometry.clusters_for(len(wanted.luks_area or b""))
        self._guard = threading.Lock()
        self._l2: dict[int, NDArray[np.uint64]] = {}
        in_front = 1 + self._luks_clusters if head is None else head._places(1 + self._luks_clusters).end
        self._counts = array("I", [1] * in_front)
        """References of each host cluster; the first is the header, a LUKS header comes next."""
        self._in_front = in_front
        self._next = 0
        """Where the last stream ended; 0: in no cluster that has room."""
        self._all_from: int | None = None
        """The host cluster of the first guest cluster, where each has a place from the beginning."""
        self.check_size(wanted.size_bytes)
        if wanted.preallocate_metadata:
            self._place_all()

    @property
    def end_bytes(self) -> int:
        """Where the data ends, in whole clusters."""
        return len(self._counts) << self.geometry.cluster_bits

    def check_size(self, size_bytes: int) -> None:
        """Raises Invalid for a disk that is too large for the clusters."""
        if self.geometry.l1_entries_for(size_bytes) * 8 > MAX_L1_BYTES:
            cluster_bytes = self.geometry.cluster_bytes
            raise Invalid(f"an image of {size_bytes} bytes is too large for clusters of {cluster_bytes} bytes")

    def _place_all(self) -> None:
        """Every guest cluster gets its place now. What is enciphered does not read as zeros by itself."""
        count = self.geometry.clusters_for(self._wanted.size_bytes)
        first = self.place_data(0, count) >> self.geometry.cluster_bits
        self._all_from = first
        if self._wanted.luks_area is not None:
            entry = zeroed(0, self.geometry)
            words = np.arange(first, first + count, dtype=np.uint64) << np.uint64(self.geometry.cluster_bits)
            self._map(0, words | np.uint64(COPIED | entry & WORD_MASK), entry >> BITMAP_SHIFT)

    def place_data(self, guest_cluster: int, count: int) -> int:
        """Host offset for ``count`` guest clusters, one behind the other: in the external data file, if there is one."""
        with self._guard:
            if self.geometry.external_data:
                first = guest_cluster
            elif self._all_from is not None:
                first = self._all_from + guest_cluster
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

    def finish(self, size_bytes: int | None = None) -> None:
        """Write the tables behind the data, and the header, and give the file its length. ``size_bytes``: the disk's, where it
        was not known before. Raises Invalid where that is too large."""
        if size_bytes is not None:
            self.check_size(size_bytes)
            self._wanted = replace(self._wanted, size_bytes=size_bytes)
        places = self._places(len(self._counts))
        counts = np.ones(places.end, np.uint64)
        counts[: len(self._counts)] = np.frombuffer(self._counts, np.uint32)
        self._write_tables(self._storage, places, self._l2, counts)
        self._storage.truncate(places.end << self.geometry.cluster_bits, "create.size")

    def write_head(self, storage: Target) -> None:
        """Write what stands in front of the data in a second pass. Raises NoSpace where streams would move past what an entry
        can tell."""
        places = self._places(self._in_front)
        moved = places.end - self._in_front
        if self._next and len(self._counts) + moved << self.geometry.cluster_bits > self.geometry.compressed_offset_mask:
            raise NoSpace(f"{storage.name}: compressed data would stand past what an entry can tell")
        counts = np.ones(len(self._counts) + moved, np.uint64)
        counts[places.end :] = np.frombuffer(self._counts, np.uint32)[self._in_front :]
        self._write_tables(storage, places, {index: self._moved(table, moved) for index, table in self._l2.items()}, counts)

    def _moved(self, table: NDArray[np.uint64], clusters: int) -> NDArray[np.uint64]:
        """An L2 table whose data stands so many clusters further on."""
        if self.geometry.external_data:
            return table
        found = table.copy()
        words = found[:: self.geometry.l2_entry_words]
        # An entry without COPIED or the compressed flag leads nowhere.
        words[(words & np.uint64(COPIED | COMPRESSED)) != 0] += np.uint64(clusters << self.geometry.cluster_bits)
        return found

    def continues(self, head: BulkImage) -> bool:
        """True if this second pass has placed what the first one had."""
        moved = self._in_front - head._in_front
        return self._l2.keys() == head._l2.keys() and all(
            np.array_equal(self._moved(table, moved), self._l2[index]) for index, table in head._l2.items()
        )

    def _places(self, first: int) -> _Places:
        """The tables from host cluster ``first`` on."""
        geometry = self.geometry
        l1_clusters = geometry.clusters_for(geometry.l1_entries_for(self._wanted.size_bytes) * 8)
        table_clusters, blocks = refcount_shape(geometry, len(self._counts) + len(self._l2) + l1_clusters)
        table = first + l1_clusters
        l2 = table + table_clusters + blocks
        return _Places(first, table, table + table_clusters, l2, l2 + len(self._l2))

    def _write_tables(
        self, storage: Target, places: _Places, l2: dict[int, NDArray[np.uint64]], counts: NDArray[np.uint64]
    ) -> None:
        """The header and all tables, in the order of their places where these are in front. ``counts``: of the file."""
        geometry = self.geometry
        bits, cluster_bytes = geometry.cluster_bits, geometry.cluster_bytes
        l1_clusters = places.refcount_table - places.l1
        table_clusters = places.refcount_blocks - places.refcount_table
        header = header_of(
            self._wanted,
            geometry,
            table_clusters,
            geometry.l1_entries_for(self._wanted.size_bytes),
            HostOffset(places.l1 << bits),
            luks_offset=cluster_bytes,
        )
        header = replace(header, refcount_table_offset=HostOffset(places.refcount_table << bits))
        storage.writev(0, (encoded_header(header),), "create.header")
        if self._wanted.luks_area is not None:
            storage.writev(cluster_bytes, (self._wanted.luks_area,), "create.luks")
        l1 = Table.empty_table(l1_clusters * cluster_bytes)
        for number, index in enumerate(sorted(l2)):
            l1.entries[index] = places.l2 + number << bits | COPIED
        if l1_clusters:
            storage.writev(places.l1 << bits, (l1.content(),), "create.l1")
        per_block = geometry.refcounts_per_block
        table = Table.empty_table(table_clusters * cluster_bytes)
        blocks = range(places.refcount_blocks, places.l2)
        for index, cluster in enumerate(blocks):
            table.entries[index] = cluster << bits
        storage.writev(places.refcount_table << bits, (table.content(),), "create.refcounts")
        for index, cluster in enumerate(blocks):
            part = np.zeros(per_block, np.uint64)
            counted = counts[index * per_block : (index + 1) * per_block]
            part[: len(counted)] = counted
            storage.writev(cluster << bits, (counts_bytes(part, geometry.refcount_bits),), "create.refcounts")
        for number, index in enumerate(sorted(l2)):
            storage.writev(places.l2 + number << bits, (l2[index].astype(">u8").tobytes(),), "create.l2")
