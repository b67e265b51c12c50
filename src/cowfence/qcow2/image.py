"""The face of an open image: a ``Disk`` over (image file, backing disk).

Opening for writing begins with a fence, before anything that was read is relied on: what a killed process wrote may stand in
the page cache only, and a later power cut would take it back (crash contract, R9). Then the tables are read, and every cluster
of metadata is listed for the overlap check.

Each call runs its plan under the lock; where the plan needs a commit or cold bytes, the lock is left, the need is satisfied,
and the plan begins again. ``submit`` does the same for a batch, with the plain cases inline: they are most of what a server
does.
"""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from cowfence.disk.base import BLOCKED, Disk, Outcome, Request, Verb
from cowfence.disk.fileview import as_file
from cowfence.errors import Closed, Corrupt, CowfenceError, NoSpace, OutOfRange, ReadOnly, WouldBlock
from cowfence.extents import Extent, merge
from cowfence.qcow2.allocator import Allocator
from cowfence.qcow2.cache import TableCache
from cowfence.qcow2.describe import ImageInfo, describe
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.extensions import Autoclear, Incompatible
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.header import (
    Header,
    check_bounds,
    check_overlaps,
    check_supported,
    feature_bits_patch,
    read_header,
)
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.mapping import RunKind, runs
from cowfence.qcow2.read import Reads
from cowfence.qcow2.reader import Cold, MetadataReader, NeedsCommit
from cowfence.qcow2.reclaim import ClusterReclaimer
from cowfence.qcow2.refcounts import Refcounts
from cowfence.qcow2.snapshot_table import read_snapshots
from cowfence.qcow2.state import State, Tickets
from cowfence.qcow2.tables import Kind, Table
from cowfence.qcow2.transaction import Committer, Pending
from cowfence.qcow2.write import Writes
from cowfence.qcow2.zero import Zeroes
from cowfence.storage.base import Buffer, Storage, WritableBuffer, read_exact
from cowfence.units import KIB, MIB

T = TypeVar("T")

_EXTENTS_PIECE_TABLES = 4096
"""L2 tables that are looked at in one go, under the lock."""


class CacheMode(Enum):
    """When a write is durable. WRITEBACK: at the next flush. WRITETHROUGH: when it returns. UNSAFE: flushes do nothing."""

    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    UNSAFE = "unsafe"


@dataclass(frozen=True, slots=True)
class Options:
    """How an image is opened. Sizes in bytes, times in seconds.

    ``cache_bytes`` bounds the L2 tables in memory (refcount blocks: a quarter more). ``commit_interval``: an idle guest's
    writes are committed after so long (None: never on their own). ``discards``: host space of what the guest discarded is
    given back. ``quarantine_bytes``: freed space that may wait for a commit before one is made for it.
    """

    cache_bytes: int = 32 * MIB
    mode: CacheMode = CacheMode.WRITEBACK
    commit_interval: float | None = 5.0
    discards: bool = True
    quarantine_bytes: int = 256 * MIB


def open_image(storage: Storage, *, backing: Disk | None, writable: bool, options: Options | None = None) -> Qcow2Disk:
    """Open the image in ``storage``; the disk owns it from then on, and ``backing`` too.

    ``backing`` is the disk that the header names, opened by the caller (see ``cowfence.chain``). Raises NotThisFormat,
    Unsupported, Corrupt, ReadOnly (the corrupt bit is set) and the storage's errors; then both stay with the caller.
    """
    if writable:
        storage.fence("open.fence")
    header = read_header(storage)
    check_supported(header, storage.name)
    check_bounds(header, storage.size(), storage.name)
    if writable:
        if header.incompatible & Incompatible.CORRUPT:
            raise ReadOnly(f"{storage.name}: the image is marked corrupt; repair it with 'check -r all' or open it read-only")
        check_overlaps(header, storage.name)
        if header.incompatible & Incompatible.DIRTY:
            from cowfence.qcow2.repair import rebuild_dirty

            rebuild_dirty(storage)
            header = read_header(storage)
    return Qcow2Disk(storage, header, backing, writable=writable, options=options or Options())


