"""``cowfence measure``: how large a new image would be; options, words and exit codes are those of ``qemu-img measure``."""

from __future__ import annotations

import argparse
from functools import partial

from cowfence.cli.create_options import parse_options
from cowfence.cli.main import add_output_option, add_reference_options, print_json, size_bytes
from cowfence.cli.secrets import add_secret_options, secret_named
from cowfence.cli.sources import add_source_options, open_source
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.measure import measure


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="format of the source")
    parser.add_argument("-O", dest="target_format", default="raw", metavar="FORMAT", help="of the new image (default: raw)")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="of the new image")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="measure this internal snapshot, by id or name")
    parser.add_argument("--size", type=size_bytes, metavar="SIZE", help="of the disk, instead of a source")
    add_source_options(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("sources", nargs="*", metavar="SOURCE")


def run(arguments: argparse.Namespace) -> int:
    source = _source(arguments)
    if arguments.target_format not in ("qcow2", "raw"):
        raise Unsupported(arguments.target_format, "size measurement for this format; here are qcow2 and raw")
    given = parse_options(arguments.options, source or "a new image", arguments.target_format)
    given.take("size", arguments.size, "The image size")
    options = given.create_options(partial(secret_named, arguments))
    if source is None:
        found = measure(options)
    else:
        disk = open_source(source, arguments, format_name=arguments.format, snapshot=arguments.snapshot)
        try:
            found = measure(options, disk)
        finally:
            disk.close()
    if arguments.output == "json":
        print_json(found.to_dict())
        return 0
    print(f"required size: {found.required_bytes}")
    print(f"fully allocated size: {found.full_bytes}")
    if found.bitmaps_bytes is not None:
        print(f"bitmaps size: {found.bitmaps_bytes}")
    return 0


def _source(arguments: argparse.Namespace) -> str | None:
    """The name of the image to measure; None: there is a size instead. Raises Invalid, in qemu-img's words."""
    if len(arguments.sources) > 1:
        raise Invalid("At most one filename argument is allowed.")
    if not arguments.sources and (arguments.image_opts or arguments.format is not None or arguments.snapshot is not None):
        raise Invalid("--image-opts, -f, and -l require a filename argument.")
    if not arguments.sources and arguments.size is None:
        raise Invalid("Either --size N or one filename must be specified.")
    if arguments.sources and arguments.size is not None:
        raise Invalid("--size N cannot be used together with a filename.")
    return arguments.sources[0] if arguments.sources else None
