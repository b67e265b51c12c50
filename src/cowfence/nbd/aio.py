"""``AsyncNbdDisk``: a disk behind an NBD server for asyncio, over one connection at a time.

Requests of all tasks are sent as they come, up to a bound, and answered in any order. What a cancellation does is in
``disk.aio``: a request is begun when its first byte is on the way, and the reply of one that nobody waits for is still read.

**When the connection is lost**, with ``reconnect_seconds``, a new one is made when it is needed, with growing pauses. It must
offer the same export on the same terms; else, and where a server breaks the protocol, the disk has failed for good. What
happens to each request, and why that is safe:

- *Reads and block status* that were not answered, or to which the server said that it stops, are asked again: they change
  nothing. Each for ``reconnect_seconds`` at most.
- *Writes, zeroes and discards* that were not answered fail. The server may have done them, in part or not, and may even do
  them yet, while it works off what it had received on the old connection: NBD has no way to make sure. So they are never
  repeated, and later ones that overlap them are refused: such a late write could land on top of what was acknowledged since.
  Whoever knows that the old server is dead opens the disk anew. What was never sent is not meant here, and goes to the new
  connection.
- *Flush*, and what was acknowledged before: a server that died has lost what it acknowledged and had not flushed, and one that
  lives may be another. If at the moment of the loss every acknowledged change was covered by a flush (one that was sent after
  the acknowledgement came, and answered), or was made with FUA, nothing was at stake: a flush that was not answered is sent
  again, and later ones mean what is written on the new connection. If not, the promise is broken: every flush fails from then
  on and nothing more is written, as after a fence that failed. Reading goes on. What counts as acknowledged is every reply
  that came, at the moment it was taken from the stream, whether or not the task that waits for it has run since.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Final

from cowfence.disk.aio import AsyncDisk, overlaps, owned, range_of
from cowfence.disk.base import Outcome, Request, Verb, as_outcome
from cowfence.errors import CowfenceError, Invalid, ReadOnly, StorageFailed
from cowfence.extents import Extent
from cowfence.nbd.aio_connection import Connection
from cowfence.nbd.client_transmission import Completion
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import BASE_ALLOCATION, NbdErrno, ProtocolError
from cowfence.nbd.terms import Piece, Terms, allocation_extent, unknown_extent
from cowfence.nbd.uri import NbdUri

_FIRST_PAUSE_SECONDS: Final = 0.02
_MOST_PAUSE_SECONDS: Final = 2.0


class _Work:
    """A request of a batch. ``begun``: some of it may have reached the server."""

    __slots__ = ("begun", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.begun = False


class AsyncNbdDisk(AsyncDisk):
    """``AsyncDisk`` at an NBD URI; ``connect`` makes one. ``style`` and ``contexts``: what the server agreed to."""

    def __init__(
        self,
        uri: NbdUri,
        connection: Connection,
        *,
        timeout_seconds: float | None,
        contexts: Sequence[str],
        style: Style,
        reconnect_seconds: float,
    ) -> None:
        """See ``connect``."""
        super().__init__(str(uri))
        self.uri = uri
        self.style = connection.terms.style
        self.contexts = tuple(connection.terms.agreed.contexts)
        self._terms: Terms = connection.terms
        self._connection = connection
        self._timeout_seconds = timeout_seconds
        self._wanted_contexts, self._wanted_style = contexts, style
        self._reconnect_seconds = reconnect_seconds
        self._reconnecting: asyncio.Task[CowfenceError | None] | None = None
        self._pause_seconds = 0.0
        self._failed: CowfenceError | None = None
        """Why nothing can be done any more."""
        self._promise_broken: CowfenceError | None = None
        """Why nothing can be flushed and written any more."""
        self._unanswered: list[tuple[int, int]] = []
        """Ranges (offset, end) of changes that a server may have made, or may make yet."""
        connection.on_lost = self._on_lost

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
        if reconnect_seconds < 0:
            raise Invalid("reconnect_seconds is 0 or more")
        connection = await Connection.open(where, timeout_seconds=timeout_seconds, contexts=contexts, style=style)
        return cls(
            where,
            connection,
            timeout_seconds=timeout_seconds,
            contexts=contexts,
            style=style,
            reconnect_seconds=reconnect_seconds,
        )

    @property
    def size(self) -> int:
        return self._terms.size

    @property
    def writable(self) -> bool:
        """False also where acknowledged writes may have been lost, see the module."""
        return self._terms.writable and self._promise_broken is None

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
            self._check_change(work.request)
            connection = await self._connected()
            self._check_change(work.request)
            completions = await self._exchange(connection, pieces, work)
            if None not in completions or work.begun:
                break
            deadline = self._patience(connection, deadline)
        self._raise_error(pieces, [self._answered(connection, completion) for completion in completions])
        if self._terms.flush_follows(work.request):
            flush = (self._terms.flush_piece(0),)
            self._raise_error(flush, await self._ask(flush, work))

    @staticmethod
    def _answered(connection: Connection, completion: Completion | None) -> Completion:
        if completion is None:
            assert connection.lost is not None  # it left a request without an answer
            raise connection.lost.with_traceback(None)
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
                self._check_promise()
            connection = await self._connected()
            if flushing is not None:
                self._check_promise()
            found = await self._exchange(connection, [pieces[index] for index in left], flushing)
            completions |= {
                index: completion
                for index, completion in zip(left, found, strict=True)
                if completion is not None and not self._is_leaving(completion)
            }
            if len(completions) < len(pieces) and (flushing is None or self._promise_broken is None):
                deadline = self._patience(connection, deadline)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await connection.ended.wait()
        return [completions[index] for index in range(len(pieces))]

    def _is_leaving(self, completion: Completion) -> bool:
        """The server stops, and will close the connection: as if it had not answered, where there may be another."""
        return completion.error == NbdErrno.ESHUTDOWN and self._reconnect_seconds > 0

    def _patience(self, connection: Connection, deadline: float | None) -> float:
        """Until when a request that met the end of a connection may look for another. Raises that where the time is over."""
        now = self._loop.time()
        deadline = now + self._reconnect_seconds if deadline is None else deadline
        if now >= deadline:
            stopping = OSError(errno.ESHUTDOWN, "the server is stopping")
            raise (connection.lost or StorageFailed(self._name, "exchange", 0, stopping)).with_traceback(None)
        return deadline

    def _check_change(self, request: Request) -> None:
        if self._promise_broken is not None:
            raise ReadOnly(f"{self._name}: read-only since {self._promise_broken}")
        if overlaps(range_of(request), self._unanswered):
            raise ReadOnly(
                f"{self._name}: offset {request.offset}: an earlier change here was not answered when the connection was lost, "
                "and the server may still make it; open the disk anew once it cannot"
            )

    def _check_promise(self) -> None:
        if self._promise_broken is not None:
            raise self._promise_broken.with_traceback(None)

    # --- block status ---

    async def _extents(self, offset: int, length_bytes: int) -> AsyncIterator[Extent]:
        if BASE_ALLOCATION not in self.contexts:
            if length_bytes:
                yield unknown_extent(offset, length_bytes)
            return
        pending: Extent | None = None
        async for run in self._status(BASE_ALLOCATION, offset, offset + length_bytes):
            extent = allocation_extent(*run)
            if pending is not None and extent.follows(pending):
                pending = pending._replace(length_bytes=pending.length_bytes + extent.length_bytes)
                continue
            if pending is not None:
                yield pending
            pending = extent
        if pending is not None:
            yield pending

    def status(self, context: str, offset: int, length_bytes: int) -> AsyncIterator[tuple[int, int, int]]:
        """What a metadata context says about a range: (offset, length in bytes, state), in order and without gaps.

        Raises Invalid for a context that the server does not have, and OutOfRange.
        """
        self._check()
        self._terms.check_status(context, offset, length_bytes)
        return self._status(context, offset, offset + length_bytes)

    async def _status(self, context: str, offset: int, end: int) -> AsyncIterator[tuple[int, int, int]]:
        while offset < end:
            piece = self._terms.status_piece(offset, end)
            with self._call():
                (completion,) = await self._ask((piece,))
            for run in self._terms.statuses(context, piece, completion, end):
                yield run
                offset = run[0] + run[1]

    # --- the connection ---

    def _on_lost(self, connection: Connection) -> None:
        assert connection.lost is not None  # that is why it calls
        if isinstance(connection.lost, ProtocolError):
            self._failed = connection.lost
        self._unanswered += [(piece.offset, piece.offset + piece.length_bytes) for piece in connection.unanswered_changes]
        if connection.unflushed:
            cause = OSError(errno.EIO, f"acknowledged writes may be lost: {connection.lost}")
            self._promise_broken = StorageFailed(self._name, "flush", 0, cause)

    async def _connected(self) -> Connection:
        while True:
            if self._failed is not None:
                raise self._failed.with_traceback(None)
            connection = self._connection
            if connection.lost is None:
                return connection
            if not self._reconnect_seconds:
                raise connection.lost.with_traceback(None)
            if self._reconnecting is None:
                self._reconnecting = self._loop.create_task(self._reconnect(connection.lost))
                self._reconnecting.add_done_callback(self._end_reconnecting)
            error = await asyncio.shield(self._reconnecting)
            if error is not None:
                raise error.with_traceback(None)

    def _end_reconnecting(self, _task: asyncio.Task[CowfenceError | None]) -> None:
        self._reconnecting = None

    async def _reconnect(self, error: CowfenceError) -> CowfenceError | None:
        """Make a new connection, as often as the time allows; returns why there is none."""
        deadline = self._loop.time() + self._reconnect_seconds
        if self._connection.answered:
            self._pause_seconds = 0.0
        while (left_seconds := deadline - self._loop.time()) > 0:
            await asyncio.sleep(min(self._pause_seconds, left_seconds))
            self._pause_seconds = min(max(2 * self._pause_seconds, _FIRST_PAUSE_SECONDS), _MOST_PAUSE_SECONDS)
            left_seconds = max(deadline - self._loop.time(), _FIRST_PAUSE_SECONDS)
            try:
                connection = await Connection.open(
                    self.uri,
                    timeout_seconds=self._timeout_seconds,
                    open_seconds=left_seconds,
                    contexts=self._wanted_contexts,
                    style=self._wanted_style,
                )
            except StorageFailed as failed:
                error = as_outcome(failed)
                continue
            except CowfenceError as refused:
                self._failed = as_outcome(refused)
                return self._failed
            if connection.terms.agreed != self._terms.agreed:
                connection.abort()
                self._failed = Invalid(f"{self._name}: the server has come back with another export or on other terms")
                return self._failed
            connection.on_lost = self._on_lost
            self._connection = connection
            return None
        return error

    # --- the end ---

    async def _close(self) -> None:
        connection = self._connection
        try:
            self._check_promise()
            if connection.lost is None:
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
