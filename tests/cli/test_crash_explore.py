"""``cowfence crash explore`` and ``replay`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers_cli import cowfence

IMAGE = "v3,c512,r16,t64"


def test_explore_tells_what_was_judged() -> None:
    done = cowfence("crash", "explore", "--suite", "one", "--images", IMAGE, "--jobs", "1")
    assert "all of them judged" in done.stdout
    assert "no violations" in done.stdout


def test_json_is_one_object(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("--suite", "one", "--images", IMAGE, "--jobs", "1", "--model", "kill", "--json", "--html", str(page))
    found = json.loads(cowfence("crash", "explore", *words).stdout)
    assert found["violations"] == []
    assert found["exhaustive"] is True
    assert found["states"] >= found["distinct"] > 0
    assert "<html" in page.read_text()


def test_replay_of_a_sound_case() -> None:
    done = cowfence("crash", "replay", f"power | {IMAGE} | write:0+512 flush")
    assert done.stdout == "no violation\n"


@pytest.mark.parametrize("line", ["power", "power | v9x | flush", f"no | {IMAGE} | flush", f"kill | {IMAGE} | fly:0+512"])
def test_a_line_that_is_none(line: str) -> None:
    done = cowfence("crash", "replay", line, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--images", "nonsense"), ("--jobs", "0"), ("--limit", "0")])
def test_options_that_make_no_sense(words: tuple[str, str]) -> None:
    done = cowfence("crash", "explore", "--suite", "one", *words, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
