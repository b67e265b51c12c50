"""``cowfence commit``: write an image's changes into its backing file, with the options and words of ``qemu-img commit``."""

from __future__ import annotations

import argparse

from cowfence.cli.formats import source_format
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options, secrets_of
from cowfence.errors import Invalid


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument("-b", dest="base", metavar="FILE", help="the backing file to write to (default: the first); implies -d")
    parser.add_argument("-d", dest="keep", action="store_true", help="do not empty the image afterwards")
    add_progress_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.commit import commit

    image = arguments.image
    if source_format(arguments, image) != "qcow2":
        raise Invalid("Image does not have a backing file")
    rehearsal = rehearsal_of(arguments)
    with shown(arguments) as progress:
        done = commit(
            image,
            base=arguments.base,
            keep=arguments.keep,
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
    elif not arguments.quiet:
        print("Image committed.")
    return 0
