"""What the explorer's report makes of results, without a browser."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cowfence.crash.report import (
    SECTORS_PER_ROW,
    Report,
    ReportEntry,
    ReportRun,
    ReportViolation,
    render,
    stage_of,
    write_report,
)
from cowfence.errors import Invalid
from crash import report_samples

ROOT = Path(__file__).resolve().parents[2]


def table_of_stages() -> dict[str, str]:
    """Mark -> stage, from the table in ARCHITECTURE.md."""
    stages = {}
    for stage, marks in re.findall(
        r"^\| (PREPARE|LINK|RECLAIM|fence) \| (.*?) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M
    ):
        stages.update(dict.fromkeys(re.findall(r"`([\w.]+)`", marks), stage.lower()))
    return stages


def test_stages_are_those_of_the_architecture() -> None:
    stages = table_of_stages()
    assert len(stages) > 10
    assert {mark: stage_of("fence" if mark.endswith(".fence") else "write", mark) for mark in stages} == stages
    assert stage_of("guest", "write") == "guest"
    assert stage_of("write", "") == stage_of("truncate", "grow") == "other"


def test_overlapping_guest_operations_get_lanes_of_their_own() -> None:
    entries = [
        ReportEntry("guest", "flush", until=4),
        ReportEntry("guest", "write", until=2),
        ReportEntry("guest", "write", until=3),
        ReportEntry("guest", "zero"),
        ReportEntry("fence", "link.fence"),
    ]
    page = render(replace(report_samples.clean(), runs=[ReportRun("overlap", entries)]))
    assert re.findall(r'class="bar (\w+)( open)?" style="--lane:(\d)', page) == [
        ("flush", "", "0"),
        ("write", "", "1"),
        ("write", "", "1"),
        ("zero", " open", "1"),
    ]


def test_points_without_a_count_have_no_states() -> None:
    entries = [ReportEntry("write", "data.write")] * 3
    page = render(replace(report_samples.clean(), runs=[ReportRun("short", entries, [5])]))
    assert '"states": [5, 0, 0]' in page
    assert ">5 states<" in page


def test_long_stretches_of_old_sectors_are_one_note() -> None:
    words = ["old"] * (20 * SECTORS_PER_ROW)
    words[5 * SECTORS_PER_ROW + 3] = "lost"
    violation = replace(report_samples.violation("C2", "", 0), sectors=words)
    page = render(replace(report_samples.clean(), violations=[violation]))
    assert page.count(" sectors, all old") == 2
    assert f'title="sector {5 * SECTORS_PER_ROW + 3}: lost"' in page
    assert page.count('title="sector ') == SECTORS_PER_ROW


def test_the_edges_of_what_may_be_given() -> None:
    nothing = Report(command="", seed=None, models=[], states=0, distinct=0, seconds=0.0)
    assert "No violation" in render(nothing)
    assert "exhaustive" in render(nothing)
    bare = ReportViolation("C1", "kill", "", [], "")
    empty = replace(nothing, runs=[ReportRun("", [])], violations=[bare, replace(bare, run="", point=10**9)], sampled=3)
    page = render(empty)
    assert "2 violations" in page
    assert "sampled" in page


def test_one_long_run_stays_a_page_that_a_browser_takes() -> None:
    page = render(report_samples.broken(5000))
    assert len(page) < 1_000_000


def test_hostile_text_is_text() -> None:
    page = render(report_samples.hostile())
    assert "<img" not in page
    assert "document.title=" not in re.sub(r"&lt;script&gt;document.title|\\u003cscript\\u003edocument.title", "", page)
    assert page.count("<script") == page.count("</script>") == 2
    assert "{{ 7*7 }}" in page


def test_the_page_asks_the_network_for_nothing() -> None:
    page = render(report_samples.broken())
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)


def test_it_is_written_as_utf8(tmp_path: Path) -> None:
    write_report(replace(report_samples.clean(), subject="größer"), tmp_path / "report.html")
    assert "größer" in (tmp_path / "report.html").read_bytes().decode()


def test_without_jinja2_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(
        name: str,
        variables: Mapping[str, object] | None = None,
        local: Mapping[str, object] | None = None,
        names: Sequence[str] = (),
        level: int = 0,
    ) -> object:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, variables, local, names, level)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Invalid, match=re.escape("pip install 'cowfence[report]'")):
        render(report_samples.clean())


def test_the_module_does_not_import_jinja2() -> None:
    program = "import cowfence.crash.report, sys; print('jinja2' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
