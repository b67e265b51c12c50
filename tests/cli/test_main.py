"""The command line's frame: errors, exit codes, lazy imports."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfence.cli import main
from cowfence.disk.opener import Place
from cowfence.errors import Corrupt, Refused

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], int]], None]:
    """Installs ``cowfence try-it [--number N]`` with a body."""

    def install(body: Callable[[argparse.Namespace], int]) -> None:
        module = types.ModuleType("cowfence.cli.try_it")

        def configure(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--number", type=int)
            main.add_output_option(parser)
            main.add_reference_options(parser)

        vars(module).update(configure=configure, run=body)
        monkeypatch.setitem(sys.modules, "cowfence.cli.try_it", module)
        monkeypatch.setitem(main.COMMANDS, "try-it", "tries it")
        monkeypatch.setitem(main.COMMANDS, "broken", "has no module")

    return install


Install = Callable[[Callable[[argparse.Namespace], int]], None]


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def body(_arguments: argparse.Namespace) -> int:
        raise error

    return body


def test_only_the_chosen_command_is_imported(command: Install) -> None:
    seen: list[int] = []

    def body(arguments: argparse.Namespace) -> int:
        seen.append(arguments.number)
        return 3

    command(body)
    assert main.entry(["try-it", "--number", "7"]) == 3
    assert seen == [7]


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (Corrupt("a: header", "is bad"), "cowfence: a: header: is bad\n", 1),
        (Corrupt("a\n\x1b[2J", "é"), "cowfence: a\\n\\x1b[2J: é\n", 1),
        (PermissionError(13, "Permission denied", "x"), "cowfence: [Errno 13] Permission denied: 'x'\n", 1),
        (KeyboardInterrupt(), "", 130),
    ],
)
def test_errors_are_one_line(
    command: Install, capsys: pytest.CaptureFixture[str], error: BaseException, line: str, code: int
) -> None:
    command(raising(error))
    assert main.entry(["try-it"]) == code
    assert capsys.readouterr().err == line


def test_defects_of_ours_are_not_hidden(command: Install) -> None:
    command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main.entry(["try-it"])


@pytest.mark.parametrize("words", [[], ["nothing"], ["try-it", "--number", "x"], ["try-it", "--num", "1"], ["try-it", "more"]])
def test_mistakes_in_the_command_line_are_exit_code_1(
    command: Install, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    command(lambda _arguments: 0)
    with pytest.raises(SystemExit) as caught:
        main.entry(words)
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("cowfence")
    assert message.count("\n") == 1


def test_help_and_version_import_no_command(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _arguments: 0)
    for words in (["--help"], ["--version"], ["try-it", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main.entry(words)
        assert caught.value.code == 0
    assert "tries it" in capsys.readouterr().out


def test_reference_options(command: Install, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/top", "a/base", "other"):
        (tmp_path / name).write_text("")
    image = str(tmp_path / "a/top")

    def body(arguments: argparse.Namespace) -> int:
        fd = os.open(image, os.O_RDONLY)
        place = Place.of_top(fd, image)
        os.close(fd)
        opened = 0
        for reference in ("base", "../other"):
            try:
                os.close(main.references(arguments, image).follow(reference, place).fd)
            except Refused:
                continue
            opened += 1
        return opened

    command(body)
    assert main.entry(["try-it", "--untrusted"]) == 0
    assert main.entry(["try-it"]) == 1
    assert main.entry(["try-it", "--ref-root", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("lines", "output", "code", "err"),
    [
        (1000000, "| head -c 1 >/dev/null", 141, ""),
        (1000000, ">/dev/full", 1, "cowfence: "),
        (1, ">/dev/full", 1, "cowfence: "),
    ],
)
def test_output_that_cannot_be_written(lines: int, output: str, code: int, err: str) -> None:
    program = (
        "import sys, types; from cowfence.cli import main; m = types.ModuleType('m'); m.configure = lambda parser: None; "
        "m.run = lambda a: print('x\\n' * LINES) or 0; sys.modules['cowfence.cli.big'] = m; main.COMMANDS['big'] = ''; "
        "sys.exit(main.entry(['big']))"
    ).replace("LINES", str(lines))
    done = subprocess.run(
        ["bash", "-c", f'"$1" -c "$2" {output}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") == bool(err)
