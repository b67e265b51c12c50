"""A disk in pieces, on many threads: read, looked at for zeros, handed to what takes them.

What is not zero by the source's extents is read in pieces. Reading, compressing and writing all leave Python's lock. Pieces are
placed in their order (or, out of order, as they come), so that at most a few of them are in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cowfence.codec import Effort
from cowfence.disk.base import Disk
from cowfence.errors import CowfenceError
from cowfence.extents import Extent
from cowfence.ops.pace import Pace
from cowfence.units import KIB, MIB

Progress: TypeAlias = Callable[[int, int], None]
"""(bytes of the source that are done, its size)."""

_SAMPLES: Final = 16
_PIECE_BYTES: Final = 2 * MIB
DEFAULT_SPARSE_BYTES: Final = 4 * KIB


@dataclass(frozen=True, slots=True)
class How:
    """How a disk is converted; the defaults are qemu-img's.

    ``sparse_bytes``: so many zeros in a row, at least, become a hole of a raw target (a qcow2 target has holes of whole
    clusters); 0: none do. ``threads``: default one a core, at least 2 and at most 16. ``in_order``: data stands in the file
    in the order of the disk. ``rate_bytes``: at most so many a second are written. ``salvage``: what cannot be read becomes
    zeros.
    ``target_is_zero``: an existing target reads as zeros already. ``effort``: of the compressor.
    """

    compress: bool = False
    sparse_bytes: int = DEFAULT_SPARSE_BYTES
    threads: int | None = None
    in_order: bool = True
    rate_bytes: int | None = None
    salvage: bool = False
    target_is_zero: bool = False
    effort: Effort = Effort.FAST


class Sink(Protocol):
    """A target. ``prepare`` may run on many threads at once; ``place`` is called in the order of the pieces where that is
    asked for, and returns what writes them.

    ``ordered``: it is asked for where ``How.in_order`` is; else the order makes no difference to the target.
    ``serial``: what ``place`` returns is called before the next piece is placed, in order whatever is asked for.
    """

    unit_bytes: int
    ordered: bool
    serial: bool

    def prepare(self, start: int, data: memoryview) -> Prepared: ...

    def place(self, prepared: Prepared) -> Callable[[], None]: ...

    def finish(self, size_bytes: int) -> None:
        """All pieces are written; ``size_bytes``: the disk's."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A piece, looked through: its runs that are not zero (offset in the piece, length in bytes), or their streams."""

    start: int
    data: memoryview
    runs: list[tuple[int, int]]
    streams: list[tuple[int, bytes]]
    """(guest offset, stream)."""
    zeros: list[tuple[int, int]] = field(default_factory=list)
    """Runs that are zero, where something else would show through."""

    @property
    def data_bytes(self) -> int:
        return sum(length_bytes for _, length_bytes in self.runs) + sum(len(stream) for _, stream in self.streams)


class Supply(Protocol):
    """Where pieces come from."""

    @property
    def size_bytes(self) -> int:
        """Of the disk; of a stream without a length, as far as it has come."""
        ...

    def pieces(self, unit_bytes: int) -> Iterator[tuple[int, int]]:
        """Ranges (offset, length in bytes) to ``load``, in whole units of the target but for the disk's end. One thread."""
        ...

    def load(self, start: int, length_bytes: int) -> memoryview:
        """The bytes of one of the pieces, until the same thread loads another. Many threads at once."""
        ...


class DiskSupply:
    """An open disk: what is not zeros by its extents."""

    def __init__(self, disk: Disk, how: How, *, below_bytes: int | None = None) -> None:
        """``below_bytes``: the size of the target's backing file, which holds what the disk does not hold itself."""
        self._disk = disk
        self._how = how
        self._below_bytes = below_bytes
        self._buffers = threading.local()
        self._unreadable: list[tuple[int, str]] = []

    @property
    def size_bytes(self) -> int:
        return self._disk.size

    @property
    def unreadable(self) -> tuple[tuple[int, str], ...]:
        return tuple(sorted(self._unreadable))

    def pieces(self, unit_bytes: int) -> Iterator[tuple[int, int]]:
        """Ranges with data, rounded out to whole units of the target and cut into pieces."""
        size = self._disk.size
        piece_bytes = max(_PIECE_BYTES, unit_bytes)
        extents: Iterable[Extent] = self._disk.extents(0, size)
        all_of_it = not self._how.sparse_bytes
        below_bytes = self._below_bytes
        if below_bytes is not None:
            # Zeros of its own count, too: something else would show there.
            all_of_it = True
            extents = (extent for extent in extents if (extent.present and not extent.depth) or extent.end > below_bytes)
        for start, end in _rounded(extents, unit_bytes, size, all_of_it=all_of_it):
            for at in range(start, end, piece_bytes):
                yield at, min(piece_bytes, end - at)

    def load(self, start: int, length_bytes: int) -> memoryview:
        buffer = self._buffer(length_bytes)
        try:
            self._disk.read_into(start, buffer)
        except CowfenceError as error:
            if not self._how.salvage:
                raise
            self._salvage(start, buffer, str(error))
        return buffer

    def _buffer(self, length_bytes: int) -> memoryview:
        """This thread's own, used again for each of its pieces: to have the kernel clear pages for each takes long."""
        held: memoryview | None = getattr(self._buffers, "held", None)
        if held is None or len(held) < length_bytes:
            held = self._buffers.held = np.empty(length_bytes, np.uint8).data
        return held[:length_bytes]

    def _salvage(self, start: int, buffer: memoryview, why: str) -> None:
        """Read what can be read, a few sectors at a time."""
        for at in range(0, len(buffer), DEFAULT_SPARSE_BYTES):
            part = buffer[at : at + DEFAULT_SPARSE_BYTES]
            try:
                self._disk.read_into(start + at, part)
            except CowfenceError:
                part[:] = bytes(len(part))
                self._unreadable.append((start + at, why))


