"""The transaction: prepare | link | reclaim.

Every change to an image passes through here. The five steps of the 2008 patch are its three stages, made durable:

    PREPARE   1 allocate      refcounts up                     nothing reachable changes: a crash leaks clusters at worst
              2 write         the guest's data (done already, by the write's own call, before it came here)
              3 copy          head and tail of the old cluster (in the same call); the first content of new tables
    --------- fence
    LINK      4 link          L2 and L1 entries, refcount-table entries, header fields: each old or new, both lead to
                              durable content
    --------- fence
    RECLAIM   5 free the old  refcounts down, then host space: nothing points there any more

The invariant at every instant and after any crash: stored refcount >= references; COPIED implies refcount 1; everything
reachable is durable.

``Pending`` collects what was done in memory; ``freeze`` turns it into ``Frozen``, a list of changes (stage, file, offset,
bytes) that later changes cannot touch; ``Committer.commit`` writes the list. LINK has no order inside, so two pointers of
which one relies on the other never share one: the allocator hands out only clusters whose refcount block is linked and
durable, and a new table's whole content is PREPARE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter
from threading import Condition, Lock
from typing import NamedTuple, Protocol

from cowfence.errors import CowfenceError, ReadOnly
from cowfence.qcow2.entries import BITMAP_SHIFT, WORD_MASK
from cowfence.qcow2.journal import COPY, FREED, FRESH, PLACE_BITS, Journal, header_notes
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.tables import KIND_NUMBERS, AnyTable, Kind, Table
from cowfence.storage.base import Buffer, Storage
from cowfence.units import SECTOR_BYTES


class Stage(IntEnum):
    PREPARE = 1
    LINK = 2
    RECLAIM = 3


class Change(NamedTuple):
    """Bytes that a stage puts at an offset of a file. ``file`` 0 is the image itself; ``kind`` is for the overlap check."""

    stage: Stage
    file: int
    offset: int
    data: Buffer
    mark: str
    kind: Kind


class Freed(NamedTuple):
    """Host clusters that lost one reference each.

    ``discard``: the guest said that it needs them no more. ``table``: they held a table that this image uses no more.
    """

    first: int
    clusters: int
    discard: bool
    table: bool


_NEW_MARKS = {
    Kind.L1: "l1.new",
    Kind.L2: "l2.new",
    Kind.REFCOUNT_TABLE: "refcount_table.new",
    Kind.REFCOUNT_BLOCK: "refcount_block.new",
}
_LINK_MARKS = {Kind.L1: "l1.link", Kind.L2: "l2.link", Kind.REFCOUNT_TABLE: "refcount_table.link"}


@dataclass(slots=True)
class Frozen:
    """A transaction whose list of changes is fixed."""

    changes: list[Change]
    tables: list[AnyTable]
    fresh: list[AnyTable]
    freed: list[Freed]
    on_linked: list[Callable[[], None]]
    sectors: dict[int, tuple[AnyTable, set[int]]]
    """What each table had dirty, by the table's offset: to take the transaction back if it fails before its end."""
    loose: list[Change]
    generation: int
    """The journal's name for it; 0 without a journal."""

    def stage(self, stage: Stage) -> list[Change]:
        return [change for change in self.changes if change.stage is stage]


