"""Verify an image: count every reference to every host cluster, and hold the counts against what is stored.

A pure reader. It takes what it can from a damaged image: a bad entry is a finding, and what lies behind it is skipped
(``Report.complete`` then says that references may be hidden, so that nobody frees what they lead to). Only a header that
cannot be read, a feature that is unknown, and a failing host raise.

The order: the structures (header, tables, snapshots, bitmaps), each a run of clusters with one reference; the refcount blocks,
into one array; the L2 tables (``verify_l2``); then stored counts against references, and structures that share a cluster.

Memory is 4 bytes or so for each cluster that the file has, never for what the file claims to refer to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from cowfence.errors import Corrupt, Unsupported
from cowfence.qcow2.bitmap_directory import read_bitmap_directory
from cowfence.qcow2.census import LITTLE_ENDIAN, Census, Claims, Clusters, ImageFile, Words
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.extensions import Autoclear, Incompatible
from cowfence.qcow2.findings import Finding, Grade, Problem, Report
from cowfence.qcow2.geometry import OFFSET_MASK, TABLE_ENTRY_BYTES, Geometry
from cowfence.qcow2.header import Header, read_header
from cowfence.qcow2.snapshot_table import Snapshot, read_snapshots
from cowfence.qcow2.tables import Kind, counts_view
from cowfence.qcow2.verify_l2 import L2Judge, L2Tables
from cowfence.storage.base import Storage, read_padded
from cowfence.units import KIB, align_up

Progress = Callable[[float], None]
"""Told the fraction that is done, 0 to 1."""

_COMPARE_CLUSTERS: Final = 64 * KIB
_TABLE_PIECE_ENTRIES: Final = 32 * KIB
_MAX_CLUSTERS: Final = (1 << 31) - 1
"""QEMU's limit for a check."""
_L1_RESERVED: Final = ((1 << 63) - 1) & ~OFFSET_MASK
_REFCOUNT_TABLE_RESERVED: Final = 0x1FF
_BITMAP_RESERVED: Final = ((1 << 64) - 1) & ~OFFSET_MASK & ~1
_MIN_EXTRA_BYTES_V3: Final = 16


def verify(storage: Storage, header: Header | None = None, *, progress: Progress | None = None) -> Report:
    """Check the image in ``storage``; never writes. ``header``: as read before, to save a second reading.

    Raises NotThisFormat, Unsupported and Corrupt for a header that cannot be read, and the storage's errors.
    """
    return survey(storage, header, progress=progress).report


@dataclass(frozen=True, slots=True)
class Survey:
    """A report with what it rests on, for who repairs.

    ``active_l1``: index and word of each entry of the active L1 that is not 0. ``claims``: the structures that are runs of
    clusters, by name. ``refcount_table``: its first cluster, and the one behind its last. ``blocks``: index in the refcount
    table and host cluster of each refcount block that can be read. ``shared``: clusters on which a structure lies together
    with something else.
    """

    storage: Storage
    header: Header
    report: Report
    census: Census
    judge: L2Judge
    active_l1: tuple[Clusters, Words]
    claims: Claims
    refcount_table: tuple[int, int]
    blocks: tuple[Clusters, Clusters]
    shared: frozenset[int]

    @property
    def geometry(self) -> Geometry:
        return self.census.geometry


def survey(storage: Storage, header: Header | None = None, *, progress: Progress | None = None) -> Survey:
    """``verify``, with all that it counted."""
    if header is None:
        header = read_header(storage)
    unknown = header.unknown_incompatible()
    if unknown:
        raise Unsupported(storage.name, ", ".join(unknown))
    try:
        try:
            return _Surveyor(storage, header, np.uint16).run(progress)
        except _CountsOverflowed:
            return _Surveyor(storage, header, np.uint64).run(progress)
    except MemoryError:
        raise Unsupported(storage.name, "an image file too large to be checked in this machine's memory") from None


class _L1(NamedTuple):
    """The sound entries of an L1 table: the L2 tables' clusters, and where they stand. ``name``: "" for the active one."""

    name: str
    clusters: Clusters
    l1_index: Clusters


_NOTHING: Final = np.empty(0, np.int64)


class _CountsOverflowed(Exception):
    """A cluster has more references than the type of the counts can hold."""


