"""``NbdDisk``: a disk behind an NBD server, over one connection.

Calls are serialised by a lock; within one ``submit`` all requests are sent as fast as the server takes them while replies are
read at the same time, so neither side can block the other with full socket buffers. Requests are cut to what the server
allows in one (32 MiB where it does not say).

Every error fails the call that met it, and none is repaired in silence. A reply that breaks the protocol, or a lost
connection, ends the connection: nobody knows then which requests were done, so every later call fails with that cause.

What a server does not offer is done by other means where these are as good: zeroing by writing zeros, FUA by a flush after
the write, and a trim that is not offered is not sent (the range then reads as before). Flush has no substitute.
"""

from __future__ import annotations

import errno
import getpass
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from cowfence.disk.base import Outcome, Request, Verb
from cowfence.errors import Closed, CowfenceError, Invalid, NoSpace, OutOfRange, ReadOnly, StorageFailed, Unsupported
from cowfence.extents import Extent, merge
from cowfence.nbd.client_handshake import ClientHandshake, Listed, ListHandshake
from cowfence.nbd.client_transmission import ClientTransmission, Completion
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import BASE_ALLOCATION, Command, CommandFlag, NbdErrno, ProtocolError, State, TransmissionFlag
from cowfence.nbd.negotiation import Negotiated, Negotiation
from cowfence.nbd.uri import NbdUri
from cowfence.storage.base import Buffer, WritableBuffer
from cowfence.units import GIB, KIB, align_down

if TYPE_CHECKING:
    from cowfence.nbd.tls import TlsSession

_RECEIVE_BYTES: Final = 256 * KIB
_IN_FLIGHT_MAX: Final = 64
_ZEROS_BYTES: Final = 64 * KIB
_KNOWN_FLAGS: Final = 0x1FFF


