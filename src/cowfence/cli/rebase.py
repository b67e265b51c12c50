"""``cowfence rebase``: put an image over another backing file, with the options and words of ``qemu-img rebase``.

The disk stays what it is; with ``-u`` only the name changes. ``-b ""`` makes an image that needs no other file.
"""

from __future__ import annotations

import argparse

from cowfence.cli.formats import looked_at
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import CACHE_HELP, add_image_opts_option, goes_direct, local_file, secrets_for
from cowfence.disk.opener import printable
from cowfence.errors import Invalid, Unsupported


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument("-b", dest="backing", metavar="FILE", help="the new backing file, as the image shall name it")
    parser.add_argument("-F", dest="backing_format", metavar="FORMAT", help="its format: qcow2, raw or luks")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="change the name only: the disk may be another one then")
    parser.add_argument("-t", dest="cache", metavar="CACHE", help=CACHE_HELP.format("read and write the image"))
    parser.add_argument("-T", dest="source_cache", metavar="CACHE", help="the same for backing files")
    add_image_opts_option(parser)
    parser.add_argument("-U", "--force-share", action="store_true", help=argparse.SUPPRESS)
    add_progress_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.rebase import rebase

    direct, direct_backing = goes_direct(arguments.cache), goes_direct(arguments.source_cache, "source cache")
    if arguments.force_share:
        raise Unsupported("-U", "a backing file that another process writes to while the image is fitted to it")
    if arguments.backing is None and not arguments.unsafe:
        raise Invalid("Must specify backing file (-b) or use unsafe mode (-u)")
    image = local_file(arguments.image, arguments)
    if (image.format or looked_at(image.name, arguments)) != "qcow2":
        raise Unsupported(printable(image.name), "a backing file below a raw image")
    rehearsal = rehearsal_of(arguments)
    with shown(arguments) as progress:
        done = rebase(
            image.name,
            arguments.backing or None,
            backing_format=arguments.backing_format,
            unsafe=arguments.unsafe,
            direct=direct,
            direct_backing=direct_backing,
            refs=references(arguments, image.name),
            assume_backing_format=arguments.assume_backing_format,
            secrets=secrets_for(image, arguments),
            progress=progress,
            rehearsal=rehearsal,
        )
    if rehearsal is not None:
        return tell(arguments, rehearsal, done.to_dict())
    if arguments.output == "json":
        print_json(done.to_dict())
    return 0
