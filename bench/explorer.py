"""The row of the crash explorer: how many states it judges."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Row
from cowfence.crash.campaign import Outcome, explore
from cowfence.crash.unit import Settings
from cowfence.crash.workloads import walks

_WALKS = 32
_SEED = 1


def _walked(jobs: int) -> Outcome:
    """The same walks each time, for one walk has twice as many states a second as another: 512-byte clusters, both models,
    each state lived on."""
    settings = Settings(("kill", "power"), limit=256, seed=_SEED, live=True)
    outcome = explore([("walks", itertools.islice(walks(_SEED), _WALKS))], settings, jobs=jobs)
    assert not outcome.found, str(outcome.found[0])
    return outcome


def states(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    """P16. The rates of one core and two are taken in turn."""
    one, two, looks = [], [], []
    for _ in range(min(pairs, 3)):
        alone, both = _walked(1), _walked(2)
        one.append(alone.totals.distinct / alone.seconds)
        two.append(both.totals.distinct / both.seconds)
        looks.append(alone.totals.looks / alone.seconds)
    alone_rate, both_rate = statistics.median(one), statistics.median(two)
    note = f"random walks, {statistics.median(looks):,.0f} looks/s"
    yield Row("P16", "explorer, distinct states judged, one core", "", 0.0, alone_rate, "/s", 1000.0, "floor", note)
    yield Row("P16", "explorer, two cores", "one core", alone_rate, both_rate, "/s", 1.8, "high")
