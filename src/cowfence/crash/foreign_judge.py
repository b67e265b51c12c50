"""The oracle for foreign engines: which views of a crash state the program's own promises, and our clauses, allow.

Between commands of a whole-image tool the guest's model speaks: each sector is its flushed value or one written to that very
sector since (C2, C3), snapshots read the same (C6), the size stays. What was acknowledged and not flushed may be lost,
wholly, in the kill model too: a program that keeps its tables in memory promises no more. While a tool runs the view is the
one before or the one after it (C7, C8); after it returned, the one after. Leaks are fine, and so is COPIED on a cluster with
one reference and a count that is too high (C5).

``breaks_promise`` separates two kinds of violation. True: bytes that were durable read as something else, or cannot be read. No
program means that to happen. False: our contract asks for more than the program ever said, such as an atomic resize.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from cowfence.crash.device import CrashState
from cowfence.crash.foreign_explain import explain, value_words
from cowfence.crash.foreign_run import ForeignRun, replay
from cowfence.crash.foreign_states import Crash, Grain, Model, Walk
from cowfence.crash.foreign_view import View, look
from cowfence.crash.model import GuestModel
from cowfence.errors import Invalid
from cowfence.storage.oplog import Note
from cowfence.units import SECTOR_BYTES

Reopen = Callable[[Mapping[str, bytes]], Mapping[str, bytes]]

_KNOWN_BY = ("write.begin", "discard.begin", "tool.begin")
_SHOWN = 3
"""Of what did not arrive, so much is named."""


@dataclass(slots=True)
class ForeignViolation:
    """One way in which states break a clause, with the first such state. ``states``: how many broke it so.

    ``sector``: the first guest sector concerned, where one is, and ``allowed`` what it might hold. ``edge``: the sentence that
    names the missing order.
    ``confirmed``: what QEMU says about the state, where it was asked.
    """

    clause: str
    model: Model
    what: str
    position: int
    after: str
    missing: tuple[str, ...]
    breaks_promise: bool
    edge: str
    sector: int | None
    allowed: frozenset[bytes]
    files: Mapping[str, bytes] = field(repr=False)
    states: int = 1
    confirmed: str = ""

    def __str__(self) -> str:
        shown = [*self.missing[:_SHOWN], *([f"{len(self.missing) - _SHOWN} more"] if len(self.missing) > _SHOWN else [])]
        missing = f"; not arrived: {', '.join(shown)}" if shown else ""
        return f"{self.clause}, {self.model} model: {self.edge} (crash after entry {self.position}, {self.after}{missing})"


@dataclass(slots=True)
class ForeignVerdicts:
    """``states``: judged; ``distinct``: contents among them; ``exhaustive``: no state of the model was left out.

    ``disputed``: what would be violations, but the program's own tools read what is allowed there.
    """

    states: int = 0
    distinct: int = 0
    exhaustive: bool = True
    violations: list[ForeignViolation] = field(default_factory=list)
    disputed: list[ForeignViolation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Broken:
    clause: str
    what: str
    breaks_promise: bool
    sector: int | None = None
    allowed: frozenset[bytes] = frozenset()


class _Guest(GuestModel):
    """The guest's model, which also knows what was discarded."""

    def __init__(self, initial: bytes) -> None:
        super().__init__(initial)
        self.given_up: set[int] = set()
        """Sectors discarded and not durably written since: whatever they read, nothing of worth is lost."""

    def begin_discard(self, offset: int, length_bytes: int) -> int:
        self.given_up.update(range(offset // SECTOR_BYTES, -(-(offset + length_bytes) // SECTOR_BYTES)))
        return super().begin_discard(offset, length_bytes)

    def end_flush(self, token: int) -> None:
        super().end_flush(token)
        self.given_up = {sector for sector in self.given_up if not self.is_flushed(sector) or len(self.flushed(sector)) > 1}


class _Expectation:
    """What a state may show at a point of the log."""

    def __init__(self, run: ForeignRun) -> None:
        self._run = run
        self._blind = not any(isinstance(entry, Note) and entry.event in _KNOWN_BY for entry in run.entries)
        """Nobody noted what the guest did: only structure can be judged, and if everything can be read."""
        self._tools = self._tool_views()
        self.view = look(run.initial, run.image)
        if self.view.error is not None:
            raise Invalid(f"the image cannot be judged, it does not open before the run: {self.view.error}")
        """The view that is durable and complete, as far as whole-image tools go."""
        self.other: View | None = None
        """While a tool runs: the view after it."""
        self.changes = 0
        self._atomic_clause = "C8"
        """The clause by which the tool that runs is atomic."""
        self._flushes: dict[int, int] = {}
        self._writes: dict[int, int] = {}
        self.model = _Guest(run.guest)

    def _tool_views(self) -> dict[int, tuple[View, View]]:
        """For each tool of the log, by the position of its first note, the views before and after it."""
        found: dict[int, tuple[View, View]] = {}
        begun = 0
        for position, entry in enumerate(self._run.entries):
            if isinstance(entry, Note) and entry.event == "tool.begin":
                begun = position
            elif isinstance(entry, Note) and entry.event == "tool.end":
                files = replay(self._run, begun), replay(self._run, position)
                found[begun] = look(files[0], self._run.image), look(files[1], self._run.image)
        return found

    def note(self, position: int, note: Note) -> None:
        self.changes += 1
        fields = note.fields
        token = int(str(fields.get("token", position)))
        if note.event == "write.begin":
            data = fields["data"]
            assert isinstance(data, bytes)
            if int(str(fields["offset"])) + len(data) > self.model.size:
                return  # Refused as a whole by every program; it has no end.
            self._writes[position] = self.model.begin_write(int(str(fields["offset"])), data)
        elif note.event == "discard.begin":
            where = int(str(fields["offset"])), int(str(fields["length_bytes"]))
            if sum(where) <= self.model.size:
                self._writes[position] = self.model.begin_discard(*where)
        elif note.event == "end":
            if token in self._writes:
                self.model.end(self._writes.pop(token))
        elif note.event == "flush.begin":
            self._flushes[position] = self.model.begin_flush()
        elif note.event == "flush.end":
            self.model.end_flush(self._flushes.pop(token))
        elif note.event == "reopened":
            content = fields["data"]
            assert isinstance(content, bytes)
            self.model.reopen(content)
        elif note.event == "tool.begin":
            self._atomic_clause = "C7" if " snapshot " in str(fields["command"]) else "C8"
            self.view, self.other = self._tools.get(position, (self.view, None))
            self.model = _Guest(self.view.guest)
        elif note.event == "tool.end" and self.other is not None:
            self.view, self.other = self.other, None
            self.model = _Guest(self.view.guest)

    def broken(self, view: View) -> _Broken | None:
        """The first clause that ``view`` breaks, the worst first; None where it keeps them all."""
        if view.error is not None:
            return _Broken("C1", view.error, breaks_promise=True)
        if self._blind:
            return self._unreadable(view) or self._structure(view)
        return self._sectors(view) or self._snapshots(view) or self._whole(view) or self._structure(view)

    def _unreadable(self, view: View) -> _Broken | None:
        new = sorted((view.unreadable or {}).keys() - (self.view.unreadable or {}).keys())
        if not new:
            return None
        return _Broken("C3", f"guest sector {new[0]} cannot be read ({(view.unreadable or {})[new[0]]})", True, new[0])

    def _sectors(self, view: View) -> _Broken | None:
        if self.other is None:
            guest = view.guest[: self.model.size].ljust(self.model.size, b"\0")
            wrong = [sector for sector, _ in self.model.wrong_sectors(self.model.changed_sectors(guest))]
        else:
            wrong = [sector for sector in _sectors(view.guest) if not self._in_either(view.guest, sector)]
        wrong = sorted({*wrong, *(view.unreadable or ())})
        if not wrong:
            return None
        kept = [sector for sector in wrong if sector not in self.model.given_up or self.other is not None]
        sector = (kept or wrong)[0]
        why = (view.unreadable or {}).get(sector)
        reads = f"an error ({why})" if why else value_words(_at(view.guest, sector), sector)
        flushed = self._flushed(sector)
        clause = "C3" if self.other is not None or not self.model.is_flushed(sector) else "C2"
        what = f"guest sector {sector} was flushed as {value_words(flushed, sector)}, now reads {reads}"
        if not kept:
            what = what.replace(" was flushed as ", " was discarded and had been ")
        if len(wrong) > 1:
            what += f"; {len(wrong)} sectors are wrong"
        # What was given up may be lost; that reading it fails, for the guest and for every copy of the disk, nobody asked for.
        return _Broken(clause, what, bool(kept) or bool(why), sector, self._allowed(sector))

    def _flushed(self, sector: int) -> bytes:
        return _at(self.view.guest, sector) if self.other is not None else self.model.flushed(sector)[0]

    def _allowed(self, sector: int) -> frozenset[bytes]:
        if self.other is None:
            return frozenset(self.model.allowed(sector))
        return frozenset(_at(side.guest, sector).ljust(SECTOR_BYTES, b"\0") for side in (self.view, self.other))

    def _in_either(self, guest: bytes, sector: int) -> bool:
        assert self.other is not None
        value = _at(guest, sector)
        return any(value == _at(side.guest, sector).ljust(len(value), b"\0") for side in (self.view, self.other))

    def _snapshots(self, view: View) -> _Broken | None:
        before, now = dict(self.view.snapshots or {}), dict(view.snapshots or {})
        after = before if self.other is None else dict(self.other.snapshots or {})
        for key in before.keys() & after.keys():
            if before[key] == after[key] and now.get(key) != before[key]:
                return _Broken("C6", f"snapshot {key[1]!r} reads differently or is gone: {now.get(key)}", breaks_promise=True)
        if now not in (before, after):
            names = ", ".join(name for _, name in now) or "none"
            return _Broken("C7", f"the list of snapshots ({names}) is neither before nor after", breaks_promise=False)
        return None

    def _whole(self, view: View) -> _Broken | None:
        sides = [self.view] if self.other is None else [self.view, self.other]
        if view.size_bytes not in {side.size_bytes for side in sides}:
            return _Broken("C8", f"the size is {view.size_bytes}, neither before nor after", breaks_promise=False)
        if view.backing not in {side.backing for side in sides}:
            return _Broken("C9", f"the backing file is {view.backing!a}, neither before nor after", breaks_promise=False)
        if self.other is not None and (view.size_bytes, view.guest) not in {(side.size_bytes, side.guest) for side in sides}:
            return _Broken(self._atomic_clause, "the disk is a mix of before and after", breaks_promise=False)
        return None

    def _structure(self, view: View) -> _Broken | None:
        known = set(self.view.findings) | set(self.other.findings if self.other else ())
        new = [finding for finding in view.findings if finding not in known]
        if new:
            return _Broken("C5", new[0], breaks_promise=False)
        return None


def _sectors(guest: bytes) -> range:
    return range(-(-len(guest) // SECTOR_BYTES))


def _at(guest: bytes, sector: int) -> bytes:
    return guest[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]


def judge_run(
    run: ForeignRun,
    model: Model,
    *,
    budget_seconds: float | None = None,
    limit: int = 4096,
    seed: int = 0,
    stop_at: int = 20,
    reopen: Reopen | None = None,
) -> ForeignVerdicts:
    """Judge every state of a run under a device model. Stops after ``stop_at`` different violations, or at the budget.

    ``reopen``: lets the program itself open the files of a state for writing, and repair them as it does then; asked where we
    cannot open a state, so that nobody is accused of what only we cannot read.
    """
    verdicts = ForeignVerdicts()
    found: dict[tuple[str, str], ForeignViolation] = {}
    look_once = _Looker(run, reopen, verdicts)
    deadline = math.inf if budget_seconds is None else time.monotonic() + budget_seconds
    grains: tuple[Grain, ...] = ("operations", "sectors") if model == "power" else ("sectors",)
    for grain in grains:
        walk = Walk(run, model, grain=grain, limit=limit, seed=seed)
        for crash, broken in _judged(walk, _Expectation(run), look_once, deadline):
            files, missing = crash.state.contents(), crash.state.lost()
            why = explain(run, files[run.image], crash.position, broken.sector) if broken.sector is not None else ""
            key = broken.clause, _without_digits(why or broken.what)
            known = found.get(key)
            if known is None and len(found) >= stop_at:
                verdicts.exhaustive = False
                break
            if known is None or len(missing) < len(known.missing):
                found[key] = _violation(run, model, crash.position, missing, files, broken, why)
            found[key].states = 1 + (known.states if known else 0)
    verdicts.exhaustive &= not walk.sampled
    verdicts.violations = list(found.values())
    return verdicts


class _Looker:
    """Looks at each distinct state once. One that we cannot open is given to ``reopen`` first, and judged as that leaves it."""

    def __init__(self, run: ForeignRun, reopen: Reopen | None, verdicts: ForeignVerdicts) -> None:
        self._run = run
        self._reopen = reopen
        self._views: dict[object, View] = {}
        self.verdicts = verdicts

    def __call__(self, state: CrashState) -> View:
        view = self._views.get(state.key)
        if view is None:
            self.verdicts.distinct += 1
            files = state.contents()
            view = look(files, self._run.image)
            if view.error is not None and self._reopen is not None:
                view = look(self._reopen(files), self._run.image)
            self._views[state.key] = view
        return view


def _judged(walk: Walk, expectation: _Expectation, look_once: _Looker, deadline: float) -> Iterator[tuple[Crash, _Broken]]:
    judged: set[tuple[object, int]] = set()
    verdicts = look_once.verdicts
    for item in walk:
        if not isinstance(item, Crash):
            expectation.note(item.position, item.note)
            continue
        if time.monotonic() > deadline:
            verdicts.exhaustive = False
            return
        verdicts.states += 1
        known = item.state.key, expectation.changes
        if known not in judged:
            judged.add(known)
            broken = expectation.broken(look_once(item.state))
            if broken is not None:
                yield item, broken


def _violation(
    run: ForeignRun,
    model: Model,
    position: int,
    missing: tuple[str, ...],
    files: Mapping[str, bytes],
    broken: _Broken,
    why: str,
) -> ForeignViolation:
    return ForeignViolation(
        clause=broken.clause,
        model=model,
        what=broken.what,
        position=position,
        after=_mark(run, position),
        missing=missing,
        breaks_promise=broken.breaks_promise,
        edge=f"{broken.what}; {why}" if why else broken.what,
        sector=broken.sector,
        allowed=broken.allowed,
        files=files,
    )


def _without_digits(text: str) -> str:
    """Violations of one kind differ in numbers only: one sentence is told for all of them."""
    return "".join(char for char in text if not char.isdigit())[:400]


def _mark(run: ForeignRun, position: int) -> str:
    for entry in reversed(run.entries[: position + 1]):
        mark = getattr(entry, "mark", None)
        if mark is not None:
            return str(mark)
    return "the start"