class _Surveyor:
    def __init__(self, storage: Storage, header: Header, counts_type: type[np.unsignedinteger[Any]]) -> None:
        self.storage = storage
        self.counts_type = counts_type
        self.header = header
        self.census = census = Census(storage, header.geometry)
        if census.clusters > _MAX_CLUSTERS:
            raise Unsupported(storage.name, f"a check of an image file of {census.clusters} clusters (at most {_MAX_CLUSTERS})")
        self.geometry = census.geometry
        self.file = ImageFile(storage)
        self.claims = Claims()
        self.singles: list[tuple[int, int]] = []
        """Runs of clusters (first, stop) with one reference each; counted when the type of the counts is known."""
        self.snapshots: tuple[Snapshot, ...] = ()
        self.has_data_file = bool(header.incompatible & Incompatible.DATA_FILE)
        self.refcounts_damaged = False
        self.refcount_table = (0, 0)
        self.active_l1: tuple[Clusters, Words] = (_NOTHING, np.empty(0, np.uint64))

    def run(self, progress: Progress | None) -> Survey:
        header, census = self.header, self.census
        l1s = self._read_structures()
        tables = _gather(l1s)
        census.references = np.zeros(census.clusters + 1, self.counts_type)
        for first, stop in self.singles:
            census.references[first:stop] += 1
            census.counted += len(census.references[first:stop])
        census.add_references(tables.clusters, tables.references)
        blocks = self._read_refcounts()
        judge = L2Judge(census, self.file, tables, [l1.name for l1 in l1s], has_data_file=self.has_data_file)
        judge.judge(progress)
        leads = int(tables.references.sum())
        most = len(self.singles) + len(blocks[0]) + leads + judge.ramps + 3 * (leads - judge.ramps) * self.geometry.l2_entries
        # Few tables cannot give one cluster too many references, however they are filled.
        if most > np.iinfo(self.counts_type).max and census.counts_overflowed():
            raise _CountsOverflowed
        image_end_bytes = self._compare()
        shared = self._find_shared(tables, blocks[1])
        self._judge_l1_flags()
        judge.judge_suspects()
        report = Report(
            findings=tuple(census.found.kept),
            totals=dict(census.found.totals),
            complete=census.complete,
            refcounts_damaged=self.refcounts_damaged,
            image_end_bytes=image_end_bytes,
            total_clusters=self.geometry.clusters_for(header.size_bytes),
            allocated_clusters=judge.allocated,
            fragmented_clusters=judge.fragmented,
            compressed_clusters=judge.compressed,
        )
        return Survey(
            storage=self.storage,
            header=header,
            report=report,
            census=census,
            judge=judge,
            active_l1=self.active_l1,
            claims=self.claims,
            refcount_table=self.refcount_table,
            blocks=blocks,
            shared=shared,
        )

    # The structures

    def _read_structures(self) -> list[_L1]:
        """Claim every structure, and read every L1 table, the active one first."""
        header = self.header
        self._claim(0, 1, Kind.HEADER.value)
        l1s = [self._read_l1(header.l1_offset, header.l1_entries, "")]
        if header.snapshot_count:
            l1s += self._snapshot_l1s()
        if header.encryption is not None:
            self._claim(header.encryption.offset, header.encryption.length_bytes, "encryption header")
        if header.autoclear & Autoclear.BITMAPS:
            self._read_bitmaps()
        self._claim_refcount_table()
        return l1s

    def _claim_refcount_table(self) -> None:
        """After all others: where two lie on one another, this is the one that can be made anew."""
        census, counted = self.census, len(self.singles)
        # It hides nothing but refcount blocks, which a new structure does not need.
        complete = census.complete
        length_bytes = self.header.refcount_table_clusters * census.cluster_bytes
        self.refcounts_damaged = not self._claim(self.header.refcount_table_offset, length_bytes, Kind.REFCOUNT_TABLE.value)
        census.complete = complete
        if len(self.singles) > counted:
            self.refcount_table = self.singles[-1]

    def _claim(self, offset: int, length_bytes: int, name: str) -> bool:
        """Count a structure's clusters; False where it cannot stand there (then it must not be followed).

        Not following structures that overlap also bounds the work that a hostile image can cause.
        """
        if not length_bytes:
            return True
        census = self.census
        if offset >= census.size or offset + length_bytes - census.size >= census.cluster_bytes:
            census.add_past_end(name, (), offset)
            census.complete = False
            return False
        first, stop = offset >> census.bits, (offset + length_bytes - 1 >> census.bits) + 1
        self.singles.append((first, stop))
        claimed = self.claims.claim(first, stop, name)
        census.complete &= claimed
        return claimed

    def _read_l1(self, offset: int, entries: int, name: str) -> _L1:
        if not entries or not self._claim(offset, entries * TABLE_ENTRY_BYTES, f"{name}{Kind.L1.value}"):
            return _L1(name, _NOTHING, _NOTHING)
        words = self.file.words(offset, entries)
        index = np.flatnonzero(words)
        words = words[index]
        if not name:
            self.active_l1 = (index, words)
        if not len(words):
            return _L1(name, _NOTHING, _NOTHING)
        offsets = words & np.uint64(OFFSET_MASK)
        reserved = words & np.uint64(_L1_RESERVED) != 0
        bad = (offsets & np.uint64(self.census.misaligned_mask) != 0) | (offsets >= self.census.size) | (offsets == 0)
        judged = reserved | bad
        if judged.any():
            self._bad_l1_entries(words[judged].tolist(), index[judged].tolist(), f"{name}L1")
            good = ~bad
            offsets, index = offsets[good], index[good]
        return _L1(name, (offsets >> np.uint64(self.census.bits)).view(np.int64), index)

    def _bad_l1_entries(self, words: list[int], index: list[int], place: str) -> None:
        census = self.census
        for at, entry in zip(index, words, strict=True):
            offset = entry & OFFSET_MASK
            if entry & _L1_RESERVED:
                census.found.add(Finding(Problem.RESERVED_BITS, Grade.FATAL, place, (at,), entry=entry))
            elif not offset:
                census.found.add(Finding(Problem.COPIED_WITHOUT_CLUSTER, Grade.FATAL, place, (at,), entry=entry))
            # What lies behind an entry that leads to no L2 table stays unknown.
            if offset & census.misaligned_mask:
                census.complete = False
                census.found.add(Finding(Problem.MISALIGNED, Grade.FATAL, place, (at,), offset=offset, entry=entry))
            if offset >= census.size:
                census.complete = False
                census.add_past_end(place, (at,), offset, entry)
            elif offset & census.misaligned_mask:
                self.singles.append((offset >> census.bits, (offset >> census.bits) + 2))

    def _snapshot_l1s(self) -> Iterator[_L1]:
        header, census, place = self.header, self.census, Kind.SNAPSHOT_TABLE.value
        try:
            self.snapshots = read_snapshots(self.storage, header)
        except Corrupt as corrupt:
            # Its first cluster at least is in use, whatever it is worth.
            self._claim(header.snapshots_offset, 1, place)
            self._unreadable(Finding(Problem.SNAPSHOT_TABLE, Grade.FATAL, place, detail=str(corrupt)))
            return
        length_bytes = sum(align_up(len(snapshot.stored), 8) for snapshot in self.snapshots)
        self._claim(header.snapshots_offset, length_bytes, place)
        if self.has_data_file:
            detail = f"{len(self.snapshots)} snapshots in an image with an external data file"
            census.found.add(Finding(Problem.DATA_FILE, Grade.FATAL, place, detail=detail))
        for number, snapshot in enumerate(self.snapshots):
            if header.version >= 3 and len(snapshot.extra) < _MIN_EXTRA_BYTES_V3:
                detail = f"its extra data has {len(snapshot.extra)} bytes, version 3 needs {_MIN_EXTRA_BYTES_V3}"
                census.found.add(Finding(Problem.SNAPSHOT_TABLE, Grade.HARMLESS, place, (number,), detail=detail))
            yield self._read_l1(snapshot.l1_offset, snapshot.l1_entries, f"snapshot {snapshot.id!a}: ")

    def _unreadable(self, finding: Finding) -> None:
        """A structure of unknown length is damaged: it may go on past the end of the file, should that grow."""
        self.census.complete = False
        self.census.found.add(finding)
        self.census.note_past_end(self.census.size)

    def _read_bitmaps(self) -> None:
        """Count the clusters of the bitmaps, which are consistent as long as the autoclear bit says so."""
        pointer = self.header.bitmaps
        assert pointer is not None  # parse_header: the autoclear bit needs the extension.
        if not self._claim(pointer.directory_offset, pointer.directory_bytes, Kind.BITMAPS.value):
            return
        try:
            entries = read_bitmap_directory(self.storage, pointer, self.geometry)
        except Corrupt as corrupt:
            self._unreadable(Finding(Problem.BITMAP_DIRECTORY, Grade.FATAL, Kind.BITMAPS.value, detail=str(corrupt)))
            return
        for entry in entries:
            name = f"bitmap {entry.name.decode('utf-8', 'surrogateescape')!a}"
            if self._claim(entry.table_offset, entry.table_bytes, f"{name}: table"):
                for first in range(0, entry.table_entries, _TABLE_PIECE_ENTRIES):
                    count = min(_TABLE_PIECE_ENTRIES, entry.table_entries - first)
                    self._bitmap_entries(self.file.words(entry.table_offset + first * TABLE_ENTRY_BYTES, count), first, name)

    def _bitmap_entries(self, words: Words, first: int, name: str) -> None:
        census = self.census
        for at in np.flatnonzero(words).tolist():
            entry = int(words[at])
            offset = entry & OFFSET_MASK
            if entry & _BITMAP_RESERVED or (offset and entry & 1):
                census.found.add(Finding(Problem.RESERVED_BITS, Grade.FATAL, name, (first + at,), entry=entry))
            elif offset & census.misaligned_mask:
                census.found.add(Finding(Problem.MISALIGNED, Grade.FATAL, name, (first + at,), offset=offset, entry=entry))
            elif offset >= census.size:
                census.add_past_end(name, (first + at,), offset, entry)
            elif offset:
                self.singles.append((offset >> census.bits, (offset >> census.bits) + 1))

    # Refcounts

    def _read_refcounts(self) -> tuple[Clusters, Clusters]:
        """Read the stored counts, and count the blocks; index and cluster of each block that can be read."""
        geometry, header, census = self.geometry, self.header, self.census
        per_block = geometry.refcounts_per_block
        covered = align_up(census.clusters + 1, per_block)
        census.stored = np.zeros(covered, f"u{max(1, geometry.refcount_bits // 8)}")
        if self.refcounts_damaged:
            return _NOTHING, _NOTHING
        words = self.file.words(
            header.refcount_table_offset, header.refcount_table_clusters * geometry.table_entries_per_cluster
        )
        index = np.flatnonzero(words)
        words = words[index]
        bad = (words & np.uint64(_REFCOUNT_TABLE_RESERVED | geometry.cluster_mask) != 0) | (words >= census.size)
        if bad.any():
            self._bad_refcount_entries(words[bad].tolist(), index[bad].tolist())
            good = ~bad
            words, index = words[good], index[good]
        blocks = (words >> np.uint64(census.bits)).view(np.int64)
        census.add_references(blocks, np.ones(len(blocks), np.int64))
        within = index < covered // per_block
        self._load_blocks(*((index, blocks) if within.all() else (index[within], blocks[within])))
        return index, blocks

    def _bad_refcount_entries(self, words: list[int], index: list[int]) -> None:
        census, place = self.census, Kind.REFCOUNT_TABLE.value
        self.refcounts_damaged = True
        for at, entry in zip(index, words, strict=True):
            if entry & _REFCOUNT_TABLE_RESERVED:
                census.found.add(Finding(Problem.RESERVED_BITS, Grade.FATAL, place, (at,), entry=entry))
            elif entry & self.geometry.cluster_mask:
                census.found.add(Finding(Problem.MISALIGNED, Grade.FATAL, place, (at,), offset=entry, entry=entry))
            else:
                census.add_past_end(place, (at,), entry, entry)

    def _load_blocks(self, index: Clusters, blocks: Clusters) -> None:
        bits, cluster_bits, per_block = self.geometry.refcount_bits, self.census.bits, self.geometry.refcounts_per_block
        rows = self.census.stored.reshape(-1, per_block)
        packed = np.empty(self.geometry.cluster_bytes if bits < 8 else 0, np.uint8)
        for at, block in zip(index.tolist(), blocks.tolist(), strict=True):
            if bits < 8:
                read_padded(self.storage, block << cluster_bits, packed.data)
                rows[at] = counts_view(packed, bits)
                continue
            row = rows[at]
            read_padded(self.storage, block << cluster_bits, row.data.cast("B"))
            if LITTLE_ENDIAN:
                row.byteswap(inplace=True)

    def _compare(self) -> int:
        """Hold stored counts against references; returns where the last cluster in use ends, in bytes."""
        census = self.census
        # The cluster after the last exists only if something that the file lacks the tail of reaches into it.
        end = census.clusters + (1 if census.references[census.clusters] else 0)
        starts = range(0, end, _COMPARE_CLUSTERS)
        for first in starts:
            stop = min(first + _COMPARE_CLUSTERS, end)
            differ = census.stored[first:stop] != census.references[first:stop]
            if differ.any():
                self._refcount_findings(np.flatnonzero(differ) + first)
        for first in reversed(starts):
            stop = min(first + _COMPARE_CLUSTERS, end)
            used = np.flatnonzero((census.stored[first:stop] != 0) | (census.references[first:stop] != 0))
            if len(used):
                return (first + int(used[-1]) + 1) << census.bits
        return 0

    def _refcount_findings(self, clusters: Clusters) -> None:
        census = self.census
        low = census.stored[clusters] < census.references[clusters]
        for problem, grade, which in (
            (Problem.REFCOUNT_TOO_LOW, Grade.FATAL, clusters[low]),
            (Problem.REFCOUNT_TOO_HIGH, Grade.LEAK, clusters[~low]),
        ):

            def make(
                count: int, problem: Problem = problem, grade: Grade = grade, which: Clusters = which
            ) -> Iterator[Finding]:
                for cluster in which[:count].tolist():
                    yield self._cluster_finding(problem, grade, "cluster", cluster)

            census.found.add_many(problem, grade, len(which), make)

    def _cluster_finding(self, problem: Problem, grade: Grade, place: str, cluster: int) -> Finding:
        stored, references = int(self.census.stored[cluster]), int(self.census.references[cluster])
        offset = cluster << self.census.bits
        return Finding(problem, grade, place, (), cluster, offset, None, stored, references)

    def _find_shared(self, tables: L2Tables, blocks: Clusters) -> frozenset[int]:
        """The clusters on which a structure lies together with anything else."""
        references = self.census.references
        shared: dict[int, str] = {}
        for first, stop, name in zip(self.claims.starts, self.claims.stops, self.claims.names, strict=True):
            self._note_shared(shared, np.flatnonzero(references[first:stop] > 1) + first, name)
        self._note_shared(shared, tables.clusters[references[tables.clusters] > tables.references], Kind.L2.value)
        self._note_shared(shared, blocks[references[blocks] > 1], Kind.REFCOUNT_BLOCK.value)
        self.refcounts_damaged |= not {Kind.REFCOUNT_TABLE.value, Kind.REFCOUNT_BLOCK.value}.isdisjoint(shared.values())
        for cluster, name in shared.items():
            # Where the refcount is too low that says it already; but for blocks, where QEMU counts both.
            too_low = self.census.stored[cluster] < references[cluster]
            if not too_low or name == Kind.REFCOUNT_BLOCK.value:
                self.census.found.add(self._cluster_finding(Problem.OVERLAP, Grade.FATAL, f"{name} on cluster", cluster))
        return frozenset(shared)

    def _note_shared(self, shared: dict[int, str], clusters: Clusters, name: str) -> None:
        if len(clusters):
            shared.update(dict.fromkeys(clusters.tolist(), name))

    def _judge_l1_flags(self) -> None:
        """The COPIED flags of the active L1."""
        index, words = self.active_l1
        if not len(words):
            return
        census = self.census
        single = census.stored[census.stored_index(words)] == 1
        wrong = (single != (words >= np.uint64(COPIED))) & (words & np.uint64(OFFSET_MASK) != 0)
        if wrong.any():
            which = np.flatnonzero(wrong)
            census.add_copied_findings(words[which], lambda n: ("L1", (int(index[which[n]]),)))


