"""Images as qemu-img's users name them: a file, an NBD URI, a URL, ``json:{...}``, or (``--image-opts``) a list of
``key=value``. What is changed in place is a file (``local_file``).

The command line is the user's own word, so a protocol may stand in it; what an image itself names is the policy's business
(``disk.opener``).
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from cowfence.cli.formats import looked_at, not_qcow2
from cowfence.cli.main import references
from cowfence.cli.secrets import secret_named, secrets_of
from cowfence.disk.opener import printable
from cowfence.errors import Invalid, ReadOnly, Unsupported
from cowfence.storage.remote import SCHEMES, is_remote

if TYPE_CHECKING:
    from cowfence.disk.base import Disk
    from cowfence.qcow2.encryption import Secrets

_FORMATS: Final = ("qcow2", "raw", "luks")
CACHES: Final = ("none", "writeback", "writethrough", "directsync", "unsafe")
CACHE_HELP: Final = "none or directsync: {} around the page cache; writeback (default), writethrough, unsafe: through it"
_PROTOCOLS: Final = ("nbd://", "nbd+unix://", "nbds://", "nbds+unix://")


@dataclass(frozen=True, slots=True)
class Source:
    """What a name on the command line means. ``format``: None where nobody said. ``secret``: the id of what opens it.
    ``reconnect_seconds``: of an NBD export, see ``nbd.recovery``; None where nobody said."""

    name: str
    format: str | None = None
    secret: str | None = None
    reconnect_seconds: float | None = None


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """``--image-opts``, ``-T`` and ``-U``, for subcommands that read images."""
    add_image_opts_option(parser)
    parser.add_argument("-T", dest="source_cache", metavar="CACHE", help=CACHE_HELP.format("read"))
    parser.add_argument("-U", "--force-share", action="store_true", help="read an image that another process writes to")


def add_image_opts_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-opts", action="store_true", help="images are given as driver=...,file.filename=...")


def goes_direct(cache: str | None, what: str = "cache") -> bool:
    """True if the cache mode that ``-t`` or ``-T`` gives leads around the page cache. Raises Invalid for what is none."""
    if cache not in (None, *CACHES):
        raise Invalid(f"Invalid {what} option: {cache}")
    return cache in ("none", "directsync")


def parse_source(text: str, *, image_opts: bool) -> Source:
    """Raises Invalid, Unsupported for what cannot be described here."""
    if image_opts:
        return _described(_options(text), text)
    if text.startswith("json:"):
        try:
            found = json.loads(text[5:])
            if not isinstance(found, dict):
                raise Invalid("Invalid JSON object given")
            options = dict(_flat(found, ""))
        except ValueError as error:
            raise Invalid(f"Could not parse the JSON options: {error}") from None
        except RecursionError:
            raise Invalid("Could not parse the JSON options: too deep") from None
        return _described(options, text)
    return Source(text)


def _options(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in re.findall(r"(?:[^,]|,,)+", text):
        name, equals, value = item.replace(",,", ",").partition("=")
        if not equals:
            raise Invalid(f"Could not open '{text}': Cannot find device='{name}' nor node-name='{name}'")
        found[name] = value
    return found


def _flat(found: dict[str, object], prefix: str) -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in found.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            flat.append((prefix + name, "on" if value else "off"))
        else:
            flat.append((prefix + name, str(value)))
    return flat


def _described(options: dict[str, str], text: str) -> Source:
    shown = printable(text)
    driver = options.pop("driver", None)
    protocol = options.pop("file.driver", "file")
    if driver in ("file", "host_device", "nbd", *SCHEMES):
        options = {f"file.{name}": value for name, value in options.items()}
        driver, protocol = "raw", driver
    secret = options.pop("encrypt.key-secret", None) or options.pop("key-secret", None)
    reconnect: float | None = None
    if driver is not None and driver not in _FORMATS:
        raise Unsupported(shown, f"the driver {driver!a}; here are {', '.join(_FORMATS)}")
    if protocol in ("file", "host_device"):
        name = options.pop("file.filename", None) or options.pop("filename", None)
        if name is None:
            raise Invalid(f'{shown}: A block device must be specified for "file"')
    elif protocol == "nbd":
        name = _nbd_uri(options, shown)
        if "file.reconnect-delay" in options:
            reconnect = reconnect_seconds(options.pop("file.reconnect-delay"), "reconnect-delay")
    elif protocol in SCHEMES:
        name = options.pop("file.url", "")
        if not is_remote(name):
            raise Invalid(f"{shown}: a URL must be specified with file.url")
    else:
        raise Unsupported(shown, f"the protocol {protocol!a}; here are file, host_device, nbd and {', '.join(SCHEMES)}")
    if options:
        raise Unsupported(shown, f"the option {sorted(options)[0]!a}")
    return Source(name, driver, secret, reconnect)


def _nbd_uri(options: dict[str, str], shown: str) -> str:
    from urllib.parse import quote

    export = quote(options.pop("file.export", ""), safe="")
    kind = options.pop("file.server.type", None)
    path, host, port = (options.pop(f"file.server.{name}", None) for name in ("path", "host", "port"))
    path, host, port = (
        path or options.pop("file.path", None),
        host or options.pop("file.host", None),
        port or options.pop("file.port", None),
    )
    if path is not None and kind in (None, "unix"):
        return f"nbd+unix:///{export}?socket={quote(path)}"
    if host is not None and kind in (None, "inet"):
        return f"nbd://{host}:{port or 10809}/{export}"
    raise Invalid(f"{shown}: an NBD server needs a path, or a host")


def reconnect_seconds(text: str, option: str) -> float:
    """The value of an option. Raises Invalid."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise Invalid(f"Invalid {option}: {text!a} is no number of seconds, 0 or more")
    return seconds


