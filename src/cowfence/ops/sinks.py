"""What a conversion writes into: an existing disk, a raw file, a new qcow2 image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cowfence.codec import compressor
from cowfence.disk.base import Disk
from cowfence.ops.create import COMPRESSION_TYPES, CreateOptions, new_image
from cowfence.ops.pieces import How, Prepared, data_runs, gaps
from cowfence.qcow2.bulk import BulkImage, Target
from cowfence.qcow2.create import NewImage
from cowfence.storage.base import Buffer
from cowfence.units import SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import DataCipher


class DiskSink:
    """An existing disk."""

    ordered = serial = False

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

    def finish(self, size_bytes: int) -> None:
        pass


class RawSink:
    """A raw file, where zeros stay holes, or a pipe."""

    ordered = False

    def __init__(self, target: Target, how: How, *, serial: bool = False, fixed: bool = False) -> None:
        """``fixed``: its length is not ours to set."""
        self._target = target
        self._fixed = fixed
        self.serial = serial
        self.unit_bytes = how.sparse_bytes or 512
        self._sparse = bool(how.sparse_bytes)

    def prepare(self, start: int, data: memoryview) -> Prepared:
        runs = data_runs(data, self.unit_bytes) if self._sparse else [(0, len(data))]
        return Prepared(start, data, runs, [])

    def place(self, prepared: Prepared) -> Callable[[], None]:
        def write() -> None:
            for at, length_bytes in prepared.runs:
                self._target.writev(prepared.start + at, (prepared.data[at : at + length_bytes],), "data.write")

        return write

    def finish(self, size_bytes: int) -> None:
        if not self._fixed:
            self._target.truncate(size_bytes, "create.size")


class QcowSink:
    """A qcow2 file. A cluster is a hole, or written whole, or as a stream if that is shorter."""

    ordered = True

    def __init__(
        self, target: Target, settled: CreateOptions, how: How, *, data: Target | None = None, head: QcowSink | None = None
    ) -> None:
        """``data``: where the guest's data goes, if that is another file. ``head``: of a first pass, whose head is written;
        this is the second, in the order of the offsets."""
        wanted: NewImage = new_image(settled) if head is None else head._wanted
        self._wanted: NewImage = wanted
        self._settled = settled
        self._data = target if data is None else data
        self.image: BulkImage = BulkImage(target, wanted, head=None if head is None else head.image)
        self.serial = head is not None
        self._bits = self.image.geometry.cluster_bits
        self.unit_bytes = self.image.geometry.cluster_bytes
        self._cipher = self._new_cipher(target.name)
        self._compress = compressor(COMPRESSION_TYPES[settled.compression_type], how.effort) if how.compress else None
        # Version 2 has no zero clusters: there zeros over a backing file are data.
        self._over_backing = wanted.backing_name is not None
        self._sparse = bool(how.sparse_bytes) and not (self._over_backing and wanted.version < 3)

    def _new_cipher(self, name: str) -> DataCipher | None:
        if self._wanted.luks_area is None or self._settled.secret is None:
            return None
        from cowfence.qcow2.encryption import new_cipher

        return new_cipher(self._wanted.luks_area, self._settled.secret, name)

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
            plain.append((self.image.place_data(prepared.start + at >> self._bits, clusters), at, length_bytes))
        for at, length_bytes in prepared.zeros:
            self.image.place_zeros(prepared.start + at >> self._bits, -(-length_bytes >> self._bits))
        guests = [guest >> self._bits for guest, _ in prepared.streams]
        places = self.image.place_streams(guests, [len(stream) for _, stream in prepared.streams])

        def write() -> None:
            for host, at, length_bytes in plain:
                piece: Buffer = prepared.data[at : at + length_bytes]
                if self._cipher is not None:
                    piece = self._cipher.encrypt(bytes(piece), host, prepared.start + at)
                self._data.writev(host, (piece,), "data.write")
            for run_at, buffers in _joined(places, [stream for _, stream in prepared.streams]):
                self._data.writev(run_at, buffers, "data.write")

        return write

    def finish(self, size_bytes: int) -> None:
        if not self.serial:
            self.image.finish(align_up(size_bytes, SECTOR_BYTES))


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
