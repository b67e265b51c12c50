"""``AsyncNbdDisk``: a disk behind an NBD server for asyncio, over one connection at a time.

Requests of all tasks are sent as they come, up to a bound, and answered in any order. What a cancellation does is in
``disk.aio``: a request is begun when its first byte is on the way, and the reply of one that nobody waits for is still read.

With ``reconnect_seconds``, a lost connection is replaced when one is needed. What may be repeated then, and what a flush still
means, is in ``recovery``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from cowfence.disk.aio import AsyncDisk, owned
from cowfence.disk.base import Outcome, Request, Verb, as_outcome
from cowfence.errors import CowfenceError, StorageFailed
from cowfence.extents import Extent, merge
from cowfence.nbd.aio_connection import Connection
from cowfence.nbd.client_transmission import Completion
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import BASE_ALLOCATION
from cowfence.nbd.recovery import Recovery
from cowfence.nbd.terms import Piece, Terms, allocation_extent, unknown_extent
from cowfence.nbd.uri import NbdUri


class _Work:
    """A request of a batch. ``begun``: some of it may have reached the server."""

    __slots__ = ("begun", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.begun = False


class AsyncNbdDisk(AsyncDisk):
    """``AsyncDisk`` at an NBD URI; ``connect`` makes one. ``style`` and ``contexts``: what the server agreed to."""

    def __init__(
        self, uri: NbdUri, connection: Connection, recovery: Recovery, opened: Callable[..., Awaitable[Connection]]
    ) -> None:
        """See ``connect``. ``opened``: opens another connection, in ``open_seconds`` at most."""
        super().__init__(str(uri))
        self.uri = uri
        self.style = connection.terms.style
        self.contexts = tuple(connection.terms.agreed.contexts)
        self._terms: Terms = connection.terms
        self._connection = connection
        self._recovery = recovery
        self._opened = opened
        self._reconnecting: asyncio.Task[CowfenceError | None] | None = None

    @classmethod
    async def connect(
        cls,
        uri: str | NbdUri,
        *,
        timeout_seconds: float | None = 30.0,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
        style: Style = Style.EXTENDED,
        reconnect_seconds: float = 0.0,
    ) -> AsyncNbdDisk:
        """Connect to the export at a URI. ``timeout_seconds`` bounds each wait for the server; None waits for ever.
        ``contexts``: the metadata contexts to ask for. ``style``: the best one to ask for. ``reconnect_seconds``: for how long
        a request that meets a lost connection may look for a new one; 0: a lost connection ends it.

        Raises StorageFailed (no connection), Unsupported (refused by the server), ProtocolError, Invalid (the URI).
        """
        where = NbdUri.parse(uri) if isinstance(uri, str) else uri
        recovery = Recovery(str(where), reconnect_seconds)
        opened = partial(Connection.open, where, recovery, timeout_seconds=timeout_seconds, contexts=contexts, style=style)
        return cls(where, await opened(), recovery, opened)

    @property
    def size(self) -> int:
        return self._terms.size

    @property
    def writable(self) -> bool:
        """False also where acknowledged writes may have been lost, see ``recovery``."""
        return self._terms.writable and self._recovery.promise_broken is None

    @property
    def block_bytes(self) -> int:
        return self._terms.block_bytes

    # --- requests ---

    async def _submit(self, requests: Sequence[Request]) -> list[Outcome]:
        works = [_Work(owned(request)) for request in requests]
        tasks = [self._loop.create_task(self._carry_out(work)) for work in works]
        try:
            if tasks:
                await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for work, task in zip(works, tasks, strict=True):
                if work.begun and work.request.verb is not Verb.READ:
                    if not task.done():
                        self._abandon(work.request, task)
                else:
                    task.cancel()
            raise
        return [task.result() for task in tasks]

    async def _carry_out(self, work: _Work) -> Outcome:
        try:
            pieces = self._terms.cut(0, work.request)
            if work.request.verb is Verb.READ:
                return await self._read(work.request.length_bytes, pieces)
            if work.request.verb is Verb.FLUSH:
                self._raise_error(pieces, await self._ask(pieces, work))
            else:
                await self._change(work, pieces)
        except CowfenceError as error:
            return as_outcome(error)
        return None

    async def _read(self, length_bytes: int, pieces: Sequence[Piece]) -> bytearray:
        data = bytearray(length_bytes)
        completions = await self._ask(pieces)
        self._raise_error(pieces, completions)
        for piece, completion in zip(pieces, completions, strict=True):
            data[piece.at : piece.at + piece.length_bytes] = completion.data or b""
        return data

    async def _change(self, work: _Work, pieces: Sequence[Piece]) -> None:
        """Everything on one connection; where that is lost once something was sent, the change fails."""
        deadline: float | None = None
        while True:
            self._recovery.check_change(work.request)
            connection = await self._connected()
            self._recovery.check_change(work.request)
            completions = await self._exchange(connection, pieces, work)
            if None not in completions or work.begun:
                break
            deadline = self._recovery.patience(connection.ledger, self._loop.time(), deadline)
        self._raise_error(pieces, [self._answered(connection, completion) for completion in completions])
        if self._terms.flush_follows(work.request):
            flush = (self._terms.flush_piece(0),)
            self._raise_error(flush, await self._ask(flush, work))

    @staticmethod
    def _answered(connection: Connection, completion: Completion | None) -> Completion:
        if completion is None:
            assert connection.ledger.lost is not None  # it left a request without an answer
            raise connection.ledger.lost.with_traceback(None)
        return completion

    def _raise_error(self, pieces: Sequence[Piece], completions: Sequence[Completion]) -> None:
        for piece, completion in zip(pieces, completions, strict=True):
            if completion.error:
                raise self._terms.error(piece, completion)

    async def _exchange(
        self, connection: Connection, pieces: Sequence[Piece], work: _Work | None = None
    ) -> list[Completion | None]:
        """The replies to messages, as far as the connection lasts."""
        replies: list[asyncio.Future[Completion | None] | None] = []
        for piece in pieces:
            reply = await connection.send(piece)
            replies.append(reply)
            if work is not None and reply is not None:
                work.begun = True
        return [None if reply is None else await reply for reply in replies]

    async def _ask(self, pieces: Sequence[Piece], flushing: _Work | None = None) -> list[Completion]:
        """The replies to messages that may be repeated: what a lost connection leaves unanswered is sent again. ``flushing``:
        on whose behalf they flush, as long as the promise can be kept."""
        completions: dict[int, Completion] = {}
        deadline: float | None = None
        while left := [index for index in range(len(pieces)) if index not in completions]:
            if flushing is not None:
                self._recovery.check_flush()
            connection = await self._connected()
            if flushing is not None:
                self._recovery.check_flush()
            found = await self._exchange(connection, [pieces[index] for index in left], flushing)
            completions |= {
                index: completion
                for index, completion in zip(left, found, strict=True)
                if completion is not None and not self._recovery.is_leaving(completion)
            }
            if len(completions) < len(pieces) and (flushing is None or self._recovery.promise_broken is None):
                deadline = self._recovery.patience(connection.ledger, self._loop.time(), deadline)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await connection.ended.wait()
        return [completions[index] for index in range(len(pieces))]

    # --- block status ---

    async def _extents(self, offset: int, length_bytes: int) -> AsyncIterator[Extent]:
        if BASE_ALLOCATION not in self.contexts:
            if length_bytes:
                yield unknown_extent(offset, length_bytes)
            return
        last: list[Extent] = []
        async for runs in self._replies(BASE_ALLOCATION, offset, offset + length_bytes):
            *joined, last_one = merge((*last, *(allocation_extent(*run) for run in runs)))
            last = [last_one]
            for extent in joined:
                yield extent
        for extent in last:
            yield extent

    def status(self, context: str, offset: int, length_bytes: int) -> AsyncIterator[tuple[int, int, int]]:
        """What a metadata context says about a range: (offset, length in bytes, state), in order and without gaps.

        Raises Invalid for a context that the server does not have, and OutOfRange.
        """
        self._check()
        self._terms.check_status(context, offset, length_bytes)
        return self._status(context, offset, offset + length_bytes)

    async def _status(self, context: str, offset: int, end: int) -> AsyncIterator[tuple[int, int, int]]:
        async for runs in self._replies(context, offset, end):
            for run in runs:
                yield run

    async def _replies(self, context: str, offset: int, end: int) -> AsyncIterator[list[tuple[int, int, int]]]:
        """What each reply says, until the range is covered."""
        while offset < end:
            piece = self._terms.status_piece(offset, end)
            with self._call():
                (completion,) = await self._ask((piece,))
            runs = list(self._terms.statuses(context, piece, completion, end))
            yield runs
            offset = runs[-1][0] + runs[-1][1]

    # --- the connection ---

    async def _connected(self) -> Connection:
        while self._recovery.wants_another(self._connection.ledger):
            if self._reconnecting is None:
                self._reconnecting = self._loop.create_task(self._reconnect())
                self._reconnecting.add_done_callback(self._end_reconnecting)
            error = await asyncio.shield(self._reconnecting)
            if error is not None:
                raise error.with_traceback(None)
        return self._connection

    def _end_reconnecting(self, _task: asyncio.Task[CowfenceError | None]) -> None:
        self._reconnecting = None

    async def _reconnect(self) -> CowfenceError | None:
        """Make a new connection, as often as the time allows; returns why there is none."""
        ledger = self._connection.ledger
        error = ledger.lost
        for pause_seconds, open_seconds in self._recovery.attempts(ledger, self._loop.time):
            await asyncio.sleep(pause_seconds)
            try:
                self._connection = await self._opened(open_seconds=open_seconds)
                return None
            except StorageFailed as failed:
                error = as_outcome(failed)
            except CowfenceError as refused:
                return self._recovery.fail(as_outcome(refused))
        return error

    # --- the end ---

    async def _close(self) -> None:
        connection = self._connection
        try:
            self._recovery.check_flush()
            if connection.ledger.lost is None:
                if self._terms.writable and self._terms.flushable:
                    flush = (self._terms.flush_piece(0),)
                    found = await self._exchange(connection, flush)
                    self._raise_error(flush, [self._answered(connection, completion) for completion in found])
                await connection.say_goodbye()
        finally:
            if self._reconnecting is not None:
                self._reconnecting.cancel()
                await asyncio.wait((self._reconnecting,))
            connection.abort()
            self._connection.abort()

    def _disown(self) -> None:
        self._connection.disown()
