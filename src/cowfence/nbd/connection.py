"""One client of the server, as the loop sees it: its socket, its protocol machine, and what it has cost so far."""

from __future__ import annotations

import select
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from cowfence.nbd.export import Export
from cowfence.nbd.handshake import ServerHandshake
from cowfence.nbd.tls import TlsSession
from cowfence.nbd.transmission import (
    Reply,
    ServerTransmission,
)

_QUICK_SECONDS: Final = 0.00025
_QUICK_ROW: Final = 16


@dataclass(eq=False, slots=True)
class Pace:
    """How quick fences have been lately, as one client has met them: ``quick_row`` in a row stayed below the limit."""

    quick_row: int = 0

    @property
    def quick(self) -> bool:
        return self.quick_row >= _QUICK_ROW

    def note(self, seconds: float) -> None:
        self.quick_row = self.quick_row + 1 if seconds < _QUICK_SECONDS else 0


@dataclass(eq=False, slots=True)
class Connection:
    """One client. ``transmission`` and ``export`` are there once the handshake is over."""

    sock: socket.socket
    fd: int
    handshake: ServerHandshake
    deadline: float
    transmission: ServerTransmission | None = None
    export: Export | None = None
    tls: TlsSession | None = None
    pace: Pace = field(default_factory=Pace)
    unsent: deque[Reply] = field(default_factory=deque)
    unsent_bytes: int = 0
    jobs: int = 0
    jobs_bytes: int = 0
    interest: int = select.EPOLLIN
    leaving: bool = False
    closed: bool = False