def _gather(l1s: list[_L1]) -> L2Tables:
    """Every L2 table once, in the order of the file."""
    active = len(l1s[0].clusters)
    clusters, index = l1s[0].clusters, l1s[0].l1_index
    if len(l1s) > 1:
        clusters = np.concatenate([l1.clusters for l1 in l1s])
        index = np.concatenate([l1.l1_index for l1 in l1s])
    order = np.argsort(clusters, kind="stable")
    clusters = clusters[order]
    is_first = np.ones(len(clusters), bool)
    np.not_equal(clusters[1:], clusters[:-1], out=is_first[1:])
    if len(l1s) == 1 and is_first.all():
        ones: Any = np.ones(len(clusters), np.int64)
        return L2Tables(clusters, ones, ones, np.zeros(len(clusters), np.int64), index[order])
    # A stable sort leaves entries of the active L1, which come first, before those of snapshots.
    starts = np.flatnonzero(is_first)
    stops = np.append(starts[1:], len(clusters))
    first = order[starts]
    active_before = np.concatenate(([0], np.cumsum(order < active)))
    return L2Tables(
        clusters[starts],
        stops - starts,
        active_before[stops] - active_before[starts],
        np.searchsorted(np.cumsum([len(l1.clusters) for l1 in l1s]), first, "right"),
        index[first],
    )
