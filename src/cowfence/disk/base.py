"""The ``Disk`` protocol: what a guest sees. "Flush" is the guest's word; hosts have fences (see ``cowfence.storage``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple, Protocol, TypeAlias

from cowfence.errors import CowfenceError
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, WritableBuffer


class Verb(IntEnum):
    """What a request of a batch asks for."""

    READ = 0
    WRITE = 1
    ZERO = 2
    DISCARD = 3
    FLUSH = 4


class Request(NamedTuple):
    """One request of a batch. ``data`` is for WRITE only, whose ``length_bytes`` is that of the data. It may be a memoryview of
    larger items, see ``in_bytes``.

    ``fua``: the request is flushed before it is answered. ``unmap``: a ZERO may give the space back (false: keep it).
    """

    verb: Verb
    offset: int = 0
    length_bytes: int = 0
    data: Buffer = b""
    fua: bool = False
    unmap: bool = True


class Blocked:
    """The outcome of a request that would have had to wait; nothing of it was done. Submit it again with ``wait=True``."""

    def __repr__(self) -> str:
        return "BLOCKED"


BLOCKED: Final = Blocked()

Outcome: TypeAlias = Buffer | CowfenceError | Blocked | None
"""READ: its bytes. Others: None when done. Either: the error, or BLOCKED."""


def as_outcome(error: CowfenceError) -> CowfenceError:
    """``error`` as a value: without tracebacks, which would keep the buffers of each call that failed until it is answered."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def in_bytes(data: Buffer) -> Buffer:
    """``data`` with a length in bytes: a memoryview counts its items, or its rows, and the host writes all of their bytes."""
    return data.cast("B") if type(data) is memoryview and data.nbytes != len(data) else data


def overlaps(one: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    """Whether a range (offset, end) has bytes in common with any of the others."""
    return any(start < one[1] and one[0] < end for start, end in others)


def range_of(request: Request) -> tuple[int, int]:
    """The offset and the end of a request."""
    length_bytes = len(in_bytes(request.data)) if request.verb is Verb.WRITE else request.length_bytes
    return request.offset, request.offset + length_bytes


class Disk(Protocol):
    """A guest's disk: bytes from 0 to ``size``. Thread-safe. All offsets and lengths in bytes.

    Errors: ``OutOfRange`` for a range past the end, ``ReadOnly``, ``NoSpace``, ``Corrupt``, ``StorageFailed``, ``Closed``.
    """

    @property
    def size(self) -> int: ...

    @property
    def writable(self) -> bool: ...

    @property
    def block_bytes(self) -> int:
        """The unit in which the disk allocates (a hint for clients; any offset and length works)."""
        ...

    def read_into(self, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
        """Fill ``buffer`` from ``offset``. With ``wait=False`` raises ``WouldBlock`` where the host would have to read."""
        ...

    def read(self, offset: int, length_bytes: int) -> bytes: ...

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is flushed when the call returns."""
        ...

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:
        """Make the range read as zeros; ``unmap`` gives its space back where the format can."""
        ...

    def discard(self, offset: int, length_bytes: int) -> None:
        """Tell that the range is no longer needed: afterwards it reads as before or as zeros."""
        ...

    def flush(self) -> None:
        """Everything acknowledged before this call survives a power cut once it returns."""
        ...

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        """The states of the range, in order and without gaps."""
        ...

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        """Carry out a batch; one outcome for each request, in order. Requests of one batch may take effect in any order.

        With ``wait=False`` every request that would have to wait for the host is left undone and answered ``BLOCKED``.
        """
        ...

    def close(self) -> None:
        """Flush and release. May be called again."""
        ...


def carry_out(disk: Disk, request: Request) -> None:
    """A WRITE, ZERO or DISCARD by the call of its name. Raises what that raises."""
    verb, offset, length_bytes, data, fua, unmap = request
    if verb is Verb.WRITE:
        disk.write(offset, data, fua=fua)
    elif verb is Verb.ZERO:
        disk.zero(offset, length_bytes, unmap=unmap, fua=fua)
    else:
        disk.discard(offset, length_bytes)
        if fua:
            disk.flush()
