"""``cowfence amend``: change what an image is like, with the options and words of ``qemu-img amend``.

What can be amended: compat, data_file, data_file_raw, lazy_refcounts, refcount_bits, size. The backing file is rebase's.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Final

from cowfence.cli.create_options import wants_help
from cowfence.cli.encrypt_options import iter_time
from cowfence.cli.formats import source_format
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options, secret_named, secrets_of
from cowfence.disk.opener import check_name, printable
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.amend import Amendment
from cowfence.units import parse_size

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import KeyChange

_OPTIONS: Final = {
    "compat=<str>": "v2 (0.10) or v3 (1.1)",
    "data_file=<str>": "another name of the external data file",
    "data_file_raw=<on/off>": "the data file can be read by itself; this can only be given up",
    "encrypt.iter-time=<num>": "milliseconds that a guess at the new passphrase takes (default: 2000)",
    "encrypt.keyslot=<num>": "which of the 8 key slots (default: the first free one, or those that old-secret opens)",
    "encrypt.new-secret=<str>": "id of the secret to add",
    "encrypt.old-secret=<str>": "id of the secret to erase",
    "encrypt.state=<str>": "active: add a key; inactive: erase keys",
    "lazy_refcounts=<on/off>": "the image may postpone refcount updates",
    "refcount_bits=<num>": "width of a reference count: 1 to 64, a power of two",
    "size=<size>": "size of the disk",
}
_KEYS: Final = (
    "encrypt.state",
    "encrypt.new-secret",
    "encrypt.old-secret",
    "encrypt.keyslot",
    "encrypt.iter-time",
)
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_CREATION_ONLY: Final = ("cluster_size", "compression_type", "encryption", "encrypt.format", "extended_l2", "preallocation")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw", "luks"), help="format of the image (default: look at it)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="NAME=VALUE,...", help="what to change; -o help"
    )
    add_progress_option(parser)
    parser.add_argument("--force", action="store_true", help="erase the last key, or overwrite one in use, too")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image", nargs="?")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.amend import amend, amend_luks

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
    rehearsal = rehearsal_of(arguments)
    if arguments.format == "luks":
        amend_luks(image, _parse(arguments), secrets=secrets_of(arguments), rehearsal=rehearsal)
        if rehearsal is not None:
            return tell(arguments, rehearsal, {"filename": image})
        if arguments.output == "json":
            print_json({"filename": image})
        return 0
    if source_format(arguments, image) != "qcow2":
        raise Unsupported(printable(image), "Format driver 'raw' does not support option amendment")
    changes = _parse(arguments)
    with shown(arguments):
        done = amend(
            image,
            changes,
            refs=references(arguments, image),
            assume_backing_format=arguments.assume_backing_format,
            secrets=secrets_of(arguments),
            rehearsal=rehearsal,
        )
    if rehearsal is not None:
        return tell(arguments, rehearsal, done.to_dict())
    if arguments.output == "json":
        print_json(done.to_dict())
    return 0


def _parse(arguments: argparse.Namespace) -> Amendment:
    """What all ``-o`` together ask for; the last of several counts. Raises Invalid, in qemu-img's words."""
    version: int | None = None
    lazy: bool | None = None
    bits: int | None = None
    size_bytes: int | None = None
    data_file: str | None = None
    raw: bool | None = None
    keys: dict[str, str] = {}
    for item in (item for text in arguments.options for item in re.findall(r"(?:[^,]|,,)+", text)):
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
        elif name in _KEYS:
            keys[name] = value
        elif name == "size":
            size_bytes = _size(value)
        else:
            raise Invalid(f"Invalid parameter '{name}'")
    change = _key_change(arguments, keys) if keys else None
    return Amendment(version, lazy, bits, size_bytes, data_file, change, raw)


def _key_change(arguments: argparse.Namespace, given: dict[str, str]) -> KeyChange:
    """What the ``encrypt.`` options ask for. Raises Invalid."""
    from cowfence.qcow2.encryption import KeyChange

    state = given.get("encrypt.state")
    if state not in ("active", "inactive"):
        raise Invalid("Parameter 'encrypt.state' expects 'active' or 'inactive'")
    new, old = given.get("encrypt.new-secret"), given.get("encrypt.old-secret")
    if state == "active" and new is None:
        raise Invalid("'new-secret' is required to activate a keyslot")
    if state == "inactive" and new is not None:
        raise Invalid("'new-secret' must not be given when erasing keyslots")
    if state == "inactive" and "encrypt.iter-time" in given:
        raise Invalid("'iter-time' must not be given when erasing keyslots")
    slot = given.get("encrypt.keyslot")
    if slot is not None and not (slot.isascii() and slot.isdigit()):
        raise Invalid("Parameter 'encrypt.keyslot' expects a number")
    return KeyChange(
        new_secret=None if new is None else secret_named(arguments, new),
        old_secret=None if old is None else secret_named(arguments, old),
        keyslot=None if slot is None else int(slot),
        iter_time_ms=iter_time(given.get("encrypt.iter-time", "2000"), printable(arguments.image)),
        force=arguments.force,
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise Invalid(str(error)) from None
