"""Persistent dirty bitmaps: which parts of the disk were written to since some moment (crash contract, C14).

While the disk is open for writing, the bits of an enabled bitmap live in memory, and on disk the bitmap is marked *in use*:
after a crash nobody trusts it. The mark is durable before the first change of guest data (R11); closing well stores the bits,
where they are other than those on disk, and takes the mark away. A disabled bitmap records nothing, so it stays valid all the
time.

Every change of the set of bitmaps, and both of these steps, are one transaction:

    PREPARE   the bits and tables that are new, and a whole new directory, in fresh clusters
    LINK      sector 0: the bitmaps extension leads to the new directory (or is gone), and the autoclear bit says "consistent"
    RECLAIM   the old directory, and the tables and bits that no entry leads to any more

So on disk stand the old set or the new one, never a mix. Bitmaps that we cannot use (extra data of a kind that we do not know)
are kept, and marked in use if they should record. A directory that cannot be read is given up: its autoclear bit is cleared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol, TypeVar

from cowfence.errors import Corrupt, CowfenceError, Invalid, ReadOnly, Unsupported
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.bitmap_directory import (
    AUTO,
    DIRTY_TRACKING,
    EXTRA_DATA_COMPATIBLE,
    IN_USE,
    MAX_NAME_BYTES,
    BitmapEntry,
    encode_bitmap_directory,
    read_bitmap_directory,
)
from cowfence.qcow2.dirty_bits import DirtyBits
from cowfence.qcow2.extensions import Autoclear, BitmapsPointer, ExtensionType, encode_bitmaps
from cowfence.qcow2.geometry import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_HOST_BITS, OFFSET_MASK, TABLE_ENTRY_BYTES
from cowfence.qcow2.header import Header
from cowfence.qcow2.header_change import switch_header, with_extension
from cowfence.qcow2.since import changed_since
from cowfence.qcow2.snapshot_table import find_snapshot, read_snapshots
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind
from cowfence.qcow2.transaction import Stage
from cowfence.storage.base import read_exact
from cowfence.units import KIB, div_up

T = TypeVar("T")

MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31
_DEFAULT_GRANULARITY_BYTES: Final = 64 * KIB
_ALL_ONES: Final = 1
_RESERVED: Final = ~(OFFSET_MASK | _ALL_ONES)


class Bitmap(NamedTuple):
    """A bitmap as callers see it. ``inconsistent``: it was in use when a writer died; it can only be removed."""

    name: str
    granularity_bytes: int
    enabled: bool
    inconsistent: bool


class Altering(Protocol):
    """Carries an alteration of the image out."""

    def __call__(self, body: Callable[[Alteration], T], /) -> T: ...


@dataclass(slots=True)
class _Held:
    """``bits``: None where they were not read, or cannot be. ``stored``: what is on disk is what ``bits`` are."""

    entry: BitmapEntry
    bits: DirtyBits | None = None
    stored: bool = True
    inconsistent: bool = False
    """Found marked in use."""

    @property
    def usable(self) -> bool:
        return _usable(self.entry) and not self.inconsistent


def _usable(entry: BitmapEntry) -> bool:
    known = not entry.extra or entry.flags & EXTRA_DATA_COMPATIBLE
    granular = MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS
    return bool(known) and entry.kind == DIRTY_TRACKING and granular


class Bitmaps:
    """The bitmaps of one open image. ``alter``: how an alteration is carried out; only for a disk that is open for writing."""

    def __init__(self, state: State, alter: Altering | None) -> None:
        self._state = state
        self._alter = alter
        self._reading = threading.RLock()
        """Several threads may come first; what one of them has read must not take the place of what records already. Nothing
        else is locked inside of it."""
        self._held: dict[bytes, _Held] | None = None
        self._recording: list[DirtyBits] = []
        """The bits of the enabled ones, once their marks are durable."""

    # Looking

    def __iter__(self) -> Iterator[Bitmap]:
        for held in self._load().values():
            entry = held.entry
            yield Bitmap(entry.text, 1 << entry.granularity_bits, bool(entry.flags & AUTO), held.inconsistent)

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The dirty ranges (offset, length in bytes) of a bitmap. Raises Invalid where there is none, or it is inconsistent."""
        held = self._find(name)
        with self._state.lock:
            return list(self._bits(held).ranges())

    def _load(self) -> dict[bytes, _Held]:
        with self._reading:
            if self._held is None:
                entries = _entries(self._state)
                self._held = {entry.name: _Held(entry, inconsistent=bool(entry.flags & IN_USE)) for entry in entries}
            return self._held

    def _find(self, name: str) -> _Held:
        held = self._load().get(_stored_name(name))
        if held is None:
            raise Invalid(f"Dirty bitmap '{name}' not found")
        return held

    def _bits(self, held: _Held) -> DirtyBits:
        if held.inconsistent:
            raise Invalid(f"{self._state.storage.name}: bitmap {held.entry.text!a} is inconsistent; it can only be removed")
        if not held.usable:
            raise Unsupported(self._state.storage.name, f"bitmap {held.entry.text!a}: its kind or its extra data")
        with self._reading:
            if held.bits is None:
                held.bits = _read_bits(self._state, held.entry)
            return held.bits

    # Recording

    @property
    def needs_marks(self) -> bool:
        """True if an enabled bitmap is not marked in use yet: nothing of the guest's may change before it is."""
        return any(held.entry.flags & AUTO and not held.entry.flags & IN_USE for held in self._load().values())

    def begin(self, alteration: Alteration) -> None:
        """Mark the enabled bitmaps in use, durably, and record from now on."""
        for held in self._load().values():
            if held.entry.flags & AUTO and held.usable:
                self._bits(held)
        self._store(alteration, closing=False)
        self._record()

    def _record(self) -> None:
        self._recording = [
            held.bits
            for held in self._load().values()
            if held.entry.flags & AUTO and held.bits is not None and not held.inconsistent
        ]
        self._state.record = self.mark if self._recording else None

    def mark(self, offset: int, length_bytes: int) -> None:
        """Guest data changes here. Called under the lock. Behind the end of the disk, where an alteration may work, there is
        none."""
        length_bytes = min(length_bytes, self._state.size - offset)
        for bits in self._recording:
            bits.mark(offset, length_bytes)

    def end(self, alteration: Alteration) -> None:
        """The disk is being closed: store what was recorded, and take the marks away."""
        self._store(alteration, closing=True)

    @property
    def recording(self) -> bool:
        """True if something has to be stored before the image is closed."""
        return self._held is not None and any(
            held.entry.flags & IN_USE and not held.inconsistent for held in self._held.values()
        )

    # Changing the set

    def add(self, name: str, *, granularity_bytes: int | None = None, enabled: bool = True) -> None:
        """A new bitmap, all clean. Granularity: a power of two, 512 bytes to 2 GiB (default 64 KiB, or the cluster size where
        that is smaller, but 4 KiB at least). Raises Invalid."""
        state = self._state
        stored = _stored_name(name)
        if not 1 <= len(stored) <= MAX_NAME_BYTES:
            raise Invalid(f"{state.storage.name}: a bitmap's name has 1 to {MAX_NAME_BYTES} bytes")
        if granularity_bytes is None:
            granularity_bytes = max(4 * KIB, min(_DEFAULT_GRANULARITY_BYTES, state.geometry.cluster_bytes))
        bits = granularity_bytes.bit_length() - 1
        if granularity_bytes != 1 << bits or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
            raise Invalid("Granularity must be power of 2 and at least 512, and at most 2 GiB")
        if state.header.version < 3:
            raise Invalid(f"{state.storage.name}: bitmaps need compatibility level 1.1 or above")
        if stored in self._load():
            raise Invalid(f"Bitmap already exists: {name}")
        entry = BitmapEntry(stored, 0, 0, AUTO if enabled else 0, bits)
        self._change(lambda held: {**held, stored: _Held(entry, DirtyBits(bits, state.size), stored=False)})

    def remove(self, name: str) -> None:
        """Without its bits; the guest's data is not concerned. Raises Invalid where there is none."""
        gone = self._find(name).entry.name
        self._change(lambda held: {stored: one for stored, one in held.items() if stored != gone})

    def clear(self, name: str) -> None:
        """All of it is clean. Raises Invalid."""
        self._replace(
            name, lambda held, bits: _Held(held.entry, DirtyBits(bits.granularity_bits, bits.size_bytes), stored=False)
        )

    def enable(self, name: str) -> None:
        """It records from now on. Raises Invalid."""
        self._replace(name, lambda held, bits: _Held(held.entry._replace(flags=held.entry.flags | AUTO), bits, held.stored))

    def disable(self, name: str) -> None:
        """It stays as it is from now on. Raises Invalid."""
        self._replace(name, lambda held, bits: _Held(held.entry._replace(flags=held.entry.flags & ~AUTO), bits, held.stored))

    def merge(self, name: str, others: Iterable[DirtyBits]) -> None:
        """Dirty wherever one of the others is, too. Raises Invalid."""
        found = list(others)

        def merged(held: _Held, bits: DirtyBits) -> _Held:
            sum_ = DirtyBits(bits.granularity_bits, bits.size_bytes, bits.packed)
            for other in found:
                sum_.merge(other)
            return _Held(held.entry, sum_, stored=False)

        self._replace(name, merged)

    def resume(self, name: str, later: str, moment: str) -> None:
        """It records again as if it had never stopped, and ``later``, which has recorded instead, is removed; both at once.

        Where ``later`` is missing or inconsistent, or has stopped (a later backup took over from it), what is not as it was in
        the snapshot ``moment`` (by id or name) counts as changed. Raises Invalid where there is none, with nothing changed.
        """
        stored, other = self._find(name).entry.name, _stored_name(later)
        self._bits(self._find(name))

        def resumed(held: dict[bytes, _Held]) -> dict[bytes, _Held]:
            old = self._bits(held[stored])
            bits = DirtyBits(old.granularity_bits, old.size_bytes, old.packed)
            instead = held.get(other)
            if instead is not None and instead.usable and instead.entry.flags & AUTO:
                bits.merge(self._bits(instead))
            else:
                self._mark_changed_since(moment, bits)
            left = {found: one for found, one in held.items() if found != other}
            entry = left[stored].entry
            left[stored] = _Held(entry._replace(flags=entry.flags | AUTO), bits, stored=False)
            return left

        self._change(resumed)

    def hand_over(self, name: str, later: str, moment: str) -> None:
        """It is removed, if it is there, and ``later`` goes on alone; both at once.

        Where ``later`` is inconsistent, it records again, and has what is not as it was in the snapshot ``moment`` (by id or
        name). Raises Invalid where there is none, with nothing changed.
        """
        stored, other = _stored_name(name), _stored_name(later)

        def handed_over(held: dict[bytes, _Held]) -> dict[bytes, _Held]:
            left = {found: one for found, one in held.items() if found != stored}
            if other in left and left[other].inconsistent and _usable(left[other].entry):
                entry = left[other].entry
                bits = DirtyBits(entry.granularity_bits, self._state.size)
                self._mark_changed_since(moment, bits)
                left[other] = _Held(entry._replace(flags=entry.flags | AUTO), bits, stored=False)
            return left

        self._change(handed_over)

    def _mark_changed_since(self, moment: str, bits: DirtyBits) -> None:
        header = self._state.header
        snapshots = read_snapshots(self._state.storage, header) if header.snapshot_count else ()
        snapshot = find_snapshot(snapshots, moment)
        if snapshot is None:
            raise Invalid(f"{self._state.storage.name}: there is no snapshot {moment!a}")
        for offset, length_bytes in changed_since(self._state, snapshot):
            bits.mark(offset, min(length_bytes, bits.size_bytes - offset))

    def bits_of(self, name: str) -> DirtyBits:
        """A copy of a bitmap's bits, to be merged into another. Raises Invalid."""
        held = self._find(name)
        with self._state.lock:
            bits = self._bits(held)
            return DirtyBits(bits.granularity_bits, bits.size_bytes, bits.packed)

    def _replace(self, name: str, make: Callable[[_Held, DirtyBits], _Held]) -> None:
        stored = self._find(name).entry.name
        self._bits(self._find(name))
        self._change(lambda held: {**held, stored: make(held[stored], self._bits(held[stored]))})

    def _change(self, make: Callable[[dict[bytes, _Held]], dict[bytes, _Held]]) -> None:
        """``make`` is called when nobody records any more."""
        if self._alter is None:
            raise ReadOnly(f"{self._state.storage.name}: the image is open read-only")

        def body(alteration: Alteration) -> None:
            before = self._load()
            after = make(before)
            if len(after) > MAX_BITMAPS:
                raise Invalid(f"{self._state.storage.name}: an image has {MAX_BITMAPS} bitmaps at most")
            self._held = after
            try:
                self._store(alteration, closing=False)
            except BaseException:
                self._held = before
                raise
            self._record()

        self._alter(body)

    def follow_size(self, alteration: Alteration) -> None:
        """Before the disk's size changes: read all bits, and mark every bitmap in use, for its table is of another length soon.
        They are stored anew with the next change or at the end. Raises Invalid where an inconsistent one stands in the way."""
        for held in self._load().values():
            self._bits(held)
            held.stored = False
        self._store(alteration, closing=False, all_in_use=True)

    def moved(self, tables: Mapping[int, int]) -> None:
        """Tables stand elsewhere now, with the same content; by their old offset, in bytes."""
        for held in (self._held or {}).values():
            if held.entry.table_offset in tables:
                held.entry = held.entry._replace(table_offset=tables[held.entry.table_offset])

    def resized(self) -> None:
        """The disk has its new size. What is new of it is dirty in each bitmap, also where that does not record: it may have
        been cut off before, and with it the bits that said what was there."""
        for held in self._load().values():
            if held.bits is not None:
                old_bytes = held.bits.size_bytes
                held.bits.resize(self._state.size)
                held.bits.mark(old_bytes, self._state.size - old_bytes)

    # Storing

    def _store(self, alteration: Alteration, *, closing: bool, all_in_use: bool = False) -> None:
        held_now = list(self._load().values())
        entries: list[BitmapEntry] = []
        payloads: list[_Payload | None] = []
        for held in held_now:
            entry = held.entry
            if (
                held.inconsistent
                or (entry.flags & AUTO and not held.usable)
                or (not closing and (all_in_use or entry.flags & AUTO))
            ):
                entry = entry._replace(flags=entry.flags | IN_USE)
            else:
                entry = entry._replace(flags=entry.flags & ~IN_USE)
            # The bits of one in use on disk are worth nothing; only its table has to be there.
            was_recording = bool(held.entry.flags & IN_USE) and not held.inconsistent
            wanted = not entry.flags & IN_USE and (was_recording or not held.stored)
            bits = held.bits if wanted or not entry.table_entries else None
            payloads.append(None if bits is None or _stands(self._state, entry, bits) else _Payload(self._state, bits))
            entries.append(entry)
        stored = alteration.transaction(lambda: _enter(self._state, entries, payloads))
        for held, entry, payload in zip(held_now, stored, payloads, strict=True):
            held.entry = entry
            held.stored = held.stored or payload is not None
        alteration.read_again()


