"""What is generated from the parsers: scripts for shells, and manual pages."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from cowfence.cli.completion import parser_of
from helpers_cli import ROOT
from helpers_cli import cowfence as command

pytest.importorskip("shtab")
pytest.importorskip("argparse_manpage")
_PROGRAMS = ["cowfence", "cowfence-img", "cowfence-io"]


@pytest.mark.parametrize("program", _PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_script_for_each_shell(program: str, shell: str) -> None:
    script = command("completion", "--for", program, shell).stdout
    assert program in script
    found = shutil.which(shell)
    if found is not None and shell != "tcsh":
        subprocess.run([found, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [("cowfence conv", "convert"), ("cowfence convert --eff", "--effort"), ("cowfence info --output ", "json")],
)
def test_bash_completes(tmp_path: Path, line: str, expected: str) -> None:
    script = tmp_path / "script"
    script.write_text(command("completion", "bash").stdout)
    words = line.split(" ")
    typed = " ".join(f"'{word}'" for word in words)
    told = subprocess.run(
        [
            "bash",
            "-c",
            f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
            f"_shtab_cowfence '{words[0]}' '{words[-1]}' '{words[-2]}'; echo ${{COMPREPLY[@]}}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in told.stdout.split()


def _man() -> ModuleType:
    spec = importlib.util.spec_from_file_location("man", ROOT / "scripts" / "man.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_has_every_option() -> None:
    pages = _man().pages()
    parser = parser_of("cowfence")
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for name, chosen in action.choices.items():
            page = pages[f"cowfence-{name}.1"].replace("\\-", "-")
            for found in chosen._actions:
                if isinstance(found, argparse._HelpAction) or found.help == argparse.SUPPRESS:
                    continue
                for option in found.option_strings:
                    assert option in page, (name, option)
    assert {f"{program}.1" for program in _PROGRAMS} <= pages.keys()


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_pages_have_no_warnings() -> None:
    for name, text in _man().pages().items():
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww"], input=text, capture_output=True, text=True, check=True)
        assert not done.stderr, name
