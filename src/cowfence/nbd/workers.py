"""The pool of threads that does what would make the loop wait, and the bell by which it tells that something is done."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, NamedTuple

from cowfence.disk.base import Disk, Outcome, Request, Verb
from cowfence.errors import CowfenceError
from cowfence.nbd.connection import Connection
from cowfence.nbd.export import Export
from cowfence.nbd.messages import Command
from cowfence.nbd.transmission import (
    Batch,
    Query,
    QueryResult,
)
from cowfence.units import GIB, MIB

_log = logging.getLogger(__name__)

_CACHE_STEP_BYTES: Final = MIB
_CACHE_MOST_BYTES: Final = GIB
_WITH_DATA: Final = (Verb.READ, Verb.WRITE)
_READS_OF_A_JOB: Final = 8
"""Cold reads handed to a thread together. Trying them without waiting has already set the host reading, so the first of them
waits for all; one to a job measured 26k a second, eight 30k."""


class Job(NamedTuple):
    """Work for the pool: requests of the disk, which are done together, or a query."""

    connection: Connection
    export: Export
    work: Batch | Query
    requests: int
    cost_bytes: int

    @classmethod
    def of(cls, connection: Connection, export: Export, work: Batch | Query) -> Job:
        if isinstance(work, Query):
            return cls(connection, export, work, 1, 0)
        cost_bytes = sum(request.length_bytes for request in work.requests if request.verb in _WITH_DATA)
        return cls(connection, export, work, len(work.requests), cost_bytes)


class Done(NamedTuple):
    """A finished job: the outcomes of a batch, or the result of a query; and how long it took."""

    job: Job
    outcomes: list[Outcome]
    result: QueryResult
    seconds: float


class Bell:
    """Wakes the loop from other threads and from signal handlers.

    Its descriptor lives as long as the object: closed earlier, a late ring could write into whatever took its number.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._rung = False

    def ring(self) -> None:
        if self._rung:
            return
        self._rung = True
        with suppress(BlockingIOError):  # a full counter rings already
            os.eventfd_write(self.fd, 1)

    def silence(self) -> None:
        """To be called before looking for what was rung for: what comes after the look then rings anew."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._rung = False

    def __del__(self) -> None:
        os.close(self.fd)


class Workers:
    """A pool of threads, started as they are needed, that does jobs and keeps what came of them for the loop."""

    def __init__(self, most: int, bell: Bell) -> None:
        self._most = most
        self._bell = bell
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: deque[Done] = deque()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0  # touched by the loop's thread only

    @property
    def busy(self) -> bool:
        return self._unfinished > 0

    def submit(self, job: Job) -> None:
        self._unfinished += 1
        if len(self._threads) < min(self._unfinished, self._most):
            thread = threading.Thread(target=self._work, name=f"nbd-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)

    def take_done(self) -> list[Done]:
        done = []
        while self._done:
            done.append(self._done.popleft())
        self._unfinished -= len(done)
        return done

    def close(self) -> None:
        """Wait for all jobs and end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            began = time.perf_counter()
            outcomes: list[Outcome] = []
            result: QueryResult = None
            if isinstance(job.work, Query):
                result = _query(job.export, job.work)
            else:
                outcomes = submit(job.export.disk, job.work.requests, wait=True)
            self._done.append(Done(job, outcomes, result, time.perf_counter() - began))
            self._bell.ring()


class Pool(NamedTuple):
    """The threads of one export. ``writer`` is a single one, for writes whose receive buffer was lent: the long ones. Two of
    them in one file get in each other's way in the host: three quarters of what goes through with one."""

    export: Export
    workers: Workers
    writer: Workers

    @property
    def busy(self) -> bool:
        return self.workers.busy or self.writer.busy

    def submit(self, job: Job) -> None:
        is_lent = isinstance(job.work, Batch) and job.work.lent is not None
        (self.writer if is_lent else self.workers).submit(job)

    def take_done(self) -> list[Done]:
        return self.workers.take_done() + self.writer.take_done()

    def close(self) -> None:
        self.workers.close()
        self.writer.close()


