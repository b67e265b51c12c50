"""``cowfence compare``: do two images hold the same disk? Options, words and exit codes are those of ``qemu-img compare``: 0
they do, 1 they do not, 2 one cannot be opened, 4 one cannot be read."""

from __future__ import annotations

import argparse

from cowfence.cli.main import add_output_option, add_reference_options, complain, print_json
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import add_source_options, open_source
from cowfence.disk.base import Disk
from cowfence.errors import CowfenceError, Invalid
from cowfence.ops.compare import Comparison, compare

_CANNOT_OPEN, _CANNOT_READ = 2, 4


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="format of the first image")
    parser.add_argument("-F", dest="second_format", metavar="FORMAT", help="format of the second image")
    add_progress_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-s", dest="strict", action="store_true", help="sizes and allocation have to be the same, too")
    add_source_options(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("images", nargs="*", metavar="IMAGE")


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.images) != 2:
        raise Invalid("Expecting two image file names")
    disks: list[Disk] = []
    try:
        for name, format_name in zip(arguments.images, (arguments.format, arguments.second_format), strict=True):
            disks.append(open_source(name, arguments, format_name=format_name))
    except CowfenceError as error:
        for disk in disks:
            disk.close()
        return complain(arguments, str(error), _CANNOT_OPEN)
    shared_bytes = min(disk.size for disk in disks)
    try:
        with shown(arguments) as progress:
            found = compare(disks[0], disks[1], strict=arguments.strict, progress=progress)
    except CowfenceError as error:
        return complain(arguments, str(error), _CANNOT_READ)
    finally:
        for disk in disks:
            disk.close()
    if arguments.output == "json":
        print_json(found.to_dict())
    elif not arguments.quiet:
        for line in _lines(found, shared_bytes):
            print(line)
    return 0 if found.identical else 1


def _lines(found: Comparison, shared_bytes: int) -> list[str]:
    """``shared_bytes``: the size of the shorter one."""
    if found.strict and found.sizes_differ:
        return ["Strict mode: Image size mismatch!"]
    alike = found.mismatch_offset is None or found.mismatch_offset >= shared_bytes
    lines = ["Warning: Image size mismatch!"] if found.sizes_differ and alike else []
    if found.mismatch_offset is None:
        return [*lines, "Images are identical."]
    if found.status_differs:
        return [*lines, f"Strict mode: Offset {found.mismatch_offset} block status mismatch!"]
    return [*lines, f"Content mismatch at offset {found.mismatch_offset}!"]
