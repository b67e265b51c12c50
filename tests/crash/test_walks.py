"""A sample of the random walks; ``make crash`` goes on for as long as it is given."""

from __future__ import annotations

from typing import Literal

import pytest

from cowfence.qcow2.allocator import Allocator
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


def test_walks_find_a_cluster_that_is_handed_out_before_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of a refcount block while counts go down must not find what is in quarantine; the walk that found it so."""
    monkeypatch.setattr(Allocator, "hold", lambda self, clusters: None)  # noqa: ARG005
    monkeypatch.setattr(Allocator, "release", _release_everything)
    chosen = walk(27)
    assert judge(chosen, run(chosen), "kill").violations


def _release_everything(self: Allocator, clusters: list[int]) -> None:
    waiting = set(self._to_scan)
    scanned = [cluster for cluster in clusters if cluster // self._geometry.refcounts_per_block not in waiting]
    self._returned.extend(scanned)
    self.free += len(scanned)
