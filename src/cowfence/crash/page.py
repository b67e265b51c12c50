"""The explorer's results put into the values of the HTML report."""

from __future__ import annotations

from collections.abc import Sequence

from cowfence.crash.campaign import Judging, Totals
from cowfence.crash.cases import Case, Explained, record, walk
from cowfence.crash.explore import Verdicts
from cowfence.crash.judge import Judge
from cowfence.crash.report import Report, ReportCoverage, ReportEntry, ReportRun, ReportViolation
from cowfence.crash.runner import EngineSubject, Recording
from cowfence.crash.witness import sector_map
from cowfence.storage.oplog import Discard, Done, Fence, Note, Truncate, Write, Zero

_KINDS = {Write: "write", Zero: "zero", Discard: "discard", Truncate: "truncate", Fence: "fence"}


def page(
    command: str, seed: int, judging: Judging, totals: Totals, shown: Sequence[Case], explained: Sequence[Explained]
) -> Report:
    """``shown``: cases whose runs are drawn; ``explained``: violations, whose runs are drawn too."""
    runs = [_run(str(case), record(case), case, judging) for case in shown]
    runs += [_violation_run(one) for one in explained]
    return Report(
        command=command,
        seed=seed,
        models=judging.models,
        states=totals.states,
        distinct=totals.distinct,
        seconds=totals.seconds,
        sampled=totals.sampled,
        runs=runs,
        violations=[_violation(one) for one in explained],
        coverage=[ReportCoverage(operation, option, count) for (operation, option), count in sorted(totals.coverage.items())],
    )


def _run(name: str, recording: Recording, case: Case, judging: Judging) -> ReportRun:
    verdicts = walk(case, recording, judging.models[-1], limit=judging.limit, seed=judging.seed)
    return ReportRun(name, *_entries(recording, verdicts))


def _violation_run(one: Explained) -> ReportRun:
    return ReportRun(_name(one), *_entries(one.recording, None))


def _name(one: Explained) -> str:
    return f"{one.violation.clause}: {one.case}"


def _entries(recording: Recording, verdicts: Verdicts | None) -> tuple[list[ReportEntry], list[int]]:
    """Every entry but the ends of calls, and the states judged at each."""
    entries: list[ReportEntry] = []
    points: list[int] = []
    places: dict[int, int] = {}
    ends = {
        entry.fields.get("of"): position
        for position, entry in enumerate(recording.entries)
        if isinstance(entry, Note) and entry.event == "end"
    }
    for position, entry in enumerate(recording.entries):
        places[position] = len(entries)
        if isinstance(entry, Done):
            continue
        if isinstance(entry, Note):
            verb, _, when = entry.event.partition(".")
            if when != "begin":
                continue
            text = f"{entry.fields['offset']:#x}" if "offset" in entry.fields else ""
            entries.append(ReportEntry("guest", verb, text, ends.get(position)))
        else:
            offset = getattr(entry, "offset", None)
            entries.append(ReportEntry(_KINDS[type(entry)], entry.mark, f"{offset:#x}" if offset is not None else ""))
        points.append(verdicts.per_point.get(position, 0) if verdicts is not None else 0)
    last = len(entries) - 1
    placed = [
        ReportEntry(entry.kind, entry.mark, entry.text, min(places[entry.until], last)) if entry.until is not None else entry
        for entry in entries
    ]
    return placed, points


def _violation(one: Explained) -> ReportViolation:
    violation, witness = one.violation, one.violation.witness
    subject = EngineSubject(one.case.image)
    seen = Judge(subject, witness.guest.initial, unit_bytes=witness.unit_bytes, live=False).look(witness.state())
    point = sum(
        1
        for entry in one.recording.entries[: violation.position]
        if not isinstance(entry, Done) and (not isinstance(entry, Note) or entry.event.endswith(".begin"))
    )
    return ReportViolation(
        clause=violation.clause,
        model=violation.model,
        edge=one.edge,
        operations=[str(step) for step in one.case.script],
        replay=f"cowfence crash replay '{one.replay}'",
        lost=one.lost,
        sectors=sector_map(witness, seen.changed) if seen.error is None else (),
        what=violation.verdict.what,
        run=_name(one),
        point=point,
    )
