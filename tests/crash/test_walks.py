"""A sample of the random walks; ``make crash`` goes on for as long as it is given."""

from __future__ import annotations

from typing import Literal

import pytest

from crash.orders import MUTANTS
from crash.walks import judge, run, walk


@pytest.mark.parametrize("model", ["kill", "power"])
@pytest.mark.parametrize("seed", range(24))
def test_true_engine_survives_walk(seed: int, model: Literal["kill", "power"]) -> None:
    chosen = walk(seed)
    verdicts = judge(chosen, run(chosen), model)
    assert not verdicts.violations, f"seed {seed}: {verdicts.violations[0]}"


def test_walks_can_fail() -> None:
    """The canary: clusters reused at once must be found by walks too, not only by the scenario made for them."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "M9 reused at once, discard")
    for seed in range(60):
        chosen = walk(seed)
        with mutant.patch():
            try:
                recording = run(chosen)
            except Exception:
                continue
        if judge(chosen, recording, "kill").violations:
            return
    pytest.fail("no walk caught the mutant")
