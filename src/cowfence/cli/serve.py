"""``cowfence serve``: serve disks over NBD until SIGTERM or Ctrl-C, then commit everything and leave. If it is killed, the
keepers of its images (``cowfence.keeper``) complete what is pending.

One line on standard output, the NBD URI, says that it listens. Without ``--socket`` it listens at the loopback address only:
any other address needs TLS, or ``--insecure``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from cowfence.cli.main import add_output_option, add_reference_options, size_bytes
from cowfence.cli.secrets import add_secret_options, secrets_of
from cowfence.errors import Invalid
from cowfence.nbd.messages import DEFAULT_PORT
from cowfence.nbd.server import Limits
from cowfence.service.config import ExportPlan, ServerSettings, ServiceConfig, check_config, read_config
from cowfence.service.exports import CACHE_BYTES, CACHES, COMMIT_SECONDS, DETECT_ZEROES, ExportSpec

if TYPE_CHECKING:
    from cowfence.service.service import Service

_LOOPBACK: Final = "127.0.0.1"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="many exports, and all else, from a TOML file; SIGHUP reads it again")
    where = parser.add_argument_group("where, and for whom")
    where.add_argument("-k", "--socket", metavar="PATH", help="listen at this Unix socket instead of TCP")
    where.add_argument("-b", "--bind", metavar="HOST", help=f"address to listen at (default: {_LOOPBACK})")
    where.add_argument("-p", "--port", type=_port, help=f"TCP port, 0 for any (default: {DEFAULT_PORT})")
    where.add_argument("--insecure", action="store_true", help="allow an address that other hosts can reach without TLS")
    where.add_argument(
        "--tls", metavar="DIR", help="TLS, with the certificate in DIR (server-cert.pem, server-key.pem, ca-cert.pem)"
    )
    where.add_argument("--tls-offered", action="store_true", help="clients may do without TLS (default: they need it)")
    where.add_argument("--no-verify-clients", action="store_true", help="clients need no certificate")
    where.add_argument(
        "--client", dest="clients", action="append", metavar="NAME", help="only certificates of this name may come in"
    )
    where.add_argument("--clients-at-once", type=_count, metavar="N", help="(default: 100)")
    where.add_argument("--idle-timeout", type=_seconds, metavar="SECONDS", help="send idle clients away (default: never)")
    image = parser.add_argument_group("exports")
    image.add_argument("-f", "--format", choices=("qcow2", "raw", "luks"), default="qcow2", help="format (default: qcow2)")
    image.add_argument(
        "-x", "--name", "--export-name", metavar="EXPORT", help="name (default: empty; of several images, their names)"
    )
    image.add_argument("-D", "--description", metavar="TEXT", default="", help="of the export")
    image.add_argument("-r", "--read-only", action="store_true", help="refuse writes; the image is not changed")
    image.add_argument("--temporary", action="store_true", help="what is written is thrown away at the end")
    image.add_argument("-l", "--load-snapshot", metavar="SNAPSHOT", help="export this internal snapshot, read-only")
    image.add_argument("--snapshots", action="store_true", help="export each internal snapshot, too, as EXPORT@SNAPSHOT")
    image.add_argument("-o", "--offset", type=size_bytes, default=0, metavar="SIZE", help="where the export begins in the disk")
    image.add_argument("-A", "--allocation-depth", action="store_true", help="tell which layer a range comes from")
    image.add_argument(
        "-B", "--bitmap", dest="bitmaps", action="append", default=[], metavar="NAME", help="tell what it recorded"
    )
    image.add_argument("--backup", metavar="EXPORT", help="export the disk as it is now, too, while it goes on being written")
    image.add_argument(
        "--commit-into-backing", action="store_true", help="let 'cowfence ctl commit' write into the backing file"
    )
    image.add_argument(
        "--cache",
        choices=tuple(CACHES),
        default="writeback",
        help="when writes are durable, and around the page cache or through it, in QEMU's words (default: writeback)",
    )
    image.add_argument("--discard", choices=("unmap", "ignore"), default="unmap", help="what guests discard (default: unmap)")
    image.add_argument(
        "--detect-zeroes", choices=DETECT_ZEROES, default="off", help="writes of zeros become zeroing (default: off)"
    )
    image.add_argument("--cache-size", type=size_bytes, metavar="SIZE", help="of tables in memory (default: 32M)")
    image.add_argument(
        "--commit-interval", type=_seconds, metavar="SECONDS", help="commit an idle client's writes after (default: 5)"
    )
    image.add_argument(
        "-U", "--force-share", action="store_true", help="read an image that another process writes to; needs --read-only"
    )
    image.add_argument(
        "--no-keeper",
        action="store_true",
        help="start no helper process; if the server is killed, what clients wrote since their last flush may be lost",
    )
    process = parser.add_argument_group("process")
    process.add_argument("--fork", action="store_true", help="return when the server is ready")
    process.add_argument("--pid-file", metavar="PATH", help="write the number of the process there")
    process.add_argument("--until-unused", action="store_true", help="end when the last client has left")
    process.add_argument("--control", metavar="PATH", help="a socket for 'cowfence ctl'")
    process.add_argument("--metrics", metavar="HOST:PORT", help="answer /metrics (Prometheus) and /healthz there")
    process.add_argument("--log", choices=("text", "json"), help="tell about connections on standard error")
    add_reference_options(parser)
    add_output_option(parser)
    add_secret_options(parser)
    parser.add_argument("images", nargs="*", metavar="image")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port: 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to 100000")
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
    from cowfence.service.process import Background, PidFile, activated_sockets
    from cowfence.service.service import Service

    config = _config(arguments)
    check_config(config)
    sockets = activated_sockets()
    if sockets and (config.server.socket, config.server.bind, config.server.port) != (None, None, None):
        raise Invalid("socket activation excludes a socket, an address and a port of our own")
    if arguments.log is not None:
        _log_to_stderr(as_json=arguments.log == "json")
    background = Background() if arguments.fork else None
    pid_file = PidFile(arguments.pid_file)
    path = arguments.config
    service = Service(
        config,
        secrets=secrets_of(arguments),
        again=None if path is None else lambda: read_config(path),
        until_unused=arguments.until_unused,
    )
    with service:
        if arguments.backup is not None:
            service.begin_backup_of_only(arguments.backup)
        _listen(service, config.server, sockets)

        def ready() -> None:
            pid_file.write()
            _announce(arguments, service, config.exports[0].spec.name)
            if background is not None:
                background.ready()

        try:
            service.run(ready)
        finally:
            service.close()
            pid_file.remove()
    return 0


def _listen(service: Service, settings: ServerSettings, sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        service.server.listen_on(sock)
    if settings.socket is not None:
        service.server.listen_unix(settings.socket)
    elif not sockets:
        service.server.listen_tcp(settings.bind or _LOOPBACK, DEFAULT_PORT if settings.port is None else settings.port)


def _announce(arguments: argparse.Namespace, service: Service, name: str) -> None:
    uri = service.server.uri(name)
    if arguments.output == "json":
        # On one line: who waits for it reads lines.
        print(json.dumps({"uri": uri, "export": name, "pid": os.getpid()}), flush=True)
    elif not arguments.fork:
        print(uri, flush=True)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
            }
        )


def _log_to_stderr(*, as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _config(arguments: argparse.Namespace) -> ServiceConfig:
    """What the file says, or else the options. Raises Invalid."""
    if arguments.config is not None:
        given = [name for name, default in _DEFAULTS.items() if getattr(arguments, name) != default]
        if given:
            raise Invalid(f"--config says all; {given[0].replace('_', '-')} has to stand in the file")
        return read_config(arguments.config)
    if not arguments.images:
        raise Invalid("an image, or --config FILE, is needed")
    if len(arguments.images) > 1 and (arguments.name is not None or arguments.backup is not None):
        raise Invalid("--name and --backup are for one image; use --config")
    names = [arguments.name or ""] if len(arguments.images) == 1 else list(map(os.path.basename, arguments.images))
    if len(set(names)) < len(names):
        raise Invalid("two images of the same name; use --config")
    limits = Limits(
        connections=arguments.clients_at_once or Limits().connections,
        idle_seconds=arguments.idle_timeout,
    )
    server = ServerSettings(
        socket=arguments.socket,
        bind=arguments.bind,
        port=arguments.port,
        insecure=arguments.insecure,
        tls=arguments.tls,
        tls_offered=arguments.tls_offered,
        verify_clients=not arguments.no_verify_clients,
        control=arguments.control,
        metrics=arguments.metrics,
        limits=limits,
    )
    return ServiceConfig(server, tuple(_plan(arguments, *pair) for pair in zip(arguments.images, names, strict=True)))


def _plan(arguments: argparse.Namespace, image: str, name: str) -> ExportPlan:
    spec = ExportSpec(
        path=image,
        name=name,
        format=arguments.format,
        read_only=arguments.read_only or arguments.load_snapshot is not None,
        description=arguments.description,
        cache=arguments.cache,
        discard=arguments.discard == "unmap",
        detect_zeroes=arguments.detect_zeroes,
        snapshot=arguments.load_snapshot,
        temporary=arguments.temporary,
        offset=arguments.offset,
        bitmaps=tuple(arguments.bitmaps),
        allocation_depth=arguments.allocation_depth,
        clients=None if arguments.clients is None else frozenset(arguments.clients),
        force_share=arguments.force_share,
        assume_backing_format=arguments.assume_backing_format,
        keeper=not arguments.no_keeper,
        cache_bytes=arguments.cache_size or CACHE_BYTES,
        commit_interval=arguments.commit_interval or COMMIT_SECONDS,
        into_backing=arguments.commit_into_backing,
        snapshots=arguments.snapshots,
    )
    return ExportPlan(spec, tuple(arguments.ref_root), arguments.untrusted)


def _defaults() -> dict[str, object]:
    parser = argparse.ArgumentParser(add_help=False)
    configure(parser)
    allowed = ("config", "fork", "pid_file", "until_unused", "log", "output", "secrets")
    return {name: value for name, value in vars(parser.parse_args([])).items() if name not in allowed}


_DEFAULTS: Final = _defaults()
