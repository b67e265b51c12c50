"""NBD URIs: ``nbd://host:port/export``, ``nbd+unix:///export?socket=PATH``, and with TLS ``nbds://`` and ``nbds+unix://``
(NetworkBlockDevice/nbd, doc/uri.md).

A URI is data from the user, never turned into arguments of a program. For TLS the query may have ``tls-certificates`` (a
directory, see ``tls``), ``tls-hostname``, ``tls-verify-peer`` and ``tls-psk-file``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cowfence.errors import Invalid
from cowfence.nbd.messages import DEFAULT_PORT

_PLACES: Final = {"nbd": False, "nbds": False, "nbd+unix": True, "nbds+unix": True}
_TLS_WORDS: Final = ("tls-certificates", "tls-hostname", "tls-verify-peer", "tls-psk-file")
_BOOLEANS: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is: at a Unix socket where ``socket_path`` is set, else at ``host`` and ``port``.

    ``tls``: with TLS, or not at all. ``tls_directory``: where its certificates are; None: none of ours, and the host's CAs.
    ``psk_file``: of keys that both sides share; ``user``: whose.
    """

    export: str = ""
    host: str = "localhost"
    port: int = DEFAULT_PORT
    socket_path: str | None = None
    tls: bool = False
    tls_directory: str | None = None
    tls_hostname: str | None = None
    verify_peer: bool = True
    psk_file: str | None = None
    user: str | None = None

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Raises ``Invalid`` for what is no NBD URI."""
        try:
            parts = urlsplit(text)
            port = parts.port
            query = parse_qs(parts.query, keep_blank_values=True, errors="surrogateescape")  # names of files, of any bytes
            export = unquote(parts.path[1:], errors="strict")
            user = None if parts.username is None else unquote(parts.username, errors="strict")
            (export + (user or "")).encode()
        except ValueError as error:
            raise Invalid(f"'{text}' is not an NBD URI: {error}") from error
        if parts.scheme not in _PLACES:
            raise Invalid(f"'{text}' is not an NBD URI: nbd://host[:port]/export or nbd+unix:///export?socket=PATH")
        if any(len(values) != 1 for values in query.values()):
            raise Invalid(f"'{text}': a word of the query is given twice")
        words = {name: values[0] for name, values in query.items()}
        tls = parts.scheme.startswith("nbds")
        if not tls and (given := [word for word in _TLS_WORDS if word in words]):
            raise Invalid(f"'{text}': {given[0]} goes with nbds:// and nbds+unix://")
        verify_peer = _BOOLEANS.get(words.get("tls-verify-peer", "true").lower())
        if verify_peer is None:
            raise Invalid(f"'{text}': tls-verify-peer is true or false")
        if _PLACES[parts.scheme]:
            if not words.get("socket") or parts.hostname:
                raise Invalid(f"'{text}' needs exactly one ?socket=PATH and no host")
        elif not parts.hostname or "socket" in words:
            raise Invalid(f"'{text}' is not an NBD URI: nbd://host[:port]/export or nbd+unix:///export?socket=PATH")
        return cls(
            export,
            parts.hostname or "localhost",
            DEFAULT_PORT if port is None else port,
            words.get("socket"),
            tls,
            words.get("tls-certificates"),
            words.get("tls-hostname"),
            verify_peer,
            words.get("tls-psk-file"),
            user,
        )

    def __str__(self) -> str:
        export = quote(self.export, safe="", errors="surrogateescape")
        scheme = "nbds" if self.tls else "nbd"
        user = "" if self.user is None else f"{quote(self.user, safe='', errors='surrogateescape')}@"
        words = {
            "socket": self.socket_path,
            "tls-certificates": self.tls_directory,
            "tls-hostname": self.tls_hostname,
            "tls-verify-peer": None if self.verify_peer else "false",
            "tls-psk-file": self.psk_file,
        }
        given = {name: value for name, value in words.items() if value is not None}
        query = "&".join(f"{name}={quote(value, errors='surrogateescape')}" for name, value in given.items())
        query = f"?{query}" if query else ""
        if self.socket_path is not None:
            return f"{scheme}+unix://{user}/{export}{query}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{user}{host}:{self.port}/{export}{query}"
