"""``RawDisk``: a disk whose bytes are those of a storage, one to one.

On disk nothing is added: guest offset = host offset. The disk may be given a size larger than the file, whose missing end
then reads as zeros. Writes go to the host at once, so there is nothing to keep in order; a flush is one fence, and none
where nothing was written since the last one.

Flushing and writing may run at once. ``_dirty`` is set after a write has reached the host and cleared before the fence
begins: a write that a flush must cover has set it before the flush was called, and one that sets it during the fence is
covered by the next. The flush lock makes a second flush wait for the fence that carries its writes.

After a failed fence the host has forgotten which pages were lost (known trap 9), so the disk is read-only from then on and
every later flush fails too.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from cowfence.disk.base import BLOCKED, Outcome, Request, Verb, as_outcome, carry_out, in_bytes
from cowfence.disk.fileview import as_file
from cowfence.errors import Closed, Corrupt, CowfenceError, Invalid, OutOfRange, ReadOnly, WouldBlock
from cowfence.extents import Extent, merge
from cowfence.storage.base import Buffer, Storage, WritableBuffer
from cowfence.units import KIB, MIB

_READ: Final = Verb.READ
_WRITE: Final = Verb.WRITE


class RawDisk:
    """``Disk`` over a storage, which it owns and closes. ``size_bytes``: the disk's size, by default that of the file.

    Raises ``Invalid`` for a negative size.
    """

    block_bytes = 4096

    def __init__(self, storage: Storage, size_bytes: int | None = None) -> None:
        if size_bytes is not None and size_bytes < 0:
            raise Invalid(f"{storage.name}: a disk of {size_bytes} bytes")
        self._as_long_as_file = size_bytes is None
        self.size = storage.size() if size_bytes is None else size_bytes
        self._storage = storage
        self._pid = os.getpid()
        self._flush_lock = threading.Lock()
        self._dirty = False
        self._failed_fence: CowfenceError | None = None
        self._closed = False

    def __enter__(self) -> RawDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def as_file(self, buffering: int = 64 * KIB) -> io.BufferedRandom | io.BufferedReader:
        """The disk as a buffered binary file; see ``disk.fileview``. Closing it flushes the disk and leaves it open."""
        return as_file(self, buffering)

    @property
    def storage(self) -> Storage:
        return self._storage

    @property
    def name(self) -> str:
        """The file's, for messages."""
        return self._storage.name

    @property
    def writable(self) -> bool:
        return self._storage.writable and self._failed_fence is None

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        self._check_open()
        buffer = memoryview(buffer).cast("B")
        self._check_range(offset, len(buffer))
        got = self._storage.readv(offset, (buffer,), wait=wait)
        if got < len(buffer):
            self._check_length()
            buffer[got:] = bytes(len(buffer) - got)

    def locate(self, offset: int, length_bytes: int) -> int | None:
        """Where a range stands in the file: at its own offset, where that lies inside."""
        return offset if 0 <= offset <= self._storage.size() - length_bytes else None

    def read(self, offset: int, length_bytes: int) -> bytes:
        self._check_range(offset, length_bytes)
        buffer = bytearray(length_bytes)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        data = in_bytes(data)
        self._begin_write(offset, len(data))
        self._storage.writev(offset, (data,), "data.write")
        self._end_write(fua=fua)

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        self._begin_write(offset, length_bytes)
        storage = self._storage
        if unmap and self._holes_read_zero():
            # A discard may do less than asked, so whatever has not become a hole is then zeroed in place.
            storage.discard(offset, length_bytes, "data.zero")
            for extent in list(storage.extents(offset, length_bytes)):
                if not extent.zero:
                    storage.zero(extent.start, extent.length_bytes, "data.zero")
        else:
            storage.zero(offset, length_bytes, "data.zero")
        self._end_write(fua=fua)

    def discard(self, offset: int, length_bytes: int) -> None:
        """See ``Disk.discard``. Does nothing where the storage could leave bytes that were never the guest's."""
        self._begin_write(offset, length_bytes)
        if self._holes_read_zero():
            self._storage.discard(offset, length_bytes, "data.discard")
            self._end_write(fua=False)

    def flush(self) -> None:
        self._check_open()
        with self._flush_lock:
            if self._failed_fence is not None:
                raise self._read_only()
            if not self._dirty:
                return
            self._dirty = False
            try:
                self._storage.fence("flush.fence")
            except CowfenceError as error:
                self._failed_fence = error
                raise

    def resize(
        self,
        size_bytes: int,
        *,
        reserve: bool = False,
        fill: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Give the disk another size, durably: that of its file. ``reserve``: take the host's space for what is new; ``fill``:
        and write it, zeros; ``progress`` is told the fraction that is done. Not while others use the disk.

        Raises ReadOnly, NoSpace, Unsupported (a block device, whose length is fixed), StorageFailed.
        """
        self._begin_write(0, 0)
        storage, old_bytes = self._storage, self.size
        if fill:
            for at in range(old_bytes, size_bytes, MIB):
                storage.writev(at, (bytes(min(MIB, size_bytes - at)),), "resize.fill")
                if progress is not None:
                    progress((at - old_bytes) / (size_bytes - old_bytes))
        elif reserve and size_bytes > old_bytes:
            storage.zero(old_bytes, size_bytes - old_bytes, "resize.fill")
        storage.truncate(size_bytes, "resize.size")
        self.size = size_bytes
        self._end_write(fua=True)

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        self._check_open()
        self._check_range(offset, length_bytes)
        return merge(self._extents(offset, length_bytes))

    def _extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        position, end = offset, offset + length_bytes
        for extent in self._storage.extents(offset, length_bytes):
            yield extent
            position = extent.end
        if position < end:
            self._check_length()
            yield Extent(position, end - position, zero=True, data=False, present=False)

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        self._check_open()
        outcomes: list[Outcome] = []
        add, size, readv, writev = outcomes.append, self.size, self._storage.readv, self._storage.writev
        writable = self.writable
        for verb, offset, length_bytes, data, fua, unmap in requests:
            try:
                if verb is _READ:
                    if offset < 0 or length_bytes < 0 or offset + length_bytes > size:
                        raise OutOfRange(offset, length_bytes, size)
                    # New, so zero where the file ends early.
                    buffer = bytearray(length_bytes)
                    if readv(offset, (buffer,), wait=wait) < length_bytes:
                        self._check_length()
                    add(buffer)
                elif verb is _WRITE and not fua and writable and 0 <= offset <= size - len(data := in_bytes(data)):
                    writev(offset, (data,), "data.write")
                    self._dirty = True
                    add(None)
                else:
                    add(self._submit_slow(Request(verb, offset, length_bytes, data, fua, unmap), wait))
            except WouldBlock:
                add(BLOCKED)
            except CowfenceError as error:
                add(as_outcome(error))
        return outcomes

    def _submit_slow(self, request: Request, wait: bool) -> Outcome:
        """What has to wait for the host in general: fences, and calls that change a file's allocation."""
        verb, offset, length_bytes, data, _, _ = request
        if verb is Verb.FLUSH:
            if not wait and self._must_wait_to_flush():
                return BLOCKED
            self.flush()
            return None
        self._begin_write(offset, len(in_bytes(data)) if verb is _WRITE else length_bytes)
        if not wait:
            return BLOCKED
        carry_out(self, request)
        return None

    def close(self) -> None:
        if self._closed:
            return
        if os.getpid() != self._pid:
            self._closed = True
            return
        try:
            if self._storage.writable and self._failed_fence is None:
                self.flush()
        finally:
            self._closed = True
            self._storage.close()

    def _must_wait_to_flush(self) -> bool:
        if not self._flush_lock.acquire(blocking=False):
            return True
        self._flush_lock.release()
        return self._dirty

    def _holes_read_zero(self) -> bool:
        capabilities = self._storage.capabilities()
        return capabilities.punches_holes and capabilities.holes_past_end

    def _check_length(self) -> None:
        """Raises Corrupt where the file has lost what was its end when it was opened: no zeros are made up for that."""
        size_bytes = self._storage.size()
        if self._as_long_as_file and size_bytes < self.size:
            raise Corrupt(self.name, f"the file has been cut off at {size_bytes} bytes; the disk has {self.size}")

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self._storage.name}: the disk is closed")
        if os.getpid() != self._pid:
            raise Closed(f"{self._storage.name}: the disk was opened by another process")

    def _check_range(self, offset: int, length_bytes: int) -> None:
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise OutOfRange(offset, length_bytes, self.size)

    def _begin_write(self, offset: int, length_bytes: int) -> None:
        self._check_open()
        if not self.writable:
            raise self._read_only()
        self._check_range(offset, length_bytes)

    def _end_write(self, *, fua: bool) -> None:
        self._dirty = True
        if fua:
            self.flush()

    def _read_only(self) -> ReadOnly:
        if self._failed_fence is not None:
            return ReadOnly(f"{self._storage.name}: read-only since a fence failed: {self._failed_fence}")
        return ReadOnly(f"{self._storage.name}: opened read-only")
