"""Reading an image that comes once, from its start to its end: out of a pipe.

Every table that has arrived tells where others, or data, will stand. What is known to be wanted is handed on as it passes; what
nobody has asked for when it passes is kept aside, because a table that comes later may lead to it. An image whose tables stand
before their data (what ``convert`` writes into a pipe, and what qemu-img makes of a disk) needs nothing kept, or, compressed,
the clusters that are not full of streams; one whose tables come last is kept as a whole, up to a limit.

Only the disk is read: snapshots and bitmaps pass by. Memory: 16 MiB of what is kept (the rest goes into a file without a name),
the tables that data is still expected for, and the L1 table.
"""

from __future__ import annotations

import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from heapq import heappop, heappush, heapreplace
from typing import Final, NamedTuple

import numpy as np

from cowfence.errors import Corrupt, Invalid, Unsupported, from_os_error
from cowfence.qcow2.census import Words
from cowfence.qcow2.entries import BadEntry, Compressed, Data, Mapping, Subclustered, decode_l1, decode_l2
from cowfence.qcow2.geometry import OFFSET_MASK, SUBCLUSTERS
from cowfence.qcow2.header import check_bounds, check_overlaps, check_supported, cluster_bytes_of, parse_header
from cowfence.qcow2.tables import Kind, Table
from cowfence.units import GIB, MIB

DEFAULT_SPOOL_BYTES: Final = GIB
_SPOOL_IN_MEMORY_BYTES: Final = 16 * MIB
_READ_BYTES: Final = MIB
_NO_END: Final = 1 << 62


class Arrived(NamedTuple):
    """A guest cluster, as the file has it: ``data`` are the bytes that ``mapping`` leads to."""

    guest_offset: int
    mapping: Mapping
    data: bytes


class _Job(NamedTuple):
    """Bytes of the file that are waited for. ``number``: of the guest cluster, or of the L1 entry of an L2 table."""

    start: int
    length_bytes: int
    kind: Kind | None
    number: int
    mapping: Mapping | None


