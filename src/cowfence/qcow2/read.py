"""The read path: guest bytes from data clusters, compressed clusters, zeros and the backing file.

A read is planned under the lock and tried there with ``wait=False``: what the page cache holds is served at once. What is
cold, or long, is read outside the lock, under a ticket that keeps its host clusters from being reused before it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from cowfence.codec import decompressor
from cowfence.errors import Corrupt, WouldBlock
from cowfence.qcow2.entries import Compressed, decode_l2
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.mapping import GuestRun, RunKind, reads_zero, runs, subcluster_runs
from cowfence.qcow2.reader import Cold
from cowfence.qcow2.state import State
from cowfence.units import KIB, SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import DataCipher

_LONG_READ_BYTES = 64 * KIB


class Entrance(Protocol):
    """Raises where a plan must not begin: the image is closed, the range is outside, or ``wait`` is false and it would."""

    def __call__(self, offset: int, length_bytes: int, *, wait: bool = True) -> None: ...


class Reads:
    """Reads of one image."""

    def __init__(self, state: State, enter: Entrance) -> None:
        """``enter``: called under the lock, before each plan, with its range."""
        self._state = state
        self._enter = enter
        self._decompress = decompressor(state.header.compression_type)
        self._last: tuple[int, bytes] = (0, b"")
        """The compressed entry that was decompressed last, and its cluster: readers come back for the rest of it."""

    def read_into(self, offset: int, view: memoryview, *, wait: bool) -> None:
        """Fill ``view`` from a range inside the disk. Raises WouldBlock where ``wait`` is false and the host has to read."""
        state = self._state
        tries = 0
        while True:
            with state.lock:
                self._enter(offset, len(view), wait=wait)
                try:
                    plan = list(runs(state, offset, len(view), wait=tries > 2))
                    # What is long would only keep the others from the lock.
                    if not wait or len(view) < _LONG_READ_BYTES:
                        self.fill(plan, offset, view, wait=False)
                        return
                    warm: Callable[[], object] | None = None
                except Cold as cold:
                    warm = cold.warm
                except WouldBlock:
                    warm = None
                if not wait:
                    raise WouldBlock(f"{state.storage.name}: offset {offset} is not in memory")
                ticket = state.tickets.begin()
            try:
                if warm is None:
                    self.fill(plan, offset, view, wait=True)
                    return
                warm()
                tries += 1
            finally:
                state.reclaimer.end_ticket(ticket)

    def fill(self, plan: Iterable[GuestRun], start: int, view: memoryview, *, wait: bool) -> None:
        """Carry a plan out. Raises WouldBlock where ``wait`` is false."""
        state = self._state
        for kind, offset, length_bytes, host, entry in plan:
            part = view[offset - start : offset - start + length_bytes]
            if kind is RunKind.DATA:
                assert host is not None
                if state.cipher is not None:
                    self._deciphered(state.cipher, host, offset, part, wait=wait)
                    continue
                got = state.data.readv(host, (part,), wait=wait)
                if got < length_bytes:
                    self._past_end(host, got, part)
            elif kind is RunKind.COMPRESSED:
                cluster = self._cluster(entry, wait=wait)
                within = offset & state.geometry.cluster_mask
                part[:] = cluster[within : within + length_bytes]
            elif kind is RunKind.UNALLOCATED and offset < state.backing_bytes:
                self._backing(offset, part, wait=wait)
            else:
                part[:] = bytes(length_bytes)

    def _deciphered(self, cipher: DataCipher, host: int, offset: int, part: memoryview, *, wait: bool) -> None:
        """Guest bytes, out of the whole sectors that hold them."""
        lead = host % SECTOR_BYTES
        buffer = bytearray(align_up(lead + len(part), SECTOR_BYTES))
        got = self._state.data.readv(host - lead, (buffer,), wait=wait)
        if got < len(buffer):
            self._past_end(host - lead, got, memoryview(buffer))
        part[:] = cipher.decrypt(buffer, host - lead, offset - lead)[lead : lead + len(part)]

    def _past_end(self, host: int, got: int, part: memoryview) -> None:
        """The last cluster of a file may be short; one that begins past its end is damage."""
        state = self._state
        if state.geometry.external_data:
            # Nothing was ever written there.
            part[got:] = bytes(len(part) - got)
            return
        cluster = host & ~state.geometry.cluster_mask
        if not got and cluster >= state.storage.size():
            raise Corrupt(f"{state.storage.name}: data cluster at offset {cluster:#x}", "it lies past the end of the file")
        if got < len(part):
            end = host + got
            cluster = end & ~state.geometry.cluster_mask
            first_missing = cluster + state.geometry.cluster_bytes if end > cluster else cluster
            if host + len(part) > first_missing and first_missing >= state.storage.size():
                raise Corrupt(
                    f"{state.storage.name}: data cluster at offset {first_missing:#x}", "it lies past the end of the file"
                )
            part[got:] = bytes(len(part) - got)

    def _backing(self, offset: int, part: memoryview, *, wait: bool) -> None:
        state = self._state
        assert state.backing is not None
        inside = min(len(part), state.backing_bytes - offset)
        state.backing.read_into(offset, part[:inside], wait=wait)
        if inside < len(part):
            part[inside:] = bytes(len(part) - inside)

    def _cluster(self, entry: int, *, wait: bool) -> bytes:
        last_entry, last = self._last
        if last_entry == entry:
            return last
        if not wait:
            # Inflating a cluster takes as long as twenty plain reads: not while others wait for the lock.
            raise WouldBlock(f"{self._state.storage.name}: a compressed cluster")
        cluster = self._inflate(entry, wait=True)
        self._last = (entry, cluster)
        return cluster

    def _inflate(self, entry: int, *, wait: bool) -> bytes:
        state = self._state
        mapping = decode_l2(entry, state.geometry)
        assert isinstance(mapping, Compressed)
        where = f"{state.storage.name}: compressed cluster at offset {mapping.host_offset:#x}"
        data = bytearray(mapping.length_bytes)
        got = state.storage.readv(mapping.host_offset, (data,), wait=wait)
        if not got:
            raise Corrupt(where, "it lies past the end of the file")
        try:
            return self._decompress(memoryview(data)[:got], state.geometry.cluster_bytes)
        except ValueError as bad:
            raise Corrupt(where, str(bad)) from None

    def forget(self) -> None:
        """Clusters become available again, and no ticket is older: what was remembered of them is void."""
        self._last = (0, b"")

    def source(self, kind: RunKind, entry: int, offset: int, length_bytes: int, *, wait: bool) -> bytes | bytearray | None:
        """What a copy-on-write keeps: guest bytes under the entry, None where they are zeros.

        Call it under the lock. Raises Cold where ``wait`` is false and the host has to read.
        """
        state = self._state
        if kind is RunKind.ZERO or (kind is RunKind.UNALLOCATED and offset >= state.backing_bytes):
            return None
        within = offset & state.geometry.cluster_mask
        plan = self._plan_of(kind, entry, offset, length_bytes)
        if kind is RunKind.SUBCLUSTERED and all(reads_zero(state, run) for run in plan):
            return None
        try:
            if kind is RunKind.COMPRESSED:
                last_entry, last = self._last
                cluster = last if last_entry == entry else self._inflate(entry, wait=wait)
                return cluster[within : within + length_bytes]
            buffer = bytearray(length_bytes)
            self.fill(plan, offset, memoryview(buffer), wait=wait)
        except WouldBlock:
            raise Cold(lambda: self._warm(kind, entry, offset, length_bytes)) from None
        return buffer

    def _plan_of(self, kind: RunKind, entry: int, offset: int, length_bytes: int) -> list[GuestRun]:
        """The runs of a part of the cluster that ``entry`` leads to."""
        geometry = self._state.geometry
        if kind is RunKind.SUBCLUSTERED:
            return list(subcluster_runs(geometry, entry, entry & OFFSET_MASK, offset, offset + length_bytes))
        host = (entry & OFFSET_MASK) + (offset & geometry.cluster_mask) if kind is RunKind.DATA else None
        return [GuestRun(kind, offset, length_bytes, host, entry)]

    def _warm(self, kind: RunKind, entry: int, offset: int, length_bytes: int) -> None:
        """Bring the bytes of a source into the page cache. Holds no ticket: what it reads is thrown away."""
        if kind is not RunKind.COMPRESSED:
            plan = self._plan_of(kind, entry, offset, length_bytes)
            self.fill(plan, offset, memoryview(bytearray(length_bytes)), wait=True)
            return
        mapping = decode_l2(entry, self._state.geometry)
        assert isinstance(mapping, Compressed)
        self._state.storage.readv(mapping.host_offset, (bytearray(mapping.length_bytes),))


def unfilled(length_bytes: int) -> bytearray | memoryview:
    """A buffer that a read is about to fill. A long one is not cleared first: that would cost a quarter of the read."""
    if length_bytes < _LONG_READ_BYTES:
        return bytearray(length_bytes)
    import numpy as np

    return np.empty(length_bytes, np.uint8).data
