"""The order of the transaction, proved on small images: the true engine keeps C1, C3 and C5 in every state, every broken
order is caught, and one that only a power cut shows is not blamed on a kill."""

from __future__ import annotations

from typing import Literal

import pytest

from cowfence.crash.explore import Recording, Runner, Verdicts, explore
from cowfence.errors import CowfenceError
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from crash.orders import MUTANTS, Mutant
from crash.scenarios import Scenario, disk_of, scenarios

Model = Literal["kill", "power"]


def run(scenario: Scenario) -> Recording:
    """Carry a scenario out; its inner step runs inside the first prepare fence, before that returns."""
    started = False

    def inside(kind: Kind, mark: str) -> None:
        nonlocal started
        if kind is Kind.FENCE and mark in ("prepare.fence", "mutant.fence") and scenario.inside and not started:
            started = True
            runner.step(scenario.inside)

    plan = FaultPlan(on_call=inside)
    runner = Runner(scenario.content, lambda storage, writable: disk_of(scenario, FaultyStorage(storage, plan), writable))
    for step in scenario.script:
        runner.step(step)
    return Recording(scenario.content, scenario.guest(), runner.log.entries())


def judge(scenario: Scenario, recording: Recording, model: Model, *, stop_at: int = 1) -> Verdicts:
    def opener(storage: Storage, writable: bool):  # type: ignore[no-untyped-def]
        return disk_of(scenario, storage, writable)

    return explore(recording, model, opener, stop_at=stop_at)


@pytest.mark.parametrize("model", ["kill", "power"])
@pytest.mark.parametrize("name", scenarios())
def test_true_engine_keeps_the_contract(name: str, model: Model) -> None:
    scenario = scenarios()[name]
    verdicts = judge(scenario, run(scenario), model)
    assert not verdicts.violations, str(verdicts.violations[0])
    assert verdicts.distinct


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_broken_order_is_caught(mutant: Mutant) -> None:
    scenario = scenarios()[mutant.scenario]
    with mutant.patch():
        try:
            recording = run(scenario)
        except CowfenceError:
            pytest.fail("the mutant did not even run")
    kill = judge(scenario, recording, "kill")
    power = judge(scenario, recording, "power")
    caught = kill.violations or power.violations
    assert caught, f"{mutant.name} survived {power.distinct} states"
    assert caught[0].clause in mutant.clauses, str(caught[0])
    if mutant.power_only:
        assert not kill.violations, f"a kill cannot show this: {kill.violations[0]}"


def test_judge_without_contents_misses_reuse() -> None:
    """J1: without the guest's contents, reuse before unlink passes for sound; so it is the contents that judge."""
    scenario = scenarios()["discard-then-write"]
    mutant = next(m for m in MUTANTS if m.name == "M9 reused at once, discard")
    with mutant.patch():
        recording = run(scenario)

    def opener(storage: Storage, writable: bool):  # type: ignore[no-untyped-def]
        return disk_of(scenario, storage, writable)

    assert explore(recording, "kill", opener).violations
    blind = explore(recording, "kill", opener, contents=False)
    assert all(violation.clause != "C3" for violation in blind.violations)


def test_scenarios_are_sound_before_they_begin() -> None:
    from cowfence.crash.structure import fatal_findings

    for scenario in scenarios().values():
        assert fatal_findings(scenario.content) == [], scenario.name
        assert disk_of(scenario, MemoryStorage(scenario.content), False).size
