"""``cowfence resize``: make a disk longer or shorter, with the options and words of ``qemu-img resize``.

The image keeps its size until all that would show in the new part is gone, durably; a shorter disk needs ``--shrink``.
"""

from __future__ import annotations

import argparse
import re

from cowfence.cli.formats import looked_at
from cowfence.cli.main import add_output_option, add_reference_options, complain, print_json, references, size_option
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import add_image_opts_option, local_file, secrets_for
from cowfence.disk.opener import printable
from cowfence.errors import Unsupported


def configure(parser: argparse.ArgumentParser) -> None:
    # "-1M" is a size here, as in qemu-img.
    parser._negative_number_matcher = re.compile(r"^-\.?\d")
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument("--shrink", action="store_true", help="the disk may become shorter: what lies behind its end is gone")
    parser.add_argument(
        "--preallocation",
        default="off",
        metavar="MODE",
        help="of what is new: off (default), metadata, falloc (host space is reserved), full (and written)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_image_opts_option(parser)
    add_progress_option(parser)
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")
    parser.add_argument("size", help="such as 10G, or +1G or -1G to add or take away")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.resize import resize

    source = local_file(arguments.image, arguments)
    image = source.name
    sign, digits = (arguments.size[0], arguments.size[1:]) if arguments.size[:1] in ("+", "-") else ("", arguments.size)
    size_bytes = size_option(digits, "size")
    format_name = source.format or looked_at(image, arguments)
    if format_name == "luks":
        raise Unsupported(printable(image), "resizing a LUKS file: its new part would not read as zeros")
    if source.format is None and format_name == "raw":
        complain(arguments, f"warning: Image format was not specified for '{printable(image)}' and probing guessed raw.")
    rehearsal = rehearsal_of(arguments)
    with shown(arguments) as progress:
        done = resize(
            image,
            size_bytes,
            relative={"+": 1, "-": -1, "": 0}[sign],
            format=format_name,
            shrink=arguments.shrink,
            preallocation=arguments.preallocation,
            refs=references(arguments, image),
            assume_backing_format=arguments.assume_backing_format,
            secrets=secrets_for(source, arguments),
            rehearsal=rehearsal,
            progress=progress,
        )
    if rehearsal is not None:
        return tell(arguments, rehearsal, done.to_dict())
    if arguments.quiet:
        return 0
    if arguments.output == "json":
        print_json(done.to_dict())
    else:
        print("Image resized.")
    return 0