class _Payload:
    """The bits of a bitmap as clusters: those with some bits set and some not need one."""

    def __init__(self, state: State, bits: DirtyBits) -> None:
        cluster_bytes = state.geometry.cluster_bytes
        self.words: list[int] = []
        """The table, 0 and "all ones" done; the others are numbered from 2 on, twice over."""
        self.clusters: list[bytes] = []
        packed = bytes(bits.packed)
        for at in range(0, len(packed), cluster_bytes):
            piece = packed[at : at + cluster_bytes]
            if not piece.strip(b"\0"):
                self.words.append(0)
            elif len(piece) == cluster_bytes and not piece.strip(b"\xff"):
                self.words.append(_ALL_ONES)
            else:
                self.words.append(2 + 2 * len(self.clusters))
                self.clusters.append(piece.ljust(cluster_bytes, b"\0"))
        self.table_clusters = state.geometry.clusters_for(len(self.words) * TABLE_ENTRY_BYTES)

    def table(self, first_offset: int, cluster_bits: int) -> bytes:
        """The table's bytes, where the clusters stand one behind the other from an offset on."""
        words = [word if word < 2 else first_offset + ((word - 2 >> 1) << cluster_bits) for word in self.words]
        return b"".join(word.to_bytes(TABLE_ENTRY_BYTES) for word in words)


