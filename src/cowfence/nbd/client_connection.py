"""One connection of a client that waits: a socket around the protocol machines."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from cowfence.errors import StorageFailed
from cowfence.nbd.client_handshake import ClientHandshake
from cowfence.nbd.client_transmission import ClientTransmission, Completion
from cowfence.nbd.conversation import conversation, tls_of
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import Command, ProtocolError
from cowfence.nbd.negotiation import Negotiation
from cowfence.nbd.recovery import Ledger, Recovery
from cowfence.nbd.terms import Piece, Terms
from cowfence.nbd.uri import NbdUri
from cowfence.units import KIB

if TYPE_CHECKING:
    from cowfence.nbd.tls import TlsSession

_RECEIVE_BYTES: Final = 256 * KIB
_IN_FLIGHT_MAX: Final = 64
_VECTOR_MAX: Final = 512
_LONGEST_WAIT_SECONDS: Final = 3600.0


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


def converse(sock: socket.socket, handshake: Negotiation, tls: TlsSession | None, *, deadline: float | None = None) -> None:
    """Carry a negotiation to its end over a socket that waits: as long as it does, or until ``deadline``, in seconds of the
    monotonic clock. Raises OSError, and what ``conversation`` raises."""
    script = conversation(handshake, tls)
    try:
        to_send = next(script)
        while True:
            sock.sendall(to_send)
            if deadline is not None:
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
            data = sock.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection in the handshake")
            to_send = script.send(data)
    except StopIteration as end:
        sock.sendall(end.value)


class Exchanged(NamedTuple):
    """``replies``: to each message; None where the connection was lost before it came. ``begun``: of how many of them, from the
    first on, something was sent."""

    replies: list[Completion | None]
    begun: int


class Connection:
    """To the server at a URI. ``timeout_seconds`` bounds each wait for the server, ``open_seconds`` all of the opening. Its
    ``ledger`` says why it has ended, after ``recovery`` was told.

    Raises StorageFailed, Unsupported, ProtocolError, Invalid (``Recovery.accept``, too).
    """

    def __init__(
        self,
        uri: NbdUri,
        recovery: Recovery,
        *,
        timeout_seconds: float | None,
        contexts: Sequence[str],
        style: Style,
        open_seconds: float | None = None,
    ) -> None:
        self.ledger = Ledger()
        self._name = str(uri)
        self._recovery = recovery
        self._timeout_seconds = timeout_seconds
        self._tls = tls_of(uri)
        deadline = None if open_seconds is None else time.monotonic() + open_seconds
        limits = [seconds for seconds in (timeout_seconds, open_seconds) if seconds is not None]
        handshake = ClientHandshake(uri.export, contexts=contexts, style=style, tls=uri.tls)
        self._sock = connect(uri, min(limits, default=None))
        try:
            converse(self._sock, handshake, self._tls, deadline=deadline)
            agreed = handshake.result
            if agreed is None:
                raise ProtocolError(f"{self._name}: the handshake ended without a result")
            if handshake.trailing:
                raise ProtocolError(f"{self._name}: the server sent replies to requests that were not made")
            recovery.accept(agreed)
        except BaseException as error:
            self._sock.close()
            if isinstance(error, OSError):
                raise StorageFailed(self._name, "handshake", 0, error) from error
            raise
        self.terms = Terms(self._name, agreed)
        self._machine = ClientTransmission(style=agreed.style, contexts=agreed.contexts.values())
        self._outgoing: deque[tuple[int, memoryview]] = deque()
        """What is to be sent, each with the number of its message in the exchange; -1: what TLS itself says."""
        self._sock.setblocking(False)
        self._poller = select.poll()

    # --- messages ---

    def exchange(self, pieces: Sequence[Piece]) -> Exchanged:
        """Send messages, and take their replies, as far as the connection lasts.

        All are sent as fast as the server takes them while replies are read at the same time, so neither side can block the
        other with full socket buffers. Where this is interrupted, the stream cannot be taken up again.
        """
        replies: list[Completion | None] = [None] * len(pieces)
        numbers: dict[int, int] = {}
        """Of messages that wait for their reply, by their cookies."""
        waiting = deque(enumerate(pieces))
        begun = 0
        sendable = True
        try:
            while waiting or numbers or self._outgoing:
                while sendable and waiting and len(numbers) < _IN_FLIGHT_MAX:
                    number, piece = waiting.popleft()
                    numbers[self._put_in_order(number, piece)] = number
                events = self._wait(self._timeout_seconds)
                if not events:
                    raise TimeoutError(errno.ETIMEDOUT, "the server does not answer")
                # Reading comes first: so it is known that a server has gone before anything more is sent to it.
                if events & ~select.POLLOUT:
                    for completion in self._receive():
                        self.ledger.take(completion)
                        replies[numbers.pop(completion.cookie)] = completion
                if events & select.POLLOUT:
                    try:
                        begun = max(begun, self._send())
                    except OSError:
                        # What arrived before is taken; the end that comes after it says that the connection is lost.
                        self._outgoing.clear()
                        sendable = False
        except (OSError, ProtocolError) as error:
            for cookie, number in numbers.items():
                if number >= begun:
                    self.ledger.unsend(cookie)
            self._lose(error)
        return Exchanged(replies, begun)

    def await_end(self, seconds: float) -> None:
        """Wait until a server that is stopping has closed the connection, but no longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        try:
            while (left_seconds := deadline - time.monotonic()) > 0:
                if self._wait(min(left_seconds, _LONGEST_WAIT_SECONDS)):
                    self._receive()
        except (OSError, ProtocolError) as error:
            self._lose(error)

    def _put_in_order(self, number: int, piece: Piece) -> int:
        """Have a message sent; returns its cookie."""
        cookie, header = self._machine.request(piece.command, piece.offset, piece.length_bytes, int(piece.flags))
        message = [memoryview(header)]
        if piece.command is Command.WRITE:
            message.append(memoryview(piece.data).cast("B"))
        if self._tls is not None:
            message = [memoryview(self._tls.encrypt(message))]
        for part in message:
            self._outgoing.append((number, part))
        self.ledger.send(cookie, piece)
        return cookie

    def _wait(self, seconds: float | None) -> int:
        """What the socket is ready for, in the flags of ``select.poll``; 0: nothing, and the time is over."""
        if self._tls is not None and self._tls.ended:
            raise _closed_by_server()
        self._poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        ready = self._poller.poll(None if seconds is None else seconds * 1000)
        return ready[0][1] if ready else 0

    def _receive(self) -> list[Completion]:
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise _closed_by_server()
        if self._tls is not None:
            data = self._tls.receive(data)
            if to_send := self._tls.take():
                self._outgoing.append((-1, memoryview(to_send)))
        return self._machine.receive(data)

    def _send(self) -> int:
        """Send what the server takes now. Returns how many messages of the exchange are begun then; 0: nothing was sent."""
        outgoing = self._outgoing
        try:
            sent_bytes = self._sock.sendmsg([part for _, part in islice(outgoing, _VECTOR_MAX)])
        except BlockingIOError:
            return 0
        begun = 0
        while sent_bytes:
            number, part = outgoing.popleft()
            begun = max(begun, number + 1)  # what TLS itself says may stand behind a message
            if sent_bytes < len(part):
                outgoing.appendleft((number, part[sent_bytes:]))
                break
            sent_bytes -= len(part)
        return begun

    # --- the end ---

    def _lose(self, error: OSError | ProtocolError) -> None:
        self._sock.close()
        if isinstance(error, ProtocolError):
            self._recovery.lose(self.ledger, error)
        else:
            self._recovery.lose(self.ledger, StorageFailed(self._name, "exchange", 0, error))

    def say_goodbye(self) -> None:
        """Tell the server that nothing more comes. Raises StorageFailed."""
        _, header = self._machine.request(Command.DISC)
        try:
            self._sock.settimeout(self._timeout_seconds)
            self._sock.sendall(header if self._tls is None else self._tls.encrypt((header,)) + self._tls.goodbye())
        except OSError as error:
            raise StorageFailed(self._name, "disconnect", 0, error) from error

    def close(self) -> None:
        """Let go of the socket, without a word; also in a forked child."""
        self._sock.close()


def _closed_by_server() -> OSError:
    return ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
