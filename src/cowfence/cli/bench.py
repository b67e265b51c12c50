"""``cowfence bench``: time requests to an image; options and words are those of ``qemu-img bench``."""

from __future__ import annotations

import argparse

from cowfence.cli.main import add_output_option, add_reference_options, print_json, references, size_within
from cowfence.cli.secrets import add_secret_options, secrets_of
from cowfence.cli.sources import parse_source
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.bench import Load, bench
from cowfence.qcow2.assemble import CacheMode

_CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="format of the image")
    parser.add_argument("-c", dest="count", default="75000", metavar="N", help="requests (default: 75000)")
    parser.add_argument("-d", dest="depth", default="64", metavar="N", help="at a time (default: 64)")
    parser.add_argument("-o", dest="offset", default="0", metavar="SIZE", help="where the first one is")
    parser.add_argument("-s", dest="request_bytes", default="4096", metavar="SIZE", help="of each (default: 4k)")
    parser.add_argument("-S", dest="step_bytes", metavar="SIZE", help="from one to the next (default: their size)")
    parser.add_argument("-w", dest="is_write", action="store_true", help="write instead of reading; THE IMAGE IS OVERWRITTEN")
    parser.add_argument("--pattern", default="0", metavar="BYTE", help="what is written")
    parser.add_argument("--flush-interval", default="0", metavar="N", help="a flush after so many writes")
    parser.add_argument("--no-drain", action="store_true", help="refused: every flush here waits for what it covers")
    parser.add_argument("-i", dest="aio", metavar="KIND", help="refused: requests go through a pool of threads")
    parser.add_argument("-n", dest="native", action="store_true", help="refused, as -i native")
    parser.add_argument("-t", dest="cache", metavar="CACHE", help=", ".join(_CACHES))
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("-U", "--force-share", action="store_true", help="read an image that another process writes to")
    parser.add_argument("--image-opts", action="store_true", help="the image is given as driver=...,file.filename=...")
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("images", nargs="*", metavar="IMAGE")


def run(arguments: argparse.Namespace) -> int:
    import cowfence
    from cowfence.cli.formats import looked_at

    if len(arguments.images) != 1:
        raise Invalid("Expecting one image file name")
    load = _load(arguments)
    if arguments.cache is not None and arguments.cache not in _CACHES:
        raise Invalid("Invalid cache mode")
    source = parse_source(arguments.images[0], image_opts=arguments.image_opts)
    mode = {"writethrough": CacheMode.WRITETHROUGH, "directsync": CacheMode.WRITETHROUGH, "unsafe": CacheMode.UNSAFE}
    format_name = source.format or arguments.format or looked_at(source.name, arguments, writes=load.is_write)
    disk = cowfence.open(
        source.name,
        format=format_name,
        writable=load.is_write,
        refs=references(arguments, source.name),
        direct=arguments.cache in ("none", "directsync"),
        force_share=arguments.force_share,
        assume_backing_format=arguments.assume_backing_format,
        secret=secrets_of(arguments),
        mode=mode.get(arguments.cache, CacheMode.WRITEBACK) if format_name != "raw" else CacheMode.WRITEBACK,
    )

    def say() -> None:
        if arguments.quiet or arguments.output == "json":
            return
        verb = "write" if load.is_write else "read"
        print(
            f"Sending {load.count} {verb} requests, {load.request_bytes} bytes each, {load.depth} in parallel "
            f"(starting at offset {load.offset}, step size {load.step})"
        )
        if load.flush_interval:
            print(f"Sending flush every {load.flush_interval} requests")

    with disk:
        done = bench(disk, load, say)
    if arguments.output == "json":
        print_json(done.to_dict())
    elif not arguments.quiet:
        print(f"Run completed in {done.seconds:.3f} seconds.")
    return 0


def _load(arguments: argparse.Namespace) -> Load:
    """Raises Invalid in qemu-img's words, Unsupported for what there is not."""
    if arguments.aio is not None or arguments.native:
        raise Unsupported("-i", "choosing how the host carries requests out; a pool of threads does")
    if arguments.no_drain:
        raise Unsupported("--no-drain", "flushes beside which others go on")
    load = Load(
        count=_number(arguments.count, "Invalid request count specified"),
        depth=_number(arguments.depth, "Invalid queue depth specified"),
        offset=size_within(arguments.offset, "offset"),
        request_bytes=size_within(arguments.request_bytes, "buffer size"),
        step_bytes=None if arguments.step_bytes is None else size_within(arguments.step_bytes, "step_size"),
        is_write=arguments.is_write,
        pattern=_number(arguments.pattern, "Invalid pattern byte specified"),
        flush_interval=_number(arguments.flush_interval, "Invalid flush interval specified"),
    )
    if load.pattern > 0xFF:
        raise Invalid("Invalid pattern byte specified")
    if not load.depth or not load.request_bytes:
        raise Invalid("Invalid queue depth specified" if not load.depth else "Invalid buffer size specified")
    if load.flush_interval and not load.is_write:
        raise Invalid("--flush-interval is only available in write tests")
    if load.flush_interval and load.flush_interval < load.depth:
        raise Invalid("Flush interval can't be smaller than depth")
    return load


def _number(text: str, wrong: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise Invalid(wrong) from None
    if value < 0:
        raise Invalid(wrong)
    return value
