"""What a campaign found, as the values of the report's page."""

from __future__ import annotations

from cowfence.crash.campaign import Outcome
from cowfence.crash.cases import parse_case, record
from cowfence.crash.report import Report, ReportCoverage, ReportRun, ReportViolation
from cowfence.crash.timeline import timeline
from cowfence.crash.unit import Counts, Found


def report_of(outcome: Outcome, command: str) -> Report:
    """The page of a campaign that ``command`` began: its violations, each with its run, and without any, its first cases."""
    totals = outcome.totals
    if outcome.found:
        runs = [_broken_run(number, found) for number, found in enumerate(outcome.found, 1)]
    else:
        runs = [_run(counts) for counts in outcome.first]
    return Report(
        command=command,
        seed=outcome.settings.seed,
        models=outcome.settings.models,
        states=totals.states,
        distinct=totals.distinct,
        seconds=outcome.seconds,
        sampled=totals.sampled + totals.cut,
        runs=runs,
        violations=[_violation(number, found) for number, found in enumerate(outcome.found, 1)],
        coverage=[ReportCoverage(verb, option, count) for (verb, option), count in sorted(outcome.coverage.items())],
    )


def _run(counts: Counts) -> ReportRun:
    """The log of a case is made again here: it is the same each time, and need not travel."""
    return ReportRun(counts.case, timeline(record(parse_case(counts.case))).entries, counts.per_point)


def _broken_run(number: int, found: Found) -> ReportRun:
    return ReportRun(_name(number, found), found.entries, found.per_point)


def _violation(number: int, found: Found) -> ReportViolation:
    return ReportViolation(
        clause=found.clause,
        model=found.model,
        edge=found.edge,
        operations=found.operations,
        replay=found.replay,
        lost=found.lost,
        sectors=found.sectors,
        what=found.what,
        run=_name(number, found),
        point=found.point,
    )


def _name(number: int, found: Found) -> str:
    return f"{number}: {found.case}"
