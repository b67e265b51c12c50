"""``cowfence serve``: serve one disk over NBD until SIGTERM or Ctrl-C, then commit everything and leave. If it is killed, its
keeper (``cowfence.keeper``) completes what is pending.

One line on standard output, the NBD URI, says that it listens. Without ``--socket`` it listens at the loopback address only:
NBD here has neither encryption nor passwords, so that any other address needs ``--insecure``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from ipaddress import ip_address

import cowfence
from cowfence.cli.main import add_output_option, add_reference_options, references, size_bytes
from cowfence.cli.secrets import add_secret_options, secrets_of
from cowfence.errors import Invalid, StorageFailed
from cowfence.nbd.export import Export
from cowfence.nbd.messages import DEFAULT_PORT
from cowfence.nbd.server import Server
from cowfence.units import MIB

_LOOPBACK = "127.0.0.1"
_DEFAULT_CACHE_BYTES = 32 * MIB
_DEFAULT_INTERVAL_SECONDS = 5.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", choices=("qcow2", "raw", "luks"), default="qcow2", help="format (default: qcow2)")
    parser.add_argument("-k", "--socket", metavar="PATH", help="listen at this Unix socket instead of TCP")
    parser.add_argument("-b", "--bind", metavar="HOST", help=f"address to listen at (default: {_LOOPBACK})")
    parser.add_argument("-p", "--port", type=_port, help=f"TCP port, 0 for any (default: {DEFAULT_PORT})")
    parser.add_argument("--insecure", action="store_true", help="allow an address that other hosts can reach")
    parser.add_argument("-x", "--name", "--export-name", default="", metavar="EXPORT", help="name of the export")
    parser.add_argument("-r", "--read-only", action="store_true", help="refuse writes; the image is not changed")
    parser.add_argument(
        "--cache",
        choices=("writeback", "writethrough", "unsafe"),
        default="writeback",
        help="writes are durable at the client's flush (default), at once, or at no certain time",
    )
    parser.add_argument("--cache-size", type=size_bytes, metavar="SIZE", help="of tables in memory (default: 32M)")
    parser.add_argument(
        "--commit-interval", type=_seconds, metavar="SECONDS", help="commit an idle client's writes after (default: 5)"
    )
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read an image that another process writes to; needs --read-only"
    )
    parser.add_argument(
        "--no-keeper",
        action="store_true",
        help="start no helper process; if the server is killed, what clients wrote since their last flush may be lost",
    )
    add_reference_options(parser)
    add_output_option(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port: 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds greater than 0")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    disk = _open(arguments)
    try:
        server = Server({arguments.name: Export(disk, read_only=arguments.read_only)})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: server.stop())
        if arguments.socket is not None:
            server.listen_unix(arguments.socket)
        else:
            port = DEFAULT_PORT if arguments.port is None else arguments.port
            server.listen_tcp(arguments.bind or _LOOPBACK, port)
        _announce(arguments, server.uri(arguments.name))
        server.serve_forever()
    finally:
        disk.close()
    return 0


def _announce(arguments: argparse.Namespace, uri: str) -> None:
    if arguments.output == "json":
        # On one line: who waits for it reads lines.
        print(json.dumps({"uri": uri, "export": arguments.name, "pid": os.getpid()}), flush=True)
    else:
        print(uri, flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """What the options must not say together. Raises Invalid."""
    if arguments.socket is not None and (arguments.bind is not None or arguments.port is not None):
        raise Invalid("--socket excludes --bind and --port")
    if arguments.force_share and not arguments.read_only:
        raise Invalid("--force-share needs --read-only")
    if arguments.bind is not None and not arguments.insecure and not _is_loopback(arguments.bind):
        raise Invalid(
            f"{arguments.bind} can be reached from other hosts, and anyone there could read and write the disk; "
            "add --insecure to serve it nevertheless"
        )
    if len(arguments.name.encode("utf-8", "surrogateescape")) > 4096:
        raise Invalid("an export's name has at most 4096 bytes")


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        cause = error if isinstance(error, OSError) else OSError(0, "no host name")
        raise StorageFailed(host, "look up", 0, cause) from error
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _open(arguments: argparse.Namespace) -> cowfence.Qcow2Disk | cowfence.RawDisk:
    image: str = arguments.image
    format_name: str = arguments.format
    return cowfence.open(
        image,
        writable=not arguments.read_only,
        format=format_name,
        refs=references(arguments, image),
        cache_bytes=_DEFAULT_CACHE_BYTES if arguments.cache_size is None else arguments.cache_size,
        mode=arguments.cache,
        commit_interval=_DEFAULT_INTERVAL_SECONDS if arguments.commit_interval is None else arguments.commit_interval,
        force_share=arguments.force_share,
        assume_backing_format=arguments.assume_backing_format,
        keeper=not (arguments.no_keeper or arguments.read_only or arguments.cache == "unsafe" or format_name != "qcow2"),
        secret=secrets_of(arguments),
    )
