"""Campaigns: cases over executors, what they add up to, and what a page shows of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cowfence.crash import campaign
from cowfence.crash.campaign import Judging, Totals, cases_of, judge_case, parse_replay, run
from cowfence.crash.cases import Case, parse_case
from cowfence.crash.images import ImageSpec
from cowfence.crash.page import page
from cowfence.crash.report import render
from cowfence.crash.workloads import SUITES, all_images, covering_images
from cowfence.errors import CowfenceError
from crash.orders import CASES, MUTANTS

AGED = ImageSpec(aged=True)


def first(count: int) -> list[Case]:
    cases = cases_of("two", [AGED], 1)
    return [next(cases) for _ in range(count)]


def test_an_executor_finds_what_one_process_finds() -> None:
    judging = Judging(limit=64)
    alone = run(first(12), judging)
    with ThreadPoolExecutor(2) as executor:
        spread = run(first(12), judging, jobs=2, executor=executor)
    assert alone.cases == spread.cases == 12
    assert (alone.states, alone.distinct, alone.coverage) == (spread.states, spread.distinct, spread.coverage)
    assert not alone.violations
    assert alone.exhaustive


def test_processes_take_lines() -> None:
    totals = run(first(4), Judging(("kill",)), jobs=2)
    assert totals.cases == 4
    assert totals.distinct
    assert not totals.violations


def test_the_budget_ends_it() -> None:
    began = time.monotonic()
    totals = run(cases_of("walks", [], 1), Judging(("kill",), 16), budget_seconds=0.5)
    assert totals.cases > 0
    assert time.monotonic() - began < 20


def test_ctrl_c_keeps_what_there_is() -> None:
    def cases() -> Iterator[Case]:
        yield from first(2)
        raise KeyboardInterrupt

    assert run(cases(), Judging(("kill",))).cases == 2


def test_a_violation_is_told_with_a_line_that_shows_it_again() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "M5 no fence between PREPARE and LINK, refcount side")
    with mutant.patch():
        totals = run([CASES[mutant.case]] * 20, Judging(), stop_at=2)
        assert len(totals.violations) == 2
        found = totals.violations[0]
        assert (found.clause, found.model) == ("C5", "power")
        assert "a fence is missing between `refcount.increment` and `l2.link`" in found.edge
        again = campaign.explain_all(*parse_replay(found.replay), Judging())
        assert again[0].edge == found.edge
    assert not campaign.explain_all(*parse_replay(found.replay), Judging()), "the true engine keeps it"


def test_an_engine_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> None:  # noqa: ARG001
        raise CowfenceError("it cannot be done")

    monkeypatch.setattr(campaign, "record", broken)
    (found,) = judge_case(first(1)[0], Judging()).violations
    assert found.clause == "run"
    assert "it cannot be done" in found.edge


def test_a_page_is_made_of_a_real_violation(tmp_path: Path) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "M6 no fence between PREPARE and LINK, data side")
    case = CASES[mutant.case]
    with mutant.patch():
        explained = campaign.explain_all("power", case, Judging())
    assert explained
    text = render(page("cowfence crash explore", 1, Judging(), Totals(cases=1), [case], explained))
    assert "a fence is missing between" in text
    assert "foreign" in text
    assert case.image.cluster_bytes == 512
    (tmp_path / "page.html").write_text(text)


@pytest.mark.parametrize("text", ["flush", "no-model | v3 | flush", "kill", "kill | v3,c512"])
def test_a_line_that_is_no_replay_is_refused(text: str) -> None:
    with pytest.raises(CowfenceError):
        parse_replay(text)


def test_covering_images_cover_every_two_options() -> None:
    def pairs(images: list[ImageSpec]) -> set[tuple[object, ...]]:
        return {(a, image[a], b, image[b]) for image in images for a in range(len(image)) for b in range(a + 1, len(image))}

    assert pairs(covering_images()) == pairs(all_images())
    assert len(covering_images()) < 40


@pytest.mark.parametrize("suite", SUITES)
def test_cases_are_lines(suite: str) -> None:
    for _, case in zip(range(30), SUITES[suite]([AGED]), strict=False):
        assert parse_case(str(case)) == case
