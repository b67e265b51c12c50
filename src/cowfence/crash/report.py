"""The explorer's results as one HTML file that needs nothing else: no network, no server, light or dark, by mouse or keyboard.

Its input is the plain values below, which know nothing of the explorer; whoever has results fills them. What is shown: what was
asked and how much of it was judged; each run's log as a time line (stages by their marks, the guest's operations above, the
states judged at each point below); and each violation with all that is needed to understand it and see it again.

The page is made by ``report.html.j2`` (jinja2, the extra ``report``). Every text is escaped, those inside scripts too, and the
page forbids itself to load anything: names and bytes of hostile images may stand in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Final, Literal, NamedTuple, TypeAlias

from cowfence.errors import Invalid

Stage: TypeAlias = Literal["prepare", "link", "reclaim", "fence", "guest", "other"]

SECTORS_PER_ROW: Final = 64
SECTOR_WORDS: Final = ("old", "new", "foreign", "lost")
"""What a sector may be called: as before; as a later write left it; bytes that nobody wrote there; flushed, and gone."""

_GUEST_VERBS: Final = ("write", "zero", "discard", "flush", "kill")


@dataclass(frozen=True, slots=True)
class ReportEntry:
    """One entry of a run's log.

    ``kind``: of the operation (``write``, ``zero``, ``discard``, ``truncate``, ``fence``), or ``guest`` for an operation of the
    guest, which begins here. ``mark``: the step of the transaction as the log names it; for the guest, its verb. ``text``: what
    more there is to say (offset, length). ``until``: the entry at which a guest's operation was over; None: it never was.
    """

    kind: str
    mark: str
    text: str = ""
    until: int | None = None


@dataclass(frozen=True, slots=True)
class ReportRun:
    """A recorded run. ``states_per_point``: states judged at each entry; points that are not named have none."""

    name: str
    entries: Sequence[ReportEntry]
    states_per_point: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class ReportViolation:
    """A state that breaks the contract.

    ``edge``: the sentence that names the missing edge. ``what``: what the judge saw. ``lost``: what had not arrived.
    ``sectors``: a word of ``SECTOR_WORDS`` for each sector of the guest's disk. ``run`` and ``point``: the run's name and the
    entry of its log at which the crash was.
    """

    clause: str
    model: str
    edge: str
    operations: Sequence[str]
    replay: str
    lost: Sequence[str] = ()
    sectors: Sequence[str] = ()
    what: str = ""
    run: str = ""
    point: int | None = None


@dataclass(frozen=True, slots=True)
class ReportCoverage:
    """How many scripts put this operation to work with this option."""

    operation: str
    option: str
    count: int


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page says. ``sampled``: at how many instants the states were too many, so that a
    seeded sample was judged; 0: it was exhaustive."""

    command: str
    seed: int | None
    models: Sequence[str]
    states: int
    distinct: int
    seconds: float
    sampled: int = 0
    subject: str = "cowfence"
    runs: Sequence[ReportRun] = ()
    violations: Sequence[ReportViolation] = ()
    coverage: Sequence[ReportCoverage] = field(default=())


def stage_of(kind: str, mark: str) -> Stage:
    """The stage of the transaction that an entry belongs to, by its mark (ARCHITECTURE.md has the table)."""
    if kind == "guest":
        return "guest"
    if kind == "fence" or mark.endswith(".fence"):
        return "fence"
    if mark.endswith(".link"):
        return "link"
    if mark.endswith(".new") or mark in ("data.write", "refcount.increment"):
        return "prepare"
    if mark in ("refcount.decrement", "host.discard", "luks.wipe"):
        return "reclaim"
    return "other"


def check_renderer() -> None:
    """Raises Invalid where jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise Invalid("an HTML report needs jinja2: pip install 'cowfence[report]'") from error


def render(report: Report) -> str:
    """The page. Raises Invalid where jinja2 is not installed."""
    check_renderer()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,}"
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    by_run: dict[str, list[tuple[int, ReportViolation]]] = {}
    for number, violation in enumerate(report.violations, 1):
        by_run.setdefault(violation.run, []).append((number, violation))
    return environment.from_string(source).render(
        report=report,
        rate=round(report.states / report.seconds) if report.seconds > 0 else None,
        runs=[_run_view(run, by_run.get(run.name, [])) for run in report.runs],
        run_names={run.name for run in report.runs},
        violations=[(violation, _sector_rows(violation.sectors)) for violation in report.violations],
        coverage=_coverage_view(report.coverage),
        sector_words=SECTOR_WORDS,
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """The page as a file. Raises Invalid without jinja2, and OSError."""
    text = render(report)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


class _Bar(NamedTuple):
    """A guest's operation above the time line, in percent of its width."""

    verb: str
    label: str
    lane: int
    left: float
    width: float
    open_ended: bool


class _Flag(NamedTuple):
    """A violation at its place in the time line."""

    number: int
    title: str
    left: float


