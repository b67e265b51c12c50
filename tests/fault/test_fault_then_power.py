"""A call fails, the guest goes on, and then the power is cut: the order must hold over the failure too.

What a failed transaction has left half done is taken up again by the next one. The kill and power models then walk the log of
the whole run, failure included, and judge each state by structure and contents, as in the tests of orders.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Literal

import pytest

from cowfence.crash.explore import Recording, Runner, explore
from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import Disk
from cowfence.errors import CowfenceError
from cowfence.storage.base import Storage
from cowfence.storage.fault import CHANGES, Arrived, FaultPlan
from crash.scenarios import FLUSH, Scenario, disk_of, scenarios
from fault.sectors import SectorFaults

NAMES = (
    "allocate-two-tables",
    "in-place-and-new",
    "compressed",
    "shared",
    "discard-then-write",
    "keep-zero-unflushed",
    "refcount-block",
    "l1-growth",
    "tight-cache",
)
STATES_LIMIT = 64
"""Combinations of sectors up to which the power model is exhaustive; above it pairs and a sample."""


def run_over_fault(scenario: Scenario, plan: FaultPlan) -> Recording | None:
    """The scenario, then a flush; None where the image did not even open."""

    def opener(storage: Storage, writable: bool) -> Disk:
        return disk_of(scenario, SectorFaults(storage, plan), writable)

    try:
        runner = Runner(scenario.content, opener)
    except CowfenceError:
        return None
    for step in (*scenario.script, FLUSH):
        with suppress(CowfenceError):
            runner.step(step)
    return Recording(scenario.content, scenario.guest(), runner.log.entries())


@pytest.mark.parametrize("model", ["kill", "power"])
@pytest.mark.parametrize("name", NAMES)
def test_crash_after_a_failed_call(name: str, model: Literal["kill", "power"]) -> None:
    scenario = scenarios()[name]
    assert fatal_findings(scenario.content) == []
    # What half a write leaves is one of the power model's own states.
    for arrived in (Arrived.NOTHING,) if model == "power" else (Arrived.NOTHING, Arrived.HALF):
        nth = 0
        while True:
            nth += 1
            plan = FaultPlan(nth, kinds=CHANGES, error=errno.EIO, arrived=arrived)
            recording = run_over_fault(scenario, plan)
            if not plan.failed:
                break
            if recording is not None:
                verdicts = explore(
                    recording, model, lambda storage, writable: disk_of(scenario, storage, writable), limit=STATES_LIMIT
                )
                assert not verdicts.violations, f"call {nth} fails, {arrived}: {verdicts.violations[0]}"
        assert nth > len(scenario.script)