def _load_table(storage: Storage, kind: Kind, offset: int, length_bytes: int) -> Table:
    return Table.from_bytes(kind, 0, offset, read_exact(storage, offset, length_bytes, kind.value))


def _claim_all(state: State) -> None:
    """List every cluster of metadata. Raises Corrupt where two structures share one."""
    header, geometry, layout = state.header, state.geometry, state.layout
    layout.claim_new(0, 1, Kind.HEADER)
    layout.claim_new(header.refcount_table_offset, header.refcount_table_clusters, Kind.REFCOUNT_TABLE)
    if header.l1_entries:
        layout.claim_new(header.l1_offset, geometry.clusters_for(header.l1_entries * 8), Kind.L1)
    for index, entry in enumerate(state.refcounts.table.entries):
        if entry:
            offset = state.refcounts.block_offset(index)
            assert offset is not None
            layout.claim_new(offset, 1, Kind.REFCOUNT_BLOCK)
    for index, entry in enumerate(state.l1.entries):
        if entry:
            l2_offset = state.l2_offset(index)
            if l2_offset is not None:
                layout.claim_new(l2_offset, 1, Kind.L2)
    if header.snapshot_count:
        snapshots = read_snapshots(state.storage, header)
        length_bytes = sum(40 + len(s.extra) + len(os.fsencode(s.id)) + len(os.fsencode(s.name)) + 7 & ~7 for s in snapshots)
        layout.claim_new(header.snapshots_offset, geometry.clusters_for(length_bytes), Kind.SNAPSHOT_TABLE)
        for snapshot in snapshots:
            if snapshot.l1_entries:
                layout.claim_new(snapshot.l1_offset, geometry.clusters_for(snapshot.l1_entries * 8), Kind.SNAPSHOT_L1)
    bitmaps = header.bitmaps
    if bitmaps is not None and header.autoclear & Autoclear.BITMAPS:
        layout.claim_new(bitmaps.directory_offset, geometry.clusters_for(bitmaps.directory_bytes), Kind.BITMAPS)


