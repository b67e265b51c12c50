"""``cowfence rebase``: put an image over another backing file, with the options and words of ``qemu-img rebase``.

The disk stays what it is; with ``-u`` only the name changes. ``-b ""`` makes an image that needs no other file.
"""

from __future__ import annotations

import argparse

from cowfence.cli.formats import source_format
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options, secrets_of
from cowfence.disk.opener import printable
from cowfence.errors import Invalid, Unsupported


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument("-b", dest="backing", metavar="FILE", help="the new backing file, as the image shall name it")
    parser.add_argument("-F", dest="backing_format", metavar="FORMAT", help="its format: qcow2, raw or luks")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="change the name only: the disk may be another one then")
    add_progress_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.rebase import rebase

    image = arguments.image
    if arguments.backing is None and not arguments.unsafe:
        raise Invalid("Must specify backing file (-b) or use unsafe mode (-u)")
    if source_format(arguments, image) != "qcow2":
        raise Unsupported(printable(image), "a backing file below a raw image")
    rehearsal = rehearsal_of(arguments)
    with shown(arguments) as progress:
        done = rebase(
            image,
            arguments.backing or None,
            backing_format=arguments.backing_format,
            unsafe=arguments.unsafe,
            refs=references(arguments, image),
            assume_backing_format=arguments.assume_backing_format,
            secrets=secrets_of(arguments),
            progress=progress,
            rehearsal=rehearsal,
        )
    if rehearsal is not None:
        return tell(arguments, rehearsal, done.to_dict())
    if arguments.output == "json":
        print_json(done.to_dict())
    return 0
