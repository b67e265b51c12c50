"""One client of the server, as the loop sees it: its socket, its protocol machine, and what it has cost so far."""

from __future__ import annotations

import select
import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final, cast

from cowfence.nbd.export import Export
from cowfence.nbd.handshake import ServerHandshake
from cowfence.nbd.steady import FilePart, SteadyFile
from cowfence.nbd.tls import TlsSession
from cowfence.nbd.transmission import Part, Reply, ServerTransmission
from cowfence.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_QUICK_SECONDS: Final = 0.00025
_QUICK_ALONE_SECONDS: Final = 0.002
"""Where nobody else is kept waiting: handing a fence to a thread and back costs a good part of this."""
_WEIGHT: Final = 1 / 8
_IOV_MAX: Final = 1024


@dataclass(eq=False, slots=True)
class Pace:
    """How long the fences of one client have been taking: a mean of the last ones. Before the first they are taken for slow."""

    mean_seconds: float = 0.01

    def quick(self, *, alone: bool) -> bool:
        """True if the next one may be waited for in the loop. ``alone``: there is no other client."""
        return self.mean_seconds < (_QUICK_ALONE_SECONDS if alone else _QUICK_SECONDS)

    def note(self, seconds: float) -> None:
        self.mean_seconds += (seconds - self.mean_seconds) * _WEIGHT


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may cost. Those named ``client_`` hold for each connection.

    ``client_bytes`` and ``client_requests``: taken in and not yet answered. ``client_unsent_bytes``: replies that the client
    has not read, at which no more of its requests are done. ``batch_bytes``: of one batch, between looks at other clients. Both
    are small because replies are new memory: four times as much gives it back to the system and faults it in again each time.
    ``workers``: threads for each export, beside the one for long writes. ``client_long_writes``: batches of them that wait for
    that one, at which no more is received: it takes them in their order, and others have some, too. ``idle_seconds``: after
    which a client that asks for nothing, or takes none of its replies, is sent away.
    """

    connections: int = 100
    handshake_seconds: float = 10.0
    client_requests: int = 128
    client_bytes: int = 64 * MIB
    client_unsent_bytes: int = 1 * MIB
    batch_bytes: int = 1 * MIB
    workers: int = 16
    client_long_writes: int = 8
    idle_seconds: float | None = None
    stop_seconds: float = 10.0


@dataclass(eq=False, slots=True)
class Connection:
    """One client. ``transmission`` and ``export`` are there once the handshake is over. ``heard``: when something
    came from it last, where that is limited. ``steady``: the file that its long reads are answered from, where that pays.
    ``lent``: batches of long writes that are not done. ``waits``: nothing of it is done before what clients that are gone had
    asked for (see ``Pools.abandon``)."""

    sock: socket.socket
    fd: int
    handshake: ServerHandshake
    deadline: float
    transmission: ServerTransmission | None = None
    export: Export | None = None
    tls: TlsSession | None = None
    steady: SteadyFile | None = None
    pace: Pace = field(default_factory=Pace)
    unsent: deque[Reply | Part] = field(default_factory=deque)
    unsent_bytes: int = 0
    jobs: int = 0
    jobs_bytes: int = 0
    lent: int = 0
    heard: float = 0.0
    interest: int = select.EPOLLIN
    waits: bool = False
    leaving: bool = False
    closed: bool = False

    def send(self, replies: Sequence[Reply | Part]) -> None:
        """Send, inside of TLS where that has begun; what the socket does not take now is kept in ``unsent``. Where there is no
        steady file, all are buffers. Raises OSError."""
        self.put(replies if self.tls is None else [self.tls.encrypt(cast("Sequence[Reply]", replies))])

    def put(self, messages: Sequence[Reply | Part]) -> None:
        """The same for what is sent as it is."""
        if self.unsent or self.steady is not None or len(messages) > _IOV_MAX:
            self.unsent.extend(messages)
            self.unsent_bytes += sum(map(len, messages))
            self.send_more()
            return
        try:
            sent = self.sock.sendmsg(cast("Sequence[Reply]", messages))
        except BlockingIOError:
            sent = 0
        total_bytes = sum(map(len, messages))
        if sent != total_bytes:
            self.unsent.extend(messages)
            self.unsent_bytes = total_bytes
            self._sent(sent)

    def send_more(self) -> None:
        """What is still in ``unsent``, as far as the socket takes it. Raises OSError."""
        unsent = self.unsent
        while unsent:
            first = unsent[0]
            try:
                if isinstance(first, FilePart):
                    self.unsent_bytes -= first.send(self.sock)
                    if not first:
                        unsent.popleft()
                    continue
                some = takewhile(lambda reply: not isinstance(reply, FilePart), islice(unsent, _IOV_MAX))
                sent = self.sock.sendmsg(cast("Iterator[Reply]", some))
            except BlockingIOError:
                return
            self._sent(sent)

    def _sent(self, sent: int) -> None:
        unsent = self.unsent
        self.unsent_bytes -= sent
        while unsent and sent >= len(unsent[0]):
            sent -= len(unsent.popleft())
        if sent:
            unsent[0] = memoryview(cast("Reply", unsent[0]))[sent:]

    def say_goodbye(self) -> None:
        """The end of TLS, for a client that is still there to hear it."""
        if self.tls is not None:
            with suppress(OSError):
                self.sock.send(self.tls.goodbye())

    def close(self) -> None:
        """Forget what is unsent, and close the socket."""
        self.unsent.clear()
        if self.steady is not None:
            self.steady.let_go(self.sock)
        else:
            self.sock.close()
