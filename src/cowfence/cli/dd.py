"""``cowfence dd``: copy a range of a disk into a new image, with the operands of ``qemu-img dd``.

Unlike qemu-img 7.2, ``count`` counts what is copied, after what was skipped.
"""

from __future__ import annotations

import argparse

from cowfence.cli.formats import add_format_option
from cowfence.cli.main import add_output_option, add_reference_options, print_json, size_within
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import add_image_opts_option, open_source, parse_source
from cowfence.errors import Invalid
from cowfence.ops.dd import MAX_BLOCK_BYTES, dd

_OPERANDS = ("if", "of", "bs", "count", "skip")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(quiet=False)
    add_format_option(parser)
    parser.add_argument("-O", dest="target_format", choices=("qcow2", "raw"), default="raw", help="(default: raw)")
    add_image_opts_option(parser)
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
    if not given.get("if") or not given.get("of"):
        raise Invalid("Must specify both input and output files")
    block_bytes = size_within(given.get("bs", "512"), "bs", least=1, most=MAX_BLOCK_BYTES)
    count = size_within(given["count"], "count") if "count" in given else None
    skip = size_within(given.get("skip", "0"), "skip")
    source = parse_source(given["if"], image_opts=arguments.image_opts).name
    disk = open_source(given["if"], arguments, format_name=arguments.format)
    rehearsal = rehearsal_of(arguments)
    try:
        with shown(arguments) as progress:
            copied = dd(
                disk,
                source,
                given["of"],
                target_format=arguments.target_format,
                block_bytes=block_bytes,
                count=count,
                skip=skip,
                rehearsal=rehearsal,
                progress=progress,
            )
    finally:
        disk.close()
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
            raise Invalid(f"unrecognized operand {name}")
        if name in given:
            raise Invalid(f"{name}= is given twice")
        given[name] = value
    return given
