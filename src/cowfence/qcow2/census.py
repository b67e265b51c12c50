"""The ground that the passes of ``verify`` share: the file, what is claimed, what is stored, what was counted and found."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.findings import Collector, Finding, Grade, Problem
from cowfence.qcow2.geometry import OFFSET_MASK, TABLE_ENTRY_BYTES, Geometry
from cowfence.storage.base import Storage, read_padded
from cowfence.units import div_up

Words = NDArray[np.uint64]
Clusters = NDArray[np.int64]
Counts = NDArray[Any]
Flags = NDArray[np.bool_]

LITTLE_ENDIAN: Final = sys.byteorder == "little"


class ImageFile:
    """Reads of the image file; what lies past its end reads as zeros."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def bytes_at(self, offset: int, length_bytes: int) -> NDArray[np.uint8]:
        data = np.empty(length_bytes, np.uint8)
        read_padded(self._storage, offset, data.data)
        return data

    def words(self, offset: int, count: int) -> Words:
        return self.bytes_at(offset, count * TABLE_ENTRY_BYTES).view(">u8").astype(np.uint64)

    def clusters(self, clusters: Clusters, bits: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The bytes of some clusters, one row for each, in ``buffer``; neighbours are read in one call."""
        rows = buffer[: len(clusters) << bits].reshape(-1, 1 << bits)
        view = buffer.data
        for start, stop in runs_of(clusters):
            read_padded(self._storage, int(clusters[start]) << bits, view[start << bits : stop << bits])
        return rows


class Claims:
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


class Census:
    """Counts by host cluster, and findings.

    ``stored``: the refcounts on disk; as long as whole refcount blocks. ``references``: those counted, for one cluster more
    than the file has, because a structure may lack the tail of its last cluster, and compressed data even all of it.
    """

    def __init__(self, storage: Storage, geometry: Geometry) -> None:
        self.geometry = geometry
        self.bits = geometry.cluster_bits
        self.cluster_bytes = geometry.cluster_bytes
        self.size = storage.size()
        self.clusters = div_up(self.size, geometry.cluster_bytes)
        self.misaligned_mask = OFFSET_MASK & geometry.cluster_mask
        """Bits that an offset in an entry can have and an aligned one has not."""
        self.found = Collector()
        self.complete = True
        self.lowest_past_end: int | None = None
        self.stored: Counts = np.empty(0, np.uint8)
        self.references: Counts = np.empty(0, np.uint8)
        self.counted = 0
        """How many references were added to ``references``."""

    def note_past_end(self, offset: int) -> None:
        """Something refers to ``offset``, which lies past the end of the file."""
        if self.lowest_past_end is None or offset < self.lowest_past_end:
            self.lowest_past_end = offset

    def add_past_end(self, place: str, index: tuple[int, ...], offset: int, entry: int | None = None) -> None:
        self.found.add(Finding(Problem.PAST_END, Grade.FATAL, place, index, offset=offset, entry=entry))
        self.note_past_end(offset)

    def add_references(self, clusters: Clusters, references: NDArray[np.int64]) -> None:
        """Each of ``clusters`` has so many references more; the same cluster may stand there several times."""
        np.add.at(self.references, clusters, references.astype(self.references.dtype))
        self.counted += int(references.sum())

    def counts_overflowed(self) -> bool:
        """True if a count was too large for the type of ``references``: then their sum is not what was counted."""
        return int(self.references.sum(dtype=np.uint64)) != self.counted

    def stored_index(self, words: Words) -> Clusters:
        """The clusters that entries lead to; those past the file's end lead to the last count, which is 0."""
        clusters = ((words & np.uint64(OFFSET_MASK)) >> np.uint64(self.bits)).view(np.int64)
        return np.minimum(clusters, len(self.stored) - 1)

    def add_copied_findings(self, words: Words, place: Callable[[int], tuple[str, tuple[int, ...]]]) -> None:
        """Findings for entries whose COPIED flag does not agree with the stored count. ``place`` says where the n-th stands."""
        clusters = self.stored_index(words)
        copied = words >= np.uint64(COPIED)
        within = np.minimum(clusters, self.clusters)
        shared = copied & (self.references[within] > 1) & (clusters == within)
        for problem, grade, which in (
            (Problem.COPIED_SET, Grade.FATAL, np.flatnonzero(shared)),
            (Problem.COPIED_SET, Grade.HARMLESS, np.flatnonzero(copied & ~shared)),
            (Problem.COPIED_CLEAR, Grade.HARMLESS, np.flatnonzero(~copied)),
        ):

            def make(
                count: int, problem: Problem = problem, grade: Grade = grade, which: Clusters = which
            ) -> Iterable[Finding]:
                for n in which[:count].tolist():
                    where, index = place(n)
                    entry, cluster = int(words[n]), int(clusters[n])
                    stored, references = int(self.stored[cluster]), int(self.references[within[n]])
                    offset = entry & OFFSET_MASK
                    yield Finding(problem, grade, where, index, cluster, offset, entry, stored, references)

            self.found.add_many(problem, grade, len(which), make)


def runs_of(clusters: Clusters) -> list[tuple[int, int]]:
    """Positions (start, stop) of the runs of consecutive clusters."""
    ends = (np.flatnonzero(clusters[1:] - clusters[:-1] != 1) + 1).tolist()
    return list(zip([0, *ends], [*ends, len(clusters)], strict=True))
