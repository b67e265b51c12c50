"""``cowfence map``: where the bytes of a disk stand, in the words of ``qemu-img map``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from cowfence.cli.formats import add_format_option, source_format
from cowfence.cli.main import add_output_option, add_reference_options, size_within
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import add_image_opts_option, open_source, parse_source
from cowfence.disk.opener import printable
from cowfence.errors import Unsupported
from cowfence.ops.map import MapEntry, map_disk


def configure(parser: argparse.ArgumentParser) -> None:
    add_format_option(parser)
    parser.add_argument("-s", "--start-offset", default="0", metavar="SIZE", help="where to begin")
    parser.add_argument("-l", "--max-length", metavar="SIZE", help="how much of the disk to show")
    add_image_opts_option(parser)
    parser.add_argument("-U", "--force-share", action="store_true", help="look at an image that another process writes to")
    parser.add_argument(
        "--html", metavar="FILE", help="write a picture of the file's layout there: what stands in each cluster"
    )
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    image = arguments.image
    start = size_within(arguments.start_offset, "start offset")
    length = None if arguments.max_length is None else size_within(arguments.max_length, "max length")
    source = parse_source(image, image_opts=arguments.image_opts)
    if arguments.html is not None:
        from cowfence.cli.map_page import write_page

        if (source.format or source_format(arguments, source.name)) != "qcow2":
            raise Unsupported(printable(image), "a picture of an image that is not qcow2")
        write_page(source.name, arguments.html, force_share=arguments.force_share)
        return 0
    disk = open_source(image, arguments, format_name=arguments.format)
    try:
        entries = map_disk(disk, source.name, start_offset=start, max_length_bytes=length)
    finally:
        disk.close()
    if arguments.output == "json":
        _print_json(entries, start)
    else:
        _print_human(entries, source.name)
    return 0


def _print_json(entries: tuple[MapEntry, ...], start_offset: int) -> None:
    import json

    # Of nothing, qemu-img shows one empty run.
    shown = entries or (MapEntry(start_offset, 0, 0, present=False, zero=False, data=False),)
    lines = [json.dumps(entry.to_dict()).replace("{", "{ ", 1) for entry in shown]
    print("[" + ",\n".join(lines) + "]")


def _print_human(entries: Iterable[MapEntry], image: str) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for entry in entries:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            raise Unsupported(
                printable(image), f"compressed or encrypted clusters in the human form (at {entry.start}); use --output=json"
            )
        name = printable(entry.filename or "")
        print(f"{_hex(entry.start):<16}{_hex(entry.length_bytes):<16}{_hex(entry.offset):<16}{name}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
