"""``cowfence create``: create an image, with the options of ``qemu-img create``. The default format is qcow2."""

from __future__ import annotations

import argparse
from functools import partial

from cowfence.cli.create_options import OPTIONS, parse_options, wants_help
from cowfence.cli.main import add_output_option, print_json, size_bytes
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options, secret_named
from cowfence.disk.opener import printable
from cowfence.ops.create import Created, create


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), default="qcow2", help="format (default: qcow2)")
    parser.add_argument("-b", dest="backing", metavar="FILE", help="backing file, relative to the new image; needs -F")
    parser.add_argument("-F", dest="backing_format", choices=("qcow2", "raw", "luks"), help="format of the backing file")
    parser.add_argument("-u", dest="unseen", action="store_true", help="do not open the backing file")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="NAME=VALUE,...", help="options of the format; -o help"
    )
    parser.add_argument("-q", dest="quiet", action="store_true", help="print nothing but errors")
    add_dry_run_option(parser)
    add_output_option(parser)
    add_secret_options(parser)
    parser.add_argument("image")
    parser.add_argument("size", nargs="?", type=size_bytes, help="such as 10G; default: that of the backing file")


def run(arguments: argparse.Namespace) -> int:
    if wants_help(arguments.options):
        print("Supported options:")
        for name, help_text in OPTIONS.items():
            print(f"  {name:<24} - {help_text}")
        return 0
    given = parse_options(arguments.options, arguments.image)
    given.take("size", arguments.size, "the size")
    given.take("backing_file", arguments.backing, "the backing file")
    given.take("backing_fmt", arguments.backing_format, "the backing format")
    rehearsal = rehearsal_of(arguments)
    made = create(
        arguments.image,
        given.create_options(arguments.format, partial(secret_named, arguments)),
        open_backing=not arguments.unseen,
        rehearsal=rehearsal,
    )
    if rehearsal is not None:
        return tell(arguments, rehearsal, made.to_dict())
    if arguments.quiet:
        return 0
    if arguments.output == "json":
        print_json(made.to_dict())
    else:
        print(_line(made, given.value("size"), given.texts))
    return 0


def _line(made: Created, asked_size: object, texts: dict[str, str]) -> str:
    """The line that ``qemu-img create`` prints: names and order are its own."""
    options = made.options
    size = made.size_bytes if asked_size is None else asked_size
    found: dict[str, object] = {"fmt": options.format}
    found |= {name: text for name, text in texts.items() if name.startswith("encrypt.")}
    if options.format == "raw":
        found["size"] = size
        if "preallocation" in texts:
            found["preallocation"] = options.preallocation
    else:
        found |= {"cluster_size": options.cluster_bytes, "extended_l2": "on" if options.extended_l2 else "off"}
        if "preallocation" in texts:
            found["preallocation"] = options.preallocation
        found |= {"compression_type": options.compression_type, "size": size}
        if "compat" in texts:
            found["compat"] = texts["compat"]
        if options.backing is not None:
            found |= {"backing_file": printable(options.backing), "backing_fmt": options.backing_format}
        if options.data_file is not None:
            found |= {"data_file": printable(options.data_file)}
            if "data_file_raw" in texts:
                found |= {"data_file_raw": "on" if options.data_file_raw else "off"}
        found |= {"lazy_refcounts": "on" if options.lazy_refcounts else "off", "refcount_bits": options.refcount_bits}
    return f"Formatting '{printable(made.path)}', " + " ".join(f"{name}={value}" for name, value in found.items())
