"""``cowfence-nbd``: qemu-nbd's command line. What it serves, and how, is the same as with ``cowfence serve``.

It listens at the loopback address where ``-b`` does not say something else.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from cowfence import __version__
from cowfence.cli.main import EXIT_FAILED, Parser, complain, references, run_program
from cowfence.cli.secrets import add_secret_options
from cowfence.errors import CowfenceError, Invalid, Unsupported
from cowfence.units import parse_size

if TYPE_CHECKING:
    from cowfence.cli.objects import Credentials
    from cowfence.cli.sources import Source
    from cowfence.nbd.uri import NbdUri
    from cowfence.service.exports import ExportSpec

_PROGRAM: Final = "cowfence-nbd"
_LOOPBACK: Final = "127.0.0.1"
_REFUSED: Final = {
    "connect": ("-c", "the kernel's NBD client; connect with nbd-client, or mount with nbdfuse"),
    "disconnect": ("-d", "the kernel's NBD client; disconnect with nbd-client"),
    "trace": ("-T", "tracing; see -v"),
    "selinux_label": ("--selinux-label", "labels of sockets"),
}


class _Once(argparse.Action):
    """``-n`` and ``--cache`` are one option, given once."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option: str | None = None,  # noqa: ARG002
    ) -> None:
        if namespace.cache is not None:
            raise Invalid("-n and --cache can only be specified once")
        namespace.cache = self.const or values