@dataclass(slots=True)
class Pending:
    """What was done in memory since the last freeze."""

    changed: dict[int, AnyTable] = field(default_factory=dict)
    """Tables with dirty sectors, and fresh ones, by offset."""
    loose: list[Change] = field(default_factory=list)
    """What is no entry of a table: header fields, and what an alteration puts."""
    freed: list[Freed] = field(default_factory=list)
    freed_clusters: int = 0
    on_linked: list[Callable[[], None]] = field(default_factory=list)
    half_linked: bool = False
    """Among it is what was taken back from a LINK that had begun: on disk it may be old or new."""
    journal: Journal | None = None
    """Where the keeper finds it all, too. None: there is no keeper."""
    notes: list[int] | None = None
    """For the journal, and not in it yet: see ``publish``. None without a journal."""

    def __post_init__(self) -> None:
        if self.journal is not None:
            self.notes = []

    def __bool__(self) -> bool:
        return bool(self.changed or self.loose or self.freed)

    def touch(self, table: AnyTable) -> None:
        """``table`` has dirty sectors, or is fresh."""
        self.changed[table.offset] = table

    def set(self, table: AnyTable, index: int, value: int) -> None:
        """Change an entry or a count. The change itself comes last: what Ctrl-C leaves half done is noted and not seen, never
        seen and not written. Both words of a note go in with one operation, for a half note would shift all later ones."""
        self.changed[table.offset] = table
        notes = self.notes
        if notes is not None:
            notes += (table.place + index * table.bits, value)
        table.set(index, value)

    def link(self, table: Table, index: int, entry: int) -> None:
        """Change an L2 entry, of one word or of two."""
        if table.words == 1:
            self.set(table, index, entry)
        else:
            self.set(table, 2 * index, entry & WORD_MASK)
            self.set(table, 2 * index + 1, entry >> BITMAP_SHIFT)

    def add(self, table: AnyTable, copied: AnyTable | None = None) -> None:
        """Enter a fresh table before its entries are changed: all zeros, or it begins as ``copied`` does."""
        self.touch(table)
        if self.notes is not None:
            tag = FRESH if copied is None else COPY
            self.notes += (tag << PLACE_BITS | table.offset << 3, table.length_bytes << 8 | KIND_NUMBERS[table.kind])
            if copied is not None:
                self.notes += (copied.place, copied.length_bytes)

    def free(self, first: int, count: int = 1, *, discard: bool = False, table: bool = False) -> None:
        """``count`` host clusters lose one reference each, once what unlinks them is durable. See ``Freed``."""
        self.freed.append(Freed(first, count, discard, table))
        self.freed_clusters += count
        if self.notes is not None:
            self.notes += (FREED << PLACE_BITS | first, count << 1 | table)

    def patch_header(self, offset: int, data: bytes, mark: str) -> None:
        """Change header bytes within sector 0, in LINK."""
        assert offset + len(data) <= SECTOR_BYTES
        self.loose.append(Change(Stage.LINK, 0, offset, data, mark, Kind.HEADER))
        if self.notes is not None:
            self.notes += header_notes(offset, data)

    def put(self, stage: Stage, offset: int, data: bytes, mark: str, kind: Kind) -> None:
        """Bytes at an offset, in PREPARE (nothing leads there yet) or LINK (inside one sector, old or new). For alterations:
        the keeper does not hear of it."""
        assert self.notes is None
        self.loose.append(Change(stage, 0, offset, data, mark, kind))

    def publish(self) -> None:
        """Show the keeper what was done: after the data calls have returned, before anything is acknowledged."""
        if self.journal is not None and self.notes:
            self.journal.publish(self.notes)
            self.notes.clear()

    def changes(self) -> list[Change]:
        """The whole as a list of changes, in the order of the stages. RECLAIM's bytes exist only once LINK is durable."""
        prepare: list[Change] = []
        link: list[Change] = []
        for table in self.changed.values():
            if table.fresh:
                data = table.content()
                prepare.append(Change(Stage.PREPARE, 0, table.offset, data, _NEW_MARKS[table.kind], table.kind))
            elif table.kind is Kind.REFCOUNT_BLOCK:
                prepare += _sector_changes(table, table.dirty, Stage.PREPARE, "refcount.increment")
            else:
                link += _sector_changes(table, table.dirty, Stage.LINK, _LINK_MARKS[table.kind])
        return prepare + link + self.loose

    def freeze(self) -> Frozen:
        """Fix the list of changes; what comes after belongs to the next transaction."""
        self.publish()
        tables = list(self.changed.values())
        frozen = Frozen(
            changes=self.changes(),
            tables=tables,
            fresh=[table for table in tables if table.fresh],
            freed=self.freed,
            on_linked=self.on_linked,
            sectors={table.offset: (table, table.dirty) for table in tables},
            loose=self.loose,
            generation=0 if self.journal is None else self.journal.next_generation(),
        )
        for table in tables:
            table.dirty = set()
            table.frozen = True
        self._forget()
        return frozen

    def take_back(self, frozen: Frozen, *, link_begun: bool) -> None:
        """A commit failed: its changes are pending again, together with all that came after.

        Once LINK has begun, a fresh table may be reachable: its entries are LINK from now on, as for any other table.
        """
        for offset, (table, sectors) in frozen.sectors.items():
            table.frozen = False
            table.dirty |= sectors
            if link_begun and table.fresh:
                table.fresh = False
            self.changed[offset] = table
        self.loose = frozen.loose + self.loose
        self.half_linked |= link_begun
        self.freed = frozen.freed + self.freed
        self.freed_clusters = sum(entry.clusters for entry in self.freed)
        self.on_linked = frozen.on_linked + self.on_linked

    def drop(self) -> bool:
        """Forget it all; what is in memory has to be read again. True if some of it may have reached the disk in a LINK."""
        half_linked, self.half_linked = self.half_linked, False
        self._forget()
        return half_linked

    def _forget(self) -> None:
        self.changed, self.loose, self.freed, self.on_linked, self.freed_clusters = {}, [], [], [], 0


