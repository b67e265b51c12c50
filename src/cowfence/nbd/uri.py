"""NBD URIs: ``nbd://host:port/export`` and ``nbd+unix:///export?socket=PATH`` (NetworkBlockDevice/nbd, doc/uri.md).

A URI is data from the user, never turned into arguments of a program. TLS schemes (``nbds``) are known and refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cowfence.errors import Invalid, Unsupported
from cowfence.nbd.messages import DEFAULT_PORT


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is: at a Unix socket where ``socket_path`` is set, else at ``host`` and ``port``."""

    export: str = ""
    host: str = "localhost"
    port: int = DEFAULT_PORT
    socket_path: str | None = None

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Raises ``Invalid`` for what is no NBD URI and ``Unsupported`` for TLS."""
        try:
            parts = urlsplit(text)
            port = parts.port
            query = parse_qs(parts.query, keep_blank_values=True, errors="strict")
            export = unquote(parts.path[1:], errors="strict")
        except ValueError as error:
            raise Invalid(f"'{text}' is not an NBD URI: {error}") from error
        if parts.scheme in ("nbds", "nbds+unix"):
            raise Unsupported(text, "NBD over TLS")
        if parts.scheme == "nbd+unix":
            paths = query.get("socket", [])
            if len(paths) != 1 or not paths[0] or parts.netloc:
                raise Invalid(f"'{text}' needs exactly one ?socket=PATH and no host")
            return cls(export, socket_path=paths[0])
        if parts.scheme != "nbd" or not parts.hostname or "socket" in query:
            raise Invalid(f"'{text}' is not an NBD URI: nbd://host[:port]/export or nbd+unix:///export?socket=PATH")
        return cls(export, parts.hostname, DEFAULT_PORT if port is None else port)

    def __str__(self) -> str:
        export = quote(self.export, safe="")
        if self.socket_path is not None:
            return f"nbd+unix:///{export}?socket={quote(self.socket_path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{export}"
