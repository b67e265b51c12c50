"""The NBD server: sockets around the protocol machines, and disks behind them.

**One thread serves all connections.** It waits for sockets, receives what has come (usually many requests), hands all of it
to ``Disk.submit(..., wait=False)`` as one batch, and answers with one vectored send. What a disk answers ``BLOCKED`` (cold
reads, fences), and what may take long in any case (block status, caching), goes to a pool of threads and is answered when it
is done, in any order; so a slow disk, a flush or a slow client never stops another client. One exception: handing a job to a
thread and back costs more than a quick fence does (tmpfs, disks with a protected cache), so where the last ones were quick the
next is waited for in the loop. What is quick depends on whether there is another client who would wait too. Long writes have a
thread of their own: the host copies one while the loop receives the next.

**Bounds.** Each client has a limit of requests and of bytes that are taken in but not yet answered. At the limit its socket
is not read; TCP or the Unix socket then holds the client back. A client that does not read its replies fills only its own
limit. Connections are limited too: beyond it new ones wait in the listen queue, and those that do not finish the handshake in
time are closed, so that idle ones cannot keep others out for ever.

**Flush.** A FLUSH covers every write whose reply was sent before, on any connection to the export: such a write has been
acknowledged by the one disk that they share, and ``Disk.flush`` covers all that. Hence CAN_MULTI_CONN.

**Coming again.** What a lost client had asked for may still wait for a disk. New clients of that export wait until it is done:
QEMU repeats its requests on a new connection and goes on, and an old write must not land on top of a newer one.

**Stopping.** ``stop`` may be called from any thread and from a signal handler. New requests are then answered ESHUTDOWN,
those in flight are finished and answered, and ``serve_forever`` returns when all connections are closed; clients that do
not take their replies are cut off after a time, but never before the disk has finished with their requests. The disks
belong to the caller, who closes them afterwards.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from cowfence.disk.base import Disk
from cowfence.errors import Closed, Invalid
from cowfence.nbd import listening
from cowfence.nbd.connection import Connection, Limits
from cowfence.nbd.export import Export, ExportTable
from cowfence.nbd.handshake import ServerHandshake, Tls
from cowfence.nbd.listening import Entrance, Listener
from cowfence.nbd.messages import ProtocolError
from cowfence.nbd.tls import TlsSession
from cowfence.nbd.transmission import (
    Batch,
    Part,
    Query,
    Reply,
    ServerTransmission,
)
from cowfence.nbd.uri import NbdUri
from cowfence.nbd.workers import Bell, Job, Pools, in_parts, is_fence, submit
from cowfence.units import KIB

__all__ = ["Limits", "Server"]

_log = logging.getLogger(__name__)

Room = TypeVar("Room", int, memoryview)
Received = TypeVar("Received", int, bytes)

_HANDSHAKE_RECEIVE_BYTES: Final = 16 * KIB
_TLS_RECEIVE_BYTES: Final = 256 * KIB
_ROUNDS: Final = 4
_LONG_BYTES: Final = 512 * KIB
"""So much data of writes takes the host longer than handing it to a thread: a third more goes through than in the loop, as it
receives meanwhile. With 128 KiB it is a fifth less."""
_NO_REPLIES: Final[Sequence[Reply | Part]] = ()
_ACCEPT_AGAIN_SECONDS: Final = 1.0


class Server:
    """Serves exports over NBD. Listen first, then call ``serve_forever`` in the thread that is to do the work.

    The mapping of exports is read when a client asks; entries may be added and taken away between that. ``tls``: what is shown
    to clients that want TLS; ``tls_required``: all have to. ``until_unused``: it stops when the last client that used an export
    has left. ``on_unused`` is called, in that thread, with an export whose last client has left.
    """

    def __init__(
        self,
        exports: Mapping[str, Export],
        *,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        tls_required: bool = False,
        until_unused: bool = False,
        on_unused: Callable[[Export], None] = lambda _: None,
    ) -> None:
        self._exports = exports
        self._tls = tls
        self._tls_mode = Tls.OFF if tls is None else Tls.REQUIRED if tls_required else Tls.OFFERED
        self._until_unused, self._used = until_unused, False
        self._on_unused = on_unused
        self._limits = limits or Limits()
        self._table = self._exports_for(frozenset())
        self._epoll = select.epoll()
        self._bell = Bell()
        self._epoll.register(self._bell.fd, select.EPOLLIN)
        self._handlers: dict[int, Callable[[int], None]] = {self._bell.fd: self._on_bell}
        self._entrance = Entrance(self._epoll, self._handlers)
        self._connections: dict[int, Connection] = {}
        self._negotiating: deque[Connection] = deque()
        self._pools = Pools(self._limits.workers, self._bell)
        self._calls: deque[Callable[[], None]] = deque()
        self._calling = threading.Lock()
        self._next_idle_look = math.inf if self._limits.idle_seconds is None else 0.0
        self._accept_again = math.inf
        self._stop_wanted = False
        self._stop_deadline: float | None = None
        self._closed = False

    def _exports_for(self, names: frozenset[str]) -> ExportTable:
        return ExportTable(self._exports, shared=self._limits.connections > 1, names=names)

    # --- listening ---

    def listen_unix(self, path: str) -> str:
        """Listen at a Unix socket; returns the path. Raises as ``listening.listen_unix`` does."""
        self._add_listener(listening.listen_unix(path))
        return path

    def listen_tcp(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen at a TCP port; returns the actual address. Raises as ``listening.listen_tcp`` does."""
        listener = listening.listen_tcp(host, port)
        self._add_listener(listener)
        return listener.address.host, listener.address.port

    def listen_on(self, sock: socket.socket) -> None:
        """Serve a listening socket made elsewhere (socket activation). Takes it over."""
        self._add_listener(listening.listen_on(sock))

    def _add_listener(self, listener: Listener) -> None:
        self._entrance.add(listener)
        self._accept(wanted=True)

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export at the first address listened at. Raises ``Invalid`` before that."""
        if not self._entrance.addresses:
            raise Invalid("the server does not listen yet")
        first = self._entrance.addresses[0]
        return str(NbdUri(export, first.host, first.port, first.socket_path, tls=self._tls is not None))

    # --- the loop ---

    def serve_forever(self) -> None:
        """Serve until ``stop``; then everything is closed and the server cannot be used again."""
        poll, handlers, knocked = self._epoll.poll, self._handlers, self._entrance.knocked
        try:
            while not self._finished():
                for fd, events in poll(self._timeout_seconds()):
                    handler = handlers.get(fd)
                    if handler is not None:  # else closed by an earlier event of this round
                        handler(events)
                while knocked:
                    self._on_connect(knocked.pop())
                if self._negotiating or self._stop_wanted or self._next_idle_look != math.inf or self._accept_again != math.inf:
                    self._look_at_clock()
        finally:
            self.close()

    def drain(self) -> None:
        """No new clients; stop when the last one has left. In the serving thread (``call``)."""
        self._entrance.close()
        self._until_unused = self._used = True
        if not self._connections:
            self.stop()

    def stop(self) -> None:
        """Ask ``serve_forever`` to end. From any thread or signal handler; may be called again, and before it begins."""
        self._stop_wanted = True
        self._bell.ring()

    def call(self, function: Callable[[], None]) -> None:
        """Have the serving thread call ``function``, between two requests. From any thread. Raises Closed once it has ended."""
        with self._calling:
            if self._closed:
                raise Closed("the server has ended")
            self._calls.append(function)
        self._bell.ring()

    def works_for(self, export: Export) -> bool:
        """Whether something asked of an export is not done yet, though who asked may be gone. In the serving thread."""
        return self._pools.busy_for(export)

    def _timeout_seconds(self) -> float | None:
        deadlines = [self._negotiating[0].deadline] if self._negotiating else []
        if self._accept_again != math.inf:
            deadlines.append(self._accept_again)
        if self._stop_deadline is not None and self._stop_deadline != math.inf:
            deadlines.append(self._stop_deadline)
        if self._connections and self._next_idle_look != math.inf:
            deadlines.append(self._next_idle_look)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _finished(self) -> bool:
        return self._stop_deadline is not None and not self._connections and not self._pools.busy

    def _look_at_clock(self) -> None:
        if self._stop_wanted and self._stop_deadline is None:
            self._begin_stop()
        now = time.monotonic()
        negotiating = self._negotiating
        while negotiating and (negotiating[0].closed or negotiating[0].transmission or negotiating[0].deadline <= now):
            connection = negotiating.popleft()
            if not connection.closed and connection.transmission is None:
                self._drop(connection, "the handshake took too long")
        if self._accept_again <= now:
            self._accept_again = math.inf
            self._accept(wanted=True)
        if self._next_idle_look <= now:
            self._send_idle_away(now)
        if self._stop_deadline is not None and self._stop_deadline <= now:
            for connection in list(self._connections.values()):
                self._drop(connection, "replies were not taken before the end")
            # What the disk still has to finish is waited for without a limit.
            self._stop_deadline = math.inf

    def _send_idle_away(self, now: float) -> None:
        idle_seconds = self._limits.idle_seconds
        assert idle_seconds is not None  # else nobody looks
        for connection in list(self._connections.values()):
            busy = connection.jobs or connection.transmission is None
            if not busy and now - connection.heard >= idle_seconds:
                connection.say_goodbye()
                self._drop(connection, "idle")
        self._next_idle_look = now + idle_seconds / 4

    def _begin_stop(self) -> None:
        self._stop_deadline = time.monotonic() + self._limits.stop_seconds
        self._entrance.close()
        for connection in list(self._connections.values()):
            if connection.transmission is None:
                self._drop(connection, "the server is stopping")
            else:
                connection.transmission.stopping = True
                self._on_ready(connection, select.EPOLLIN)
                connection.leaving = True
                self._settle(connection)

    def close(self) -> None:
        """Close everything at once; for a server that never came to ``serve_forever``, which does it at its end."""
        with self._calling:
            if self._closed:
                return
            self._closed = True
        while self._calls:
            self._calls.popleft()()
        self._entrance.close()
        for connection in list(self._connections.values()):
            self._drop(connection, "the server has ended")
        self._pools.close()
        self._epoll.close()

    # --- connections ---

    def _accept(self, *, wanted: bool) -> None:
        self._entrance.set_open(wanted and not self._stop_wanted)

    def _on_connect(self, listener: socket.socket) -> None:
        while self._entrance.open:
            if len(self._connections) >= self._limits.connections:
                self._accept(wanted=False)
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("accept: %s", error)
                if self._connections:
                    # Goes on when a connection ends, or after a while: others have descriptors to free, too.
                    self._accept(wanted=False)
                    self._accept_again = time.monotonic() + _ACCEPT_AGAIN_SECONDS
                else:
                    time.sleep(0.1)  # out of descriptors with nobody to free one: do not spin
                return
            sock.setblocking(False)
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handshake = ServerHandshake(self._table, tls=self._tls_mode)
            deadline = time.monotonic() + self._limits.handshake_seconds
            connection = Connection(sock, sock.fileno(), handshake, deadline)
            self._connections[connection.fd] = connection
            self._negotiating.append(connection)
            self._epoll.register(connection.fd, connection.interest)
            self._handlers[connection.fd] = self._handler(connection)
            self._send(connection, [handshake.receive()])

    def _handler(self, connection: Connection) -> Callable[[int], None]:
        return lambda events: self._on_ready(connection, events)

    def _drop(self, connection: Connection, why: str = "") -> None:
        """Close a connection now. What the pool still does for it is finished and then forgotten."""
        if connection.closed:
            return
        if why:
            _log.info("connection closed: %s", why)
        connection.closed = True
        del self._connections[connection.fd]
        del self._handlers[connection.fd]
        self._epoll.unregister(connection.fd)
        connection.close()
        if connection.export is not None:
            self._pools.abandon(connection.export, connection.jobs)
            connection.export.stats.clients -= 1
            if not connection.export.stats.clients:
                self._pools.let_go(connection.export)
                self._on_unused(connection.export)
        # Also where the very last one never came to use an export.
        if self._until_unused and self._used and not self._connections:
            self.stop()
        self._accept(wanted=True)

    def _on_ready(self, connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT:
            if self._next_idle_look != math.inf:
                connection.heard = time.monotonic()  # it has taken something
            self._send_more(connection)
            if connection.closed:
                return
            if connection.transmission is not None:
                self._serve(connection, connection.transmission)
        if events & select.EPOLLIN and not connection.closed and connection.interest & select.EPOLLIN:
            if connection.transmission is None:
                self._negotiate(connection)
            else:
                self._receive(connection, connection.transmission)
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self._drop(connection)
        if not connection.closed:
            self._settle(connection)

    def _settle(self, connection: Connection) -> None:
        """Close a connection that has nothing left to do, else wait for what it may do next."""
        transmission, limits = connection.transmission, self._limits
        if connection.closed:
            return
        if connection.leaving and not connection.jobs and not connection.unsent:
            if transmission is None or not transmission.has_complete:
                connection.say_goodbye()
                self._drop(connection)
            return
        interest = select.EPOLLOUT if connection.unsent else 0
        if not connection.leaving and connection.unsent_bytes < limits.client_unsent_bytes and self._has_room(connection):
            interest |= select.EPOLLIN
        if interest != connection.interest:
            connection.interest = interest
            self._epoll.modify(connection.fd, interest)

    def _has_room(self, connection: Connection) -> bool:
        limits = self._limits
        return (
            connection.jobs < limits.client_requests
            and connection.jobs_bytes + connection.unsent_bytes < limits.client_bytes
            and connection.lent < limits.client_long_writes
            and not connection.waits
            and not (connection.transmission is not None and connection.transmission.has_complete)
        )

    def _negotiate(self, connection: Connection) -> None:
        handshake = connection.handshake
        data = self._take(connection, connection.sock.recv, _HANDSHAKE_RECEIVE_BYTES)
        if data is None:
            return
        if connection.tls is not None:
            plain = self._decrypt(connection, connection.tls, data)
            if plain is None or not connection.tls.established:
                return
            data = plain
            if handshake.wants_tls:
                handshake.secured_with(self._exports_for(connection.tls.peer_names()))
        self._send(connection, [handshake.receive(data)])
        if handshake.wants_tls and self._tls is not None and not handshake.ended:
            connection.tls = TlsSession(self._tls, server_side=True)
        if connection.closed or not handshake.ended:
            return
        agreed = handshake.result
        export = self._exports.get(agreed.export.name) if agreed is not None else None
        if agreed is None or export is None:
            if handshake.problem is not None:
                _log.info("handshake: %s", handshake.problem)
            connection.leaving = True
            return
        connection.export = export
        self._used = True
        connection.heard = time.monotonic()
        export.stats.clients += 1
        connection.transmission = ServerTransmission(
            agreed.export.size_bytes,
            writable=export.writable,
            block_bytes=export.disk.block_bytes,
            style=agreed.style,
            contexts=tuple(agreed.contexts.values()),
        )
        if connection.tls is None and connection.sock.family is socket.AF_UNIX:
            connection.steady = export.steady
        connection.waits = self._pools.has_abandoned(export)
        connection.transmission.feed(handshake.trailing)
        self._serve(connection, connection.transmission)

    def _decrypt(self, connection: Connection, tls: TlsSession, data: bytes) -> bytes | None:
        """What a client said inside of TLS, after TLS itself has been answered; None where the connection is closed now."""
        why = ""
        plain = b""
        try:
            plain = tls.receive(data)
        except ProtocolError as error:
            why = str(error)
        answer = tls.take()
        if answer:
            try:
                connection.put([answer])
            except OSError as error:
                self._drop(connection, str(error))
        if why and not connection.closed:
            self._drop(connection, why)
        if tls.ended:
            connection.leaving = True
        return None if connection.closed else plain

    # --- the hot path ---

    def _take(self, connection: Connection, receive: Callable[[Room], Received], room: Room) -> Received | None:
        """What ``receive`` gets from the socket now; None where that is nothing. At the stream's end the client is leaving."""
        try:
            received = receive(room)
        except BlockingIOError:
            return None
        except OSError as error:
            self._drop(connection, str(error))
            return None
        if not received:
            connection.leaving = True
            return None
        return received

    def _receive_secure(self, connection: Connection, tls: TlsSession, transmission: ServerTransmission) -> None:
        data = self._take(connection, connection.sock.recv, _TLS_RECEIVE_BYTES)
        if data is None:
            return
        plain = self._decrypt(connection, tls, data)
        if plain:
            transmission.feed(plain)
            self._serve(connection, transmission)

    def _receive(self, connection: Connection, transmission: ServerTransmission) -> None:
        """Take what has arrived, a few times: what came while the last batch was done saves a turn of the loop."""
        if self._next_idle_look != math.inf:
            connection.heard = time.monotonic()
        if connection.tls is not None:
            self._receive_secure(connection, connection.tls, transmission)
            return
        recv_into = connection.sock.recv_into
        for _ in range(_ROUNDS):
            count = self._take(connection, recv_into, transmission.space())
            if count is None:
                return
            transmission.received(count)
            if transmission.lacks_payload:
                return
            self._serve(connection, transmission)
            if connection.closed or connection.leaving or connection.unsent or connection.jobs or transmission.has_complete:
                return

    def _serve(self, connection: Connection, transmission: ServerTransmission) -> None:
        """Do the requests that stand complete in the buffer, as far as the limits allow."""
        limits, export = self._limits, connection.export
        assert export is not None  # set together with the transmission
        disk, stats, clock = export.disk, export.stats, time.perf_counter
        while not connection.closed and not connection.waits and connection.unsent_bytes < limits.client_unsent_bytes:
            room_requests = limits.client_requests - connection.jobs
            room_bytes = limits.client_bytes - connection.jobs_bytes - connection.unsent_bytes
            if room_requests <= 0 or room_bytes <= 0:
                return
            try:
                batch = transmission.next_batch(room_requests, min(room_bytes, limits.batch_bytes))
            except ProtocolError as error:
                self._drop(connection, str(error))
                return
            replies, elsewhere = batch.replies, _NO_REPLIES
            if batch.payload_bytes >= _LONG_BYTES:
                self._write_meanwhile(connection, export, transmission, batch)
            if batch.requests:
                began = clock()
                stats.took_up(batch.requests)
                wanted = len(batch.requests)
                if connection.steady is not None:
                    elsewhere = transmission.answer_elsewhere(batch, connection.steady.part)
                outcomes = submit(disk, batch.requests, wait=False)
                blocked = transmission.answer(replies, batch, outcomes)
                if blocked:
                    if self._is_quick(connection) and not self._pools.busy_for(export):
                        blocked = self._wait_here(connection, disk, batch, blocked)
                    transmission.keep_data(batch, blocked)
                    for work in in_parts(batch, blocked):
                        self._enqueue(connection, export, work)
                stats.answered(wanted - len(blocked), clock() - began)
            for query in batch.queries:
                self._enqueue(connection, export, query)
            stats.errors, transmission.errors = stats.errors + transmission.errors, 0
            if replies or elsewhere:
                self._send(connection, [*elsewhere, *replies] if elsewhere else replies)
            if transmission.disconnecting:
                connection.leaving = True
            if not transmission.has_complete:
                return

    def _send(self, connection: Connection, replies: Sequence[Reply | Part]) -> None:
        try:
            connection.send(replies)
        except OSError as error:
            self._drop(connection, str(error))

    def _send_more(self, connection: Connection) -> None:
        try:
            connection.send_more()
        except OSError as error:
            self._drop(connection, str(error))

    # --- the pool ---

    def _is_quick(self, connection: Connection) -> bool:
        return connection.pace.quick(alone=len(self._connections) == 1)

    def _wait_here(self, connection: Connection, disk: Disk, batch: Batch, blocked: list[int]) -> list[int]:
        """Do the blocked flushes in the loop while they stay quick; returns what is still blocked."""
        assert connection.transmission is not None  # it made the batch
        left = []
        for index in blocked:
            request = batch.requests[index]
            if not self._is_quick(connection) or not is_fence(request):
                left.append(index)
                continue
            alone = Batch()
            alone.requests.append(request)
            alone.cookies.append(batch.cookies[index])
            began = time.perf_counter()
            outcomes = submit(disk, alone.requests, wait=True)
            connection.pace.note(time.perf_counter() - began)
            connection.transmission.answer_finally(batch.replies, alone, outcomes)
        return left

    def _write_meanwhile(self, connection: Connection, export: Export, transmission: ServerTransmission, batch: Batch) -> None:
        """Leave long writes to the export's writer, but those of a client that has nothing else to ask and is alone here."""
        if transmission.has_more or connection.jobs or len(self._connections) > 1:
            writes = transmission.lend_data(batch)
            if writes is not None:
                export.stats.took_up(writes.requests)
                connection.lent += 1
                self._enqueue(connection, export, writes)

    def _enqueue(self, connection: Connection, export: Export, work: Batch | Query) -> None:
        job = Job.of(connection, export, work)
        connection.jobs += job.requests
        connection.jobs_bytes += job.cost_bytes
        self._pools.of(export).submit(job)

    def _on_bell(self, _events: int) -> None:
        self._bell.silence()
        while self._calls:
            self._calls.popleft()()
        ready: dict[int, tuple[Connection, list[Reply]]] = {}
        outlived: list[Export] = []
        for job, outcomes, result, seconds in self._pools.take_done():
            job.export.stats.answered(job.requests, seconds)
            connection, transmission = job.connection, job.connection.transmission
            connection.jobs -= job.requests
            connection.jobs_bytes -= job.cost_bytes
            if connection.closed or transmission is None:
                if self._pools.outlive(job):
                    outlived.append(job.export)
                self._pools.let_go(job.export)
                continue
            _, replies = ready.setdefault(connection.fd, (connection, []))
            if isinstance(job.work, Query):
                transmission.answer_query(replies, job.work, result)
            else:
                transmission.answer_finally(replies, job.work, outcomes)
                if job.work.lent is not None:
                    transmission.take_back(job.work.lent)
                    connection.lent -= 1
                if is_fence(job.work.requests[0]):
                    connection.pace.note(seconds)
        for connection, replies in ready.values():
            self._send(connection, replies)
            if not connection.closed and connection.transmission is not None:
                self._serve(connection, connection.transmission)
            self._settle(connection)
        for connection in list(self._connections.values()) if outlived else ():
            if connection.waits and connection.export in outlived and connection.transmission is not None:
                connection.waits = False
                self._serve(connection, connection.transmission)
                self._settle(connection)