def is_nbd(source: Source) -> bool:
    return source.name.startswith(_PROTOCOLS)


def secrets_for(source: Source, arguments: argparse.Namespace) -> Secrets | None:
    """What opens it: the secret that it names, or else every one that was given."""
    if source.secret is None:
        return secrets_of(arguments)
    value = secret_named(arguments, source.secret)
    return lambda _: [value]


def is_local(source: Source) -> bool:
    """True for a file, False for an NBD export and what is behind a URL."""
    return not (is_nbd(source) or is_remote(source.name))


def local_file(text: str, arguments: argparse.Namespace) -> Source:
    """The file that ``text`` names, for subcommands that change an image, or look at more than its disk.

    Its format is what ``text``, or else ``-f`` says; None: nobody did. Raises Invalid, Unsupported (what is no file)."""
    if arguments.image_opts and arguments.format is not None:
        raise Invalid("--image-opts and --format are mutually exclusive")
    source = parse_source(text, image_opts=arguments.image_opts)
    if not is_local(source):
        raise Unsupported(printable(source.name), "changing, or looking into, an image that is no file")
    return replace(source, format=source.format or arguments.format)


def open_source(text: str, arguments: argparse.Namespace, *, format_name: str | None, snapshot: str | None = None) -> Disk:
    """The disk that ``text`` names, for reading. ``format_name``: that of ``-f``. Raises Invalid, Unsupported, and as
    ``chain.open_chain`` and the NBD client do."""
    image_opts = getattr(arguments, "image_opts", False)
    if image_opts and format_name is not None:
        raise Invalid("--image-opts and --format are mutually exclusive")
    direct = goes_direct(getattr(arguments, "source_cache", None), "source cache")
    source = parse_source(text, image_opts=image_opts)
    if is_nbd(source):
        return _open_nbd(source, arguments, format_name, snapshot)
    if is_remote(source.name):
        return _open_remote(source, arguments, format_name, snapshot)
    from cowfence.chain import open_chain

    chosen = source.format or format_name
    if chosen is None:
        chosen = looked_at(source.name, arguments)
    if chosen not in _FORMATS:
        raise Unsupported(printable(source.name), f"the format {chosen!a}; here are {', '.join(_FORMATS)}")
    return open_chain(
        source.name,
        format=chosen,
        refs=references(arguments, source.name),
        force_share=getattr(arguments, "force_share", False),
        assume_backing_format=arguments.assume_backing_format,
        secrets=secrets_for(source, arguments),
        snapshot=None if snapshot is None else _snapshot(snapshot, source.name, arguments),
        direct=direct,
    )


