"""``cowfence diff``: where two images, or two states of one, differ."""

from __future__ import annotations

import argparse

from cowfence.cli.main import add_output_option, add_reference_options, print_json, size_bytes
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import add_source_options, open_source
from cowfence.disk.base import Disk
from cowfence.errors import Invalid
from cowfence.ops.diff import diff
from cowfence.units import KIB


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="format of the first image")
    parser.add_argument("-F", dest="second_format", metavar="FORMAT", help="format of the second image")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="the first image as it was at this internal snapshot")
    parser.add_argument("-L", dest="second_snapshot", metavar="SNAPSHOT", help="the second image at this one")
    parser.add_argument("--unit", type=size_bytes, default=64 * KIB, metavar="SIZE", help="of a difference (default: 64k)")
    add_source_options(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="before and after; one image: its snapshot (-l) and now")


def run(arguments: argparse.Namespace) -> int:
    names = arguments.images
    if len(names) == 1 and arguments.snapshot is not None:
        names = names * 2
    if len(names) != 2:
        raise Invalid("Expecting two images, or one and the snapshot (-l) that it is compared with")
    formats = (arguments.format, arguments.second_format if len(arguments.images) == 2 else arguments.format)
    disks: list[Disk] = []
    try:
        for name, format_name, snapshot in zip(names, formats, (arguments.snapshot, arguments.second_snapshot), strict=True):
            disks.append(open_source(name, arguments, format_name=format_name, snapshot=snapshot))
        changes = list(diff(disks[0], disks[1], unit_bytes=arguments.unit))
    finally:
        for disk in disks:
            disk.close()
    if arguments.output == "json":
        print_json([change.to_dict() for change in changes])
        return 0
    print(f"{'Offset':<16}{'Length':<16}Now")
    for change in changes:
        print(f"{change.start:<#16x}{change.length_bytes:<#16x}{'zeros' if change.zero else 'data'}")
    return 0
