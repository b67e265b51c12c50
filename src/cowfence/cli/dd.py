"""``cowfence dd``: copy a range of a disk into a new image, with the operands of ``qemu-img dd``.

Unlike qemu-img 7.2, ``count`` counts what is copied, after what was skipped.
"""

from __future__ import annotations

import argparse

from cowfence.cli.formats import add_format_option, source_format
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options, secrets_of
from cowfence.errors import Invalid
from cowfence.ops.dd import dd
from cowfence.units import parse_size

_OPERANDS = ("if", "of", "bs", "count", "skip")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(quiet=False)
    add_format_option(parser)
    parser.add_argument("-O", dest="target_format", choices=("qcow2", "raw"), default="raw", help="(default: raw)")
    parser.add_argument("-U", "--force-share", action="store_true", help="read an image that another process writes to")
    add_progress_option(parser)
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument(
        "operands", nargs="*", metavar="OPERAND", help="if=FILE, of=FILE, bs=SIZE (default: 512), count=BLOCKS, skip=BLOCKS"
    )


def run(arguments: argparse.Namespace) -> int:
    given = _operands(arguments.operands)
    if "if" not in given or "of" not in given:
        raise Invalid("must specify both input and output files: if=FILE of=FILE")
    source = given["if"]
    rehearsal = rehearsal_of(arguments)
    with shown(arguments) as progress:
        copied = dd(
            source,
            given["of"],
            format=source_format(arguments, source),
            target_format=arguments.target_format,
            block_bytes=_number(given, "bs", "512"),
            count=_number(given, "count") if "count" in given else None,
            skip=_number(given, "skip", "0"),
            refs=references(arguments, source),
            force_share=arguments.force_share,
            assume_backing_format=arguments.assume_backing_format,
            secrets=secrets_of(arguments),
            rehearsal=rehearsal,
            progress=progress,
        )
    if rehearsal is not None:
        return tell(arguments, rehearsal, copied.to_dict())
    if arguments.output == "json":
        print_json(copied.to_dict())
    return 0


def _operands(words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _OPERANDS or not equals:
            raise Invalid(f"unrecognized operand {word!a}; there are {', '.join(f'{name}=' for name in _OPERANDS)}")
        if name in given:
            raise Invalid(f"{name}= is given twice")
        given[name] = value
    return given


def _number(given: dict[str, str], name: str, default: str = "") -> int:
    try:
        return parse_size(given.get(name, default))
    except ValueError as error:
        raise Invalid(f"{name}=: {error}") from None
