"""The order of the transaction, proved on small images: the true engine keeps C1, C3 and C5 in every state, every broken
order is caught, and one that only a power cut shows is not blamed on a kill."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal
from unittest import mock

import pytest

from cowfence.crash.explore import Recording, Runner, Verdicts, explore, tagged
from cowfence.errors import CowfenceError
from cowfence.qcow2.entries import COPIED, ZERO
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.image import Qcow2Disk
from cowfence.qcow2.transaction import Pending
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from crash.orders import MUTANTS, Mutant
from crash.scenarios import CLUSTER, Scenario, disk_of, image, scenarios, written

Model = Literal["kill", "power"]


def run(scenario: Scenario) -> Recording:
    """Carry a scenario out; its inner step runs inside the first prepare fence, before that returns."""
    started = False

    def inside(kind: Kind, mark: str) -> None:
        nonlocal started
        if kind is Kind.FENCE and mark in ("prepare.fence", "mutant.fence") and scenario.inside and not started:
            started = True
            runner.step_inside(scenario.inside)

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


def _move(disk: Qcow2Disk, source: int, target: int) -> None:
    """Let guest cluster ``target`` take over the host cluster of ``source``, which reads as zeros afterwards, in one
    transaction: one reference more and one less for the same host cluster, their entries in different sectors."""
    state = disk._state
    with state.lock:
        old = state.l2_table(source // 64, wait=True, cached=True)
        new = state.l2_table(target // 64, wait=True, cached=True)
        assert old is not None
        assert new is not None
        host = old.entries[source % 64] & OFFSET_MASK
        cluster = host // CLUSTER
        state.refcounts.load(cluster, 1, wait=True)
        state.refcounts.increment(cluster)
        new.set(target % 64, host)
        old.set(source % 64, ZERO)
        state.pending.free(cluster)
        state.pending.touch(old)
        state.pending.touch(new)


def _record_move(*, netted: bool) -> tuple[Scenario, Recording]:
    content = written(image(), (0, CLUSTER), (70 * CLUSTER, CLUSTER))
    scenario = Scenario("move", content, [])
    runner = Runner(content, lambda storage, writable: disk_of(scenario, storage, writable))
    disk = runner.disk
    assert isinstance(disk, Qcow2Disk)
    table = disk._state.l2_table(0, wait=True, cached=True)
    assert table is not None
    table.set(0, table.entries[0] & ~COPIED)
    disk._state.pending.touch(table)
    disk.flush()

    def net(self: Pending, first: int, count: int = 1, *, discard: bool = False, table: bool = False) -> None:  # noqa: ARG001
        block = disk._state.refcounts.block_of(first, wait=True)
        assert block is not None
        block.set(first % 256, block.get(first % 256) - 1)

    data = tagged(0, CLUSTER, 90)
    runner.log.note("write.begin", offset=71 * CLUSTER, data=data)
    runner.log.note("end")
    runner.log.note("write.begin", offset=0, data=bytes(CLUSTER))
    with mock.patch.object(Pending, "free", net) if netted else nullcontext():
        _move(disk, 0, 71)
    runner.log.note("end")
    disk.flush()
    return scenario, Recording(content, scenario.guest(), runner.log.entries())


def test_an_increment_is_not_set_against_a_decrement() -> None:
    """M35: one reference comes and another goes; if the count were left alone, LINK could arrive in half, and only a power
    cut shows it."""
    scenario, recording = _record_move(netted=False)
    for model in ("kill", "power"):
        verdicts = judge(scenario, recording, model)
        assert not verdicts.violations, str(verdicts.violations[0])
    scenario, recording = _record_move(netted=True)
    assert not judge(scenario, recording, "kill").violations
    caught = judge(scenario, recording, "power").violations
    assert caught
    assert caught[0].clause == "C5"
