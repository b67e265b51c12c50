"""``cowfence amend``: change what an image is like, with the options and words of ``qemu-img amend``.

What can be amended: compat, data_file, data_file_raw, lazy_refcounts, refcount_bits, size. The backing file is rebase's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Final

from cowfence.cli.create_options import wants_help
from cowfence.cli.formats import source_format
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references
from cowfence.disk.opener import check_name, printable
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.amend import Amendment
from cowfence.units import parse_size

_OPTIONS: Final = {
    "compat=<str>": "v2 (0.10) or v3 (1.1)",
    "data_file=<str>": "another name of the external data file",
    "data_file_raw=<on/off>": "the data file can be read by itself; this can only be given up",
    "lazy_refcounts=<on/off>": "the image may postpone refcount updates",
    "refcount_bits=<num>": "width of a reference count: 1 to 64, a power of two",
    "size=<size>": "size of the disk",
}
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_CREATION_ONLY: Final = ("cluster_size", "compression_type", "encryption", "encrypt.format", "extended_l2", "preallocation")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="NAME=VALUE,...", help="what to change; -o help"
    )
    parser.add_argument("-p", "--progress", action="store_true", help="accepted, as by qemu-img")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_output_option(parser)
    add_reference_options(parser)
    parser.add_argument("image", nargs="?")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.amend import amend

    if wants_help(arguments.options):
        print("Amend options for 'qcow2':")
        for name, help_text in _OPTIONS.items():
            print(f"  {name:<24} - {help_text}")
        return 0
    image = arguments.image
    if image is None:
        raise Invalid("Expecting one image file name")
    if not arguments.options:
        raise Invalid("Must specify options (-o)")
    if source_format(arguments, image) != "qcow2":
        raise Unsupported(printable(image), "Format driver 'raw' does not support option amendment")
    done = amend(
        image,
        _parse(arguments.options),
        refs=references(arguments, image),
        assume_backing_format=arguments.assume_backing_format,
    )
    if arguments.output == "json":
        print_json(done.to_dict())
    return 0


def _parse(texts: Sequence[str]) -> Amendment:
    """What all ``-o`` together ask for; the last of several counts. Raises Invalid, in qemu-img's words."""
    version: int | None = None
    lazy: bool | None = None
    bits: int | None = None
    size_bytes: int | None = None
    data_file: str | None = None
    raw: bool | None = None
    for item in (item for text in texts for item in re.findall(r"(?:[^,]|,,)+", text)):
        name, equals, value = item.replace(",,", ",").partition("=")
        value = value if equals else "on"
        if name in ("backing_file", "backing_fmt"):
            raise Invalid("Cannot amend the backing file; use 'cowfence rebase' instead")
        if name in _CREATION_ONLY:
            raise Invalid(f"Invalid parameter '{name}': this option is only supported for image creation")
        if name == "compat":
            if value not in _VERSIONS:
                raise Invalid(f"Unknown compatibility level {value}")
            version = _VERSIONS[value]
        elif name == "lazy_refcounts":
            if value not in ("on", "off"):
                raise Invalid("Parameter 'lazy_refcounts' expects 'on' or 'off'")
            lazy = value == "on"
        elif name == "refcount_bits":
            if not (value.isascii() and value.isdigit()):
                raise Invalid("Parameter 'refcount_bits' expects a number")
            bits = int(value)
        elif name == "data_file":
            data_file = value
            if value:
                check_name(value, "external data file")
        elif name == "data_file_raw":
            if value not in ("on", "off"):
                raise Invalid("Parameter 'data_file_raw' expects 'on' or 'off'")
            raw = value == "on"
        elif name == "size":
            size_bytes = _size(value)
        else:
            raise Invalid(f"Invalid parameter '{name}'")
    return Amendment(version, lazy, bits, size_bytes, data_file, raw)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise Invalid(str(error)) from None
