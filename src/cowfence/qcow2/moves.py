"""Moving host clusters: what a compaction does, one transaction at a time.

What is moved stands in two places while it moves, and both are whole, so every pointer may be old or new:

    PREPARE  the new place counts as many references as the old one; its content           | fence
    LINK     every pointer to the old place, each inside one sector, in any order          | fence
    RECLAIM  the old place counts none

A cluster that several tables lead to is moved with all its pointers in one LINK. A crash in the middle leaves some old and some
new, on two places that count all of them: COPIED is off in each, since the count is above one, so nobody writes in place.

Counts, tables and pointers are written straight, as in ``trees``; whoever calls this has the image for itself, and reads the
state again when it is over. ``Ground`` is one survey of the image: moves that are planned on it never use a cluster twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import numpy as np

from cowfence.errors import Corrupt, CowfenceError
from cowfence.qcow2.census import Clusters, Flags, ImageFile, Words, runs_of
from cowfence.qcow2.geometry import OFFSET_MASK, TABLE_ENTRY_BYTES
from cowfence.qcow2.header import CRYPT_LUKS
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind, counts_bytes
from cowfence.qcow2.transaction import Change, Stage, write_changes
from cowfence.qcow2.trees import refuse_damage
from cowfence.qcow2.verify import survey
from cowfence.storage.base import read_padded
from cowfence.units import MIB, SECTOR_BYTES

_COPY_BYTES: Final = MIB
_BATCH_BYTES: Final = 64 * MIB
_LINK_MARKS: Final = {
    Kind.HEADER: "header.link",
    Kind.L1: "l1.link",
    Kind.SNAPSHOT_L1: "l1.link",
    Kind.L2: "l2.link",
    Kind.REFCOUNT_TABLE: "refcount_table.link",
    Kind.SNAPSHOT_TABLE: "snapshot_table.link",
    Kind.BITMAPS: "bitmap.link",
}
"""By what the pointers stand in."""


class Pointers(NamedTuple):
    """Words of tables that lead to clusters. ``at``: where each stands in the file, in bytes. ``times``: how many references it
    stands for (a word of an L2 table to which several L1 entries lead counts for each)."""

    at: Clusters
    words: Words
    times: Clusters

    def where(self, chosen: Clusters | Flags) -> Pointers:
        return Pointers(self.at[chosen], self.words[chosen], self.times[chosen])


def joined(parts: Sequence[Pointers]) -> Pointers:
    """All of them as one."""
    if not parts:
        return Pointers(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64))
    return Pointers(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Move(NamedTuple):
    """A transaction. ``raised``, ``lowered``: references more and less, by cluster. ``copy`` writes the content of the new
    clusters, ``link`` the pointers."""

    raised: Mapping[int, int]
    copy: Callable[[], None]
    link: Callable[[], None]
    lowered: Mapping[int, int]


class Ground:
    """The image as it is, with nobody else at work. Raises Corrupt where it is damaged."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.found = found = survey(state.storage)
        refuse_damage(found, state.storage.name)
        if found.shared:
            raise Corrupt(state.storage.name, "two structures lie on one cluster; the image must be repaired first")
        self.geometry = found.geometry
        self.bits = self.geometry.cluster_bits
        self.file = ImageFile(state.storage)
        self.clusters = found.census.clusters
        self.references = found.census.references[: self.clusters]
        used = np.flatnonzero(self.references)
        self.used = len(used)
        self.end = int(used[-1]) + 1 if self.used else 0
        """The cluster behind the last that is in use."""
        self._layout = Layout(state.storage.name, self.bits)
        self._layout.claim_new(0, 1, Kind.HEADER)
        for clusters, kind in ((found.judge.tables.clusters, Kind.L2), (found.blocks[1], Kind.REFCOUNT_BLOCK)):
            for cluster in clusters.tolist():
                self._layout.claim_new(cluster << self.bits, 1, kind)
        self.blocks = dict(zip(*(part.tolist() for part in found.blocks), strict=True))
        """Cluster of each refcount block, by its index."""
        self._stored = found.census.stored
        self._free = np.zeros(self.clusters, bool)
        per_block = self.geometry.refcounts_per_block
        for index in self.blocks:
            part = slice(index * per_block, min((index + 1) * per_block, self.clusters))
            self._free[part] = (self.references[part] == 0) & (self._stored[part] == 0)

    def free_below(self, limit: int) -> Clusters:
        """Clusters that nothing uses and that can be counted, in order."""
        found: Clusters = np.flatnonzero(self._free[:limit])
        return found

    def take(self, clusters: Iterable[int]) -> None:
        """They are in use from now on."""
        self._free[list(clusters)] = False

    def claim(self, offset: int, clusters: int, kind: Kind) -> None:
        """A structure stands here."""
        self._layout.claim_new(offset, clusters, kind)

    # Carrying out

    def carry_out(self, move: Move) -> None:
        """The three stages. What fails before LINK has begun takes its counts back."""
        committer = self.state.committer
        committer.unfenced_reclaim = True
        try:
            self._count(move.raised, 1, Stage.PREPARE, "refcount.increment")
            move.copy()
            committer.fence("prepare.fence")
        except BaseException:
            if committer.broken is None:
                with suppress(CowfenceError):
                    self._count(move.raised, -1, Stage.RECLAIM, "refcount.decrement")
            raise
        move.link()
        committer.fence("link.fence")
        self.lower(move.lowered)

    def link(self, pointers: Pointers, new: Words) -> None:
        """Give pointers their new values. In LINK, and not fenced."""
        order = np.argsort(pointers.at, kind="stable")
        at, words = pointers.at[order], new[order]
        sectors = at // SECTOR_BYTES
        starts = np.flatnonzero(np.diff(sectors, prepend=-1)).tolist()
        changes = []
        for start, stop in zip(starts, [*starts[1:], len(at)], strict=True):
            offset = int(sectors[start]) * SECTOR_BYTES
            sector = self.file.words(offset, SECTOR_BYTES // TABLE_ENTRY_BYTES)
            sector[at[start:stop] % SECTOR_BYTES // TABLE_ENTRY_BYTES] = words[start:stop]
            changes.append(self._link_change(offset, sector.astype(">u8").tobytes()))
        write_changes(self.state.storage, self._layout, changes)

    def link_bytes(self, offset: int, data: bytes) -> None:
        """The same for bytes inside one sector."""
        write_changes(self.state.storage, self._layout, [self._link_change(offset, data)])

    def _link_change(self, offset: int, data: bytes) -> Change:
        kind = self._layout.kinds.get(offset >> self.bits)
        if kind not in _LINK_MARKS:
            raise Corrupt(f"{self.state.storage.name}: offset {offset:#x}", "no table with pointers stands there")
        return Change(Stage.LINK, 0, offset, data, _LINK_MARKS[kind], kind)

    def lower(self, less: Mapping[int, int]) -> None:
        """RECLAIM: so many references less."""
        self._count(less, -1, Stage.RECLAIM, "refcount.decrement")

    def _count(self, references: Mapping[int, int], sign: int, stage: Stage, mark: str) -> None:
        """Change stored counts by ``sign`` times so many."""
        per_block, width = self.geometry.refcounts_per_block, self.geometry.refcount_bits
        changed: dict[int, set[int]] = {}
        for cluster, count in references.items():
            self._stored[cluster] = int(self._stored[cluster]) + sign * count
            changed.setdefault(cluster // per_block, set()).add(cluster % per_block * width // (8 * SECTOR_BYTES))
        changes = []
        for index, sectors in changed.items():
            content = counts_bytes(self._stored[index * per_block : (index + 1) * per_block].copy(), width)
            for sector in sorted(sectors):
                start = sector * SECTOR_BYTES
                offset, data = (self.blocks[index] << self.bits) + start, content[start : start + SECTOR_BYTES]
                changes.append(Change(stage, 0, offset, data, mark, Kind.REFCOUNT_BLOCK))
        write_changes(self.state.storage, self._layout, changes)

    def is_empty(self, index: int) -> bool:
        """True if a refcount block counts nothing."""
        per_block = self.geometry.refcounts_per_block
        return not self._stored[index * per_block : (index + 1) * per_block].any()

    # Content

    def copy(self, sources: Clusters, targets: Clusters, mark: str, kind: Kind | None) -> None:
        """The content of clusters, as it is now, to others. ``kind``: None for guest data, enciphered anew where that depends
        on the place."""
        cipher = self.state.cipher if kind is None and self.state.header.crypt_method == CRYPT_LUKS else None
        together = _COPY_BYTES >> self.bits or 1
        for start, stop in runs_of(sources):
            for first in range(start, stop, together):
                last = min(first + together, stop)
                offset = int(sources[first]) << self.bits
                data = bytearray((last - first) << self.bits)
                read_padded(self.state.storage, offset, data)
                view = memoryview(data)
                for low, high in runs_of(targets[first:last]):
                    place = int(targets[first + low]) << self.bits
                    part = view[low << self.bits : high << self.bits]
                    if cipher is not None:
                        plain = cipher.decrypt(bytearray(part), offset + (low << self.bits), 0)
                        part = memoryview(cipher.encrypt(bytes(plain), place, 0))
                    if kind is None:
                        self._layout.check_data(place >> self.bits, high - low)
                    else:
                        self._layout.claim_new(place, high - low, kind)
                    self.state.storage.writev(place, (part,), mark)

    def write_data(self, offset: int, data: bytes) -> None:
        """Guest data, as it stands in the file."""
        self._layout.check_data(offset >> self.bits, 1)
        self.state.storage.writev(offset, (data,), "data.write")

    # Single clusters

    def move_singles(self, pointers: Pointers, limit: int, mark: str, kind: Kind | None, tell: Callable[[float], None]) -> int:
        """Move what these pointers lead to, from cluster ``limit`` on, below it, as far as there is room.

        Clusters to which other pointers lead, too, stay. ``tell``: called with the fraction that is done. Returns how many were
        moved.
        """
        clusters = ((pointers.words & np.uint64(OFFSET_MASK)) >> np.uint64(self.bits)).view(np.int64)
        above = (clusters >= limit) & (clusters < self.clusters)
        pointers, clusters = pointers.where(above), clusters[above]
        sources, which = np.unique(clusters, return_inverse=True)
        total = np.zeros(len(sources), np.int64)
        np.add.at(total, which, pointers.times)
        sources = sources[total == self.references[sources]]
        targets = self.free_below(limit)
        count = min(len(sources), len(targets))
        sources, targets = sources[len(sources) - count :], targets[:count]
        self.take(targets.tolist())
        step = 1 if kind is Kind.REFCOUNT_BLOCK else max(1, _BATCH_BYTES >> self.bits)
        # The last ones first: whenever this is broken off, the end of the file is what has become free.
        for stop in range(count, 0, -step):
            part = slice(max(0, stop - step), stop)
            self._move_batch(pointers, clusters, sources[part], targets[part], mark, kind)
            tell(1 - part.start / count)
        return count

    def _move_batch(
        self, pointers: Pointers, clusters: Clusters, sources: Clusters, targets: Clusters, mark: str, kind: Kind | None
    ) -> None:
        at = np.minimum(np.searchsorted(sources, clusters), len(sources) - 1)
        mine = sources[at] == clusters
        chosen = pointers.where(mine)
        places = targets[at[mine]].astype(np.uint64) << np.uint64(self.bits)
        new: Words = chosen.words & ~np.uint64(OFFSET_MASK) | places
        references = self.references[sources].tolist()
        moved = dict(zip(sources.tolist(), targets.tolist(), strict=True))

        def link() -> None:
            self.link(chosen, new)
            if kind is Kind.REFCOUNT_BLOCK:
                # Counts stand in the new block from here on, and that of its own old place may be one of them.
                self.blocks = {index: moved.get(cluster, cluster) for index, cluster in self.blocks.items()}

        self.carry_out(
            Move(
                raised=dict(zip(targets.tolist(), references, strict=True)),
                copy=lambda: self.copy(sources, targets, mark, kind),
                link=link,
                lowered=dict(zip(sources.tolist(), references, strict=True)),
            )
        )
