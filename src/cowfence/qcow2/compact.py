"""Compaction: what stands at the end of the file moves down into clusters that nothing uses, and the file is cut.

Each line is one transaction for each structure, or one for up to 64 MiB of clusters (see ``moves``), in this order; then all of
it again until the file becomes no shorter.

    before anything   leaks are given back (see ``repair``)
    structures        L1 tables, the refcount table, the snapshot table, tables and directory of bitmaps: as one run of clusters
    refcount blocks   one at a time, because a block can count its own old and new place
    L2 tables         with all L1 tables that lead there
    data              with all L2 tables that lead there; bitmap data
    compressed data   stream by stream, packed anew
    empty blocks      LINK: the refcount table leads no longer to blocks that count nothing behind the end; RECLAIM the block
    at the end        fence, then the file's length, then a fence: nothing behind it is counted any more

The guest's disk, its snapshots and bitmaps are the same at every instant. What stays where it is: the header, the LUKS header,
and what finds no room, or is referred to in a way that is not understood. Then the file ends behind the last of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from cowfence.errors import Unsupported
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.bitmap_directory import encode_bitmap_directory, read_bitmap_directory
from cowfence.qcow2.census import Flags, Words
from cowfence.qcow2.entries import COMPRESSED
from cowfence.qcow2.extensions import Autoclear, ExtensionType
from cowfence.qcow2.findings import Mode
from cowfence.qcow2.geometry import OFFSET_MASK, TABLE_ENTRY_BYTES
from cowfence.qcow2.header import Header, l1_patch, read_header, refcount_table_patch, snapshots_patch
from cowfence.qcow2.moves import Ground, Move, Pointers, joined
from cowfence.qcow2.repair import repair
from cowfence.qcow2.snapshot_table import read_snapshots
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind
from cowfence.storage.base import read_padded
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import SECTOR_BYTES, align_up, div_up

Progress = Callable[[float], None]
"""Told the fraction that is done, 0 to 1."""

_STREAMS_TOGETHER: Final = 4096
_MOST_PASSES: Final = 16
"""Each pass but the last makes the file shorter, and the second has little left to do."""
_SHARES: Final = (0, 0.05, 0.1, 0.2, 0.8, 1)
"""For who watches: how much of the whole work is done before and after each step."""
_DIRECTORY_OFFSET_AT: Final = 16
"""In the data of the bitmaps extension."""


@dataclass(frozen=True, slots=True)
class Compacted:
    """The length of the file before and after, in bytes, and how many clusters, or streams of compressed data, were moved."""

    old_bytes: int
    new_bytes: int
    moved: int


class _Structure(NamedTuple):
    """A run of clusters from ``offset`` on with one pointer to it, which stands at byte ``pointer_at`` of the file; None: it
    stays. ``entries``: of an L1 table or a bitmap's table."""

    kind: Kind
    new_mark: str
    offset: int
    clusters: int
    pointer_at: int | None
    entries: int = 0


def compact(alteration: Alteration, *, progress: Progress | None = None) -> Compacted:
    """Make the file of an image as short as it can be; its disk stays what it is.

    Raises Unsupported (an external data file), Corrupt (a damaged image), Invalid (encrypted, and no passphrase), NoSpace and
    what the storage raises: then the image is whole, and some of it may have been moved.
    """
    state = alteration.state
    if state.geometry.external_data:
        raise Unsupported(state.storage.name, "compaction of an image with an external data file, which holds no clusters")
    before, moved = state.storage.size(), 0
    repair(_Fenced(state), Mode.LEAKS)
    steps = (_structures, _refcount_blocks, _l2_tables, _data, _streams)
    for number in range(_MOST_PASSES):
        size = state.storage.size()
        for step, (begin, end) in zip(steps, pairwise(_SHARES), strict=True):
            # The first pass does nearly all of it.
            moved += step(alteration, _part(progress if not number else None, begin, end))
        dropped = _drop_empty_blocks(state)
        _cut(state)
        if state.storage.size() >= size and not dropped:
            break
    return Compacted(before, state.storage.size(), moved)


def _part(progress: Progress | None, begin: float, end: float) -> Progress:
    """Whom to tell of a step, which is a part of the whole."""
    return lambda done: progress(begin + done * (end - begin)) if progress is not None else None


class _Fenced(StorageWrapper):
    """The image's file, whose fences are those of the open image: one that fails makes it read-only."""

    def __init__(self, state: State) -> None:
        super().__init__(state.storage)
        self._committer = state.committer

    def fence(self, mark: str) -> None:
        self._committer.fence(mark)


