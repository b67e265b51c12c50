"""The ``cowfence`` command: finds the subcommand, imports only that one, and turns errors into one line.

A subcommand is a module ``cowfence.cli.<name>`` with two functions: ``configure(parser)`` adds its arguments,
``run(arguments)`` does the work and returns the exit code. Its line in ``COMMANDS`` is what ``cowfence --help`` shows, so that
help imports none of them.

Exit codes: 0 and 1 as everywhere, mistakes in the command line too (2 and 3 mean something in ``check``, as in qemu-img);
130 after Ctrl-C; 141 where the reader of our output went away, as a program killed by SIGPIPE has.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, cast

from cowfence import __version__
from cowfence.errors import CowfenceError, Invalid
from cowfence.units import MAX_SIZE_BYTES, TooLarge, parse_size

if TYPE_CHECKING:
    from cowfence.disk.opener import Refs

COMMANDS: Final[dict[str, str]] = {
    "amend": "change the version, the refcounts or the size of an image",
    "bench": "time requests to an image",
    "bitmap": "change persistent dirty bitmaps, or list what one recorded",
    "check": "check an image, and repair it",
    "commit": "write an image's changes into its backing file",
    "compact": "make the file of an image shorter, in place",
    "compare": "compare the disks of two images",
    "completion": "print what lets a shell complete this program's words",
    "convert": "convert a disk into a new image",
    "crash": "judge what a crash can leave of an image",
    "create": "create an image",
    "ctl": "ask or change what is being served",
    "dd": "copy a range of a disk into a new image",
    "diff": "show where two images, or two states of one, differ",
    "explain": "say what an offset of an image is, and what leads to it",
    "info": "describe an image",
    "inspect": "give a verdict on an image that somebody else made",
    "map": "show where the bytes of a disk stand",
    "measure": "show how large a new image would be",
    "rebase": "put an image over another backing file",
    "repair": "plan a repair, make it, or take it back",
    "resize": "make a disk longer or shorter",
    "serve": "serve a disk over NBD",
    "snapshot": "list, create, apply or delete internal snapshots",
}
"""Name and one line of help of each subcommand; a ``-`` in the name is a ``_`` in the module's."""

_WITH_SUBCOMMANDS: Final = ("crash", "ctl")
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141


class Command(Protocol):
    """What a subcommand's module provides."""

    def configure(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


class _Formatter(argparse.HelpFormatter):
    """Asks for the terminal's width itself: argparse loads ``shutil`` for it, at each start and not only for help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_terminal_columns() - 2)


def _terminal_columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all others: one line ``prog: message``, exit code 1."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_FAILED, f"{self.prog}: {message}; see {self.prog} --help\n")


def entry(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default); returns the exit code. Prints no traceback for what users can cause."""
    return entry_of("cowfence", COMMANDS, argv)


def entry_of(program: str, commands: Mapping[str, str], argv: Sequence[str] | None = None) -> int:
    """The same under another name, with some of the subcommands."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_program(program, lambda given: _run(program, commands, given), words)


def run_program(program: str, run: Callable[[list[str]], int], words: list[str]) -> int:
    """Run a command line to its exit code: errors that users can cause are one line, whatever the program."""
    # numpy's linear algebra, which nothing here uses, would start threads that spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _open_standard_streams()
    try:
        code = run(words)
        # Here, not at exit: a full disk or a closed pipe has to reach the code below.
        sys.stdout.flush()
    except CowfenceError as error:
        return _complain(program, str(error))
    except BrokenPipeError:
        _drop_unwritable_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _drop_unwritable_output()
        return _complain(program, str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def _run(program: str, commands: Mapping[str, str], words: list[str]) -> int:
    if words and words[0] in commands and words[0] not in _WITH_SUBCOMMANDS:
        # Options may stand behind names, as getopt has it.
        name = words[0]
        alone = Parser(prog=f"{program} {name}", description=commands[name])
        chosen_command = cast("Command", importlib.import_module(f"cowfence.cli.{name.replace('-', '_')}"))
        chosen_command.configure(alone)
        alone.set_defaults(program=program)
        return chosen_command.run(alone.parse_intermixed_args(words[1:]))
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser, found = whole_parser(program, commands, lambda name: name == chosen)
    arguments = parser.parse_args(words)
    assert chosen is not None  # argparse refuses a command that is not in the table.
    return found[chosen].run(arguments)


def whole_parser(
    program: str, commands: Mapping[str, str], wanted: Callable[[str], bool]
) -> tuple[argparse.ArgumentParser, dict[str, Command]]:
    """The parser of a program with its subcommands, and the modules of those that are ``wanted``: only they have options."""
    parser = Parser(prog=program, description="A crash-safe QCOW2 engine.")
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    # With `prog` given, argparse need not format the usage now, which would load more of the library.
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser, prog=parser.prog)
    found: dict[str, Command] = {}
    for name, line in commands.items():
        subparser = subparsers.add_parser(name, help=line, description=line)
        if wanted(name):
            command = cast("Command", importlib.import_module(f"cowfence.cli.{name.replace('-', '_')}"))
            command.configure(subparser)
            subparser.set_defaults(program=program)
            found[name] = command
    return parser, found


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """``--output``, for every subcommand that has a result to print."""
    parser.add_argument("--output", choices=("human", "json"), default="human", help="form of the result (default: human)")


def add_reference_options(parser: argparse.ArgumentParser) -> None:
    """``--ref-root``, ``--untrusted`` (see ``references``) and ``--assume-backing-format``, for subcommands that open the files
    that an image names."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--ref-root",
        action="append",
        default=[],
        metavar="DIR",
        help="also open backing files under DIR (default: only under the image's own directory)",
    )
    group.add_argument("--untrusted", action="store_true", help="open no file that an image names")
    parser.add_argument(
        "--assume-backing-format",
        choices=("qcow2", "raw", "luks"),
        help="format of backing files for images that record none (default: such images are refused)",
    )


