"""Write the manual pages: one for each program and subcommand, made of the same parsers as ``--help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from argparse_manpage.manpage import Manpage

from cowfence import __version__
from cowfence.cli.completion import parser_of
from cowfence.cli.main import COMMANDS


def pages() -> dict[str, str]:
    """Name of the file, and its text."""
    found: dict[str, str] = {}
    for program in ("cowfence", "cowfence-img", "cowfence-io", "cowfence-nbd"):
        parser = parser_of(program)
        found[f"{program}.1"] = _page(parser, parser.description or program)
        if program == "cowfence":
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    for name, chosen in action.choices.items():
                        found[f"cowfence-{name}.1"] = _page(chosen, COMMANDS[name])
    return found


def _page(parser: argparse.ArgumentParser, line: str) -> str:
    # argparse-manpage reads these from the parser.
    parser.man_short_description = line  # type: ignore[attr-defined]
    data = {"project_name": "cowfence", "version": __version__, "prog": parser.prog, "manual_title": "cowfence manual"}
    return str(Manpage(parser, _data=data))


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