class Pools:
    """A pool for each export that is used: one whose disk is slow takes no threads from others. Nothing is kept of those that
    nobody uses any more, for exports come and go. Used by the loop's thread."""

    def __init__(self, most: int, bell: Bell) -> None:
        self._most = most
        self._bell = bell
        self._pools: dict[int, Pool] = {}
        self._abandoned: Counter[int] = Counter()
        """By the id of an export: requests in its pool whose client is gone."""

    def __len__(self) -> int:
        return len(self._pools)

    def of(self, export: Export) -> Pool:
        """The pool of an export; it is made where there is none."""
        pool = self._pools.get(id(export))
        if pool is None:
            pool = self._pools[id(export)] = Pool(export, Workers(self._most, self._bell), Workers(1, self._bell))
        return pool

    def let_go(self, export: Export) -> None:
        """Forget the pool of an export that has neither clients nor jobs."""
        pool = self._pools.get(id(export))
        if pool is not None and not export.stats.clients and not pool.busy:
            del self._pools[id(export)]
            pool.close()

    def abandon(self, export: Export, requests: int) -> None:
        """A client is gone, and so many of its requests are not. They may still be done, and a client that comes again, repeats
        them and goes on (QEMU does) must not be overtaken by its own past: new clients of the export wait meanwhile."""
        if requests:
            self._abandoned[id(export)] += requests

    def outlive(self, job: Job) -> bool:
        """One of those is done; True if it was the last of its export."""
        self._abandoned[id(job.export)] -= job.requests
        if self.has_abandoned(job.export):
            return False
        del self._abandoned[id(job.export)]
        return True

    def has_abandoned(self, export: Export) -> bool:
        return self._abandoned[id(export)] > 0

    def busy_for(self, export: Export) -> bool:
        return id(export) in self._pools and self._pools[id(export)].busy

    @property
    def busy(self) -> bool:
        return any(pool.busy for pool in self._pools.values())

    def take_done(self) -> list[Done]:
        return [done for pool in self._pools.values() for done in pool.take_done()]

    def close(self) -> None:
        """Wait for all jobs and end the threads."""
        for pool in self._pools.values():
            pool.close()


def in_parts(batch: Batch, indices: Iterable[int]) -> list[Batch]:
    """Requests of a batch as work for the pool: cold reads a few together, for handing over costs more than they do, and each
    other by itself."""
    parts: list[Batch] = []
    reads: Batch | None = None
    for index in indices:
        request, is_read = batch.requests[index], batch.requests[index].verb is Verb.READ
        part = reads if is_read and reads is not None and len(reads.requests) < _READS_OF_A_JOB else None
        if part is None:
            part = Batch()
            part.undivided = batch.undivided
            parts.append(part)
            reads = part if is_read else reads
        part.requests.append(request)
        part.cookies.append(batch.cookies[index])
    return parts


def is_fence(request: Request) -> bool:
    return request.verb is Verb.FLUSH or (request.verb is Verb.WRITE and request.fua)


def submit(disk: Disk, requests: list[Request], *, wait: bool) -> list[Outcome]:
    """``Disk.submit``, whose failure as a whole is the failure of each request."""
    try:
        return disk.submit(requests, wait=wait)
    except CowfenceError as error:
        return [error] * len(requests)
    except Exception as error:
        return [_defect(error)] * len(requests)


def _query(export: Export, query: Query) -> QueryResult:
    try:
        if query.command is Command.BLOCK_STATUS:
            return [
                (context_id, export.status(context_id, query.offset, query.length_bytes, one=query.one))
                for context_id in query.contexts
            ]
        buffer = memoryview(bytearray(min(query.length_bytes, _CACHE_STEP_BYTES)))
        # It is a hint, and no reason to be busy for hours.
        end = query.offset + min(query.length_bytes, _CACHE_MOST_BYTES)
        for position in range(query.offset, end, _CACHE_STEP_BYTES):
            export.disk.read_into(position, buffer[: end - position])
    except CowfenceError as error:
        return error
    except Exception as error:
        return _defect(error)
    return None


def _defect(error: Exception) -> CowfenceError:
    # A defect of ours must cost the request that met it, not the loop, and not a thread of the pool and with it a hung client.
    _log.error("a request met a defect", exc_info=error)
    return CowfenceError(f"internal error: {type(error).__name__}")
