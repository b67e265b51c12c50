"""``/metrics`` for Prometheus, and ``/healthz``: what the server counts anyway, collected when somebody asks."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final

import cowfence
from cowfence.disk.base import Verb
from cowfence.errors import Invalid, StorageFailed, Unsupported
from cowfence.nbd.stats import LATENCY_BUCKETS_SECONDS
from cowfence.service.exports import OpenedExport

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from cowfence.service.registry import Registry

_log = logging.getLogger(__name__)
_CLIENT_SECONDS: Final = 10.0
_GAUGES: Final = ("leaks-pending-clusters", "tables-in-memory")


class Collector:
    """What Prometheus' library asks for the figures of all exports."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        label, kind = ["export"], ["export", "request"]
        requests = CounterMetricFamily("cowfence_requests", "Requests taken up", labels=kind)
        moved = CounterMetricFamily("cowfence_bytes", "Bytes that were read and written", labels=["export", "direction"])
        errors = CounterMetricFamily("cowfence_errors", "Requests answered with an error", labels=label)
        clients = GaugeMetricFamily("cowfence_clients", "Clients that use the export", labels=label)
        latency = HistogramMetricFamily(
            "cowfence_request_seconds", "From being taken up to being answered", labels=label, unit=""
        )
        families: list[Metric] = [requests, moved, errors, clients, latency]
        engine: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for name in self._registry:
            export = self._registry.get(name)
            if export is None:
                continue
            stats = export.stats
            for verb in Verb:
                requests.add_metric([name, verb.name.lower()], stats.requests[verb])
            moved.add_metric([name, "read"], stats.read_bytes)
            moved.add_metric([name, "written"], stats.written_bytes)
            errors.add_metric([name], stats.errors)
            clients.add_metric([name], stats.clients)
            sums, total = [], 0
            for bound, count in zip([*map(str, LATENCY_BUCKETS_SECONDS), "+Inf"], list(stats.latencies), strict=True):
                total += count
                sums.append((bound, total))
            latency.add_metric([name], sums, stats.busy_seconds)
            served = self._registry.served(name)
            if isinstance(served, OpenedExport) and isinstance(served.image, cowfence.Qcow2Disk):
                for key, value in served.image.statistics().items():
                    family = engine.get(key)
                    if family is None:
                        make = GaugeMetricFamily if key in _GAUGES else CounterMetricFamily
                        family = engine[key] = make(f"cowfence_{key.replace('-', '_')}", f"Of the image: {key}", labels=label)
                    family.add_metric([name], value)
        return [*families, *engine.values()]


class _Server(ThreadingHTTPServer):
    """Of clients that leave too early it says nothing."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        if not isinstance(sys.exception(), OSError):
            _log.error("metrics met a defect", exc_info=True)


class MetricsServer:
    """Answers HTTP at ``address`` (HOST:PORT). Raises Unsupported without Prometheus' library, Invalid for what is no address,
    and StorageFailed where it cannot listen."""

    def __init__(self, address: str, registry: Registry) -> None:
        try:
            from prometheus_client import CollectorRegistry, generate_latest
            from prometheus_client.exposition import CONTENT_TYPE_LATEST
        except ImportError:
            raise Unsupported("metrics", "the library prometheus-client is not installed (cowfence[metrics])") from None
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            raise Invalid(f"{address!a} is no HOST:PORT for metrics")
        collectors = CollectorRegistry()
        collectors.register(Collector(registry))

        class Handler(BaseHTTPRequestHandler):
            """Two pages."""

            timeout = _CLIENT_SECONDS

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(collectors))
                elif self.path == "/healthz":
                    healthy = all(
                        export.disk.writable or not _should_write(registry, name) for name, export in registry.items()
                    )
                    body = json.dumps({"healthy": healthy, "exports": len(registry)}).encode()
                    self._answer(200 if healthy else 503, "application/json", body)
                else:
                    self._answer(404, "text/plain", b"/metrics, /healthz\n")

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nobody wants a line for each look."""

        try:
            self._server = _Server((host.strip("[]") or "127.0.0.1", int(port)), Handler)
        except OSError as error:
            raise StorageFailed(address, "listen", 0, error) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    @property
    def port(self) -> int:
        """The one listened at."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


def _should_write(registry: Registry, name: str) -> bool:
    """A disk that was opened for writing, and cannot any more (a fence failed), is not well."""
    served = registry.served(name)
    return isinstance(served, OpenedExport) and (served.spec.writes or served.spec.temporary)
