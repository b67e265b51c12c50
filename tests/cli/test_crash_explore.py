"""``cowfence crash explore`` and ``replay``: exit codes, JSON, the table, the page; and no traceback for any line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cowfence.cli.main import entry
from crash.test_campaign import without_the_prepare_fence

QUICK = ["--limit", "64", "--jobs", "1"]
IMAGE = ["--images", "v3,c512,r16,t64"]
CASE = "v3,c512,r16,t64 | write:0+512 flush"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["crash", "explore", "--suite", "one", *IMAGE, *QUICK, "--budget", "3", "--seed", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["states"] >= found["distinct"] >= found["looks"] > 0
    assert found["violations"] == []
    assert found["seed"] == 5
    assert found["exhaustive"] is False
    assert set(found["suites"]) == {"one"}
    assert {"seconds", "states_per_second", "cases"} <= set(found)


def test_all_suites_within_the_time_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert entry(["crash", "explore", *QUICK, "--budget", "3", "--model", "power4096"]) == 0
    assert time.monotonic() - began < 8
    out = capsys.readouterr().out
    for suite in ("one", "backups", "nested", "interleaved", "faulted", "two", "three", "walks", "total"):
        assert f"\n{suite} " in out
    assert "power4096; seed 0" in out
    assert out.endswith("no violation\n")


def test_a_violation_and_its_replay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with without_the_prepare_fence():
        arguments = ["crash", "explore", "--suite", "one", *IMAGE, *QUICK, "--html", str(tmp_path / "r.html")]
        assert entry(arguments) == 2
        out = capsys.readouterr().out
        assert "C1 (power): " in out
        assert "replay: cowfence crash replay --limit 64 'power | v3,c512" in out
        assert entry([*arguments, "--json"]) == 2
        violation = json.loads(capsys.readouterr().out)["violations"][0]
        assert set(violation) == {"clause", "model", "operations", "edge", "replay"}
        line = violation["replay"].partition("'")[2].rstrip("'")
        assert entry(["crash", "replay", line, "--html", str(tmp_path / "one.html")]) == 2
        assert violation["edge"] in capsys.readouterr().out
    assert "fence is missing" in (tmp_path / "one.html").read_text()
    assert entry(["crash", "replay", line]) == 0
    assert capsys.readouterr().out.startswith("no violation (")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "kill",
        "sleep | " + CASE,
        "kill | v3",
        "kill | v9 | flush",
        "kill | c0 | flush",
        "kill | v3 | jump",
        "kill | v3 | write:0+511",
        "kill | v3 | write:0+1048576",
        "kill | v3 | flush | fault 1 EX once half",
        "kill | v3 | flush | fault 1 EIO once alf",
        "kill | v3 | flush | nested",
        "kill | v3 | flush | inside 0=flush",
        "kill | v3\n | \x1b[31m",
    ],
)
def test_a_malformed_replay_is_one_clear_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["crash", "replay", line]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("cowfence: ")
    assert "\x1b" not in shown.err


@pytest.mark.parametrize(
    "words",
    [["--suite", "four"], ["--budget", "nan"], ["--budget", "0"], ["--jobs", "0"], ["--seed", "-1"], ["--limit", "x"]],
)
def test_a_bad_option_is_one_clear_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        entry(["crash", "explore", *words])
    assert exit.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_that_cannot_be_written_fails_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    began = time.monotonic()
    assert entry(["crash", "explore", "--html", str(tmp_path / "none" / "r.html")]) == 1
    assert time.monotonic() - began < 3
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_ends_it_with_what_there_is() -> None:
    command = [sys.executable, "-m", "cowfence.cli.main", "crash", "explore", "--budget", "100", "--jobs", "2", "--limit", "64"]
    # Whoever started us in the background may have had Ctrl-C ignored; that would be inherited.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        time.sleep(6)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert err == ""
    assert process.returncode == 0
    assert "; interrupted" in out
    assert "\ntotal " in out
