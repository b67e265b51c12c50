"""A campaign: suites of cases, judged in units by many workers, within a time and up to so many violations.

The workers are any object with ``submit`` as in ``concurrent.futures``: by default a pool of processes, one for each core; for
one job this process itself, without a pool; a cluster's client works too. Only two units for each job are under way, so that
suites of millions of cases, and walks without end, cost no memory.

Each suite gets an equal share of the time that is left; what it does not need goes to the next ones. Within a suite one case of
each image is taken in turn, so that a short campaign has seen all options, too.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from cowfence.crash.cases import Case
from cowfence.crash.images import ImageSpec, build, parse_image
from cowfence.crash.unit import Counts, Found, Settings, Unit, UnitResult, judge_unit
from cowfence.crash.workloads import SUITES, all_images, covering_images, walks
from cowfence.errors import CowfenceError, Invalid

ORDER: Final = ("one", "backups", "nested", "interleaved", "faulted", "two", "three", "walks")
"""The suites in the order in which all of them are gone through."""
UNITS_PER_JOB: Final = 2
CASES_PER_UNIT: Final = 4
_KEPT_CASES: Final = 6


class Executor(Protocol):
    """Who carries units out."""

    def submit(self, fn: Callable[[Unit], UnitResult], unit: Unit, /) -> Future[UnitResult]: ...


@dataclass(slots=True)
class Totals:
    """What was judged. ``distinct``: different contents, counted for each case and model by itself and added up. ``sampled``:
    instants whose states were too many to judge all. ``cut``: cases that were half judged when the time was over. ``seconds``:
    of work, added up over the workers."""

    cases: int = 0
    states: int = 0
    distinct: int = 0
    looks: int = 0
    sampled: int = 0
    cut: int = 0
    violations: int = 0
    seconds: float = 0.0

    def add(self, result: UnitResult) -> None:
        self.cases += len(result.cases)
        for counts in result.cases:
            self.states += counts.states
            self.distinct += counts.distinct
            self.looks += counts.looks
            self.sampled += counts.sampled
        self.cut += result.cut
        self.violations += len(result.found)
        self.seconds += result.seconds


@dataclass(slots=True)
class Outcome:
    """What a campaign has found so far. ``complete``: the suites that were gone through to their end."""

    settings: Settings
    totals: Totals = field(default_factory=Totals)
    suites: dict[str, Totals] = field(default_factory=dict)
    complete: list[str] = field(default_factory=list)
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    first: list[Counts] = field(default_factory=list)
    """The first cases, for a closer look."""
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def exhaustive(self) -> bool:
        """No instant was sampled, and no case half judged."""
        return not self.totals.sampled and not self.totals.cut

    @property
    def states_per_second(self) -> float:
        return self.totals.states / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "states": self.totals.states,
            "distinct": self.totals.distinct,
            "exhaustive": self.exhaustive,
            "violations": [found.to_dict() for found in self.found],
            "seconds": round(self.seconds, 3),
            "states_per_second": round(self.states_per_second, 1),
            "cases": self.totals.cases,
            "suites": {
                name: {"cases": one.cases, "states": one.states, "distinct": one.distinct, "complete": name in self.complete}
                for name, one in self.suites.items()
            },
            "models": list(self.settings.models),
            "limit": self.settings.limit,
            "seed": self.settings.seed,
            "looks": self.totals.looks,
            "sampled": self.totals.sampled,
            "cut": self.totals.cut,
            "interrupted": self.interrupted,
        }


def chosen_images(text: str) -> list[ImageSpec]:
    """``all``, ``covering`` (every two options meet), or one by its description. Raises Invalid."""
    if text == "all":
        return all_images()
    if text == "covering":
        return covering_images()
    image = parse_image(text)
    build(image)
    return [image]


def cases_of(suite: str, images: Sequence[ImageSpec], seed: int) -> Iterator[Case]:
    """The cases of a suite, of each image in turn. Walks choose their images by themselves. Raises Invalid."""
    if suite == "walks":
        return walks(seed)
    if suite not in SUITES:
        raise Invalid(f"{suite!r} is no suite: {' '.join(ORDER)}")
    return _in_turn([SUITES[suite]([image]) for image in images])


def _in_turn(iterators: Sequence[Iterator[Case]]) -> Iterator[Case]:
    left = list(iterators)
    while left:
        still = []
        for iterator in left:
            with suppress(StopIteration):
                yield next(iterator)
                still.append(iterator)
        left = still


def explore(
    suites: Sequence[tuple[str, Iterable[Case]]],
    settings: Settings,
    *,
    jobs: int | None = None,
    executor: Executor | None = None,
    budget_seconds: float | None = None,
    stop_at: int = 10,
    progress: Callable[[Outcome], object] | None = None,
) -> Outcome:
    """Judge the cases of the suites, one suite after the other.

    ``jobs``: how many units are carried out at once (default: one for each core). ``stop_at``: violations after which it ends.
    ``progress`` is called after each unit. Ctrl-C ends it with what there is. Raises CowfenceError where workers die.
    """
    jobs = jobs if jobs is not None else len(os.sched_getaffinity(0))
    outcome = Outcome(settings)
    began = time.monotonic()
    campaign = _Campaign(outcome, jobs, stop_at, progress, began)
    try:
        if executor is not None:
            campaign.run(suites, executor, budget_seconds)
        elif jobs == 1:
            campaign.run(suites, _Here(), budget_seconds)
        else:
            with _pool(jobs) as pool:
                campaign.run(suites, pool, budget_seconds)
    except KeyboardInterrupt:
        outcome.interrupted = True
    except BrokenProcessPool as error:
        raise CowfenceError(f"a worker process died: {error}") from error
    finally:
        campaign.cancel()
    outcome.seconds = time.monotonic() - began
    return outcome


class _Here:
    """An executor that works at once, in this process."""

    def submit(self, fn: Callable[[Unit], UnitResult], unit: Unit, /) -> Future[UnitResult]:
        future: Future[UnitResult] = Future()
        future.set_result(fn(unit))
        return future


class _pool:  # noqa: N801
    """A pool of processes, which does not outlive the block: what is still under way then is wanted by nobody."""

    def __init__(self, jobs: int) -> None:
        self._others = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)

    def __enter__(self) -> ProcessPoolExecutor:
        return self._pool

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child not in self._others:
                child.terminate()


def _ignore_interrupts() -> None:
    """Ctrl-C goes to the whole group of processes; the one that began the campaign ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Campaign:
    def __init__(
        self,
        outcome: Outcome,
        jobs: int,
        stop_at: int,
        progress: Callable[[Outcome], object] | None,
        began: float,
    ) -> None:
        self._outcome = outcome
        self._jobs = jobs
        self._stop_at = stop_at
        self._progress = progress
        self._began = began
        self._pending: set[Future[UnitResult]] = set()
        self._unfinished = False
        """The time was over for a case of this suite."""

    def cancel(self) -> None:
        """What has not begun need not begin."""
        for future in self._pending:
            future.cancel()

    def run(self, suites: Sequence[tuple[str, Iterable[Case]]], executor: Any, budget_seconds: float | None) -> None:
        for number, (suite, cases) in enumerate(suites):
            now = time.monotonic()
            share = None
            if budget_seconds is not None:
                share = max(0.0, self._began + budget_seconds - now) / (len(suites) - number)
            self._outcome.suites.setdefault(suite, Totals())
            if not self._suite(suite, iter(cases), executor, share):
                return

    def _suite(self, suite: str, cases: Iterator[Case], executor: Any, share: float | None) -> bool:
        """Go through one suite; False: there are violations enough."""
        until = None if share is None else time.time() + share
        # A walk is long; of the others a few at once are hardly more than one.
        size = 1 if suite == "walks" else CASES_PER_UNIT
        more, ended = True, False
        self._unfinished = False
        while more or self._pending:
            while more and len(self._pending) < UNITS_PER_JOB * self._jobs:
                if until is not None and time.time() >= until:
                    more = False
                    break
                batch = tuple(str(case) for case in itertools.islice(cases, size))
                if not batch:
                    more, ended = False, True
                    break
                self._pending.add(executor.submit(judge_unit, Unit(suite, batch, self._outcome.settings, until)))
                if self._jobs == 1:
                    break
            if not self._collect():
                return False
        if ended and not self._unfinished:
            self._outcome.complete.append(suite)
        return True

    def _collect(self) -> bool:
        """Wait for some units, and add what they found; False: there are violations enough."""
        if not self._pending:
            return True
        done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
        outcome = self._outcome
        for future in done:
            result = future.result()
            outcome.totals.add(result)
            outcome.suites[result.suite].add(result)
            self._unfinished = self._unfinished or bool(result.left or result.cut)
            outcome.coverage += result.coverage
            outcome.found += result.found
            outcome.first += result.cases[: max(0, _KEPT_CASES - len(outcome.first))]
        outcome.seconds = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(outcome)
        del outcome.found[self._stop_at :]
        return len(outcome.found) < self._stop_at
