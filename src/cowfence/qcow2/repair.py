"""Repair: the refcounts, and what follows from them. The same three stages, one transaction for each kind of damage.

What the guest reads, and what its snapshots hold, is never touched: no L2 entry changes but for its COPIED flag, no cluster
that anything refers to is freed (crash contract, C12), and entries that lead nowhere stay as they are and are reported.

    before anything       fence: what was read must be durable (R9)
    leaks                 RECLAIM  stored counts down to the references, in place                            | fence
    counts to be raised   LINK     COPIED off where there are several references                             | fence
    counts too low, or    PREPARE  a complete new refcount structure, behind all that is in use              | fence
    structures damaged    LINK     one write in sector 0 flips the refcount table's offset and length        | fence
    COPIED flags          LINK     whole sectors of L1 and L2, after the counts that they follow are durable | fence
    dirty, corrupt bit    LINK     one write in sector 0, when nothing is left that they stand for           | fence

A crash anywhere leaves what was there, or what is better. The old refcount structure is not freed cluster by cluster: the new
one does not count it. Where references may be hidden behind damage (``Report.complete`` is false) no count goes down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cowfence.errors import Corrupt, ReadOnly
from cowfence.qcow2.census import Clusters, Counts, Words
from cowfence.qcow2.entries import COMPRESSED, COPIED
from cowfence.qcow2.extensions import Autoclear, ExtensionType, Incompatible
from cowfence.qcow2.findings import Grade, Mode, Report
from cowfence.qcow2.geometry import MAX_REFCOUNT_TABLE_BYTES, OFFSET_MASK, TABLE_ENTRY_BYTES, HostOffset
from cowfence.qcow2.header import feature_bits_patch, refcount_table_patch
from cowfence.qcow2.header_change import FILLER_TYPE
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.tables import Kind, counts_bytes
from cowfence.qcow2.transaction import Change, Stage, write_changes
from cowfence.qcow2.verify import Progress, Survey, survey
from cowfence.storage.base import Storage, read_exact
from cowfence.units import SECTOR_BYTES, align_up, div_up

_BATCH_CHANGES: Final = 4096


__all__ = ["Mode", "RepairReport", "rebuild_dirty", "repair"]

Rule = Callable[[Survey, Words], Words]
"""What L1 or L2 entries shall be, given what they are; only COPIED may differ."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The image before and after. ``rebuilt``: it has a new refcount structure. ``unrepairable``: what was not, and why."""

    before: Report
    after: Report
    rebuilt: bool
    unrepairable: tuple[str, ...]

    @property
    def leaks_fixed(self) -> int:
        return max(0, self.before.leaks - self.after.leaks)

    @property
    def corruptions_fixed(self) -> int:
        return max(0, self.before.corruptions - self.after.corruptions)


def repair(storage: Storage, mode: Mode, *, progress: Progress | None = None) -> RepairReport:
    """Repair the image in ``storage``. Run twice, the second run changes nothing.

    Raises ReadOnly, what ``verify`` raises, and the storage's errors; then the image is whole, and no worse than before.
    """
    if not storage.writable:
        raise ReadOnly(f"{storage.name}: opened read-only; it can be checked, not repaired")
    storage.fence("repair.fence")
    return _Repair(storage, mode).run(survey(storage, progress=progress))


def rebuild_dirty(storage: Storage) -> None:
    """Make the refcounts of an image with the dirty bit right, then clear the bit (crash contract, R10).

    Raises Corrupt where the refcounts cannot be made right, and what ``repair`` raises.
    """
    done = repair(storage, Mode.ALL)
    if not done.after.refcounts_sound:
        first = next((finding for finding in done.after.findings if finding.grade is Grade.FATAL), None)
        why = "; ".join(done.unrepairable) or (str(first) if first else "its refcount structures are damaged")
        raise Corrupt(f"{storage.name}: refcounts", f"the image is marked dirty and cannot be rebuilt: {why}")


