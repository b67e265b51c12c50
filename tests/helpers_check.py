"""Small images for tests of checking and repair, and a scalpel to damage them: one word, one count at a time."""

from __future__ import annotations

import struct

from cowfence.errors import CowfenceError
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.header import Header, read_header
from cowfence.qcow2.image import Options, open_image
from cowfence.qcow2.tables import RefcountBlock
from cowfence.storage.memory import MemoryStorage

DISK_BYTES = 64 * 1024
QUIET = Options(commit_interval=None)


def new_image(
    *, cluster_bytes: int = 512, refcount_bits: int = 16, version: int = 3, size_bytes: int = DISK_BYTES, writes: int = 12
) -> bytes:
    """An image with ``writes`` clusters written, every second one of the disk."""
    storage = MemoryStorage(writable=True)
    write_new(storage, NewImage(size_bytes, cluster_bytes=cluster_bytes, refcount_bits=refcount_bits, version=version))
    with open_image(storage, backing=None, writable=True, options=QUIET) as disk:
        for number in range(writes):
            disk.write(2 * number * cluster_bytes, bytes([number + 1]) * cluster_bytes)
    return storage.snapshot()


class Scalpel:
    """An image's bytes under the knife. Clusters are numbers, indices are those of the tables."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @property
    def header(self) -> Header:
        return read_header(MemoryStorage(bytes(self.data)))

    def word(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 8])

    def put(self, offset: int, word: int) -> None:
        self.data[offset : offset + 8] = word.to_bytes(8)

    def l1_at(self, index: int) -> int:
        return int(self.header.l1_offset) + 8 * index

    def l2_at(self, l1_index: int, l2_index: int) -> int:
        return (self.word(self.l1_at(l1_index)) & OFFSET_MASK) + self.header.geometry.l2_entry_bytes * l2_index

    def table_at(self, index: int) -> int:
        return int(self.header.refcount_table_offset) + 8 * index

    def cluster_of(self, entry_at: int) -> int:
        return (self.word(entry_at) & OFFSET_MASK) >> self.header.cluster_bits

    def count(self, cluster: int) -> int:
        return self._block(cluster)[0].get(cluster % self.header.geometry.refcounts_per_block)

    def set_count(self, cluster: int, count: int) -> None:
        block, offset = self._block(cluster)
        block.set(cluster % self.header.geometry.refcounts_per_block, count)
        content = block.content()
        self.data[offset : offset + len(content)] = content

    def _block(self, cluster: int) -> tuple[RefcountBlock, int]:
        geometry = self.header.geometry
        index = cluster // geometry.refcounts_per_block
        offset = self.word(self.table_at(index))
        return RefcountBlock(index, offset, geometry.refcount_bits, self.data[offset : offset + geometry.cluster_bytes]), offset

    def set_features(self, incompatible: int) -> None:
        self.put(72, incompatible)

    def append(self, clusters: int) -> int:
        """New clusters at the end of the file, each with one reference stored; the first of them."""
        cluster_bytes = self.header.cluster_bytes
        first = -(-len(self.data) // cluster_bytes)
        self.data += bytes((first + clusters) * cluster_bytes - len(self.data))
        for cluster in range(first, first + clusters):
            self.set_count(cluster, 1)
        return first

    def add_snapshot(self) -> int:
        """A snapshot of the whole disk, as the specification has it; the cluster of its L1 table."""
        header = self.header
        assert header.snapshot_count == 0
        bits, geometry = header.cluster_bits, header.geometry
        for index in range(header.l1_entries):
            if not self.word(self.l1_at(index)):
                continue
            for l2_index in range(geometry.l2_entries):
                at = self.l2_at(index, l2_index)
                if self.word(at) & OFFSET_MASK:
                    self.set_count(self.cluster_of(at), self.count(self.cluster_of(at)) + 1)
                    self.put(at, self.word(at) & ~COPIED)
            self.set_count(self.cluster_of(self.l1_at(index)), 2)
            self.put(self.l1_at(index), self.word(self.l1_at(index)) & ~COPIED)
        l1_clusters = geometry.clusters_for(header.l1_entries * 8)
        l1, table = self.append(l1_clusters), self.append(1)
        start = int(header.l1_offset)
        self.data[l1 << bits : (l1 << bits) + header.l1_entries * 8] = self.data[start : start + header.l1_entries * 8]
        entry = struct.pack(">QIHHIIQII", l1 << bits, header.l1_entries, 1, 4, 0, 0, 0, 0, 16)
        entry += struct.pack(">QQ", 0, header.size_bytes) + b"1" + b"snap"
        self.data[table << bits : (table << bits) + len(entry)] = entry
        self.data[60:72] = struct.pack(">IQ", 1, table << bits)
        return l1

    def storage(self, *, writable: bool = False) -> MemoryStorage:
        return MemoryStorage(bytes(self.data), writable=writable)


def guest_clusters(data: bytes, *, most: int | None = None) -> list[bytes | None]:
    """What the guest reads, cluster by cluster (the first ``most``); None where the image does not let it."""
    found: list[bytes | None] = []
    with open_image(MemoryStorage(data, writable=False), backing=None, writable=False, options=QUIET) as disk:
        for offset in range(0, disk.size, disk.block_bytes)[:most]:
            try:
                found.append(disk.read(offset, min(disk.block_bytes, disk.size - offset)))
            except CowfenceError:
                found.append(None)
    return found
