"""``cowfence explain``: what an offset of an image is, and which tables lead to it."""

from __future__ import annotations

import argparse

from cowfence.cli.main import add_output_option, print_json, size_bytes
from cowfence.disk.opener import printable
from cowfence.ops.explain import OfGuest, OfHost, explain


def configure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--guest", action="store_true", help="it is an offset of the disk (default: both)")
    group.add_argument("--host", action="store_true", help="it is an offset of the file")
    parser.add_argument("-U", "--force-share", action="store_true", help="look at an image that another process writes to")
    add_output_option(parser)
    parser.add_argument("image")
    parser.add_argument("offset", type=_offset, help="in bytes: 512, 0x10000, 1.5G")


def _offset(text: str) -> int:
    try:
        return int(text, 16) if text[:2].lower() == "0x" else size_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not an offset") from None


def run(arguments: argparse.Namespace) -> int:
    found = explain(
        arguments.image,
        arguments.offset,
        guest=not arguments.host,
        host=not arguments.guest,
        force_share=arguments.force_share,
    )
    if arguments.output == "json":
        print_json(found.to_dict())
        return 0
    lines = [] if found.guest is None else _of_guest(found.guest)
    lines += [] if found.host is None else _of_host(found.host)
    print("\n".join(lines))
    return 0


def _of_guest(guest: OfGuest) -> list[str]:
    lines = [
        f"guest offset {guest.offset:#x}: {guest.state}",
        f"    guest cluster {guest.cluster}",
        f"    L1[{guest.l1_index}] = {guest.l1_entry:#018x}"
        + (": no L2 table" if guest.l2_offset is None else f": the L2 table at {guest.l2_offset:#x}"),
    ]
    if guest.l2_entry is not None:
        lines.append(f"    L2[{guest.l2_index}] = {guest.l2_entry:#018x}")
    if guest.host_offset is not None:
        what = "" if guest.stream_bytes is None else f", a stream of at most {guest.stream_bytes} bytes"
        count = "" if guest.refcount is None else f", refcount {guest.refcount}"
        lines.append(f"    host offset {guest.host_offset:#x}{what}{count}")
    if guest.backing is not None:
        lines.append(f"    read from the backing file {printable(guest.backing)}")
    return lines


def _of_host(host: OfHost) -> list[str]:
    lines = [
        f"host offset {host.offset:#x}: {host.verdict}",
        f"    host cluster {host.cluster}, refcount {host.refcount}, {host.references} references",
    ]
    lines += [f"    {structure}" for structure in host.structures]
    for way in host.ways:
        lines.append(
            f"    {way.state} of {way.owner} at guest offset {way.guest_offset:#x}: "
            f"L1[{way.l1_index}], L2 table at {way.l2_offset:#x}, L2[{way.l2_index}] = {way.entry:#018x}"
        )
    return lines
