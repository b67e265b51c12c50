"""Walk the log of a run through a device model, and judge every state that a crash could leave.

Each distinct state is judged once for each change of what the guest may find. A violation keeps what is needed to make it
smaller and to say it in a sentence (see ``witness``).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from cowfence.crash.device import CrashState, Device
from cowfence.crash.judge import Judge, Seen, Subject
from cowfence.crash.kill import KillModel
from cowfence.crash.model import GuestModel
from cowfence.crash.oracles import ALL, Oracle, Verdict
from cowfence.crash.power import PowerModel
from cowfence.crash.runner import Recording
from cowfence.crash.structure import inspect
from cowfence.crash.witness import Witness
from cowfence.storage.oplog import Done, Note
from cowfence.units import SECTOR_BYTES

Model: TypeAlias = Literal["kill", "power", "power4096"]
MODELS: Final[tuple[Model, ...]] = ("kill", "power", "power4096")
_STATES_PER_GLANCE: Final = 64
"""At the clock, inside one instant: it can have thousands of states."""


@dataclass(slots=True)
class Violation:
    """A state that breaks the contract. ``after``: the mark of the last operation of the log before the crash; ``position``: of
    the log's last entry; ``number``: how many states of this walk came before it."""

    verdict: Verdict
    model: Model
    position: int
    number: int
    after: str
    witness: Witness = field(repr=False)

    @property
    def clause(self) -> str:
        return self.verdict.clause

    def __str__(self) -> str:
        lost = ", ".join(self.witness.lost()) or "nothing"
        return f"{self.clause}: {self.verdict.what} (crash after {self.after!r}, entry {self.position}; not arrived: {lost})"


@dataclass(slots=True)
class Verdicts:
    """What a walk found. ``states``: enumerated; ``distinct``: different contents, each with its verdict; ``looks``: verdicts
    that needed a look of their own (the others read the very same bytes); ``sampled``: instants at which the states were too
    many to enumerate all."""

    states: int = 0
    distinct: int = 0
    looks: int = 0
    instants: int = 0
    sampled: int = 0
    cut: bool = False
    """The deadline came before the end of the log."""
    seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)
    per_point: dict[int, int] = field(default_factory=dict)
    """States judged by position in the log."""

    @property
    def exhaustive(self) -> bool:
        return not self.sampled and not self.cut


def device_of(model: Model, recording: Recording, *, limit: int, seed: int) -> Device:
    """The device model by its name."""
    if model == "kill":
        return KillModel(recording.initial, limit=limit, seed=seed)
    return PowerModel(recording.initial, limit=limit, seed=seed, unit_bytes=4096 if model == "power4096" else 512)