class Qcow2Disk:
    """A guest's disk in a qcow2 image. Thread-safe; belongs to the process that opened it."""

    def __init__(self, storage: Storage, header: Header, backing: Disk | None, *, writable: bool, options: Options) -> None:
        geometry = header.geometry
        lock = threading.Lock()
        layout = Layout(storage.name, header.cluster_bits)
        pending = Pending()
        reader = MetadataReader(storage)
        l1 = _load_table(storage, Kind.L1, header.l1_offset, header.l1_entries * 8)
        refcount_table = _load_table(
            storage, Kind.REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * geometry.cluster_bytes
        )
        tables = max(1, options.cache_bytes >> header.cluster_bits)
        refcounts = Refcounts(reader, geometry, refcount_table, pending, max(1, tables // 4))
        allocator = Allocator(
            storage.name,
            refcounts,
            layout,
            geometry,
            pending,
            file_bytes=storage.size(),
            holes=storage.capabilities().holes_past_end,
        )
        self._reclaimer = ClusterReclaimer()
        self._committer = Committer(storage, layout, lock, pending, self._reclaimer, unsafe=options.mode is CacheMode.UNSAFE)
        self._state = state = State(
            storage=storage,
            header=header,
            geometry=geometry,
            lock=lock,
            reader=reader,
            layout=layout,
            pending=pending,
            l1=l1,
            l2=TableCache(tables),
            refcounts=refcounts,
            allocator=allocator,
            committer=self._committer,
            backing=backing,
            backing_bytes=min(backing.size, header.size_bytes) if backing is not None else 0,
            size=header.size_bytes,
            discards=options.discards and storage.capabilities().punches_holes,
            quarantine_limit=max(16, options.quarantine_bytes >> header.cluster_bits),
            tickets=Tickets(lock),
        )
        self._reclaimer.state = state
        self._reads = Reads(state, self._end_ticket)
        self._reclaimer.forget = self._reads.forget
        self._writes = Writes(state, self._reads)
        self._zeroes = Zeroes(state, self._writes)
        self._writable = writable
        self._mode = options.mode
        # What the plain cases need of the state, at hand: they are carried out a hundred thousand times a second.
        self._lock = lock
        self._tables = state.l2.tables
        self._readv = storage.readv
        self._scratch = bytearray()
        self._size = state.size
        """-1 once calls are refused, so that no range is plain any more."""
        self._bits, self._l1_shift = geometry.cluster_bits, geometry.l1_shift
        self._cluster_bytes, self._within_mask = geometry.cluster_bytes, geometry.cluster_mask
        self._l2_mask = geometry.l2_entries - 1
        self._not_plain = ~(COPIED | OFFSET_MASK & ~geometry.cluster_mask)
        self._unready: CowfenceError | None = None
        """Why calls are refused: closed, or in a forked child. Checked by every call."""
        self._features_settled = not writable or header.version < 3 or not header.autoclear
        self._interval: _IntervalCommit | None = None
        if writable:
            _claim_all(state)
            if options.commit_interval is not None and options.mode is not CacheMode.WRITETHROUGH:
                self._interval = _IntervalCommit(self, options.commit_interval)
        _LIVE.add(self)

    @property
    def size(self) -> int:
        return self._state.size

    @property
    def writable(self) -> bool:
        return self._writable

    @property
    def block_bytes(self) -> int:
        return self._state.geometry.cluster_bytes

    @property
    def header(self) -> Header:
        return self._state.header

    @property
    def storage(self) -> Storage:
        return self._state.storage

    @property
    def backing(self) -> Disk | None:
        return self._state.backing

    @property
    def fences(self) -> int:
        """How many fences this disk has made since it was opened (not counting the one at open)."""
        return self._committer.fences

    def info(self) -> ImageInfo:
        """The image, described (see ``qcow2.describe``): as its file is now, without what is pending."""
        self._check()
        return describe(self._state.storage)

    def as_file(self, buffering: int = 64 * KIB) -> io.BufferedRandom | io.BufferedReader:
        """The disk as a buffered binary file; see ``disk.fileview``. Closing it flushes the disk and leaves it open."""
        return as_file(self, buffering)

    def __enter__(self) -> Qcow2Disk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Reading

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        self._reads.read_into(offset, view, wait=wait)

    def read(self, offset: int, length_bytes: int) -> bytes:
        # The plain case, inside one allocated cluster and in the page cache, without the general plan: half the price.
        within = offset & self._within_mask
        if 0 < length_bytes <= self._cluster_bytes - within and 0 <= offset <= self._size - length_bytes:
            with self._lock:
                table = self._tables.get(offset >> self._l1_shift)
                if table is not None:
                    entry = table.entries[offset >> self._bits & self._l2_mask]
                    host = entry & OFFSET_MASK
                    if host and not entry & self._not_plain:
                        table.used = True
                        scratch = self._scratch
                        if len(scratch) != length_bytes:
                            # Under the lock one buffer serves all: clearing a new one for each read costs as much as the copy.
                            scratch = self._scratch = bytearray(length_bytes)
                        try:
                            if self._readv(host + within, (scratch,), wait=False) == length_bytes:
                                return bytes(scratch)
                        except WouldBlock:
                            pass
        self._check_range(offset, length_bytes)
        buffer = bytearray(length_bytes)
        self._reads.read_into(offset, memoryview(buffer), wait=True)
        return bytes(buffer)

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        self._check_range(offset, length_bytes)
        return merge(self._extents(offset, length_bytes))

    def _extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        state = self._state
        end = offset + length_bytes
        while offset < end:
            piece = min(end - offset, _EXTENTS_PIECE_TABLES << state.geometry.l1_shift)
            for kind, start, run_bytes, host, _ in self._run(
                lambda wait, start=offset, count=piece: list(runs(state, start, count, wait=wait))  # type: ignore[misc]
            ):
                if kind is RunKind.DATA:
                    yield Extent(start, run_bytes, zero=False, data=True, present=True, host_offset=host)
                elif kind is RunKind.COMPRESSED:
                    yield Extent(start, run_bytes, zero=False, data=True, present=True, compressed=True)
                elif kind is RunKind.ZERO:
                    yield Extent(start, run_bytes, zero=True, data=False, present=True, host_offset=host or None)
                else:
                    yield from self._below(start, run_bytes)
            offset += piece

    def _below(self, start: int, length_bytes: int) -> Iterator[Extent]:
        """The states of an unallocated run: those of the backing disk one level deeper, a hole past its end."""
        state = self._state
        inside = max(0, min(length_bytes, state.backing_bytes - start))
        if inside and state.backing is not None:
            for extent in state.backing.extents(start, inside):
                yield extent._replace(depth=extent.depth + 1)
        if inside < length_bytes:
            yield Extent(start + inside, length_bytes - inside, zero=True, data=False, present=False)

    # Writing

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        self._settle()
        at = 0
        while at < len(view):
            at += self._mutate(lambda wait, at=at: self._writes.write(offset + at, view[at:], wait=wait))  # type: ignore[misc]
        self._acknowledge(fua)

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        self._check_range(offset, length_bytes)
        self._settle()
        self._pieces(offset, length_bytes, lambda at, left, wait: self._zeroes.zero(at, left, unmap=unmap, wait=wait))
        self._acknowledge(fua)

    def discard(self, offset: int, length_bytes: int) -> None:
        self._check_range(offset, length_bytes)
        self._settle()
        self._pieces(offset, length_bytes, lambda at, left, wait: self._zeroes.discard(at, left, wait=wait))
        self._acknowledge(False)

    def _pieces(self, offset: int, length_bytes: int, piece: Callable[[int, int, bool], int]) -> None:
        done = 0
        while done < length_bytes:
            done += self._mutate(lambda wait, done=done: piece(offset + done, length_bytes - done, wait))  # type: ignore[misc]

    def flush(self) -> None:
        self._check()
        if self._writable and self._mode is not CacheMode.UNSAFE:
            self._committer.commit()

    def commit(self) -> None:
        """Commit what is pending, in every mode."""
        self._check()
        if self._writable:
            self._committer.commit()

    def _acknowledge(self, fua: bool) -> None:
        if (fua and self._mode is CacheMode.WRITEBACK) or self._mode is CacheMode.WRITETHROUGH:
            self._committer.commit()
        elif self._interval is not None:
            self._interval.start()

    def _settle(self) -> None:
        """Before the first write: clear the autoclear bits, durably (crash contract, R11)."""
        self._check_writable()
        if self._features_settled:
            return
        state = self._state
        with state.lock:
            if self._features_settled:
                return
            header = state.header
            state.pending.patch_header(*feature_bits_patch(header, autoclear=0), "header.link")
        self._committer.commit()
        with state.lock:
            state.header = replace(header, autoclear=0)
            self._features_settled = True

    # Batches

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        """See ``Disk.submit``. The plain cases, one allocated cluster each, are carried out inline under one lock."""
        if self._unready is not None:
            return [self._unready] * len(requests)
        outcomes: list[Outcome] = []
        state = self._state
        bits, l2_bits, within_mask = self._bits, state.geometry.l2_bits, self._within_mask
        cluster_bytes, l2_mask, not_plain = self._cluster_bytes, self._l2_mask, self._not_plain
        size, tables, kinds, committer = self._size, self._tables, state.layout.kinds, self._committer
        readv, writev = self._readv, state.storage.writev
        read, write = Verb.READ, Verb.WRITE
        inline_writes = (
            self._writable and self._features_settled and self._mode is not CacheMode.WRITETHROUGH and committer.broken is None
        )
        later: list[int] = []
        hits = 0
        with state.lock:
            for verb, offset, length_bytes, data, fua, _ in requests:
                if verb is read:
                    within = offset & within_mask
                    if within + length_bytes <= cluster_bytes and 0 <= offset <= size - length_bytes:
                        cluster = offset >> bits
                        table = tables.get(cluster >> l2_bits)
                        if table is not None:
                            entry = table.entries[cluster & l2_mask]
                            host = entry & OFFSET_MASK
                            if host and not entry & not_plain:
                                table.used = True
                                buffer = bytearray(length_bytes)
                                try:
                                    if readv(host + within, (buffer,), wait=False) == length_bytes:
                                        outcomes.append(buffer)
                                        hits += 1
                                        continue
                                except CowfenceError:
                                    pass
                elif verb is write and inline_writes and not fua:
                    within = offset & within_mask
                    if within + len(data) <= cluster_bytes and 0 <= offset <= size - len(data):
                        cluster = offset >> bits
                        table = tables.get(cluster >> l2_bits)
                        if table is not None:
                            entry = table.entries[cluster & l2_mask]
                            host = entry & OFFSET_MASK
                            if host and entry & COPIED and not entry & not_plain and host >> bits not in kinds:
                                table.used = True
                                committer.data_written = True
                                try:
                                    writev(host + within, (data,), "data.write")
                                    outcomes.append(None)
                                    hits += 1
                                    continue
                                except CowfenceError as error:
                                    outcomes.append(error)
                                    continue
                later.append(len(outcomes))
                outcomes.append(BLOCKED)
            state.l2.hits += hits
            if later and inline_writes:
                later = self._allocate_inline(requests, outcomes, later)
        if self._interval is not None and committer.data_written:
            self._interval.start()
        for index in later:
            outcomes[index] = self._one(requests[index], wait=wait)
        return outcomes

    def _allocate_inline(self, requests: Sequence[Request], outcomes: list[Outcome], later: list[int]) -> list[int]:
        """Writes inside one L2 table that neither wait nor need a commit, under the lock that is held already."""
        rest: list[int] = []
        write, size, shift = Verb.WRITE, self._state.size, self._state.geometry.l1_shift
        for index in later:
            verb, offset, _, data, fua, _ = requests[index]
            length_bytes = len(data)
            end = offset + length_bytes
            if (
                verb is write
                and not fua
                and length_bytes
                and offset >= 0
                and end <= size
                and offset >> shift == end - 1 >> shift
            ):
                try:
                    self._writes.write(offset, memoryview(data).cast("B"), wait=False)
                    outcomes[index] = None
                    continue
                except (Cold, NeedsCommit, NoSpace, WouldBlock):
                    pass
                except CowfenceError as error:
                    outcomes[index] = error
                    continue
            rest.append(index)
        return rest

    def _one(self, request: Request, *, wait: bool) -> Outcome:
        """One request of a batch that is no plain case."""
        verb, offset, length_bytes, data, fua, unmap = request
        try:
            if verb is Verb.READ:
                self._check_range(offset, length_bytes)
                buffer = bytearray(length_bytes)
                self._reads.read_into(offset, memoryview(buffer), wait=wait)
                return buffer
            if verb is Verb.FLUSH:
                committer = self._committer
                if not wait and self._writable and self._mode is not CacheMode.UNSAFE and committer.busy():
                    return BLOCKED
                self.flush()
                return None
            if not wait:
                # It may commit, or wait for the host: refuse early what is wrong, and leave the rest to a thread that may wait.
                self._check_range(offset, len(data) if verb is Verb.WRITE else length_bytes)
                self._check_writable()
                if verb is Verb.WRITE or fua or not self._one_piece(request):
                    return BLOCKED
                return None
            if verb is Verb.WRITE:
                self.write(offset, data, fua=fua)
            elif verb is Verb.ZERO:
                self.zero(offset, length_bytes, unmap=unmap, fua=fua)
            else:
                self.discard(offset, length_bytes)
                if fua:
                    self.flush()
            return None
        except WouldBlock:
            return BLOCKED
        except CowfenceError as error:
            return error

    def _one_piece(self, request: Request) -> bool:
        """A zero or discard of whole clusters inside one L2 table, if it neither waits nor needs a commit; else nothing."""
        verb, offset, length_bytes, _, _, unmap = request
        aligned = length_bytes and not (offset | length_bytes) & self._within_mask
        if not aligned or offset >> self._l1_shift != offset + length_bytes - 1 >> self._l1_shift:
            return False
        if not self._features_settled or self._mode is CacheMode.WRITETHROUGH:
            return False
        with self._lock:
            try:
                if verb is Verb.ZERO:
                    done = self._zeroes.zero(offset, length_bytes, unmap=unmap, wait=False)
                else:
                    done = self._zeroes.discard(offset, length_bytes, wait=False)
            except (Cold, NeedsCommit, NoSpace):
                return False
        if self._interval is not None:
            self._interval.start()
        return done == length_bytes

    # The loop around every plan

    def _run(self, plan: Callable[[bool], T]) -> T:
        """Carry out a plan under the lock; satisfy what it needs outside of it, and begin again.

        ``plan`` gets whether it may wait under the lock: only when warming did not help three times.
        """
        state = self._state
        attempts = 0
        while True:
            attempts += 1
            with state.lock:
                self._check()
                try:
                    return plan(attempts > 3)
                except Cold as cold:
                    satisfy: Callable[[], object] = cold.warm
                except NeedsCommit as need:
                    satisfy = self._satisfier(need)
                ticket = state.tickets.begin()
            try:
                satisfy()
            finally:
                self._end_ticket(ticket)

    def _satisfier(self, need: NeedsCommit) -> Callable[[], None]:
        def satisfy() -> None:
            self._committer.commit()
            if need.then is None:
                return
            deeper: NeedsCommit | None = None
            with self._state.lock:
                if self._state.pending:
                    # Somebody else was faster; the plan begins again and finds out.
                    return
                try:
                    need.then()
                except NeedsCommit as again:
                    deeper = again
            if deeper is not None:
                self._satisfier(deeper)()
            self._committer.commit()

        return satisfy

    def _mutate(self, plan: Callable[[bool], T]) -> T:
        """``_run`` for a change: when the host or the image has no space left, commit once and use what that frees."""
        try:
            return self._run(plan)
        except NoSpace:
            if not self._state.pending.freed_clusters:
                raise
        self._committer.commit()
        return self._run(plan)

    def _end_ticket(self, ticket: int) -> None:
        with self._lock:
            self._state.tickets.end(ticket)
        self._reclaimer.release()

    # Ending

    def close(self) -> None:
        """Commit, fence what was reclaimed, and release the files. In a forked child nothing is written or unlocked.

        Calls that other threads are in come to their end first; later ones raise Closed.
        """
        if self._unready is not None:
            return
        with self._lock:
            if self._unready is not None:
                return
            self._unready, self._size = Closed(f"{self._state.storage.name}: the disk is closed"), -1
        if self._interval is not None:
            self._interval.stop()
        self._state.tickets.wait_for_all()
        try:
            if self._writable and self._committer.broken is None:
                self._committer.commit()
                if self._committer.unfenced_reclaim:
                    self._committer.fence("close.fence")
        finally:
            self._state.storage.close()
            if self._state.backing is not None:
                self._state.backing.close()

    def _disown(self) -> None:
        """In a forked child: every call raises from now on, and nothing is written or unlocked."""
        self._unready, self._size = Closed(f"{self._state.storage.name}: the disk belongs to the process that opened it"), -1
        self._interval = None

    # Checks

    def _check(self) -> None:
        if self._unready is not None:
            raise self._unready

    def _check_range(self, offset: int, length_bytes: int) -> None:
        self._check()
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self._state.size:
            raise OutOfRange(offset, length_bytes, self._state.size)

    def _check_writable(self) -> None:
        self._check()
        if not self._writable:
            raise ReadOnly(f"{self._state.storage.name}: the image is open read-only")
        if self._committer.broken is not None:
            raise self._committer.broken


class _IntervalCommit:
    """Commits what an idle guest left pending, a while after the first change. One thread, started when it is first needed."""

    def __init__(self, disk: Qcow2Disk, seconds: float) -> None:
        self._disk = weakref.ref(disk)
        self._seconds = seconds
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Something is pending: commit it at the end of the interval."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="cowfence-commit-interval", daemon=True)
            self._thread.start()
        if not self._wake.is_set():
            self._wake.set()

    def stop(self) -> None:
        self._stopped.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait()
            if self._stopped.wait(self._seconds):
                return
            self._wake.clear()
            disk = self._disk()
            if disk is None:
                return
            try:
                disk.commit()
            except CowfenceError:
                # The guest learns of it at its next flush; what is pending stays pending.
                self._wake.set()
            del disk


_LIVE: weakref.WeakSet[Qcow2Disk] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for disk in list(_LIVE):
        disk._disown()


os.register_at_fork(after_in_child=_after_fork_in_child)

__all__ = ["CacheMode", "Corrupt", "Options", "Qcow2Disk", "open_image", "read_header"]