def converse(sock: socket.socket, handshake: Negotiation, tls: TlsSession | None) -> None:
    """Carry a negotiation to its end over a socket that waits; ``tls`` begins where it wants that. Raises OSError, and what the
    negotiation raises."""

    def receive() -> bytes:
        data = sock.recv(_RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection in the handshake")
        return data

    def send(message: bytes) -> None:
        sock.sendall(message if tls is None or not tls.established else tls.encrypt((message,)))

    while not handshake.ended:
        data = receive()
        if tls is not None and tls.established:
            data = tls.receive(data)
            sock.sendall(tls.take())
        send(handshake.receive(data))
        if handshake.wants_tls and tls is not None:
            plain = tls.receive()
            sock.sendall(tls.take())
            while not tls.established:
                plain = tls.receive(receive())
                sock.sendall(tls.take())
            handshake.secured()
            send(handshake.receive(plain))


def _tls_of(uri: NbdUri) -> TlsSession | None:
    """The session that a URI asks for. Raises as ``tls.client_context`` and ``tls.psk_context`` do."""
    if not uri.tls:
        return None
    from cowfence.nbd.tls import TlsSession, client_context, psk_context

    hostname = uri.tls_hostname or (uri.host if uri.socket_path is None else None)
    if uri.psk_file is not None:
        context = psk_context(uri.psk_file, user=uri.user or getpass.getuser())
    else:
        context = client_context(uri.tls_directory, verify_peer=uri.verify_peer, hostname=hostname)
    return TlsSession(context, server_side=False, hostname=hostname)


def list_exports(uri: str | NbdUri, *, timeout_seconds: float | None = 30.0) -> list[Listed]:
    """What the server at a URI exports, whatever export it names. Raises as ``NbdDisk`` does."""
    where = NbdUri.parse(uri) if isinstance(uri, str) else uri
    handshake = ListHandshake(tls=where.tls)
    sock = connect(where, timeout_seconds)
    try:
        converse(sock, handshake, _tls_of(where))
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


class _Piece(NamedTuple):
    """A part of a request that fits into one message. ``at``: where its bytes stand in the request's."""

    request: int
    command: Command
    flags: int
    offset: int
    length_bytes: int
    data: Buffer
    at: int


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
        self._tls = _tls_of(self.uri)
        self._sock = connect(self.uri, timeout_seconds)
        try:
            agreed, trailing = self._negotiate(
                ClientHandshake(self.uri.export, contexts=contexts, style=style, tls=self.uri.tls)
            )
        except BaseException:
            self._sock.close()
            raise
        self.size = agreed.export.size_bytes
        self.block_bytes = agreed.export.preferred_block_bytes
        self.style = agreed.style
        self.contexts = tuple(agreed.contexts)
        self._minimum_bytes = agreed.export.minimum_block_bytes
        self._maximum_bytes = align_down(agreed.export.maximum_block_bytes, self._minimum_bytes)
        self._flags = TransmissionFlag(agreed.export.flags & _KNOWN_FLAGS)
        self._context_ids = dict(agreed.contexts)
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

    def _transact(self, pieces: Sequence[_Piece]) -> list[Completion]:
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

    def _exchange(self, pieces: Sequence[_Piece]) -> list[Completion]:
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
        return not self._flags & TransmissionFlag.READ_ONLY

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        """See ``Disk.submit``; a server is always waited for, whatever ``wait`` says."""
        del wait
        outcomes: list[Outcome] = [None] * len(requests)
        pieces: list[_Piece] = []
        for index, request in enumerate(requests):
            try:
                pieces += self._cut(index, request)
            except CowfenceError as error:
                outcomes[index] = error
            else:
                if request.verb is Verb.READ:
                    outcomes[index] = bytearray(request.length_bytes)
        later: list[_Piece] = []
        for piece, completion in zip(pieces, self._transact(pieces), strict=True):
            outcome = outcomes[piece.request]
            if completion.error:
                outcomes[piece.request] = self._error(piece, completion)
            elif completion.data is not None and isinstance(outcome, bytearray):
                outcome[piece.at : piece.at + piece.length_bytes] = completion.data
        for index, request in enumerate(requests):
            if request.fua and outcomes[index] is None and not self._flags & TransmissionFlag.SEND_FUA:
                later.append(self._flush_piece(index))
        for piece, completion in zip(later, self._transact(later), strict=True):
            if completion.error:
                outcomes[piece.request] = self._error(piece, completion)
        return outcomes

    def _cut(self, index: int, request: Request) -> list[_Piece]:
        """The messages that a request needs."""
        verb, offset, length_bytes, data, fua, unmap = request
        if verb is Verb.FLUSH:
            return [self._flush_piece(index)] if self.writable else []
        if verb is Verb.WRITE:
            length_bytes = len(data)
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise OutOfRange(offset, length_bytes, self.size)
        if (offset | length_bytes) % self._minimum_bytes:
            raise Invalid(f"{self._name}: the server takes only multiples of {self._minimum_bytes} bytes")
        if verb is not Verb.READ and not self.writable:
            raise ReadOnly(f"{self._name}: the export is read-only")
        flags = int(CommandFlag.FUA) if fua and self._flags & TransmissionFlag.SEND_FUA else 0
        most_bytes = self._maximum_bytes
        if verb is Verb.READ:
            command, flags = Command.READ, 0
        elif verb is Verb.WRITE:
            command = Command.WRITE
        elif verb is Verb.DISCARD:
            if not self._flags & TransmissionFlag.SEND_TRIM:
                return []
            command, most_bytes = Command.TRIM, GIB
        elif self._flags & TransmissionFlag.SEND_WRITE_ZEROES:
            command = Command.WRITE_ZEROES
            flags |= 0 if unmap else int(CommandFlag.NO_HOLE)
        else:
            command = Command.WRITE
            data, most_bytes = b"", max(align_down(min(most_bytes, _ZEROS_BYTES), self._minimum_bytes), self._minimum_bytes)
        view = memoryview(data).cast("B") if data else memoryview(b"")
        pieces = []
        for at in range(0, length_bytes, most_bytes):
            count = min(most_bytes, length_bytes - at)
            content: Buffer = view[at : at + count]
            if command is Command.WRITE and verb is Verb.ZERO:
                content = bytes(count)
            pieces.append(_Piece(index, command, flags, offset + at, count, content, at))
        return pieces

    def _flush_piece(self, index: int) -> _Piece:
        if not self._flags & TransmissionFlag.SEND_FLUSH:
            raise Unsupported(self._name, "the NBD server does not offer flush")
        return _Piece(index, Command.FLUSH, 0, 0, 0, b"", 0)

    def _error(self, piece: _Piece, completion: Completion) -> CowfenceError:
        """The error of the tree for one that the server reported; an unknown number counts as EINVAL ("Error values")."""
        what = completion.text or f"error {completion.error}"
        text = f"{self._name}: {piece.command.name} at offset {piece.offset}: {what}"
        number = completion.error
        if number == NbdErrno.EPERM:
            return ReadOnly(text)
        if number == NbdErrno.ENOSPC:
            return NoSpace(text)
        if number == NbdErrno.ENOTSUP:
            return Unsupported(self._name, f"{piece.command.name}: {what}")
        if number in (NbdErrno.EIO, NbdErrno.ENOMEM, NbdErrno.ESHUTDOWN):
            return StorageFailed(self._name, piece.command.name, piece.offset, OSError(number, what))
        return Invalid(text)

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
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise OutOfRange(offset, length_bytes, self.size)
        return merge(self._extents(offset, offset + length_bytes))

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        if BASE_ALLOCATION not in self._context_ids:
            yield Extent(offset, end - offset, zero=False, data=True, present=True, host_offset=offset)
            return
        for start, length_bytes, state in self._status(BASE_ALLOCATION, offset, end):
            zero, hole = bool(state & State.ZERO), bool(state & State.HOLE)
            yield Extent(start, length_bytes, zero=zero, data=not zero, present=not hole, host_offset=start)

    def status(self, context: str, offset: int, length_bytes: int) -> Iterator[tuple[int, int, int]]:
        """What a metadata context says about a range: (offset, length in bytes, state), in order and without gaps.

        Raises Invalid for a context that the server does not have, and OutOfRange.
        """
        if context not in self._context_ids:
            raise Invalid(f"{self._name}: the server has no metadata context {context!a}")
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise OutOfRange(offset, length_bytes, self.size)
        return self._status(context, offset, offset + length_bytes)

    def _status(self, context: str, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        context_id = self._context_ids[context]
        longest = end if self.style is Style.EXTENDED else 4 * GIB - 1
        most_bytes = max(align_down(longest, self._minimum_bytes), self._minimum_bytes)
        while offset < end:
            piece = _Piece(0, Command.BLOCK_STATUS, 0, offset, min(end - offset, most_bytes), b"", 0)
            (completion,) = self._transact((piece,))
            if completion.error:
                raise self._error(piece, completion)
            if context_id not in completion.statuses:
                raise ProtocolError(f"{self._name}: the server left out the metadata context {context}")
            for length_bytes, state in completion.statuses[context_id]:
                # Lengths are the server's word: each is over zero (checked when decoded) and is cut at the range's end.
                length_bytes = min(length_bytes, end - offset)
                if length_bytes:
                    yield offset, length_bytes, state
                offset += length_bytes

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
                if self.writable and self._flags & TransmissionFlag.SEND_FLUSH:
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