def entry(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default); returns the exit code."""
    return run_program(_PROGRAM, _run, list(sys.argv[1:] if argv is None else argv))


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = Parser(prog=_PROGRAM, description="Serve a disk over NBD, or list what a server has.")
    made.set_defaults(program=_PROGRAM, cache=None, ref_root=[], untrusted=False)
    made.add_argument("-V", "--version", action="version", version=f"{_PROGRAM} {__version__}")
    network = made.add_argument_group("connection")
    network.add_argument("-p", "--port", metavar="PORT", help="(default: 10809)")
    network.add_argument("-b", "--bind", metavar="HOST", help=f"address to listen at (default: {_LOOPBACK})")
    network.add_argument("-k", "--socket", metavar="PATH", help="listen at this Unix socket instead")
    network.add_argument("-e", "--shared", metavar="NUM", default="1", help="clients at a time; 0: no limit (default: 1)")
    network.add_argument("-t", "--persistent", action="store_true", help="go on when the last client has left")
    network.add_argument("-x", "--export-name", metavar="NAME", default="", help="(default: empty)")
    network.add_argument("-D", "--description", metavar="TEXT", default="", help="of the export")
    network.add_argument("-v", "--verbose", action="store_true", help="tell about connections on standard error")
    network.add_argument("--tls-creds", metavar="ID", help="all clients need TLS; an --object tls-creds-...")
    network.add_argument("--tls-authz", metavar="ID", help="who may come in; an --object authz-simple")
    network.add_argument("-L", "--list", action="store_true", help="list what another server exports")
    network.add_argument("--tls-hostname", metavar="HOST", help="with -L: the name in the server's certificate")
    part = made.add_argument_group("part of the image")
    part.add_argument("-o", "--offset", metavar="BYTES", default="0", help="where the export begins")
    part.add_argument("-A", "--allocation-depth", action="store_true", help="tell which layer a range comes from")
    part.add_argument(
        "-B", "--bitmap", dest="bitmaps", action="append", default=[], metavar="NAME", help="tell what it recorded"
    )
    process = made.add_argument_group("process")
    process.add_argument("--fork", action="store_true", help="return when the server is ready")
    process.add_argument("--pid-file", metavar="PATH", help="write the number of the process there")
    image = made.add_argument_group("image")
    image.add_argument("-f", "--format", metavar="FORMAT", help="qcow2, raw or luks (default: qcow2 if it looks so)")
    image.add_argument("-r", "--read-only", action="store_true", help="refuse writes")
    image.add_argument("-s", "--snapshot", action="store_true", help="what is written is thrown away at the end")
    image.add_argument("-l", "--load-snapshot", metavar="SNAPSHOT", help="export this internal snapshot, read-only")
    image.add_argument("-n", "--nocache", action=_Once, nargs=0, const="none", help="--cache=none")
    image.add_argument("--cache", action=_Once, metavar="MODE", help="none, writeback, writethrough, directsync, unsafe")
    image.add_argument("--aio", metavar="MODE", default="threads", help="threads")
    image.add_argument("--discard", metavar="MODE", default="unmap", help="unmap (default), ignore")
    image.add_argument("--detect-zeroes", metavar="MODE", default="off", help="off (default), on, unmap")
    image.add_argument("--image-opts", action="store_true", help="the file is given as driver=...,file.filename=...")
    image.add_argument("--ref-root", action="append", metavar="DIR", help="also open backing files under DIR")
    image.add_argument("--untrusted", action="store_true", help="open no file that the image names")
    image.add_argument(
        "--assume-backing-format", choices=("qcow2", "raw", "luks"), help="of backing files of no recorded format"
    )
    refused = made.add_argument_group("refused by name")
    refused.add_argument("-c", "--connect", metavar="DEV", help=argparse.SUPPRESS)
    refused.add_argument("-d", "--disconnect", action="store_true", help=argparse.SUPPRESS)
    refused.add_argument("-T", "--trace", metavar="PATTERN", help=argparse.SUPPRESS)
    refused.add_argument("--selinux-label", metavar="LABEL", help=argparse.SUPPRESS)
    add_secret_options(made)
    made.add_argument("files", nargs="*", metavar="FILE")
    return made


def _run(words: list[str]) -> int:
    arguments = parser().parse_intermixed_args(words)
    for name, (option, what) in _REFUSED.items():
        if getattr(arguments, name):
            raise Unsupported(option, what)
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO, format=f"{_PROGRAM}: %(message)s")
    if arguments.list:
        if arguments.files:
            raise Invalid("List mode is incompatible with a file name")
        return _list(arguments)
    if len(arguments.files) != 1:
        raise Invalid("Invalid number of arguments")
    return _serve(arguments, arguments.files[0])


def _serve(arguments: argparse.Namespace, name: str) -> int:
    from cowfence.cli.objects import split_objects
    from cowfence.cli.sources import parse_source, secrets_for
    from cowfence.nbd.messages import DEFAULT_PORT
    from cowfence.nbd.server import Limits, Server
    from cowfence.service.exports import OpenedExport
    from cowfence.service.process import Background, PidFile, activated_sockets
    from cowfence.service.run import serve

    objects = split_objects(arguments)
    credentials = _credentials(arguments, objects.credentials)
    context = None if credentials is None else credentials.for_server()
    clients = _allowed(arguments, objects.identities)
    shared = _number(arguments.shared, "shared device number")
    port = DEFAULT_PORT if arguments.port is None else _port(arguments.port)
    sockets = activated_sockets()
    if sockets and (arguments.port, arguments.bind, arguments.socket) != (None, None, None):
        raise Invalid("socket activation excludes -p, -b and -k")
    source = parse_source(name, image_opts=arguments.image_opts)
    spec = _spec(arguments, source, clients)
    background = Background() if arguments.fork else None
    with ExitStack() as stack:
        pid_file = PidFile(arguments.pid_file)
        stack.callback(pid_file.remove)
        opened = OpenedExport(spec, refs=references(arguments, spec.path), secrets=secrets_for(source, arguments))
        stack.callback(opened.close)
        limits = Limits(connections=shared) if shared else Limits()
        server = Server(
            {spec.name: opened.export},
            limits=limits,
            tls=context,
            tls_required=True,
            until_unused=not arguments.persistent,
        )
        stack.callback(server.close)
        for sock in sockets:
            server.listen_on(sock)
        if arguments.socket is not None:
            server.listen_unix(arguments.socket)
        elif not sockets:
            server.listen_tcp(arguments.bind or _LOOPBACK, port)
        pid_file.write()
        serve(server, background.ready if background is not None else lambda: None)
    return 0


def _spec(arguments: argparse.Namespace, source: Source, clients: frozenset[str] | None) -> ExportSpec:
    """What the options describe. Raises Invalid, Unsupported, mostly in qemu-nbd's words."""
    from cowfence.cli.formats import looked_at
    from cowfence.cli.sources import is_nbd
    from cowfence.service.exports import CACHES, DETECT_ZEROES, DISCARDS, ExportSpec

    if arguments.image_opts and arguments.format is not None:
        raise Invalid("--image-opts and -f are mutually exclusive")
    if arguments.cache not in (None, *CACHES):
        raise Invalid(f"Invalid cache mode '{arguments.cache}'")
    if arguments.aio != "threads":
        if arguments.aio in ("native", "io_uring"):
            raise Unsupported("--aio", f"{arguments.aio}: requests are carried out on threads here")
        raise Invalid(f"Invalid aio mode '{arguments.aio}'")
    if arguments.discard not in DISCARDS:
        raise Invalid(f"Invalid discard mode '{arguments.discard}'")
    if arguments.detect_zeroes not in DETECT_ZEROES:
        raise Invalid(f"Failed to parse detect_zeroes mode: invalid parameter value: {arguments.detect_zeroes}")
    if is_nbd(source):
        raise Unsupported(source.name, "serving what another NBD server serves")
    read_only = arguments.read_only or arguments.load_snapshot is not None
    writes = not (read_only or arguments.snapshot)
    return ExportSpec(
        path=source.name,
        name=arguments.export_name,
        format=source.format or arguments.format or looked_at(source.name, arguments, writes=writes),
        read_only=read_only,
        description=arguments.description,
        cache=arguments.cache or "writeback",
        discard=DISCARDS[arguments.discard],
        detect_zeroes=arguments.detect_zeroes,
        snapshot=_snapshot(arguments.load_snapshot),
        temporary=arguments.snapshot,
        offset=_offset(arguments.offset),
        bitmaps=tuple(arguments.bitmaps),
        allocation_depth=arguments.allocation_depth,
        clients=clients,
        assume_backing_format=arguments.assume_backing_format,
        keeper=True,
    )


