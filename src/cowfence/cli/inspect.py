"""``cowfence inspect``: one verdict on an image that somebody else made. Exit code 0: accepted, 2: refused, 1: nobody knows."""

from __future__ import annotations

import argparse
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from cowfence.cli.main import add_output_option, print_json, size_bytes
from cowfence.disk.opener import Refs, printable
from cowfence.errors import Invalid
from cowfence.ops.inspect import Limits, Verdict, inspect
from cowfence.units import GIB

EXIT_REFUSED = 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="what its owner says that it is (default: qcow2)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--untrusted", action="store_true", help="name no other file, and take no more than --memory and --seconds"
    )
    group.add_argument("--ref-root", action="append", default=[], metavar="DIRECTORY", help="files it may name are here, too")
    parser.add_argument("--max-virtual-size", type=size_bytes, metavar="SIZE", help="of the disk")
    parser.add_argument("--max-file-size", type=size_bytes, metavar="SIZE", help="of the file")
    parser.add_argument("--memory", type=size_bytes, metavar="SIZE", help="address space, with --untrusted (default: 1G)")
    parser.add_argument("--seconds", type=int, metavar="N", help="processor time, with --untrusted (default: 30)")
    add_output_option(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.untrusted and (arguments.memory is not None or arguments.seconds is not None):
        raise Invalid("--memory and --seconds go with --untrusted")
    if arguments.seconds is not None and arguments.seconds < 1:
        raise Invalid("--seconds has to be 1 at least")
    image = arguments.image
    limits = Limits(arguments.max_virtual_size, arguments.max_file_size)
    if arguments.untrusted:
        verdict = _bounded(arguments, limits)
    else:
        directory = os.path.dirname(os.path.abspath(image))
        verdict = inspect(image, format=arguments.format, limits=limits, refs=Refs.under(directory, *arguments.ref_root))
    if arguments.output == "json":
        print_json(verdict.to_dict())
    else:
        _print(verdict)
    return 0 if verdict.accepted else EXIT_REFUSED


def _bounded(arguments: argparse.Namespace, limits: Limits) -> Verdict:
    """What takes too much is refused, too."""
    seconds = arguments.seconds or 30
    try:
        with _limited(arguments.memory or GIB, seconds):
            return inspect(arguments.image, format=arguments.format, limits=limits)
    except MemoryError:
        reason = f"looking at it takes more than {arguments.memory or GIB} bytes of memory"
    except _OutOfTime:
        reason = f"looking at it takes more than {seconds} s"
    return Verdict(arguments.image, "unknown", reasons=[reason])


class _OutOfTime(Exception):
    pass


@contextmanager
def _limited(memory_bytes: int, seconds: int) -> Iterator[None]:
    """This process: its address space, and the processor time that it may still take."""

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = {which: resource.getrlimit(which) for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU)}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime)
    old = signal.signal(signal.SIGXCPU, stop)
    try:
        for which, limit in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, spent + seconds)):
            _, hard = before[which]
            resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        yield
    finally:
        for which, both in before.items():
            resource.setrlimit(which, both)
        signal.signal(signal.SIGXCPU, old)


def _print(verdict: Verdict) -> None:
    size = "" if verdict.virtual_bytes is None else f", a disk of {verdict.virtual_bytes} bytes"
    print(f"{printable(verdict.filename)}: {'accepted' if verdict.accepted else 'refused'} ({verdict.format}{size})")
    for kind, texts in (("reason", verdict.reasons), ("feature", verdict.features), ("note", verdict.notes)):
        for text in texts:
            print(f"    {kind}: {printable(text)}")