def references(arguments: argparse.Namespace, image: str) -> Refs:
    """The policy that the options of ``add_reference_options`` ask for."""
    from cowfence.disk.opener import Refs

    if arguments.untrusted:
        return Refs.none()
    if arguments.ref_root:
        return Refs.under(os.path.dirname(os.path.abspath(image)), *arguments.ref_root)
    return Refs.beside(image)


def size_bytes(text: str) -> int:
    """The type of arguments that are sizes: ``64k``, ``1.5G``; argparse shows what is wrong."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size_within(text: str, what: str, *, least: int = 0, most: int = MAX_SIZE_BYTES) -> int:
    """Bytes from a size that is ``least`` to ``most``. Raises Invalid, in qemu-img's words; ``what`` is its name there."""
    try:
        found = parse_size(text)
    except TooLarge:
        found = most + 1
    except ValueError:
        raise Invalid(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for kilobytes, megabytes, gigabytes, "
            "terabytes, petabytes and exabytes."
        ) from None
    if not least <= found <= most:
        raise Invalid(f"Invalid {what} specified. Must be between {least} and {most}.")
    return found


def size_option(text: str, name: str) -> int:
    """The value of an option of a format that is a size, in bytes. Raises Invalid, in qemu-img's words."""
    try:
        return parse_size(text)
    except TooLarge as error:
        raise Invalid(str(error)) from None
    except ValueError:
        raise Invalid(f"Parameter '{name}' expects a non-negative number below 2^64") from None


def print_json(value: object) -> None:
    """As ``qemu-img`` prints JSON: four spaces, ASCII, an empty list on two lines. Bytes that are no UTF-8 become U+FFFD."""
    import json
    import re

    # No string is met: its line ends with a quotation mark.
    print(re.sub(r"(?m)^( *)(.*)\[\](,?)$", r"\1\2[\n\1]\3", json.dumps(_valid_text(value), indent=4)))


def _valid_text(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _valid_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_valid_text(item) for item in value]
    return value


def _open_standard_streams() -> None:
    """Where one was closed by who started us, it leads nowhere: else the next file that is opened would take its place."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free: this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the program runs
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _drop_unwritable_output() -> None:
    """Send what is still buffered nowhere if it cannot be written: the interpreter would try, and complain, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def one_line(text: str) -> str:
    """``text`` with names out of an image, or of a user's, in it: on one line that steers no terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def complain(arguments: argparse.Namespace, message: str, code: int = EXIT_FAILED) -> int:
    """One line on stderr, under the name of the program that runs. Returns the exit code ``code``."""
    return _complain(arguments.program, message, code)


def _complain(program: str, message: str, code: int = EXIT_FAILED) -> int:
    print(f"{program}: {one_line(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(entry())