def _snapshot(text: str | None) -> str | None:
    """``ID_OR_NAME``, or ``snapshot.id=...`` or ``snapshot.name=...``. Raises Invalid."""
    if text is None or not text.startswith("snapshot."):
        return text
    fields = dict(item.partition("=")[::2] for item in text.split(","))
    found = {fields.pop(key) for key in ("snapshot.id", "snapshot.name") if key in fields}
    if fields or len(found) != 1:
        raise Invalid(f"Invalid snapshot '{text}': one of snapshot.id=ID and snapshot.name=NAME")
    return found.pop()


def _credentials(arguments: argparse.Namespace, found: dict[str, Credentials]) -> Credentials | None:
    if arguments.tls_creds is None:
        if arguments.tls_authz is not None:
            raise Invalid("--tls-authz is not permitted without --tls-creds")
        return None
    if arguments.tls_creds not in found:
        raise Invalid(f"Failed to get TLS creds: No TLS credentials with id '{arguments.tls_creds}'")
    return found[arguments.tls_creds]


def _allowed(arguments: argparse.Namespace, identities: dict[str, str]) -> frozenset[str] | None:
    if arguments.tls_authz is None:
        return None
    if arguments.tls_authz not in identities:
        raise Invalid(f"No authorization object with id '{arguments.tls_authz}'")
    return frozenset({identities[arguments.tls_authz]})


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise Invalid(f"Invalid {what} '{text}'")
    return int(text)


def _port(text: str) -> int:
    port = _number(text, "port")
    if port > 65535:
        raise Invalid(f"Invalid port '{text}'")
    return port


def _offset(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise Invalid(f"Invalid offset '{text}'") from None


# --- -L ---


def _list(arguments: argparse.Namespace) -> int:
    from cowfence.nbd.client import list_exports

    uri = _uri(arguments)
    try:
        listed = list_exports(uri)
    except CowfenceError as error:
        return complain(arguments, str(error), EXIT_FAILED)
    print(f"exports available: {len(listed)}")
    for one in listed:
        print(f" export: '{_shown(one.name)}'")
        if one.description:
            print(f"  description: {_shown(one.description)}")
        if one.info is None:
            continue
        print(f"  size:  {one.info.size_bytes}")
        print(f"  flags: {one.info.flags:#x} ( {''.join(f'{name} ' for name in _flag_names(one.info.flags))})")
        if one.named_sizes:
            print(f"  min block: {one.info.minimum_block_bytes}")
            print(f"  opt block: {one.info.preferred_block_bytes}")
            print(f"  max block: {one.info.maximum_block_bytes}")
        if one.info.contexts:
            print(f"  available meta contexts: {len(one.info.contexts)}")
            for context in one.info.contexts:
                print(f"   {_shown(context)}")
    return 0


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def _flag_names(flags: int) -> list[str]:
    """QEMU's words for them."""
    names = ("", "readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize", "cache", "fast-zero")
    return [name for bit, name in enumerate(names) if name and flags & 1 << bit]


def _uri(arguments: argparse.Namespace) -> NbdUri:
    from cowfence.cli.objects import split_objects
    from cowfence.nbd.messages import DEFAULT_PORT
    from cowfence.nbd.uri import NbdUri

    credentials = _credentials(arguments, split_objects(arguments).credentials)
    place = NbdUri(
        host=arguments.bind or _LOOPBACK,
        port=DEFAULT_PORT if arguments.port is None else _port(arguments.port),
        socket_path=arguments.socket,
    )
    if credentials is None:
        return place
    if credentials.endpoint != "client":
        raise Invalid("Expecting TLS credentials with a client endpoint")
    return NbdUri(
        host=place.host,
        port=place.port,
        socket_path=place.socket_path,
        tls=True,
        tls_directory=None if credentials.shared_keys else credentials.directory,
        tls_hostname=arguments.tls_hostname,
        verify_peer=credentials.verify_peer,
        psk_file=f"{credentials.directory}/keys.psk" if credentials.shared_keys else None,
        user=credentials.user,
    )


if __name__ == "__main__":
    sys.exit(entry())
