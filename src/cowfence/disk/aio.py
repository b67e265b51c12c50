"""``AsyncDisk``: what every disk for asyncio has in common: whose it is, how it ends, and what a cancellation leaves behind.

**Cancellation.** A task that is cancelled gets its CancelledError at once. Of its request there are two cases. If it was not
begun, it is not done at all. If it was begun, it is *abandoned*: carried to its end in the background with the bytes that were
given, so that a write never tears. Until then, requests that overlap it wait: otherwise an abandoned write could land on top
of a later one that was acknowledged, and a read could see its range change once more. ``close`` waits for all of them. (A task
is cancelled once it is done. Between ``task.cancel()`` and that, its request is one of two that run at the same time.)

**Ownership.** A disk belongs to the event loop and the process in which it was made; others are refused.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from cowfence.disk.base import Outcome, Request, Verb, overlaps, range_of
from cowfence.errors import Closed, CowfenceError, Invalid, OutOfRange
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, WritableBuffer


class AsyncDisk(ABC):
    """``Disk`` with coroutines; an asynchronous context manager, which closes it. All offsets and lengths in bytes.

    Requests of different tasks overlap and may take effect in any order; so may those of one ``submit``. Errors: those of
    ``Disk``; ``Closed`` after ``close`` and in a forked child; ``Invalid`` in another event loop.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._calls = 0
        self._abandoned: dict[asyncio.Future[Any], tuple[int, int]] = {}
        self._quiet = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None

    # --- what an implementation does ---

    @property
    @abstractmethod
    def size(self) -> int: ...

    @property
    @abstractmethod
    def writable(self) -> bool: ...

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """The unit in which the disk allocates (a hint; any offset and length works)."""

    @abstractmethod
    async def _submit(self, requests: Sequence[Request]) -> list[Outcome]:
        """Carry out a batch. Where it is cancelled, it calls ``_abandon`` for each request that was begun and is not over."""

    @abstractmethod
    def _extents(self, offset: int, length_bytes: int) -> AsyncIterator[Extent]:
        """Of a range inside the disk."""

    @abstractmethod
    async def _close(self) -> None:
        """Flush and release; no call is in progress, unless the event loop itself is ending."""

    @abstractmethod
    def _disown(self) -> None:
        """Release what a forked child holds, without a word to anybody."""

    # --- requests ---

    async def read(self, offset: int, length_bytes: int) -> bytes:
        outcome = await self._one(Request(Verb.READ, offset, length_bytes))
        return outcome if isinstance(outcome, bytes) else bytes(outcome or b"")

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` from ``offset``; it is not touched before everything has been read, nor after a cancellation."""
        view = memoryview(buffer).cast("B")
        view[:] = await self._one(Request(Verb.READ, offset, len(view))) or b""

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is flushed when this returns. They are copied, where they could change, before
        anything is waited for."""
        view = memoryview(data)
        content = data if view.format == "B" and view.ndim == 1 else view.cast("B")
        await self._one(Request(Verb.WRITE, offset, len(content), content, fua))

    async def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        """Make the range read as zeros; ``unmap`` gives its space back where the format can."""
        await self._one(Request(Verb.ZERO, offset, length_bytes, fua=fua, unmap=unmap))

    async def discard(self, offset: int, length_bytes: int) -> None:
        """Tell that the range is no longer needed: afterwards it reads as before or as zeros."""
        await self._one(Request(Verb.DISCARD, offset, length_bytes))

    async def flush(self) -> None:
        """Everything acknowledged before this call survives a power cut once it returns."""
        await self._one(Request(Verb.FLUSH))

    def extents(self, offset: int, length_bytes: int) -> AsyncIterator[Extent]:
        """The states of the range, in order and without gaps."""
        self._check()
        self._check_range(offset, length_bytes)
        return self._extents(offset, length_bytes)

    async def submit(self, requests: Sequence[Request]) -> list[Outcome]:
        """Carry out a batch; one outcome for each request, in order, as of ``Disk.submit`` where it waits."""
        with self._call():
            if self._abandoned:
                requests = [owned(request) for request in requests]
                ranges = [range_of(request) for request in requests]
                while earlier := [end for end, range_ in self._abandoned.items() if overlaps(range_, ranges)]:
                    await asyncio.wait(earlier)
            return await self._submit(requests)

    async def _one(self, request: Request) -> Buffer | None:
        (outcome,) = await self.submit((request,))
        if isinstance(outcome, CowfenceError):
            raise outcome
        return outcome if isinstance(outcome, bytes | bytearray | memoryview) else None

    @contextmanager
    def _call(self) -> Iterator[None]:
        """A call that ``close`` waits for."""
        self._check()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._look_quiet()

    # --- what was cancelled ---

    def _abandon(self, request: Request, end: asyncio.Future[Any]) -> None:
        """Note a request whose caller has left and that is over when ``end`` is done."""
        self._abandoned[end] = range_of(request)
        end.add_done_callback(self._forget)

    def _forget(self, end: asyncio.Future[Any]) -> None:
        del self._abandoned[end]
        if not end.cancelled():
            end.exception()  # seen: there is nobody left to tell
        self._look_quiet()

    def _look_quiet(self) -> None:
        if not self._calls and not self._abandoned:
            self._quiet.set()

    # --- the end ---

    async def close(self) -> None:
        """Wait for everything in flight, flush and release. May be called again. Where this is cancelled, it goes on.

        Raises what the flush raises; the disk is released in any case.
        """
        if os.getpid() != self._pid:
            self._disown()
            return
        self._check_loop()
        if self._closing is None:
            self._closing = self._loop.create_task(self._end())
        elif self._closing.done():
            return
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        try:
            while self._calls or self._abandoned:
                self._quiet.clear()
                await self._quiet.wait()
        finally:
            await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- checks ---

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise Closed(f"{self._name}: the disk belongs to the process that opened it")
        self._check_loop()
        if self._closing is not None:
            raise Closed(f"{self._name}: the disk is closed")

    def _check_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not self._loop:
            raise Invalid(f"{self._name}: the disk belongs to the event loop in which it was opened")

    def _check_range(self, offset: int, length_bytes: int) -> None:
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise OutOfRange(offset, length_bytes, self.size)


def owned(request: Request) -> Request:
    """The request with bytes that nobody can change."""
    return request if isinstance(request.data, bytes) else request._replace(data=bytes(request.data))


D = TypeVar("D", bound=AsyncDisk)


class Opening(Generic[D]):
    """A disk that is yet to be opened: ``await`` it, or use it as ``async with ... as disk``. Once."""

    def __init__(self, begin: Callable[[], Awaitable[D]]) -> None:
        self._begin = begin
        self._disk: D | None = None

    def __await__(self) -> Generator[Any, None, D]:
        return self._begin().__await__()

    async def __aenter__(self) -> D:
        self._disk = await self._begin()
        return self._disk

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._disk is not None:
            await self._disk.close()
