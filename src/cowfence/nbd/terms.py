"""What a client agreed on with a server, and what follows from it: how requests become messages, and what replies mean.

Requests are cut to what the server allows in one (32 MiB where it does not say). What a server does not offer is done by other
means where these are as good: zeroing by writing zeros, FUA by a flush after the write (``flush_follows``), and a trim that is
not offered is not sent (the range then reads as before). Flush has no substitute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from cowfence.disk.base import Request, Verb, in_bytes
from cowfence.errors import CowfenceError, Invalid, NoSpace, OutOfRange, ReadOnly, StorageFailed, Unsupported
from cowfence.extents import Extent
from cowfence.nbd.client_transmission import Completion
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import Command, CommandFlag, NbdErrno, ProtocolError, State, TransmissionFlag
from cowfence.nbd.negotiation import Negotiated
from cowfence.storage.base import Buffer
from cowfence.units import GIB, KIB, align_down

_ZEROS_BYTES: Final = 64 * KIB
_KNOWN_FLAGS: Final = 0x1FFF


class Piece(NamedTuple):
    """A part of a request that fits into one message. ``request``: which one of a batch. ``at``: where its bytes stand in the
    request's."""

    request: int
    command: Command
    flags: int
    offset: int
    length_bytes: int
    data: Buffer = b""
    at: int = 0


