"""``--object secret,...``: passphrases, as QEMU's tools take them, from a file or an environment variable.

They are never taken from the argument list, which everybody on the host can read: ``data=`` is refused.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import os
import re
from typing import TYPE_CHECKING, Final

from cowfence.errors import Invalid, from_os_error

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import Secrets

_MAX_BYTES: Final = 1 << 20


def add_secret_options(parser: argparse.ArgumentParser) -> None:
    """``--object``, for subcommands that read or write what may be encrypted."""
    parser.add_argument(
        "--object",
        dest="secrets",
        action="append",
        default=[],
        metavar="secret,id=ID,file=FILE|env=NAME[,format=raw|base64]",
        help="a passphrase; every LUKS image is opened with the first one that fits",
    )


def secrets_by_id(arguments: argparse.Namespace) -> dict[str, bytes]:
    """What ``--object`` gives. Raises Invalid."""
    found: dict[str, bytes] = {}
    for text in arguments.secrets:
        kind, *items = re.findall(r"(?:[^,]|,,)+", text) or [""]
        fields = dict(item.replace(",,", ",").partition("=")[::2] for item in items)
        if kind not in ("secret", "qom-type=secret"):
            raise Invalid(f"--object {kind}: only secrets are known here")
        if "data" in fields:
            raise Invalid("--object secret: data= shows the secret to everybody on this host; use file= or env=")
        identity = fields.pop("id", "")
        if not identity:
            raise Invalid("--object secret: Parameter 'id' is missing")
        if identity in found:
            raise Invalid(f"--object secret: attempt to add duplicate property '{identity}'")
        found[identity] = _value(fields)
    return found


def _value(fields: dict[str, str]) -> bytes:
    style = fields.pop("format", "raw")
    if style not in ("raw", "base64"):
        raise Invalid("--object secret: Parameter 'format' must be raw or base64")
    if set(fields) == {"file"}:
        value = _of_file(fields["file"])
    elif set(fields) == {"env"}:
        held = os.environb.get(os.fsencode(fields["env"]))
        if held is None:
            raise Invalid(f"--object secret: there is no environment variable {fields['env']}")
        value = held
    else:
        raise Invalid("--object secret: either 'file' or 'env' must be given, and nothing else that is not known")
    if style == "base64":
        try:
            value = base64.b64decode(value.strip(), validate=True)
        except binascii.Error:
            raise Invalid("--object secret: invalid base64 data") from None
    return value


def _of_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            value = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise from_os_error(path, "open", 0, error) from error
    if len(value) > _MAX_BYTES:
        raise Invalid(f"--object secret: {path} is too long for a secret")
    return value


def secret_named(arguments: argparse.Namespace, identity: str) -> bytes:
    """The secret with this id. Raises Invalid."""
    found = secrets_by_id(arguments).get(identity)
    if found is None:
        raise Invalid(f"No secret with id '{identity}'")
    return found


def secrets_of(arguments: argparse.Namespace) -> Secrets | None:
    """Every secret given, for any image that needs one. Raises Invalid."""
    found = list(secrets_by_id(arguments).values())
    return (lambda _: found) if found else None
