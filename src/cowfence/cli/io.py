"""``cowfence-io``: qemu-io's command line and command language."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from cowfence import __version__
from cowfence.cli.io_commands import carry_out
from cowfence.cli.io_image import Image, Wish
from cowfence.cli.io_language import Quit, Session
from cowfence.cli.main import Parser, run_program
from cowfence.cli.secrets import add_secret_options
from cowfence.errors import CowfenceError, Invalid, Unsupported

_PROGRAM = "cowfence-io"


def entry(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default); returns the exit code: 1 if any command failed."""
    return run_program(_PROGRAM, _run, list(sys.argv[1:] if argv is None else argv))


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = Parser(prog=_PROGRAM, description="Exercise a disk. 'cowfence-io -c help' lists the commands.")
    made.add_argument("--image-opts", action="store_true", help="the file is given as driver=...,file.filename=...")
    made.add_argument("-c", "--cmd", dest="commands", action="append", default=[], metavar="STRING", help="carry this out")
    made.add_argument("-f", "--format", metavar="FMT", help="qcow2, raw or luks (default: qcow2 if it looks so)")
    made.add_argument("-r", "--read-only", action="store_true", help="open for reading only")
    made.add_argument("-s", "--snapshot", action="store_true", help="what is written is thrown away")
    made.add_argument("-n", "--nocache", action="store_true", help="around the page cache: -t none")
    made.add_argument("-C", "--copy-on-read", action="store_true", help="refused: there is none here")
    made.add_argument("-m", "--misalign", action="store_true", help="refused: buffers are aligned where they have to be")
    made.add_argument("-k", "--native-aio", action="store_true", help="refused: requests are carried out on threads")
    made.add_argument("-i", "--aio", metavar="MODE", default="threads", help="threads")
    made.add_argument("-t", "--cache", metavar="MODE", help="none, writeback, writethrough, directsync, unsafe")
    made.add_argument("-d", "--discard", metavar="MODE", default="unmap", help="unmap (on; default), ignore (off)")
    made.add_argument("-T", "--trace", metavar="PATTERN", help="refused: there is no tracing here")
    made.add_argument("-U", "--force-share", action="store_true", help="beside another writer")
    made.add_argument("-V", "--version", action="version", version=f"{_PROGRAM} {__version__}")
    made.set_defaults(program=_PROGRAM)
    add_secret_options(made)
    made.add_argument("file", nargs="?")
    return made


def _run(words: list[str]) -> int:
    arguments = parser().parse_args(words)
    for given, option in (
        (arguments.copy_on_read, "-C"),
        (arguments.misalign, "-m"),
        (arguments.native_aio, "-k"),
        (arguments.trace is not None, "-T"),
    ):
        if given:
            raise Unsupported(_PROGRAM, f"the option {option}")
    if arguments.aio != "threads":
        raise Invalid(f"Invalid aio option: {arguments.aio}")
    if arguments.image_opts and arguments.format is not None:
        raise Invalid("--image-opts and -f are mutually exclusive")
    session = Session(_PROGRAM, lambda wish: Image(wish, arguments))
    try:
        if arguments.file is not None:
            _open(session, arguments)
        good = True
        try:
            for line in arguments.commands or _typed():
                good &= carry_out(session, line)
        except Quit:
            pass
    finally:
        session.close()
    return 0 if good else 1


def _open(session: Session, arguments: argparse.Namespace) -> None:
    wish = Wish(
        arguments.file,
        arguments.format,
        described=arguments.image_opts,
        writable=not arguments.read_only,
        temporary=arguments.snapshot,
        cache=arguments.cache or ("none" if arguments.nocache else "writeback"),
        discard=arguments.discard,
        force_share=arguments.force_share,
    )
    try:
        session.image = session.opened(wish)
    except CowfenceError as error:
        raise Invalid(f"can't open device {arguments.file}: {error}") from None


def _typed() -> Iterator[str]:
    """The lines of standard input, asked for one by one."""
    while True:
        print(f"{_PROGRAM}> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


if __name__ == "__main__":
    sys.exit(entry())
