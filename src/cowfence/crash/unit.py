"""A unit of work: a few cases, judged somewhere, and what came of it.

Both sides are plain small values that can be pickled, so a unit can be sent to another process or another machine: cases go as
lines of text, states stay where they are made, and a violation comes back explained, in words. Nothing that the engine does
can break a unit: whatever it raises where nothing was made to fail is a violation like others, of the clause ``run``.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from cowfence.crash.cases import Case, explain, parse_case, record, walk
from cowfence.crash.explore import Model, Violation
from cowfence.crash.images import ImageSpec
from cowfence.crash.report import ReportEntry
from cowfence.crash.runner import EngineSubject, Recording
from cowfence.crash.timeline import Timeline, timeline
from cowfence.crash.witness import sector_map

LIMIT: Final = 4096
CLAUSE_RUN: Final = "run"
"""Not a clause of the crash contract: the engine raised an error although nothing was made to fail."""
_EXPLAINING_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How each case is judged. ``limit``: states of one instant above which they are sampled, from ``seed``. ``live``: each
    state is repaired and worked on, too."""

    models: tuple[Model, ...] = ("kill", "power")
    limit: int = LIMIT
    seed: int = 0
    live: bool = True

    def replay(self, model: Model, case: str) -> str:
        """The command line that judges the case in the same way again."""
        words = ["cowfence crash replay"]
        words += [f"--limit {self.limit}"] if self.limit != LIMIT else []
        words += [f"--seed {self.seed}"] if self.seed else []
        return " ".join([*words, shlex.quote(f"{model} | {case}")])


@dataclass(frozen=True, slots=True)
class Unit:
    """Cases as text, of one suite. ``until``: seconds since the epoch; cases that are not done then are left."""

    suite: str
    cases: tuple[str, ...]
    settings: Settings = Settings()
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """One case, all models together. ``per_point``: states judged at each entry of its time line."""

    case: str
    states: int
    distinct: int
    looks: int
    sampled: int
    per_point: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A violation, explained. ``point``: the entry of ``entries`` at which the crash was; None where there was none."""

    clause: str
    model: Model
    case: str
    operations: tuple[str, ...]
    edge: str
    replay: str
    what: str = ""
    lost: tuple[str, ...] = ()
    sectors: tuple[str, ...] = ()
    entries: tuple[ReportEntry, ...] = ()
    per_point: tuple[int, ...] = ()
    point: int | None = None

    def __str__(self) -> str:
        return f"{self.clause} ({self.model}): {self.edge}\n  operations: {' '.join(self.operations)}\n  replay: {self.replay}"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "clause": self.clause,
            "model": self.model,
            "operations": list(self.operations),
            "edge": self.edge,
            "replay": self.replay,
        }


@dataclass(slots=True)
class UnitResult:
    """``coverage``: by operation and option of the image, how many cases put the two together. ``left``: cases that were not
    begun when the time was over; ``cut``: those that were half judged."""

    suite: str
    cases: list[Counts] = field(default_factory=list)
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    left: int = 0
    cut: int = 0
    seconds: float = 0.0


def judge_unit(unit: Unit) -> UnitResult:
    """Judge the cases one after the other. Raises Invalid for a line that is no case."""
    began = time.perf_counter()
    result = UnitResult(unit.suite)
    deadline = None if unit.until is None else time.monotonic() + unit.until - time.time()
    for text in unit.cases:
        if deadline is not None and time.monotonic() > deadline:
            result.left += 1
            continue
        case = parse_case(text)
        result.coverage.update((verb, option) for verb in _verbs(case) for option in _options(case.image))
        _judge_case(case, unit.settings, deadline, result)
    result.seconds = time.perf_counter() - began
    return result


def _judge_case(case: Case, settings: Settings, deadline: float | None, result: UnitResult) -> None:
    try:
        recording = record(case)
    except Exception as error:
        result.found.append(_raised(case, settings.models[0], settings, error, "it could not be carried out"))
        return
    line = timeline(recording)
    states = distinct = looks = sampled = 0
    per_point = [0] * len(line.entries)
    for model in settings.models:
        try:
            verdicts = walk(
                case, recording, model, limit=settings.limit, seed=settings.seed, live=settings.live, deadline=deadline
            )
        except Exception as error:
            result.found.append(_raised(case, model, settings, error, "its states could not be judged"))
            continue
        states, distinct = states + verdicts.states, distinct + verdicts.distinct
        looks, sampled = looks + verdicts.looks, sampled + verdicts.sampled
        for point, count in enumerate(line.points(verdicts.per_point)):
            per_point[point] += count
        result.found += [_explained(case, recording, violation, settings) for violation in verdicts.violations]
        if verdicts.cut:
            result.cut += 1
            break
    result.cases.append(Counts(str(case), states, distinct, looks, sampled, tuple(per_point)))


def _raised(case: Case, model: Model, settings: Settings, error: Exception, what: str) -> Found:
    edge = f"{what}: {type(error).__name__}: {error}"
    return Found(CLAUSE_RUN, model, str(case), _operations(case), edge, settings.replay(model, str(case)), edge)


def _explained(case: Case, recording: Recording, violation: Violation, settings: Settings) -> Found:
    deadline = time.monotonic() + _EXPLAINING_SECONDS
    clause, model, what = violation.clause, violation.model, violation.verdict.what
    try:
        explained = explain(case, violation, limit=settings.limit, seed=settings.seed, deadline=deadline)
        case, recording, violation = explained.case, explained.recording, explained.violation
        edge, what = explained.edge, violation.verdict.what
        per_point = walk(case, recording, model, limit=settings.limit, seed=settings.seed, deadline=deadline).per_point
        sectors = tuple(sector_map(violation.witness, violation.witness.seen(EngineSubject(case.image)).changed))
    except Exception as error:
        # Found is found: that it cannot be said better is no reason to lose it.
        edge, per_point, sectors = f"{what} (explaining it failed: {type(error).__name__}: {error})", {}, ()
    line: Timeline = timeline(recording)
    return Found(
        clause,
        model,
        str(case),
        _operations(case),
        edge,
        settings.replay(model, str(case)),
        what,
        tuple(violation.witness.lost()),
        sectors,
        tuple(line.entries),
        tuple(line.points(per_point)),
        line.point(violation.position),
    )


def _operations(case: Case) -> tuple[str, ...]:
    """The script, and what disturbs it, in words."""
    return (*map(str, case.script), *str(case).split(" | ")[2:])


def _verbs(case: Case) -> set[str]:
    verbs = {step.verb for step in case.script} | {f"{step.verb} inside a call" for _, step in case.inside}
    if case.fault is not None:
        verbs.add("a call fails")
    if case.nested is not None:
        verbs.add("killed, then a power cut")
    return verbs


def _options(image: ImageSpec) -> list[str]:
    cluster = f"{image.cluster_bytes >> 10} KiB" if image.cluster_bytes >= 1024 else f"{image.cluster_bytes} B"
    words = [f"version {image.version}", f"{cluster} clusters", f"refcount bits {image.refcount_bits}"]
    words += [f"backing {image.backing}", "aged" if image.aged else "fresh"]
    words += [f"{image.snapshots} snapshot{'' if image.snapshots == 1 else 's'}", f"cache of {image.cache}"]
    words += [name for name in ("short_l1", "full", "cold", "keeper") if getattr(image, name)]
    return words if image.discards else [*words, "no discards"]
