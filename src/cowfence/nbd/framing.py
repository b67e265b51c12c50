"""How requests and replies look on the wire: three styles, of which a client chooses one in the handshake.

``SIMPLE``: a reply is an error number, and the data of a READ. ``STRUCTURED``: what has a payload comes in chunks that say what
they are. ``EXTENDED``: lengths have 64 bits, every reply is made of chunks, and a request says whether it brings a payload.
("Request message", "Structured reply chunk message" and the extension EXTENDED_HEADERS of the specification.)
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import Final, Protocol

from cowfence.nbd.messages import (
    CHUNK_DONE,
    CHUNK_HEADER,
    DATA_CHUNK,
    EXTENDED_CHUNK_HEADER,
    EXTENDED_CHUNK_MAGIC,
    EXTENDED_DATA_CHUNK,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    CommandFlag,
    encode_error_payload,
    encode_hole_payload,
    encode_status_payload,
    encode_wide_status_payload,
)

Descriptors = Sequence[tuple[int, int]]
_DATA: Final = int(Chunk.OFFSET_DATA)


class Style(IntEnum):
    """Of requests and replies. Each can do what those before it can."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class Framing(Protocol):
    """A style, as the server speaks it. ``offset`` is always that of the request. ``last``: no more chunks follow."""

    style: Style
    request: Struct
    request_magic: int
    payload_flag: int
    """The flag of a request that brings a payload; 0 where WRITE does, and nothing else."""

    def done(self, cookie: int, offset: int) -> bytes: ...

    def done_reading(self, cookie: int, offset: int) -> bytes:
        """The reply to a READ of no bytes."""
        ...

    def error(self, cookie: int, offset: int, number: int, text: str) -> bytes: ...

    def data(self, cookie: int, offset: int, at: int, length_bytes: int, *, last: bool = True) -> bytes:
        """What stands in front of ``length_bytes`` of data from the disk's offset ``at`` on."""
        ...

    def hole(self, cookie: int, offset: int, at: int, length_bytes: int, *, last: bool) -> bytes: ...

    def status(self, cookie: int, offset: int, context_id: int, descriptors: Descriptors, *, last: bool) -> bytes: ...


class SimpleFraming:
    """``SIMPLE``. A server that speaks it offers neither holes nor block status."""

    style: Style = Style.SIMPLE
    request = REQUEST
    request_magic = REQUEST_MAGIC
    payload_flag = 0

    def done(self, cookie: int, offset: int) -> bytes:  # noqa: ARG002
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    done_reading = done

    def error(self, cookie: int, offset: int, number: int, text: str) -> bytes:  # noqa: ARG002
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, number, cookie)

    def data(self, cookie: int, offset: int, at: int, length_bytes: int, *, last: bool = True) -> bytes:  # noqa: ARG002
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def hole(self, cookie: int, offset: int, at: int, length_bytes: int, *, last: bool) -> bytes:
        raise NotImplementedError

    def status(self, cookie: int, offset: int, context_id: int, descriptors: Descriptors, *, last: bool) -> bytes:
        raise NotImplementedError


class StructuredFraming(SimpleFraming):
    """``STRUCTURED``. What has no payload stays a simple reply, as the specification allows: it is shorter."""

    style = Style.STRUCTURED

    def _chunk(self, cookie: int, offset: int, kind: int, payload: bytes, *, last: bool) -> bytes:  # noqa: ARG002
        return CHUNK_HEADER.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE if last else 0, kind, cookie, len(payload)) + payload

    def done_reading(self, cookie: int, offset: int) -> bytes:
        return self._chunk(cookie, offset, Chunk.NONE, b"", last=True)

    def error(self, cookie: int, offset: int, number: int, text: str) -> bytes:
        return self._chunk(cookie, offset, Chunk.ERROR, encode_error_payload(number, text), last=True)

    def data(self, cookie: int, offset: int, at: int, length_bytes: int, *, last: bool = True) -> bytes:  # noqa: ARG002
        return DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE if last else 0, _DATA, cookie, length_bytes + 8, at)

    def hole(self, cookie: int, offset: int, at: int, length_bytes: int, *, last: bool) -> bytes:
        return self._chunk(cookie, offset, Chunk.OFFSET_HOLE, encode_hole_payload(at, length_bytes), last=last)

    def status(self, cookie: int, offset: int, context_id: int, descriptors: Descriptors, *, last: bool) -> bytes:
        payload = encode_status_payload(context_id, descriptors)
        return self._chunk(cookie, offset, Chunk.BLOCK_STATUS, payload, last=last)


class ExtendedFraming(StructuredFraming):
    """``EXTENDED``."""

    style = Style.EXTENDED
    request = EXTENDED_REQUEST
    request_magic = EXTENDED_REQUEST_MAGIC
    payload_flag = int(CommandFlag.PAYLOAD_LEN)

    def _chunk(self, cookie: int, offset: int, kind: int, payload: bytes, *, last: bool) -> bytes:
        flags = CHUNK_DONE if last else 0
        return EXTENDED_CHUNK_HEADER.pack(EXTENDED_CHUNK_MAGIC, flags, kind, cookie, offset, len(payload)) + payload

    def done(self, cookie: int, offset: int) -> bytes:
        return self._chunk(cookie, offset, Chunk.NONE, b"", last=True)

    def data(self, cookie: int, offset: int, at: int, length_bytes: int, *, last: bool = True) -> bytes:
        flags = CHUNK_DONE if last else 0
        return EXTENDED_DATA_CHUNK.pack(EXTENDED_CHUNK_MAGIC, flags, _DATA, cookie, offset, length_bytes + 8, at)

    def status(self, cookie: int, offset: int, context_id: int, descriptors: Descriptors, *, last: bool) -> bytes:
        payload = encode_wide_status_payload(context_id, descriptors)
        return self._chunk(cookie, offset, Chunk.BLOCK_STATUS_EXT, payload, last=last)


FRAMINGS: Final[dict[Style, Framing]] = {
    Style.SIMPLE: SimpleFraming(),
    Style.STRUCTURED: StructuredFraming(),
    Style.EXTENDED: ExtendedFraming(),
}