def _snapshot(text: str, image: str, arguments: argparse.Namespace) -> str:
    """The id, or else the name, that ``-l`` gives, also as ``snapshot.id=ID,snapshot.name=NAME``. Raises Invalid."""
    if not text.startswith("snapshot."):
        return text
    from cowfence.ops.snapshot import list_snapshots

    wanted = _options(text)
    unknown = next((name for name in wanted if name not in ("snapshot.id", "snapshot.name")), None)
    if unknown is not None:
        raise Invalid(f"Invalid parameter '{unknown}'")
    for found in list_snapshots(image, force_share=getattr(arguments, "force_share", False)):
        if {"snapshot.id": found.id, "snapshot.name": found.name}.items() >= wanted.items():
            return found.id
    raise Invalid(f"{printable(image)}: there is no snapshot {text!a}")


def _open_remote(source: Source, arguments: argparse.Namespace, format_name: str | None, snapshot: str | None) -> Disk:
    """What is behind a URL. An image there that names other files is refused: nobody knows where those would be."""
    from cowfence.disk.raw import RawDisk
    from cowfence.qcow2.describe import probe
    from cowfence.qcow2.header import read_header
    from cowfence.qcow2.image import open_image
    from cowfence.storage.remote import RemoteStorage

    shown = printable(source.name)
    chosen = source.format or format_name
    if chosen not in (None, "qcow2", "raw"):
        raise Unsupported(shown, f"the format {chosen!a} behind a URL")
    storage = RemoteStorage(source.name)
    try:
        if chosen == "raw":
            if snapshot is not None:
                raise Invalid(f"{shown}: an internal snapshot is read from a qcow2 image, and never written")
            return RawDisk(storage)
        if chosen is None and probe(storage) == "unknown":
            raise not_qcow2(source.name)
        header = read_header(storage)
        if header.backing_name is not None or header.geometry.external_data:
            raise Unsupported(shown, "a backing file or an external data file of an image behind a URL")
        return open_image(storage, backing=None, writable=False, snapshot=snapshot, secrets=secrets_for(source, arguments))
    except BaseException:
        storage.close()
        raise


def open_target(text: str, arguments: argparse.Namespace) -> tuple[Disk, str]:
    """The existing disk that ``text`` names, for writing, and its format: that of ``-O``, or what ``--target-image-opts`` says.
    Raises as ``open_source`` does, and ReadOnly for an export that is."""
    target = parse_source(text, image_opts=arguments.target_image_opts)
    format_name = target.format or arguments.target_format or "raw"
    if is_nbd(target):
        disk = _open_nbd(target, arguments, format_name, None)
        if not disk.writable:
            disk.close()
            raise ReadOnly(f"{printable(target.name)}: the server exports it read-only")
        return disk, "raw"
    import cowfence

    disk = cowfence.open(
        target.name,
        format=format_name,
        writable=True,
        refs=references(arguments, target.name),
        direct=arguments.target_cache in ("none", "directsync"),
        secret=secrets_for(target, arguments),
    )
    return disk, format_name


def _open_nbd(source: Source, arguments: argparse.Namespace, format_name: str | None, snapshot: str | None) -> Disk:
    from cowfence.nbd.client import NbdDisk

    chosen = source.format or format_name
    if chosen not in (None, "raw"):
        raise Unsupported(source.name, f"the format {chosen} behind NBD; let the server read it")
    if snapshot is not None:
        raise Invalid(f"{printable(source.name)}: an internal snapshot is read from a qcow2 image, not from an NBD export")
    seconds = getattr(arguments, "reconnect", None) if source.reconnect_seconds is None else source.reconnect_seconds
    return NbdDisk(source.name, reconnect_seconds=seconds or 0.0)
