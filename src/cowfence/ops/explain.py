"""What an offset of an image is: of the guest's disk, by which tables it leads where; of the file, what stands there and who
leads to it. A pure reader; the image may be damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from cowfence.errors import Corrupt, OutOfRange
from cowfence.qcow2.bitmap_directory import read_bitmap_directory
from cowfence.qcow2.census import ImageFile, Words
from cowfence.qcow2.describe import JsonValue
from cowfence.qcow2.entries import (
    BITMAP_SHIFT,
    COMPRESSED,
    BadEntry,
    Compressed,
    Data,
    Mapping,
    Subclustered,
    Zero,
    decode_l1,
    decode_l2,
)
from cowfence.qcow2.extensions import Autoclear
from cowfence.qcow2.geometry import OFFSET_MASK, Geometry
from cowfence.qcow2.snapshot_table import read_snapshots
from cowfence.qcow2.verify import Survey, survey
from cowfence.storage.file import FileStorage

_ACTIVE: Final = "the disk"
_MOST_WAYS: Final = 1000


@dataclass(frozen=True, slots=True)
class Way:
    """An L2 entry that leads to a place. ``owner``: the disk, or a snapshot. Offsets in bytes."""

    owner: str
    l1_index: int
    l2_offset: int
    l2_index: int
    guest_offset: int
    entry: int
    state: str


@dataclass(frozen=True, slots=True)
class OfGuest:
    """A guest offset. ``state``: data, compressed, zero, subclusters, unallocated, or what is wrong. ``host_offset``: of its
    byte, or of its compressed stream. None: there is none."""

    offset: int
    cluster: int
    l1_index: int
    l1_entry: int
    l2_offset: int | None
    l2_index: int
    l2_entry: int | None
    state: str
    host_offset: int | None = None
    stream_bytes: int | None = None
    backing: str | None = None
    refcount: int | None = None


@dataclass(frozen=True, slots=True)
class OfHost:
    """An offset of the file. ``structures``: what stands in its cluster; ``ways``: the L2 entries that lead there (the first
    1,000). ``refcount``: as stored; ``references``: as counted."""

    offset: int
    cluster: int
    past_end: bool
    structures: tuple[str, ...]
    ways: tuple[Way, ...]
    refcount: int
    references: int

    @property
    def verdict(self) -> str:
        if self.past_end:
            return "past the end of the file"
        if not self.references:
            return "free" if not self.refcount else "leaked: it is counted, and nothing leads to it"
        if self.refcount < self.references:
            return "in danger: more lead to it than are counted"
        return "in use" if self.refcount == self.references else "in use, and counted too often"


@dataclass(frozen=True, slots=True)
class Explained:
    filename: str
    guest: OfGuest | None
    host: OfHost | None

    def to_dict(self) -> dict[str, JsonValue]:
        found: dict[str, JsonValue] = {"filename": self.filename}
        if self.guest is not None:
            found["guest"] = {name.replace("_", "-"): value for name, value in asdict(self.guest).items()}
        if self.host is not None:
            host = asdict(self.host)
            host["ways"] = [{name.replace("_", "-"): value for name, value in way.items()} for way in host["ways"]]
            found["host"] = {name.replace("_", "-"): value for name, value in host.items()} | {"verdict": self.host.verdict}
        return found


def explain(
    path: str | os.PathLike[str], offset: int, *, guest: bool = True, host: bool = True, force_share: bool = False
) -> Explained:
    """What ``offset`` of the image at ``path`` is, as one of its disk (``guest``) and of its file (``host``).

    Raises OutOfRange (only the disk was asked for, and it is shorter), and as ``verify`` does.
    """
    storage = FileStorage.open(path, force_share=force_share)
    try:
        found = survey(storage)
        inside = 0 <= offset < found.header.size_bytes
        if guest and not host and not inside:
            raise OutOfRange(offset, 1, found.header.size_bytes)
        return Explained(
            os.fspath(path),
            _of_guest(found, offset) if guest and inside else None,
            _of_host(found, offset) if host else None,
        )
    finally:
        storage.close()


def _of_guest(found: Survey, offset: int) -> OfGuest:
    header, geometry, file = found.header, found.geometry, ImageFile(found.storage)
    l1_index = offset >> geometry.l1_shift
    l2_index = offset >> geometry.cluster_bits & geometry.l2_entries - 1
    cluster = offset >> geometry.cluster_bits
    backing = None if header.backing_name is None else header.backing_name.decode("utf-8", "replace")
    l1_entry = int(file.words(header.l1_offset + l1_index * 8, 1)[0]) if l1_index < header.l1_entries else 0
    try:
        l2_offset = decode_l1(l1_entry, geometry).host_offset if l1_entry else None
    except BadEntry as bad:
        return OfGuest(offset, cluster, l1_index, l1_entry, None, l2_index, None, f"unreadable: {bad}")
    if l2_offset is None:
        return OfGuest(offset, cluster, l1_index, l1_entry, None, l2_index, None, "unallocated", backing=backing)
    entry = _entry(file, l2_offset, l2_index, geometry)
    try:
        mapping = decode_l2(entry, geometry)
    except BadEntry as bad:
        return OfGuest(offset, cluster, l1_index, l1_entry, l2_offset, l2_index, entry, f"unreadable: {bad}")
    state, host_offset = _state(mapping, geometry, offset)
    host_cluster = None if host_offset is None or geometry.external_data else host_offset >> geometry.cluster_bits
    return OfGuest(
        offset,
        cluster,
        l1_index,
        l1_entry,
        l2_offset,
        l2_index,
        entry,
        state,
        host_offset=host_offset,
        stream_bytes=mapping.length_bytes if isinstance(mapping, Compressed) else None,
        backing=backing if state.startswith("unallocated") else None,
        refcount=None if host_cluster is None else _stored(found, host_cluster),
    )


def _entry(file: ImageFile, l2_offset: int, l2_index: int, geometry: Geometry) -> int:
    words = file.words(l2_offset + l2_index * geometry.l2_entry_bytes, geometry.l2_entry_words)
    return int(words[0]) | (int(words[1]) << BITMAP_SHIFT if len(words) > 1 else 0)


def _state(mapping: Mapping, geometry: Geometry, offset: int) -> tuple[str, int | None]:
    """What a guest byte is, and where it stands."""
    within = offset & geometry.cluster_mask
    match mapping:
        case Data(host_offset, _):
            return "data", host_offset + within
        case Compressed(host_offset, _):
            return "compressed", host_offset
        case Zero(host_offset, _):
            return "zero", None if host_offset is None else host_offset + within
        case Subclustered(host_offset, _, allocated, zero):
            number = within // geometry.subcluster_bytes
            kind = "data" if allocated >> number & 1 else "zero" if zero >> number & 1 else "unallocated"
            return f"{kind} (subcluster {number})", None if host_offset is None else host_offset + within
    return "unallocated", None


def _stored(found: Survey, cluster: int) -> int:
    return int(found.census.stored[cluster]) if cluster < len(found.census.stored) else 0


def _of_host(found: Survey, offset: int) -> OfHost:
    cluster = offset >> found.geometry.cluster_bits
    past_end = cluster >= found.census.clusters
    return OfHost(
        offset,
        cluster,
        past_end,
        tuple(_structures(found, cluster)),
        () if past_end else tuple(_first(_ways(found, offset), _MOST_WAYS)),
        _stored(found, cluster),
        0 if past_end else int(found.census.references[cluster]),
    )


def _first(ways: Iterator[Way], count: int) -> Iterator[Way]:
    for _, way in zip(range(count), ways, strict=False):
        yield way


def _structures(found: Survey, cluster: int) -> Iterator[str]:
    for start, stop, name in zip(found.claims.starts, found.claims.stops, found.claims.names, strict=True):
        if start <= cluster < stop:
            yield name if stop == start + 1 else f"{name}, cluster {cluster - start} of {stop - start}"
    index, blocks = found.blocks
    per_block = found.geometry.refcounts_per_block
    for at in np.flatnonzero(blocks == cluster).tolist():
        first = int(index[at]) * per_block
        yield f"refcount block {int(index[at])}, for the clusters {first} to {first + per_block - 1}"
    for owner, l1_index, table in _l2_tables(found):
        if table == cluster:
            start = l1_index << found.geometry.l1_shift
            yield f"L2 table of {owner}, L1[{l1_index}], for guest offsets from {start:#x}"
    yield from _bitmap_data(found, cluster)


def _bitmap_data(found: Survey, cluster: int) -> Iterator[str]:
    for name, at, held in _bitmap_entries(found):
        if held == cluster:
            yield f"data of bitmap {name!a}, table entry {at}"


def bitmap_clusters(found: Survey) -> Iterator[int]:
    """Host clusters that hold the bits of a bitmap."""
    for _, _, cluster in _bitmap_entries(found):
        yield cluster


def _bitmap_entries(found: Survey) -> Iterator[tuple[str, int, int]]:
    """(name of the bitmap, index in its table, host cluster) of all that can be read."""
    header = found.header
    if header.bitmaps is None or not header.autoclear & Autoclear.BITMAPS:
        return
    try:
        entries = read_bitmap_directory(found.storage, header.bitmaps, found.geometry)
    except Corrupt:
        return
    file = ImageFile(found.storage)
    for entry in entries:
        words = file.words(entry.table_offset, entry.table_entries) & np.uint64(OFFSET_MASK)
        clusters = words >> np.uint64(found.geometry.cluster_bits)
        for at in np.flatnonzero(clusters).tolist():
            yield entry.text, at, int(clusters[at])


def _l1_tables(found: Survey) -> Iterator[tuple[str, int, int]]:
    """(owner, offset, entries) of every L1 table that can be read."""
    yield _ACTIVE, found.header.l1_offset, found.header.l1_entries
    if not found.header.snapshot_count:
        return
    try:
        snapshots = read_snapshots(found.storage, found.header)
    except Corrupt:
        return
    for snapshot in snapshots:
        yield f"snapshot {snapshot.id!a} ({snapshot.name!a})", snapshot.l1_offset, snapshot.l1_entries


def _l2_tables(found: Survey) -> Iterator[tuple[str, int, int]]:
    """(owner, L1 index, cluster) of every L2 table in the file, once for each way to it."""
    file = ImageFile(found.storage)
    for owner, l1_offset, l1_entries in _l1_tables(found):
        if l1_offset + l1_entries * 8 > found.census.size + found.census.cluster_bytes:
            continue
        words = file.words(l1_offset, l1_entries)
        clusters = (words & np.uint64(OFFSET_MASK)) >> np.uint64(found.geometry.cluster_bits)
        for l1_index in np.flatnonzero((clusters != 0) & (clusters < found.census.clusters)).tolist():
            yield owner, l1_index, int(clusters[l1_index])


def _ways(found: Survey, offset: int) -> Iterator[Way]:
    """The L2 entries that lead to the cluster of a host offset, or whose compressed stream touches it."""
    geometry = found.geometry
    if geometry.external_data:
        return
    file = ImageFile(found.storage)
    held: dict[int, list[tuple[int, int]]] = {}
    cluster = offset >> geometry.cluster_bits
    for owner, l1_index, table in _l2_tables(found):
        hits = held.get(table)
        if hits is None:
            words = file.words(table << geometry.cluster_bits, geometry.l2_entries * geometry.l2_entry_words)
            hits = held[table] = list(_hits(words, cluster, geometry))
        for l2_index, entry in hits:
            try:
                state, _ = _state(decode_l2(entry, geometry), geometry, offset)
            except BadEntry as bad:
                state = f"unreadable: {bad}"
            guest_offset = (l1_index << geometry.l2_bits | l2_index) << geometry.cluster_bits
            yield Way(owner, l1_index, table << geometry.cluster_bits, l2_index, guest_offset, entry, state)


def _hits(words: Words, cluster: int, geometry: Geometry) -> Iterator[tuple[int, int]]:
    """(index, entry) of those that lead to a cluster."""
    step = geometry.l2_entry_words
    entries = words[::step]
    packed = (entries & np.uint64(COMPRESSED)) != 0
    # Cluster 0 is the header: an entry without an offset leads nowhere.
    clusters = (entries & np.uint64(OFFSET_MASK)) >> np.uint64(geometry.cluster_bits)
    leads = ~packed & (clusters == np.uint64(cluster)) & (clusters != 0)
    for index in np.flatnonzero(leads | packed).tolist():
        entry = int(entries[index]) | (int(words[index * step + 1]) << BITMAP_SHIFT if step > 1 else 0)
        if packed[index]:
            try:
                mapping = decode_l2(entry, geometry)
            except BadEntry:
                continue
            assert isinstance(mapping, Compressed)
            first = mapping.host_offset >> geometry.cluster_bits
            last = mapping.host_offset + mapping.length_bytes - 1 >> geometry.cluster_bits
            if not first <= cluster <= last:
                continue
        yield index, entry
