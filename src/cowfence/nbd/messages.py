"""NBD messages: constants, and the pure conversion of every message to and from bytes.

Names and numbers are those of the NBD specification (NetworkBlockDevice/nbd, doc/proto.md), without the ``NBD_`` prefix.
Everything on the wire is big-endian. This module knows sizes and layouts only; which message is allowed when, and what
it means, is the business of ``handshake`` and ``transmission``. No I/O happens here.

Nothing read from a peer is believed: decoders check every inner length against what is really there and raise
``ProtocolError``, never ``struct.error``, ``UnicodeDecodeError`` or ``IndexError``.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterable, Sequence
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple, TypeAlias

from cowfence.errors import CowfenceError
from cowfence.units import KIB, MIB

Buffer: TypeAlias = bytes | bytearray | memoryview

# --- limits (the specification's where it sets one, else ours) ---

STRING_MAX_BYTES = 4096
"""No string (export name, query, message) is longer: "Conventions" of the specification."""

OPTION_MAX_BYTES = 64 * KIB
"""The longest option data that the server reads into memory."""

PAYLOAD_MAX_BYTES = 32 * MIB
"""The longest READ or WRITE: the portable limit of "Block size constraints"."""

LENGTH_MAX = 0xFFFF_FFFF
"""Lengths of requests and of block descriptors are 32 bits wide."""

STATUS_MAX_DESCRIPTORS = 128 * KIB
"""The most descriptors that a block status chunk may bring, sent or received (1 MiB of payload)."""

# --- handshake ---

INIT_MAGIC = 0x4E42_444D_4147_4943  # "NBDMAGIC"
OPTION_MAGIC = 0x4948_4156_454F_5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003_E889_0455_65A9
OLDSTYLE_MAGIC = 0x0000_4202_8186_1253

DEFAULT_PORT = 10809
EXPORT_NAME_PADDING_BYTES = 124
"""Zeroes after the reply to EXPORT_NAME, unless NO_ZEROES was agreed on."""


class HandshakeFlag(IntFlag):
    """Sent by the server first, echoed by the client as its client flags (16 and 32 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do (16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STAT_PAYLOAD = 1 << 12


class Option(IntEnum):
    """What a client may ask for in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    """Types of option replies; those with bit 31 set are errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


REP_ERROR_BIT = 1 << 31


class Info(IntEnum):
    """Kinds of information in replies to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


BASE_ALLOCATION = "base:allocation"
"""The one metadata context that the specification defines."""

ALLOCATION_DEPTH = "qemu:allocation-depth"
"""QEMU's (docs/interop/nbd.rst): which layer a range comes from: 1 is the top, 0 none."""

DIRTY_BITMAP = "qemu:dirty-bitmap:"
"""QEMU's: followed by the name of a bitmap. State 1: dirty."""

# --- transmission ---

REQUEST_MAGIC = 0x2560_9513
SIMPLE_REPLY_MAGIC = 0x6744_6698
STRUCTURED_REPLY_MAGIC = 0x668E_33EF
EXTENDED_REQUEST_MAGIC = 0x21E4_1C71
EXTENDED_CHUNK_MAGIC = 0x6E8A_278C


class Command(IntEnum):
    """Types of requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request (16 bits)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk(IntEnum):
    """Types of structured reply chunks; those with bit 15 set are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


CHUNK_ERROR_BIT = 1 << 15
CHUNK_DONE = 1 << 0
"""Reply flag DONE: the last chunk of a reply."""


class State(IntFlag):
    """Flags of a descriptor in the context base:allocation."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class NbdErrno(IntEnum):
    """The error numbers that may stand on the wire ("Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ProtocolError(CowfenceError):
    """The peer broke the NBD protocol, or asked for what would exhaust us; the connection must be closed."""

    errno = _errno.EPROTO


GREETING = Struct(">QQH")
CLIENT_FLAGS = Struct(">I")
OPTION_HEADER = Struct(">QII")
OPTION_REPLY_HEADER = Struct(">QIII")
EXPORT_SIZE_FLAGS = Struct(">QH")
REQUEST = Struct(">IHHQQI")
SIMPLE_REPLY = Struct(">IIQ")
CHUNK_HEADER = Struct(">IHHQI")
DATA_CHUNK = Struct(">IHHQIQ")
"""The header of an OFFSET_DATA chunk together with its offset; the bytes follow."""
EXTENDED_REQUEST = Struct(">IHHQQQ")
EXTENDED_CHUNK_HEADER = Struct(">IHHQQQ")
EXTENDED_DATA_CHUNK = Struct(">IHHQQQQ")

_U16 = Struct(">H")
_U32 = Struct(">I")
_INFO_EXPORT = Struct(">HQH")
_INFO_BLOCK_SIZE = Struct(">HIII")
_HOLE = Struct(">QI")
_ERROR = Struct(">IH")
_OFFSET = Struct(">Q")
_DESCRIPTOR = Struct(">II")
_WIDE_DESCRIPTOR = Struct(">QQ")
_TWO_U32 = Struct(">II")


def encode_string(text: str) -> bytes:
    """UTF-8, cut to 4,096 bytes at a character's boundary; NUL becomes a replacement character."""
    raw = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    return raw if len(raw) <= STRING_MAX_BYTES else raw[:STRING_MAX_BYTES].decode("utf-8", "ignore").encode()


def decode_string(raw: Buffer, what: str) -> str:
    """The text of a string field; raises ``ProtocolError`` for one too long, with a NUL, or no UTF-8."""
    if len(raw) > STRING_MAX_BYTES:
        raise ProtocolError(f"{what} of {len(raw)} bytes is longer than {STRING_MAX_BYTES}")
    try:
        text = bytes(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what} is not UTF-8") from error
    if "\0" in text:
        raise ProtocolError(f"{what} contains NUL")
    return text


class _Fields:
    """Reads fields from the front of a message; too short or too long a message is a ``ProtocolError``."""

    def __init__(self, data: Buffer, what: str) -> None:
        self._data = memoryview(data)
        self._what = what

    def take(self, length_bytes: int) -> memoryview:
        if length_bytes > len(self._data):
            raise ProtocolError(f"{self._what}: {length_bytes} bytes announced where {len(self._data)} are left")
        taken, self._data = self._data[:length_bytes], self._data[length_bytes:]
        return taken

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def string(self, length_bytes: int, what: str) -> str:
        return decode_string(self.take(length_bytes), f"{self._what}: {what}")

    def rest(self) -> memoryview:
        return self.take(len(self._data))

    def end(self) -> None:
        if len(self._data):
            raise ProtocolError(f"{self._what}: {len(self._data)} bytes too many")


# --- handshake messages ---


class Greeting(NamedTuple):
    """The server's first message of the newstyle negotiation."""

    flags: int

    def encode(self) -> bytes:
        return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, self.flags)

    @classmethod
    def decode(cls, data: Buffer) -> Greeting:
        fields = _Fields(data, "greeting")
        if fields.u64() != INIT_MAGIC:
            raise ProtocolError("the peer is no NBD server")
        magic = fields.u64()
        if magic == OLDSTYLE_MAGIC:
            raise ProtocolError("the server speaks the oldstyle negotiation only")
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"greeting: unknown magic {magic:#x}")
        flags = fields.u16()
        fields.end()
        return cls(flags)


def encode_option(option: int, data: bytes = b"") -> bytes:
    """A client's option with its data."""
    return OPTION_HEADER.pack(OPTION_MAGIC, option, len(data)) + data


def decode_option_header(data: Buffer) -> tuple[int, int]:
    """Number of the option and length of its data, from 16 bytes."""
    fields = _Fields(data, "option")
    if (magic := fields.u64()) != OPTION_MAGIC:
        raise ProtocolError(f"option: wrong magic {magic:#x}")
    return fields.u32(), fields.u32()


def encode_option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """The server's reply to an option."""
    return OPTION_REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def decode_option_reply_header(data: Buffer) -> tuple[int, int, int]:
    """Option, reply type and length of the data, from 20 bytes."""
    fields = _Fields(data, "option reply")
    if (magic := fields.u64()) != OPTION_REPLY_MAGIC:
        raise ProtocolError(f"option reply: wrong magic {magic:#x}")
    return fields.u32(), fields.u32(), fields.u32()


class InfoQuery(NamedTuple):
    """Data of the options INFO and GO."""

    name: str
    requests: tuple[int, ...] = ()

    def encode(self) -> bytes:
        name = encode_string(self.name)
        parts = [_U32.pack(len(name)), name, _U16.pack(len(self.requests)), *map(_U16.pack, self.requests)]
        return b"".join(parts)

    @classmethod
    def decode(cls, data: Buffer) -> InfoQuery:
        fields = _Fields(data, "INFO or GO")
        name = fields.string(fields.u32(), "name")
        requests = tuple(fields.u16() for _ in range(fields.u16()))
        fields.end()
        return cls(name, requests)


class MetaQuery(NamedTuple):
    """Data of the options LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...] = ()

    def encode(self) -> bytes:
        parts = []
        for text in (self.name, *self.queries):
            raw = encode_string(text)
            parts += [_U32.pack(len(raw)), raw]
        parts.insert(2, _U32.pack(len(self.queries)))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: Buffer) -> MetaQuery:
        fields = _Fields(data, "metadata contexts")
        name = fields.string(fields.u32(), "name")
        count = fields.u32()
        if count * 4 > len(data):  # each query has at least its length: no work for a claim that cannot be true
            raise ProtocolError(f"metadata contexts: {count} queries announced in {len(data)} bytes")
        queries = tuple(fields.string(fields.u32(), "query") for _ in range(count))
        fields.end()
        return cls(name, queries)


class ServerEntry(NamedTuple):
    """Data of the reply SERVER: one export of a listing."""

    name: str
    description: str = ""

    def encode(self) -> bytes:
        name = encode_string(self.name)
        return _U32.pack(len(name)) + name + encode_string(self.description)

    @classmethod
    def decode(cls, data: Buffer) -> ServerEntry:
        fields = _Fields(data, "listed export")
        name = fields.string(fields.u32(), "name")
        return cls(name, decode_string(fields.rest(), "listed export: description"))


class InfoExport(NamedTuple):
    """Information EXPORT: size in bytes and transmission flags."""

    size_bytes: int
    flags: int

    def encode(self) -> bytes:
        return _INFO_EXPORT.pack(Info.EXPORT, self.size_bytes, self.flags)


class InfoText(NamedTuple):
    """Information NAME or DESCRIPTION."""

    kind: int
    text: str

    def encode(self) -> bytes:
        return _U16.pack(self.kind) + encode_string(self.text)


class InfoBlockSize(NamedTuple):
    """Information BLOCK_SIZE: smallest, preferred and largest request in bytes."""

    minimum_bytes: int
    preferred_bytes: int
    maximum_bytes: int

    def encode(self) -> bytes:
        return _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, self.minimum_bytes, self.preferred_bytes, self.maximum_bytes)

    def check(self) -> None:
        """Raises ``ProtocolError`` where the sizes break the rules of "Block size constraints"."""
        minimum, preferred, maximum = self
        if not (0 < minimum <= 64 * KIB and minimum & (minimum - 1) == 0):
            raise ProtocolError(f"minimum block size {minimum} is no power of two up to 65536")
        if preferred & (preferred - 1) or preferred < max(minimum, 512):
            raise ProtocolError(f"preferred block size {preferred} is no power of two from {max(minimum, 512)}")
        if maximum < minimum or (maximum % minimum and maximum != LENGTH_MAX):
            raise ProtocolError(f"maximum block size {maximum} is no multiple of {minimum}")


def decode_info(data: Buffer) -> InfoExport | InfoText | InfoBlockSize | None:
    """The information of a reply INFO; None for a kind that we do not know."""
    fields = _Fields(data, "information")
    kind = fields.u16()
    result: InfoExport | InfoText | InfoBlockSize | None = None
    if kind == Info.EXPORT:
        result = InfoExport(fields.u64(), fields.u16())
    elif kind == Info.BLOCK_SIZE:
        result = InfoBlockSize(fields.u32(), fields.u32(), fields.u32())
        result.check()
    elif kind in (Info.NAME, Info.DESCRIPTION):
        result = InfoText(kind, decode_string(fields.rest(), "information"))
    else:
        fields.rest()
    fields.end()
    return result


class MetaContext(NamedTuple):
    """Data of the reply META_CONTEXT."""

    context_id: int
    name: str

    def encode(self) -> bytes:
        return _U32.pack(self.context_id) + encode_string(self.name)

    @classmethod
    def decode(cls, data: Buffer) -> MetaContext:
        fields = _Fields(data, "metadata context")
        return cls(fields.u32(), decode_string(fields.rest(), "metadata context: name"))


# --- transmission messages ---


class RequestHeader(NamedTuple):
    """The 28 bytes that begin every request; ``cookie`` is the "handle" that the reply repeats."""

    flags: int
    command: int
    cookie: int
    offset: int
    length_bytes: int

    def encode(self) -> bytes:
        return REQUEST.pack(REQUEST_MAGIC, *self)

    @classmethod
    def decode(cls, data: Buffer) -> RequestHeader:
        fields = _Fields(data, "request")
        if (magic := fields.u32()) != REQUEST_MAGIC:
            raise ProtocolError(f"request: wrong magic {magic:#x}")
        header = cls(fields.u16(), fields.u16(), fields.u64(), fields.u64(), fields.u32())
        fields.end()
        return header


def encode_error_payload(error: int, message: str) -> bytes:
    """Of the chunk ERROR; the message is cut to 4,096 bytes."""
    text = encode_string(message)
    return _ERROR.pack(error, len(text)) + text


def encode_hole_payload(offset: int, length_bytes: int) -> bytes:
    """Of the chunk OFFSET_HOLE: ``length_bytes`` of zeroes at ``offset``."""
    return _HOLE.pack(offset, length_bytes)


def encode_status_payload(context_id: int, descriptors: Iterable[tuple[int, int]]) -> bytes:
    """Of the chunk BLOCK_STATUS: descriptors are (length in bytes, state flags)."""
    return b"".join([_U32.pack(context_id), *(_DESCRIPTOR.pack(length, flags) for length, flags in descriptors)])


def encode_wide_status_payload(context_id: int, descriptors: Sequence[tuple[int, int]]) -> bytes:
    """Of the chunk BLOCK_STATUS_EXT, the same with 64 bits each."""
    front = _TWO_U32.pack(context_id, len(descriptors))
    return b"".join([front, *(_WIDE_DESCRIPTOR.pack(length, flags) for length, flags in descriptors)])


def encode_status_query(length_bytes: int, context_ids: Sequence[int]) -> bytes:
    """The payload of a BLOCK_STATUS request that asks for some contexts only."""
    return b"".join([_OFFSET.pack(length_bytes), *map(_U32.pack, context_ids)])


def decode_status_query(payload: Buffer) -> tuple[int, tuple[int, ...]]:
    """The length in bytes and the ids of the contexts that such a request asks for."""
    fields = _Fields(payload, "block status request")
    length_bytes, rest = fields.u64(), fields.rest()
    if not rest or len(rest) % _U32.size:
        raise ProtocolError(f"block status request: {len(rest)} bytes of context ids")
    return length_bytes, tuple(context_id for (context_id,) in _U32.iter_unpack(rest))


class ChunkHeader(NamedTuple):
    """The 20 bytes that begin every structured reply chunk."""

    flags: int
    kind: int
    cookie: int
    length_bytes: int

    @property
    def done(self) -> bool:
        return bool(self.flags & CHUNK_DONE)

    @property
    def is_error(self) -> bool:
        return bool(self.kind & CHUNK_ERROR_BIT)


def decode_error_payload(payload: Buffer) -> tuple[int, str]:
    """Error number and message of any error chunk, of a kind we know or not."""
    fields = _Fields(payload, "error chunk")
    error = fields.u32()
    message = bytes(fields.take(fields.u16()))
    if not error:
        raise ProtocolError("error chunk: error 0")
    if len(message) > STRING_MAX_BYTES:
        raise ProtocolError(f"error chunk: message of {len(message)} bytes")
    return error, message.decode("utf-8", "replace")


def decode_hole_payload(payload: Buffer) -> tuple[int, int]:
    """Offset and length in bytes of an OFFSET_HOLE chunk."""
    fields = _Fields(payload, "hole chunk")
    hole = fields.u64(), fields.u32()
    fields.end()
    return hole


def decode_status_payload(payload: Buffer) -> tuple[int, Sequence[tuple[int, int]]]:
    """Context and descriptors (length in bytes, state flags) of a BLOCK_STATUS chunk."""
    fields = _Fields(payload, "block status chunk")
    context_id = fields.u32()
    rest = fields.rest()
    if not rest or len(rest) % _DESCRIPTOR.size:
        raise ProtocolError(f"block status chunk: {len(rest)} bytes of descriptors")
    return context_id, _checked(_DESCRIPTOR.iter_unpack(rest))


def decode_wide_status_payload(payload: Buffer) -> tuple[int, Sequence[tuple[int, int]]]:
    """The same of a BLOCK_STATUS_EXT chunk."""
    fields = _Fields(payload, "block status chunk")
    context_id, count = fields.u32(), fields.u32()
    rest = fields.rest()
    if not rest or len(rest) != count * _WIDE_DESCRIPTOR.size:
        raise ProtocolError(f"block status chunk: {len(rest)} bytes for {count} descriptors")
    return context_id, _checked(_WIDE_DESCRIPTOR.iter_unpack(rest))


def _checked(found: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
    descriptors = [(length, flags) for length, flags in found]
    if not all(length for length, _ in descriptors):
        raise ProtocolError("block status chunk: a descriptor of no length")
    return descriptors
