"""Convert a disk into a new image: raw or qcow2, plain or compressed, on all cores.

The source tells its extents; what is not zero by them is read in pieces on several threads, looked at for zeros, compressed
where that is asked for, and written. Reading, compressing and writing all leave Python's lock. Pieces are placed in their order
(or, out of order, as they come), so that at most a few of them are in memory.

The target is made under a temporary name and gets its own when it is whole and durable: an interrupted conversion leaves
nothing under that name (``storage.publish``). A block device as a raw target is written in place.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from cowfence.chain import open_chain
from cowfence.codec import compressor
from cowfence.disk.base import Disk
from cowfence.disk.opener import Refs, printable
from cowfence.errors import CowfenceError, Invalid, NoSpace, Unsupported
from cowfence.extents import Extent
from cowfence.ops.create import COMPRESSION_TYPES, CreateOptions, backing_size, data_path, new_file, new_image, settle
from cowfence.qcow2.bulk import BulkImage
from cowfence.qcow2.create import NewImage
from cowfence.qcow2.describe import JsonValue
from cowfence.storage.base import Buffer, Storage
from cowfence.storage.publish import NewFile
from cowfence.units import KIB, MIB

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import DataCipher, Secrets

Progress = Callable[[int, int], None]
"""(bytes of the source that are done, its size)."""

_SAMPLES: Final = 16
_PIECE_BYTES: Final = 2 * MIB
DEFAULT_SPARSE_BYTES: Final = 4 * KIB


@dataclass(frozen=True, slots=True)
class Converted:
    """``data_bytes``: of the source, were written (before compression); the rest reads as zeros."""

    source: str
    target: str
    format: str
    size_bytes: int
    data_bytes: int
    unreadable: tuple[tuple[int, str], ...] = ()
    """Where the source could not be read (offset, why), and zeros were written instead."""

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "source": self.source,
            "target": self.target,
            "format": self.format,
            "virtual-size": self.size_bytes,
            "data": self.data_bytes,
            "unreadable": [offset for offset, _ in self.unreadable],
        }


@dataclass(frozen=True, slots=True)
class How:
    """How a disk is converted; the defaults are qemu-img's.

    ``sparse_bytes``: so many zeros in a row, at least, become a hole of a raw target (a qcow2 target has holes of whole
    clusters); 0: none do. ``threads``: default one a core, at least 2 and at most 16. ``in_order``: data stands in the file
    in the order of the disk. ``rate_bytes``: at most so many a second are written. ``salvage``: what cannot be read becomes
    zeros.
    ``target_is_zero``: an existing target reads as zeros already.
    """

    compress: bool = False
    sparse_bytes: int = DEFAULT_SPARSE_BYTES
    threads: int | None = None
    in_order: bool = True
    rate_bytes: int | None = None
    salvage: bool = False
    target_is_zero: bool = False


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: CreateOptions,
    *,
    how: How | None = None,
    format: str = "qcow2",
    snapshot: str | None = None,
    refs: Refs | None = None,
    force_share: bool = False,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert the disk of ``source`` (or of one of its snapshots) into a new image at ``target``: see ``convert_disk``.

    Raises also as ``chain.open_chain`` does.
    """
    disk = open_chain(
        source,
        format=format,
        refs=refs,
        force_share=force_share,
        assume_backing_format=assume_backing_format,
        secrets=secrets,
        snapshot=snapshot,
    )
    try:
        return convert_disk(disk, os.fspath(source), target, options, how, progress=progress)
    finally:
        disk.close()


