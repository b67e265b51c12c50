"""A run: operations carried out on an image whose every call is recorded, with the guest's side noted between them.

*Interleaved*: inside the n-th call that the engine makes outside of its lock (a fence, a cold read, what RECLAIM writes), one
more operation of the guest is carried out before the call returns, as another thread could. *Fault*: a plan makes calls fail;
the run goes on, and what an operation that failed may have done is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cowfence.crash.images import BACKING, DATA, IMAGE, Built, ImageSpec, build, options, secrets, tagged
from cowfence.crash.operations import OPERATIONS, Step
from cowfence.crash.structure import inspect
from cowfence.disk.base import BLOCKED, Disk
from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError, Invalid, WouldBlock
from cowfence.qcow2.header import read_header
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.repair import Mode, repair
from cowfence.qcow2.replay import replay
from cowfence.storage.base import Storage, WritableBuffer
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Entry, OpLog
from cowfence.storage.record import RecordingStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import KIB

_JOURNAL_BYTES = 32 * KIB
_LARGE_JOURNAL_BYTES = 256 * KIB
"""Of an image with large clusters, whose L2 tables have more entries."""
_OUTSIDE_THE_LOCK = ("refcount.decrement", "host.discard", "data.write")
"""Or perhaps there: ``Qcow2Disk.planning`` tells."""


class Interleaving:
    """Steps by the number of the call that each is carried out in."""

    def __init__(self, inside: Mapping[int, Step]) -> None:
        self.inside = inside
        self.calls = 0
        """Calls so far that another operation could have been inside of."""


@dataclass(frozen=True, slots=True)
class EngineSubject:
    """Our own engine on an image of the explorer's (see ``Subject``)."""

    spec: ImageSpec
    image: str = IMAGE

    def open(
        self, files: Mapping[str, Storage], *, writable: bool, journal: Journal | None = None, snapshot: str | None = None
    ) -> Qcow2Disk:
        backing: Disk | None = None
        if BACKING in files and read_header(files[self.image]).backing_name is not None:
            backing = self.open_backing(files[BACKING])
        return open_image(
            files[IMAGE],
            backing=backing,
            writable=writable,
            options=options(self.spec),
            journal=journal,
            snapshot=snapshot,
            data=files.get(DATA),
            secrets=secrets,
        )

    def open_backing(self, storage: Storage) -> RawDisk | Qcow2Disk:
        """The file below, as a disk: for writing, too, where its storage is writable."""
        if self.spec.backing == "raw":
            return RawDisk(storage)
        return open_image(storage, backing=None, writable=storage.writable, options=Options(commit_interval=None))


@dataclass(slots=True)
class Recording:
    """What a run leaves: its files before, what the guest read before, and the log."""

    initial: dict[str, bytes]
    guest: bytes
    entries: Sequence[Entry]
    calls: int = 0
    """Calls that another operation could have been inside of."""
    journals: dict[int, bytes] = field(default_factory=dict)
    """With a keeper: by position of the log, the journal from then on."""
    errors: list[str] = field(default_factory=list)


class Facts(NamedTuple):
    """What an image says about itself (see ``structure``), before an alteration and after."""

    before: dict[str, object]
    after: dict[str, object]


class _Cold(StorageWrapper):
    """Nothing stands in the page cache."""

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        if not wait:
            raise WouldBlock(f"{self.name}: cold")
        return self.inner.readv(offset, buffers)