def _enter(state: State, entries: Sequence[BitmapEntry], payloads: Sequence[_Payload | None]) -> list[BitmapEntry]:
    """Enter the new set into the pending transaction; returns the entries with their new places."""
    geometry, header = state.geometry, state.header
    bits = geometry.cluster_bits
    directory_bytes = len(encode_bitmap_directory(entries))
    if directory_bytes > MAX_BITMAP_DIRECTORY_BYTES:
        raise Invalid(f"{state.storage.name}: the bitmap directory would exceed {MAX_BITMAP_DIRECTORY_BYTES} bytes")
    directory_clusters = geometry.clusters_for(directory_bytes)
    total = directory_clusters + sum(p.table_clusters + len(p.clusters) for p in payloads if p is not None)
    old = _clusters_of(state, _entries(state))
    first = state.allocator.reserve_contiguous(total, wait=True).first if total else 0
    at = first + directory_clusters
    placed: list[BitmapEntry] = []
    puts: list[tuple[int, bytes]] = []
    for entry, payload in zip(entries, payloads, strict=True):
        if payload is None:
            placed.append(entry)
            continue
        data_at = at + payload.table_clusters
        table = payload.table(data_at << bits, bits)
        puts.append((at << bits, table.ljust(payload.table_clusters << bits, b"\0")))
        puts += [((data_at + number) << bits, cluster) for number, cluster in enumerate(payload.clusters)]
        table_offset = at << bits if payload.words else 0
        placed.append(entry._replace(table_offset=table_offset, table_entries=len(payload.words)))
        at = data_at + len(payload.clusters)
    pointer = BitmapsPointer(len(placed), directory_bytes, first << bits) if placed else None
    if pointer is not None:
        puts.append((first << bits, encode_bitmap_directory(placed).ljust(directory_clusters << bits, b"\0")))
    switch_header(state, lambda now: _with_pointer(now, pointer))
    # From here on nothing fails.
    if total:
        state.layout.claim_new(first << bits, total, Kind.BITMAPS)
        state.refcounts.increment(first, total)
    for offset, data in puts:
        state.pending.put(Stage.PREPARE, offset, data, "bitmap.new", Kind.BITMAPS)
    kept = {cluster for entry in placed for cluster in _table_clusters(state, entry)}
    kept |= _clusters_of(state, [entry for entry, payload in zip(placed, payloads, strict=True) if payload is None])
    gone = sorted(old - kept)
    if header.bitmaps is not None and header.autoclear & Autoclear.BITMAPS:
        start = header.bitmaps.directory_offset >> bits
        gone += range(start, start + geometry.clusters_for(header.bitmaps.directory_bytes))
    for cluster in gone:
        state.pending.free(cluster, table=True)
    return placed


