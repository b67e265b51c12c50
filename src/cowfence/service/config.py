"""The configuration of a server that serves many exports: a TOML file, every word of which has to be known.

[server]                      # where, for whom, how much
socket = "/run/disks.sock"
tls = "/etc/pki/disks"
control = "/run/disks.control"

[[export]]                    # as often as needed
name = "mail"
image = "mail.qcow2"          # relative names: to the directory of the file
bitmaps = ["daily"]
"""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any, Final

from cowfence.errors import Invalid, StorageFailed
from cowfence.nbd.server import Limits
from cowfence.service.exports import CACHE_BYTES, CACHES, COMMIT_SECONDS, DETECT_ZEROES, ExportSpec
from cowfence.units import parse_size

FORMATS: Final = ("qcow2", "raw", "luks")
_NAME_MAX_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server listens (``socket``, or ``bind`` and ``port``), and for whom.

    ``insecure``: an address that others can reach, without TLS. ``tls``: the directory of its certificate; ``tls_offered``:
    clients may do without; ``verify_clients``: they show a certificate. ``control``: the path of the socket for ``cowfence
    ctl``; ``metrics``: HOST:PORT for whoever watches.
    """

    socket: str | None = None
    bind: str | None = None
    port: int | None = None
    insecure: bool = False
    tls: str | None = None
    tls_offered: bool = False
    verify_clients: bool = True
    control: str | None = None
    metrics: str | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export, and the policy for what its image names. ``roots``: see ``Refs.under``; ``secret_file``: holds a
    passphrase."""

    spec: ExportSpec
    roots: tuple[str, ...] = ()
    untrusted: bool = False
    secret_file: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """All of it."""

    server: ServerSettings
    exports: tuple[ExportPlan, ...]


def read_config(path: str) -> ServiceConfig:
    """The configuration in a file. Raises Invalid, which names the word that is wrong, and StorageFailed."""
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise StorageFailed(path, "open", 0, error) from error
    except ValueError as error:  # also of bytes that are no text, and of numbers that are too long
        raise Invalid(f"{path}: {error}") from None
    except RecursionError:
        raise Invalid(f"{path}: too deep") from None
    base = os.path.dirname(os.path.abspath(path))
    try:
        return _config(found, base)
    except Invalid as error:
        raise Invalid(f"{path}: {error}") from None


def _config(found: dict[str, Any], base: str) -> ServiceConfig:
    unknown = sorted(found.keys() - {"server", "export"})
    if unknown:
        raise Invalid(f"unknown table {unknown[0]!a}; there are [server] and [[export]]")
    server, exports = found.get("server", {}), found.get("export", [])
    if not isinstance(server, dict) or not isinstance(exports, list) or not all(isinstance(one, dict) for one in exports):
        raise Invalid("[server] is a table, and [[export]] an array of tables")
    plans = tuple(_plan(one, base) for one in exports)
    if not plans:
        raise Invalid("there is no [[export]]")
    names = [plan.spec.name for plan in plans]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Invalid(f"two exports with the name {twice!a}")
    return ServiceConfig(_settings(server, base), plans)


def _settings(found: Mapping[str, Any], base: str) -> ServerSettings:
    words = _Words(found, "[server]", base)
    limits = Limits()
    limits = replace(
        limits,
        connections=words.number("clients", limits.connections, least=1),
        client_requests=words.number("client-requests", limits.client_requests, least=1),
        client_bytes=words.size("client-bytes", limits.client_bytes, least=1),
        handshake_seconds=words.seconds("handshake-seconds", limits.handshake_seconds) or limits.handshake_seconds,
        idle_seconds=words.seconds("idle-seconds", None),
    )
    settings = ServerSettings(
        socket=words.path("socket"),
        bind=words.text("bind"),
        port=words.number("port", -1, least=0, most=65535) if "port" in found else None,
        insecure=words.flag("insecure"),
        tls=words.path("tls"),
        tls_offered=words.flag("tls-offered"),
        verify_clients=words.flag("verify-clients", default=True),
        control=words.path("control"),
        metrics=words.text("metrics"),
        limits=limits,
    )
    words.end()
    return settings


def _plan(found: Mapping[str, Any], base: str) -> ExportPlan:
    words = _Words(found, f"[[export]] {found.get('name', found.get('image', ''))!a}", base)
    image = words.path("image")
    if image is None:
        raise Invalid(f"{words.where}: image is missing")
    clients = words.texts("clients")
    spec = ExportSpec(
        path=image,
        name=words.text("name") or "",
        format=words.choice("format", FORMATS, "qcow2"),
        read_only=words.flag("read-only"),
        description=words.text("description") or "",
        cache=words.choice("cache", tuple(CACHES), "writeback"),
        discard=words.flag("discard", default=True),
        detect_zeroes=words.choice("detect-zeroes", DETECT_ZEROES, "off"),
        snapshot=words.text("snapshot"),
        temporary=words.flag("temporary"),
        offset=words.size("offset", 0),
        bitmaps=words.texts("bitmaps") or (),
        allocation_depth=words.flag("allocation-depth"),
        clients=None if clients is None else frozenset(clients),
        assume_backing_format=words.choice("assume-backing-format", FORMATS, "") or None,
        keeper=words.flag("keeper", default=True),
        cache_bytes=words.size("cache-size", CACHE_BYTES),
        commit_interval=words.seconds("commit-seconds", COMMIT_SECONDS),
        into_backing=words.flag("commit-into-backing"),
        snapshots=words.flag("snapshots"),
    )
    plan = ExportPlan(spec, words.paths("roots"), words.flag("untrusted"), words.path("secret-file"))
    words.end()
    return plan


