"""The pass of ``verify`` over the L2 tables, which hold nearly all references of an image.

Tables are read and judged in pieces of a quarter MiB, so that a piece and the arrays made from it stay in the processor's
cache. A piece takes the first of three ways that fits:

1. Each table is one ramp (every entry is the one before plus a cluster), as sequential writing and preallocation make them:
   one subtraction and one comparison prove it, and each table is counted by one slice.
2. The OR of all entries has no odd bit, and no entry leads past the end: counted by slices where runs are long, else by index.
3. Entries are told apart by masks: compressed, reserved bits, misaligned, past the end. What is sound goes on as in 2.

COPIED is compared with the stored count at once, but a wrong flag is graded by the number of references, which is known only
when all is counted: such tables are remembered, and read again by ``judge_suspects``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cowfence.qcow2.census import LITTLE_ENDIAN, Census, Clusters, Flags, ImageFile, Words
from cowfence.qcow2.entries import COMPRESSED, COPIED, ZERO
from cowfence.qcow2.findings import Finding, Grade, Problem
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.units import KIB, SECTOR_BYTES

_PIECE_BYTES: Final = 256 * KIB
_RUN_LENGTH: Final = 16
"""Slices are faster than indices where runs of consecutive clusters are longer than this on average."""
_STANDARD_RESERVED: Final = ((1 << 62) - 1) & ~OFFSET_MASK & ~ZERO
_SUBCLUSTERS_ALLOCATED: Final = (1 << 32) - 1


class L2Tables(NamedTuple):
    """The L2 tables of the image, each once, in the order of the file.

    ``references``: how many L1 entries lead to each; ``active``: how many of them in the active L1. ``l1``, ``l1_index``: the
    first entry that does, by the number of its L1 (0: the active one) and its index there.
    """

    clusters: Clusters
    references: NDArray[np.int64]
    active: NDArray[np.int64]
    l1: NDArray[np.int64]
    l1_index: NDArray[np.int64]


class L2Judge:
    """Counts and judges the entries of all L2 tables. ``l1_names``: what stands before ``L2[...]`` in messages."""

    def __init__(self, census: Census, file: ImageFile, tables: L2Tables, l1_names: list[str], *, has_data_file: bool) -> None:
        geometry = census.geometry
        self.census = census
        self.geometry = geometry
        self.tables = tables
        self.allocated = self.fragmented = self.compressed = 0
        self.ramps = 0
        """References to tables that were one ramp each, so that none of them refers to a cluster twice."""
        self.ramp_starts: Words = np.zeros(len(tables.clusters), np.uint64)
        """The first entry of each table that was a ramp, which says it all; 0 of any other."""
        self._file = file
        self._l1_names = l1_names
        self._has_data_file = has_data_file
        self._suspects: list[tuple[int, int]] = []
        """Runs of tables in which a COPIED flag is wrong."""
        self._allowed_zero = 0 if geometry.version < 3 or geometry.extended_l2 else ZERO
        self._odd = _STANDARD_RESERVED | COMPRESSED | census.misaligned_mask | ZERO & ~self._allowed_zero
        self._single = bool((tables.references == 1).all())
        """Every table has one reference."""
        self._all_active = bool((tables.active == 1).all())
        self._one = census.references.dtype.type(1)
        self._tables_per_piece = max(1, _PIECE_BYTES >> census.bits)
        self._raw = bytearray()
        self._ramp: Words | None = None
        self._scratch_raw = bytearray()
        if len(tables.clusters):
            self._raw = bytearray(min(self._tables_per_piece, len(tables.clusters)) << census.bits)
            if not geometry.extended_l2 and not has_data_file:
                self._ramp = np.arange(geometry.l2_entries, dtype=np.uint64) << np.uint64(census.bits)
                self._scratch_raw = bytearray(len(self._raw))
        self._buffer = np.frombuffer(self._raw, np.uint8)
        self._scratch = np.frombuffer(self._scratch_raw, np.uint64)

    def judge(self, progress: Callable[[float], None] | None) -> None:
        """All tables. ``progress`` is told the fraction that is done."""
        total = len(self.tables.clusters)
        for number, (first, stop) in enumerate(self._pieces(0, total)):
            self._judge_piece(first, stop)
            if progress is not None and not number & 15:
                progress(stop / total)

    def pieces(self) -> Iterator[tuple[int, int, Words]]:
        """The tables again, for who repairs: first and stop of a piece, and its entries, one row for each table."""
        for first, stop in self._pieces(0, len(self.tables.clusters)):
            words, _ = self._read(first, stop)
            yield first, stop, words.reshape(stop - first, -1)

    def _pieces(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        for at in range(first, stop, self._tables_per_piece):
            yield at, min(at + self._tables_per_piece, stop)

    def _read_raw(self, first: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of some tables, one after the other."""
        return self._file.clusters(self.tables.clusters[first:stop], self.census.bits, self._buffer).reshape(-1)

    def _read(self, first: int, stop: int) -> tuple[Words, Words | None]:
        """The entries of some tables, and their subcluster bitmaps where they have some."""
        return self._decoded(self._read_raw(first, stop))

    def _decoded(self, raw: NDArray[np.uint8]) -> tuple[Words, Words | None]:
        words: Words
        if LITTLE_ENDIAN:
            words = raw.view(np.uint64).byteswap(inplace=True)
        else:
            words = raw.view(">u8").astype(np.uint64)
        if self.geometry.extended_l2:
            return words[0::2].copy(), words[1::2]
        return words, None

    def _judge_piece(self, first: int, stop: int) -> None:
        raw = self._read_raw(first, stop)
        if self._ramp is not None and self._count_ramps(raw, first, stop):
            return
        words, bitmaps = self._decoded(raw)
        if bitmaps is not None:
            self._judge_subclusters(words, bitmaps, first)
        ones = int(np.bitwise_or.reduce(words))
        if not ones:
            return
        at: Clusters | None = None
        if np.count_nonzero(words) != len(words):
            at = np.flatnonzero(words)
            words = words[at]
        census = self.census
        clusters = ((words & np.uint64(OFFSET_MASK)) >> np.uint64(census.bits)).view(np.int64)
        if ones & self._odd or self._has_data_file or not clusters.min() or clusters.max() >= census.clusters:
            if at is None:
                at = np.arange(len(words))
            kept = self._judge_odd(words, at, first)
            if not kept.any():
                return
            words, at, clusters = words[kept], at[kept], clusters[kept]
        if self._single and self._all_active and not self._has_data_file:
            wrong = self._count(words, at, clusters)
        else:
            wrong = self._count_shared(words, np.arange(len(words)) if at is None else at, clusters, first)
        if wrong:
            self._suspects.append((first, stop))

    # The first way

    def _count_ramps(self, raw: NDArray[np.uint8], first: int, stop: int) -> bool:
        """Count tables that are one ramp each; False, and nothing done, if one is not, or has anything else unusual."""
        assert self._ramp is not None
        ramp, census = self._ramp, self.census
        rows = raw.view(">u8").reshape(stop - first, -1)
        starts = rows[:, 0].astype(np.uint64)
        if (rows[:, -1] != starts + ramp[-1]).any() or (rows[:, 1] != starts + ramp[1]).any():
            return False
        expected = np.add(starts[:, None], ramp, out=self._scratch[: rows.size].reshape(rows.shape))
        if LITTLE_ENDIAN:
            expected.byteswap(inplace=True)
        # Whole buffers compare without a copy, and faster than arrays.
        if rows.nbytes == len(self._raw):
            is_ramp = self._raw == self._scratch_raw
        else:
            is_ramp = self._raw[: rows.nbytes] == self._scratch_raw[: rows.nbytes]
        if not is_ramp:
            return False
        firsts: list[int] = starts.tolist()
        per, bits = len(ramp), census.bits
        plain = COPIED | OFFSET_MASK & ~census.misaligned_mask | self._allowed_zero
        for entry in firsts:
            cluster = (entry & OFFSET_MASK) >> bits
            if entry & ~plain or not cluster or cluster + per > census.clusters:
                return False
        references, stored = census.references, census.stored
        leads = self.tables.references[first:stop]
        active: list[int] = self.tables.active[first:stop].tolist()
        for table, entry, times, is_active in zip(
            range(first, stop), firsts, leads.astype(references.dtype), active, strict=True
        ):
            cluster = (entry & OFFSET_MASK) >> bits
            references[cluster : cluster + per] += times
            if is_active:
                single = stored[cluster : cluster + per] == 1
                if not (single.all() if entry & COPIED else not single.any()):
                    self._suspects.append((table, table + 1))
        self.ramp_starts[first:stop] = starts
        total = int(leads.sum())
        census.counted += total * per
        self.allocated += sum(active) * per
        self.ramps += total
        return True

    # The second way

    def _count(self, words: Words, at: Clusters | None, clusters: Clusters) -> bool:
        """Count entries that lead to whole clusters of the file; True if a COPIED flag is wrong.

        ``at``: where in the piece they stand; None: they fill it.
        """
        census, per = self.census, self.geometry.l2_entries
        self.allocated += len(words)
        breaks = clusters[1:] - clusters[:-1] != 1
        broken = int(np.count_nonzero(breaks))
        if broken:
            if at is None:
                self.fragmented += broken - int(np.count_nonzero(breaks[per - 1 :: per]))
            else:
                tables = at // per
                self.fragmented += int(np.count_nonzero(breaks & (tables[1:] == tables[:-1])))
        if broken * _RUN_LENGTH < len(words):
            if self._count_runs(clusters, breaks) and int(np.bitwise_and.reduce(words)) & COPIED:
                return False
        else:
            np.add.at(census.references, clusters, self._one)
            census.counted += len(clusters)
        return bool(((census.stored[clusters] == 1) != (words >= np.uint64(COPIED))).any())

    def _count_runs(self, clusters: Clusters, breaks: Flags) -> bool:
        """Count runs of consecutive clusters; True if the stored count of all of them is 1."""
        references, stored, one = self.census.references, self.census.stored, self._one
        all_single = True
        start = 0
        for end in (*(np.flatnonzero(breaks) + 1).tolist(), len(clusters)):
            cluster = int(clusters[start])
            stop = cluster + end - start
            references[cluster:stop] += one
            self.census.counted += stop - cluster
            if all_single:
                all_single = bool((stored[cluster:stop] == 1).all())
            start = end
        return all_single

    def _count_shared(self, words: Words, at: Clusters, clusters: Clusters, first: int) -> bool:
        """The same where tables have several references or belong to snapshots only, or the data is in another file."""
        census = self.census
        rows = first + at // self.geometry.l2_entries
        active = self.tables.active[rows]
        self.allocated += int(active.sum())
        breaks = (clusters[1:] - clusters[:-1] != 1) & (rows[1:] == rows[:-1])
        self.fragmented += int((active[1:] * breaks).sum())
        if self._has_data_file:
            wrong = words < np.uint64(COPIED)
        else:
            census.add_references(clusters, self.tables.references[rows])
            wrong = (census.stored[clusters] == 1) != (words >= np.uint64(COPIED))
        return bool((wrong & (active != 0)).any())

    # The third way

    def _judge_odd(self, words: Words, at: Clusters, first: int) -> Flags:
        """Judge entries that are not plain; returns which of them lead to a whole cluster that is to be counted."""
        compressed = words & np.uint64(COMPRESSED) != 0
        standard = ~compressed
        if compressed.any():
            self._judge_compressed(words[compressed], at[compressed], first)
        offsets = words & np.uint64(OFFSET_MASK)
        copied = words >= np.uint64(COPIED)
        reserved = standard & (words & np.uint64(_STANDARD_RESERVED) != 0)
        self._add_findings(Problem.RESERVED_BITS, words, at, reserved, first)
        if not self._allowed_zero:
            self._add_findings(Problem.ZERO_FLAG, words, at, standard & (words & np.uint64(ZERO) != 0), first)
        allocated = standard & (offsets != 0)
        if self._has_data_file:
            allocated |= standard & copied
        else:
            self._add_findings(Problem.COPIED_WITHOUT_CLUSTER, words, at, standard & copied & (offsets == 0), first)
        misaligned = allocated & (offsets & np.uint64(self.census.misaligned_mask) != 0)
        past_end = allocated & (offsets >= self.census.size)
        if self._has_data_file:
            past_end[:] = False
        bad = misaligned | past_end
        if bad.any():
            self._add_findings(Problem.MISALIGNED, words, at, misaligned, first)
            self._add_findings(Problem.PAST_END, words, at, past_end, first)
            self._count_bad_offsets(offsets, first + at // self.geometry.l2_entries, misaligned & ~past_end, past_end, bad)
        sound: Flags = allocated & ~bad
        return sound

    def _count_bad_offsets(self, offsets: Words, rows: Clusters, misaligned: Flags, past_end: Flags, bad: Flags) -> None:
        """Count what misaligned entries touch (two clusters each), and note those past the end."""
        if misaligned.any() and not self._has_data_file:
            clusters = (offsets[misaligned] >> np.uint64(self.census.bits)).view(np.int64)
            for touched in (clusters, clusters + 1):
                self.census.add_references(touched, self.tables.references[rows[misaligned]])
        if past_end.any():
            self.census.note_past_end(int(offsets[past_end].min()))
        rows = rows[bad]
        self.allocated += int(self.tables.active[rows].sum())
        self._suspects.append((int(rows[0]), int(rows[-1]) + 1))

    def _judge_compressed(self, words: Words, at: Clusters, first: int) -> None:
        """Count each host cluster that compressed data touches."""
        geometry, census = self.geometry, self.census
        self._add_findings(Problem.COPIED_ON_COMPRESSED, words, at, words >= np.uint64(COPIED), first)
        if self._has_data_file:
            self._add_findings(Problem.DATA_FILE, words, at, np.ones(len(words), bool), first)
            return
        rows = first + at // geometry.l2_entries
        active = int(self.tables.active[rows].sum())
        self.allocated += active
        self.compressed += active
        self.fragmented += active
        starts = (words & np.uint64(geometry.compressed_offset_mask)).view(np.int64)
        sectors = ((words >> np.uint64(geometry.compressed_shift)) & np.uint64(geometry.compressed_sectors_mask)).view(np.int64)
        ends = (starts // SECTOR_BYTES + sectors + 1) * SECTOR_BYTES
        past_end = (starts >= census.size) | (ends - census.size >= census.cluster_bytes)
        if past_end.any():
            self._add_findings(Problem.PAST_END, words, at, past_end, first)
            census.note_past_end(int(starts[past_end].min()))
            inside = ~past_end
            starts, ends, rows = starts[inside], ends[inside], rows[inside]
        touched, last = starts >> census.bits, (ends - 1) >> census.bits
        references = self.tables.references[rows]
        while len(touched):
            census.add_references(touched, references)
            more = touched < last
            touched, last, references = touched[more] + 1, last[more], references[more]

    def _judge_subclusters(self, words: Words, bitmaps: Words, first: int) -> None:
        compressed = words & np.uint64(COMPRESSED) != 0
        unallocated = ~compressed & (words & np.uint64(OFFSET_MASK) == 0)
        if self._has_data_file:
            unallocated &= words < np.uint64(COPIED)
        wrong = bitmaps & (bitmaps >> np.uint64(32)) & np.uint64(_SUBCLUSTERS_ALLOCATED) != 0
        wrong |= compressed & (bitmaps != 0)
        wrong |= unallocated & (bitmaps & np.uint64(_SUBCLUSTERS_ALLOCATED) != 0)
        self._add_findings(Problem.SUBCLUSTERS, bitmaps, np.arange(len(words)), wrong, first)

    # Findings

    def _add_findings(self, problem: Problem, words: Words, at: Clusters, wrong: Flags, first: int) -> None:
        if not wrong.any():
            return
        which = np.flatnonzero(wrong)
        detail = "a compressed cluster in an image with an external data file" if problem is Problem.DATA_FILE else ""

        def make(count: int) -> Iterable[Finding]:
            for position in which[:count].tolist():
                place, index = self._place(int(at[position]), first)
                entry = int(words[position])
                offset = entry & (self.geometry.compressed_offset_mask if entry & COMPRESSED else OFFSET_MASK)
                yield Finding(problem, Grade.FATAL, place, index, offset=offset, entry=entry, detail=detail)

        self.census.found.add_many(problem, Grade.FATAL, len(which), make)

    def _place(self, at: int, first: int) -> tuple[str, tuple[int, int]]:
        """Where entry ``at`` of a piece that begins with table ``first`` stands."""
        row, l2_index = divmod(at, self.geometry.l2_entries)
        tables = self.tables
        return f"{self._l1_names[int(tables.l1[first + row])]}L2", (int(tables.l1_index[first + row]), l2_index)

    def judge_suspects(self) -> None:
        """Read again the tables in which a COPIED flag is wrong, now that the references of each cluster are known."""
        for first, stop in _merged(self._suspects):
            for piece_first, piece_stop in self._pieces(first, stop):
                self._judge_flags(piece_first, piece_stop)

    def _judge_flags(self, first: int, stop: int) -> None:
        words, _ = self._read(first, stop)
        at = np.flatnonzero((words & np.uint64(OFFSET_MASK) != 0) & (words & np.uint64(COMPRESSED) == 0))
        words = words[at]
        copied = words >= np.uint64(COPIED)
        wrong = ~copied if self._has_data_file else (self.census.stored[self.census.stored_index(words)] == 1) != copied
        wrong &= self.tables.active[first + at // self.geometry.l2_entries] != 0
        which = np.flatnonzero(wrong)
        if len(which):
            self.census.add_copied_findings(words[which], lambda n: self._place(int(at[which[n]]), first))


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same runs in order, those that touch or overlap joined."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged
