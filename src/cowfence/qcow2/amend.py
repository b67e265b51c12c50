"""Amending: the fields of the header that say how an image is written (crash contract, C8, C9).

==================  ================================================================  =========================================
change              transactions                                                      a crash after each
==================  ================================================================  =========================================
version 3, lazy,    LINK     sector 0 (see ``header_change``)                         as it was, or as it is wanted
data file
width of refcounts  1 PREPARE  a whole new refcount structure, behind the end of the  the old structure counts, and nothing
                      file: nobody refers to it, so the old one does not count it     leads to the new one
                      LINK     sector 0: table, clusters, width                       the new structure counts
                    2 RECLAIM  the old structure                                      the same
version 2           1 LINK     zero clusters become data or unallocated, for version  the same disk
                      2 has none
                    2 LINK     sector 0: a header of 72 bytes                         version 2
==================  ================================================================  =========================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from cowfence.errors import Invalid, Unsupported
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.census import Counts
from cowfence.qcow2.entries import COMPRESSED, ZERO
from cowfence.qcow2.extensions import Autoclear, Compatible, ExtensionType, Incompatible, default_feature_names
from cowfence.qcow2.geometry import MAX_HOST_BITS, MAX_REFCOUNT_TABLE_BYTES, OFFSET_MASK, REFCOUNT_ORDER_V2, HostOffset
from cowfence.qcow2.header import HEADER_BYTES_V2, HEADER_BYTES_V3, Header
from cowfence.qcow2.header_change import switch_header, with_extension
from cowfence.qcow2.mapping import RunKind, runs
from cowfence.qcow2.snapshot_table import read_snapshots
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind, counts_bytes, counts_view
from cowfence.qcow2.transaction import Change, Stage, write_changes
from cowfence.storage.base import read_exact
from cowfence.units import MIB, div_up

_ZEROS: Final = memoryview(bytes(MIB))


def set_lazy_refcounts(alteration: Alteration, on: bool) -> None:
    """Set or clear the bit by which an engine may postpone refcounts. Raises Invalid for version 2."""
    state = alteration.state
    header = state.header
    if header.version < 3:
        if not on:
            return
        raise Invalid(
            f"{state.storage.name}: Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or "
            "greater)"
        )
    compatible = header.compatible & ~Compatible.LAZY_REFCOUNTS | (Compatible.LAZY_REFCOUNTS if on else 0)
    if compatible != header.compatible:
        alteration.transaction(lambda: switch_header(state, lambda now: replace(now, compatible=compatible)))
        alteration.read_again()


def set_data_file(alteration: Alteration, name: str | None, *, raw: bool | None) -> None:
    """Store another ``name`` for the external data file (empty: none), which is the same file, or holds the same; and whether
    it can be read by itself, which can only be given up. None: as it is. Raises Invalid."""
    state = alteration.state
    header = state.header
    if name is not None and not state.geometry.external_data:
        raise Invalid("data-file can only be set for images that use an external data file")
    if raw and not state.raw_data:
        raise Invalid("data-file-raw cannot be set on existing images")
    stored = None if not name else name.encode("utf-8", "surrogateescape")

    def change(now: Header) -> Header:
        extensions = now.extensions if name is None else with_extension(now, ExtensionType.DATA_FILE_NAME, stored)
        autoclear = now.autoclear & ~Autoclear.DATA_FILE_RAW if raw is False else now.autoclear
        return replace(now, extensions=extensions, autoclear=autoclear, backing_offset=0)

    if change(header) != replace(header, backing_offset=0):
        alteration.transaction(lambda: switch_header(state, change))
        alteration.read_again()


def upgrade(alteration: Alteration) -> None:
    """Make version 3 of version 2: nothing but the header differs."""
    state = alteration.state
    header = state.header
    if header.version >= 3:
        return
    others = tuple(extension for extension in header.extensions if extension.type != ExtensionType.FEATURE_NAMES)

    def change(now: Header) -> Header:
        return replace(
            now,
            version=3,
            header_length=HEADER_BYTES_V3,
            additional=bytes(7),
            backing_offset=0,
            extensions=(*others, default_feature_names()),
        )

    alteration.transaction(lambda: switch_header(state, change))
    alteration.read_again()


def downgrade(alteration: Alteration) -> None:
    """Make version 2 of version 3. Raises Invalid for refcounts of another width than 16 bits, Unsupported, by name, for what
    version 2 cannot hold."""
    state = alteration.state
    header = state.header
    if header.version < 3:
        return
    if header.refcount_order != REFCOUNT_ORDER_V2:
        raise Invalid(f"{state.storage.name}: compat=0.10 requires refcount_bits=16")
    _refuse_what_version_2_has_not(state)
    _expand_zeroes(alteration)
    _refuse_zeroes_of_snapshots(state)
    others = tuple(extension for extension in header.extensions if extension.type != ExtensionType.FEATURE_NAMES)

    def change(now: Header) -> Header:
        return replace(
            now,
            version=2,
            incompatible=0,
            compatible=0,
            autoclear=0,
            header_length=HEADER_BYTES_V2,
            additional=b"",
            backing_offset=0,
            extensions=others,
        )

    alteration.transaction(lambda: switch_header(state, change))
    alteration.read_again()


def _refuse_what_version_2_has_not(state: State) -> None:
    header, name = state.header, state.storage.name
    if header.incompatible & ~Incompatible.DIRTY:
        raise Unsupported(name, f"compat=0.10 with incompatible features {header.incompatible:#x}")
    if header.bitmaps is not None:
        raise Unsupported(name, "compat=0.10 with persistent bitmaps")
    if header.encryption is not None or header.crypt_method == 2:
        raise Unsupported(name, "compat=0.10 with LUKS encryption")
    if any(header.additional) or header.header_length > HEADER_BYTES_V3:
        raise Unsupported(name, "compat=0.10 with header fields that are unknown here")
    if header.snapshot_count:
        for snapshot in read_snapshots(state.storage, header):
            if snapshot.disk_size_bytes != header.size_bytes or snapshot.vm_state_bytes > 0xFFFFFFFF:
                raise Unsupported(name, "Internal snapshots prevent downgrade of image")


def _refuse_zeroes_of_snapshots(state: State) -> None:
    """A snapshot's own tables are not rewritten."""
    if not state.header.snapshot_count:
        return
    for snapshot in read_snapshots(state.storage, state.header):
        l1 = np.frombuffer(read_exact(state.storage, snapshot.l1_offset, snapshot.l1_entries * 8, "L1 table"), ">u8")
        for entry in l1[l1 != 0].tolist():
            data = read_exact(state.storage, entry & OFFSET_MASK, state.geometry.cluster_bytes, "L2 table")
            entries = np.frombuffer(data, ">u8")
            if (entries & np.uint64(COMPRESSED | ZERO) == ZERO).any():
                raise Unsupported(state.storage.name, "compat=0.10 with zero clusters in an internal snapshot")


