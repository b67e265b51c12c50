"""``cowfence compact``: make the file of a qcow2 image as short as its content allows, in place.

``qemu-img`` has no such command: there one converts, which needs room for a second copy.
"""

from __future__ import annotations

import argparse

from cowfence.cli.main import add_output_option, print_json
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.secrets import add_secret_options, secrets_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say how short the file would become; change nothing")
    add_progress_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_output_option(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.compact import compact

    with shown(arguments) as progress:
        done = compact(arguments.image, dry_run=arguments.dry_run, secrets=secrets_of(arguments), progress=progress)
    if arguments.quiet:
        return 0
    if arguments.output == "json":
        print_json(done.to_dict())
    elif done.new_bytes >= done.old_bytes:
        print("The file is as short as it can be.")
    else:
        verb = "would be" if done.dry_run else "is"
        print(f"The file {verb} {done.old_bytes - done.new_bytes} bytes shorter: {done.new_bytes} bytes, was {done.old_bytes}.")
    return 0