def _with_pointer(header: Header, pointer: BitmapsPointer | None) -> Header:
    data = None if pointer is None else encode_bitmaps(pointer).data
    autoclear = header.autoclear & ~Autoclear.BITMAPS | (Autoclear.BITMAPS if pointer is not None else 0)
    return replace(header, extensions=with_extension(header, ExtensionType.BITMAPS, data), autoclear=autoclear)


# Reading


def _stored_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _entries(state: State) -> tuple[BitmapEntry, ...]:
    """The entries on disk; none where the autoclear bit says that they are outdated."""
    pointer = state.header.bitmaps
    if pointer is None or not state.header.autoclear & Autoclear.BITMAPS:
        return ()
    return read_bitmap_directory(state.storage, pointer, state.geometry)


def _table(state: State, entry: BitmapEntry) -> list[int]:
    """The words of a bitmap's table. Raises Corrupt."""
    where = f"{state.storage.name}: bitmap {entry.text!a}"
    if entry.table_offset + entry.table_bytes > state.storage.size():
        raise Corrupt(where, "its table reaches past the end of the file")
    data = bytes(read_exact(state.storage, entry.table_offset, entry.table_bytes, "bitmap table"))
    words = [int.from_bytes(data[at : at + 8]) for at in range(0, len(data), 8)]
    for number, word in enumerate(words):
        offset = word & OFFSET_MASK
        bad = word & _RESERVED or (offset and word & _ALL_ONES) or offset & state.geometry.cluster_mask
        if bad or offset >= 1 << MAX_HOST_BITS or offset + state.geometry.cluster_bytes > state.storage.size():
            raise Corrupt(f"{where}: table[{number}]", f"{word:#x} is no entry of a bitmap table")
    return words


