"""Serve until a signal, or until nobody needs it any more."""

from __future__ import annotations

import signal
from collections.abc import Callable

from cowfence.nbd.server import Server


def serve(server: Server, ready: Callable[[], None]) -> None:
    """Call ``ready`` when signals stop ``server`` (SIGTERM, SIGINT, SIGHUP), and serve until then."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: server.stop())
    ready()
    server.serve_forever()