def check_config(config: ServiceConfig) -> None:
    """What must not be said together. Raises Invalid, and StorageFailed for an address that cannot be looked up."""
    settings, specs = config.server, [plan.spec for plan in config.exports]
    if settings.socket is not None and (settings.bind is not None or settings.port is not None):
        raise Invalid("a socket excludes an address and a port")
    if settings.tls is None and (settings.tls_offered or not settings.verify_clients):
        raise Invalid("TLS is not offered without a certificate (tls)")
    if settings.tls is None and any(spec.clients is not None for spec in specs):
        raise Invalid("clients are known by their certificates, which need TLS (tls)")
    if any(spec.force_share and spec.writes for spec in specs):
        raise Invalid("--force-share needs --read-only")
    open_to_all = settings.tls is None or settings.tls_offered
    if settings.bind is not None and open_to_all and not settings.insecure and not _is_loopback(settings.bind):
        raise Invalid(
            f"{settings.bind} can be reached from other hosts, and anyone there could read and write the disk; "
            "add --tls DIR, or --insecure to serve it nevertheless"
        )
    if any(len(spec.name.encode("utf-8", "surrogateescape")) > _NAME_MAX_BYTES for spec in specs):
        raise Invalid(f"an export's name has at most {_NAME_MAX_BYTES} bytes")


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        cause = error if isinstance(error, OSError) else OSError(0, "no host name")
        raise StorageFailed(host, "look up", 0, cause) from error
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


class _Words:
    """The words of a table, taken one by one; ``end`` refuses what is left."""

    def __init__(self, found: Mapping[str, Any], where: str, base: str) -> None:
        self._left = dict(found)
        self.where = where
        self._base = base

    def _take(self, name: str, kinds: type | tuple[type, ...], what: str) -> Any:
        value = self._left.pop(name, None)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
            raise Invalid(f"{self.where}: {name} is {what}")
        return value

    def text(self, name: str) -> str | None:
        found: str | None = self._take(name, str, "a string")
        if found is not None and "\0" in found:
            raise Invalid(f"{self.where}: {name} has a character that ends strings")
        return found

    def path(self, name: str) -> str | None:
        found = self.text(name)
        return None if found is None else os.path.join(self._base, found)

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        found = self.text(name)
        if found is not None and found not in choices:
            raise Invalid(f"{self.where}: {name} is one of {', '.join(choices)}")
        return default if found is None else found

    def flag(self, name: str, *, default: bool = False) -> bool:
        found = self._take(name, bool, "true or false")
        return default if found is None else bool(found)

    def number(self, name: str, default: int, *, least: int, most: int | None = None) -> int:
        found = self._take(name, int, "a number")
        if found is not None and found < least:
            raise Invalid(f"{self.where}: {name} is at least {least}")
        if found is not None and most is not None and found > most:
            raise Invalid(f"{self.where}: {name} is at most {most}")
        return default if found is None else int(found)

    def seconds(self, name: str, default: float | None) -> float | None:
        found = self._take(name, (int, float), "a number of seconds")
        if found is not None and not 0 < found < 1e9:
            raise Invalid(f"{self.where}: {name} is a number of seconds greater than 0")
        return default if found is None else float(found)

    def size(self, name: str, default: int, *, least: int = 0) -> int:
        found = self._take(name, (int, str), 'a number of bytes, or such as "64M"')
        if found is None:
            return default
        try:
            size_bytes = parse_size(str(found))
        except ValueError as error:
            raise Invalid(f"{self.where}: {name}: {error}") from None
        if size_bytes < least:
            raise Invalid(f"{self.where}: {name} is at least {least}")
        return size_bytes

    def texts(self, name: str) -> tuple[str, ...] | None:
        found = self._take(name, list, "a list of strings")
        if found is None:
            return None
        if not all(isinstance(one, str) and "\0" not in one for one in found):
            raise Invalid(f"{self.where}: {name} is a list of strings")
        return tuple(found)

    def paths(self, name: str) -> tuple[str, ...]:
        return tuple(os.path.join(self._base, one) for one in self.texts(name) or ())

    def end(self) -> None:
        if self._left:
            raise Invalid(f"{self.where}: unknown word {sorted(self._left)[0]!a}")
