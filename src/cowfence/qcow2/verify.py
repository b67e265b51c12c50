"""Verify an image: count every reference to every host cluster, and hold the counts against what is stored.

A pure reader. It takes what it can from a damaged image: a bad entry is a finding, and what lies behind it is skipped
(``Report.complete`` then says that references may be hidden, so that nobody frees what they lead to). Only a header that
cannot be read, a feature that is unknown, and a failing host raise.

Three passes. The structures (header, tables, snapshots, bitmaps) are few, and each is a run of clusters. The L2 tables hold
the mass: neighbouring ones are read in one call and judged as one array. First their OR is looked at, which in a good image
rules out every bad bit in one go; entries that lead to consecutive clusters are counted by slices, others by index. The third
pass compares the counts with the refcount blocks, which were read into one array beforehand. Where a COPIED flag is wrong the
tables concerned are read again at the end, because the grade depends on the final counts.

Memory is 6 bytes and more for each cluster of the file (never of what the file claims to refer to), and a piece of tables. A
small file is read whole, once: the crash explorer verifies images of 60 clusters thousands of times a second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cowfence.errors import Corrupt, Unsupported
from cowfence.qcow2.bitmap_directory import read_bitmap_directory
from cowfence.qcow2.entries import COMPRESSED, COPIED, ZERO
from cowfence.qcow2.extensions import Autoclear, Incompatible
from cowfence.qcow2.findings import Collector, Finding, Grade, Problem, Report
from cowfence.qcow2.geometry import OFFSET_MASK, TABLE_ENTRY_BYTES, Geometry
from cowfence.qcow2.header import Header
from cowfence.qcow2.image import read_header
from cowfence.qcow2.snapshot_table import Snapshot, read_snapshots
from cowfence.qcow2.tables import Kind, counts_view
from cowfence.storage.base import Storage, read_padded
from cowfence.units import KIB, MIB, SECTOR_BYTES, align_up, div_up

Progress = Callable[[float], None]
"""Told the fraction that is done, 0 to 1."""

Words = NDArray[np.uint64]
Clusters = NDArray[np.int64]
Counts = NDArray[Any]

_WHOLE_BYTES: Final = 1 * MIB
"""Files up to this size are read whole."""
_PIECE_BYTES: Final = 256 * KIB
"""L2 tables are judged in pieces of this size: they and their intermediate arrays stay in the processor's cache."""
_COMPARE_CLUSTERS: Final = 64 * KIB
_RUN_LENGTH: Final = 16
"""Slices are faster than indices where runs of consecutive clusters are longer than this on average."""
_MAX_CLUSTERS: Final = (1 << 31) - 1
"""QEMU's limit for a check."""

_STANDARD_RESERVED: Final = ((1 << 62) - 1) & ~OFFSET_MASK & ~ZERO
_L1_RESERVED: Final = ((1 << 63) - 1) & ~OFFSET_MASK
_REFCOUNT_TABLE_RESERVED: Final = 0x1FF
_BITMAP_RESERVED: Final = ((1 << 64) - 1) & ~OFFSET_MASK & ~1
_SUBCLUSTERS_ALLOCATED: Final = (1 << 32) - 1


def verify(storage: Storage, header: Header | None = None, *, progress: Progress | None = None) -> Report:
    """Check the image in ``storage``; never writes. ``header``: as read before, to save a second reading.

    Raises NotThisFormat, Unsupported and Corrupt for a header that cannot be read, and the storage's errors.
    """
    return survey(storage, header, progress=progress).report


@dataclass(frozen=True, slots=True)
class Survey:
    """A report with the counts behind it, for who repairs.

    ``stored`` and ``references``: by host cluster, for ``clusters`` clusters (those of the file, and one more where its last
    one is short). ``blocks``: index in the refcount table and host cluster of each block that could be read.
    ``refcounts_damaged``: the refcount structures themselves are broken (a bad entry, or something else on their clusters).
    ``lowest_past_end``: the least host offset past the end of the file that something refers to.
    """

    storage: Storage
    header: Header
    geometry: Geometry
    report: Report
    clusters: int
    stored: Counts
    references: Counts
    blocks: tuple[Clusters, Clusters]
    table_clusters: Clusters
    overlapped: frozenset[int]
    refcounts_damaged: bool
    lowest_past_end: int | None


def survey(storage: Storage, header: Header | None = None, *, progress: Progress | None = None) -> Survey:
    """``verify`` with what it counted."""
    if header is None:
        header = read_header(storage)
    unknown = header.unknown_incompatible()
    if unknown:
        raise Unsupported(storage.name, ", ".join(unknown))
    try:
        return _Surveyor(storage, header, progress).run()
    except MemoryError:
        raise Unsupported(storage.name, "an image file too large to be checked in this machine's memory") from None


class _Tables(NamedTuple):
    """The L2 tables of the image, each once, in the order of the file.

    ``references``: how many L1 entries lead to each; ``active``: how many of them in the active L1. ``l1``, ``index``: the
    first entry that does (of the active L1, if one does).
    """

    clusters: Clusters
    references: NDArray[np.int64]
    active: NDArray[np.int64]
    l1: NDArray[np.int64]
    index: NDArray[np.int64]


