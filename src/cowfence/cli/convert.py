"""``cowfence convert``: a disk into a new image, with those options of ``qemu-img convert`` that concern raw and qcow2."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from cowfence.cli.create_options import OPTIONS, parse_options, wants_help
from cowfence.cli.formats import add_format_option, source_format
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references, size_bytes
from cowfence.cli.secrets import add_secret_options, secret_named, secrets_of
from cowfence.errors import Invalid
from cowfence.units import KIB

_SHOWN_EACH_SECONDS = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    add_format_option(parser)
    parser.add_argument("-O", dest="target_format", choices=("qcow2", "raw"), default="raw", help="(default: raw)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS", help="of the new image; see -o help"
    )
    parser.add_argument("-c", dest="compress", action="store_true", help="compress (qcow2)")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="convert this internal snapshot, by id or name")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("-m", dest="threads", type=int, metavar="N", help="threads, 1 to 16 (default: twice the cores)")
    parser.add_argument("-W", dest="out_of_order", action="store_true", help="place data as it comes")
    parser.add_argument(
        "-S",
        dest="sparse",
        type=size_bytes,
        default=4 * KIB,
        metavar="SIZE",
        help="zeros that make a hole (default: 4k; 0: none)",
    )
    parser.add_argument("-U", "--force-share", action="store_true", help="read an image that another process writes to")
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("source")
    parser.add_argument("target", nargs="?")


def run(arguments: argparse.Namespace) -> int:
    if wants_help(arguments.options):
        for option, line in OPTIONS.items():
            print(f"  {option:<28} - {line}")
        return 0
    from cowfence.ops.convert import convert

    if arguments.target is None:
        raise Invalid("must specify the image to make")
    if arguments.threads is not None and not 1 <= arguments.threads <= 16:
        raise Invalid("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
    given = parse_options(arguments.options, arguments.target)
    shows = arguments.progress and not arguments.quiet
    converted = convert(
        arguments.source,
        arguments.target,
        given.create_options(arguments.target_format, partial(secret_named, arguments)),
        format=source_format(arguments, arguments.source),
        snapshot=arguments.snapshot,
        compress=arguments.compress,
        sparse_bytes=arguments.sparse,
        threads=arguments.threads,
        in_order=not arguments.out_of_order,
        refs=references(arguments, arguments.source),
        force_share=arguments.force_share,
        assume_backing_format=arguments.assume_backing_format,
        secrets=secrets_of(arguments),
        progress=_shown() if shows else None,
    )
    if shows:
        print()
    if arguments.output == "json":
        print_json(converted.to_dict())
    return 0


def _shown() -> Callable[[int, int], None]:
    """qemu-img's line; on a terminal with the rate and the time that is left."""
    began = last = time.monotonic()
    terminal = sys.stdout.isatty()

    def show(done: int, size: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SHOWN_EACH_SECONDS and done < size:
            return
        last = now
        share = done / size if size else 1.0
        text = f"    ({share * 100:.2f}/100%)"
        if terminal and done and now > began:
            rate = done / (now - began)
            text += f"  {rate / (1 << 20):,.0f} MiB/s  {(size - done) / rate:.0f} s left "
        print(text, end="\r", flush=True)

    return show
