"""Campaigns: the same totals whoever carries the units out, violations explained in words, an end for every reason there is."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from unittest import mock

import pytest

from cowfence.crash import unit as units
from cowfence.crash.campaign import ORDER, Outcome, cases_of, chosen_images, explore
from cowfence.crash.campaign_report import report_of
from cowfence.crash.cases import Case, parse_case
from cowfence.crash.images import parse_image
from cowfence.crash.unit import Settings, Unit, UnitResult, judge_unit
from cowfence.crash.workloads import SUITES
from cowfence.disk.base import Disk
from cowfence.errors import CowfenceError, Invalid
from cowfence.qcow2.image import Qcow2Disk
from cowfence.qcow2.transaction import Committer

SMALL = "v3,c512,r16,t64"
QUICK = Settings(limit=64)


@contextmanager
def without_the_prepare_fence() -> Iterator[None]:
    """M5 and M6 of the crash contract: LINK may arrive before what it leads to."""
    true = Committer._fence

    def fence(self: Committer, mark: str) -> None:
        if mark != "prepare.fence":
            true(self, mark)

    with mock.patch.object(Committer, "_fence", fence):
        yield


def cases(*texts: str) -> list[Case]:
    return [parse_case(f"{SMALL} | {text}") for text in texts]


def test_a_unit_and_its_result_can_be_sent() -> None:
    unit = pickle.loads(pickle.dumps(Unit("one", (f"{SMALL} | write:0+512 flush",), QUICK)))
    with without_the_prepare_fence():
        result = judge_unit(unit)
    assert result.found
    assert pickle.loads(pickle.dumps(result)) == result


def test_a_sound_engine_has_no_violation_and_the_counts_add_up() -> None:
    outcome = explore([("one", cases("write:0+512 flush", "discard:0+512 flush"))], QUICK, jobs=1)
    totals = outcome.totals
    assert not outcome.found
    assert totals.cases == 2
    assert totals.states >= totals.distinct >= totals.looks > 0
    assert sum(counts.states for counts in outcome.first) == totals.states
    assert [sum(counts.per_point) for counts in outcome.first] == [counts.states for counts in outcome.first]
    assert outcome.coverage["write", "512 B clusters"] == 1
    assert outcome.coverage["flush", "512 B clusters"] == 2
    assert outcome.complete == ["one"]
    assert outcome.exhaustive


def test_two_processes_find_what_one_finds() -> None:
    texts = ("write:0+512 flush", "zero:512+512 flush", "write:0+1024 write:0+512 flush", "write:512+512 reopen", "flush")
    one = explore([("two", cases(*texts))], QUICK, jobs=1)
    two = explore([("two", cases(*texts))], QUICK, jobs=2)
    assert (two.totals.states, two.totals.distinct, two.totals.looks) == (
        one.totals.states,
        one.totals.distinct,
        one.totals.looks,
    )
    assert two.coverage == one.coverage


def test_any_executor_will_do() -> None:
    seen = []

    class Cluster:
        def submit(self, fn: Callable[[Unit], UnitResult], unit: Unit, /) -> Future[UnitResult]:
            seen.append(len(unit.cases))
            future: Future[UnitResult] = Future()
            future.set_result(pickle.loads(pickle.dumps(fn(pickle.loads(pickle.dumps(unit))))))
            return future

    outcome = explore([("one", cases(*["flush"] * 6))], QUICK, executor=Cluster(), jobs=4)
    assert seen == [4, 2]
    assert outcome.totals.cases == 6


def test_only_so_many_units_are_under_way() -> None:
    taken = itertools.count()
    under_way: list[int] = []

    def endless() -> Iterator[Case]:
        for case in itertools.cycle(cases("flush")):
            next(taken)
            yield case

    class Counting:
        def submit(self, fn: Callable[[Unit], UnitResult], unit: Unit, /) -> Future[UnitResult]:
            future: Future[UnitResult] = Future()
            waiting.append((future, unit))
            under_way.append(len(waiting))
            if len(waiting) == 6:
                while waiting:
                    future, unit = waiting.pop()
                    future.set_result(fn(unit))
            return future

    waiting: list[tuple[Future[UnitResult], Unit]] = []
    started = time.monotonic()

    def stop(outcome: Outcome) -> None:
        if outcome.totals.cases > 60:
            raise KeyboardInterrupt

    outcome = explore([("one", endless())], QUICK, executor=Counting(), jobs=3, progress=stop)
    assert max(under_way) == 6
    assert outcome.interrupted
    assert outcome.totals.cases > 60
    assert time.monotonic() - started < 20


def test_a_violation_is_explained_and_small() -> None:
    with without_the_prepare_fence():
        case = parse_case(f"{SMALL},aged | discard:0+512 write:3072+512 read:0+512 flush")
        outcome = explore([("two", [case])], QUICK, jobs=1)
    (found,) = outcome.found
    assert (found.clause, found.model) == ("C3", "power")
    assert found.operations == ("write:3072+512", "flush")
    assert "fence is missing between" in found.edge
    assert found.replay == f"cowfence crash replay --limit 64 'power | {found.case}'"
    assert found.point is not None
    assert sum(found.per_point[: found.point + 1]) == sum(found.per_point) > 0
    assert len(found.sectors) == 128
    assert found.sectors[6] == "foreign"
    assert any("data.write" in lost for lost in found.lost)
    assert outcome.to_dict()["violations"] == [found.to_dict()]


def test_it_stops_at_so_many_violations() -> None:
    with without_the_prepare_fence():
        outcome = explore([("walks", itertools.cycle(cases("write:0+512 flush")))], QUICK, jobs=1, stop_at=3)
    assert len(outcome.found) == 3


def test_an_engine_that_raises_is_a_violation() -> None:
    def write(self: Qcow2Disk, offset: int, data: bytes, *, fua: bool = False) -> None:  # noqa: ARG001
        raise CowfenceError("no luck")

    with mock.patch.object(Qcow2Disk, "write", write):
        outcome = explore([("one", cases("write:0+512 flush", "flush"))], Settings(live=False), jobs=1)
        suites = [next(SUITES[name]([parse_image(SMALL)])) for name in ("interleaved", "faulted", "nested")]
    (found,) = outcome.found
    assert (found.clause, found.point) == ("run", None)
    assert "CowfenceError: no luck" in found.edge
    assert outcome.totals.cases == 1
    assert all(case.fault is None and case.nested is None and not case.inside for case in suites)
    assert report_of(outcome, "explore").violations


def test_an_engine_that_raises_while_states_are_judged_is_a_violation() -> None:
    def extents(self: Disk, start: int, length: int) -> None:  # noqa: ARG001
        raise ZeroDivisionError

    with mock.patch.object(Qcow2Disk, "extents", extents):
        outcome = explore([("one", cases("write:0+512 flush"))], QUICK, jobs=1)
    assert [found.clause for found in outcome.found] == ["run", "run"]
    assert "could not be judged: ZeroDivisionError" in outcome.found[0].edge


def test_what_cannot_be_explained_is_reported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(*_: object, **__: object) -> None:
        raise IndexError("lost")

    monkeypatch.setattr(units, "explain", explain)
    with without_the_prepare_fence():
        outcome = explore([("one", cases("write:0+512 flush"))], QUICK, jobs=1)
    (found,) = outcome.found
    assert found.clause == "C1"
    assert "IndexError" in found.edge


def test_the_time_is_kept_and_shared_and_what_was_cut_is_not_called_exhaustive() -> None:
    image = parse_image("v3,c65536,r16,t64,aged")
    began = time.monotonic()
    outcome = explore(
        [(name, cases_of(name, [image], 0)) for name in ("nested", "walks")], Settings(), jobs=1, budget_seconds=2
    )
    assert time.monotonic() - began < 6
    assert outcome.suites["nested"].states
    assert outcome.suites["walks"].states
    assert outcome.complete == []
    assert not outcome.exhaustive


def test_no_process_outlives_its_campaign() -> None:
    before = set(multiprocessing.active_children())
    outcome = explore([("one", itertools.cycle(cases("write:0+512 flush")))], QUICK, jobs=2, budget_seconds=2)
    assert outcome.totals.cases
    assert not outcome.found
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(multiprocessing.active_children()) == before


def test_the_suites_take_one_case_of_each_image_in_turn() -> None:
    images = chosen_images("covering")
    first = list(itertools.islice(cases_of("one", images, 0), len(images)))
    assert [case.image for case in first] == images
    assert {*ORDER} == {*SUITES, "walks"}


@pytest.mark.parametrize("text", ["none", "c0", "c513", "v2,r1", "s3", "v4", ""])
def test_an_image_that_cannot_be_is_one_clear_line(text: str) -> None:
    with pytest.raises(Invalid):
        chosen_images(text)
