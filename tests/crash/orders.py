"""The broken orders of the crash contract, each as a patch of the engine. They live here, never in the product.

Each mutant is a context manager: inside it the engine does the wrong thing in one respect. ``case`` names where it shows,
``power_only`` that a killed process cannot show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from cowfence.crash.cases import parse_case
from cowfence.qcow2 import bitmaps
from cowfence.qcow2.allocator import Allocator
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.bitmap_directory import IN_USE, encode_bitmap_directory
from cowfence.qcow2.bitmaps import Bitmaps
from cowfence.qcow2.image import Qcow2Disk
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.layout import Layout
from cowfence.qcow2.reclaim import ClusterReclaimer
from cowfence.qcow2.repair import RepairReport, _Repair
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind
from cowfence.qcow2.transaction import Change, Committer, Freed, Frozen, Pending, Stage, write_changes
from cowfence.qcow2.verify import Survey
from cowfence.qcow2.write import Writes
from cowfence.storage.base import Buffer, Storage
from cowfence.storage.record import RecordingStorage
from cowfence.storage.wrapper import StorageWrapper

Patch = Callable[[], Any]


@dataclass(frozen=True)
class Mutant:
    """``case``: where it shows. ``clauses``: one of them must be what the judge names. ``says``: stands in the sentence."""

    name: str
    case: str
    patch: Patch
    power_only: bool = False
    clauses: tuple[str, ...] = ("C1", "C2", "C3", "C5")
    says: str = ""


def _finish(self: Committer, frozen: Frozen) -> None:
    """What the true commit does in memory between LINK's fence and RECLAIM."""
    with self._lock:
        for table in frozen.tables:
            table.frozen = False
        for table in frozen.fresh:
            table.fresh = False
        for linked in frozen.on_linked:
            linked()


_HELD: list[tuple[RecordingStorage, int, list[Buffer], str]] = []


