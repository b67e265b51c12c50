"""Refcounts: how many references each host cluster has, over the refcount table and a cache of its blocks.

What a block holds in memory is the *stored* count: what is on disk, plus the increments of transactions on their way. The
decrements of a pending transaction are not in it (they are a list beside it, ``Pending.freed``) until LINK is durable; so a
count read here is never lower than the references that a crash could bring back, and it is the count by which a write decides
whether it may go in place (crash contract, R1).
"""

from __future__ import annotations

from cowfence.errors import Corrupt
from cowfence.qcow2.cache import TableCache
from cowfence.qcow2.entries import BadEntry, decode_refcount_table_entry
from cowfence.qcow2.geometry import Geometry
from cowfence.qcow2.reader import MetadataReader
from cowfence.qcow2.tables import RefcountBlock, Table
from cowfence.qcow2.transaction import Pending


class Refcounts:
    """Stored counts by host cluster number."""

    def __init__(self, reader: MetadataReader, geometry: Geometry, table: Table, pending: Pending, cache_limit: int) -> None:
        self._reader = reader
        self._geometry = geometry
        self._pending = pending
        self.table = table
        """The refcount table; growth puts a new one here."""
        self.blocks: TableCache[RefcountBlock] = TableCache(cache_limit)
        self._shift = geometry.refcount_block_shift - geometry.cluster_bits
        self._mask = geometry.refcounts_per_block - 1

    def block_of(self, cluster: int, *, wait: bool) -> RefcountBlock | None:
        """The block that counts ``cluster``; None where there is none, so that all its counts are 0."""
        return self.block(cluster >> self._shift, wait=wait)

    def block(self, index: int, *, wait: bool) -> RefcountBlock | None:
        """The block at ``index`` of the refcount table. Raises Corrupt, or Cold where ``wait`` is false."""
        block = self.blocks.get(index)
        if block is not None:
            return block
        offset = self.block_offset(index)
        if offset is None:
            return None
        data = self._reader.read(offset, self._geometry.cluster_bytes, "refcount block", wait=wait)
        # Nothing is dropped for it: the operation that is planned may need every block that it loaded. The cache goes back to
        # its limit before the next operation (``State.check_room``).
        block = RefcountBlock(index, offset, self._geometry.refcount_bits, data)
        self.blocks.put(block)
        return block

    def block_offset(self, index: int) -> int | None:
        """Where the block at ``index`` stands, None where there is none. Raises Corrupt for a bad entry."""
        if index >= len(self.table.entries):
            return None
        try:
            return decode_refcount_table_entry(self.table.entries[index], self._geometry)
        except BadEntry as bad:
            raise Corrupt(f"{self._reader.name}: refcount table[{index}]", str(bad)) from None

    def count(self, cluster: int, *, wait: bool) -> int:
        """The stored count of ``cluster``."""
        block = self.block_of(cluster, wait=wait)
        return 0 if block is None else block.get(cluster & self._mask)

    def load(self, first: int, count: int, *, wait: bool) -> None:
        """Have the blocks of a run of clusters in memory, so that ``increment`` cannot fail. Raises Corrupt."""
        for index in range(first >> self._shift, (first + count - 1 >> self._shift) + 1):
            if self.block(index, wait=wait) is None:
                raise Corrupt(f"{self._reader.name}: refcount table[{index}]", "its block is missing")

    def increment(self, first: int, count: int = 1) -> None:
        """Each cluster of a run (whose blocks are loaded) has one reference more."""
        for cluster in range(first, first + count):
            block = self.blocks.tables[cluster >> self._shift]
            at = cluster & self._mask
            self._pending.set(block, at, block.get(at) + 1)
