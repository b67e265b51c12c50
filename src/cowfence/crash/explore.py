"""Run a guest's script over a recorded image, then judge every state that a crash could leave.

``Script`` is a list of guest operations. ``record`` carries it out on an engine and gives the log, in which the guest's
acknowledgements stand between the operations of the file. ``explore`` walks the log through a device model and judges each
distinct state once: it opens, its structure is sound, and each sector of the guest's disk holds what it may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from cowfence.crash.device import CrashState, KillModel, PowerModel
from cowfence.crash.model import GuestModel
from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import BLOCKED, Disk, Request, Verb
from cowfence.errors import CowfenceError
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Done, Entry, Note, OpLog
from cowfence.storage.record import RecordingStorage
from cowfence.units import SECTOR_BYTES


class Step(NamedTuple):
    """One operation of a guest. Offsets and lengths in bytes, multiples of 512.

    ``kill``: the process is killed and the image opened again; what it wrote stands in the page cache only.
    """

    verb: Literal["write", "zero", "keep_zero", "discard", "flush", "kill"]
    offset: int = 0
    length_bytes: int = 0


Opener: TypeAlias = Callable[[RecordingStorage | MemoryStorage, bool], Disk]
"""(image file, writable) -> disk. Injected, so that the explorer knows no format but by its judge of structure."""


def tagged(offset: int, length_bytes: int, serial: int) -> bytes:
    """Data whose every sector names its place and its write, so that foreign bytes show."""
    sectors = []
    for sector in range(offset // SECTOR_BYTES, (offset + length_bytes) // SECTOR_BYTES):
        sectors.append(f"sector {sector} write {serial} ".encode().ljust(SECTOR_BYTES, b"."))
    return b"".join(sectors)


@dataclass(slots=True)
class Recording:
    """A run: the file before, the guest's bytes before, and the log."""

    initial: bytes
    guest: bytes
    entries: Sequence[Entry]


@dataclass(slots=True)
class Violation:
    """A state that breaks the contract. ``after``: the last operation of the log before the crash."""

    clause: str
    what: str
    position: int
    after: str
    lost: tuple[str, ...]
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        missing = ", ".join(self.lost) if self.lost else "nothing"
        return f"{self.clause}: {self.what} (crash after {self.after!r}, entry {self.position}; not arrived: {missing})"


class Runner:
    """Carries a script out and notes the guest's side. ``during`` may run steps inside a fence (the interleaved model)."""

    def __init__(self, content: bytes, opener: Opener) -> None:
        self.log = OpLog()
        self._opener = opener
        self.memory = MemoryStorage(content, name="image")
        self.storage = RecordingStorage(self.memory, self.log, "image")
        self.disk = opener(self.storage, True)
        self._serial = 0

    def step_inside(self, step: Step) -> None:
        """A step inside a call of another (the interleaved model): carried out only if it needs no commit of its own.

        One thread runs both, so a step that had to wait for the outer commit would wait for ever.
        """
        self._serial += 1
        verb, offset, length_bytes = step
        if verb == "discard":
            self.log.note("discard.begin", offset=offset, length_bytes=length_bytes)
            request = Request(Verb.DISCARD, offset, length_bytes)
        else:
            data = tagged(offset, length_bytes, self._serial) if verb == "write" else bytes(length_bytes)
            self.log.note("write.begin", offset=offset, data=data)
            verbs = {"write": Verb.WRITE, "zero": Verb.ZERO, "keep_zero": Verb.ZERO}
            request = Request(verbs[verb], offset, length_bytes, data, unmap=verb == "zero")
        outcome = self.disk.submit([request], wait=False)[0]
        self.log.note("withdrawn" if outcome is BLOCKED else "end")

    def step(self, step: Step) -> None:
        verb, offset, length_bytes = step
        if verb == "flush":
            self.log.note("flush.begin")
            self.disk.flush()
            self.log.note("flush.end")
        elif verb == "kill":
            self.memory = MemoryStorage(self.memory.snapshot(), name="image")
            self.storage = RecordingStorage(self.memory, self.log, "image")
            self.disk = self._opener(self.storage, True)
            self.log.note("reopened", data=self.disk.read(0, self.disk.size))
        elif verb == "discard":
            self.log.note("discard.begin", offset=offset, length_bytes=length_bytes)
            self.disk.discard(offset, length_bytes)
            self.log.note("end")
        else:
            self._serial += 1
            data = tagged(offset, length_bytes, self._serial) if verb == "write" else bytes(length_bytes)
            self.log.note("write.begin", offset=offset, data=data)
            if verb == "write":
                self.disk.write(offset, data)
            else:
                self.disk.zero(offset, length_bytes, unmap=verb == "zero")
            self.log.note("end")