class Walk:
    """One walk of one recording. ``start``: states before this position were judged elsewhere."""

    def __init__(
        self,
        recording: Recording,
        model: Model,
        subject: Subject,
        *,
        oracles: Sequence[Oracle] = ALL,
        live: bool = True,
        limit: int = 4096,
        seed: int = 0,
        stop_at: int = 1,
        start: int = 0,
        deadline: float | None = None,
        device: Device | None = None,
    ) -> None:
        self._recording = recording
        self._model: Model = model
        self._subject = subject
        self._oracles = oracles
        self._stop_at = stop_at
        self._start = start
        self._deadline = deadline
        self._device = device if device is not None else device_of(model, recording, limit=limit, seed=seed)
        structure = inspect(recording.initial[subject.image])
        self.guest = GuestModel(
            recording.guest,
            facts={name: (value,) for name, value in structure.facts.items()},
            cluster_bytes=1 << int.from_bytes(recording.initial[subject.image][20:24], "big"),
            leaks_before=structure.leaks,
            bitmaps={bitmap.name: [(recording.guest, {})] for bitmap in structure.bitmaps if bitmap.true},
        )
        self._judge = Judge(subject, recording.guest, unit_bytes=self._device.unit_bytes, live=live)
        self._tokens: dict[int, int] = {}
        self._alterations: dict[int, tuple[int, Mapping[str, object]]] = {}
        """Those under way: the model's token, and the facts that each will change."""
        self._known: set[tuple[object, int]] = set()
        self._distinct: set[object] = set()
        self._reads: dict[int, dict[int, set[bytes]]] = {}
        """Reads under way: what each sector may read as when they began."""
        self._altered: dict[int, bytes] = {}
        """Bitmaps that an operation is making clean, by where it began."""
        self._position = 0
        """Of the entry that is walked."""
        self.result = Verdicts()

    def run(self) -> Verdicts:
        """Walk to the end, to ``stop_at`` violations, or to the deadline."""
        began = time.perf_counter()
        entries, result = self._recording.entries, self.result
        after = "the start"
        for position, entry in enumerate(entries):
            self._position = position
            states: Iterator[CrashState]
            if isinstance(entry, Note):
                states = self._note(position, entry)
            elif isinstance(entry, Done):
                operation = entries[entry.position]
                assert not isinstance(operation, Note | Done)
                states = self._device.done(position, entry.position, operation, failed=entry.failed)
            else:
                after = entry.mark
                states = self._device.issue(position, entry)
            if position < self._start:
                self._pass(states)
                continue
            count = 0
            for state in states:
                count += 1
                verdict = self._verdict(state)
                if verdict is not None:
                    result.violations.append(self._violation(state, verdict, position, after))
                    if len(result.violations) >= self._stop_at:
                        break
                if not count % _STATES_PER_GLANCE and self._is_over():
                    break
            if count:
                result.instants += 1
                result.per_point[position] = count
            if len(result.violations) >= self._stop_at or result.cut or self._is_over():
                break
        return self._finish(began)

    def _is_over(self) -> bool:
        """Whether the deadline has come."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.result.cut = True
        return self.result.cut

    def _finish(self, began: float) -> Verdicts:
        result = self.result
        result.sampled, result.looks = self._device.sampled, self._judge.looks
        result.seconds = time.perf_counter() - began
        return result

    @staticmethod
    def _pass(states: Iterator[CrashState]) -> None:
        """Let the model go on without its states: the first step of its generator is what changes it."""
        next(states, None)

    def _verdict(self, state: CrashState) -> Verdict | None:
        result = self.result
        result.states += 1
        version = self.guest.changes
        if (state.key, version) in self._known:
            return None
        self._known.add((state.key, version))
        if state.key not in self._distinct:
            self._distinct.add(state.key)
            result.distinct += 1
        return judge_with(self._oracles, self._judge.look(state), self.guest)

    def _violation(self, state: CrashState, verdict: Verdict, position: int, after: str) -> Violation:
        witness = Witness.of(state, copy.deepcopy(self.guest), self._device.unit_bytes)
        return Violation(verdict, self._model, position, self.result.states, after, witness)

    def _note(self, position: int, note: Note) -> Iterator[CrashState]:
        """Tell the guest's model; where less is allowed from now on, all states of the instant are judged again."""
        guest, fields, tokens = self.guest, note.fields, self._tokens
        of = fields.get("of")
        token = None
        if isinstance(of, int):
            token = tokens.get(of) if note.event == "end" else tokens.pop(of, None)
        event = note.event
        if event == "alter.begin":
            facts, content = fields["facts"], fields["content"]
            assert isinstance(facts, dict)
            assert content is None or isinstance(content, bytes)
            self._alterations[position] = guest.begin_alteration(facts, content), facts
        elif event in ("end", "refused") and of in self._alterations:
            guest.end_alteration(*self._alterations.pop(_number(of)), done=event == "end")
            return self._device.settle()
        elif event == "write.begin":
            data = fields["data"]
            assert isinstance(data, bytes)
            tokens[position] = guest.begin_write(_number(fields["offset"]), data)
        elif event == "discard.begin":
            tokens[position] = guest.begin_discard(_number(fields["offset"]), _number(fields["length_bytes"]))
        elif event == "flush.begin":
            tokens[position] = -1 - guest.begin_flush()
        elif event == "end" and token is not None:
            if token < 0:
                guest.end_flush(-1 - token)
                return self._device.settle()
            guest.end(token)
        elif event == "durable" and token is not None:
            guest.end_durable(token)
            return self._device.settle()
        elif event == "withdrawn" and token is not None and token >= 0:
            guest.withdraw(token)
        elif event == "bitmap.begin":
            name = fields["name"]
            assert isinstance(name, bytes)
            self._altered[position] = name
            guest.begin_bitmap(name)
        elif event == "end" and isinstance(of, int) and of in self._altered:
            guest.end_bitmap(self._altered.pop(of))
        elif event.startswith("backup."):
            self._note_backup(event, fields)
        elif event == "reopened":
            data = fields["data"]
            assert isinstance(data, bytes)
            guest.reopen(data)
        elif event == "read.begin":
            first = _number(fields["offset"]) // SECTOR_BYTES
            sectors = range(first, first + _number(fields["length_bytes"]) // SECTOR_BYTES)
            self._reads[position] = {sector: guest.readable(sector) for sector in sectors}
        elif event == "read.end":
            self._judge_read(position, _number(of), fields["data"])
        return iter(())

    def _note_backup(self, event: str, fields: Mapping[str, object]) -> None:
        guest, bitmap = self.guest, fields["bitmap"]
        assert isinstance(bitmap, bytes)
        if event == "backup.begin":
            next_bitmap = fields["next_bitmap"]
            assert isinstance(next_bitmap, bytes)
            guest.begin_backup(bitmap, next_bitmap)
        elif event == "backup.good":
            guest.end_backup(bitmap)
        else:
            guest.forget_backup(bitmap)

    def _judge_read(self, position: int, begin: int, data: object) -> None:
        """C17, C3: what a living guest read is one of its values, too."""
        assert isinstance(data, bytes)
        for at, (sector, before) in enumerate(self._reads.pop(begin).items()):
            value = data[at * SECTOR_BYTES : (at + 1) * SECTOR_BYTES]
            # Others may have come and gone since it began: it may have been before them or after.
            if value not in before | self.guest.readable(sector):
                verdict = Verdict("C17", f"a read of guest sector {sector} got what is none of its values", sector)
                for state in self._device.settle():
                    self.result.violations.append(self._violation(state, verdict, position, "read"))
                    return


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def judge_with(oracles: Sequence[Oracle], seen: Seen, guest: GuestModel) -> Verdict | None:
    """The first clause that is broken; None where all are kept."""
    for oracle in oracles:
        verdict = oracle.judge(seen, guest)
        if verdict is not None:
            return verdict
    return None
