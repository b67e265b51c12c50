"""``-f`` for subcommands that read a disk: without it the file is looked at, for reading only.

What is no qcow2 image is not taken for raw without a word of the user: a truncated or foreign image would pass as a disk.
"""

from __future__ import annotations

import argparse

from cowfence.disk.opener import printable
from cowfence.errors import NotThisFormat
from cowfence.qcow2.describe import probe
from cowfence.storage.file import FileStorage


def add_format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f",
        dest="format",
        choices=("qcow2", "raw", "luks"),
        help="format of the image (default: qcow2 if it looks so, else none)",
    )


def source_format(arguments: argparse.Namespace, image: str) -> str:
    """The format that ``-f`` gives, or else "qcow2" where the file looks so. Raises NotThisFormat where it does not."""
    return looked_at(image) if arguments.format is None else str(arguments.format)


def looked_at(image: str) -> str:
    """ "qcow2" where the file looks so. Raises NotThisFormat where it does not: a raw disk can hold anything."""
    storage = FileStorage.open(image, lock=False)
    try:
        found = probe(storage)
    finally:
        storage.close()
    if found == "unknown":
        raise not_qcow2(image)
    return found


def not_qcow2(image: str) -> NotThisFormat:
    """Of what has no magic string, where nobody has said what it is."""
    return NotThisFormat(printable(image), "not a qcow2 image (at offset 0: no magic string); if it is raw, add -f raw")
