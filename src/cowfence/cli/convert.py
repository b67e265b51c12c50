"""``cowfence convert``: disks into a new image, or over an existing one, with the options of ``qemu-img convert``."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from cowfence.cli.convert_each import convert_each
from cowfence.cli.create_options import help_lines, parse_options, wants_help
from cowfence.cli.formats import not_qcow2
from cowfence.cli.main import add_output_option, add_reference_options, complain, print_json, size_bytes
from cowfence.cli.progress import add_progress_option, shown_bytes
from cowfence.cli.secrets import add_secret_options, secret_named
from cowfence.cli.sources import (
    CACHE_HELP,
    CACHES,
    add_source_options,
    is_nbd,
    open_source,
    open_target,
    parse_source,
    reconnect_seconds,
)
from cowfence.codec import Effort
from cowfence.disk.base import Disk
from cowfence.disk.joined import JoinedDisk
from cowfence.disk.opener import printable
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.convert import (
    Converted,
    How,
    Opener,
    Progress,
    convert_disk,
    convert_into,
    convert_stream,
    convert_to_pipe,
    measure_conversion,
    spooled,
    takes_stream,
)
from cowfence.ops.streams import Pipe, Qcow2Stream, RawStream
from cowfence.qcow2.image import Qcow2Disk
from cowfence.qcow2.stream import DEFAULT_SPOOL_BYTES
from cowfence.units import KIB, parse_size

if TYPE_CHECKING:
    from cowfence.ops.create import CreateOptions
    from cowfence.qcow2.describe import JsonValue


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="format of the sources (default: qcow2 if it looks so)")
    parser.add_argument("-O", dest="target_format", metavar="FORMAT", help="qcow2 or raw (default: raw)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS", help="of the new image; see -o help"
    )
    parser.add_argument("-B", dest="backing", metavar="FILE", help="backing file of the new image, which holds the same")
    parser.add_argument("-F", dest="backing_format", metavar="FORMAT", help="format of the backing file")
    parser.add_argument("-c", dest="compress", action="store_true", help="compress (qcow2)")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="convert this internal snapshot, by id or name")
    parser.add_argument("-n", dest="existing", action="store_true", help="the target exists; write into it")
    parser.add_argument("--target-is-zero", action="store_true", help="the existing target reads as zeros (with -n)")
    add_progress_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("-m", dest="threads", type=int, metavar="N", help="threads, 1 to 16 (default: one a core, at least 2)")
    parser.add_argument("-r", "--rate-limit", dest="rate", metavar="SIZE", help="bytes a second at most")
    parser.add_argument("-t", dest="target_cache", metavar="CACHE", help=CACHE_HELP.format("write"))
    parser.add_argument("-W", dest="out_of_order", action="store_true", help="place data as it comes")
    parser.add_argument("-S", dest="sparse", metavar="SIZE", help="zeros that make a hole (default: 4k; 0: none)")
    parser.add_argument(
        "--effort",
        type=Effort,
        choices=list(Effort),
        metavar="EFFORT",
        help="of the compressor, with -c: fastest, fast (default), good, best",
    )
    parser.add_argument("--verify", action="store_true", help="read the new image back and compare, before it gets its name")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; tell what the image would take")
    parser.add_argument("--each", metavar="DIR", help="convert each source into an image of its own there; prints a table")
    parser.add_argument(
        "--spool-limit",
        metavar="SIZE",
        help="of what comes from a pipe: keep so much aside at most (default: 1G)",
    )
    parser.add_argument("--target-image-opts", action="store_true", help="the target is driver=...,file.filename=... (with -n)")
    parser.add_argument(
        "--reconnect",
        type=lambda text: reconnect_seconds(text, "--reconnect"),
        metavar="SECONDS",
        help="of NBD exports: how long to look for a server that has gone (default: 0)",
    )
    parser.add_argument("--salvage", action="store_true", help="what cannot be read becomes zeros, with a warning")
    parser.add_argument("--bitmaps", action="store_true", help="copy the persistent bitmaps, too (qcow2)")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help="leave out bitmaps that are not to be trusted")
    add_source_options(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("names", nargs="*", metavar="SOURCE... TARGET", help="with --each: sources only")


def run(arguments: argparse.Namespace) -> int:
    if wants_help(arguments.options):
        print("\n".join(help_lines(arguments.target_format or "raw")))
        return 0
    how = _how(arguments)
    if arguments.each is not None:
        _check_each(arguments)
        return convert_each(arguments, arguments.names, lambda source, target: _one(arguments, [source], target, how))
    *sources, target = arguments.names
    _check_combinations(arguments, target)
    if "-" in sources:
        return _from_pipe(arguments, sources, target, how)
    converted, file_bytes = _one(arguments, sources, target, how)
    _report(arguments, converted, target, file_bytes)
    return 0


def _one(arguments: argparse.Namespace, sources: list[str], target: str, how: How) -> tuple[Converted, int]:
    """One image of all the sources; with ``--dry-run``, the length that its file would have."""
    disk = _opened(arguments, sources)
    try:
        with shown_bytes(arguments, to_stdout=target != "-") as progress:
            converted, file_bytes = _convert(arguments, disk, ", ".join(sources), target, how, progress)
    finally:
        disk.close()
    for offset, why in converted.unreadable:
        complain(arguments, f"warning: error while reading offset {offset}: {why}")
    return converted, file_bytes


def _report(arguments: argparse.Namespace, converted: Converted, target: str, file_bytes: int) -> None:
    found: dict[str, JsonValue] = {}
    if arguments.dry_run:
        found = {"dry-run": True, "file-size": file_bytes}
        if arguments.output == "human" and not arguments.quiet:
            print(f"{target}: {file_bytes} bytes would be written for {converted.data_bytes} bytes of data; nothing was")
    if arguments.output == "json":
        print_json(converted.to_dict() | found)


def _from_pipe(arguments: argparse.Namespace, sources: list[str], target: str, how: How) -> int:
    """The source is standard input. Where the target cannot be made of what comes once, by way of a temporary file."""
    for given, option in (
        (len(sources) > 1, "several sources"),
        (arguments.snapshot is not None, "-l"),
        (arguments.image_opts, "--image-opts"),
        (arguments.bitmaps, "--bitmaps"),
        (arguments.backing is not None, "-B"),
        (arguments.salvage, "--salvage"),
        (arguments.force_share, "-U"),
        (arguments.source_cache is not None, "-T"),
    ):
        if given:
            raise Invalid(f"{option} and a source of - (standard input) do not go together")
    if stat.S_ISREG(os.fstat(0).st_mode):
        return run(argparse.Namespace(**(vars(arguments) | {"names": ["/dev/stdin", target]})))
    stream = _stream(arguments)
    with shown_bytes(arguments, to_stdout=target != "-") as progress, ExitStack() as stack:
        if not (arguments.existing or arguments.dry_run or arguments.verify or target == "-"):
            options = _options(arguments, target)
            if takes_stream(stream, options):
                direct = arguments.target_cache in ("none", "directsync")
                converted = convert_stream(stream, "-", target, options, how, direct=direct, progress=progress)
                _report(arguments, converted, target, 0)
                return 0
        disk = stack.enter_context(spooled(stream, how, limit_bytes=_spool_bytes(arguments)))
        converted, file_bytes = _convert(arguments, disk, "-", target, how, progress)
    _report(arguments, converted, target, file_bytes)
    return 0


def _spool_bytes(arguments: argparse.Namespace) -> int:
    return DEFAULT_SPOOL_BYTES if arguments.spool_limit is None else size_bytes(arguments.spool_limit)


def _stream(arguments: argparse.Namespace) -> RawStream | Qcow2Stream:
    pipe = Pipe(0, "standard input")
    looks_qcow2 = pipe.peek(4) == b"QFI\xfb"
    if arguments.format not in (None, "qcow2", "raw"):
        raise Unsupported(pipe.name, f"the format {arguments.format!a} from a pipe")
    if arguments.format == "raw":
        return RawStream(pipe)
    if arguments.format is None and not looks_qcow2:
        raise not_qcow2(pipe.name)
    return Qcow2Stream(pipe, spool_bytes=_spool_bytes(arguments))


def _check_each(arguments: argparse.Namespace) -> None:
    """What ``--each`` does not go with. Raises Invalid."""
    for given, option in (
        (arguments.existing, "-n"),
        (arguments.image_opts, "--image-opts"),
        (arguments.target_image_opts, "--target-image-opts"),
        ("-" in arguments.names, "standard input (-)"),
    ):
        if given:
            raise Invalid(f"{option} and --each do not go together: names are made of the names of the sources")
    _check_combinations(arguments, arguments.each)


def _check_combinations(arguments: argparse.Namespace, target: str) -> None:
    """What does not go together. Raises Invalid, Unsupported."""
    if target == "-":
        for given, option in (
            (arguments.existing, "-n"),
            (arguments.bitmaps, "--bitmaps"),
            (arguments.verify, "--verify"),
            (arguments.output == "json", "--output=json"),
            (arguments.target_cache is not None, "-t"),
        ):
            if given:
                raise Invalid(f"{option} and a target of - (standard output) do not go together")
        if not arguments.dry_run and sys.stdout.isatty():
            raise Invalid("standard output is a terminal; an image is not written there")
    if arguments.target_image_opts and not arguments.existing:
        raise Invalid("--target-image-opts requires use of -n flag")
    if arguments.target_image_opts and arguments.target_format is not None:
        raise Invalid("--image-opts and --format are mutually exclusive")
    if arguments.effort is not None and not arguments.compress:
        raise Invalid("--effort is of the compressor: it goes with -c")
    if arguments.spool_limit is not None and "-" not in arguments.names[:-1]:
        raise Invalid("--spool-limit is for a source of - (standard input)")
    if arguments.dry_run:
        for given, option in (
            (arguments.bitmaps, "--bitmaps"),
            (arguments.verify, "--verify"),
            (arguments.rate is not None, "--rate-limit"),
            (arguments.target_cache is not None, "-t"),
        ):
            if given:
                raise Invalid(f"{option} and --dry-run do not go together: nothing is written")
    if arguments.reconnect is not None:
        _check_reconnect(arguments, target)
    if arguments.existing and (arguments.verify or arguments.dry_run):
        raise Unsupported("-n", f"{'--verify' if arguments.verify else '--dry-run'} with an existing target")
    if arguments.existing and arguments.bitmaps and is_nbd(parse_source(target, image_opts=arguments.target_image_opts)):
        raise Invalid("Format driver does not support bitmaps")


def _check_reconnect(arguments: argparse.Namespace, target: str) -> None:
    """Raises Invalid where nothing that is opened is an NBD export."""
    opened = [parse_source(name, image_opts=arguments.image_opts) for name in arguments.names[: None if arguments.each else -1]]
    if arguments.existing:
        opened.append(parse_source(target, image_opts=arguments.target_image_opts))
    if not any(map(is_nbd, opened)):
        raise Invalid("--reconnect is for NBD exports, and none of the disks is one")


def _how(arguments: argparse.Namespace) -> How:
    """What the options ask for. Raises Invalid, mostly in qemu-img's words."""
    if len(arguments.names) < (2 if arguments.each is None else 1):
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
    if arguments.backing is not None and len(arguments.names) > 2 and arguments.each is None:
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
        effort=arguments.effort or Effort.FAST,
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
) -> tuple[Converted, int]:
    """What was done, and with ``--dry-run`` the length that the file would have."""
    if arguments.existing:
        return _convert_into(arguments, disk, source, target, how, progress), 0
    options = _options(arguments, target)
    if arguments.dry_run:
        return measure_conversion(disk, source, target, options, how, progress=progress)
    if target == "-":
        return convert_to_pipe(disk, source, sys.stdout.fileno(), options, how, progress=progress), 0
    converted = convert_disk(
        disk,
        source,
        target,
        options,
        how,
        direct=arguments.target_cache in ("none", "directsync"),
        progress=progress,
        before_publishing=partial(_complete, arguments, disk, target),
    )
    return converted, 0


