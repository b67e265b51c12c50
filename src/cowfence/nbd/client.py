"""``NbdDisk``: a disk behind an NBD server, over one connection.

Calls are serialised by a lock; within one ``submit`` all requests are sent as fast as the server takes them while replies are
read at the same time, so neither side can block the other with full socket buffers. How requests become messages, and what
replies mean, is in ``terms``.

Every error fails the call that met it, and none is repaired in silence. A reply that breaks the protocol, or a lost
connection, ends the connection: nobody knows then which requests were done, so every later call fails with that cause.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

from cowfence.disk.base import Outcome, Request, Verb
from cowfence.errors import Closed, CowfenceError, StorageFailed
from cowfence.extents import Extent, merge
from cowfence.nbd.client_handshake import ClientHandshake, Listed, ListHandshake
from cowfence.nbd.client_transmission import ClientTransmission, Completion
from cowfence.nbd.conversation import conversation, tls_of
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import BASE_ALLOCATION, Command, ProtocolError
from cowfence.nbd.negotiation import Negotiated, Negotiation
from cowfence.nbd.terms import Piece, Terms, allocation_extent, unknown_extent
from cowfence.nbd.uri import NbdUri
from cowfence.storage.base import Buffer, WritableBuffer
from cowfence.units import KIB

if TYPE_CHECKING:
    from cowfence.nbd.tls import TlsSession

_RECEIVE_BYTES: Final = 256 * KIB
_IN_FLIGHT_MAX: Final = 64


def converse(sock: socket.socket, handshake: Negotiation, tls: TlsSession | None) -> None:
    """Carry a negotiation to its end over a socket that waits. Raises OSError, and what ``conversation`` raises."""
    script = conversation(handshake, tls)
    try:
        to_send = next(script)
        while True:
            sock.sendall(to_send)
            data = sock.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection in the handshake")
            to_send = script.send(data)
    except StopIteration as end:
        sock.sendall(end.value)


def list_exports(uri: str | NbdUri, *, timeout_seconds: float | None = 30.0) -> list[Listed]:
    """What the server at a URI exports, whatever export it names. Raises as ``NbdDisk`` does."""
    where = NbdUri.parse(uri) if isinstance(uri, str) else uri
    handshake = ListHandshake(tls=where.tls)
    sock = connect(where, timeout_seconds)
    try:
        converse(sock, handshake, tls_of(where))
    except OSError as error:
        raise StorageFailed(str(where), "handshake", 0, error) from error
    finally:
        sock.close()
    return handshake.listed


def connect(uri: NbdUri, timeout_seconds: float | None) -> socket.socket:
    """A socket to the server at a URI. Raises StorageFailed."""
    sock: socket.socket | None = None
    try:
        if uri.socket_path is not None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_seconds)
            sock.connect(uri.socket_path)
        else:
            sock = socket.create_connection((uri.host, uri.port), timeout_seconds)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise StorageFailed(str(uri), "connect", 0, error) from error
    return sock


class NbdDisk:
    """``Disk`` at an NBD URI. ``timeout_seconds`` bounds each wait for the server; None waits for ever. ``contexts``: the
    metadata contexts to ask for; those that the server has are in ``contexts`` then, for ``status``. ``style``: the best one to
    ask for.

    Raises ``StorageFailed`` (no connection), ``Unsupported`` (refused by the server), ``ProtocolError``, ``Invalid`` (the URI).
    """

    def __init__(
        self,
        uri: str | NbdUri,
        *,
        timeout_seconds: float | None = 30.0,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
        style: Style = Style.EXTENDED,
    ) -> None:
        self.uri = NbdUri.parse(uri) if isinstance(uri, str) else uri
        self._name = str(self.uri)
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._broken: CowfenceError | None = None
        self._tls = tls_of(self.uri)
        self._sock = connect(self.uri, timeout_seconds)
        try:
            agreed, trailing = self._negotiate(
                ClientHandshake(self.uri.export, contexts=contexts, style=style, tls=self.uri.tls)
            )
        except BaseException:
            self._sock.close()
            raise
        self._terms = Terms(self._name, agreed)
        self.size = self._terms.size
        self.block_bytes = self._terms.block_bytes
        self.style = agreed.style
        self.contexts = tuple(agreed.contexts)
        self._machine = ClientTransmission(style=agreed.style, contexts=agreed.contexts.values())
        self._sock.setblocking(False)
        if trailing:
            self._sock.close()
            raise ProtocolError(f"{self._name}: the server sent replies to requests that were not made")

    # --- the connection ---

    def _negotiate(self, handshake: ClientHandshake) -> tuple[Negotiated, bytes]:
        try:
            converse(self._sock, handshake, self._tls)
        except OSError as error:
            raise StorageFailed(self._name, "handshake", 0, error) from error
        if handshake.result is None:
            raise ProtocolError(f"{self._name}: the handshake ended without a result")
        return handshake.result, handshake.trailing

    def _transact(self, pieces: Sequence[Piece]) -> list[Completion]:
        """Send all pieces and wait for all their replies, which come back in the order of the pieces."""
        with self._lock:
            self._check_usable()
            try:
                return self._exchange(pieces)
            except OSError as error:
                self._broken = StorageFailed(self._name, "exchange", 0, error)
                self._broken.__cause__ = error
            except ProtocolError as error:
                self._broken = error
            except BaseException:
                # Interrupted in the middle of the stream: it cannot be taken up again.
                self._broken = Closed(f"{self._name}: an earlier call was interrupted")
                self._sock.close()
                raise
            self._sock.close()
            raise self._broken

    def _exchange(self, pieces: Sequence[Piece]) -> list[Completion]:
        sock, machine = self._sock, self._machine
        poller = select.poll()
        waiting = deque(enumerate(pieces))
        outgoing: deque[memoryview] = deque()
        cookies: dict[int, int] = {}
        done: dict[int, Completion] = {}
        while len(done) < len(pieces):
            while waiting and len(machine.pending) < _IN_FLIGHT_MAX:
                index, piece = waiting.popleft()
                cookie, header = machine.request(piece.command, piece.offset, piece.length_bytes, int(piece.flags))
                cookies[cookie] = index
                message = [memoryview(header)]
                if piece.command is Command.WRITE:
                    message.append(memoryview(piece.data).cast("B"))
                outgoing.extend(message if self._tls is None else (memoryview(self._tls.encrypt(message)),))
            poller.register(sock, select.POLLIN | (select.POLLOUT if outgoing else 0))
            if not poller.poll(None if self._timeout_seconds is None else self._timeout_seconds * 1000):
                raise TimeoutError(errno.ETIMEDOUT, "the server does not answer")
            if outgoing:
                self._send_some(outgoing)
            try:
                data = sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
            if self._tls is not None:
                data = self._tls.receive(data)
                outgoing.extend((memoryview(self._tls.take()),))
            for completion in machine.receive(data):
                done[cookies[completion.cookie]] = completion
        return [done[index] for index in range(len(pieces))]

    def _send_some(self, outgoing: deque[memoryview]) -> None:
        try:
            sent = self._sock.sendmsg([outgoing[index] for index in range(min(len(outgoing), 512))])
        except BlockingIOError:
            return
        while outgoing and sent >= len(outgoing[0]):
            sent -= len(outgoing.popleft())
        if sent:
            outgoing[0] = outgoing[0][sent:]

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise Closed(f"{self._name}: the connection belongs to another process")
        if self._broken is not None:
            raise self._broken

    # --- requests ---

    @property
    def writable(self) -> bool:
        return self._terms.writable

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        """See ``Disk.submit``; a server is always waited for, whatever ``wait`` says."""
        del wait
        outcomes: list[Outcome] = [None] * len(requests)
        pieces: list[Piece] = []
        for index, request in enumerate(requests):
            try:
                pieces += self._terms.cut(index, request)
            except CowfenceError as error:
                outcomes[index] = error
            else:
                if request.verb is Verb.READ:
                    outcomes[index] = bytearray(request.length_bytes)
        later: list[Piece] = []
        for piece, completion in zip(pieces, self._transact(pieces), strict=True):
            outcome = outcomes[piece.request]
            if completion.error:
                outcomes[piece.request] = self._terms.error(piece, completion)
            elif completion.data is not None and isinstance(outcome, bytearray):
                outcome[piece.at : piece.at + piece.length_bytes] = completion.data
        for index, request in enumerate(requests):
            if outcomes[index] is None and self._terms.flush_follows(request):
                later.append(self._terms.flush_piece(index))
        for piece, completion in zip(later, self._transact(later), strict=True):
            if completion.error:
                outcomes[piece.request] = self._terms.error(piece, completion)
        return outcomes

    def _one(self, request: Request) -> Outcome:
        (outcome,) = self.submit((request,))
        if isinstance(outcome, CowfenceError):
            raise outcome
        return outcome

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        """See ``Disk.read_into``; a server is always waited for, whatever ``wait`` says."""
        del wait
        memoryview(buffer)[:] = self.read(offset, len(buffer))

    def read(self, offset: int, length_bytes: int) -> bytes:
        outcome = self._one(Request(Verb.READ, offset, length_bytes))
        return bytes(outcome) if isinstance(outcome, bytearray) else b""

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        self._one(Request(Verb.WRITE, offset, len(data), data, fua))

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        self._one(Request(Verb.ZERO, offset, length_bytes, fua=fua, unmap=unmap))

    def discard(self, offset: int, length_bytes: int) -> None:
        self._one(Request(Verb.DISCARD, offset, length_bytes))

    def flush(self) -> None:
        self._one(Request(Verb.FLUSH))

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        """See ``Disk.extents``. A server without block status reports nothing: all counts as data."""
        self._terms.check_range(offset, length_bytes)
        if BASE_ALLOCATION not in self.contexts:
            return merge((unknown_extent(offset, length_bytes),))
        return merge(allocation_extent(*run) for run in self._status(BASE_ALLOCATION, offset, offset + length_bytes))

    def status(self, context: str, offset: int, length_bytes: int) -> Iterator[tuple[int, int, int]]:
        """What a metadata context says about a range: (offset, length in bytes, state), in order and without gaps.

        Raises Invalid for a context that the server does not have, and OutOfRange.
        """
        self._terms.check_status(context, offset, length_bytes)
        return self._status(context, offset, offset + length_bytes)

    def _status(self, context: str, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        while offset < end:
            piece = self._terms.status_piece(offset, end)
            (completion,) = self._transact((piece,))
            for run in self._terms.statuses(context, piece, completion, end):
                yield run
                offset = run[0] + run[1]

    # --- the end ---

    def close(self) -> None:
        """Flush, say goodbye and close. May be called again. Raises what the flush raises; the connection is closed anyway."""
        if isinstance(self._broken, Closed):
            return
        if os.getpid() != self._pid:
            self._broken = Closed(f"{self._name}: the connection belongs to another process")
            self._sock.close()
            return
        try:
            if self._broken is None:
                if self._terms.writable and self._terms.flushable:
                    self.flush()
                self._sock.setblocking(True)
                _, header = self._machine.request(Command.DISC)
                self._sock.sendall(header if self._tls is None else self._tls.encrypt((header,)) + self._tls.goodbye())
        except OSError as error:
            raise StorageFailed(self._name, "disconnect", 0, error) from error
        finally:
            self._broken = Closed(f"{self._name}: the disk is closed")
            self._sock.close()

    def __enter__(self) -> NbdDisk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