def _limit(ground: Ground, structures: list[_Structure]) -> tuple[int, list[tuple[_Structure, int]]]:
    """Where the file could end, as a cluster, and which structures have to move for that, with their new first cluster."""
    limit = ground.used
    while True:
        taken: list[int] = []
        moves: list[tuple[_Structure, int]] = []
        free = ground.free_below(limit)
        stays = limit
        for structure in sorted(structures, key=lambda each: -each.clusters):
            end = (structure.offset >> ground.bits) + structure.clusters
            if end <= limit:
                continue
            rest = free[~np.isin(free, taken)]
            span = structure.clusters - 1
            starts = np.flatnonzero(rest[span:] - rest[: max(0, len(rest) - span)] == span)
            if structure.pointer_at is None or not len(starts) or not _is_single(ground, structure):
                stays = max(stays, end)
                continue
            first = int(rest[starts[0]])
            taken += range(first, first + structure.clusters)
            moves.append((structure, first))
        if stays == limit:
            return limit, moves
        limit = stays


def _is_single(ground: Ground, structure: _Structure) -> bool:
    first = structure.offset >> ground.bits
    return bool((ground.references[first : first + structure.clusters] == 1).all())


# Structures


def _all_structures(state: State, header: Header) -> Iterator[_Structure]:
    geometry, storage = state.geometry, state.storage
    clusters = geometry.clusters_for
    if header.l1_entries:
        length_bytes = header.l1_entries * TABLE_ENTRY_BYTES
        at = l1_patch(header.l1_offset, header.l1_entries)[0] + 4
        yield _Structure(Kind.L1, "l1.new", header.l1_offset, clusters(length_bytes), at, header.l1_entries)
    at = refcount_table_patch(header.refcount_table_offset, 0)[0]
    count = header.refcount_table_clusters
    yield _Structure(Kind.REFCOUNT_TABLE, "refcount_table.new", header.refcount_table_offset, count, at)
    if header.encryption is not None:
        yield _Structure(Kind.ENCRYPTION, "", header.encryption.offset, clusters(header.encryption.length_bytes), None)
    if header.snapshot_count:
        start = at = int(header.snapshots_offset)
        for snapshot in read_snapshots(storage, header):
            if snapshot.l1_entries:
                length_bytes = snapshot.l1_entries * TABLE_ENTRY_BYTES
                offset, entries = snapshot.l1_offset, snapshot.l1_entries
                yield _Structure(Kind.SNAPSHOT_L1, "snapshot_l1.new", offset, clusters(length_bytes), at, entries)
            at += align_up(len(snapshot.stored), 8)
        pointer_at = snapshots_patch(header.snapshots_offset, 0)[0] + 4
        yield _Structure(Kind.SNAPSHOT_TABLE, "snapshot_table.new", start, clusters(at - start), pointer_at)
    yield from _bitmap_structures(state, header)


def _bitmap_structures(state: State, header: Header) -> Iterator[_Structure]:
    pointer = header.bitmaps
    if pointer is None or not header.autoclear & Autoclear.BITMAPS:
        return
    clusters, at = state.geometry.clusters_for, pointer.directory_offset
    for entry in read_bitmap_directory(state.storage, pointer, state.geometry):
        if entry.table_entries:
            count = clusters(entry.table_bytes)
            yield _Structure(Kind.BITMAPS, "bitmap.new", entry.table_offset, count, at, entry.table_entries)
        at += len(encode_bitmap_directory([entry]))
    place = header.header_length
    for extension in header.extensions:
        if extension.type == ExtensionType.BITMAPS:
            break
        place += 8 + align_up(len(extension.data), 8)
    place += 8 + _DIRECTORY_OFFSET_AT
    # Where it does not stand inside one sector it cannot be changed in place.
    pointer_at = place if place % TABLE_ENTRY_BYTES == 0 else None
    yield _Structure(Kind.BITMAPS, "bitmap.new", pointer.directory_offset, clusters(pointer.directory_bytes), pointer_at)


def _ground(state: State) -> tuple[Ground, Header, list[_Structure]]:
    """The image as it is now: what came before was written straight, too."""
    ground, header = Ground(state), read_header(state.storage)
    structures = list(_all_structures(state, header))
    for structure in structures:
        ground.claim(structure.offset, structure.clusters, structure.kind)
    return ground, header, structures


