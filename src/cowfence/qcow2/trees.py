"""Whole trees of tables at once, by array arithmetic: what an operation on snapshots counts, and the COPIED flags it switches.

A *tree* is what one L1 table leads to: its L2 tables, and the clusters that their entries lead to; the L1 table itself is not
in it. Before anything changes, the whole image is surveyed (``verify``): where a count is below the references, or anything
else is fatally wrong, the operation is refused, because counting down would free what somebody needs. The survey's counts are
the ground for the rest: no block is counted twice, and tables that were one ramp are not even read again.

Counts and flags are written straight into their places, a block or a few tables at a time, not by way of the pending
transaction, which would hold them all. So whoever calls this sees to the order and the fences, and reads the state again
before it makes a transaction (the cached blocks are out of date). Memory is a few bytes for each cluster of the file.

A count that is written is the one known from the survey and the changes since, never the one on disk plus something: so that
it can be written again, and a failed increment undone. What the block counts besides stays as it is on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cowfence.errors import Corrupt, CowfenceError, Invalid
from cowfence.qcow2.census import Census, Clusters, Counts, ImageFile, Words, runs_of
from cowfence.qcow2.entries import COMPRESSED, COPIED
from cowfence.qcow2.findings import Grade
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind, counts_bytes, counts_view
from cowfence.qcow2.transaction import Change, Stage, write_changes
from cowfence.qcow2.verify import Survey, survey
from cowfence.qcow2.verify_l2 import L2Judge, L2Tables
from cowfence.storage.base import read_exact
from cowfence.units import KIB, MIB, div_up

_PIECE_BYTES: Final = 1 * MIB
_PIECE_COUNTS: Final = 256 * KIB
_COPIED_ON_DISK: Final = np.frombuffer(COPIED.to_bytes(8, "big"), np.uint64)[0]
"""The flag as it stands in a big-endian entry that is read as a native word: so that tables are changed without a swap."""


class Trees:
    """The trees of one image that nobody else works on. Raises Corrupt where the image is damaged."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._file = ImageFile(state.storage)
        self._survey = survey(state.storage)
        refuse_damage(self._survey, state.storage.name)
        self._stored: Counts = self._survey.census.stored
        """The count of each cluster, with what was written here."""
        self._raised: Counts | None = None

    def references(self, l1_offset: int, l1_entries: int) -> Counts:
        """How often the tree of an L1 table leads to each cluster."""
        found = self._survey
        census = Census(self._state.storage, self._state.geometry)
        census.stored = found.census.stored
        # Not zeros_like: that would touch every page of it.
        census.references = np.zeros(len(found.census.references), found.census.references.dtype)
        clusters, times = np.unique(self._l2_clusters(l1_offset, l1_entries), return_counts=True)
        starts = self._ramp_starts(clusters)
        is_ramp = starts != 0
        per = self._state.geometry.l2_entries
        counts = census.references
        for entry, more in zip(starts[is_ramp].tolist(), times[is_ramp].tolist(), strict=True):
            first = (entry & OFFSET_MASK) >> census.bits
            counts[first : first + per] += counts.dtype.type(more)
        others, none = clusters[~is_ramp], np.zeros(int((~is_ramp).sum()), np.int64)
        tables = L2Tables(others, times[~is_ramp], none, none, none)
        L2Judge(census, self._file, tables, [""], has_data_file=self._state.geometry.external_data).judge(None)
        counts[clusters] += times.astype(counts.dtype)
        return counts

    def check_room(self, tree: Counts) -> None:
        """Raises Invalid where the image's refcounts are too narrow to count a tree once more."""
        limit = self._stored.dtype.type(min(self._state.geometry.refcount_max, np.iinfo(self._stored.dtype).max))
        for first in range(0, len(tree), _PIECE_COUNTS):
            more = tree[first : first + _PIECE_COUNTS]
            if (more > limit - self._stored[first : first + len(more)]).any():
                raise Invalid(
                    f"{self._state.storage.name}: refcounts of {self._state.geometry.refcount_bits} bits cannot count one more "
                    "snapshot"
                )

    # Counts

    def raise_counts(self, tree: Counts) -> None:
        """PREPARE: one reference more for all that a tree leads to. ``check_room`` first."""
        self._raised = tree
        self._add(tree, 1)
        self._write_counts(tree, Stage.PREPARE, "refcount.increment")

    def lower_counts(self, tree: Counts) -> None:
        """RECLAIM: one reference less for all that a tree leads to, and the host space of what nothing leads to any more is
        given back. Not fenced."""
        self._state.committer.unfenced_reclaim = True
        self._add(tree, -1)
        self._write_counts(tree, Stage.RECLAIM, "refcount.decrement", discard=self._state.discards)

    def take_back(self) -> None:
        """What ``raise_counts`` did, or did in part, is undone: nothing that leads there was ever linked. Not fenced."""
        if self._raised is not None:
            self._add(self._raised, -1)
            self._write_counts(self._raised, Stage.RECLAIM, "refcount.decrement")
            self._raised = None

    def _add(self, tree: Counts, sign: int) -> None:
        stored = self._stored[: len(tree)]
        (np.add if sign > 0 else np.subtract)(stored, tree, out=stored, casting="unsafe")

    def _write_counts(self, tree: Counts, stage: Stage, mark: str, *, discard: bool = False) -> None:
        """Write the counts of all that a tree leads to; ``discard``: and give back the host space of what nothing leads to."""
        state = self._state
        per_block = state.geometry.refcounts_per_block
        for index in range(div_up(len(tree), per_block)):
            first = index * per_block
            changed = tree[first : first + per_block] != 0
            if not changed.any():
                continue
            offset = state.refcounts.block_offset(index)
            if offset is None:
                raise Corrupt(f"{state.storage.name}: refcount table[{index}]", "its block is missing")
            counts = self._stored[first : first + per_block]
            if len(changed) < per_block or not changed.all():
                counts = self._block(offset)
                np.copyto(counts[: len(changed)], self._stored[first : first + len(changed)], where=changed, casting="unsafe")
            data = counts_bytes(counts, state.geometry.refcount_bits)
            write_changes(state.storage, state.layout, [Change(stage, 0, offset, data, mark, Kind.REFCOUNT_BLOCK)])
            if discard:
                self._punch(np.flatnonzero(changed & (self._stored[first : first + len(changed)] == 0)) + first)

    def _block(self, offset: int) -> Counts:
        """The counts of a block, as they stand on disk, in an array of its own."""
        bits = self._state.geometry.refcount_bits
        data = self._file.bytes_at(offset, self._state.geometry.cluster_bytes)
        return data.view(f">u{bits // 8}").astype(f"u{bits // 8}") if bits >= 8 else counts_view(data, bits)

    def _punch(self, emptied: Clusters) -> None:
        bits = self._state.geometry.cluster_bits
        for start, stop in runs_of(emptied) if len(emptied) else ():
            try:
                self._state.storage.discard(int(emptied[start]) << bits, (stop - start) << bits, "host.discard")
            except CowfenceError:
                # Space that the host would not take back costs nothing but space.
                return

    # The COPIED flags

    def clear_copied(self, l1_offset: int, l1_entries: int, *, active: bool) -> bool:
        """The flag off in the L2 tables of a tree, and in its L1 table if that is the active one; True if it was on anywhere.

        In LINK, and not fenced. As long as there is one reference, a flag that is off is harmless.
        """
        written = active and self._switch_l1(l1_offset, l1_entries, on=False)
        for clusters, rows in self._tables(l1_offset, l1_entries):
            entries = self._entries(rows)
            on = (np.bitwise_or.reduce(entries, axis=1) & _COPIED_ON_DISK) != 0
            if on.any():
                entries &= ~_COPIED_ON_DISK
                self._write_tables(clusters, rows, on, "copied_off.link")
                written = True
        return written

    def set_copied(self, l1_offset: int, l1_entries: int) -> None:
        """The flag on in the active L1 and L2 tables, where the count is one. In LINK, and not fenced."""
        self._state.committer.unfenced_reclaim = True
        self._switch_l1(l1_offset, l1_entries, on=True)
        per = self._state.geometry.l2_entries
        for clusters, rows in self._tables(l1_offset, l1_entries):
            entries = self._entries(rows)
            changed = np.zeros(len(rows), bool)
            for at, start in enumerate(self._ramp_starts(clusters).tolist()):
                first = (start & OFFSET_MASK) >> self._state.geometry.cluster_bits
                if start and (self._stored[first : first + per] == 1).all():
                    # All the entries of a ramp have the same flags.
                    if not entries[at, 0] & _COPIED_ON_DISK:
                        entries[at] |= _COPIED_ON_DISK
                        changed[at] = True
                else:
                    single = self._single(entries[at])
                    changed[at] = single.any()
                    entries[at][single] |= _COPIED_ON_DISK
            self._write_tables(clusters, rows, changed, "copied_on.link")

    def _single(self, entries: Words) -> NDArray[np.bool_]:
        """Which entries lack the flag, though the one reference to their cluster is theirs."""
        words: Words = entries.view(">u8").astype(np.uint64)
        plain = (words & np.uint64(COPIED | COMPRESSED) == 0) & (words & np.uint64(OFFSET_MASK) != 0)
        single: NDArray[np.bool_] = plain & (self._stored[self._survey.census.stored_index(words)] == 1)
        return single

    def _switch_l1(self, l1_offset: int, l1_entries: int, *, on: bool) -> bool:
        state = self._state
        if not l1_entries:
            return False
        data = read_exact(state.storage, l1_offset, l1_entries * 8, Kind.L1.value)
        entries = np.frombuffer(data, np.uint64)
        changed = self._single(entries) if on else entries & _COPIED_ON_DISK != 0
        if not changed.any():
            return False
        entries[changed] ^= _COPIED_ON_DISK
        mark = "copied_on.link" if on else "copied_off.link"
        write_changes(state.storage, state.layout, [Change(Stage.LINK, 0, l1_offset, data, mark, Kind.L1)])
        return True

    def _tables(self, l1_offset: int, l1_entries: int) -> Iterator[tuple[Clusters, NDArray[np.uint8]]]:
        """The L2 tables of a tree, each once, a few at a time: their clusters and their bytes, one row for each."""
        bits = self._state.geometry.cluster_bits
        clusters = np.unique(self._l2_clusters(l1_offset, l1_entries))
        step = max(1, _PIECE_BYTES >> bits)
        buffer = np.empty(min(step, len(clusters)) << bits, np.uint8)
        for first in range(0, len(clusters), step):
            piece = clusters[first : first + step]
            yield piece, self._file.clusters(piece, bits, buffer)

    def _entries(self, rows: NDArray[np.uint8]) -> Words:
        """The entries of some tables as they stand on disk, without their subcluster bitmaps."""
        return rows.view(np.uint64)[:, :: self._state.geometry.l2_entry_bytes // 8]

    def _write_tables(self, clusters: Clusters, rows: NDArray[np.uint8], changed: NDArray[np.bool_], mark: str) -> None:
        state = self._state
        changes = []
        for at in np.flatnonzero(changed).tolist():
            offset = int(clusters[at]) << state.geometry.cluster_bits
            # Tables of snapshots are not in the layout; the survey has shown that nothing else stands there.
            state.layout.claim(offset, 1, Kind.L2)
            changes.append(Change(Stage.LINK, 0, offset, rows[at].data, mark, Kind.L2))
        write_changes(state.storage, state.layout, changes)

    # What a tree is

    def _l2_clusters(self, l1_offset: int, l1_entries: int) -> Clusters:
        words = self._file.words(l1_offset, l1_entries)
        offsets = words[words != 0] & np.uint64(OFFSET_MASK)
        clusters: Clusters = (offsets >> np.uint64(self._state.geometry.cluster_bits)).view(np.int64)
        return clusters

    def _ramp_starts(self, clusters: Clusters) -> Words:
        """The first entry of each of these tables that the survey found to be one ramp, 0 for any other."""
        judge = self._survey.judge
        return judge.ramp_starts[np.searchsorted(judge.tables.clusters, clusters)]


def refuse_damage(found: Survey, name: str) -> None:
    """Raises Corrupt where counts cannot be trusted, or references may be hidden."""
    report = found.report
    if report.fatal or not report.complete or report.refcounts_damaged:
        finding = next((finding for finding in report.findings if finding.grade is Grade.FATAL), None)
        where, what = (finding.where, finding.what) if finding else ("refcounts", "they cannot be trusted")
        raise Corrupt(f"{name}: {where}", f"{what}; the image is damaged, and must be repaired first (check -r all)")