@contextmanager
def _holding_data() -> Iterator[None]:
    """Guest data waits in ``_HELD`` until the order says "data"."""
    true = RecordingStorage.writev

    def writev(self: RecordingStorage, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if mark == "data.write":
            _HELD.append((self, offset, [bytes(buffer) for buffer in buffers], mark))
        else:
            true(self, offset, buffers, mark)

    _HELD.clear()
    with (
        mock.patch.object(RecordingStorage, "writev", writev),
        mock.patch.object(RecordingStorage, "true_writev", true, create=True),
    ):
        yield


def order(*actions: str) -> Patch:
    """A commit that does the named actions in the named order."""

    def commit(self: Committer, frozen: Frozen) -> None:
        for action in actions:
            if action == "fence":
                self._fence("mutant.fence")
            elif action == "data":
                for storage, offset, buffers, mark in _HELD:
                    storage.true_writev(offset, buffers, mark)  # type: ignore[attr-defined]
                _HELD.clear()
            elif action == "reclaim":
                _finish(self, frozen)
                self._reclaimer.reclaim(frozen.freed)
            elif action == "top links":
                top = [c for c in frozen.stage(Stage.LINK) if c.kind in (Kind.L1, Kind.REFCOUNT_TABLE, Kind.HEADER)]
                write_changes(self._storage, self._layout, top)
            elif action == "live link":
                live = [
                    Change(Stage.LINK, 0, c.offset, table.sector((c.offset - table.offset) // 512), c.mark, c.kind)
                    for c in frozen.stage(Stage.LINK)
                    for table in frozen.tables
                    if table.offset <= c.offset < table.offset + 512
                ]
                write_changes(self._storage, self._layout, live)
            else:
                write_changes(self._storage, self._layout, frozen.stage(Stage[action.upper()]))

    @contextmanager
    def patched() -> Iterator[None]:
        with mock.patch.object(Committer, "_commit", commit):
            if "data" in actions:
                with _holding_data():
                    yield
            else:
                yield

    return patched


@contextmanager
def _no_flush_fence() -> Iterator[None]:
    true = Committer._fence

    def fence(self: Committer, mark: str, storage: Storage | None = None) -> None:
        if mark not in ("link.fence", "data.fence"):
            true(self, mark, storage)

    with mock.patch.object(Committer, "_fence", fence):
        yield


@contextmanager
def _data_file_not_fenced() -> Iterator[None]:
    """Entries are linked while what they lead to in the data file is not durable."""
    true = Committer._commit

    def commit(self: Committer, frozen: Frozen) -> None:
        external, self._data = self._data, None
        try:
            true(self, frozen)
        finally:
            self._data = external

    with mock.patch.object(Committer, "_commit", commit):
        yield


@contextmanager
def _flush_writes_no_tables() -> Iterator[None]:
    def flush(self: Qcow2Disk) -> None:
        self.storage.fence("mutant.fence")

    with mock.patch.object(Qcow2Disk, "flush", flush):
        yield


@contextmanager
def _reused_at_once() -> Iterator[None]:
    """A freed cluster is counted down in memory and handed out again before its unlink is anywhere."""
    states: list[State] = []
    true_init = State.__init__

    def init(self: State, *args: Any, **kwargs: Any) -> None:
        true_init(self, *args, **kwargs)
        states.append(self)

    def free(self: Pending, first: int, count: int = 1, *, discard: bool = False, table: bool = False) -> None:  # noqa: ARG001
        state = next(state for state in reversed(states) if state.pending is self)
        block = state.refcounts.block_of(first, wait=True)
        assert block is not None
        block.set(first % state.geometry.refcounts_per_block, 0)
        self.touch(block)
        state.allocator._returned.append(first)
        state.allocator.free += 1

    with mock.patch.object(State, "__init__", init), mock.patch.object(Pending, "free", free):
        yield


@contextmanager
def _block_on_callers_cluster() -> Iterator[None]:
    """The refcount block takes the cluster that the caller is about to get."""

    def look_ahead(self: Allocator, *, wait: bool) -> None:
        if self._block_pending or self._to_scan or not 1 <= self.free <= self._lookahead:
            return
        index = self._next_index()
        run = self.reserve(1, wait=wait)
        assert index is not None
        self._add_block(index, run[0].first)
        self._refcounts.increment(run[0].first)
        self.give_back(run)

    def claim_nothing(self: Layout, *args: Any, **kwargs: Any) -> None:
        pass

    with (
        mock.patch.object(Allocator, "look_ahead", look_ahead),
        mock.patch.object(Layout, "check_data", claim_nothing),
        mock.patch.object(Layout, "claim_new", claim_nothing),
        mock.patch.object(Layout, "check_table", claim_nothing),
    ):
        yield


@contextmanager
def _covered_before_linked() -> Iterator[None]:
    """Clusters are handed out while their refcount block's own link is still pending."""
    true = Allocator._add_block

    def add_block(self: Allocator, index: int, cluster: int) -> Any:
        block = true(self, index, cluster)
        self._pending.on_linked.pop()
        self._covered(index)
        return block

    with mock.patch.object(Allocator, "_add_block", add_block):
        yield


@contextmanager
def _freed(action: Callable[[State, int, bool], bool]) -> Iterator[None]:
    """``action(state, cluster, table)`` for each cluster that is freed; where it says True, that was all."""
    states: list[State] = []
    true_init, true_free = State.__init__, Pending.free

    def init(self: State, *args: Any, **kwargs: Any) -> None:
        true_init(self, *args, **kwargs)
        states.append(self)

    def free(self: Pending, first: int, count: int = 1, *, discard: bool = False, table: bool = False) -> None:
        state = next(state for state in reversed(states) if state.pending is self)
        if not action(state, first, table):
            true_free(self, first, count, discard=discard, table=table)

    with mock.patch.object(State, "__init__", init), mock.patch.object(Pending, "free", free):
        yield


@contextmanager
def _punched_at_once() -> Iterator[None]:
    """Host space is given back while a durable entry still leads there."""

    def punch(state: State, cluster: int, table: bool) -> bool:  # noqa: ARG001
        state.storage.discard(cluster << state.geometry.cluster_bits, state.geometry.cluster_bytes, "host.discard")
        return False

    with _freed(punch):
        yield


def counted_down_at_once(tables: bool) -> Patch:
    """The count goes down with PREPARE, before the entry changes."""

    def down(state: State, cluster: int, table: bool) -> bool:
        if table is not tables:
            return False
        block = state.refcounts.block_of(cluster, wait=True)
        assert block is not None
        at = cluster % state.geometry.refcounts_per_block
        block.set(at, block.get(at) - 1)
        state.pending.touch(block)
        return True

    return lambda: _freed(down)


@contextmanager
def _no_tail() -> Iterator[None]:
    """What the guest did not rewrite of a new cluster is left as it was."""
    with mock.patch.object(Writes, "_kept", return_value=None):
        yield


@contextmanager
def available_before_retired() -> Iterator[None]:
    true_retire, true_reclaim = Journal.retire, ClusterReclaimer.reclaim
    late: list[tuple[Journal, int]] = []

    def reclaim(self: ClusterReclaimer, freed: list[Freed]) -> None:
        true_reclaim(self, freed)
        for journal, generation in late:
            true_retire(journal, generation)
        late.clear()

    with (
        mock.patch.object(Journal, "retire", lambda journal, generation: late.append((journal, generation))),
        mock.patch.object(ClusterReclaimer, "reclaim", reclaim),
    ):
        yield


@contextmanager
def published_before_the_data() -> Iterator[None]:
    true_write, true_publish = RecordingStorage.writev, Journal.publish
    held: list[tuple[RecordingStorage, int, list[bytes]]] = []

    def writev(self: RecordingStorage, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if mark == "data.write":
            held.append((self, offset, [bytes(buffer) for buffer in buffers]))
        else:
            true_write(self, offset, buffers, mark)

    def publish(self: Journal, notes: list[int]) -> None:
        true_publish(self, notes)
        for storage, offset, buffers in held:
            true_write(storage, offset, buffers, "data.write")
        held.clear()

    with mock.patch.object(RecordingStorage, "writev", writev), mock.patch.object(Journal, "publish", publish):
        yield


def _write_flags(of: Bitmaps, *, in_use: bool) -> None:
    """Over the old directory, without a fence."""
    state = of._state
    pointer = state.header.bitmaps
    assert pointer is not None
    entries = [
        entry._replace(flags=entry.flags | IN_USE if in_use else entry.flags & ~IN_USE) for entry in bitmaps._entries(state)
    ]
    state.storage.writev(pointer.directory_offset, (encode_bitmap_directory(entries),), "bitmap.directory")


@contextmanager
def _directory_in_place() -> Iterator[None]:
    true = Bitmaps.end

    def end(self: Bitmaps, alteration: Alteration) -> None:
        _write_flags(self, in_use=False)
        true(self, alteration)

    with mock.patch.object(Bitmaps, "end", end):
        yield


@contextmanager
def _in_use_without_a_fence() -> Iterator[None]:
    def begin(self: Bitmaps, alteration: Alteration) -> None:  # noqa: ARG001
        for held in self._load().values():
            self._bits(held)
        _write_flags(self, in_use=True)
        self._record()

    with mock.patch.object(Bitmaps, "begin", begin):
        yield


class _Unfenced(StorageWrapper):
    def fence(self, mark: str) -> None:
        pass


@contextmanager
def _dirty_bit_first() -> Iterator[None]:
    true = _Repair.run

    def run(self: _Repair, found: Survey) -> RepairReport:
        storage, self._storage = self._storage, _Unfenced(self._storage)
        report = true(self, found)
        storage.fence("link.fence")
        return report

    with mock.patch.object(_Repair, "run", run):
        yield


CASES = {
    name: parse_case(text)
    for name, text in {
        "allocate": "v3,c512,r16,t64 | write:0+512 flush",
        "data-file": "v3,c512,r16,t64,data | write:0+512 flush",
        "in-place-and-new": "v3,c512,r16,t64,aged | write:0+512 write:5120+512 flush",
        "compressed": "v3,c512,r16,t64,aged | write:2048+512 write:4608+512 flush write:5120+512 flush",
        "shared": "v3,c512,r16,t64,aged,s1 | write:0+512 flush",
        "discard-then-write": "v3,c512,r16,t64,aged | discard:0+512 write:4608+512 flush",
        "zero-then-write": "v3,c512,r16,t64,aged | zero:0+512 write:4608+512 flush",
        "l1-growth": "v3,c512,r16,t64,short_l1 | write:35840+512 flush",
        "refcount-block": "v3,c512,r64,t64,full | write:30720+6144 flush write:51200+2048 flush",
        "refcount-block-unflushed": "v3,c512,r64,t64,full | write:30720+20480 flush",
        "compressed-alone": "v3,c512,r16,t64,aged | write:2048+512 flush",
        "one-table": "v3,c512,r16,t1,aged,s1 | write:0+512 write:35840+512 flush",
        "part": "v3,c4096,r16,t64,aged,s1 | write:512+512 flush",
        "kept": "v3,c512,r16,t64,keeper,aged | write:5120+512 write:2048+512 flush",
        "kept-shared": "v3,c512,r16,t64,s1,keeper,aged | write:0+512 flush",
        "bitmap-closed": "v3,c512,r16,t64,bitmap | write:0+512 reopen",
        "bitmap-begun": "v3,c512,r16,t64,aged,bitmap | write:0+512 flush",
        "dirty": "v3,c512,r16,t64,aged,dirty | flush",
        "compressed-write": "v3,c512,r16,t1,aged | write_compressed:4608+512 write:35840+512 flush",
        "inside-fence": "v3,c512,r16,t64,aged | write:5120+512 flush | inside 0=write:6144+512",
    }.items()
}
"""Where each order shows."""


MUTANTS = [
    Mutant(
        "M1 order before the 2008 patch", "shared", order("reclaim", "prepare", "link", "data", "fence"), clauses=("C3", "C5")
    ),
    Mutant("M2 L2 before guest data", "allocate", order("prepare", "fence", "link", "data", "fence", "reclaim")),
    Mutant(
        "M3 L2 before refcounts up", "in-place-and-new", order("link", "fence", "prepare", "fence", "reclaim"), clauses=("C5",)
    ),
    Mutant("M4 refcounts down before L2", "compressed", order("prepare", "fence", "reclaim", "link", "fence")),
    Mutant(
        "M5 no fence between PREPARE and LINK, refcount side",
        "in-place-and-new",
        order("fence", "prepare", "link", "fence", "reclaim"),
        power_only=True,
        clauses=("C5",),
    ),
    Mutant(
        "M6 no fence between PREPARE and LINK, data side",
        "in-place-and-new",
        order("prepare", "fence", "data", "link", "fence", "reclaim"),
        power_only=True,
    ),
    Mutant("M7 flush without a fence", "in-place-and-new", _no_flush_fence, power_only=True, clauses=("C2",)),
    Mutant("M8 flush fences and writes no tables", "allocate", _flush_writes_no_tables, clauses=("C2",)),
    Mutant("M9 reused at once, compressed", "compressed", _reused_at_once, clauses=("C1", "C3")),
    Mutant("M9 reused at once, discard", "discard-then-write", _reused_at_once, clauses=("C3",)),
    Mutant("M9 reused at once, zero with unmap", "zero-then-write", _reused_at_once, clauses=("C3",)),
    Mutant("M10 host discard before the unlink is durable", "compressed-alone", _punched_at_once, clauses=("C1", "C3")),
    Mutant("M11 old L2 table freed before the L1 entry changes", "shared", counted_down_at_once(True), clauses=("C5", "C6")),
    Mutant("M25 freed before its entry is replaced, one-table cache", "one-table", counted_down_at_once(False)),
    Mutant("M27 copied tail left out", "part", _no_tail, clauses=("C3",)),
    Mutant("M36 available before retired", "kept-shared", available_before_retired, clauses=("C4", "C5", "C6")),
    Mutant("M36 published before the data", "kept", published_before_the_data, clauses=("C3", "C4", "C1")),
    Mutant(
        "M12 L1 entry before the new L2 table",
        "allocate",
        order("top links", "prepare", "fence", "link", "fence", "reclaim"),
        clauses=("C1", "C3", "C5"),
    ),
    Mutant(
        "M13 header's L1 pointer before the new L1 table",
        "l1-growth",
        order("top links", "prepare", "fence", "link", "fence", "reclaim"),
        clauses=("C1", "C3", "C5"),
    ),
    Mutant(
        "M14 refcount-table entry before its block",
        "refcount-block",
        order("top links", "prepare", "fence", "link", "fence", "reclaim"),
        clauses=("C5",),
    ),
    Mutant(
        "M15 refcount block on the caller's own cluster",
        "refcount-block",
        _block_on_callers_cluster,
        clauses=("C1", "C3", "C5"),
    ),
    Mutant(
        "M31 refcount-table entry in the LINK of an L2 entry that it counts",
        "refcount-block-unflushed",
        _covered_before_linked,
        power_only=True,
        clauses=("C5",),
    ),
    Mutant(
        "M20 compressed: L2 before data, one-table cache",
        "compressed-write",
        order("prepare", "fence", "link", "data", "fence", "reclaim"),
        clauses=("C1", "C3"),
    ),
    Mutant(
        "M23 the dirty bit cleared before the rebuilt refcounts are durable",
        "dirty",
        _dirty_bit_first,
        power_only=True,
        clauses=("C5",),
        says="`refcount_block.new`",
    ),
    Mutant(
        "M24 data file not fenced before L2",
        "data-file",
        _data_file_not_fenced,
        power_only=True,
        clauses=("C2", "C3"),
        says="`data.write`",
    ),
    Mutant(
        "M26 bitmap directory changed under a set autoclear bit",
        "bitmap-closed",
        _directory_in_place,
        clauses=("C14",),
    ),
    Mutant(
        "M34 in-use flag not durable before an in-place write",
        "bitmap-begun",
        _in_use_without_a_fence,
        power_only=True,
        clauses=("C14",),
    ),
    Mutant(
        "M33 LINK writes the live sector",
        "inside-fence",
        order("prepare", "fence", "live link", "fence", "reclaim"),
        clauses=("C3", "C5"),
    ),
]