def _structures(alteration: Alteration, tell: Progress) -> int:
    moved = 0
    while True:
        # One at a time: where one stands is where the pointer to another may be.
        ground, _, structures = _ground(alteration.state)
        _, moves = _limit(ground, structures)
        if not moves:
            tell(1)
            return moved
        structure, first = moves[0]
        _move_structure(ground, structure, first)
        if structure.kind is Kind.BITMAPS:
            alteration.after_move({structure.offset: first << ground.bits})
        moved += structure.clusters


def _move_structure(ground: Ground, structure: _Structure, first: int) -> None:
    old, pointer_at = structure.offset >> ground.bits, structure.pointer_at
    assert pointer_at is not None
    sources = np.arange(old, old + structure.clusters)
    targets = np.arange(first, first + structure.clusters)
    place = (first << ground.bits).to_bytes(TABLE_ENTRY_BYTES)
    ground.carry_out(
        Move(
            raised=dict.fromkeys(targets.tolist(), 1),
            copy=lambda: ground.copy(sources, targets, structure.new_mark, structure.kind),
            link=lambda: ground.link_bytes(pointer_at, place),
            lowered=dict.fromkeys(sources.tolist(), 1),
        )
    )


# Tables and data


def _pointers(ground: Ground, offset: int, entries: int) -> Pointers:
    """The words of a table that are not 0."""
    words = ground.file.words(offset, entries)
    at = np.flatnonzero(words)
    return Pointers(offset + at * TABLE_ENTRY_BYTES, words[at], np.ones(len(at), np.int64))


def _refcount_blocks(alteration: Alteration, tell: Progress) -> int:
    ground, header, structures = _ground(alteration.state)
    limit, _ = _limit(ground, structures)
    entries = header.refcount_table_clusters * ground.geometry.table_entries_per_cluster
    pointers = _pointers(ground, header.refcount_table_offset, entries)
    return ground.move_singles(pointers, limit, "refcount_block.new", Kind.REFCOUNT_BLOCK, tell)


def _l2_tables(alteration: Alteration, tell: Progress) -> int:
    ground, _, structures = _ground(alteration.state)
    limit, _ = _limit(ground, structures)
    l1s = [each for each in structures if each.kind in (Kind.L1, Kind.SNAPSHOT_L1)]
    pointers = joined([_pointers(ground, each.offset, each.entries) for each in l1s])
    return ground.move_singles(pointers, limit, "l2.new", Kind.L2, tell)


def _data(alteration: Alteration, tell: Progress) -> int:
    """The guest's clusters, plain ones, then those of bitmaps."""
    ground, _, structures = _ground(alteration.state)
    limit, _ = _limit(ground, structures)
    floor = np.uint64(limit << ground.bits)

    def is_plain(words: Words) -> Flags:
        plain: Flags = (words & np.uint64(COMPRESSED) == 0) & (words & np.uint64(OFFSET_MASK) >= floor)
        return plain

    moved = ground.move_singles(_entries(ground, is_plain), limit, "data.write", None, tell)
    tables = [each for each in structures if each.kind is Kind.BITMAPS and each.entries]
    bits = joined([_pointers(ground, each.offset, each.entries) for each in tables])
    return moved + ground.move_singles(bits, limit, "bitmap.new", Kind.BITMAPS, tell)


def _entries(ground: Ground, wanted: Callable[[Words], Flags]) -> Pointers:
    """The first words of the entries of all L2 tables, those that are wanted."""
    parts = []
    tables = ground.found.judge.tables
    for first, _, rows in ground.found.judge.pieces():
        row, column = np.nonzero(wanted(rows))
        at = (tables.clusters[first + row] << ground.bits) + column * ground.geometry.l2_entry_bytes
        parts.append(Pointers(at, rows[row, column].copy(), tables.references[first + row]))
    return joined(parts)


# Compressed data


class _Stream(NamedTuple):
    """``word``: its entry, wherever it stands. ``start``, ``length_bytes``: in the file; ``sectors``: to be read for it."""

    word: int
    references: int
    start: int
    length_bytes: int

    @property
    def sectors(self) -> int:
        return div_up(self.length_bytes, SECTOR_BYTES)