def convert_disk(
    disk: Disk,
    source: str,
    target: str | os.PathLike[str],
    options: CreateOptions,
    how: How | None = None,
    *,
    direct: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert an open disk into a new image at ``target``; ``source``: its name. ``direct``: the target goes around the page
    cache.

    ``options``: of the new image; its size is the source's. With a backing file in them only what the source holds itself, not
    what it has from its own backing file, goes into the new image: that file has to hold the same.

    Raises Invalid, Unsupported, NoSpace, and as ``storage.publish`` does; then nothing is left.
    """
    how = how or How()
    _check(how, options, os.fspath(target))
    settled = settle(target, replace(options, size_bytes=disk.size))
    with ExitStack() as files:
        new = files.enter_context(NewFile(target, direct=direct))
        data = None if settled.data_file is None else new_file(files, data_path(target, settled.data_file))
        sink = _sink(new, data, settled, disk.size, how)
        below_bytes = None
        if settled.backing is not None and settled.backing_format is not None:
            below_bytes = backing_size(target, settled.backing, settled.backing_format, Refs.trust_all())
        work = _Work(disk, how, progress, below_bytes=below_bytes)
        work.run(sink)
        sink.finish()
        if data is not None:
            data.publish()
        new.publish()
    return Converted(source, os.fspath(target), options.format, disk.size, work.data_bytes, work.unreadable)


def convert_into(
    disk: Disk,
    source: str,
    target: Disk,
    name: str,
    format_name: str,
    how: How | None = None,
    *,
    progress: Progress | None = None,
) -> Converted:
    """Copy an open disk over an existing one, open for writing; ``name``: of its file. Zeros are written as zeros, unless it
    reads as zeros already. It is flushed at the end. Raises Invalid (it is smaller), NoSpace, and what reading and writing
    raise: then the target holds a part."""
    how = how or How()
    if target.size < disk.size:
        raise Invalid("Output file is smaller than input file")
    work = _Work(disk, how, progress)
    sink = _DiskSink(target, how)
    if not how.target_is_zero:
        _zero_gaps(disk, target)
    work.run(sink)
    target.flush()
    return Converted(source, name, format_name, disk.size, work.data_bytes, work.unreadable)


def _zero_gaps(disk: Disk, target: Disk) -> None:
    """What the source calls zeros. (What is behind its end stays, as it does in qemu-img.)"""
    for extent in disk.extents(0, disk.size):
        if extent.zero:
            target.zero(extent.start, extent.length_bytes)


def _check(how: How, options: CreateOptions, target: str) -> None:
    if options.size_bytes is not None:
        raise Invalid(f"{printable(target)}: a conversion takes the size from its source")
    if how.compress and (options.format != "qcow2" or options.data_file is not None):
        raise Invalid("Compression not supported for this file format")
    if how.compress and options.encryption is not None:
        raise Invalid("Compression and encryption not supported at the same time")
    if how.sparse_bytes < 0 or how.sparse_bytes % 512:
        raise Invalid("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512")


class _Sink(Protocol):
    """A target. ``prepare`` may run on many threads at once; ``place`` is called in the order of the pieces where that is
    asked for, and returns what writes them."""

    unit_bytes: int

    def prepare(self, start: int, data: memoryview) -> Prepared: ...

    def place(self, prepared: Prepared) -> Callable[[], None]: ...

    def finish(self) -> None: ...


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


def _sink(new: NewFile, data: NewFile | None, settled: CreateOptions, size_bytes: int, how: How) -> _Sink:
    if settled.format == "raw":
        return _RawSink(new, settled, size_bytes, how.sparse_bytes)
    if new.in_place:
        raise Unsupported(new.path, "a qcow2 image on a block device as the target of convert")
    if settled.preallocation != "off":
        raise Unsupported(new.path, f"preallocation={settled.preallocation} of a converted image")
    if data is not None:
        data.storage.truncate(size_bytes, "create.size")
    holder = new.storage if data is None else data.storage
    wanted = new_image(settled)
    cipher: DataCipher | None = None
    if wanted.luks_area is not None and settled.secret is not None:
        from cowfence.qcow2.encryption import new_cipher

        cipher = new_cipher(wanted.luks_area, settled.secret, new.path)
    compression = settled.compression_type if how.compress else None
    return _QcowSink(new.storage, holder, wanted, cipher, compression, sparse=bool(how.sparse_bytes))


class _DiskSink:
    """An existing disk."""

    def __init__(self, disk: Disk, how: How) -> None:
        self._disk = disk
        self.unit_bytes = how.sparse_bytes or 512
        self._sparse = bool(how.sparse_bytes)
        self._zeroes = not how.target_is_zero

    def prepare(self, start: int, data: memoryview) -> Prepared:
        runs = data_runs(data, self.unit_bytes) if self._sparse else [(0, len(data))]
        return Prepared(start, data, runs, [], gaps(runs, len(data)) if self._zeroes else [])

    def place(self, prepared: Prepared) -> Callable[[], None]:
        def write() -> None:
            for at, length_bytes in prepared.runs:
                self._disk.write(prepared.start + at, prepared.data[at : at + length_bytes])
            for at, length_bytes in prepared.zeros:
                self._disk.zero(prepared.start + at, length_bytes)

        return write

    def finish(self) -> None:
        pass


class _RawSink:
    """A raw file, where zeros stay holes; a device is made zero first."""

    def __init__(self, new: NewFile, settled: CreateOptions, size_bytes: int, sparse_bytes: int) -> None:
        self._storage = new.storage
        self.unit_bytes = sparse_bytes or 512
        self._sparse = bool(sparse_bytes)
        if not new.in_place:
            new.storage.truncate(size_bytes, "create.size")
        elif new.storage.size() < size_bytes:
            raise NoSpace(f"{new.path}: the device has {new.storage.size()} bytes, {size_bytes} are needed")
        else:
            new.storage.zero(0, size_bytes, "convert.zero")
        if settled.preallocation != "off":
            from cowfence.ops.create import write_empty

            write_empty(new.storage, settled)

    def prepare(self, start: int, data: memoryview) -> Prepared:
        runs = data_runs(data, self.unit_bytes) if self._sparse else [(0, len(data))]
        return Prepared(start, data, runs, [])

    def place(self, prepared: Prepared) -> Callable[[], None]:
        def write() -> None:
            for at, length_bytes in prepared.runs:
                self._storage.writev(prepared.start + at, (prepared.data[at : at + length_bytes],), "data.write")

        return write

    def finish(self) -> None:
        pass


class _QcowSink:
    """A qcow2 file. A cluster is a hole, or written whole, or as a stream if that is shorter."""

    def __init__(
        self,
        storage: Storage,
        data: Storage,
        wanted: NewImage,
        cipher: DataCipher | None,
        compression: str | None,
        *,
        sparse: bool,
    ) -> None:
        """``data``: where the guest's data goes, which may be another file than the image."""
        self._storage = data
        self._image = BulkImage(storage, wanted)
        self._bits = self._image.geometry.cluster_bits
        self.unit_bytes = self._image.geometry.cluster_bytes
        self._cipher = cipher
        self._compress = compressor(COMPRESSION_TYPES[compression]) if compression is not None else None
        # Version 2 has no zero clusters: there zeros over a backing file are data.
        self._over_backing = wanted.backing_name is not None
        self._sparse = sparse and not (self._over_backing and wanted.version < 3)

    def prepare(self, start: int, data: memoryview) -> Prepared:
        runs = data_runs(data, self.unit_bytes) if self._sparse else [(0, len(data))]
        zeros = gaps(runs, len(data)) if self._over_backing else []
        if self._compress is None:
            return Prepared(start, data, runs, [], zeros)
        plain: list[tuple[int, int]] = []
        streams: list[tuple[int, bytes]] = []
        for first, length_bytes in runs:
            for at in range(first, first + length_bytes, self.unit_bytes):
                cluster = bytes(data[at : at + self.unit_bytes]).ljust(self.unit_bytes, b"\0")
                stream = self._compress(cluster)
                if len(stream) < self.unit_bytes:
                    streams.append((start + at, stream))
                else:
                    plain.append((at, min(self.unit_bytes, len(data) - at)))
        return Prepared(start, data, plain, streams, zeros)

    def place(self, prepared: Prepared) -> Callable[[], None]:
        plain = []
        for at, length_bytes in prepared.runs:
            clusters = -(-length_bytes >> self._bits)
            plain.append((self._image.place_data(prepared.start + at >> self._bits, clusters), at, length_bytes))
        for at, length_bytes in prepared.zeros:
            self._image.place_zeros(prepared.start + at >> self._bits, -(-length_bytes >> self._bits))
        guests = [guest >> self._bits for guest, _ in prepared.streams]
        places = self._image.place_streams(guests, [len(stream) for _, stream in prepared.streams])

        def write() -> None:
            for host, at, length_bytes in plain:
                piece: Buffer = prepared.data[at : at + length_bytes]
                if self._cipher is not None:
                    piece = self._cipher.encrypt(bytes(piece), host, prepared.start + at)
                self._storage.writev(host, (piece,), "data.write")
            for run_at, buffers in _joined(places, [stream for _, stream in prepared.streams]):
                self._storage.writev(run_at, buffers, "data.write")

        return write

    def finish(self) -> None:
        self._image.finish()


def _joined(places: list[int], streams: list[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Streams that stand one behind the other, in one call. Each run goes on to the end of its last sector only if nobody's
    stream begins in there, so the file's end is left to ``truncate``."""
    start, end, buffers = 0, -1, list[bytes]()
    for place, stream in zip(places, streams, strict=True):
        if place != end:
            if buffers:
                yield start, buffers
            start, buffers = place, []
        buffers.append(stream)
        end = place + len(stream)
    if buffers:
        yield start, buffers


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


class _Work:
    """The pieces of a disk, on many threads."""

    def __init__(self, disk: Disk, how: How, progress: Progress | None, *, below_bytes: int | None = None) -> None:
        """``below_bytes``: the size of the target's backing file, which holds what the disk does not hold itself."""
        self._disk = disk
        self._how = how
        self._progress = progress
        self._below_bytes = below_bytes
        self._turn = threading.Condition()
        self._next = 0
        self._failed = False
        self._buffers = threading.local()
        self._paced = threading.Lock()
        self._due = time.monotonic()
        """When the next bytes may be written, where the rate is limited."""
        self.data_bytes = 0
        self._unreadable: list[tuple[int, str]] = []

    @property
    def unreadable(self) -> tuple[tuple[int, str], ...]:
        return tuple(sorted(self._unreadable))

    def run(self, sink: _Sink) -> None:
        threads = self._how.threads or min(16, max(2, os.cpu_count() or 1))
        in_order = self._how.in_order
        under_way: set[Future[tuple[int, int]]] = set()
        with ThreadPoolExecutor(threads, thread_name_prefix="cowfence-convert") as pool:
            try:
                for number, (start, length_bytes) in enumerate(self._pieces(sink.unit_bytes)):
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
        if self._progress is not None:
            self._progress(self._disk.size, self._disk.size)

    def _buffer(self, length_bytes: int) -> memoryview:
        """This thread's own, used again for each of its pieces: to have the kernel clear pages for each takes long."""
        held: memoryview | None = getattr(self._buffers, "held", None)
        if held is None or len(held) < length_bytes:
            held = self._buffers.held = np.empty(length_bytes, np.uint8).data
        return held[:length_bytes]

    def _read(self, start: int, buffer: memoryview) -> None:
        try:
            self._disk.read_into(start, buffer)
        except CowfenceError as error:
            if not self._how.salvage:
                raise
            self._salvage(start, buffer, str(error))

    def _salvage(self, start: int, buffer: memoryview, why: str) -> None:
        """Read what can be read, a few sectors at a time."""
        for at in range(0, len(buffer), DEFAULT_SPARSE_BYTES):
            part = buffer[at : at + DEFAULT_SPARSE_BYTES]
            try:
                self._disk.read_into(start + at, part)
            except CowfenceError:
                part[:] = bytes(len(part))
                self._unreadable.append((start + at, why))

    def _pace(self, length_bytes: int) -> None:
        """Wait until so many bytes more may be written."""
        rate = self._how.rate_bytes
        if not rate:
            return
        with self._paced:
            now = time.monotonic()
            begin = max(now, self._due)
            self._due = begin + length_bytes / rate
        time.sleep(begin - now)

    def _some_ended(self, under_way: set[Future[tuple[int, int]]]) -> set[Future[tuple[int, int]]]:
        done, left = wait(under_way, return_when=FIRST_COMPLETED)
        end = 0
        for future in done:
            data_bytes, reached = future.result()
            self.data_bytes += data_bytes
            end = max(end, reached)
        if self._progress is not None:
            self._progress(end, self._disk.size)
        return left

    def _piece(self, sink: _Sink, number: int, start: int, length_bytes: int, in_order: bool) -> tuple[int, int]:
        buffer = self._buffer(length_bytes)
        try:
            self._read(start, buffer)
            prepared = sink.prepare(start, buffer)
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
                    write = sink.place(prepared)
                finally:
                    self._next = number + 1
                    self._turn.notify_all()
        else:
            write = sink.place(prepared)
        self._pace(prepared.data_bytes)
        write()
        return sum(length for _, length in prepared.runs) + len(prepared.streams) * sink.unit_bytes, start + length_bytes

    def _pieces(self, unit_bytes: int) -> Iterator[tuple[int, int]]:
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