@dataclass(frozen=True, slots=True)
class _RunView:
    name: str
    length: int
    fences: int
    states: int
    most_states: int
    lanes: int
    bars: list[_Bar]
    flags: list[_Flag]
    paths: dict[Stage, str]
    states_path: str
    script: dict[str, object]
    """What the page's script shows at the cursor: the words once, the entries as numbers of words."""


def _run_view(run: ReportRun, violations: Iterable[tuple[int, ReportViolation]]) -> _RunView:
    length = max(1, len(run.entries))
    states = [*run.states_per_point[: len(run.entries)]]
    states += [0] * (len(run.entries) - len(states))
    stages = [stage_of(entry.kind, entry.mark) for entry in run.entries]
    bars = _bars(run.entries)
    words: dict[str, int] = {}

    def word(text: str) -> int:
        return words.setdefault(text, len(words))

    entries = [
        (word(entry.kind), word(entry.mark), word(entry.text), word(stage))
        for entry, stage in zip(run.entries, stages, strict=True)
    ]
    flags = [
        _Flag(number, f"{violation.clause}: {violation.edge}", 100 * (violation.point + 0.5) / length)
        for number, violation in violations
        if violation.point is not None and 0 <= violation.point < length
    ]
    return _RunView(
        name=run.name,
        length=len(run.entries),
        fences=stages.count("fence"),
        states=sum(states),
        most_states=max(states, default=0),
        lanes=max((bar.lane + 1 for bar in bars), default=0),
        bars=bars,
        flags=flags,
        paths={stage: _boxes(stages, stage) for stage in ("prepare", "link", "reclaim", "other", "fence")},
        states_path=_heights(states),
        script={"words": list(words), "entries": entries, "states": states},
    )


def _bars(entries: Sequence[ReportEntry]) -> list[_Bar]:
    """The guest's operations, those that overlap in lanes of their own."""
    length = max(1, len(entries))
    free_from: list[int] = []
    bars = []
    for start, entry in enumerate(entries):
        if entry.kind != "guest":
            continue
        end = length if entry.until is None else min(max(entry.until, start + 1), length)
        lane = next((lane for lane, free in enumerate(free_from) if free <= start), len(free_from))
        free_from[lane : lane + 1] = [end]
        verb = entry.mark if entry.mark in _GUEST_VERBS else "other"
        label = f"{entry.mark} {entry.text}".strip()
        bars.append(_Bar(verb, label, lane, 100 * start / length, 100 * (end - start) / length, entry.until is None))
    return bars


def _boxes(stages: Sequence[Stage], stage: Stage) -> str:
    """An SVG path: a box one unit high at each entry of the stage."""
    return "".join(f"M{at}.08 0h.84v1h-.84z" for at, each in enumerate(stages) if each == stage)


def _heights(states: Sequence[int]) -> str:
    """An SVG path: a column for each point. Heights go by the square root, so that one state is seen beside thousands."""
    most = max(states, default=0)
    return "".join(f"M{at}.08 1h.84v-{(count / most) ** 0.5:.3f}h-.84z" for at, count in enumerate(states) if count)


class _SectorRow(NamedTuple):
    """Sectors that are shown one by one; or, where ``cells`` is empty, how many are passed over because all are old."""

    first: int
    cells: Sequence[str]
    skipped: int = 0


def _sector_rows(sectors: Sequence[str]) -> list[_SectorRow]:
    """Rows of sectors; two or more rows in a line in which all is old become one note."""
    rows: list[_SectorRow] = []
    for first in range(0, len(sectors), SECTORS_PER_ROW):
        cells = [word if word in SECTOR_WORDS else "other" for word in sectors[first : first + SECTORS_PER_ROW]]
        plain = all(word == "old" for word in cells)
        if plain and rows and (rows[-1].skipped or all(word == "old" for word in rows[-1].cells)):
            before = rows.pop()
            rows.append(_SectorRow(before.first, (), (before.skipped or len(before.cells)) + len(cells)))
        else:
            rows.append(_SectorRow(first, cells))
    return rows


class _CoverageView(NamedTuple):
    options: list[str]
    rows: list[tuple[str, list[tuple[int, int]]]]
    """Operation, and for each option the count and its depth of colour, 0 to 4."""


def _coverage_view(coverage: Sequence[ReportCoverage]) -> _CoverageView:
    options = list(dict.fromkeys(each.option for each in coverage))
    counts: dict[str, dict[str, int]] = {}
    for each in coverage:
        row = counts.setdefault(each.operation, {})
        row[each.option] = row.get(each.option, 0) + each.count
    most = max((count for row in counts.values() for count in row.values()), default=0)

    def depth(count: int) -> int:
        return 0 if count <= 0 else min(4, 1 + int(3 * (count / most) ** 0.5))

    rows = [(name, [(row.get(option, 0), depth(row.get(option, 0))) for option in options]) for name, row in counts.items()]
    return _CoverageView(options, rows)
