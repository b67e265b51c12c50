"""``cowfence convert``: disks into a new image, or over an existing one, with the options of ``qemu-img convert``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from cowfence.cli.create_options import OPTIONS, parse_options, wants_help
from cowfence.cli.main import add_output_option, add_reference_options, complain, print_json, references, size_bytes
from cowfence.cli.secrets import add_secret_options, secret_named, secrets_of
from cowfence.cli.sources import CACHE_HELP, CACHES, add_source_options, open_source
from cowfence.disk.base import Disk
from cowfence.disk.joined import JoinedDisk
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.convert import Converted, How, Progress, convert_disk, convert_into
from cowfence.qcow2.image import Qcow2Disk
from cowfence.units import KIB, parse_size

_SHOWN_EACH_SECONDS = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="format of the sources (default: qcow2 if it looks so)")
    parser.add_argument("-O", dest="target_format", metavar="FORMAT", default="raw", help="qcow2 or raw (default: raw)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS", help="of the new image; see -o help"
    )
    parser.add_argument("-B", dest="backing", metavar="FILE", help="backing file of the new image, which holds the same")
    parser.add_argument("-F", dest="backing_format", metavar="FORMAT", help="format of the backing file")
    parser.add_argument("-c", dest="compress", action="store_true", help="compress (qcow2)")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="convert this internal snapshot, by id or name")
    parser.add_argument("-n", dest="existing", action="store_true", help="the target exists; write into it")
    parser.add_argument("--target-is-zero", action="store_true", help="the existing target reads as zeros (with -n)")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("-m", dest="threads", type=int, metavar="N", help="threads, 1 to 16 (default: one a core, at least 2)")
    parser.add_argument("-r", "--rate-limit", dest="rate", metavar="SIZE", help="bytes a second at most")
    parser.add_argument("-t", dest="target_cache", metavar="CACHE", help=CACHE_HELP.format("write"))
    parser.add_argument("-W", dest="out_of_order", action="store_true", help="place data as it comes")
    parser.add_argument("-S", dest="sparse", metavar="SIZE", help="zeros that make a hole (default: 4k; 0: none)")
    parser.add_argument("--salvage", action="store_true", help="what cannot be read becomes zeros, with a warning")
    parser.add_argument("--bitmaps", action="store_true", help="copy the persistent bitmaps, too (qcow2)")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help="leave out bitmaps that are not to be trusted")
    add_source_options(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("names", nargs="*", metavar="SOURCE... TARGET")


def run(arguments: argparse.Namespace) -> int:
    if wants_help(arguments.options):
        for option, line in OPTIONS.items():
            print(f"  {option:<28} - {line}")
        return 0
    how = _how(arguments)
    *sources, target = arguments.names
    shows = arguments.progress and not arguments.quiet
    disk = _opened(arguments, sources)
    try:
        converted = _convert(arguments, disk, ", ".join(sources), target, how, _shown() if shows else None)
        if arguments.bitmaps:
            _copy_bitmaps(arguments, disk, target)
    finally:
        disk.close()
    if shows:
        print()
    for offset, why in converted.unreadable:
        complain(arguments, f"warning: error while reading offset {offset}: {why}")
    if arguments.output == "json":
        print_json(converted.to_dict())
    return 0


def _how(arguments: argparse.Namespace) -> How:
    """What the options ask for. Raises Invalid, mostly in qemu-img's words."""
    if len(arguments.names) < 2:
        raise Invalid("Must specify image file name" if not arguments.names else "must specify the image to make")
    if arguments.threads is not None and not 1 <= arguments.threads <= 16:
        raise Invalid("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
    if arguments.target_cache not in (None, *CACHES):
        raise Invalid(f"Invalid cache option: {arguments.target_cache}")
    if arguments.target_is_zero and not arguments.existing:
        raise Invalid("--target-is-zero requires use of -n flag")
    if arguments.existing and (arguments.options or arguments.backing):
        raise Invalid("-o, -B and -n are mutually exclusive: an existing image has its options")
    if arguments.skip_broken_bitmaps and not arguments.bitmaps:
        raise Invalid("Use of --skip-broken-bitmaps requires --bitmaps")
    if arguments.backing is not None and len(arguments.names) > 2:
        raise Invalid("Having a backing file for the target makes no sense when concatenating multiple input images")
    if arguments.existing and arguments.compress:
        raise Unsupported("-n", "compressing into an existing image")
    return How(
        compress=arguments.compress,
        sparse_bytes=4 * KIB if arguments.sparse is None else _sparse(arguments.sparse),
        threads=arguments.threads,
        in_order=not arguments.out_of_order,
        rate_bytes=None if arguments.rate is None else size_bytes(arguments.rate),
        salvage=arguments.salvage,
        target_is_zero=arguments.target_is_zero,
    )


def _sparse(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise Invalid("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512") from None


def _opened(arguments: argparse.Namespace, names: list[str]) -> Disk:
    disks: list[Disk] = []
    try:
        for name in names:
            disks.append(open_source(name, arguments, format_name=arguments.format, snapshot=arguments.snapshot))
    except BaseException:
        for disk in disks:
            disk.close()
        raise
    return disks[0] if len(disks) == 1 else JoinedDisk(disks)


def _convert(
    arguments: argparse.Namespace, disk: Disk, source: str, target: str, how: How, progress: Progress | None
) -> Converted:
    if not arguments.existing:
        given = parse_options(arguments.options, target)
        given.take("backing_file", arguments.backing, "the backing file")
        given.take("backing_fmt", arguments.backing_format, "the backing format")
        options = given.create_options(arguments.target_format, partial(secret_named, arguments))
        direct = arguments.target_cache in ("none", "directsync")
        return convert_disk(disk, source, target, options, how, direct=direct, progress=progress)
    import cowfence

    existing = cowfence.open(
        target,
        format=arguments.target_format,
        writable=True,
        refs=references(arguments, target),
        direct=arguments.target_cache in ("none", "directsync"),
        secret=secrets_of(arguments),
    )
    try:
        return convert_into(disk, source, existing, target, arguments.target_format, how, progress=progress)
    finally:
        existing.close()


def _copy_bitmaps(arguments: argparse.Namespace, disk: Disk, target: str) -> None:
    """The bitmaps of the source, into the image that was made. Raises Invalid where there can be none."""
    import cowfence

    if not isinstance(disk, Qcow2Disk):
        raise Invalid("Format driver does not support bitmaps")
    with cowfence.open(target, writable=True, secret=secrets_of(arguments)) as made:
        for bitmap in list(disk.bitmaps):
            if bitmap.inconsistent:
                if not arguments.skip_broken_bitmaps:
                    raise Invalid(f"Cannot copy inconsistent bitmap '{bitmap.name}'; use --skip-broken-bitmaps")
                complain(arguments, f"warning: Skipping inconsistent bitmap '{bitmap.name}'")
                continue
            made.bitmaps.add(bitmap.name, granularity_bytes=bitmap.granularity_bytes)
            made.bitmaps.merge(bitmap.name, [disk.bitmaps.bits_of(bitmap.name)])
            if not bitmap.enabled:
                made.bitmaps.disable(bitmap.name)


def _shown() -> Callable[[int, int], None]:
    """qemu-img's line; on a terminal with the rate and the time that is left."""
    began = last = time.monotonic()
    terminal = sys.stdout.isatty()

    def show(done: int, size: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SHOWN_EACH_SECONDS and done < size:
            return
        last = now
        share = done / size if size else 1.0
        text = f"    ({share * 100:.2f}/100%)"
        if terminal and done and now > began:
            rate = done / (now - began)
            text += f"  {rate / (1 << 20):,.0f} MiB/s  {(size - done) / rate:.0f} s left "
        print(text, end="\r", flush=True)

    return show