class Run:
    """One image being worked on."""

    def __init__(self, spec: ImageSpec, *, inside: Mapping[int, Step] | None = None, faults: FaultPlan | None = None) -> None:
        self.spec = spec
        self.built: Built = build(spec)
        self.subject = EngineSubject(spec)
        self.log = OpLog()
        self.errors: list[str] = []
        self.moment: bytes | None = None
        """What the guest's disk was when the backup that goes on began."""
        self.between = 0
        """Writes between the alterations of backups so far."""
        self._serial = 0
        self._interleaving = Interleaving(inside or {})
        self._plan = faults if faults is not None else FaultPlan()
        self._plan.on_call = self._on_call
        self._may_fail = faults is not None
        self._opening = True
        self._journal: Journal | None = None
        self.journals: dict[int, bytes] = {}
        self.memory = MemoryStorage(self.built.files[IMAGE], name=IMAGE)
        self.data = MemoryStorage(self.built.files[DATA], name=DATA) if DATA in self.built.files else None
        self.below = MemoryStorage(self.built.files[BACKING], name=BACKING) if BACKING in self.built.files else None
        # The calls that fail are counted from here on: an image that does not even open is no case.
        nth, self._plan.nth = self._plan.nth, None
        self.disk: Qcow2Disk = self._open()
        self._plan.nth, self._plan.matched = nth, 0
        self.guest = self._read_plainly(self.built.files[IMAGE])

    def recording(self) -> Recording:
        return Recording(
            dict(self.built.files), self.guest, self.log.entries(), self._interleaving.calls, self.journals, self.errors
        )

    # Opening

    def _open(self, *, writable_below: bool = False) -> Qcow2Disk:
        files: dict[str, Storage] = {IMAGE: self._watched(self.memory)}
        if self.data is not None:
            files[DATA] = self._watched(self.data)
        if self.below is not None:
            files[BACKING] = self.watched_below() if writable_below else self._below_as_it_is()
        self._opening = True
        size = _JOURNAL_BYTES if self.spec.cluster_bytes <= 4096 else _LARGE_JOURNAL_BYTES
        journal = Journal.new(bytearray(size), observe=self._observe) if self.spec.keeper else None
        try:
            disk = self.subject.open(files, writable=True, journal=journal)
        finally:
            self._opening = False
        self._journal = journal
        self._observe("keeper.starts")
        return disk

    def _observe(self, event: str) -> None:
        """What the keeper would find if the writer died here."""
        if self._journal is not None:
            self.journals[self.log.note(event)] = self._journal.snapshot()

    def _watched(self, memory: MemoryStorage) -> Storage:
        watched: Storage = FaultyStorage(RecordingStorage(memory, self.log, memory.name), self._plan)
        return _Cold(watched) if self.spec.cold else watched

    def _below_as_it_is(self) -> MemoryStorage:
        """The backing file as it stands in the page cache, for reading."""
        assert self.below is not None
        return MemoryStorage(self.below.snapshot(), name=BACKING, writable=False)

    def watched_below(self) -> Storage:
        """The backing file for writing, its calls recorded."""
        self.below = MemoryStorage(self._below_as_it_is().snapshot(), name=BACKING)
        return FaultyStorage(RecordingStorage(self.below, self.log, BACKING), self._plan)

    def _anew(self) -> None:
        """The files as another process finds them."""
        self.memory = MemoryStorage(self.memory.snapshot(), name=IMAGE)
        if self.data is not None:
            self.data = MemoryStorage(self.data.snapshot(), name=DATA)

    def open_below(self) -> Disk:
        """The backing file as a disk, for reading."""
        return self.subject.open_backing(self._below_as_it_is())

    def guest_content(self) -> bytes:
        """What the guest reads now; nobody does anything meanwhile."""
        self._opening = True
        try:
            return self.disk.read(0, self.disk.size)
        finally:
            self._opening = False

    def snapshot_content(self, snapshot_id: str) -> bytes:
        """What the guest's disk was when a snapshot was taken."""
        return self._read_plainly(self.memory.snapshot(), snapshot_id)

    def _read_plainly(self, content: bytes, snapshot: str | None = None) -> bytes:
        files: dict[str, Storage] = {IMAGE: MemoryStorage(content, name=IMAGE, writable=False)}
        if self.data is not None:
            files[DATA] = MemoryStorage(self.data.snapshot(), name=DATA, writable=False)
        if self.below is not None:
            files[BACKING] = self._below_as_it_is()
        disk = self.subject.open(files, writable=False, snapshot=snapshot)
        return disk.read(0, disk.size)

    def open_again(self, *, writable_below: bool = False) -> None:
        """After a close: the same file, in a new process. ``writable_below``: for a commit."""
        self._journal = None
        self._anew()
        self.disk = self._open(writable_below=writable_below)

    def kill(self, *, repair_leaks: bool = False) -> None:
        """What the process wrote stands in the page cache, and is not durable. A plan of faults has had its time."""
        self._plan.nth = None
        self._anew()
        self._opening = True
        if self._journal is not None:
            # The keeper does its work first; it holds the lock until it is done.
            self._journal = Journal(bytearray(self._journal.snapshot()), observe=self._observe)
            replay(self._watched(self.memory), self._journal, None if self.data is None else self._watched(self.data))
            self._observe("keeper.worked")
        if repair_leaks:
            repair(self._watched(self.memory), Mode.LEAKS)
        self.disk = self._open()
        self._opening = True
        self.log.note("reopened", data=self.disk.read(0, self.disk.size))
        self._opening = False

    def take_over(self, journals: Mapping[int, bytes], position: int) -> None:
        """Go on in the place of a run that was killed at ``position`` of the log, with its journals by position."""
        self.journals = {at: journal for at, journal in journals.items() if at <= position}
        if self.journals:
            self._journal = Journal(bytearray(self.journals[max(self.journals)]))

    # Operations

    def step(self, step: Step) -> None:
        """Carry one out. Where calls may fail, so may it; past the end of a disk that has become smaller it is left out."""
        if step.offset + step.length_bytes > self.disk.size:
            return
        try:
            OPERATIONS[step.verb].perform(self, step)
        except CowfenceError as error:
            if not self._may_fail:
                raise
            self.errors.append(f"{step}: {error}")
            self._observe("keeper.sees")  # a failed fence stands in the journal

    def new_data(self, step: Step) -> bytes:
        """Bytes for a write that no other write has."""
        self._serial += 1
        return tagged(step.offset, step.length_bytes, self._serial)

    @contextmanager
    def writing(self, offset: int, data: bytes, *, durable: bool = False) -> Iterator[None]:
        """``durable``: it is flushed when it returns."""
        token = self.log.note("write.begin", offset=offset, data=data)
        with self._noted(token):
            yield
        if durable:
            self.log.note("durable", of=token)

    @contextmanager
    def discarding(self, offset: int, length_bytes: int) -> Iterator[None]:
        token = self.log.note("discard.begin", offset=offset, length_bytes=length_bytes)
        with self._noted(token):
            yield

    @contextmanager
    def flushing(self) -> Iterator[None]:
        token = self.log.note("flush.begin")
        with self._noted(token):
            yield

    @contextmanager
    def cleaning(self, bitmap: str) -> Iterator[None]:
        """A bitmap is made, or made clean."""
        token = self.log.note("bitmap.begin", name=bitmap.encode())
        with self._noted(token):
            yield

    @contextmanager
    def altering(self, content: bytes | None = None) -> Iterator[Facts]:
        """An alteration of the whole image; ``content``: what the disk will be. Gives what the facts of the image are before
        and, once it is over, after. One that is refused as Invalid has changed nothing."""
        facts: dict[str, object] = {}
        known = Facts(inspect(self.memory.snapshot()).facts, {})
        token = self.log.note("alter.begin", facts=facts, content=content)
        event = "failed"
        try:
            yield known
            event = "end"
        except Invalid:
            event = "refused"
        finally:
            known.after.update(inspect(self.memory.snapshot()).facts)
            facts.update((name, value) for name, value in known.after.items() if value != known.before[name])
            self.log.note(event, of=token)

    @contextmanager
    def _noted(self, token: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.log.note("failed", of=token)
            raise
        self.log.note("end", of=token)

    def read(self, offset: int, length_bytes: int) -> None:
        """A read by the guest: what it gets is judged like a state, for others may have been inside it."""
        token = self.log.note("read.begin", offset=offset, length_bytes=length_bytes)
        data = self.disk.read(offset, length_bytes)
        self.log.note("read.end", of=token, data=data)

    # Inside a call

    def _on_call(self, kind: Kind, mark: str) -> None:
        if self._opening or not (kind is Kind.FENCE or kind is Kind.READ or mark in _OUTSIDE_THE_LOCK) or self.disk.planning:
            return
        number = self._interleaving.calls
        self._interleaving.calls += 1
        step = self._interleaving.inside.get(number)
        if step is not None:
            self._step_inside(step)

    def _step_inside(self, step: Step) -> None:
        """Carried out only if it needs no commit of its own: one thread runs both, so to wait for the outer commit would be to
        wait for ever."""
        request_of = OPERATIONS[step.verb].request
        assert request_of is not None
        if step.offset + step.length_bytes > self.disk.size:
            return
        data = self.new_data(step) if step.verb == "write" else b""
        request = request_of(step, data)
        if step.verb == "discard":
            token = self.log.note("discard.begin", offset=step.offset, length_bytes=step.length_bytes)
        elif step.verb == "read":
            token = self.log.note("read.begin", offset=step.offset, length_bytes=step.length_bytes)
        else:
            token = self.log.note("write.begin", offset=step.offset, data=data or bytes(step.length_bytes))
        outcome = self.disk.submit([request], wait=False)[0]
        if outcome is BLOCKED:
            self.log.note("withdrawn", of=token)
        elif isinstance(outcome, CowfenceError):
            self.log.note("failed", of=token)
        elif step.verb == "read":
            self.log.note("read.end", of=token, data=bytes(outcome or b""))  # type: ignore[arg-type]
        else:
            self.log.note("end", of=token)