def record(content: bytes, script: Sequence[Step], opener: Opener, guest: bytes) -> Recording:
    """Carry ``script`` out on the image in ``content``, whose guest bytes are ``guest``."""
    runner = Runner(content, opener)
    for step in script:
        runner.step(step)
    return Recording(content, guest, runner.log.entries())


@dataclass(slots=True)
class Verdicts:
    """What exploring gave. ``states``: judged; ``distinct``: of them with contents not seen before."""

    states: int = 0
    distinct: int = 0
    sampled: int = 0
    violations: list[Violation] = field(default_factory=list)


class Judge:
    """Judges contents, each distinct one once."""

    def __init__(self, opener: Opener, *, contents: bool = True) -> None:
        self._opener = opener
        self._contents = contents
        self._seen: dict[bytes, tuple[list[str], bytes | str]] = {}
        self._judged: set[tuple[bytes, int]] = set()

    def judge(self, state: CrashState, model: GuestModel, verdicts: Verdicts) -> tuple[str, str] | None:
        """The first clause that the state breaks, and how; None where it keeps them all."""
        key = (state.content, model.changes)
        verdicts.states += 1
        if key in self._judged:
            return None
        self._judged.add(key)
        seen = self._seen.get(state.content)
        if seen is None:
            verdicts.distinct += 1
            seen = self._seen[state.content] = self._look(state.content, model.size)
        findings, guest = seen
        if isinstance(guest, str):
            return "C1", guest
        if self._contents:
            wrong = model.wrong_sectors(guest)
            if wrong:
                got = guest[wrong[0] * SECTOR_BYTES :][:32].split(b".")[0]
                return "C3", f"guest sector {wrong[0]} holds {got!r}"
        if findings:
            return "C5", findings[0]
        return None

    def _look(self, content: bytes, size: int) -> tuple[list[str], bytes | str]:
        try:
            findings = fatal_findings(content)
            disk = self._opener(MemoryStorage(content, name="state", writable=False), False)
            return findings, disk.read(0, size)
        except CowfenceError as error:
            return [], str(error)


def explore(
    recording: Recording,
    model: Literal["kill", "power"],
    opener: Opener,
    *,
    contents: bool = True,
    stop_at: int = 1,
    limit: int = 4096,
) -> Verdicts:
    """Judge every state of a recording under a device model; stops after ``stop_at`` violations."""
    device: KillModel | PowerModel
    device = KillModel(recording.initial) if model == "kill" else PowerModel(recording.initial, limit=limit)
    guest = GuestModel(len(recording.guest), bytearray(len(recording.guest)))
    guest.start(recording.guest)
    judge = Judge(opener, contents=contents)
    verdicts = Verdicts()
    tokens: list[tuple[str, int]] = []
    after = "the start"
    for position, entry in enumerate(recording.entries):
        states: Iterator[CrashState]
        if isinstance(entry, Note):
            states = _note(entry, guest, tokens, device)
        elif isinstance(entry, Done):
            operation = recording.entries[entry.position]
            assert not isinstance(operation, Note | Done)
            states = iter(()) if entry.failed else device.done(operation, entry.position)
        else:
            after = entry.mark
            states = device.issue(position, entry)
        for state in states:
            broken = judge.judge(state, guest, verdicts)
            if broken is not None:
                verdicts.violations.append(Violation(*broken, position, after, state.lost, state.content))
                if len(verdicts.violations) >= stop_at:
                    verdicts.sampled = device.sampled
                    return verdicts
    verdicts.sampled = device.sampled
    return verdicts


def _note(
    entry: Note, guest: GuestModel, tokens: list[tuple[str, int]], device: KillModel | PowerModel
) -> Iterator[CrashState]:
    fields = entry.fields
    if entry.event == "write.begin":
        data = fields["data"]
        assert isinstance(data, bytes)
        tokens.append(("write", guest.begin_write(int(str(fields["offset"])), data)))
    elif entry.event == "discard.begin":
        tokens.append(("write", guest.begin_discard(int(str(fields["offset"])), int(str(fields["length_bytes"])))))
    elif entry.event == "end":
        guest.end(tokens.pop()[1])
    elif entry.event == "withdrawn":
        guest.withdraw(tokens.pop()[1])
    elif entry.event == "reopened":
        data = fields["data"]
        assert isinstance(data, bytes)
        guest.reopen(data)
    elif entry.event == "flush.begin":
        tokens.append(("flush", guest.begin_flush()))
    elif entry.event == "flush.lost":
        tokens.pop()
    elif entry.event == "flush.end":
        guest.end_flush(tokens.pop()[1])
        return device.settle()
    return iter(())
