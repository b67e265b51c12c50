"""The library for asyncio: the same disks, with coroutines.

    async with cowfence.aio.open("disk.qcow2", writable=True) as disk:
        await disk.write(0, b"hello")
        await disk.flush()

``open`` and ``create`` take the arguments of ``cowfence.open`` and ``cowfence.create`` and raise the same, where they are
awaited or entered.

The core underneath is the synchronous one. A request is tried at once in the event loop, without waiting: what the page cache
can serve costs no thread. What would have to wait, and what is long, goes to a small pool of threads that each disk has for
itself, so that slow requests overlap and never stop the loop. The queue in front of the pool is bounded; who finds it full
waits, and has not begun. What a cancellation does is in ``disk.aio``.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent import futures
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import cowfence
from cowfence.disk.aio import AsyncDisk, Opening, owned
from cowfence.disk.base import BLOCKED, Disk, Outcome, Request, Verb, range_of
from cowfence.extents import Extent
from cowfence.nbd.messages import BASE_ALLOCATION
from cowfence.units import MIB

if TYPE_CHECKING:
    from cowfence.nbd.aio import AsyncNbdDisk
    from cowfence.nbd.uri import NbdUri

__all__ = ["AsyncDisk", "Opening", "PooledDisk", "create", "open", "open_nbd"]

_WORKERS: Final = 8
_QUEUE_MAX: Final = 64
_INLINE_BYTES: Final = MIB
"""Of one batch, done in the loop: about as long as ten switches to a thread and back."""
_EXTENTS_AT_ONCE: Final = 1024

P = ParamSpec("P")
T = TypeVar("T")


class PooledDisk(AsyncDisk):
    """``AsyncDisk`` over ``disk``, which it owns and closes. ``workers``: the most threads that wait for the host."""

    def __init__(self, disk: Disk, *, workers: int = _WORKERS) -> None:
        super().__init__(type(disk).__name__)
        self._disk = disk
        self._pool = futures.ThreadPoolExecutor(workers, "cowfence-aio")
        self._room = asyncio.Semaphore(_QUEUE_MAX)
        self._jobs: set[futures.Future[Any]] = set()

    @property
    def size(self) -> int:
        return self._disk.size

    @property
    def writable(self) -> bool:
        return self._disk.writable

    @property
    def block_bytes(self) -> int:
        return self._disk.block_bytes

    async def _submit(self, requests: Sequence[Request]) -> list[Outcome]:
        at_once = _those_at_once(requests)
        outcomes: list[Outcome]
        if len(at_once) == len(requests):
            outcomes = self._disk.submit(requests, wait=False)
        else:
            outcomes = [BLOCKED] * len(requests)
            done = self._disk.submit([requests[index] for index in at_once], wait=False)
            for index, outcome in zip(at_once, done, strict=True):
                outcomes[index] = outcome
        blocked = [index for index, outcome in enumerate(outcomes) if outcome is BLOCKED]
        if blocked:
            done = await self._wait_for([owned(requests[index]) for index in blocked])
            for index, outcome in zip(blocked, done, strict=True):
                outcomes[index] = outcome
        return outcomes

    async def _wait_for(self, requests: Sequence[Request]) -> list[Outcome]:
        """Carry requests out in threads, whose bytes nobody can change."""
        jobs: list[futures.Future[Outcome]] = []
        try:
            for request in requests:
                jobs.append(await self._hand_over(functools.partial(self._carry_out, request)))
            return await asyncio.gather(*map(asyncio.wrap_future, jobs))
        except asyncio.CancelledError:
            for request, job in zip(requests, jobs, strict=False):
                if not job.cancel() and not job.done() and request.verb is not Verb.READ:
                    self._abandon(request, asyncio.wrap_future(job))
            raise

    async def _hand_over(self, work: Callable[[], T]) -> futures.Future[T]:
        """Give work to a thread as soon as the queue has room. What is cancelled before a thread has begun it is not done."""
        await self._room.acquire()
        job = self._pool.submit(work)
        self._jobs.add(job)
        job.add_done_callback(self._end_job)
        return job

    def _end_job(self, job: futures.Future[T]) -> None:
        self._jobs.discard(job)
        with suppress(RuntimeError):  # the loop has ended without the disk being closed
            self._loop.call_soon_threadsafe(self._room.release)

    def _carry_out(self, request: Request) -> Outcome:
        (outcome,) = self._disk.submit((request,))
        return outcome

    async def _extents(self, offset: int, length_bytes: int) -> AsyncIterator[Extent]:
        found: Iterator[Extent] | None = None

        def next_extents() -> list[Extent]:
            nonlocal found
            if found is None:
                found = self._disk.extents(offset, length_bytes)
            return list(islice(found, _EXTENTS_AT_ONCE))

        while True:
            with self._call():
                extents = await asyncio.wrap_future(await self._hand_over(next_extents))
            for extent in extents:
                yield extent
            if len(extents) < _EXTENTS_AT_ONCE:
                return

    async def _close(self) -> None:
        end = self._pool.submit(self._finish, list(self._jobs))
        self._pool.shutdown(wait=False)
        await asyncio.shield(asyncio.wrap_future(end))

    def _finish(self, jobs: Sequence[futures.Future[Any]]) -> None:
        # They come before this one in the queue, so each has a thread already.
        futures.wait(jobs)
        self._disk.close()

    def _disown(self) -> None:
        self._disk.close()


def _those_at_once(requests: Sequence[Request]) -> list[int]:
    """The requests that are short enough, taken together, to be tried in the loop."""
    room_bytes = _INLINE_BYTES
    chosen = []
    for index, request in enumerate(requests):
        if request.verb in (Verb.READ, Verb.WRITE):
            start, end = range_of(request)
            if end - start > room_bytes:
                continue
            room_bytes -= end - start
        chosen.append(index)
    return chosen


# The signatures and docstrings, overloads included, are those of the functions that are wrapped.
def _opener(function: Callable[P, Disk]) -> Callable[P, Opening[PooledDisk]]:
    @functools.wraps(function)
    def opener(*args: P.args, **kwargs: P.kwargs) -> Opening[PooledDisk]:
        return Opening(lambda: _opened(functools.partial(function, *args, **kwargs)))

    return opener


async def _opened(function: Callable[[], Disk]) -> PooledDisk:
    """What ``function`` opens, in a thread. Where this is cancelled, what comes of it is closed again."""
    with_thread = futures.ThreadPoolExecutor(1, "cowfence-open")
    opening = with_thread.submit(function)
    with_thread.shutdown(wait=False)
    try:
        disk = await asyncio.wrap_future(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_again)
        raise
    return PooledDisk(disk)


def _close_again(opening: futures.Future[Disk]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


open = _opener(cowfence.open)
create = _opener(cowfence.create)


def open_nbd(
    uri: str | NbdUri,
    *,
    timeout_seconds: float | None = 30.0,
    contexts: Sequence[str] = (BASE_ALLOCATION,),
    reconnect_seconds: float = 0.0,
) -> Opening[AsyncNbdDisk]:
    """The disk at an NBD URI; see ``nbd.aio.AsyncNbdDisk.connect``."""
    from cowfence.nbd.aio import AsyncNbdDisk

    return Opening(
        lambda: AsyncNbdDisk.connect(
            uri, timeout_seconds=timeout_seconds, contexts=contexts, reconnect_seconds=reconnect_seconds
        )
    )
