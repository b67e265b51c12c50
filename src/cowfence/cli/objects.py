"""``--object`` of programs that speak TLS: beside secrets (``secrets``), credentials and who may come in, in QEMU's words."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cowfence.errors import Invalid, Unsupported

if TYPE_CHECKING:
    import ssl

_KINDS: Final = ("secret", "tls-creds-x509", "tls-creds-psk", "authz-simple")
_BOOLEANS: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


@dataclass(frozen=True, slots=True)
class Credentials:
    """``tls-creds-x509`` or (``shared_keys``) ``tls-creds-psk``."""

    directory: str
    endpoint: str
    verify_peer: bool
    shared_keys: bool
    user: str

    def for_server(self) -> ssl.SSLContext:
        """Raises Invalid where they are a client's, and as ``nbd.tls`` does."""
        from cowfence.nbd.tls import psk_context, server_context

        if self.endpoint != "server":
            raise Invalid("Expecting TLS credentials with a server endpoint")
        if self.shared_keys:
            return psk_context(os.path.join(self.directory, "keys.psk"))
        return server_context(self.directory, verify_peer=self.verify_peer)


@dataclass(slots=True)
class Objects:
    """What ``--object`` described, by id. ``identities``: of ``authz-simple``, the name that may come in."""

    credentials: dict[str, Credentials] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)


def split_objects(arguments: argparse.Namespace) -> Objects:
    """All of ``--object`` but the secrets, which alone are left in ``arguments``. Raises Invalid, Unsupported."""
    found, secrets = Objects(), []
    for text in arguments.secrets:
        kind, *items = re.findall(r"(?:[^,]|,,)+", text) or [""]
        kind = kind.removeprefix("qom-type=")
        if kind == "secret":
            secrets.append(text)
            continue
        if kind not in _KINDS:
            raise Unsupported(f"--object {kind}", f"this kind of object; there are {', '.join(_KINDS)}")
        fields = dict(item.replace(",,", ",").partition("=")[::2] for item in items)
        identity = fields.pop("id", "")
        if not identity:
            raise Invalid("Parameter 'id' is missing")
        if identity in found.credentials or identity in found.identities:
            raise Invalid(f"attempt to add duplicate property '{identity}'")
        if kind == "authz-simple":
            if "identity" not in fields:
                raise Invalid("Parameter 'identity' is missing")
            found.identities[identity] = fields.pop("identity")
        else:
            found.credentials[identity] = _credentials(kind, fields)
        if fields:
            raise Invalid(f"Property '{kind}.{sorted(fields)[0]}' not found")
    arguments.secrets = secrets
    return found


def _credentials(kind: str, fields: dict[str, str]) -> Credentials:
    directory = fields.pop("dir", None)
    if directory is None:
        raise Invalid(f"--object {kind}: the directory (dir=) is missing")
    endpoint = fields.pop("endpoint", "client")
    if endpoint not in ("client", "server"):
        raise Invalid(f"Parameter 'endpoint' does not accept value '{endpoint}'")
    text = fields.pop("verify-peer", "on")
    if text not in _BOOLEANS:
        raise Invalid("Parameter 'verify-peer' expects 'on' or 'off'")
    user = fields.pop("username", "qemu")
    return Credentials(directory, endpoint, _BOOLEANS[text], kind == "tls-creds-psk", user)
