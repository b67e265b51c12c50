"""``cowfence create``: create an image, with the options of ``qemu-img create``.

The default format is qcow2; under the names of QEMU's programs it is theirs, raw.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Final

from cowfence.cli.create_options import GivenOptions, help_lines, parse_options, wants_help
from cowfence.cli.formats import STRICT_PROGRAM
from cowfence.cli.main import add_output_option, print_json, size_within
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options, secret_named, secrets_by_id
from cowfence.errors import Invalid
from cowfence.ops.create import create, size_of_new

_LINE: Final = (
    "encryption",
    "encrypt.format",
    "encrypt.key-secret",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "encrypt.iter-time",
    "cluster_size",
    "extended_l2",
    "preallocation",
    "compression_type",
    "size",
    "compat",
    "backing_file",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
)
"""The order in which qemu-img names the options of a qcow2 image."""
_RAW_LINE: Final = ("size", "preallocation")
_NAMED_ALWAYS: Final = {
    "cluster_size": "65536",
    "extended_l2": "off",
    "compression_type": "zlib",
    "lazy_refcounts": "off",
    "refcount_bits": "16",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", dest="format", choices=("qcow2", "raw"), help="format (default: qcow2; of the programs named after QEMU's: raw)"
    )
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
    parser.add_argument("image", nargs="?")
    parser.add_argument("size", nargs="?", help="such as 10G; default: that of the backing file")


def run(arguments: argparse.Namespace) -> int:
    format_name = arguments.format or ("qcow2" if arguments.program == STRICT_PROGRAM else "raw")
    if wants_help(arguments.options):
        print(f"Supported {format_name} options:", *help_lines(format_name), sep="\n")
        return 0
    image = arguments.image
    if image is None:
        raise Invalid("Expecting image file name")
    # A secret that makes no sense is refused where the image needs none, too.
    secrets_by_id(arguments)
    given = parse_options(arguments.options, image, format_name)
    given.take("size", None if arguments.size is None else size_within(arguments.size, "image size"), "The image size")
    given.take("backing_file", arguments.backing, "Backing file")
    given.take("backing_fmt", arguments.backing_format, "Backing file format")
    given.set_size(
        size_of_new(
            image,
            given.number("size"),
            given.text("backing_file"),
            given.text("backing_fmt"),
            open_backing=not arguments.unseen,
        )
    )
    rehearsal = rehearsal_of(arguments)
    if rehearsal is None and arguments.output == "human" and not arguments.quiet:
        print(_line(given), flush=True)
    options = given.create_options(partial(secret_named, arguments))
    made = create(image, options, open_backing=False, rehearsal=rehearsal)
    if rehearsal is not None:
        return tell(arguments, rehearsal, made.to_dict())
    if arguments.output == "json" and not arguments.quiet:
        print_json(made.to_dict())
    return 0


def _line(given: GivenOptions) -> str:
    """The line that ``qemu-img create`` prints before it begins: names and order are its own."""
    shown = {name: given.shown(name, _NAMED_ALWAYS.get(name)) for name in (_RAW_LINE if given.format == "raw" else _LINE)}
    words = [f"{name}={text}" for name, text in shown.items() if text is not None]
    return " ".join((f"Formatting '{given.image}', fmt={given.format}", *words))
