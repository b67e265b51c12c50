"""``NbdDisk``: a disk behind an NBD server, over one connection at a time.

Calls are serialised by a lock; what one ``submit`` asks for is in flight together. How requests become messages, and what
replies mean, is in ``terms``. With ``reconnect_seconds``, a lost connection is replaced when one is needed: what may be
repeated then, and what a flush still means, is in ``recovery``. Other calls wait meanwhile, and fail together with the one that
has waited in vain.

Every error fails the requests that met it, and none is repaired in silence; what the others of a ``submit`` were answered stays
answered. A reply that breaks the protocol ends the disk: every later call fails with that cause. So does, without
``reconnect_seconds``, a lost connection. A call that is interrupted in the middle of the stream (KeyboardInterrupt) closes the
disk, without a flush: how far its requests came is not known.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TypeAlias

from cowfence.disk.base import Outcome, Request, Verb, as_outcome
from cowfence.errors import Closed, CowfenceError, StorageFailed
from cowfence.extents import Extent, merge
from cowfence.nbd.client_connection import Connection, connect, converse
from cowfence.nbd.client_handshake import Listed, ListHandshake
from cowfence.nbd.client_transmission import Completion
from cowfence.nbd.conversation import tls_of
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import BASE_ALLOCATION, Command
from cowfence.nbd.recovery import CHANGES, Recovery
from cowfence.nbd.terms import Piece, Terms, allocation_extent, unknown_extent
from cowfence.nbd.uri import NbdUri
from cowfence.storage.base import Buffer, WritableBuffer

Answer: TypeAlias = Completion | CowfenceError
"""The reply to a message, or why there is none."""


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


class NbdDisk:
    """``Disk`` at an NBD URI. ``timeout_seconds`` bounds each wait for the server; None waits for ever. ``contexts``: the
    metadata contexts to ask for; those that the server has are in ``contexts`` then, for ``status``. ``style``: the best one to
    ask for. ``reconnect_seconds``: for how long a call that meets a lost connection may look for a new one; 0: a lost
    connection ends the disk.

    Raises ``StorageFailed`` (no connection), ``Unsupported`` (refused by the server), ``ProtocolError``, ``Invalid`` (the URI).
    """

    def __init__(
        self,
        uri: str | NbdUri,
        *,
        timeout_seconds: float | None = 30.0,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
        style: Style = Style.EXTENDED,
        reconnect_seconds: float = 0.0,
    ) -> None:
        self.uri = NbdUri.parse(uri) if isinstance(uri, str) else uri
        self._name = str(self.uri)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed: Closed | None = None
        self._recovery = Recovery(self._name, reconnect_seconds)
        self._opened = partial(
            Connection, self.uri, self._recovery, timeout_seconds=timeout_seconds, contexts=contexts, style=style
        )
        self._connection = self._opened()
        self._gave_up: tuple[float, CowfenceError] | None = None
        """When the last attempt to reconnect ended in vain, on the monotonic clock in seconds, and why."""
        self._terms: Terms = self._connection.terms
        self.size = self._terms.size
        self.block_bytes = self._terms.block_bytes
        self.style = self._terms.style
        self.contexts = tuple(self._terms.agreed.contexts)

    # --- the connection ---

    def _ask(self, pieces: Sequence[Piece], requests: Sequence[Request] = ()) -> list[Answer]:
        """What is answered to messages, which belong to ``requests``, in order; by as many connections as the rules allow."""
        answers: list[Answer | None] = [None] * len(pieces)
        connection: Connection | None = None
        deadline: float | None = None
        began = time.monotonic()
        self._check_process()
        with self._lock:
            self._check_open()
            while True:
                self._refuse(pieces, requests, answers)
                left = [index for index, answer in enumerate(answers) if answer is None]
                if not left:
                    return [answer for answer in answers if answer is not None]
                try:
                    if connection is not None:
                        deadline = self._recovery.patience(connection.ledger, time.monotonic(), deadline)
                        if connection.ledger.lost is None:
                            connection.await_end(deadline - time.monotonic())
                    connection = self._connected(began)
                except CowfenceError as error:
                    for index in left:
                        answers[index] = as_outcome(error)
                else:
                    self._exchange(connection, pieces, left, answers)

    def _refuse(self, pieces: Sequence[Piece], requests: Sequence[Request], answers: list[Answer | None]) -> None:
        """Answer what must not be sent any more."""
        for index, piece in enumerate(pieces):
            if piece.command is Command.READ or answers[index] is not None:
                continue
            try:
                if piece.command in CHANGES:
                    self._recovery.check_change(requests[piece.request])
                elif piece.command is Command.FLUSH:
                    self._recovery.check_flush()
            except CowfenceError as error:
                answers[index] = as_outcome(error)

    def _exchange(
        self, connection: Connection, pieces: Sequence[Piece], left: Sequence[int], answers: list[Answer | None]
    ) -> None:
        """Have one connection answer what is ``left``; what another may be asked has no answer then."""
        try:
            replies, begun = connection.exchange([pieces[index] for index in left])
        except BaseException:
            self._closed = Closed(f"{self._name}: an earlier call was interrupted")
            connection.close()
            raise
        lost = connection.ledger.lost
        changing = {pieces[index].request for index in left[:begun] if pieces[index].command in CHANGES} if lost else ()
        for index, reply in zip(left, replies, strict=True):
            if reply is None:
                # A change of which anything was sent stays with its connection, all of it.
                if pieces[index].command in CHANGES and pieces[index].request in changing:
                    answers[index] = lost
            elif not self._recovery.is_leaving(reply) or pieces[index].command in CHANGES:
                answers[index] = reply

    def _connected(self, began: float) -> Connection:
        """The connection, or another where it is lost, for a call that ``began`` then. Raises why there is none."""
        ledger = self._connection.ledger
        if not self._recovery.wants_another(ledger):
            return self._connection
        if self._gave_up is not None and self._gave_up[0] > began:
            raise self._gave_up[1]
        assert ledger.lost is not None  # that is why another is wanted
        error = ledger.lost
        for pause_seconds, open_seconds in self._recovery.attempts(ledger, time.monotonic):
            time.sleep(pause_seconds)
            try:
                self._connection = self._opened(open_seconds=open_seconds)
                return self._connection
            except StorageFailed as failed:
                error = as_outcome(failed)
            except CowfenceError as refused:
                raise self._recovery.fail(as_outcome(refused)) from None
        self._gave_up = time.monotonic(), error
        raise error

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise Closed(f"{self._name}: the connection belongs to another process")

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed.with_traceback(None)

    # --- requests ---

    @property
    def writable(self) -> bool:
        """False also where acknowledged writes may have been lost, see ``recovery``."""
        return self._terms.writable and self._recovery.promise_broken is None

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
        self._carry_out(pieces, requests, outcomes)
        later = [
            self._terms.flush_piece(index)
            for index, request in enumerate(requests)
            if outcomes[index] is None and self._terms.flush_follows(request)
        ]
        if later:
            self._carry_out(later, requests, outcomes)
        return outcomes

    def _carry_out(self, pieces: Sequence[Piece], requests: Sequence[Request], outcomes: list[Outcome]) -> None:
        for piece, answer in zip(pieces, self._ask(pieces, requests), strict=True):
            outcome = outcomes[piece.request]
            if isinstance(answer, CowfenceError):
                outcomes[piece.request] = answer
            elif answer.error:
                outcomes[piece.request] = self._terms.error(piece, answer)
            elif answer.data is not None and isinstance(outcome, bytearray):
                outcome[piece.at : piece.at + piece.length_bytes] = answer.data

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
            (answer,) = self._ask((piece,))
            if isinstance(answer, CowfenceError):
                raise answer
            for run in self._terms.statuses(context, piece, answer, end):
                yield run
                offset = run[0] + run[1]

    # --- the end ---

    def close(self) -> None:
        """Flush, say goodbye and close. May be called again. Raises what the flush raises, and StorageFailed where acknowledged
        writes may have been lost before; the connection is closed anyway."""
        if os.getpid() != self._pid:
            self._connection.close()
            return
        with self._lock:
            if self._closed is not None:
                return
            try:
                self._end()
            finally:
                self._closed = Closed(f"{self._name}: the disk is closed")
                self._connection.close()

    def _end(self) -> None:
        self._recovery.check_flush()
        connection = self._connection
        if connection.ledger.lost is None and self._terms.writable and self._terms.flushable:
            flush = self._terms.flush_piece(0)
            (reply,), begun = connection.exchange((flush,))
            self._recovery.check_flush()
            if reply is not None and reply.error:
                raise self._terms.error(flush, reply)
            if begun and connection.ledger.lost is not None:
                raise connection.ledger.lost
        if connection.ledger.lost is None:
            connection.say_goodbye()

    def __enter__(self) -> NbdDisk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