class Terms:
    """Of one export at a server that messages call ``name``. Sizes in bytes."""

    def __init__(self, name: str, agreed: Negotiated) -> None:
        self.name = name
        self.agreed = agreed
        self.size = agreed.export.size_bytes
        self.block_bytes = agreed.export.preferred_block_bytes
        self.style = agreed.style
        self.flags = TransmissionFlag(agreed.export.flags & _KNOWN_FLAGS)
        self._minimum_bytes = agreed.export.minimum_block_bytes
        self._maximum_bytes = align_down(agreed.export.maximum_block_bytes, self._minimum_bytes)

    @property
    def writable(self) -> bool:
        return not self.flags & TransmissionFlag.READ_ONLY

    @property
    def flushable(self) -> bool:
        return bool(self.flags & TransmissionFlag.SEND_FLUSH)

    def check_range(self, offset: int, length_bytes: int) -> None:
        """Raises OutOfRange."""
        if offset < 0 or length_bytes < 0 or offset + length_bytes > self.size:
            raise OutOfRange(offset, length_bytes, self.size)

    def cut(self, index: int, request: Request) -> list[Piece]:
        """The messages that the request number ``index`` needs. Raises OutOfRange, Invalid, ReadOnly, Unsupported."""
        verb, offset, length_bytes, data, fua, unmap = request
        if verb is Verb.FLUSH:
            return [self.flush_piece(index)] if self.writable else []
        if verb is Verb.WRITE:
            data = in_bytes(data)
            length_bytes = len(data)
        self.check_range(offset, length_bytes)
        if (offset | length_bytes) % self._minimum_bytes:
            raise Invalid(f"{self.name}: the server takes only multiples of {self._minimum_bytes} bytes")
        if verb is not Verb.READ and not self.writable:
            raise ReadOnly(f"{self.name}: the export is read-only")
        flags = int(CommandFlag.FUA) if fua and self.flags & TransmissionFlag.SEND_FUA else 0
        most_bytes = self._maximum_bytes
        if verb is Verb.READ:
            command, flags = Command.READ, 0
        elif verb is Verb.WRITE:
            command = Command.WRITE
        elif verb is Verb.DISCARD:
            if not self.flags & TransmissionFlag.SEND_TRIM:
                return []
            command, most_bytes = Command.TRIM, GIB
        elif self.flags & TransmissionFlag.SEND_WRITE_ZEROES:
            command = Command.WRITE_ZEROES
            flags |= 0 if unmap else int(CommandFlag.NO_HOLE)
        else:
            command = Command.WRITE
            data, most_bytes = b"", max(align_down(min(most_bytes, _ZEROS_BYTES), self._minimum_bytes), self._minimum_bytes)
        view = memoryview(data).cast("B") if data else memoryview(b"")
        pieces = []
        for at in range(0, length_bytes, most_bytes):
            count = min(most_bytes, length_bytes - at)
            content: Buffer = view[at : at + count]
            if command is Command.WRITE and verb is Verb.ZERO:
                content = bytes(count)
            pieces.append(Piece(index, command, flags, offset + at, count, content, at))
        return pieces

    def flush_follows(self, request: Request) -> bool:
        """True where the request is only flushed when a flush comes after it."""
        return request.fua and not self.flags & TransmissionFlag.SEND_FUA

    def flush_piece(self, index: int) -> Piece:
        """Raises Unsupported."""
        if not self.flushable:
            raise Unsupported(self.name, "the NBD server does not offer flush")
        return Piece(index, Command.FLUSH, 0, 0, 0)

    def error(self, piece: Piece, completion: Completion) -> CowfenceError:
        """The error of the tree for one that the server reported; an unknown number counts as EINVAL ("Error values")."""
        what = completion.text or f"error {completion.error}"
        text = f"{self.name}: {piece.command.name} at offset {piece.offset}: {what}"
        number = completion.error
        if number == NbdErrno.EPERM:
            return ReadOnly(text)
        if number == NbdErrno.ENOSPC:
            return NoSpace(text)
        if number == NbdErrno.ENOTSUP:
            return Unsupported(self.name, f"{piece.command.name}: {what}")
        if number in (NbdErrno.EIO, NbdErrno.ENOMEM, NbdErrno.ESHUTDOWN):
            return StorageFailed(self.name, piece.command.name, piece.offset, OSError(number, what))
        return Invalid(text)

    def check_status(self, context: str, offset: int, length_bytes: int) -> None:
        """Raises Invalid for a metadata context that the server does not have, and OutOfRange."""
        if context not in self.agreed.contexts:
            raise Invalid(f"{self.name}: the server has no metadata context {context!a}")
        self.check_range(offset, length_bytes)

    def status_piece(self, offset: int, end: int) -> Piece:
        """Asks for the block status of a range, or of as much of it as one message can."""
        longest = end if self.style is Style.EXTENDED else 4 * GIB - 1
        most_bytes = max(align_down(longest, self._minimum_bytes), self._minimum_bytes)
        return Piece(0, Command.BLOCK_STATUS, 0, offset, min(end - offset, most_bytes))

    def statuses(self, context: str, piece: Piece, completion: Completion, end: int) -> Iterator[tuple[int, int, int]]:
        """What a reply says about a range up to ``end``: (offset, length in bytes, state), at least one. Raises what the server
        reported, and ProtocolError."""
        if completion.error:
            raise self.error(piece, completion)
        context_id = self.agreed.contexts[context]
        if context_id not in completion.statuses:
            raise ProtocolError(f"{self.name}: the server left out the metadata context {context}")
        offset = piece.offset
        for length_bytes, state in completion.statuses[context_id]:
            # Lengths are the server's word: each is over zero (checked when decoded) and is cut at the range's end.
            length_bytes = min(length_bytes, end - offset)
            if length_bytes:
                yield offset, length_bytes, state
            offset += length_bytes


def allocation_extent(offset: int, length_bytes: int, state: int) -> Extent:
    """What a state of ``base:allocation`` says."""
    zero, hole = bool(state & State.ZERO), bool(state & State.HOLE)
    # A raw disk has its bytes at their offsets, as a file has.
    return Extent(offset, length_bytes, zero=zero, data=not zero, present=not hole, host_offset=offset)


def unknown_extent(offset: int, length_bytes: int) -> Extent:
    """A range about which the server says nothing: all of it counts as data."""
    return Extent(offset, length_bytes, zero=False, data=True, present=True, host_offset=offset)
