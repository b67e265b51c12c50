"""``cowfence amend``: change what an image is like, with the options and words of ``qemu-img amend``.

What can be amended: compat, data_file, data_file_raw, lazy_refcounts, refcount_bits, size. The backing file is rebase's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from cowfence.cli.create_options import VERSIONS, number_option, option_items, switch_option, wants_help
from cowfence.cli.encrypt_options import iter_time
from cowfence.cli.formats import looked_at
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references, size_option
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options, secret_named
from cowfence.cli.sources import CACHE_HELP, add_image_opts_option, goes_direct, local_file, secrets_for
from cowfence.disk.opener import check_name, printable
from cowfence.errors import Invalid
from cowfence.ops.amend import Amendment

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import KeyChange

_Value = TypeVar("_Value")
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
_PREFIX: Final = "encrypt."
_NAMES: Final = tuple(option.partition("=")[0] for option in _OPTIONS)
_NO_OPTIONS: Final = "Format driver 'raw' does not support option amendment"
_CREATION_ONLY: Final = ("cluster_size", "compression_type", "encryption", "encrypt.format", "extended_l2", "preallocation")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw", "luks"), help="format of the image (default: look at it)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="NAME=VALUE,...", help="what to change; -o help"
    )
    add_image_opts_option(parser)
    parser.add_argument("-t", dest="cache", metavar="CACHE", help=CACHE_HELP.format("write"))
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

    if not arguments.options:
        raise Invalid("Must specify options (-o)")
    if wants_help(arguments.options):
        print("\n".join(_help(arguments.format)))
        return 0
    if arguments.image is None:
        raise Invalid("Expecting one image file name")
    source = local_file(arguments.image, arguments)
    image = source.name
    format_name = source.format or looked_at(image, arguments)
    if format_name == "raw":
        raise Invalid(_NO_OPTIONS)
    secrets, direct = secrets_for(source, arguments), goes_direct(arguments.cache)
    changes = _parse(arguments, format_name)
    rehearsal = rehearsal_of(arguments)
    if format_name == "luks":
        with shown(arguments):
            amend_luks(image, changes, secrets=secrets, rehearsal=rehearsal)
        if rehearsal is not None:
            return tell(arguments, rehearsal, {"filename": image})
        if arguments.output == "json":
            print_json({"filename": image})
        return 0
    with shown(arguments):
        done = amend(
            image,
            changes,
            refs=references(arguments, image),
            assume_backing_format=arguments.assume_backing_format,
            secrets=secrets,
            direct=direct,
            rehearsal=rehearsal,
        )
    if rehearsal is not None:
        return tell(arguments, rehearsal, done.to_dict())
    if arguments.output == "json":
        print_json(done.to_dict())
    return 0


def _help(format_name: str | None) -> list[str]:
    """What can be amended of an image of this format. Raises Invalid where that is nothing."""
    if format_name == "raw":
        raise Invalid(_NO_OPTIONS)
    prefix = _PREFIX if format_name == "luks" else ""
    lines = [(name.removeprefix(prefix), line) for name, line in _OPTIONS.items() if name.startswith(prefix)]
    return [f"Amend options for '{format_name or 'qcow2'}':", *(f"  {name:<24} - {line}" for name, line in lines)]


def _parse(arguments: argparse.Namespace, format_name: str) -> Amendment:
    """What all ``-o`` together ask for; the last of several counts. Raises Invalid, in qemu-img's words."""
    given: dict[str, str] = {}
    for name, value in option_items(arguments.options):
        # What opens a file that is encrypted as a whole has names of its own in QEMU.
        name = _PREFIX + name if format_name == "luks" and _PREFIX + name in _KEYS else name
        if name in ("backing_file", "backing_fmt"):
            raise Invalid("Cannot amend the backing file; use 'cowfence rebase' instead")
        if name in _CREATION_ONLY:
            raise Invalid(f"Invalid parameter '{name}': this option is only supported for image creation")
        if name not in _NAMES:
            raise Invalid(f"Invalid parameter '{name}'")
        given[name] = value
    compat = given.get("compat")
    if compat is not None and compat not in VERSIONS:
        raise Invalid(f"Unknown compatibility level {compat}")
    if given.get("data_file"):
        check_name(given["data_file"], "external data file")
    keys = {name: value for name, value in given.items() if name in _KEYS}
    return Amendment(
        version=None if compat is None else VERSIONS[compat],
        lazy_refcounts=_converted(given, "lazy_refcounts", switch_option),
        refcount_bits=_converted(given, "refcount_bits", number_option),
        size_bytes=_converted(given, "size", size_option),
        data_file=given.get("data_file"),
        keys=_key_change(arguments, keys) if keys else None,
        data_file_raw=_converted(given, "data_file_raw", switch_option),
    )


def _converted(given: dict[str, str], name: str, convert: Callable[[str, str], _Value]) -> _Value | None:
    return convert(given[name], name) if name in given else None


def _key_change(arguments: argparse.Namespace, given: dict[str, str]) -> KeyChange:
    """What the ``encrypt.`` options ask for. Raises Invalid."""
    from cowfence.qcow2.encryption import KeyChange

    state = given.get("encrypt.state")
    if state is None:
        raise Invalid("Parameter 'state' is missing")
    if state not in ("active", "inactive"):
        raise Invalid(f"Parameter 'state' does not accept value '{state}'")
    new, old = given.get("encrypt.new-secret"), given.get("encrypt.old-secret")
    if state == "active" and new is None:
        raise Invalid("'new-secret' is required to activate a keyslot")
    if state == "inactive" and new is not None:
        raise Invalid("'new-secret' must not be given when erasing keyslots")
    if state == "inactive" and "encrypt.iter-time" in given:
        raise Invalid("'iter-time' must not be given when erasing keyslots")
    slot = given.get("encrypt.keyslot")
    return KeyChange(
        new_secret=None if new is None else secret_named(arguments, new),
        old_secret=None if old is None else secret_named(arguments, old),
        keyslot=None if slot is None else number_option(slot, "encrypt.keyslot"),
        iter_time_ms=iter_time(given.get("encrypt.iter-time", "2000"), printable(arguments.image)),
        force=arguments.force,
    )
