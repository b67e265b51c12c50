"""Many cases, explored on many cores, within a budget of seconds.

Work goes out in small independent units: a few cases as lines of text, and how to judge them. A unit comes back as plain
numbers and texts. So any executor with ``submit`` can do it: the processes of this machine by default, a cluster's as well.
With one job everything is done in this process.

Distinct states are counted case by case: the same content reached by two cases counts twice, for it is judged against two
guests.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Final

from cowfence.crash.cases import Case, Explained, explain, parse_case, record, walk
from cowfence.crash.explore import MODELS, Model
from cowfence.crash.images import ImageSpec
from cowfence.crash.workloads import SUITES, walks
from cowfence.errors import CowfenceError, Invalid

_STEPS_OF_A_UNIT: Final = 24
_UNITS_IN_FLIGHT: Final = 2


@dataclass(frozen=True, slots=True)
class Judging:
    """How cases are judged. ``limit``: the product of choices up to which an instant is exhaustive."""

    models: tuple[Model, ...] = ("kill", "power")
    limit: int = 4096
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """A violation, as text. ``replay``: what ``cowfence crash replay`` takes."""

    clause: str
    model: str
    operations: tuple[str, ...]
    edge: str
    replay: str

    def to_dict(self) -> dict[str, object]:
        return {
            "clause": self.clause,
            "model": self.model,
            "operations": list(self.operations),
            "edge": self.edge,
            "replay": self.replay,
        }


@dataclass(slots=True)
class Totals:
    """What a campaign, or a unit of it, found."""

    cases: int = 0
    states: int = 0
    distinct: int = 0
    looks: int = 0
    instants: int = 0
    sampled: int = 0
    seconds: float = 0.0
    """Of work, all processes together."""
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Cases by (operation, option of the image)."""
    violations: list[Found] = field(default_factory=list)

    @property
    def exhaustive(self) -> bool:
        return not self.sampled

    def add(self, other: Totals) -> None:
        for name in ("cases", "states", "distinct", "looks", "instants", "sampled", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.coverage.update(other.coverage)
        self.violations += other.violations


def cases_of(suite: str, images: Sequence[ImageSpec], seed: int) -> Iterator[Case]:
    """The cases of a suite by name, of ``walks``, or of ``all``: every suite, shorter ones first, then walks without end."""
    if suite == "walks":
        yield from walks(seed)
    elif suite == "all":
        for name in ("one", "nested", "interleaved", "faulted", "two", "three"):
            yield from SUITES[name](images)
        yield from walks(seed)
    else:
        yield from SUITES[suite](images)


def judge_case(case: Case, judging: Judging) -> Totals:
    """One case under each model."""
    totals = Totals(cases=1)
    options = str(case.image).split(",")
    totals.coverage.update({(step.verb, option) for step in case.script for option in options})
    began = time.perf_counter()
    try:
        recording = record(case)
        for model in judging.models:
            verdicts = walk(case, recording, model, limit=judging.limit, seed=judging.seed)
            totals.states += verdicts.states
            totals.distinct += verdicts.distinct
            totals.looks += verdicts.looks
            totals.instants += verdicts.instants
            totals.sampled += verdicts.sampled
            if verdicts.violations:
                totals.violations.append(_found(explain(case, verdicts.violations[0], limit=judging.limit, seed=judging.seed)))
    except (CowfenceError, AssertionError) as error:
        # Nothing was made to fail, or the engine should have gone on: what it raises is a finding.
        steps = tuple(map(str, case.script))
        totals.violations.append(Found("run", "-", steps, f"{type(error).__name__}: {error}", f"{judging.models[0]} | {case}"))
    totals.seconds = time.perf_counter() - began
    return totals


def _found(explained: Explained) -> Found:
    violation = explained.violation
    steps = tuple(map(str, explained.case.script))
    return Found(violation.clause, violation.model, steps, explained.edge, explained.replay)


def judge_unit(lines: tuple[str, ...], judging: Judging) -> Totals:
    """A unit of work: cases as lines."""
    totals = Totals()
    for line in lines:
        totals.add(judge_case(parse_case(line), judging))
    return totals


def run(
    cases: Iterable[Case],
    judging: Judging,
    *,
    budget_seconds: float | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    stop_at: int = 10,
    progress: Callable[[Totals, float], None] | None = None,
) -> Totals:
    """Judge ``cases`` until they end, the budget does, ``stop_at`` violations are found, or Ctrl-C is pressed.

    ``executor``: who does it (default: ``jobs`` processes; with one job this process). ``progress`` is told the totals so far
    and the seconds that have passed.
    """
    began = time.monotonic()
    totals = Totals()

    def over() -> bool:
        late = budget_seconds is not None and time.monotonic() - began > budget_seconds
        return late or len(totals.violations) >= stop_at

    def take(part: Totals) -> None:
        totals.add(part)
        if progress is not None:
            progress(totals, time.monotonic() - began)

    try:
        if executor is None and jobs == 1:
            for case in cases:
                if over():
                    break
                take(judge_case(case, judging))
        else:
            own = None
            if executor is None:
                executor = own = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
            try:
                _on(executor, cases, judging, _UNITS_IN_FLIGHT * jobs, over, take)
            finally:
                if own is not None:
                    own.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        pass
    return totals


def _on(
    executor: Executor,
    cases: Iterable[Case],
    judging: Judging,
    in_flight: int,
    over: Callable[[], bool],
    take: Callable[[Totals], None],
) -> None:
    source = iter(cases)
    under_way: set[Future[Totals]] = set()
    while True:
        while len(under_way) < in_flight and not over():
            lines = _unit(source)
            if not lines:
                break
            under_way.add(executor.submit(judge_unit, lines, judging))
        if not under_way:
            return
        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
        for future in done:
            take(future.result())
        if over():
            for future in under_way:
                future.cancel()
            for future in under_way:
                if not future.cancelled():
                    take(future.result())
            return


def _unit(source: Iterator[Case]) -> tuple[str, ...]:
    """The next cases that make a unit: many short ones, or a long one."""
    lines: list[str] = []
    steps = 0
    for case in source:
        lines.append(str(case))
        steps += len(case.script)
        if steps >= _STEPS_OF_A_UNIT:
            break
    return tuple(lines)


def parse_replay(text: str) -> tuple[Model, Case]:
    """``MODEL | CASE``. Raises Invalid."""
    model, _, case = text.partition("|")
    name = model.strip()
    for known in MODELS:
        if known == name:
            return known, parse_case(case)
    raise Invalid(f"{name!r} is no model: {' '.join(MODELS)}")


def explain_all(model: Model, case: Case, judging: Judging) -> list[Explained]:
    """The violations of one case under one model, explained as it stands."""
    recording = record(case)
    found = walk(case, recording, model, limit=judging.limit, seed=judging.seed).violations
    return [explain(case, violation, limit=judging.limit, seed=judging.seed) for violation in found]


__all__ = ["Found", "Judging", "Totals", "cases_of", "explain_all", "judge_case", "judge_unit", "parse_replay", "run"]