def _expand_zeroes(alteration: Alteration) -> None:
    """Zero clusters become data where the backing file would show, else unallocated."""
    state, zeroes = alteration.state, alteration.zeroes
    assert zeroes is not None
    geometry = state.geometry
    for index in range(len(state.l1.entries)):
        if not state.l1.entries[index]:
            continue
        start = index << geometry.l1_shift
        with state.lock:
            found = [run for run in runs(state, start, geometry.l2_coverage_bytes, wait=True) if run.kind is RunKind.ZERO]
        for run in found:
            at, end = run.offset, run.offset + run.length_bytes
            below = min(max(at, state.backing_bytes), end)
            below += -below % geometry.cluster_bytes
            while at < min(below, end):
                piece = _ZEROS[: min(end, below) - at]
                at += alteration.transaction(lambda at=at, piece=piece: zeroes.write(at, piece, wait=True))  # type: ignore[misc]
            while at < end:
                at += alteration.transaction(lambda at=at, end=end: zeroes.forget(at, end - at, wait=True))  # type: ignore[misc]


# The width of refcounts


def change_refcount_bits(alteration: Alteration, bits: int) -> None:
    """Give the image refcounts of another width. Raises Invalid for one that cannot be, or is too narrow for a count."""
    state = alteration.state
    name, header = state.storage.name, state.header
    order = bits.bit_length() - 1
    if bits != 1 << max(order, 0) or not 0 <= order <= 6:
        raise Invalid(f"{name}: Refcount width must be a power of two and may not exceed 64 bits")
    if header.version < 3 and order != REFCOUNT_ORDER_V2:
        raise Invalid(
            f"{name}: Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        )
    if order == header.refcount_order:
        return
    new = _NewRefcounts(state, order)
    new.write()

    def change(now: Header) -> Header:
        return replace(
            now,
            refcount_order=order,
            refcount_table_offset=new.table_offset,
            refcount_table_clusters=new.table_clusters,
        )

    old = [entry >> header.cluster_bits for entry in state.refcounts.table.entries if entry]
    first = header.refcount_table_offset >> header.cluster_bits
    old += range(first, first + header.refcount_table_clusters)
    alteration.transaction(lambda: switch_header(state, change))
    alteration.read_again()
    alteration.transaction(lambda: _free(state, old))


def _free(state: State, clusters: list[int]) -> None:
    for cluster in clusters:
        state.pending.free(cluster)


class _NewRefcounts:
    """Table and blocks for all that is counted now and for themselves, behind everything that is in use."""

    def __init__(self, state: State, order: int) -> None:
        self._state = state
        geometry = state.geometry
        self._bits = 1 << order
        self._per_block = geometry.cluster_bytes * 8 // self._bits
        used_end, indices = self._in_use()
        self._first = max(used_end, geometry.clusters_for(state.storage.size()))
        blocks, self.table_clusters = 0, 0
        wanted = set(indices)
        while True:
            total = self._first + self.table_clusters + len(wanted)
            more = set(indices) | set(range(self._first // self._per_block, div_up(total, self._per_block)))
            table = div_up(max(more) + 1, geometry.table_entries_per_cluster)
            if len(more) == blocks and table == self.table_clusters and more == wanted:
                break
            wanted, blocks, self.table_clusters = more, len(more), table
        self._blocks = sorted(wanted)
        self._end = total
        if table * geometry.cluster_bytes > MAX_REFCOUNT_TABLE_BYTES or total << geometry.cluster_bits > 1 << MAX_HOST_BITS:
            raise Invalid(f"{state.storage.name}: a refcount table for this width would be too large")
        self.table_offset = HostOffset(self._first << geometry.cluster_bits)

    def _old_blocks(self) -> Iterator[tuple[int, Counts]]:
        """The first cluster and the counts of each block there is, in order."""
        state = self._state
        for index, entry in enumerate(state.refcounts.table.entries):
            if entry:
                offset = state.refcounts.block_offset(index)
                assert offset is not None
                data = read_exact(state.storage, offset, state.geometry.cluster_bytes, "refcount block")
                bits = state.geometry.refcount_bits
                counts = np.frombuffer(data, f">u{bits // 8}") if bits >= 8 else counts_view(data, bits)
                yield index * state.geometry.refcounts_per_block, counts

    def _in_use(self) -> tuple[int, list[int]]:
        """The cluster behind the last that is counted, and the new blocks that are needed. Raises Invalid for a count that
        does not fit."""
        end, found = 0, set[int]()
        limit = (1 << self._bits) - 1
        for first, counts in self._old_blocks():
            used = np.flatnonzero(counts)
            if not len(used):
                continue
            if self._bits < self._state.geometry.refcount_bits and (counts > limit).any():
                at = int(np.flatnonzero(counts > limit)[0])
                raise Invalid(
                    f"{self._state.storage.name}: Cannot decrease refcount entry width to {self._bits} bits: Cluster at offset "
                    f"{first + at << self._state.geometry.cluster_bits:#x} has a refcount of {int(counts[at])}"
                )
            end = first + int(used[-1]) + 1
            found.update(((used + first) // self._per_block).tolist())
        return end, sorted(found)

    def write(self) -> None:
        """All of it; not fenced, and nothing leads to it."""
        state = self._state
        bits = state.geometry.cluster_bits
        state.layout.claim_new(self.table_offset, self.table_clusters, Kind.REFCOUNT_TABLE)
        first_block = self._first + self.table_clusters
        state.layout.claim_new(first_block << bits, len(self._blocks), Kind.REFCOUNT_BLOCK)
        table = np.zeros(self.table_clusters * state.geometry.table_entries_per_cluster, ">u8")
        counts = np.zeros(self._per_block, np.uint64)
        at, old = 0, self._old_blocks()
        piece = next(old, None)
        for number, index in enumerate(self._blocks):
            start, stop = index * self._per_block, (index + 1) * self._per_block
            counts[:] = 0
            while piece is not None and piece[0] < stop:
                first, stored = piece
                low, high = max(start, first), min(stop, first + len(stored))
                if low < high:
                    counts[low - start : high - start] = stored[low - first : high - first]
                if first + len(stored) > stop:
                    break
                piece = next(old, None)
            low, high = max(start, self._first), min(stop, self._end)
            if low < high:
                counts[low - start : high - start] = 1
            at = first_block + number
            table[index] = at << bits
            self._put(at << bits, counts_bytes(counts, self._bits), "refcount_block.new", Kind.REFCOUNT_BLOCK)
        self._put(self.table_offset, table.tobytes(), "refcount_table.new", Kind.REFCOUNT_TABLE)

    def _put(self, offset: int, data: bytes, mark: str, kind: Kind) -> None:
        state = self._state
        write_changes(state.storage, state.layout, [Change(Stage.PREPARE, 0, offset, data, mark, kind)])
