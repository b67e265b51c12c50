"""``cowfence completion``: a script for a shell, made of the same parsers as ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cowfence.cli.main import COMMANDS, add_output_option, print_json, whole_parser
from cowfence.errors import Unsupported

_PROGRAMS = ("cowfence", "cowfence-img", "cowfence-io", "cowfence-nbd")
_FILE_WORDS = ("FILE", "PATH", "IMAGE", "DIRECTORY")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--for",
        dest="for_program",
        choices=_PROGRAMS,
        default="cowfence",
        metavar="PROGRAM",
        help=f"one of {', '.join(_PROGRAMS)} (default: cowfence)",
    )
    add_output_option(parser)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise Unsupported("completion", "making scripts without the library shtab (pip install 'cowfence[shell]')") from None
    parser = parser_of(arguments.for_program)
    for action in _actions(parser):
        named = (action.metavar or action.dest) if isinstance(action.metavar or action.dest, str) else ""
        positional = not action.option_strings and action.nargs != argparse.PARSER
        if not action.choices and (positional or str(named).upper().rstrip(".").endswith(_FILE_WORDS)):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell=arguments.shell)
    if arguments.output == "json":
        print_json({"program": arguments.for_program, "shell": arguments.shell, "script": script})
    else:
        print(script)
    return 0


def parser_of(program: str) -> argparse.ArgumentParser:
    """With all options of all subcommands."""
    if program == "cowfence-io":
        from cowfence.cli.io import parser as io_parser

        return io_parser()
    if program == "cowfence-nbd":
        from cowfence.cli.nbd import parser as nbd_parser

        return nbd_parser()
    if program == "cowfence-img":
        from cowfence.cli.img import NAMES

        return whole_parser(program, {name: COMMANDS[name] for name in NAMES}, lambda _: True)[0]
    return whole_parser(program, COMMANDS, lambda _: True)[0]


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for chosen in action.choices.values():
                yield from _actions(chosen)
        else:
            yield action
