"""The transmission phase, the client's side, without I/O: numbers requests, checks and assembles replies.

Every length and range that a server sends is held against what was asked; nothing it claims is believed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from cowfence.nbd.framing import Descriptors, Style
from cowfence.nbd.messages import (
    CHUNK_HEADER,
    EXTENDED_CHUNK_HEADER,
    EXTENDED_CHUNK_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STATUS_MAX_DESCRIPTORS,
    STRING_MAX_BYTES,
    STRUCTURED_REPLY_MAGIC,
    Buffer,
    Chunk,
    ChunkHeader,
    Command,
    CommandFlag,
    ProtocolError,
    RequestHeader,
    decode_error_payload,
    decode_hole_payload,
    decode_status_payload,
    decode_wide_status_payload,
)

_NO_STATUSES: Final[Mapping[int, Descriptors]] = MappingProxyType({})


class Pending(NamedTuple):
    """A request that waits for its reply."""

    command: Command
    offset: int
    length_bytes: int


class Completion(NamedTuple):
    """The reply to one request, complete. ``error`` is 0 for success, ``text`` what the server said about a failure.

    ``data``: the bytes of a READ. ``statuses``: of a BLOCK_STATUS, (length in bytes, state) for each context's id.
    """

    cookie: int
    error: int = 0
    text: str = ""
    data: bytearray | None = None
    statuses: Mapping[int, Descriptors] = _NO_STATUSES


class _Assembly:
    """A structured reply while its chunks come in."""

    __slots__ = ("covered", "covered_bytes", "data", "error", "statuses", "text")

    def __init__(self, pending: Pending) -> None:
        self.data = bytearray(pending.length_bytes) if pending.command == Command.READ else None
        self.covered: list[tuple[int, int]] = []
        self.covered_bytes = 0
        self.statuses: dict[int, Descriptors] = {}
        self.error = 0
        self.text = ""

    def cover(self, start: int, end: int) -> None:
        """Note that content came for a range; raises ``ProtocolError`` where it overlaps earlier content."""
        index = bisect_left(self.covered, (start, end))
        before = index and self.covered[index - 1][1] > start
        after = index < len(self.covered) and self.covered[index][0] < end
        if before or after:
            raise ProtocolError("reply chunks that overlap")
        self.covered.insert(index, (start, end))
        self.covered_bytes += end - start


class ClientTransmission:
    """The client's side: numbers requests, and turns what the server sends into ``Completion`` values.

    ``receive`` raises ``ProtocolError`` for anything that the specification does not allow; the connection is then useless.
    """

    def __init__(self, *, style: Style, contexts: Iterable[int] = ()) -> None:
        self.pending: dict[int, Pending] = {}
        self._style = style
        self._contexts = frozenset(contexts)
        self._status_kind = Chunk.BLOCK_STATUS_EXT if style is Style.EXTENDED else Chunk.BLOCK_STATUS
        self._next_cookie = 1
        self._received = bytearray()
        self._assemblies: dict[int, _Assembly] = {}
        self._completed: list[Completion] = []
        self._script = self._read_replies()
        self._need_bytes = next(self._script)

    def request(self, command: Command, offset: int = 0, length_bytes: int = 0, flags: int = 0) -> tuple[int, bytes]:
        """The cookie and the header of a new request; a WRITE's data is sent after it."""
        cookie = self._next_cookie
        self._next_cookie += 1
        self.pending[cookie] = Pending(command, offset, length_bytes)

        if self._style is Style.EXTENDED:
            flags |= CommandFlag.PAYLOAD_LEN if command == Command.WRITE else 0
            return cookie, EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length_bytes)
        return cookie, RequestHeader(flags, command, cookie, offset, length_bytes).encode()

    def receive(self, data: Buffer) -> list[Completion]:
        """Take what arrived; returns the replies that are now complete."""
        received = self._received
        received += data
        position = 0
        try:
            while len(received) - position >= self._need_bytes:
                piece = bytes(memoryview(received)[position : position + self._need_bytes])
                position += self._need_bytes
                self._need_bytes = self._script.send(piece)
        except StopIteration:
            raise ProtocolError("the reply stream was broken earlier") from None
        del received[:position]
        completed, self._completed = self._completed, []
        return completed

    def _read_replies(self) -> Generator[int, bytes, None]:
        while True:
            first = yield 4
            magic = int.from_bytes(first, "big")
            if magic == SIMPLE_REPLY_MAGIC and self._style < Style.EXTENDED:
                rest = yield SIMPLE_REPLY.size - 4
                _, error, cookie = SIMPLE_REPLY.unpack(first + rest)
                pending = self._asked(cookie)
                data = None
                if pending.command in (Command.READ, Command.BLOCK_STATUS) and self._style is not Style.SIMPLE:
                    raise ProtocolError("a simple reply where a structured one was agreed on")
                if pending.command == Command.READ and not error:
                    data = bytearray((yield pending.length_bytes))
                self._complete(Completion(cookie, error, "", data))
            elif magic == STRUCTURED_REPLY_MAGIC and self._style is Style.STRUCTURED:
                rest = yield CHUNK_HEADER.size - 4
                header = ChunkHeader(*CHUNK_HEADER.unpack(first + rest)[1:])
                pending = self._asked(header.cookie)
                if header.length_bytes > self._most_payload(header, pending):
                    raise ProtocolError(f"a reply chunk of {header.length_bytes} bytes")
                self._take_chunk(header, pending, (yield header.length_bytes))
            elif magic == EXTENDED_CHUNK_MAGIC and self._style is Style.EXTENDED:
                rest = yield EXTENDED_CHUNK_HEADER.size - 4
                _, flags, kind, cookie, offset, length_bytes = EXTENDED_CHUNK_HEADER.unpack(first + rest)
                pending = self._asked(cookie)
                if offset != pending.offset:
                    raise ProtocolError("a reply with the offset of another request")
                header = ChunkHeader(flags, kind, cookie, length_bytes)
                if length_bytes > self._most_payload(header, pending):
                    raise ProtocolError(f"a reply chunk of {length_bytes} bytes")
                self._take_chunk(header, pending, (yield length_bytes))
            else:
                raise ProtocolError(f"reply: wrong magic {magic:#x}")

    def _asked(self, cookie: int) -> Pending:
        pending = self.pending.get(cookie)
        if pending is None:
            raise ProtocolError(f"a reply to request {cookie}, which is not waiting for one")
        return pending

    def _most_payload(self, header: ChunkHeader, pending: Pending) -> int:
        if header.is_error:
            return 6 + STRING_MAX_BYTES + 64
        if header.kind == Chunk.OFFSET_DATA and pending.command == Command.READ:
            return 8 + pending.length_bytes
        if header.kind == self._status_kind and pending.command == Command.BLOCK_STATUS:
            return 8 + 16 * STATUS_MAX_DESCRIPTORS
        return 12

    def _take_chunk(self, header: ChunkHeader, pending: Pending, payload: bytes) -> None:
        assembly = self._assemblies.get(header.cookie)
        if assembly is None:
            assembly = self._assemblies[header.cookie] = _Assembly(pending)
        if header.is_error:
            error, text = decode_error_payload(payload)
            assembly.error, assembly.text = assembly.error or error, assembly.text or text
        elif header.kind == Chunk.NONE:
            if payload or not header.done:
                raise ProtocolError("chunk NONE with a payload, or not the last")
        elif header.kind == Chunk.OFFSET_DATA and pending.command == Command.READ:
            if len(payload) < 9:
                raise ProtocolError("data chunk without data")
            self._content(assembly, pending, int.from_bytes(payload[:8], "big"), len(payload) - 8, memoryview(payload)[8:])
        elif header.kind == Chunk.OFFSET_HOLE and pending.command == Command.READ:
            offset, length_bytes = decode_hole_payload(payload)
            if not length_bytes:
                raise ProtocolError("hole chunk without length")
            self._content(assembly, pending, offset, length_bytes, None)
        elif header.kind == self._status_kind and pending.command == Command.BLOCK_STATUS:
            decode = decode_wide_status_payload if self._style is Style.EXTENDED else decode_status_payload
            context_id, descriptors = decode(payload)
            if context_id not in self._contexts or context_id in assembly.statuses:
                raise ProtocolError("block status of a context that was not asked for, or twice")
            assembly.statuses[context_id] = descriptors
        else:
            raise ProtocolError(f"a chunk of type {header.kind} in reply to {pending.command.name}")
        if header.done:
            self._finish(header.cookie, pending, assembly)

    @staticmethod
    def _content(assembly: _Assembly, pending: Pending, offset: int, length_bytes: int, data: memoryview | None) -> None:
        start = offset - pending.offset
        if start < 0 or start + length_bytes > pending.length_bytes:
            raise ProtocolError("a reply chunk outside of the range that was read")
        assembly.cover(start, start + length_bytes)
        if data is not None and assembly.data is not None:
            assembly.data[start : start + length_bytes] = data

    def _finish(self, cookie: int, pending: Pending, assembly: _Assembly) -> None:
        if not assembly.error:
            if pending.command == Command.READ and assembly.covered_bytes != pending.length_bytes:
                raise ProtocolError(f"a reply with {assembly.covered_bytes} of {pending.length_bytes} bytes")
            if pending.command == Command.BLOCK_STATUS and not assembly.statuses:
                raise ProtocolError("a block status reply without a status")
        self._complete(Completion(cookie, assembly.error, assembly.text, assembly.data, assembly.statuses))

    def _complete(self, completion: Completion) -> None:
        del self.pending[completion.cookie]
        self._assemblies.pop(completion.cookie, None)
        self._completed.append(completion)