def _streams(alteration: Alteration, tell: Progress) -> int:
    """Streams that touch the end of the file, each to whole sectors of clusters that are theirs alone."""
    state = alteration.state
    ground, _, structures = _ground(state)
    if state.header.crypt_method:
        return 0
    limit, _ = _limit(ground, structures)
    pointers = _entries(ground, lambda words: words & np.uint64(COMPRESSED) != 0)
    words, which = np.unique(pointers.words, return_inverse=True)
    times = np.zeros(len(words), np.int64)
    np.add.at(times, which, pointers.times)
    streams = [
        stream
        for word, references in zip(words.tolist(), times.tolist(), strict=True)
        if (stream := _stream(ground, word, references)).start + stream.length_bytes > limit << ground.bits
        and stream.sectors << 9 <= ground.geometry.cluster_bytes
    ]
    streams.sort(key=lambda stream: -stream.start)
    placed = _packed(ground, streams, limit)
    for at in range(0, len(placed), _STREAMS_TOGETHER):
        _move_streams(ground, pointers, placed[at : at + _STREAMS_TOGETHER])
        tell(min(1, (at + _STREAMS_TOGETHER) / len(placed)))
    return len(placed)


def _stream(ground: Ground, word: int, references: int) -> _Stream:
    geometry = ground.geometry
    start = word & geometry.compressed_offset_mask
    sectors = (word >> geometry.compressed_shift) & geometry.compressed_sectors_mask
    end = (start // SECTOR_BYTES + sectors + 1) * SECTOR_BYTES
    return _Stream(word, references, start, end - start)


def _packed(ground: Ground, streams: list[_Stream], limit: int) -> list[tuple[_Stream, int]]:
    """Where each stream goes, in bytes; those for which there is no room are left out."""
    placed: list[tuple[_Stream, int]] = []
    free = iter(ground.free_below(limit).tolist())
    sectors_left = counts_left = place = 0
    for stream in streams:
        if stream.sectors > sectors_left or stream.references > counts_left:
            cluster = next(free, None)
            if cluster is None:
                break
            ground.take([cluster])
            place, sectors_left = cluster << ground.bits, ground.geometry.cluster_bytes // SECTOR_BYTES
            counts_left = ground.geometry.refcount_max
        placed.append((stream, place))
        place += stream.sectors * SECTOR_BYTES
        sectors_left -= stream.sectors
        counts_left -= stream.references
    return placed


def _move_streams(ground: Ground, pointers: Pointers, placed: list[tuple[_Stream, int]]) -> None:
    shift = ground.geometry.compressed_shift
    raised: Counter[int] = Counter()
    lowered: Counter[int] = Counter()
    new_words: dict[int, int] = {}
    for stream, place in placed:
        raised[place >> ground.bits] += stream.references
        for cluster in range(stream.start >> ground.bits, (stream.start + stream.length_bytes - 1 >> ground.bits) + 1):
            lowered[cluster] += stream.references
        new_words[stream.word] = COMPRESSED | stream.sectors - 1 << shift | place
    old = np.array(sorted(new_words), np.uint64)
    new = np.array([new_words[word] for word in old.tolist()], np.uint64)
    at = np.minimum(np.searchsorted(old, pointers.words), len(old) - 1)
    mine = old[at] == pointers.words

    def copy() -> None:
        for stream, place in placed:
            data = bytearray(stream.length_bytes)
            read_padded(ground.state.storage, stream.start, data)
            # To the end of its last sector, which is read with it.
            padded = bytes(data).ljust(stream.sectors * SECTOR_BYTES, b"\0")
            ground.write_data(place, padded)

    ground.carry_out(Move(raised, copy, lambda: ground.link(pointers.where(mine), new[at[mine]]), lowered))


# The end of the file


def _drop_empty_blocks(state: State) -> int:
    """Refcount blocks for what lies behind the end, which count nothing; how many there were."""
    ground, header, _ = _ground(state)
    first = div_up(ground.end, ground.geometry.refcounts_per_block)
    dropped = [index for index in ground.blocks if index >= first and ground.is_empty(index)]
    for index in dropped:
        ground.link_bytes(header.refcount_table_offset + index * TABLE_ENTRY_BYTES, bytes(TABLE_ENTRY_BYTES))
        state.committer.fence("link.fence")
        ground.lower({ground.blocks[index]: 1})
    return len(dropped)


def _cut(state: State) -> None:
    """The file ends with the last cluster that is in use."""
    ground = Ground(state)
    end = ground.end << ground.bits
    if end < state.storage.size() and state.storage.capabilities().holes_past_end:
        state.committer.fence("reclaim.fence")
        state.storage.truncate(end, "compact.truncate")
        state.committer.fence("compact.fence")
