"""The state of one open image: its tables in memory, and the lock under which everything is planned.

One lock for each image. It is held while a request is planned, its data written and its metadata changes entered; it is never
held during a fence or a read that has to wait for a disk. What runs outside of it holds a *ticket*, so that the host clusters
that it was planned against are not given to anybody else before it has ended (crash contract, R4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Lock
from typing import TYPE_CHECKING

from cowfence.disk.base import Disk
from cowfence.errors import Corrupt
from cowfence.qcow2.allocator import Allocator
from cowfence.qcow2.cache import TableCache
from cowfence.qcow2.entries import COPIED, BadEntry, decode_l1
from cowfence.qcow2.geometry import OFFSET_MASK, Geometry
from cowfence.qcow2.header import Header
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.reader import MetadataReader, NeedsCommit
from cowfence.qcow2.reclaim import ClusterReclaimer
from cowfence.qcow2.refcounts import Refcounts
from cowfence.qcow2.tables import Kind, Table
from cowfence.qcow2.transaction import Committer, Pending
from cowfence.storage.base import Storage

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import DataCipher


class Tickets:
    """Who still works outside the lock with an older plan. All calls but one are made under the image's lock."""

    def __init__(self, lock: Lock) -> None:
        self._next = 0
        self._active: dict[int, None] = {}
        self._settling: set[int] = set()
        """Those that have ended, and whose holders still release what waited for them: see ``ClusterReclaimer.end_ticket``."""
        self._settled = Condition(lock)

    def begin(self) -> int:
        ticket = self._next
        self._next += 1
        self._active[ticket] = None
        return ticket

    def end(self, ticket: int) -> None:
        """What was planned is over. Clusters that waited for it may be released."""
        self._settling.add(ticket)
        self._active.pop(ticket, None)

    def settle(self, ticket: int) -> None:
        """Its holder has nothing more to do with the image."""
        self._active.pop(ticket, None)
        self._settling.discard(ticket)
        self._settled.notify_all()

    def wait_for_all(self) -> None:
        """Wait until nobody works outside the lock any more. Called outside of it."""
        with self._settled:
            self._settled.wait_for(lambda: not self._active and not self._settling)

    def now(self) -> int:
        """A mark: plans made from here on are newer."""
        return self._next

    def all_ended_before(self, mark: int) -> bool:
        """True if every plan that is older than ``mark`` has ended."""
        oldest = next(iter(self._active), None)
        return oldest is None or oldest >= mark


@dataclass(slots=True)
class State:
    """Everything that the read and write paths of one image share."""

    storage: Storage
    data: Storage
    """Where the guest's data stands: ``storage``, or the external data file."""
    cipher: DataCipher | None
    """Between the guest's data and the file, where the image is encrypted."""
    header: Header
    geometry: Geometry
    lock: Lock
    reader: MetadataReader
    layout: Layout
    pending: Pending
    l1: Table
    l2: TableCache[Table]
    refcounts: Refcounts
    allocator: Allocator
    committer: Committer
    reclaimer: ClusterReclaimer
    backing: Disk | None
    backing_bytes: int
    size: int
    raw_data: bool
    """The external data file is the guest's disk also when it is read by itself."""
    discards: bool
    """Host space of what the guest discarded is given back to the host."""
    quarantine_limit: int
    """Clusters that may wait for their release before an operation commits on its own."""
    piece_bytes: int
    """The most that an operation changes in one go, so that what it notes for a keeper is bounded."""
    tickets: Tickets
    record: Callable[[int, int], None] | None = None
    """Told, under the lock, of each range (offset, length in bytes) of guest data that changes: see ``bitmaps``."""

    def l2_table(self, l1_index: int, *, wait: bool, cached: bool) -> Table | None:
        """The L2 table behind an L1 entry; None where there is none.

        ``cached``: it must stay in the cache, because it will be changed (NeedsCommit where there is no room); otherwise a
        full cache is read around. Raises Corrupt, or Cold where ``wait`` is false.
        """
        table = self.l2.get(l1_index)
        if table is not None:
            return table
        offset = self.l2_offset(l1_index)
        if offset is None:
            return None
        room = self.l2.room_for(1)
        if cached and not room:
            raise NeedsCommit
        data = self.reader.read(offset, self.geometry.cluster_bytes, f"L2 table of L1[{l1_index}]", wait=wait)
        table = Table.from_bytes(Kind.L2, l1_index, offset, data, words=self.geometry.l2_entry_words)
        if room:
            self.l2.put(table)
        return table

    def l2_offset(self, l1_index: int) -> int | None:
        """Where the L2 table of an L1 entry stands. Raises Corrupt for a bad entry."""
        if l1_index >= len(self.l1.entries):
            return None
        entry = self.l1.entries[l1_index]
        if not entry:
            return None
        try:
            return decode_l1(entry, self.geometry).host_offset
        except BadEntry as bad:
            raise Corrupt(f"{self.storage.name}: L1[{l1_index}]", str(bad)) from None

    def may_write_in_place(self, entry: int, *, wait: bool) -> bool:
        """True if the cluster that an L1 or standard L2 entry points to has exactly one reference.

        A clear COPIED flag proves nothing; the stored count decides, in which pending decrements still stand (R1). In an
        external data file nothing is shared.
        """
        if entry & COPIED:
            return True
        return self.refcounts.count((entry & OFFSET_MASK) >> self.geometry.cluster_bits, wait=wait) == 1

    def reads_zero_below(self, guest_offset: int) -> bool:
        """True if an unallocated cluster at ``guest_offset`` reads as zeros: nothing of a backing file lies there."""
        return guest_offset >= self.backing_bytes

    def check_room(self) -> None:
        """Raise NeedsCommit when too many clusters wait for their release, too many refcount blocks for a commit, or too many
        notes for the keeper."""
        pending = self.pending
        if (
            pending.freed_clusters > self.quarantine_limit
            or not self.refcounts.blocks.room_for(0)
            or (pending.journal is not None and len(pending.notes or ()) > pending.journal.room_words)
        ):
            raise NeedsCommit
