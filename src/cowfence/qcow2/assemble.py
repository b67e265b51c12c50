"""Putting an open image together: its tables read, its parts wired to each other, its metadata listed.

What an image is made of is decided here and nowhere else; ``image`` is the face over it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from cowfence.disk.base import Disk
from cowfence.errors import Corrupt, ReadOnly
from cowfence.qcow2.allocator import Allocator
from cowfence.qcow2.cache import TableCache
from cowfence.qcow2.data_file import AbsentDataFile
from cowfence.qcow2.extensions import Autoclear, Incompatible
from cowfence.qcow2.header import Header, check_bounds, check_overlaps, check_supported, read_header
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.reader import MetadataReader
from cowfence.qcow2.reclaim import ClusterReclaimer
from cowfence.qcow2.refcounts import Refcounts
from cowfence.qcow2.snapshot_table import read_snapshots, snapshot_view
from cowfence.qcow2.state import State, Tickets
from cowfence.qcow2.tables import Kind, Table
from cowfence.qcow2.transaction import Committer, Pending
from cowfence.storage.base import Storage, read_exact
from cowfence.units import KIB, MIB

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import DataCipher, Secrets


class CacheMode(Enum):
    """When a write is durable. WRITEBACK: at the next flush. WRITETHROUGH: when it returns. UNSAFE: flushes do nothing."""

    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    UNSAFE = "unsafe"


@dataclass(frozen=True, slots=True)
class Options:
    """How an image is opened. Sizes in bytes, times in seconds.

    ``cache_bytes`` bounds the L2 tables in memory (refcount blocks: a quarter more). ``commit_interval``: an idle guest's
    writes are committed after so long (None: never on their own). ``discards``: host space of what the guest discarded is
    given back. ``quarantine_bytes``: freed space that may wait for a commit before one is made for it. ``long_write_bytes``: of
    data in one batch, from which on others are not kept waiting while the host takes it.
    """

    cache_bytes: int = 32 * MIB
    mode: CacheMode = CacheMode.WRITEBACK
    commit_interval: float | None = 5.0
    discards: bool = True
    quarantine_bytes: int = 256 * MIB
    long_write_bytes: int = 256 * KIB


_PIECE_CLUSTERS = 16384
_TABLES_WORDS = 64
"""Of the journal: what is noted for the tables around a piece."""


def usable_header(storage: Storage, *, writable: bool, snapshot: str | None = None) -> Header:
    """The header of an image that can be used as it is, or, where it was left dirty and is opened for writing, once its counts
    are rebuilt. ``snapshot``: as seen from this internal snapshot. Raises as ``image.open_image`` does."""
    header = read_header(storage)
    check_supported(header, storage.name)
    if snapshot is not None:
        header = snapshot_view(storage, header, snapshot)
    check_bounds(header, storage.size(), storage.name)
    if writable:
        if header.incompatible & Incompatible.CORRUPT:
            raise ReadOnly(f"{storage.name}: the image is marked corrupt; repair it with 'check -r all' or open it read-only")
        check_overlaps(header, storage.name)
        if header.incompatible & Incompatible.DIRTY:
            from cowfence.qcow2.repair import rebuild_dirty  # It needs numpy, and few images are dirty.

            rebuild_dirty(storage)
            header = read_header(storage)
    return header


def assemble(
    storage: Storage,
    header: Header,
    backing: Disk | None,
    options: Options,
    journal: Journal | None = None,
    data: Storage | None = None,
    secrets: Secrets | None = None,
) -> State:
    """The state of the image in ``storage``; ``data``: its external data file, if it has one; ``secrets``: if it
    is encrypted.

    Reads the L1 and the refcount table; raises Corrupt where the file lacks them.
    """
    geometry = header.geometry
    if not geometry.external_data:
        data = None
    elif data is None:
        data = AbsentDataFile(storage.name)
    lock = threading.Lock()
    layout = Layout(storage.name, header.cluster_bits)
    pending = Pending(journal=journal)
    if journal is not None:
        # For each cluster: the words of its entry, its count, what is freed; two words for each.
        noted = 2 * (geometry.l2_entry_words + 2)
        journal.expect(noted * min(geometry.l2_entries, _PIECE_CLUSTERS) + _TABLES_WORDS)
    reader = MetadataReader(storage)
    tables = max(1, options.cache_bytes >> header.cluster_bits)
    reclaimer = ClusterReclaimer()
    unsafe = options.mode is CacheMode.UNSAFE
    committer = Committer(storage, layout, lock, pending, reclaimer, data=data, unsafe=unsafe)
    l1, refcounts, allocator = _read_tables(storage, header, reader, layout, pending, max(1, tables // 4))
    state = State(
        storage=storage,
        data=data or storage,
        cipher=_cipher(storage, header, secrets),
        header=header,
        geometry=geometry,
        lock=lock,
        reader=reader,
        layout=layout,
        pending=pending,
        l1=l1,
        l2=TableCache(tables),
        refcounts=refcounts,
        allocator=allocator,
        committer=committer,
        reclaimer=reclaimer,
        backing=backing,
        backing_bytes=_backing_bytes(backing, header),
        size=header.size_bytes,
        raw_data=bool(header.autoclear & Autoclear.DATA_FILE_RAW),
        discards=options.discards and (data or storage).capabilities().punches_holes,
        quarantine_limit=max(16, options.quarantine_bytes >> header.cluster_bits),
        piece_bytes=_PIECE_CLUSTERS << header.cluster_bits,
        tickets=Tickets(lock),
    )
    reclaimer.state = state
    return state


def _cipher(storage: Storage, header: Header, secrets: Secrets | None) -> DataCipher | None:
    if not header.crypt_method:
        return None
    from cowfence.qcow2.encryption import data_cipher  # It needs numpy and a library, and few images are encrypted.

    return data_cipher(storage, header, secrets)


def reassemble(state: State) -> None:
    """Read everything again from the file, under the lock, with nothing pending that has to be kept and nobody working outside.

    Raises what opening the image would raise.
    """
    # All that it can be is counts that RECLAIM could not write, in tables that are about to be replaced: they leak.
    state.pending.drop()
    header = read_header(state.storage)
    check_supported(header, state.storage.name)
    check_bounds(header, state.storage.size(), state.storage.name)
    state.header, state.geometry, state.size = header, header.geometry, header.size_bytes
    state.raw_data = bool(header.autoclear & Autoclear.DATA_FILE_RAW)
    state.backing_bytes = _backing_bytes(state.backing, header)
    state.l2.tables.clear()
    state.layout.kinds.clear()
    state.reclaimer.start_anew()
    state.l1, state.refcounts, state.allocator = _read_tables(
        state.storage, header, state.reader, state.layout, state.pending, state.refcounts.blocks.limit
    )
    claim_all(state)


def _read_tables(
    storage: Storage, header: Header, reader: MetadataReader, layout: Layout, pending: Pending, blocks: int
) -> tuple[Table, Refcounts, Allocator]:
    """The L1 table, and the refcount table with what stands on it. ``blocks``: refcount blocks in memory at most."""
    geometry = header.geometry
    l1 = _load(storage, Kind.L1, header.l1_offset, header.l1_entries * 8)
    refcount_table = _load(
        storage, Kind.REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * geometry.cluster_bytes
    )
    refcounts = Refcounts(reader, geometry, refcount_table, pending, blocks)
    return l1, refcounts, Allocator(storage, refcounts, layout, geometry, pending)


def _backing_bytes(backing: Disk | None, header: Header) -> int:
    return min(backing.size, header.size_bytes) if backing is not None else 0


def _load(storage: Storage, kind: Kind, offset: int, length_bytes: int) -> Table:
    return Table.from_bytes(kind, 0, offset, read_exact(storage, offset, length_bytes, kind.value))


def claim_all(state: State) -> None:
    """List every cluster of metadata. Raises Corrupt where two structures share one, or one reaches past the file's end."""
    header, geometry = state.header, state.geometry
    claim = _Claims(state)
    claim(0, 1, Kind.HEADER)
    claim(header.refcount_table_offset, header.refcount_table_clusters, Kind.REFCOUNT_TABLE)
    if header.l1_entries:
        claim(header.l1_offset, geometry.clusters_for(header.l1_entries * 8), Kind.L1)
    for index, entry in enumerate(state.refcounts.table.entries):
        if entry:
            offset = state.refcounts.block_offset(index)
            assert offset is not None
            claim(offset, 1, Kind.REFCOUNT_BLOCK)
    for index, entry in enumerate(state.l1.entries):
        if entry:
            l2_offset = state.l2_offset(index)
            if l2_offset is not None:
                claim(l2_offset, 1, Kind.L2)
    if header.snapshot_count:
        snapshots = read_snapshots(state.storage, header)
        length_bytes = sum(len(snapshot.stored) + 7 & ~7 for snapshot in snapshots)
        claim(header.snapshots_offset, geometry.clusters_for(length_bytes), Kind.SNAPSHOT_TABLE)
        for snapshot in snapshots:
            if snapshot.l1_entries:
                claim(snapshot.l1_offset, geometry.clusters_for(snapshot.l1_entries * 8), Kind.SNAPSHOT_L1)
    if header.encryption is not None:
        claim(header.encryption.offset, geometry.clusters_for(header.encryption.length_bytes), Kind.ENCRYPTION)
    bitmaps = header.bitmaps
    if bitmaps is not None and header.autoclear & Autoclear.BITMAPS:
        claim(bitmaps.directory_offset, geometry.clusters_for(bitmaps.directory_bytes), Kind.BITMAPS)


class _Claims:
    """Claims of the layout, held against the file: what it does not have costs no memory, however much is claimed."""

    def __init__(self, state: State) -> None:
        self._layout = state.layout
        self._name = state.storage.name
        self._bits = state.geometry.cluster_bits
        self._file_clusters = state.geometry.clusters_for(state.storage.size())

    def __call__(self, offset: int, clusters: int, kind: Kind) -> None:
        if (offset >> self._bits) + clusters > self._file_clusters:
            raise Corrupt(f"{self._name}: {kind.value} at offset {offset:#x}", "it reaches past the end of the file")
        self._layout.claim_new(offset, clusters, kind)
