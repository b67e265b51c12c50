"""One connection of an asyncio client: streams around the protocol machines, many requests in flight."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from cowfence.errors import CowfenceError, StorageFailed
from cowfence.nbd.client_handshake import ClientHandshake
from cowfence.nbd.client_transmission import ClientTransmission, Completion
from cowfence.nbd.conversation import conversation, tls_of
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import Command, ProtocolError
from cowfence.nbd.negotiation import Negotiated
from cowfence.nbd.recovery import Ledger, Recovery
from cowfence.nbd.terms import Piece, Terms
from cowfence.nbd.uri import NbdUri
from cowfence.units import KIB, MIB

if TYPE_CHECKING:
    from cowfence.nbd.tls import TlsSession

_RECEIVE_BYTES: Final = 256 * KIB
_UNSENT_BYTES: Final = MIB
_IN_FLIGHT_MAX: Final = 64

Reply = asyncio.Future[Completion | None]
"""None: the connection was lost before it came."""


class Connection:
    """Made by ``open``. Its ``ledger`` says why it has ended; ``ended`` is set then, after ``recovery`` was told."""

    def __init__(
        self,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        terms: Terms,
        tls: TlsSession | None,
        recovery: Recovery,
        timeout_seconds: float | None,
    ) -> None:
        self.terms = terms
        self.ledger = Ledger()
        self.ended = asyncio.Event()
        self._reader, self._writer = streams
        self._writer.transport.set_write_buffer_limits(_UNSENT_BYTES)
        self._tls = tls
        self._recovery = recovery
        self._timeout_seconds = timeout_seconds
        self._machine = ClientTransmission(style=terms.style, contexts=terms.agreed.contexts.values())
        self._loop = asyncio.get_running_loop()
        self._replies: dict[int, Reply] = {}
        self._sending = asyncio.Lock()
        self._slots = asyncio.Semaphore(_IN_FLIGHT_MAX)
        self._heard = self._loop.time()
        self._clock: asyncio.TimerHandle | None = None
        self._look_at_clock()
        self._receiving = self._loop.create_task(self._receive())

    @classmethod
    async def open(
        cls,
        uri: NbdUri,
        recovery: Recovery,
        *,
        timeout_seconds: float | None,
        contexts: Sequence[str],
        style: Style,
        open_seconds: float | None = None,
    ) -> Connection:
        """Connect and negotiate. ``timeout_seconds`` bounds each wait for the server, ``open_seconds`` all of this.

        Raises StorageFailed, Unsupported, ProtocolError, Invalid (``Recovery.accept``, too).
        """
        name = str(uri)
        tls = tls_of(uri)
        writer: asyncio.StreamWriter | None = None
        operation = "connect"
        limits = [seconds for seconds in (timeout_seconds, open_seconds) if seconds is not None]
        try:
            async with asyncio.timeout(min(limits) if limits else None):
                if uri.socket_path is not None:
                    reader, writer = await asyncio.open_unix_connection(uri.socket_path, limit=_RECEIVE_BYTES)
                else:
                    reader, writer = await asyncio.open_connection(uri.host, uri.port, limit=_RECEIVE_BYTES)
                operation = "handshake"
                handshake = ClientHandshake(uri.export, contexts=contexts, style=style, tls=uri.tls)
                agreed = await _negotiate(reader, writer, handshake, tls)
            if handshake.trailing:
                raise ProtocolError(f"{name}: the server sent replies to requests that were not made")
            recovery.accept(agreed)
            return cls((reader, writer), Terms(name, agreed), tls, recovery, timeout_seconds)
        except BaseException as error:
            if writer is not None:
                writer.transport.abort()
            if isinstance(error, TimeoutError):
                cause = TimeoutError(errno.ETIMEDOUT, "the server does not answer")
                raise StorageFailed(name, operation, 0, cause) from error
            if isinstance(error, OSError):
                raise StorageFailed(name, operation, 0, error) from error
            raise

    async def send(self, piece: Piece) -> Reply | None:
        """Send a message, when there is room for it; None where the connection was lost before anything of it was sent. Once
        this returns something, or was not cancelled while it waited, all of the message is on its way."""
        async with self._sending:
            with suppress(OSError):  # the ledger tells
                await self._writer.drain()
            await self._slots.acquire()
            if self._writer.is_closing():
                self._slots.release()
                await self.ended.wait()  # what arrived before is taken first
                return None
            if not self._replies:
                self._heard = self._loop.time()
            cookie, header = self._machine.request(piece.command, piece.offset, piece.length_bytes, piece.flags)
            reply: Reply = self._loop.create_future()
            self._replies[cookie] = reply
            self.ledger.send(cookie, piece)
            if self._tls is not None:
                self._writer.write(self._tls.encrypt((header, piece.data)))
            elif piece.data:
                self._writer.writelines((header, piece.data))
            else:
                self._writer.write(header)
            return reply

    async def _receive(self) -> None:
        try:
            while data := await self._reader.read(_RECEIVE_BYTES):
                self._heard = self._loop.time()
                if self._tls is not None:
                    data = self._tls.receive(data)
                    self._writer.write(self._tls.take())
                for completion in self._machine.receive(data):
                    self._take(completion)
                if self._tls is not None and self._tls.ended:
                    break
            raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
        except OSError as error:
            self._lose(StorageFailed(self.terms.name, "exchange", 0, error))
        except ProtocolError as error:
            self._lose(error)

    def _take(self, completion: Completion) -> None:
        self.ledger.take(completion)
        self._slots.release()
        reply = self._replies.pop(completion.cookie)
        if not reply.done():
            reply.set_result(completion)

    def _look_at_clock(self) -> None:
        if self._timeout_seconds is None:
            return
        left_seconds = self._timeout_seconds
        if self._replies:
            left_seconds -= self._loop.time() - self._heard
        if left_seconds <= 0:
            cause = TimeoutError(errno.ETIMEDOUT, "the server does not answer")
            self._lose(StorageFailed(self.terms.name, "exchange", 0, cause))
        else:
            self._clock = self._loop.call_later(left_seconds, self._look_at_clock)

    def _lose(self, error: CowfenceError) -> None:
        if self.ledger.lost is not None:
            return
        self._recovery.lose(self.ledger, error)
        self.ended.set()
        for reply in self._replies.values():
            self._slots.release()
            if not reply.done():
                reply.set_result(None)
        self._replies.clear()
        self.abort()

    async def say_goodbye(self) -> None:
        """Tell the server that nothing more comes, if it still listens."""
        self._receiving.cancel()
        _, header = self._machine.request(Command.DISC)
        self._writer.write(header if self._tls is None else self._tls.encrypt((header,)) + self._tls.goodbye())
        with suppress(OSError):
            async with asyncio.timeout(self._timeout_seconds):
                self._writer.close()
                await self._writer.wait_closed()

    def abort(self) -> None:
        """End it now."""
        if self._clock is not None:
            self._clock.cancel()
        self._receiving.cancel()
        self._writer.transport.abort()

    def disown(self) -> None:
        """In a forked child: let go of the descriptor. Closing the transport would reach into the parent's event loop, whose
        epoll the child shares."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, self._writer.get_extra_info("socket").fileno(), inheritable=False)
        os.close(null)


async def _negotiate(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handshake: ClientHandshake, tls: TlsSession | None
) -> Negotiated:
    script = conversation(handshake, tls)
    try:
        writer.write(next(script))
        while True:
            data = await reader.read(_RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection in the handshake")
            writer.write(script.send(data))
    except StopIteration as end:
        writer.write(end.value)
    if handshake.result is None:
        raise ProtocolError("the handshake ended without a result")
    return handshake.result