class _L1(NamedTuple):
    """The L2 tables that one L1 leads to. ``name`` stands before ``L2[...]`` in messages; empty for the active one."""

    name: str
    clusters: Clusters
    index: Clusters


class _File:
    """Reads of the image file; what lies past its end reads as zeros."""

    def __init__(self, storage: Storage, size_bytes: int, cluster_bytes: int) -> None:
        self._storage = storage
        self.whole: NDArray[np.uint8] | None = None
        if size_bytes <= _WHOLE_BYTES:
            self.whole = np.zeros(align_up(size_bytes, cluster_bytes), np.uint8)
            storage.readv(0, (memoryview(self.whole)[:size_bytes],))

    def bytes_at(self, offset: int, length_bytes: int) -> NDArray[np.uint8]:
        if self.whole is not None:
            part = self.whole[offset : offset + length_bytes]
            if len(part) == length_bytes:
                return part
        data = np.empty(length_bytes, np.uint8)
        read_padded(self._storage, offset, memoryview(data))
        return data

    def words(self, offset: int, count: int) -> Words:
        return self.bytes_at(offset, count * TABLE_ENTRY_BYTES).view(">u8").astype(np.uint64)

    def clusters(self, clusters: Clusters, bits: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The bytes of some clusters, one row for each; neighbours are read in one call. Large files: into ``buffer``."""
        if self.whole is not None:
            rows: NDArray[np.uint8] = self.whole.reshape(-1, 1 << bits)[clusters]
            return rows
        rows = buffer[: len(clusters) << bits].reshape(-1, 1 << bits)
        view = memoryview(buffer)
        for start, stop in _runs(clusters):
            read_padded(self._storage, int(clusters[start]) << bits, view[start << bits : stop << bits])
        return rows


class _Claims:
    """Runs of clusters that hold a structure, to find a structure on another one before it is followed."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []
        self.names: list[str] = []

    def claim(self, first: int, stop: int, name: str) -> bool:
        """List a run; False if another one is there already."""
        at = bisect_right(self.starts, first)
        if (at and self.stops[at - 1] > first) or (at < len(self.starts) and self.starts[at] < stop):
            return False
        self.starts.insert(at, first)
        self.stops.insert(at, stop)
        self.names.insert(at, name)
        return True


class _Surveyor:
    def __init__(self, storage: Storage, header: Header, progress: Progress | None) -> None:
        self.storage = storage
        self.header = header
        self.geometry = geometry = header.geometry
        self.bits = geometry.cluster_bits
        self.cluster_bytes = geometry.cluster_bytes
        self.misaligned_mask = OFFSET_MASK & geometry.cluster_mask
        self.size = storage.size()
        self.clusters = div_up(self.size, self.cluster_bytes)
        if self.clusters > _MAX_CLUSTERS:
            raise Unsupported(storage.name, f"a check of an image file of {self.clusters} clusters (at most {_MAX_CLUSTERS})")
        self.file = _File(storage, self.size, self.cluster_bytes)
        self.progress = progress
        self.found = Collector()
        self.complete = True
        self.claims = _Claims()
        self.snapshots: tuple[Snapshot, ...] = ()
        self.has_data_file = bool(header.incompatible & Incompatible.DATA_FILE)
        self.lowest_past_end: int | None = None
        self.refcounts_damaged = False
        self.allocated = self.fragmented = self.compressed = 0
        self.suspects: list[tuple[int, int]] = []
        """Runs of tables in which a COPIED flag is wrong."""

    def run(self) -> Survey:
        geometry, header = self.geometry, self.header
        l1s = self._read_l1s()
        self.tables = tables = self._gather(l1s)
        self.l1_names = [l1.name for l1 in l1s]
        # No cluster can have more references than there are entries; so the counts cannot overflow.
        bound = int(tables.references.sum()) * (geometry.l2_entries + 1) * 3 + len(self.snapshots) + (1 << 12)
        counts_type: Any = np.uint16 if bound < 1 << 16 else np.uint32 if bound < 1 << 31 else np.uint64
        # One more than the file has: a structure may lack the tail of its last cluster, compressed data even all of it.
        self.references: Counts = np.zeros(self.clusters + 1, counts_type)
        self.one = counts_type(1)
        self._count_structures()
        blocks = self._read_refcounts()
        np.add.at(self.references, tables.clusters, tables.references.astype(counts_type))
        self._judge_l1_flags(l1s[0])
        self._judge_tables()
        image_end = self._compare()
        overlapped = self._find_overlaps(blocks[1])
        self._judge_suspects()
        report = Report(
            findings=tuple(self.found.kept),
            totals=dict(self.found.totals),
            complete=self.complete,
            image_end_bytes=image_end,
            total_clusters=geometry.clusters_for(header.size_bytes),
            allocated_clusters=self.allocated,
            fragmented_clusters=self.fragmented,
            compressed_clusters=self.compressed,
        )
        if self.progress is not None:
            self.progress(1.0)
        return Survey(
            storage=self.storage,
            header=header,
            geometry=geometry,
            report=report,
            clusters=self.clusters,
            stored=self.stored,
            references=self.references,
            blocks=blocks,
            table_clusters=tables.clusters,
            overlapped=overlapped,
            refcounts_damaged=self.refcounts_damaged,
            lowest_past_end=self.lowest_past_end,
        )

    # The structures

    def _read_l1s(self) -> list[_L1]:
        """Claim and read every L1 table, the active one first."""
        header = self.header
        self.pending: list[tuple[int, int]] = []
        """Runs of clusters (first, stop) that have one reference each; counted once the type of the counts is known."""
        self._structure(0, 1, Kind.HEADER.value)
        table_bytes = header.refcount_table_clusters * self.cluster_bytes
        if not self._structure(header.refcount_table_offset, table_bytes, Kind.REFCOUNT_TABLE.value):
            self.refcounts_damaged = True
        l1s = [self._l1(header.l1_offset, header.l1_entries, "")]
        if header.snapshot_count:
            l1s += self._snapshot_l1s()
        if header.encryption is not None:
            self._structure(header.encryption.offset, header.encryption.length_bytes, "encryption header")
        if header.autoclear & Autoclear.BITMAPS:
            self._bitmaps()
        return l1s

    def _structure(self, offset: int, length_bytes: int, name: str) -> bool:
        """Claim a structure's clusters, one reference each; False, and a finding, where it cannot stand there."""
        if not length_bytes:
            return True
        if offset >= self.size or offset + length_bytes - self.size >= self.cluster_bytes:
            self._past_end(Finding(Problem.PAST_END, Grade.FATAL, name, offset=offset), offset)
            self.complete = False
            return False
        first, stop = offset >> self.bits, (offset + length_bytes - 1 >> self.bits) + 1
        self.pending.append((first, stop))
        return self.claims.claim(first, stop, name)

    def _past_end(self, finding: Finding, offset: int) -> None:
        self.found.add(finding)
        self._note_past_end(offset)

    def _note_past_end(self, offset: int) -> None:
        if self.lowest_past_end is None or offset < self.lowest_past_end:
            self.lowest_past_end = offset

    def _l1(self, offset: int, entries: int, name: str) -> _L1:
        """Read an L1 table and judge its entries."""
        nothing = np.empty(0, np.int64)
        if not entries:
            return _L1(name, nothing, nothing)
        if not self._structure(offset, entries * TABLE_ENTRY_BYTES, f"{name}{Kind.L1.value}"):
            # Hostile tables that overlap could make one file's bytes be read without end.
            self.complete = False
            return _L1(name, nothing, nothing)
        words = self.file.words(offset, entries)
        index = np.flatnonzero(words)
        words = words[index]
        if not name:
            self.active_l1 = (index, words)
        if not len(words):
            return _L1(name, nothing, nothing)
        place = f"{name}L1"
        self._bad_bits(words, _L1_RESERVED, Problem.RESERVED_BITS, place, index)
        offsets = words & np.uint64(OFFSET_MASK)
        bad = offsets & np.uint64(self.misaligned_mask) != 0
        bad |= offsets >= self.size
        bad |= offsets == 0
        if bad.any():
            self._bad_l1_entries(words[bad], index[bad], place)
            good = ~bad
            offsets, index = offsets[good], index[good]
        return _L1(name, (offsets >> np.uint64(self.bits)).view(np.int64), index)

    def _bad_bits(self, words: Words, mask: int, problem: Problem, place: str, index: Clusters) -> None:
        """A finding for each word of a one-level table that has a bit of ``mask``."""
        bad = np.flatnonzero(words & np.uint64(mask))
        self.found.add_many(
            problem,
            Grade.FATAL,
            len(bad),
            lambda n: [Finding(problem, Grade.FATAL, place, (int(index[at]),), entry=int(words[at])) for at in bad[:n]],
        )

    def _bad_l1_entries(self, words: Words, index: Clusters, place: str) -> None:
        """Entries that lead to no readable L2 table."""
        self.complete = False
        for at, entry in zip(index.tolist(), words.tolist(), strict=True):
            offset = entry & OFFSET_MASK
            if not offset:
                if entry & COPIED and not entry & _L1_RESERVED:
                    self.found.add(Finding(Problem.COPIED_WITHOUT_CLUSTER, Grade.FATAL, place, (at,), entry=entry))
                continue
            if offset & self.misaligned_mask:
                self.found.add(Finding(Problem.MISALIGNED, Grade.FATAL, place, (at,), offset=offset, entry=entry))
            if offset >= self.size:
                self._past_end(Finding(Problem.PAST_END, Grade.FATAL, place, (at,), offset=offset, entry=entry), offset)
            elif offset & self.misaligned_mask:
                first = offset >> self.bits
                self.pending.append((first, min(first + 2, self.clusters + 1)))

    def _snapshot_l1s(self) -> Iterator[_L1]:
        header = self.header
        try:
            self.snapshots = read_snapshots(self.storage, header)
        except Corrupt as corrupt:
            self.complete = False
            self.found.add(Finding(Problem.SNAPSHOT_TABLE, Grade.FATAL, Kind.SNAPSHOT_TABLE.value, detail=str(corrupt)))
            return
        length_bytes = sum(
            align_up(40 + len(s.extra) + sum(len(text.encode("utf-8", "surrogateescape")) for text in (s.id, s.name)), 8)
            for s in self.snapshots
        )
        self._structure(header.snapshots_offset, length_bytes, Kind.SNAPSHOT_TABLE.value)
        if self.has_data_file:
            detail = f"{len(self.snapshots)} snapshots in an image with an external data file"
            self.found.add(Finding(Problem.DATA_FILE, Grade.FATAL, Kind.SNAPSHOT_TABLE.value, detail=detail))
        for number, snapshot in enumerate(self.snapshots):
            if header.version >= 3 and len(snapshot.extra) < 16:
                detail = f"an entry of version 3 has {len(snapshot.extra)} bytes of extra data, must be at least 16"
                place = Kind.SNAPSHOT_TABLE.value
                self.found.add(Finding(Problem.SNAPSHOT_TABLE, Grade.HARMLESS, place, (number,), detail=detail))
            yield self._l1(snapshot.l1_offset, snapshot.l1_entries, f"snapshot {snapshot.id!a}: ")

    def _bitmaps(self) -> None:
        """Count the clusters of the bitmaps, as long as the image says that they are consistent."""
        pointer = self.header.bitmaps
        assert pointer is not None  # parse_header: the autoclear bit needs the extension.
        if not self._structure(pointer.directory_offset, pointer.directory_bytes, Kind.BITMAPS.value):
            self.complete = False
            return
        try:
            entries = read_bitmap_directory(self.storage, pointer, self.geometry)
        except Corrupt as corrupt:
            self.complete = False
            self.found.add(Finding(Problem.BITMAP_DIRECTORY, Grade.FATAL, Kind.BITMAPS.value, detail=str(corrupt)))
            return
        for entry in entries:
            name = f"bitmap {entry.name.decode('utf-8', 'surrogateescape')!a}"
            if not self._structure(entry.table_offset, entry.table_bytes, f"{name}: table"):
                self.complete = False
                continue
            step = _PIECE_BYTES // TABLE_ENTRY_BYTES
            for first in range(0, entry.table_entries, step):
                count = min(step, entry.table_entries - first)
                self._bitmap_table(self.file.words(entry.table_offset + first * TABLE_ENTRY_BYTES, count), first, name)

    def _bitmap_table(self, words: Words, base: int, name: str) -> None:
        for at in np.flatnonzero(words).tolist():
            entry = int(words[at])
            offset = entry & OFFSET_MASK
            if entry & _BITMAP_RESERVED or (offset and entry & 1):
                self.found.add(Finding(Problem.RESERVED_BITS, Grade.FATAL, name, (base + at,), entry=entry))
            elif offset & self.misaligned_mask:
                self.found.add(Finding(Problem.MISALIGNED, Grade.FATAL, name, (base + at,), offset=offset))
            elif offset >= self.size:
                self._past_end(Finding(Problem.PAST_END, Grade.FATAL, name, (base + at,), offset=offset), offset)
            elif offset:
                self.pending.append((offset >> self.bits, (offset >> self.bits) + 1))

    def _count_structures(self) -> None:
        for first, stop in self.pending:
            self.references[first:stop] += self.one

    def _gather(self, l1s: list[_L1]) -> _Tables:
        """Every L2 table once, in the order of the file."""
        clusters = np.concatenate([l1.clusters for l1 in l1s]) if len(l1s) > 1 else l1s[0].clusters
        index = np.concatenate([l1.index for l1 in l1s]) if len(l1s) > 1 else l1s[0].index
        order = np.argsort(clusters, kind="stable")
        ordered = clusters[order]
        is_first = np.empty(len(ordered), bool)
        is_first[:1] = True
        np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
        if len(l1s) == 1 and is_first.all():
            ones = np.ones(len(ordered), np.int64)
            return _Tables(ordered, ones, ones, np.zeros(len(ordered), np.int64), index[order])
        # A stable sort leaves entries of the active L1, which come first, before those of snapshots.
        starts = np.flatnonzero(is_first)
        first = order[starts]
        ends = np.append(starts[1:], len(ordered))
        is_active = np.concatenate(([0], np.cumsum(order < len(l1s[0].clusters))))
        lengths = np.cumsum([len(l1.clusters) for l1 in l1s])
        return _Tables(
            ordered[starts], ends - starts, is_active[ends] - is_active[starts], np.searchsorted(lengths, first, "right"), index[first]
        )

    # Refcounts

    def _read_refcounts(self) -> tuple[Clusters, Clusters]:
        """Read the stored counts; index and cluster of each block that could be read."""
        geometry, header = self.geometry, self.header
        per_block = geometry.refcounts_per_block
        covered = align_up(self.clusters + 1, per_block)
        self.stored: Counts = np.zeros(covered, f"u{max(1, geometry.refcount_bits // 8)}")
        offset = header.refcount_table_offset
        if offset >= self.size:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        words = self.file.words(offset, header.refcount_table_clusters * geometry.table_entries_per_cluster)
        index = np.flatnonzero(words)
        words = words[index]
        bad = words & np.uint64(_REFCOUNT_TABLE_RESERVED | geometry.cluster_mask) != 0
        bad |= words >= self.size
        if bad.any():
            self._bad_refcount_entries(words[bad].tolist(), index[bad].tolist())
            good = ~bad
            words, index = words[good], index[good]
        blocks = (words >> np.uint64(self.bits)).view(np.int64)
        np.add.at(self.references, blocks, self.one)
        within = index < covered // per_block
        self._load_blocks(*((index, blocks) if within.all() else (index[within], blocks[within])))
        return index, blocks

    def _bad_refcount_entries(self, words: list[int], index: list[int]) -> None:
        self.refcounts_damaged = True
        place = Kind.REFCOUNT_TABLE.value
        for at, entry in zip(index, words, strict=True):
            if entry & _REFCOUNT_TABLE_RESERVED:
                self.found.add(Finding(Problem.RESERVED_BITS, Grade.FATAL, place, (at,), entry=entry))
            elif entry & self.geometry.cluster_mask:
                self.found.add(Finding(Problem.MISALIGNED, Grade.FATAL, place, (at,), offset=entry, entry=entry))
            else:
                self._past_end(Finding(Problem.PAST_END, Grade.FATAL, place, (at,), offset=entry, entry=entry), entry)

    def _load_blocks(self, index: Clusters, blocks: Clusters) -> None:
        bits, per_block = self.geometry.refcount_bits, self.geometry.refcounts_per_block
        rows = self.stored.reshape(-1, per_block)
        if self.file.whole is not None:
            raw = self.file.clusters(blocks, self.bits, self.file.whole)
            rows[index] = raw.view(f">u{bits // 8}") if bits >= 8 else counts_view(raw, bits).reshape(-1, per_block)
            return
        packed = np.empty(self.cluster_bytes, np.uint8)
        for at, block in zip(index.tolist(), blocks.tolist(), strict=True):
            row = rows[at]
            if bits >= 8:
                read_padded(self.storage, block << self.bits, memoryview(row).cast("B"))
                if _LITTLE and bits > 8:
                    row.byteswap(inplace=True)
            else:
                read_padded(self.storage, block << self.bits, memoryview(packed))
                row[:] = counts_view(packed, bits)

    def _compare(self) -> int:
        """Hold stored counts against references; returns where the last cluster in use ends, in bytes."""
        end = self.clusters + (1 if self.references[self.clusters] else 0)
        last_used = -1
        for first in range(0, end, _COMPARE_CLUSTERS):
            stop = min(first + _COMPARE_CLUSTERS, end)
            stored, references = self.stored[first:stop], self.references[first:stop]
            differ = stored != references
            if differ.any():
                self._refcount_findings(first, np.flatnonzero(differ))
        for first in range((end - 1) // _COMPARE_CLUSTERS * _COMPARE_CLUSTERS, -1, -_COMPARE_CLUSTERS):
            stop = min(first + _COMPARE_CLUSTERS, end)
            used = np.flatnonzero((self.stored[first:stop] != 0) | (self.references[first:stop] != 0))
            if len(used):
                last_used = first + int(used[-1])
                break
        return (last_used + 1) << self.bits

    def _refcount_findings(self, base: int, at: Clusters) -> None:
        at += base
        low = self.stored[at] < self.references[at]
        for problem, grade, which in (
            (Problem.REFCOUNT_TOO_LOW, Grade.FATAL, at[low]),
            (Problem.REFCOUNT_TOO_HIGH, Grade.LEAK, at[~low]),
        ):
            self.found.add_many(problem, grade, len(which), lambda n, p=problem, g=grade, w=which: self._clusters(p, g, w[:n]))  # type: ignore[misc]

    def _clusters(self, problem: Problem, grade: Grade, clusters: Clusters) -> list[Finding]:
        return [
            Finding(problem, grade, "cluster", (), c, c << self.bits, None, int(self.stored[c]), int(self.references[c]))
            for c in clusters.tolist()
        ]

    def _find_overlaps(self, blocks: Clusters) -> frozenset[int]:
        """The clusters on which a structure shares its place with anything else."""
        references = self.references
        shared: dict[int, str] = {}
        for kind, clusters, own in (
            (Kind.L2.value, self.tables.clusters, self.tables.references),
            (Kind.REFCOUNT_BLOCK.value, blocks, 1),
        ):
            over = references[clusters] > own
            if over.any():
                shared.update(dict.fromkeys(clusters[over].tolist(), kind))
                if kind is Kind.REFCOUNT_BLOCK.value:
                    self.refcounts_damaged = True
        for first, stop, name in zip(self.claims.starts, self.claims.stops, self.claims.names, strict=True):
            over = references[first:stop] > 1
            if over.any():
                shared.update(dict.fromkeys((np.flatnonzero(over) + first).tolist(), name))
                if name == Kind.REFCOUNT_TABLE.value:
                    self.refcounts_damaged = True
        for cluster, name in shared.items():
            stored, count = int(self.stored[cluster]), int(references[cluster])
            # A refcount that is too low says it already, but for blocks, where QEMU counts both.
            if stored >= count or name == Kind.REFCOUNT_BLOCK.value:
                offset = cluster << self.bits
                self.found.add(
                    Finding(Problem.OVERLAP, Grade.FATAL, f"{name} on cluster", (), cluster, offset, None, stored, count)
                )
        return frozenset(shared)

    # L1 and L2 entries

    def _judge_l1_flags(self, active: _L1) -> None:
        if not len(active.clusters):
            return
        index, words = self.active_l1
        copied = words >= np.uint64(COPIED)
        clusters = self._clipped(words)
        wrong = np.flatnonzero(((self.stored[clusters] == 1) != copied) & (words & np.uint64(OFFSET_MASK) != 0))
        self.l1_wrong = wrong
        if len(wrong):
            self._copied_findings(words[wrong], lambda at: ("L1", (int(index[wrong[at]]),)))

    def _clipped(self, words: Words) -> Clusters:
        """The clusters that entries lead to; those past the file's end lead to the last count, which is 0."""
        clusters = ((words & np.uint64(OFFSET_MASK)) >> np.uint64(self.bits)).view(np.int64)
        return np.minimum(clusters, len(self.stored) - 1)

    def _pieces(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        step = max(1, _PIECE_BYTES >> self.bits)
        for at in range(first, stop, step):
            yield at, min(at + step, stop)

    def _judge_tables(self) -> None:
        total = len(self.tables.clusters)
        if not total:
            return
        step = max(1, _PIECE_BYTES >> self.bits)
        self.buffer = np.empty(step << self.bits if self.file.whole is None else 0, np.uint8)
        self.uniform = bool((self.tables.references == 1).all())
        self.all_active = bool((self.tables.active == 1).all())
        for number, (first, stop) in enumerate(self._pieces(0, total)):
            self._judge_piece(first, stop)
            if self.progress is not None and not number & 15:
                self.progress(first / total)

    def _read_piece(self, first: int, stop: int) -> tuple[Words, Words | None]:
        """The entries of some tables, and their subcluster bitmaps where they have some."""
        raw = self.file.clusters(self.tables.clusters[first:stop], self.bits, self.buffer).reshape(-1)
        words: Words
        if self.file.whole is None and _LITTLE:
            words = raw.view(np.uint64).byteswap(inplace=True)
        else:
            words = raw.view(">u8").astype(np.uint64)
        if self.geometry.extended_l2:
            return words[0::2].copy(), words[1::2]
        return words, None

    def _judge_piece(self, first: int, stop: int) -> None:
        words, bitmaps = self._read_piece(first, stop)
        per = self.geometry.l2_entries
        ones = int(np.bitwise_or.reduce(words))
        if bitmaps is not None:
            self._judge_bitmaps(words, bitmaps, first)
        if not ones:
            return
        at: Clusters | None = None
        if np.count_nonzero(words) != len(words):
            at = np.flatnonzero(words)
            words = words[at]
        clusters = ((words & np.uint64(OFFSET_MASK)) >> np.uint64(self.bits)).view(np.int64)
        allowed_zero = 0 if self.geometry.version < 3 or self.geometry.extended_l2 else ZERO
        odd = _STANDARD_RESERVED | COMPRESSED | self.misaligned_mask | ZERO & ~allowed_zero
        if ones & odd or self.has_data_file or not clusters.min() or clusters.max() >= self.clusters:
            if at is None:
                at = np.arange(len(words))
            kept = self._odd_entries(words, at, first, allowed_zero)
            if not kept.any():
                return
            words, at, clusters = words[kept], at[kept], clusters[kept]
        self._count_standard(words, at, clusters, first, stop, per)

    def _count_standard(
        self, words: Words, at: Clusters | None, clusters: Clusters, first: int, stop: int, per: int
    ) -> None:
        """Count entries that lead to whole clusters of the file. ``at``: where in the piece they stand; None: they fill it."""
        breaks = clusters[1:] - clusters[:-1] != 1
        broken = np.count_nonzero(breaks)
        if not self.uniform or (not self.all_active and at is None):
            at = np.arange(len(words)) if at is None else at
        if self.all_active:
            self.allocated += len(words)
            if at is None:
                self.fragmented += broken - np.count_nonzero(breaks[per - 1 :: per])
            elif broken:
                self.fragmented += np.count_nonzero(breaks & (at[1:] // per == at[:-1] // per))
        else:
            assert at is not None
            self._count_shared(words, at, clusters, breaks, first, per)
            return
        if self.has_data_file:
            if not (words >= np.uint64(COPIED)).all():
                self.suspects.append((first, stop))
            return
        if not self.uniform:
            assert at is not None
            np.add.at(self.references, clusters, self.tables.references[first + at // per].astype(self.references.dtype))
        elif broken * _RUN_LENGTH < len(words):
            if self._count_runs(clusters, breaks) and int(np.bitwise_and.reduce(words)) & COPIED:
                return
        else:
            np.add.at(self.references, clusters, self.one)
        if ((self.stored[clusters] == 1) != (words >= np.uint64(COPIED))).any():
            self.suspects.append((first, stop))

    def _count_runs(self, clusters: Clusters, breaks: NDArray[np.bool_]) -> bool:
        """Count runs of consecutive clusters; True if the stored count of all of them is 1."""
        ends = np.flatnonzero(breaks) + 1
        all_single = True
        start = 0
        references, stored, one = self.references, self.stored, self.one
        for end in (*ends.tolist(), len(clusters)):
            cluster = int(clusters[start])
            stop = cluster + end - start
            references[cluster:stop] += one
            if all_single:
                all_single = bool((stored[cluster:stop] == 1).all())
            start = end
        return all_single

    def _count_shared(
        self, words: Words, at: Clusters, clusters: Clusters, breaks: NDArray[np.bool_], first: int, per: int
    ) -> None:
        """``_count_standard`` where tables have several references, or belong to snapshots only."""
        rows = first + at // per
        active = self.tables.active[rows]
        self.allocated += int(active.sum())
        self.fragmented += int((active[1:] * (breaks & (rows[1:] == rows[:-1]))).sum())
        if self.has_data_file:
            wrong = words < np.uint64(COPIED)
        else:
            np.add.at(self.references, clusters, self.tables.references[rows].astype(self.references.dtype))
            wrong = (self.stored[clusters] == 1) != (words >= np.uint64(COPIED))
        wrong &= active != 0
        if wrong.any():
            last = int(rows[-1]) + 1
            self.suspects.append((first, last))

    def _odd_entries(self, words: Words, at: Clusters, first: int, allowed_zero: int) -> NDArray[np.bool_]:
        """Judge entries that are not plain; returns which lead to a whole cluster that is to be counted."""
        compressed = words & np.uint64(COMPRESSED) != 0
        offsets = words & np.uint64(OFFSET_MASK)
        standard = ~compressed
        if compressed.any():
            self._compressed(words[compressed], at[compressed], first)
        copied = words >= np.uint64(COPIED)
        for problem, wrong in (
            (Problem.RESERVED_BITS, standard & (words & np.uint64(_STANDARD_RESERVED) != 0)),
            (Problem.ZERO_FLAG, standard & (words & np.uint64(ZERO & ~allowed_zero) != 0)),
        ):
            self._l2_findings(problem, words, at, wrong, first)
        if self.has_data_file:
            kept = standard & ((offsets != 0) | copied)
        else:
            self._l2_findings(Problem.COPIED_WITHOUT_CLUSTER, words, at, standard & copied & (offsets == 0), first)
            kept = standard & (offsets != 0)
        misaligned = kept & (offsets & np.uint64(self.misaligned_mask) != 0)
        past_end = kept & (offsets >= self.size)
        if self.has_data_file:
            past_end[:] = False
        bad = misaligned | past_end
        if bad.any():
            self._l2_findings(Problem.MISALIGNED, words, at, misaligned, first)
            self._l2_findings(Problem.PAST_END, words, at, past_end, first)
            self._bad_offsets(offsets, at, misaligned & ~past_end, past_end, bad, first)
            kept &= ~bad
        return kept

    def _bad_offsets(
        self,
        offsets: Words,
        at: Clusters,
        misaligned: NDArray[np.bool_],
        past_end: NDArray[np.bool_],
        bad: NDArray[np.bool_],
        first: int,
    ) -> None:
        """Count what misaligned entries touch (two clusters each), and note those past the end."""
        rows = first + at // self.geometry.l2_entries
        if misaligned.any() and not self.has_data_file:
            clusters = (offsets[misaligned] >> np.uint64(self.bits)).view(np.int64)
            for touched in (clusters, clusters + 1):
                self._add(touched, self.tables.references[rows[misaligned]])
        if past_end.any():
            self._note_past_end(int(offsets[past_end].min()))
        self.allocated += int(self.tables.active[rows[bad]].sum())
        bad_rows = rows[bad]
        self.suspects.append((int(bad_rows[0]), int(bad_rows[-1]) + 1))

    def _add(self, clusters: Clusters, references: NDArray[np.int64]) -> None:
        np.add.at(self.references, clusters, references.astype(self.references.dtype))

    def _compressed(self, words: Words, at: Clusters, first: int) -> None:
        """Count each host cluster that compressed data touches."""
        geometry, bits = self.geometry, self.bits
        rows = first + at // geometry.l2_entries
        self._l2_findings(Problem.COPIED_ON_COMPRESSED, words, at, words >= np.uint64(COPIED), first)
        if self.has_data_file:
            self._l2_findings(Problem.DATA_FILE, words, at, np.ones(len(words), bool), first)
            return
        active = int(self.tables.active[rows].sum())
        self.allocated += active
        self.compressed += active
        self.fragmented += active
        starts = (words & np.uint64(geometry.compressed_offset_mask)).view(np.int64)
        sectors = ((words >> np.uint64(geometry.compressed_shift)) & np.uint64(geometry.compressed_sectors_mask)).view(np.int64)
        ends = (starts // SECTOR_BYTES + sectors + 1) * SECTOR_BYTES
        past_end = (starts >= self.size) | (ends - self.size >= self.cluster_bytes)
        if past_end.any():
            self._l2_findings(Problem.PAST_END, words, at, past_end, first)
            self._note_past_end(int(starts[past_end].min()))
            inside = ~past_end
            starts, ends, rows = starts[inside], ends[inside], rows[inside]
        touched, last = starts >> bits, (ends - 1) >> bits
        references = self.tables.references[rows]
        while len(touched):
            self._add(touched, references)
            more = touched < last
            touched, last, references = touched[more] + 1, last[more], references[more]

    def _judge_bitmaps(self, words: Words, bitmaps: Words, first: int) -> None:
        """The subcluster bitmaps of extended entries."""
        compressed = words & np.uint64(COMPRESSED) != 0
        unallocated = ~compressed & (words & np.uint64(OFFSET_MASK) == 0)
        if self.has_data_file:
            unallocated &= words < np.uint64(COPIED)
        wrong = bitmaps & (bitmaps >> np.uint64(32)) & np.uint64(_SUBCLUSTERS_ALLOCATED) != 0
        wrong |= compressed & (bitmaps != 0)
        wrong |= unallocated & (bitmaps & np.uint64(_SUBCLUSTERS_ALLOCATED) != 0)
        if wrong.any():
            self._l2_findings(Problem.SUBCLUSTERS, bitmaps, np.arange(len(words)), wrong, first)

    def _l2_findings(self, problem: Problem, words: Words, at: Clusters, wrong: NDArray[np.bool_], first: int) -> None:
        if not wrong.any():
            return
        which = np.flatnonzero(wrong)

        def make(count: int) -> Iterable[Finding]:
            for position in which[:count].tolist():
                place, index = self._place(int(at[position]), first)
                entry = int(words[position])
                mask = self.geometry.compressed_offset_mask if entry & COMPRESSED else OFFSET_MASK
                detail = "a compressed cluster in an image with an external data file" if problem is Problem.DATA_FILE else ""
                yield Finding(problem, Grade.FATAL, place, index, offset=entry & mask, entry=entry, detail=detail)

        self.found.add_many(problem, Grade.FATAL, len(which), make)

    def _place(self, at: int, first: int) -> tuple[str, tuple[int, int]]:
        """Where entry ``at`` of a piece that begins with table ``first`` stands."""
        row, l2_index = divmod(at, self.geometry.l2_entries)
        tables = self.tables
        return f"{self.l1_names[int(tables.l1[first + row])]}L2", (int(tables.index[first + row]), l2_index)

    # COPIED flags

    def _judge_suspects(self) -> None:
        """Read again the tables in which a COPIED flag is wrong, now that the references of each cluster are known."""
        for first, stop in _merged(self.suspects):
            for piece_first, piece_stop in self._pieces(first, stop):
                self._judge_flags(piece_first, piece_stop)

    def _judge_flags(self, first: int, stop: int) -> None:
        words, _ = self._read_piece(first, stop)
        at = np.flatnonzero((words != 0) & (words & np.uint64(COMPRESSED) == 0))
        words = words[at]
        copied = words >= np.uint64(COPIED)
        if self.has_data_file:
            wrong = ~copied & (words & np.uint64(OFFSET_MASK) != 0)
        else:
            wrong = ((self.stored[self._clipped(words)] == 1) != copied) & (words & np.uint64(OFFSET_MASK) != 0)
        wrong &= self.tables.active[first + at // self.geometry.l2_entries] != 0
        which = np.flatnonzero(wrong)
        if len(which):
            self._copied_findings(words[which], lambda n: self._place(int(at[which[n]]), first))

    def _copied_findings(self, words: Words, place: Callable[[int], tuple[str, tuple[int, ...]]]) -> None:
        """Findings for entries whose COPIED flag does not agree with the stored count. ``place`` says where the n-th stands."""
        clusters = self._clipped(words)
        copied = words >= np.uint64(COPIED)
        within = np.minimum(clusters, self.clusters)
        shared = copied & (self.references[within] > 1) & (clusters == within)
        for problem, grade, which in (
            (Problem.COPIED_SET, Grade.FATAL, np.flatnonzero(shared)),
            (Problem.COPIED_SET, Grade.HARMLESS, np.flatnonzero(copied & ~shared)),
            (Problem.COPIED_CLEAR, Grade.HARMLESS, np.flatnonzero(~copied)),
        ):

            def make(count: int, problem: Problem = problem, grade: Grade = grade, which: Clusters = which) -> Iterable[Finding]:
                for n in which[:count].tolist():
                    where, index = place(n)
                    entry, cluster = int(words[n]), int(clusters[n])
                    stored, references = int(self.stored[cluster]), int(self.references[within[n]])
                    offset = entry & OFFSET_MASK
                    yield Finding(problem, grade, where, index, cluster, offset, entry, stored, references)

            self.found.add_many(problem, grade, len(which), make)


_LITTLE: Final = np.dtype(np.uint16).newbyteorder("<") == np.dtype(np.uint16)


def _runs(clusters: Clusters) -> list[tuple[int, int]]:
    """Positions (start, stop) of the runs of consecutive clusters."""
    ends = (np.flatnonzero(clusters[1:] - clusters[:-1] != 1) + 1).tolist()
    return list(zip([0, *ends], [*ends, len(clusters)], strict=True))


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same runs in order, those that touch or overlap joined."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged
