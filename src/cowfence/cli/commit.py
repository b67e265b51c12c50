"""``cowfence commit``: write an image's changes into its backing file, with the options and words of ``qemu-img commit``."""

from __future__ import annotations

import argparse

from cowfence.cli.formats import looked_at
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references, size_bytes
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import CACHE_HELP, add_image_opts_option, goes_direct, local_file, secrets_for
from cowfence.errors import Invalid


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument("-b", dest="base", metavar="FILE", help="the backing file to write to (default: the first); implies -d")
    parser.add_argument("-d", dest="keep", action="store_true", help="do not empty the image afterwards")
    parser.add_argument("-r", dest="rate", type=size_bytes, metavar="SIZE", help="bytes a second at most (0: no limit)")
    parser.add_argument("-t", dest="cache", metavar="CACHE", help=CACHE_HELP.format("read and write"))
    add_image_opts_option(parser)
    add_progress_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.commit import commit

    direct = goes_direct(arguments.cache)
    image = local_file(arguments.image, arguments)
    if (image.format or looked_at(image.name, arguments)) != "qcow2":
        raise Invalid("Image does not have a backing file")
    rehearsal = rehearsal_of(arguments)
    with shown(arguments) as progress:
        done = commit(
            image.name,
            base=arguments.base,
            keep=arguments.keep,
            direct=direct,
            rate_bytes=arguments.rate,
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
    elif not arguments.quiet:
        print("Image committed.")
    return 0