class ImageStream:
    """The image that ``read`` gives: up to so many bytes of what comes next, empty at the end."""

    def __init__(self, read: Callable[[int], bytes], name: str, *, spool_bytes: int = DEFAULT_SPOOL_BYTES) -> None:
        """Reads the header. ``spool_bytes``: so much may be kept aside.

        Raises NotThisFormat, Corrupt, and Unsupported: a backing file, an external data file, encryption.
        """
        self.name = name
        self._read = read
        self._window = bytearray()
        """The bytes of the file from ``_base`` to ``_end``, the part that has arrived and not been let go."""
        self._base = 0
        self._ended = False
        self._fill(72)
        self._fill(cluster_bytes_of(bytes(self._window), name))
        self.header = parse_header(bytes(self._window), name)
        check_supported(self.header, name)
        check_bounds(self.header, _NO_END, name)
        check_overlaps(self.header, name)
        for wrong, what in (
            (self.header.backing_name is not None, "a backing file"),
            (self.header.geometry.external_data, "an external data file"),
            (self.header.crypt_method != 0, "encryption"),
        ):
            if wrong:
                raise Unsupported(name, f"{what} of an image that comes through a pipe")
        self.geometry = self.header.geometry
        self._spool = _Spool(self.geometry.cluster_bytes, spool_bytes, name)
        self._jobs: list[tuple[int, int, _Job, Iterator[_Job]]] = []
        self._number = 0
        self._taken: list[tuple[int, int]] = []
        """Ranges of the window that were handed on."""
        self._owned: set[int] = set()
        """Clusters of the window that one entry leads to, and no other may."""
        self._blocks: Words = np.empty(0, np.uint64)
        """Clusters of the refcount blocks, in order: nobody wants them."""

    @property
    def _end(self) -> int:
        return self._base + len(self._window)

    def clusters(self) -> Iterator[Arrived]:
        """The guest's clusters that are not zeros, in the order in which they arrive. Raises Corrupt, and Invalid where more
        would have to be kept than is allowed."""
        header = self.header
        table_bytes = header.refcount_table_clusters * self.geometry.cluster_bytes
        self._expect(iter([_Job(header.refcount_table_offset, table_bytes, Kind.REFCOUNT_TABLE, 0, None)]))
        if header.l1_entries:
            self._expect(iter([_Job(header.l1_offset, header.l1_entries * 8, Kind.L1, 0, None)]))
        while True:
            while self._jobs and (self._ended or self._jobs[0][2].start + self._jobs[0][2].length_bytes <= self._end):
                job = self._next_job()
                data = self._bytes(job)
                if job.kind is Kind.REFCOUNT_TABLE:
                    self._blocks = self._blocks_of(data)
                elif job.kind is Kind.L1:
                    self._expect(self._jobs_of_l1(data))
                elif job.kind is Kind.L2:
                    self._expect(self._jobs_of_l2(job.number, data))
                elif job.mapping is not None:
                    yield Arrived(job.number << self.geometry.cluster_bits, job.mapping, data)
            if self._ended:
                return
            self._let_go()
            self._fill(len(self._window) + _READ_BYTES)

    def _fill(self, length_bytes: int) -> None:
        """Read until the window has so many bytes, or the file ends."""
        while len(self._window) < length_bytes and not self._ended:
            data = self._read(length_bytes - len(self._window))
            self._window += data
            self._ended = not data

    def _let_go(self) -> None:
        """What nobody waits for leaves the window; what nobody has taken is kept aside."""
        wanted = min(self._jobs[0][2].start, self._end) if self._jobs else self._end
        bits = self.geometry.cluster_bits
        until = wanted >> bits << bits
        if until <= self._base:
            return
        self._taken.sort()
        for cluster in range(self._base >> bits, until >> bits):
            if not self._is_taken(cluster):
                start = (cluster << bits) - self._base
                self._spool.put(cluster, self._window[start : start + self.geometry.cluster_bytes])
        del self._window[: until - self._base]
        self._base = until
        self._taken = [(start, end) for start, end in self._taken if end > until]
        self._owned = {cluster for cluster in self._owned if cluster >= until >> bits}

    def _is_taken(self, cluster: int) -> bool:
        at = int(np.searchsorted(self._blocks, np.uint64(cluster)))
        # An L1 table need not fill its last cluster.
        if not cluster or cluster in self._owned or (at < len(self._blocks) and self._blocks[at] == cluster):
            return True
        start = cluster << self.geometry.cluster_bits
        end = start + self.geometry.cluster_bytes
        for first, last in self._taken:
            if first <= start < last:
                start = last
        return start >= end

    def _expect(self, jobs: Iterator[_Job]) -> None:
        """``jobs``: in the order of their starts. Only the first of them is held."""
        job = next(jobs, None)
        if job is not None:
            self._number += 1
            heappush(self._jobs, (job.start, self._number, job, jobs))

    def _next_job(self) -> _Job:
        _, number, job, following = self._jobs[0]
        later = next(following, None)
        if later is None:
            heappop(self._jobs)
        else:
            heapreplace(self._jobs, (later.start, number, later, following))
        return job

    def _bytes(self, job: _Job) -> bytes:
        """The bytes of a job, out of the window or out of what was kept. At the end of the file the last cluster may be
        short. Raises Corrupt where others lead there, too, or nothing is there."""
        start, end = job.start, job.start + job.length_bytes
        shared = isinstance(job.mapping, Compressed)
        if start >= self._base:
            data = bytes(self._window[start - self._base : end - self._base])
            if not shared:
                self._own(job, start, end)
            if self._taken and self._taken[-1][0] <= start <= self._taken[-1][1]:
                self._taken[-1] = (self._taken[-1][0], max(end, self._taken[-1][1]))
            else:
                self._taken.append((start, end))
        else:
            data = self._kept(job, start, end, shared=shared)
        if not data:
            raise self._corrupt(job, "it lies past the end of the file")
        return data if job.kind is None else data.ljust(job.length_bytes, b"\0")

    def _own(self, job: _Job, start: int, end: int) -> None:
        clusters = set(range(start >> self.geometry.cluster_bits, (end - 1 >> self.geometry.cluster_bits) + 1))
        if clusters & self._owned or 0 in clusters:
            raise self._corrupt(job, "another table or entry leads there, too")
        self._owned |= clusters

    def _kept(self, job: _Job, start: int, end: int, *, shared: bool) -> bytes:
        bits = self.geometry.cluster_bits
        parts = bytearray()
        for cluster in range(start >> bits, (min(end, self._base) - 1 >> bits) + 1):
            found = self._spool.get(cluster, keep=shared)
            if found is None:
                raise self._corrupt(job, "another table or entry leads there, too")
            parts += found
        if end > self._base:
            parts += self._window[: end - self._base]
        within = start - (start >> bits << bits)
        return bytes(parts[within : within + end - start])

    def _blocks_of(self, data: bytes) -> Words:
        words = np.frombuffer(data, ">u8").astype(np.uint64)
        blocks: Words = np.sort(words[words != 0]) >> np.uint64(self.geometry.cluster_bits)
        return blocks

    def _jobs_of_l1(self, data: bytes) -> Iterator[_Job]:
        """The L2 tables, in the order in which they stand in the file."""
        words = np.frombuffer(data, ">u8").astype(np.uint64)
        used = np.flatnonzero(words)
        offsets = words[used] & np.uint64(OFFSET_MASK)
        # A table of 32 MiB may come from anybody: its entries stay in arrays until their turn comes.
        for index in used[np.argsort(offsets, kind="stable")]:
            try:
                found = decode_l1(int(words[index]), self.geometry)
            except BadEntry as bad:
                raise Corrupt(f"{self.name}: L1[{int(index)}]", str(bad)) from None
            if found.host_offset is not None:
                yield _Job(found.host_offset, self.geometry.cluster_bytes, Kind.L2, int(index), None)

    def _jobs_of_l2(self, l1_index: int, data: bytes) -> Iterator[_Job]:
        """The data of a table, in the order in which it stands in the file."""
        geometry = self.geometry
        table = Table.from_bytes(Kind.L2, l1_index, 0, bytearray(data), words=geometry.l2_entry_words)
        first = l1_index << geometry.l2_bits
        clusters = geometry.clusters_for(self.header.size_bytes)
        placed = array("Q"), array("I")
        for index in range(min(geometry.l2_entries, clusters - first)):
            mapping = self._mapping(table, l1_index, index)
            start = _start_of(mapping)
            if start is not None:
                placed[0].append(start)
                placed[1].append(index)
        for at in sorted(range(len(placed[0])), key=placed[0].__getitem__):
            index = placed[1][at]
            mapping = self._mapping(table, l1_index, index)
            length_bytes = mapping.length_bytes if isinstance(mapping, Compressed) else geometry.cluster_bytes
            yield _Job(placed[0][at], length_bytes, None, first + index, mapping)

    def _mapping(self, table: Table, l1_index: int, index: int) -> Mapping:
        try:
            return decode_l2(table.entry(index), self.geometry)
        except BadEntry as bad:
            raise Corrupt(f"{self.name}: L2[{l1_index}][{index}]", str(bad)) from None

    def _corrupt(self, job: _Job, what: str) -> Corrupt:
        kind = "data cluster" if job.kind is None else job.kind.value
        return Corrupt(f"{self.name}: {kind} at offset {job.start:#x}", what)