def _sector_changes(table: AnyTable, sectors: Iterable[int], stage: Stage, mark: str) -> list[Change]:
    return [
        Change(stage, 0, table.offset + sector * SECTOR_BYTES, table.sector(sector), mark, table.kind)
        for sector in sorted(sectors)
    ]


def write_changes(storage: Storage, layout: Layout, changes: list[Change]) -> None:
    """Write the changes of one stage, neighbours in one call. Their order among each other means nothing."""
    ordered = sorted(changes, key=attrgetter("offset"))
    for change in ordered:
        layout.check_table(change.offset, len(change.data), change.kind)
    at = 0
    while at < len(ordered):
        first = ordered[at]
        buffers = [first.data]
        end = first.offset + len(first.data)
        at += 1
        while at < len(ordered) and ordered[at].offset == end and ordered[at].mark == first.mark:
            buffers.append(ordered[at].data)
            end += len(ordered[at].data)
            at += 1
        storage.writev(first.offset, buffers, first.mark)


class Reclaimer(Protocol):
    """What a commit needs of the image for its last stage: see ``cowfence.qcow2.reclaim``."""

    def reclaim(self, freed: list[Freed]) -> None: ...


class Committer:
    """Writes transactions, one at a time, and joins callers that wait for the same one (group commit).

    ``lock`` is the image's lock: held while a transaction is frozen and while its end is noted, never during a write or a
    fence of it.
    """

    def __init__(
        self,
        storage: Storage,
        layout: Layout,
        lock: Lock,
        pending: Pending,
        reclaimer: Reclaimer,
        *,
        data: Storage | None = None,
        unsafe: bool = False,
    ) -> None:
        """``data``: where guest data is written, if that is another file. ``unsafe``: nothing is ever fenced; the caller gave
        up the promise of power cuts for speed."""
        self._data = data
        self._unsafe = unsafe
        self._storage = storage
        self._layout = layout
        self._lock = lock
        self._pending = pending
        self._journal = pending.journal
        self._reclaimer = reclaimer
        self._turn = Condition(lock)
        self._running = False
        self._finished = 0
        """Commits that have ended well: numbered from 1 in the order of their freezes."""
        self._started = 0
        self.data_written = False
        """Guest data was written since the last fence began."""
        self.unfenced_reclaim = False
        """RECLAIM was written, and no fence has come since."""
        self.broken: ReadOnly | None = None
        """Set when a fence failed: what the kernel still holds may never reach the disk, so nothing more is written."""
        self.fences = 0
        self.joined = 0
        """Callers whose commit another one's was (group commit)."""

    def commit(self) -> None:
        """Everything done before this call is durable when it returns. Raises what failed; see ``Pending.take_back``.

        Joins a commit that another thread starts after this call, never one that was frozen before it.
        """
        with self._lock:
            wanted = self._started + 1
            while self._running:
                self._turn.wait()
                if self._finished >= wanted:
                    self.joined += 1
                    return
            self._running = True
            self._started += 1
            number = self._started
            try:
                self._check()
                data_written, self.data_written = self.data_written, False
                frozen = self._pending.freeze() if self._pending else None
            except BaseException:
                self._running = False
                self._turn.notify_all()
                raise
        try:
            if frozen is not None:
                self._commit(frozen)
                self._note(number)
            elif data_written:
                self._fence("data.fence", self._data)
                self._note(number)
            else:
                self._note(number)
        except BaseException:
            with self._lock:
                self.data_written = True
            raise
        finally:
            with self._lock:
                self._running = False
                self._turn.notify_all()

    @property
    def commits(self) -> int:
        """The number of the last that ended well; one that failed before it has a number too."""
        return self._finished

    def wait_until_idle(self) -> None:
        """Under the lock: until no commit is under way."""
        while self._running:
            self._turn.wait()

    def busy(self) -> bool:
        """True if ``commit`` would write, fence or wait. A hint: it may be outdated when it returns."""
        return bool(self._pending) or self.data_written or self._running or self.broken is not None

    def _note(self, number: int) -> None:
        with self._lock:
            self._finished = number

    def _check(self) -> None:
        if self.broken is not None:
            # Each raise adds to an error's traceback, and with it the buffers of those who called.
            raise self.broken.with_traceback(None)

    def _commit(self, frozen: Frozen) -> None:
        link_begun = False
        try:
            # PREPARE: refcounts up and new tables, beside the guest data that was written already. Nothing leads here yet.
            write_changes(self._storage, self._layout, frozen.stage(Stage.PREPARE))
            if self._data is not None:
                self._fence("data.fence", self._data)
            self._fence("prepare.fence")
            # All that LINK will point to is durable now.
            link_begun = True
            write_changes(self._storage, self._layout, frozen.stage(Stage.LINK))
            self._fence("link.fence")
        except BaseException:
            # Ctrl-C inside a fence comes here too: what may or may not be durable is done again.
            with self._lock:
                self._pending.take_back(frozen, link_begun=link_begun)
            raise
        # RECLAIM: nothing on disk leads to the old clusters any more. The keeper hears of it before anybody can use them.
        with self._lock:
            self._pending.half_linked = False
            if self._journal is not None:
                self._journal.retire(frozen.generation)
            for table in frozen.tables:
                table.frozen = False
            for table in frozen.fresh:
                table.fresh = False
            for linked in frozen.on_linked:
                linked()
            if frozen.freed:
                self.unfenced_reclaim = True
        self._reclaimer.reclaim(frozen.freed)

    def _fence(self, mark: str, storage: Storage | None = None) -> None:
        if self._unsafe:
            return
        journal = self._journal
        if journal is not None:
            journal.fence_begins()
        try:
            (storage or self._storage).fence(mark)
        except CowfenceError as failure:
            if journal is not None:
                journal.fence_failed()
            with self._lock:
                self.broken = ReadOnly(
                    f"{self._storage.name}: a fence failed ({failure}); the image is read-only until it is opened again"
                )
            raise
        if journal is not None:
            journal.fence_ended()
        self.fences += 1
        if storage is None:
            self.unfenced_reclaim = False

    def fence(self, mark: str) -> None:
        """A fence outside of a transaction (open, close)."""
        self._check()
        self._fence(mark)
