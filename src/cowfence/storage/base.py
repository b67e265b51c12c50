"""The ``Storage`` protocol: bytes at offsets, and the one durable verb, ``fence``.

Offsets are arguments; there is no position. ``mark`` names the step of the transaction that a call belongs to (such as
``data.write`` or ``l2.link``): the recorder writes it into its log, the fault injector and the crash explorer select by it.

Errors of every implementation: ``NoSpace`` and ``StorageFailed`` (see ``cowfence.errors``), never a bare OSError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from cowfence.errors import Corrupt
from cowfence.extents import Extent

Buffer: TypeAlias = bytes | bytearray | memoryview
WritableBuffer: TypeAlias = bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a storage can do; asked, not assumed.

    ``alignment_bytes``: offsets and lengths that reach the host must be multiples of it (the implementation bounces others).
    ``atomic_bytes``: a write of this size and alignment never tears in a power cut.
    ``holes_past_end``: what lies past the end of file reads as zeros once the file grows over it (a regular file).
    ``punches_holes``: ``discard`` gives space back.
    """

    alignment_bytes: int = 1
    atomic_bytes: int = 512
    holes_past_end: bool = True
    punches_holes: bool = True


class Storage(Protocol):
    """Bytes at offsets. All offsets and lengths in bytes."""

    @property
    def name(self) -> str:
        """The file's name, for messages and logs."""
        ...

    @property
    def writable(self) -> bool: ...

    def capabilities(self) -> Capabilities: ...

    def size(self) -> int:
        """The length of the file in bytes."""
        ...

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        """Fill the buffers in turn from ``offset``; returns the bytes read, short only at the end of the file.

        With ``wait=False`` raises ``WouldBlock`` where the bytes are not in the host's page cache (some bytes of the
        buffers may then be filled).
        """
        ...

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        """Up to ``length_bytes`` from ``offset`` that stand in the host's page cache, fewer only at the end of the file.

        For many small reads: one call, no buffer to prepare. Raises ``WouldBlock`` where they do not.
        """
        ...

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        """Write all bytes of the buffers in turn at ``offset``, growing the file where needed. Not durable before a fence."""
        ...

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        """Make the range read as zeros, growing the file where needed; cheaply where the host can."""
        ...

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        """Give the range's space back if the host can; never grows or shrinks the file. Its bytes are then undefined."""
        ...

    def truncate(self, size_bytes: int, mark: str) -> None:
        """Set the length of the file; new bytes read as zeros."""
        ...

    def fence(self, mark: str) -> None:
        """Durable barrier: everything written before the call survives a power cut once it returns (``fdatasync``)."""
        ...

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        """Data and holes of the range, clipped to the end of the file."""
        ...

    def close(self) -> None:
        """Release the file and its locks. Writes nothing. May be called again."""
        ...


def read_exact(storage: Storage, offset: int, length_bytes: int, what: str) -> bytearray:
    """``length_bytes`` from ``offset``; raises ``Corrupt`` naming ``what`` where the file ends before."""
    buffer = bytearray(length_bytes)
    got = storage.readv(offset, (buffer,)) if length_bytes else 0
    if got != length_bytes:
        raise Corrupt(f"{storage.name}: {what} at offset {offset}", f"the file ends {length_bytes - got} bytes too early")
    return buffer


def read_padded(storage: Storage, offset: int, buffer: WritableBuffer, *, wait: bool = True) -> None:
    """Fill ``buffer`` from ``offset``; what lies past the end of the file reads as zeros."""
    got = storage.readv(offset, (buffer,), wait=wait)
    if got < len(buffer):
        memoryview(buffer)[got:] = bytes(len(buffer) - got)