class _Repair:
    def __init__(self, storage: Storage, mode: Mode) -> None:
        self._storage = storage
        self._mode = mode
        self._unrepairable: list[str] = []

    def run(self, found: Survey) -> RepairReport:
        before = found.report
        changed = rebuilt = False
        if self._mode is Mode.ALL and not before.refcounts_sound:
            # First, because a count that is right now says that the cluster is shared.
            changed = self._fix_flags(found, _without_shared_flags)
            rebuilt = self._rebuild(found)
        if not rebuilt and before.leaks:
            changed |= self._reclaim(found)
        if rebuilt or changed:
            found = survey(self._storage)
        # QEMU's rule for leaks too: flags follow the counts, so they are set right once the counts are.
        may_fix_flags = self._mode is Mode.ALL or (found.report.refcounts_sound and not found.report.leaks)
        if may_fix_flags and self._fix_flags(found, _with_right_flags):
            found = survey(self._storage)
        self._clear_feature_bits(found)
        return RepairReport(before, found.report, rebuilt, tuple(self._unrepairable))

    def _write(self, layout: Layout, changes: Iterable[Change]) -> bool:
        """Write the changes of a stage in batches; True if there was one."""
        batch: list[Change] = []
        wrote = False
        for change in changes:
            batch.append(change)
            if len(batch) >= _BATCH_CHANGES:
                write_changes(self._storage, layout, batch)
                batch = []
            wrote = True
        write_changes(self._storage, layout, batch)
        return wrote

    def _link_header(self, found: Survey, offset: int, data: bytes) -> None:
        write_changes(self._storage, _layout(found), [Change(Stage.LINK, 0, offset, data, "header.link", Kind.HEADER)])
        self._storage.fence("link.fence")

    # Leaks

    def _reclaim(self, found: Survey) -> bool:
        """Stored counts that are too high down to the references, in place; False if nothing could be done."""
        if not found.report.complete or found.report.refcounts_damaged:
            self._unrepairable.append("leaked clusters: damage may hide references to them")
            return False
        self._drop_stale_bitmaps(found)
        wrote = self._write(_layout(found), self._decrements(found))
        if wrote:
            self._storage.fence("reclaim.fence")
        return wrote

    def _decrements(self, found: Survey) -> Iterator[Change]:
        census, geometry = found.census, found.geometry
        per_block, bits = geometry.refcounts_per_block, geometry.refcount_bits
        # The cluster after the file's last exists only if something reaches into it, as in verify.
        end = census.clusters + (1 if census.references[census.clusters] else 0)
        for index, block in zip(*(part.tolist() for part in found.blocks), strict=True):
            first = index * per_block
            stop = min(first + per_block, end)
            if stop <= first:
                continue
            stored, references = census.stored[first:stop], census.references[first:stop]
            high = np.flatnonzero(stored > references)
            if not len(high):
                continue
            counts = census.stored[first : first + per_block].copy()
            counts[high] = references[high]
            content = counts_bytes(counts, bits)
            for sector in sorted({at * bits // (8 * SECTOR_BYTES) for at in high.tolist()}):
                start = sector * SECTOR_BYTES
                offset = (block << census.bits) + start
                data = content[start : start + SECTOR_BYTES]
                yield Change(Stage.RECLAIM, 0, offset, data, "refcount.decrement", Kind.REFCOUNT_BLOCK)

    def _drop_stale_bitmaps(self, found: Survey) -> None:
        """Make the bitmaps extension unknown where its bitmaps are outdated: their clusters, called leaks, are given back."""
        header = found.header
        if header.bitmaps is None or header.autoclear & Autoclear.BITMAPS:
            return
        area = read_exact(self._storage, 0, min(header.cluster_bytes, found.census.size), "header")
        at = header.header_length
        for extension in header.extensions:
            assert int.from_bytes(area[at : at + 4]) == extension.type
            if extension.type == ExtensionType.BITMAPS:
                self._link_header(found, at, FILLER_TYPE.to_bytes(4))
            at += 8 + align_up(len(extension.data), 8)

    # A new refcount structure

    def _rebuild(self, found: Survey) -> bool:
        """Write a complete new refcount structure and switch to it; False, with the reason noted, where that cannot be."""
        counts = _counts_without_structure(found)
        if len(counts) and int(counts.max()) > found.geometry.refcount_max:
            cluster = int(counts.argmax())
            self._unrepairable.append(
                f"cluster {cluster}: its {int(counts[cluster])} references do not fit into {found.geometry.refcount_bits} bits"
            )
            return False
        place = _place(found, counts)
        if place is None:
            self._unrepairable.append("refcounts: there is no room for a new refcount structure")
            return False
        self._drop_stale_bitmaps(found)
        table, blocks = place
        bits, geometry = found.census.bits, found.geometry
        layout = _layout(found)
        layout.claim_new(table.start << bits, len(table), Kind.REFCOUNT_TABLE)
        for block in blocks.values():
            layout.claim_new(block << bits, 1, Kind.REFCOUNT_BLOCK)
        entries = np.zeros(len(table) * geometry.table_entries_per_cluster, ">u8")
        entries[list(blocks)] = [block << bits for block in blocks.values()]
        own = np.sort(np.array([*table, *blocks.values()], np.int64))
        new_table = Change(Stage.PREPARE, 0, table.start << bits, entries.tobytes(), "refcount_table.new", Kind.REFCOUNT_TABLE)
        write_changes(self._storage, layout, [new_table])
        for index, block in blocks.items():
            content = counts_bytes(_block_counts(counts, own, index, geometry.refcounts_per_block), geometry.refcount_bits)
            new_block = Change(Stage.PREPARE, 0, block << bits, content, "refcount_block.new", Kind.REFCOUNT_BLOCK)
            write_changes(self._storage, layout, [new_block])
        self._storage.fence("prepare.fence")
        self._link_header(found, *refcount_table_patch(HostOffset(table.start << bits), len(table)))
        return True

    # COPIED flags

    def _fix_flags(self, found: Survey, rule: Rule) -> bool:
        """Give the entries of the active tables the COPIED flags that ``rule`` says; True if one was wrong."""
        header = found.header
        if header.incompatible & Incompatible.DATA_FILE or found.report.clean:
            return False
        layout = _layout(found)
        wrote = self._write(layout, self._l1_changes(found, rule))
        wrote |= self._write(layout, self._l2_changes(found, rule))
        if wrote:
            self._storage.fence("link.fence")
        return wrote

    def _l1_changes(self, found: Survey, rule: Rule) -> Iterator[Change]:
        index, words = found.active_l1
        wanted = rule(found, words)
        wrong = np.flatnonzero(words != wanted)
        yield from self._sectors(found, found.header.l1_offset, index[wrong], wanted[wrong], 1, "l1.link", Kind.L1)

    def _l2_changes(self, found: Survey, rule: Rule) -> Iterator[Change]:
        tables, bits = found.judge.tables, found.census.bits
        stride = found.geometry.l2_entry_bytes // TABLE_ENTRY_BYTES
        for first, _, rows in found.judge.pieces():
            wanted = rule(found, rows)
            wrong = rows != wanted
            for row in np.flatnonzero(wrong.any(axis=1)).tolist():
                if tables.active[first + row]:
                    at = np.flatnonzero(wrong[row])
                    offset = int(tables.clusters[first + row]) << bits
                    yield from self._sectors(found, offset, at, wanted[row][at], stride, "l2.link", Kind.L2)

    def _sectors(
        self, found: Survey, table: int, index: Clusters, words: Words, stride: int, mark: str, kind: Kind
    ) -> Iterator[Change]:
        """The sectors of the table at ``table`` with new words at some indices; entries are ``stride`` words apart."""
        at = index * (stride * TABLE_ENTRY_BYTES)
        sectors = at // SECTOR_BYTES
        for sector in np.unique(sectors).tolist():
            offset = table + sector * SECTOR_BYTES
            if offset >> found.census.bits in found.shared:
                continue
            data = np.frombuffer(bytes(read_exact(self._storage, offset, SECTOR_BYTES, kind.value)), ">u8").copy()
            here = sectors == sector
            data[at[here] % SECTOR_BYTES // TABLE_ENTRY_BYTES] = words[here]
            yield Change(Stage.LINK, 0, offset, data.tobytes(), mark, kind)

    # Feature bits

    def _clear_feature_bits(self, found: Survey) -> None:
        """The dirty bit once the refcounts are right, the corrupt bit once nothing fatal is left."""
        header, report = found.header, found.report
        cleared = 0
        if report.refcounts_sound:
            cleared |= header.incompatible & Incompatible.DIRTY
        if report.refcounts_sound and not report.fatal:
            cleared |= header.incompatible & Incompatible.CORRUPT
        if cleared:
            # All that the bits stand for is durable: each step above ended with a fence, and the first one covers the rest.
            self._link_header(found, *feature_bits_patch(header, incompatible=header.incompatible & ~cleared))


def _with_right_flags(found: Survey, words: Words) -> Words:
    """The same entries with COPIED set where exactly one reference is stored and counted, clear elsewhere."""
    census = found.census
    standard = (words & np.uint64(COMPRESSED) == 0) & (words & np.uint64(OFFSET_MASK) != 0)
    clusters = census.stored_index(words)
    within = np.minimum(clusters, census.clusters)
    single = standard & (census.stored[clusters] == 1) & (census.references[within] == 1) & (clusters == within)
    wanted: Words = np.where(single, words | np.uint64(COPIED), words & np.uint64(COPIED - 1))
    return wanted


def _without_shared_flags(found: Survey, words: Words) -> Words:
    """The same entries with COPIED clear where what they lead to has several references."""
    census = found.census
    clusters = ((words & np.uint64(OFFSET_MASK)) >> np.uint64(census.bits)).view(np.int64)
    within = np.minimum(clusters, census.clusters)
    shared = (words & np.uint64(COMPRESSED) == 0) & (census.references[within] > 1) & (clusters == within)
    wanted: Words = np.where(shared, words & np.uint64(COPIED - 1), words)
    return wanted


def _layout(found: Survey) -> Layout:
    """Every structure that has its clusters for itself, for the overlap check before each write."""
    bits = found.census.bits
    layout = Layout(found.storage.name, bits)
    kinds = {kind.value: kind for kind in Kind}
    for first, stop, name in zip(found.claims.starts, found.claims.stops, found.claims.names, strict=True):
        layout.claim(first << bits, stop - first, kinds.get(name, Kind.SNAPSHOT_L1))
    for clusters, kind in ((found.judge.tables.clusters, Kind.L2), (found.blocks[1], Kind.REFCOUNT_BLOCK)):
        layout.kinds.update((cluster, kind) for cluster in clusters.tolist() if cluster not in found.shared)
    return layout


def _counts_without_structure(found: Survey) -> Counts:
    """What the counts must be when the present refcount structure is no longer counted.

    Where references may be hidden, no count is lower than the stored one, and what nothing readable counts stays in use.
    """
    census, geometry = found.census, found.geometry
    counts = census.references.copy()
    np.subtract.at(counts, found.blocks[1], counts.dtype.type(1))
    first, stop = found.refcount_table
    counts[first:stop] -= counts.dtype.type(1)
    if found.report.complete:
        return counts
    readable = np.zeros(len(census.stored) // geometry.refcounts_per_block, bool)
    for index, block in zip(*(part.tolist() for part in found.blocks), strict=True):
        if index < len(readable) and block not in found.shared:
            readable[index] = True
    for index in range(len(readable)):
        first = index * geometry.refcounts_per_block
        part = counts[first : min(first + geometry.refcounts_per_block, census.clusters)]
        floor: Any = census.stored[first : first + len(part)] if readable[index] else 1
        np.maximum(part, floor, out=part, casting="unsafe")
    return counts


def _place(found: Survey, counts: Counts) -> tuple[range, dict[int, int]] | None:
    """Clusters for a new refcount table, and for each block by its index; None where there is no room."""
    geometry, census = found.geometry, found.census
    per_block, per_cluster = geometry.refcounts_per_block, geometry.table_entries_per_cluster
    starts = np.arange(0, len(counts), per_block)
    needed = set(np.flatnonzero(np.logical_or.reduceat(counts != 0, starts)).tolist())
    if found.report.complete:
        base = len(census.references) - int((census.references[::-1] != 0).argmax())
    else:
        # What is hidden may lie where nothing is counted.
        base = census.clusters
    table_clusters = 1
    while True:
        total = table_clusters + len(needed)
        indices = needed | set(range(base // per_block, (base + total - 1) // per_block + 1))
        clusters = div_up(max(indices) + 1, per_cluster)
        if indices == needed and clusters == table_clusters:
            break
        needed, table_clusters = indices, max(clusters, table_clusters)
    if table_clusters << census.bits > MAX_REFCOUNT_TABLE_BYTES:
        return None
    stop = base + total
    if found.census.lowest_past_end is None or stop << census.bits <= found.census.lowest_past_end:
        first_block = base + table_clusters
        return range(base, first_block), dict(zip(sorted(needed), range(first_block, stop), strict=True))
    # Growing the file would put the new structure where a damaged entry leads to.
    return _place_inside(found, counts, table_clusters)


def _place_inside(found: Survey, counts: Counts, table_clusters: int) -> tuple[range, dict[int, int]] | None:
    """The same in clusters of the file that nothing refers to, the present refcount structure included."""
    census, per_block = found.census, found.geometry.refcounts_per_block
    if not found.report.complete:
        return None
    free = np.flatnonzero(census.references[: census.clusters] == 0)
    span = table_clusters - 1
    runs = np.flatnonzero(free[span:] - free[: len(free) - span] == span)
    if not len(runs):
        return None
    first = int(runs[0])
    table = range(int(free[first]), int(free[first]) + table_clusters)
    rest = np.delete(free, np.s_[first : first + table_clusters])
    needed = set(np.flatnonzero(np.logical_or.reduceat(counts != 0, np.arange(0, len(counts), per_block))).tolist())
    needed |= {cluster // per_block for cluster in table}
    blocks: dict[int, int] = {}
    spare = iter(rest.tolist())
    while needed:
        index = needed.pop()
        block = next(spare, None)
        if block is None:
            return None
        blocks[index] = block
        if block // per_block not in blocks:
            needed.add(block // per_block)
    if div_up(max(blocks) + 1, found.geometry.table_entries_per_cluster) > table_clusters:
        return None
    return table, blocks


def _block_counts(counts: Counts, own: Clusters, index: int, per_block: int) -> Counts:
    """The counts of one new block. ``own``: the clusters of the new structure itself, in order."""
    first = index * per_block
    block = np.zeros(per_block, np.uint64)
    part = counts[first : first + per_block]
    block[: len(part)] = part
    low, high = np.searchsorted(own, (first, first + per_block))
    block[own[low:high] - first] = 1
    return block