def _options(arguments: argparse.Namespace, target: str) -> CreateOptions:
    given = parse_options(arguments.options, target, arguments.target_format or "raw")
    given.take("backing_file", arguments.backing, "Backing file")
    given.take("backing_fmt", arguments.backing_format, "Backing file format")
    return given.create_options(partial(secret_named, arguments))


def _convert_into(
    arguments: argparse.Namespace, disk: Disk, source: str, target: str, how: How, progress: Progress | None
) -> Converted:
    existing, format_name = open_target(target, arguments)
    try:
        converted = convert_into(disk, source, existing, target, format_name, how, progress=progress)
        if arguments.bitmaps:
            _copy_bitmaps(arguments, disk, existing)
    finally:
        existing.close()
    return converted


def _complete(arguments: argparse.Namespace, disk: Disk, target: str, opened: Opener) -> None:
    """What remains to be done with an image that has no name yet. Raises Invalid where it does not hold what it should."""
    if arguments.bitmaps:
        with opened(True) as made:
            _copy_bitmaps(arguments, disk, made)
    if arguments.verify:
        from cowfence.ops.compare import compare

        with opened(False) as made:
            found = compare(disk, made)
        if not found.identical:
            raise Invalid(f"{printable(target)}: what was written differs from the source at offset {found.mismatch_offset}")


def _copy_bitmaps(arguments: argparse.Namespace, disk: Disk, made: Disk) -> None:
    """The bitmaps of the source, into the image that was made. Raises Invalid where there can be none."""
    if not isinstance(disk, Qcow2Disk) or not isinstance(made, Qcow2Disk):
        raise Invalid("Format driver does not support bitmaps")
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