def _rounded(extents: Iterable[Extent], unit_bytes: int, size: int, *, all_of_it: bool) -> Iterator[tuple[int, int]]:
    start = end = 0
    for extent in extents:
        if extent.zero and not all_of_it:
            continue
        first = extent.start // unit_bytes * unit_bytes
        last = min(-(-extent.end // unit_bytes) * unit_bytes, size)
        if first > end:
            if end > start:
                yield start, end
            start = first
        end = max(end, last)
    if end > start:
        yield start, end


class _Stopped(Exception):
    """Another piece has failed."""


class Work:
    """The pieces of a disk, on many threads."""

    def __init__(self, supply: Supply, how: How, progress: Progress | None) -> None:
        self._supply = supply
        self._how = how
        self._progress = progress
        self._turn = threading.Condition()
        self._next = 0
        self._failed = False
        self._pace = Pace(how.rate_bytes)
        self.data_bytes = 0

    def run(self, sink: Sink) -> None:
        """Everything from the supply into the sink. Raises what reading and writing raise."""
        threads = self._how.threads or min(16, max(2, os.cpu_count() or 1))
        in_order = sink.serial or (sink.ordered and self._how.in_order)
        under_way: set[Future[tuple[int, int]]] = set()
        with ThreadPoolExecutor(threads, thread_name_prefix="cowfence-convert") as pool:
            try:
                for number, (start, length_bytes) in enumerate(self._supply.pieces(sink.unit_bytes)):
                    if len(under_way) >= 2 * threads:
                        under_way = self._some_ended(under_way)
                    under_way.add(pool.submit(self._piece, sink, number, start, length_bytes, in_order))
                while under_way:
                    under_way = self._some_ended(under_way)
            except BaseException:
                with self._turn:
                    self._failed = True
                    self._turn.notify_all()
                for future in under_way:
                    future.cancel()
                raise
        sink.finish(self._supply.size_bytes)
        if self._progress is not None:
            self._progress(self._supply.size_bytes, self._supply.size_bytes)

    def _some_ended(self, under_way: set[Future[tuple[int, int]]]) -> set[Future[tuple[int, int]]]:
        done, left = wait(under_way, return_when=FIRST_COMPLETED)
        end = 0
        for future in done:
            if isinstance(future.exception(), _Stopped):
                continue  # The piece that failed tells why.
            data_bytes, reached = future.result()
            self.data_bytes += data_bytes
            end = max(end, reached)
        if self._progress is not None:
            self._progress(end, self._supply.size_bytes)
        return left

    def _piece(self, sink: Sink, number: int, start: int, length_bytes: int, in_order: bool) -> tuple[int, int]:
        try:
            data = self._supply.load(start, length_bytes)
            prepared = sink.prepare(start, data)
        except BaseException:
            # Nobody waits for this piece any more.
            with self._turn:
                self._failed = True
                self._turn.notify_all()
            raise
        if in_order:
            with self._turn:
                self._turn.wait_for(lambda: self._next == number or self._failed)
            try:
                if self._failed:
                    raise _Stopped
                write = sink.place(prepared)
                if sink.serial:
                    self._pace.wait(prepared.data_bytes)
                    write()
            except BaseException:
                self._failed = True
                raise
            finally:
                with self._turn:
                    self._next = number + 1
                    self._turn.notify_all()
        else:
            write = sink.place(prepared)
        if not sink.serial:
            self._pace.wait(prepared.data_bytes)
            write()
        return sum(length for _, length in prepared.runs) + len(prepared.streams) * sink.unit_bytes, start + length_bytes


def data_runs(data: memoryview, unit_bytes: int) -> list[tuple[int, int]]:
    """The parts of ``data`` that are not all zeros, as (offset, length in bytes), in units."""
    whole = len(data) // unit_bytes * unit_bytes
    units = np.frombuffer(data[:whole], np.uint64).reshape(-1, unit_bytes // 8) if whole else np.zeros((0, 1), np.uint64)
    # Most units show by a few of their words that they are not zero; the others are looked through.
    some: NDArray[np.bool_] = np.asarray(units[:, :: max(1, units.shape[1] // _SAMPLES)].any(axis=1))
    rest = np.flatnonzero(~some)
    some[rest] = [bool(units[row].any()) for row in rest.tolist()]
    if len(data) > whole:
        some = np.append(some, bool(bytes(data[whole:]).strip(b"\0")))
    edges = np.flatnonzero(np.diff(np.concatenate(([0], some, [0])).astype(np.int8))).tolist()
    return [
        (first * unit_bytes, min(last * unit_bytes, len(data)) - first * unit_bytes)
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    ]


def gaps(runs: list[tuple[int, int]], length_bytes: int) -> list[tuple[int, int]]:
    """What is between the runs of a piece, as (offset, length in bytes)."""
    found, at = [], 0
    for start, run_bytes in [*runs, (length_bytes, 0)]:
        if start > at:
            found.append((at, start - at))
        at = start + run_bytes
    return found