def _start_of(mapping: Mapping) -> int | None:
    """Where the data of a guest cluster stands; None where there is none."""
    if isinstance(mapping, Data | Compressed):
        return mapping.host_offset
    if isinstance(mapping, Subclustered) and mapping.allocated:
        return mapping.host_offset
    return None


def content_of(arrived: Arrived, cluster_bytes: int, decompress: Callable[[bytes, int], bytes], name: str) -> bytes:
    """What the guest reads in a cluster that has arrived. Raises Corrupt for a stream that cannot be decompressed."""
    mapping, data = arrived.mapping, arrived.data
    if isinstance(mapping, Compressed):
        try:
            return decompress(data, cluster_bytes)
        except ValueError as bad:
            raise Corrupt(f"{name}: compressed cluster at offset {mapping.host_offset:#x}", str(bad)) from None
    whole = data.ljust(cluster_bytes, b"\0")
    if not isinstance(mapping, Subclustered):
        return whole
    part_bytes = cluster_bytes // SUBCLUSTERS
    return b"".join(
        whole[number * part_bytes : (number + 1) * part_bytes] if mapping.allocated >> number & 1 else bytes(part_bytes)
        for number in range(SUBCLUSTERS)
    )


class _Spool:
    """Clusters that are kept aside, in the order of their numbers."""

    def __init__(self, cluster_bytes: int, limit_bytes: int, name: str) -> None:
        self._cluster_bytes = cluster_bytes
        self._limit_bytes = limit_bytes
        self._name = name
        self._clusters = array("Q")
        self._gone: set[int] = set()
        self._file = tempfile.SpooledTemporaryFile(_SPOOL_IN_MEMORY_BYTES)  # noqa: SIM115 (closed with the stream)

    def put(self, cluster: int, data: bytes | bytearray) -> None:
        if (len(self._clusters) + 1) * self._cluster_bytes > self._limit_bytes:
            raise Invalid(
                f"{self._name}: its tables come after its data, and more than {self._limit_bytes} bytes of it would have to be "
                "kept; allow more, or convert it from a file"
            )
        try:
            self._file.seek(len(self._clusters) * self._cluster_bytes)
            self._file.write(bytes(data).ljust(self._cluster_bytes, b"\0"))
        except OSError as error:
            raise from_os_error("temporary file", "write", len(self._clusters) * self._cluster_bytes, error) from error
        self._clusters.append(cluster)

    def get(self, cluster: int, *, keep: bool) -> bytes | None:
        """A cluster; None if it was not put here, or was taken before without ``keep``."""
        at = bisect_left(self._clusters, cluster)
        if at == len(self._clusters) or self._clusters[at] != cluster or cluster in self._gone:
            return None
        if not keep:
            self._gone.add(cluster)
        self._file.seek(at * self._cluster_bytes)
        return self._file.read(self._cluster_bytes)
