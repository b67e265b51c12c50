"""The face of an open image: a ``Disk`` over (image file, backing disk).

Opening for writing begins with a fence, before anything that was read is relied on: what a killed process wrote may stand in
the page cache only, and a later power cut would take it back (crash contract, R9). Then the tables are read, and every cluster
of metadata is listed for the overlap check.

Each call runs its plan under the lock; where the plan needs a commit or cold bytes, the lock is left, the need is satisfied,
and the plan begins again. ``submit`` does the same for a batch, with the plain cases inline: most of what a server does.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from cowfence.disk.base import BLOCKED, Disk, Outcome, Request, Verb, as_outcome, carry_out, in_bytes
from cowfence.disk.fileview import as_file
from cowfence.errors import Closed, Corrupt, CowfenceError, Invalid, NoSpace, OutOfRange, ReadOnly, WouldBlock
from cowfence.extents import Extent, merge
from cowfence.qcow2.alteration import Alteration, alter
from cowfence.qcow2.assemble import CacheMode, Options, assemble, claim_all, usable_header
from cowfence.qcow2.batch import BatchWrites
from cowfence.qcow2.compressed import CompressedWrites
from cowfence.qcow2.describe import ImageInfo, describe
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.extensions import Autoclear
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.header import Header, feature_bits_patch, read_header
from cowfence.qcow2.interval import IntervalCommit
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.plans import Plans
from cowfence.qcow2.read import Reads, unfilled
from cowfence.qcow2.reader import Cold, NeedsCommit
from cowfence.qcow2.snapshot_table import Snapshot, read_snapshots
from cowfence.qcow2.state import State
from cowfence.qcow2.status import extents
from cowfence.qcow2.write import Writes
from cowfence.qcow2.zero import Zeroes
from cowfence.storage.base import Buffer, Storage, WritableBuffer
from cowfence.units import KIB

if TYPE_CHECKING:
    from cowfence.qcow2.bitmaps import Bitmaps
    from cowfence.qcow2.encryption import Secrets

T = TypeVar("T")


def open_image(
    storage: Storage,
    *,
    backing: Disk | None,
    writable: bool,
    options: Options | None = None,
    journal: Journal | None = None,
    snapshot: str | None = None,
    data: Storage | None = None,
    secrets: Secrets | None = None,
) -> Qcow2Disk:
    """Open the image in ``storage``; the disk owns it from then on, and ``backing``, ``data`` and ``journal`` too.

    ``backing`` is the disk that the header names, ``data`` the external data file (None: what is there cannot be read), opened
    by the caller (see ``cowfence.chain``). ``secrets``: passphrases of an encrypted image. ``journal``: where a keeper
    finds what is pending. ``snapshot``: the disk as it was then, by id or name; not ``writable``. Raises Invalid (no such
    snapshot), NotThisFormat, Unsupported, Corrupt, ReadOnly (the corrupt bit is set) and the storage's
    errors; then all of them stay with the caller.
    """
    if writable:
        if data is not None:
            data.fence("open.fence")
        storage.fence("open.fence")
    options = options or Options()
    header = usable_header(storage, writable=writable, snapshot=snapshot)
    state = assemble(storage, header, backing, options, journal, data, secrets)
    return Qcow2Disk(state, options, writable=writable)


class Qcow2Disk:
    """A guest's disk in a qcow2 image. Thread-safe; belongs to the process that opened it."""

    def __init__(self, state: State, options: Options, *, writable: bool) -> None:
        """See ``open_image``."""
        self._state = state
        geometry = state.geometry
        self._committer = state.committer
        self._reclaimer = state.reclaimer
        self._plans = Plans(state)
        self._reads = Reads(state, self._enter)
        self._writes = Writes(state, self._reads)
        self._compressed = CompressedWrites(state, self._writes)
        self._reclaimer.forget = self._forget
        self._zeroes = Zeroes(state, self._writes)
        self._writable = writable
        self._mode = options.mode
        self._long_write_bytes = options.long_write_bytes
        # What the plain cases need of the state, at hand: they are carried out a hundred thousand times a second.
        self._lock = state.lock
        # An entry of two words, or one that leads into another file or to what is enciphered, is no plain case.
        is_plain = geometry.l2_entry_words == 1 and not geometry.external_data and state.cipher is None
        self._tables = state.l2.tables if is_plain else {}
        self._batches = BatchWrites(state, self._writes, self._tables)
        self._read_cached = state.data.read_cached
        self._size = state.size
        """-1 once calls are refused, so that no range is plain any more."""
        self._bits, self._l1_shift = geometry.cluster_bits, geometry.l1_shift
        self._cluster_bytes, self._within_mask = geometry.cluster_bytes, geometry.cluster_mask
        self._l2_mask = geometry.l2_entries - 1
        self._not_plain = ~(COPIED | OFFSET_MASK & ~geometry.cluster_mask)
        self._unready: CowfenceError | None = None
        """Why calls are refused: closed, or in a forked child. Checked by every call, and by each again once it holds the lock:
        what goes on after ``close`` has taken its turn there would be acknowledged and never committed."""
        self._features_settled = not writable or state.header.version < 3 or not state.header.autoclear
        self._bitmaps: Bitmaps | None = None
        self._interval: IntervalCommit | None = None
        if writable:
            claim_all(state)
            if options.commit_interval is not None and options.mode is not CacheMode.WRITETHROUGH:
                self._interval = IntervalCommit(self, options.commit_interval)
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
    def data(self) -> Storage:
        """The file in which the guest's data stands: ``storage``, or the external data file."""
        return self._state.data

    @property
    def backing(self) -> Disk | None:
        return self._state.backing

    @property
    def planning(self) -> bool:
        """True under the image's lock. Who calls the disk from inside a call of its storage has to ask (the crash explorer)."""
        return self._lock.locked()

    @property
    def fences(self) -> int:
        """How many fences this disk has made since it was opened (not counting the one at open)."""
        return self._committer.fences

    def statistics(self) -> dict[str, int]:
        """What this disk has done since it was opened: ``fences``, ``commits`` and ``joined-commits`` (callers who shared one),
        ``table-loads``; and what it holds: ``tables-in-memory``, ``leaks-pending-clusters`` (freed, not yet available)."""
        state, committer = self._state, self._committer
        return {
            "fences": committer.fences,
            "commits": committer.commits,
            "joined-commits": committer.joined,
            "table-loads": state.l2.loads,
            "tables-in-memory": len(state.l2.tables),
            "leaks-pending-clusters": self._reclaimer.waiting_clusters,
        }

    def info(self) -> ImageInfo:
        """The image, described (see ``qcow2.describe``): as its file is now, without what is pending."""
        self._check()
        return describe(self._state.storage)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, in the order of their table. Raises Corrupt."""
        self._check()
        return read_snapshots(self._state.storage, self._state.header)

    def as_file(self, buffering: int = 64 * KIB) -> io.BufferedRandom | io.BufferedReader:
        """The disk as a buffered binary file (``disk.fileview``). Closing it flushes the disk and leaves it open."""
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
                if self._unready is not None:
                    raise self._unready
                table = self._tables.get(offset >> self._l1_shift)
                if table is not None:
                    entry = table.entries[offset >> self._bits & self._l2_mask]
                    host = entry & OFFSET_MASK
                    if host and not entry & self._not_plain:
                        table.used = True
                        try:
                            data = self._read_cached(host + within, length_bytes)
                            if len(data) == length_bytes:
                                return bytes(data)
                        except WouldBlock:
                            pass
        self._check_range(offset, length_bytes)
        buffer = bytearray(length_bytes)
        self._reads.read_into(offset, memoryview(buffer), wait=True)
        return bytes(buffer)

    def locate(self, offset: int, length_bytes: int) -> int | None:
        """Where a range stands in ``data``, as it is and in one piece; None where it does not, or where that is not known
        without reading a table. It says nothing about later, but for a disk that nobody changes."""
        first, last = offset >> self._bits, offset + length_bytes - 1 >> self._bits
        table = self._tables.get(offset >> self._l1_shift)
        if table is None or not 0 <= offset <= self._size - length_bytes or last >> self._l1_shift - self._bits != table.index:
            return None
        start = table.entries[first & self._l2_mask] & OFFSET_MASK
        entries = table.entries[first & self._l2_mask : (last & self._l2_mask) + 1]
        for place, entry in zip(count(start, self._cluster_bytes), entries, strict=False):
            if not place or entry & self._not_plain or entry & OFFSET_MASK != place:
                return None
        place = start + (offset & self._within_mask)
        # A file may end inside its last cluster: what is missing reads as zeros, and stands nowhere.
        return place if place <= self._state.data.size() - length_bytes else None

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        self._check_range(offset, length_bytes)
        return merge(extents(self._state, self._plans, self._enter, offset, length_bytes))

    # Writing

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        self._settle()
        at = 0
        while at < len(view):
            piece = view[at : at + self._state.piece_bytes]
            at += self._mutate(
                lambda wait, at=at, piece=piece: self._writes.write(offset + at, piece, wait=wait),  # type: ignore[misc]
                offset,
                len(view),
            )
        self._acknowledge(fua)

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        self._check_range(offset, length_bytes)
        self._settle()
        self._pieces(offset, length_bytes, lambda at, left, wait: self._zeroes.zero(at, left, unmap=unmap, wait=wait))
        self._acknowledge(fua)

    def write_compressed(self, offset: int, data: Buffer) -> None:
        """Write whole clusters compressed (the last may be cut short by the disk's end); one that does not shrink is written
        plainly. Raises Invalid for other ranges, and what ``write`` raises."""
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        end = offset + len(view)
        if offset & self._within_mask or (end & self._within_mask and end != self._state.size):
            raise Invalid(f"{self._state.storage.name}: compressed are whole clusters of {self._cluster_bytes} bytes only")
        self._settle()
        for at in range(0, len(view), self._cluster_bytes):
            plan = self._compressed.plan(offset + at, view[at : at + self._cluster_bytes])
            self._mutate(plan, offset, len(view))
        self._acknowledge(False)

    def discard(self, offset: int, length_bytes: int) -> None:
        self._check_range(offset, length_bytes)
        self._settle()
        self._pieces(offset, length_bytes, lambda at, left, wait: self._zeroes.discard(at, left, wait=wait))
        self._acknowledge(False)

    def _pieces(self, offset: int, length_bytes: int, piece: Callable[[int, int, bool], int]) -> None:
        done = 0
        while done < length_bytes:
            done += self._mutate(
                lambda wait, done=done: piece(offset + done, length_bytes - done, wait),  # type: ignore[misc]
                offset,
                length_bytes,
            )

    def _mutate(self, plan: Callable[[bool], int], offset: int, length_bytes: int) -> int:
        def check() -> None:
            self._enter(offset, length_bytes)
            self._check_writable()

        return self._plans.mutate(plan, check)

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
        """Before the first change: the bitmaps are in use, and the autoclear bits of what we do not know are cleared, durably
        (crash contract, R11)."""
        self._check_writable()
        if self._features_settled:
            return
        alter(self._state, self._plans, self._check_writable, self._first_change)

    def _first_change(self, alteration: Alteration) -> None:
        if self._features_settled:
            return
        state, kept = self._state, int(Autoclear.DATA_FILE_RAW)
        if state.header.autoclear & Autoclear.BITMAPS:
            try:
                if self.bitmaps.needs_marks:
                    self.bitmaps.begin(alteration)
                kept |= Autoclear.BITMAPS
            except Corrupt:
                # They cannot be kept true, so they are given up.
                self._bitmaps = None
        if state.header.autoclear & ~kept:
            patch = feature_bits_patch(state.header, autoclear=state.header.autoclear & kept)
            alteration.transaction(lambda: state.pending.patch_header(*patch, "header.link"))
        self._features_settled = True

    # Batches

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        """See ``Disk.submit``. The plain cases, one allocated cluster each, are carried out inline under one lock."""
        if self._unready is not None:
            return [self._unready] * len(requests)
        if wait and sum(len(request.data) for request in requests) >= self._long_write_bytes:
            outcomes: list[Outcome] = [BLOCKED] * len(requests)
            rest = list(range(len(requests)))
            while len(left := self._batches.write_long(requests, outcomes, rest, self._may_write_inline)) < len(rest):
                rest = left
            if len(rest) < len(requests):
                for index, outcome in zip(rest, self.submit([requests[index] for index in rest]), strict=True):
                    outcomes[index] = outcome
                return outcomes
        outcomes = []
        state = self._state
        bits, l2_bits, within_mask = self._bits, state.geometry.l2_bits, self._within_mask
        cluster_bytes, l2_mask, not_plain = self._cluster_bytes, self._l2_mask, self._not_plain
        size, tables, kinds, committer = self._size, self._tables, state.layout.kinds, self._committer
        read_cached, writev = self._read_cached, state.storage.writev
        read, write = Verb.READ, Verb.WRITE
        later: list[int] = []
        with state.lock:
            if self._unready is not None:
                return [self._unready] * len(requests)
            inline_writes = self._may_write_inline()
            plain_end = state.allocator.never_used << bits
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
                                try:
                                    answer = read_cached(host + within, length_bytes)
                                    if len(answer) == length_bytes:
                                        outcomes.append(answer)
                                        continue
                                except CowfenceError:
                                    pass
                elif verb is write and inline_writes and not fua:
                    within, data = offset & within_mask, in_bytes(data)
                    if within + len(data) <= cluster_bytes and 0 <= offset <= size - len(data):
                        cluster = offset >> bits
                        table = tables.get(cluster >> l2_bits)
                        if table is not None:
                            entry = table.entries[cluster & l2_mask]
                            host = entry & OFFSET_MASK
                            copied = 0 < host < plain_end and entry & COPIED
                            if copied and not entry & not_plain and host >> bits not in kinds:
                                table.used = True
                                committer.data_written = True
                                try:
                                    writev(host + within, (data,), "data.write")
                                    outcomes.append(None)
                                    continue
                                except NoSpace:
                                    # The general path commits once and uses what that frees, before it reports it.
                                    pass
                                except CowfenceError as error:
                                    outcomes.append(as_outcome(error))
                                    continue
                later.append(len(outcomes))
                outcomes.append(BLOCKED)
            if later and inline_writes:
                later = self._batches.write(requests, outcomes, later)
            # Also what an interrupted call has left: a write in place may rely on it.
            if inline_writes and state.pending.notes:
                state.pending.publish()
        if self._interval is not None and committer.data_written:
            self._interval.start()
        for index in later:
            outcomes[index] = self._one(requests[index], wait=wait)
        return outcomes

    def _may_write_inline(self) -> bool:
        # Asked under the lock, like everything that a fence that fails or a close may change meanwhile.
        settled = self._writable and self._unready is None and self._features_settled and self._committer.broken is None
        return settled and self._mode is not CacheMode.WRITETHROUGH and not self._plans.altering and self._state.record is None

    def _one(self, request: Request, *, wait: bool) -> Outcome:
        """One request of a batch that is no plain case."""
        verb, offset, length_bytes, data, fua, _ = request
        try:
            if verb is Verb.READ:
                self._check_range(offset, length_bytes)
                buffer = unfilled(length_bytes)
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
                self._check_range(offset, len(in_bytes(data)) if verb is Verb.WRITE else length_bytes)
                self._check_writable()
                if verb is Verb.WRITE or fua or not self._one_piece(request):
                    return BLOCKED
                return None
            carry_out(self, request)
            return None
        except WouldBlock:
            return BLOCKED
        except CowfenceError as error:
            return as_outcome(error)

    def _one_piece(self, request: Request) -> bool:
        """A zero or discard of whole clusters inside one L2 table, if it neither waits nor needs a commit; else nothing."""
        verb, offset, length_bytes, _, _, unmap = request
        aligned = length_bytes and not (offset | length_bytes) & self._within_mask
        if not aligned or offset >> self._l1_shift != offset + length_bytes - 1 >> self._l1_shift:
            return False
        if not self._features_settled or self._mode is CacheMode.WRITETHROUGH:
            return False
        with self._lock:
            self._check_writable()
            if self._plans.altering:
                return False
            try:
                if verb is Verb.ZERO:
                    done = self._zeroes.zero(offset, length_bytes, unmap=unmap, wait=False)
                else:
                    done = self._zeroes.discard(offset, length_bytes, wait=False)
                self._state.pending.publish()
            except (Cold, NeedsCommit, NoSpace):
                return False
        if self._interval is not None:
            self._interval.start()
        return done == length_bytes

    def _forget(self) -> None:
        """Clusters become available: what was remembered of them is void."""
        self._reads.forget()
        self._compressed.forget()

    # Altering the image

    @property
    def bitmaps(self) -> Bitmaps:
        """The persistent dirty bitmaps of the image."""
        if self._bitmaps is None:
            from cowfence.qcow2.bitmaps import Bitmaps  # It needs numpy, and few images have any.

            # The first write and a command may come at once: with two of them, one would not know what the other records.
            with self._lock:
                if self._bitmaps is None:
                    self._bitmaps = Bitmaps(self._state, self.alter if self._writable else None)
                return self._bitmaps
        return self._bitmaps

    def alter(self, body: Callable[[Alteration], T]) -> T:
        """Carry out a change of the image as a whole (see ``qcow2.alteration``); guests wait meanwhile, and whatever was
        written before is durable when it begins. Raises what ``body`` raises."""
        self._check_writable()
        self._settle()
        try:
            return alter(self._state, self._plans, self._check_writable, body, self._bitmaps, self._zeroes)
        finally:
            with self._lock:
                if self._unready is None:
                    self._size = self._state.size

    # Ending

    def close(self) -> None:
        """Commit, fence what was reclaimed, and release the files. In a forked child nothing is written or unlocked.

        Calls that other threads are in come to their end first; later ones raise Closed. The files are released in any case.
        Raises what the last commit raises, and ReadOnly where a fence failed earlier: what came after it is lost, and somebody
        has to hear of it even if the guest never flushed.
        """
        if self._unready is not None:
            return
        with self._lock:
            if self._unready is not None:
                return
            self._unready, self._size = Closed(f"{self._state.storage.name}: the disk is closed"), -1
        if self._interval is not None:
            self._interval.stop()
        with self._lock:
            self._plans.pass_gate(wait=True)
        self._state.tickets.wait_for_all()
        try:
            if self._writable:
                self._committer.commit()
                if self._bitmaps is not None and self._bitmaps.recording:
                    alter(self._state, self._plans, lambda: None, self._bitmaps.end)
                if self._committer.unfenced_reclaim:
                    self._committer.fence("close.fence")
        finally:
            try:
                if self._state.pending.journal is not None:
                    # Before the file is unlocked: the keeper must not touch what others may hold.
                    self._state.pending.journal.close()
            finally:
                self._state.storage.close()
                self._state.data.close()
                if self._state.backing is not None:
                    self._state.backing.close()

    def _disown(self) -> None:
        """In a forked child: every call raises from now on, and nothing is written or unlocked."""
        self._unready, self._size = Closed(f"{self._state.storage.name}: the disk belongs to the process that opened it"), -1
        self._interval = None
        if self._state.pending.journal is not None:
            self._state.pending.journal.disown()

    # Checks

    def _check(self) -> None:
        if self._unready is not None:
            raise self._unready.with_traceback(None)

    def _enter(self, offset: int, length_bytes: int, *, wait: bool = True) -> None:
        """Under the lock, before each plan: the image may have been closed, or altered, since the call began."""
        self._plans.pass_gate(wait=wait)
        self._check_range(offset, length_bytes)

    def _check_range(self, offset: int, length_bytes: int) -> None:
        self._check()
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self._state.size:
            raise OutOfRange(offset, length_bytes, self._state.size)

    def _check_writable(self) -> None:
        self._check()
        if not self._writable:
            raise ReadOnly(f"{self._state.storage.name}: the image is open read-only")
        if self._committer.broken is not None:
            raise self._committer.broken.with_traceback(None)


_LIVE: weakref.WeakSet[Qcow2Disk] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for disk in list(_LIVE):
        disk._disown()


os.register_at_fork(after_in_child=_after_fork_in_child)

__all__ = ["CacheMode", "Corrupt", "Options", "Qcow2Disk", "open_image", "read_header"]
