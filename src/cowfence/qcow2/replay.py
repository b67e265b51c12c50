"""The replay: carry out what a dead writer had acknowledged and not committed, from its journal.

Each generation goes through the same transaction as in the writer: PREPARE | fence | LINK | fence | RECLAIM, with the overlap
check, by the same ``Pending`` and ``Committer``. Only the tables are simpler: those that the notes name, one cluster each, as
they stand on disk. What stands there may be older than the notes, or as new, where the writer died in the middle of a commit:
the notes are absolute values, so that doing them again changes nothing.

An entry of a table that the same generation has made belongs to the table's first content; in any other generation it is a
link. That follows from the order of the notes and needs no note of its own.

A generation is retired in the journal before its clusters are counted down, here as in the writer: a replay that is killed
may be done again from the beginning, and nothing is counted down twice.

It begins with a fence, as every opening for writing does: the dead writer's data may stand in the page cache only. Where that
fence fails, or where one failed in the writer's life (*poisoned*), nothing is done.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from cowfence.errors import Corrupt, CowfenceError
from cowfence.qcow2.assemble import Options, assemble, claim_all
from cowfence.qcow2.geometry import MAX_L1_BYTES, OFFSET_MASK
from cowfence.qcow2.header import check_bounds, check_supported, read_header
from cowfence.qcow2.journal import COPY, FREED, FRESH, HEADER, PLACE_BITS, PLACE_MASK, Group, Journal
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import KIND_NUMBERS, AnyTable, Kind, RefcountBlock, Table
from cowfence.qcow2.transaction import Change, Committer, Freed, Pending, Stage, write_changes
from cowfence.storage.base import Storage, read_padded
from cowfence.units import SECTOR_BYTES

_KINDS = {number: kind for kind, number in KIND_NUMBERS.items()}


@dataclass(slots=True)
class Replayed:
    """What a replay did: ``generations`` were carried out whole, with ``groups`` calls of the writer in them. ``failure``:
    what ended it before its end; what comes after it in the journal was not done."""

    generations: int = 0
    groups: int = 0
    failure: CowfenceError | None = None


def replay(storage: Storage, journal: Journal, data: Storage | None = None) -> Replayed:
    """Carry out what is not retired in ``journal`` on the image in ``storage``, whose writer is dead and whose lock is held.
    ``data``: its external data file, which has all that the writer noted, and only has to be fenced.

    Never raises what the image or the host is the cause of: see ``Replayed.failure``.
    """
    done = Replayed()
    try:
        if journal.closed:
            return done
        if journal.poisoned:
            raise CowfenceError(
                f"{storage.name}: a fence failed before its writer died: what it did since its last flush is lost"
            )
        generations = [
            (number, list(groups)) for number, groups in groupby(journal.unretired(), lambda group: group.generation)
        ]
        if generations:
            if data is not None:
                data.fence("keeper.fence")
            _carry_out(storage, journal, generations, done)
        if journal.damaged:
            raise Corrupt(f"{storage.name}: journal", "a checksum is wrong; what was noted behind it is lost")
    except CowfenceError as failure:
        done.failure = failure
    return done


def _carry_out(storage: Storage, journal: Journal, generations: list[tuple[int, list[Group]]], done: Replayed) -> None:
    storage.fence("keeper.fence")
    header = read_header(storage)
    check_supported(header, storage.name)
    check_bounds(header, storage.size(), storage.name)
    state = assemble(storage, header, None, Options())
    claim_all(state)
    for number, groups in generations:
        _Generation(state, journal, number).carry_out(groups)
        done.generations += 1
        done.groups += len(groups)
    storage.fence("keeper.fence")


class _Generation:
    """One generation's transaction. It is its own reclaimer."""

    def __init__(self, state: State, journal: Journal, number: int) -> None:
        self._storage = state.storage
        self._layout: Layout = state.layout
        self._geometry = state.geometry
        self._journal = journal
        self._number = number
        self._pending = Pending()
        self._tables: dict[int, AnyTable] = {}
        """By host cluster, as they are once this generation is done."""

    def carry_out(self, groups: list[Group]) -> None:
        for group in groups:
            self._note_all(group.notes)
        if self._pending:
            Committer(self._storage, self._layout, threading.Lock(), self._pending, self).commit()
        else:
            self._journal.retire(self._number)

    def _note_all(self, notes: array[int]) -> None:
        words = iter(notes)
        try:
            for word in words:
                self._note(word >> PLACE_BITS, word & PLACE_MASK, words)
        except (StopIteration, KeyError):
            raise self._wrong("a note is cut short, or names a kind of table that there is not") from None

    def _note(self, tag: int, place: int, words: Iterator[int]) -> None:
        if tag in _KINDS:
            self._set(_KINDS[tag], place, next(words))
        elif tag in (FRESH, COPY):
            described = next(words)
            source = (next(words), next(words)) if tag == COPY else (0, 0)
            self._make(_KINDS[described & 0xFF], place >> 3, described >> 8, *source)
        elif tag == HEADER:
            offset, length_bytes = place >> 3, next(words)
            if offset + length_bytes > SECTOR_BYTES:
                raise self._wrong("a note of header bytes reaches past sector 0")
            data = array("Q", [next(words) for _ in range(-(-length_bytes // 8))]).tobytes()[:length_bytes]
            self._pending.patch_header(offset, data, "header.link")
        elif tag == FREED:
            count = next(words)
            self._check_length((count >> 1) << self._geometry.cluster_bits)
            self._pending.free(place, count >> 1, table=bool(count & 1))
        else:
            raise self._wrong(f"a note has the unknown tag {tag}")

    def _check_length(self, length_bytes: int) -> None:
        """Nothing that a note names is longer than the longest L1 table: what is, would keep us busy for ever."""
        if length_bytes > MAX_L1_BYTES:
            raise self._wrong(f"a note is about {length_bytes} bytes")

    def _wrong(self, what: str) -> Corrupt:
        return Corrupt(f"{self._storage.name}: journal", what)

    def _set(self, kind: Kind, place: int, value: int) -> None:
        cluster_bits = self._geometry.cluster_bits
        table = self._table(kind, place >> cluster_bits + 3)
        if value >> table.bits:
            raise self._wrong(f"the count {value} has more than {table.bits} bits")
        self._pending.set(table, (place & (8 << cluster_bits) - 1) // table.bits, value)

    def _make(self, kind: Kind, offset: int, length_bytes: int, source: int, source_bytes: int) -> None:
        """A new table: zeros, or the beginning of another one."""
        self._check_length(length_bytes)
        bits, cluster_bytes = self._geometry.cluster_bits, self._geometry.cluster_bytes
        first = offset >> bits
        # The same kind may stand there already, where the writer died after it had linked the table.
        self._layout.claim(offset, self._geometry.clusters_for(length_bytes), kind)
        for number in range(self._geometry.clusters_for(length_bytes)):
            content = bytearray(cluster_bytes)
            kept = min(source_bytes - number * cluster_bytes, cluster_bytes)
            if kept > 0:
                begins_as = self._table(kind, ((source & PLACE_MASK) >> 3 + bits) + number)
                content[:kept] = begins_as.content()[:kept]
            table = self._decode(kind, first + number, content)
            table.fresh = True
            self._tables[first + number] = table
            self._pending.touch(table)

    def _table(self, kind: Kind, cluster: int) -> AnyTable:
        table = self._tables.get(cluster)
        if table is None or table.kind is not kind:
            content = bytearray(self._geometry.cluster_bytes)
            read_padded(self._storage, cluster << self._geometry.cluster_bits, content)
            table = self._tables[cluster] = self._decode(kind, cluster, content)
        return table

    def _decode(self, kind: Kind, cluster: int, content: bytearray) -> AnyTable:
        offset = cluster << self._geometry.cluster_bits
        if kind is Kind.REFCOUNT_BLOCK:
            return RefcountBlock(0, offset, self._geometry.refcount_bits, content)
        return Table.from_bytes(kind, 0, offset, content)

    # RECLAIM

    def reclaim(self, freed: list[Freed]) -> None:
        """LINK is durable. Retire the generation, then take one reference from each cluster that it freed."""
        self._journal.retire(self._number)
        header = read_header(self._storage)
        table_cluster = header.refcount_table_offset >> self._geometry.cluster_bits
        table_entries = header.refcount_table_clusters * self._geometry.table_entries_per_cluster
        blocks: dict[int, RefcountBlock] = {}
        for first, count, _, held_table in freed:
            for cluster in range(first, first + count):
                if held_table:
                    self._layout.drop(cluster)
                index, at = divmod(cluster, self._geometry.refcounts_per_block)
                if index >= table_entries:
                    continue
                part, within = divmod(index, self._geometry.table_entries_per_cluster)
                table = self._table(Kind.REFCOUNT_TABLE, table_cluster + part)
                assert isinstance(table, Table)
                offset = table.entries[within] & OFFSET_MASK
                if not offset:
                    continue
                block = self._table(Kind.REFCOUNT_BLOCK, offset >> self._geometry.cluster_bits)
                assert isinstance(block, RefcountBlock)
                stored = block.get(at)
                # As in the writer: a damaged image's count never goes below 0, and a table in use keeps its cluster.
                if stored and not (stored == 1 and cluster in self._layout.kinds):
                    block.set(at, stored - 1)
                    blocks[offset] = block
        changes = [
            Change(Stage.RECLAIM, 0, offset + s * SECTOR_BYTES, block.sector(s), "refcount.decrement", block.kind)
            for offset, block in blocks.items()
            for s in block.dirty
        ]
        write_changes(self._storage, self._layout, changes)