def _read_bits(state: State, entry: BitmapEntry) -> DirtyBits:
    """The bits as they are on disk. Raises Corrupt."""
    bits = DirtyBits(entry.granularity_bits, state.size)
    cluster_bytes = state.geometry.cluster_bytes
    expected = div_up(len(bits.packed), cluster_bytes)
    if entry.table_entries != expected:
        what = f"its table has {entry.table_entries} entries, a disk of {state.size} bytes needs {expected}"
        raise Corrupt(f"{state.storage.name}: bitmap {entry.text!a}", what)
    packed = bytearray()
    for word in _table(state, entry):
        offset = word & OFFSET_MASK
        if offset:
            packed += read_exact(state.storage, offset, cluster_bytes, "bitmap data")
        else:
            packed += (b"\xff" if word & _ALL_ONES else b"\0") * cluster_bytes
    return DirtyBits(entry.granularity_bits, state.size, packed)


def _stands(state: State, entry: BitmapEntry, bits: DirtyBits) -> bool:
    """Whether a bitmap's bits are those on disk already. These are durable: they were, before any entry led to them."""
    if not entry.table_entries:
        return False
    try:
        return _read_bits(state, entry).packed == bits.packed
    except CowfenceError:
        return False


def _table_clusters(state: State, entry: BitmapEntry) -> range:
    first = entry.table_offset >> state.geometry.cluster_bits
    return range(first, first + state.geometry.clusters_for(entry.table_bytes)) if entry.table_offset else range(0)


def _clusters_of(state: State, entries: Iterable[BitmapEntry]) -> set[int]:
    """Host clusters of the tables and bits of some entries that are on disk. Raises Corrupt."""
    found: set[int] = set()
    for entry in entries:
        if entry.table_offset:
            found |= set(_table_clusters(state, entry))
            found |= {
                (word & OFFSET_MASK) >> state.geometry.cluster_bits for word in _table(state, entry) if word & OFFSET_MASK
            }
    return found
