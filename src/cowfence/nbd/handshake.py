"""The fixed newstyle negotiation, both sides, as state machines: bytes in, bytes to send out, a result at the end.

Each side is a generator, so that it reads like the specification's conversation: it yields how many bytes it needs next
and gets exactly these, however the network cut them. ``receive`` feeds it and returns what to send. Once ``ended`` is set,
``result`` says what was agreed on (None: the session is over), and ``trailing`` holds bytes that already belong to the
transmission.

What the server side promises to itself: every length is checked before a byte of it is kept; an option's data is at most
64 KiB, larger ones are skipped without being stored, and absurd ones close; a client has a bounded number of options and a
bounded number of reply bytes; nothing is opened or looked up before a client names an export; names are keys of a table and
never paths. The server runs without TLS ("NOTLS mode"): STARTTLS is refused as policy.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from cowfence.errors import CowfenceError, Unsupported
from cowfence.nbd.messages import (
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING_BYTES,
    EXPORT_SIZE_FLAGS,
    GREETING,
    OPTION_HEADER,
    OPTION_MAX_BYTES,
    OPTION_REPLY_HEADER,
    PAYLOAD_MAX_BYTES,
    REP_ERROR_BIT,
    STRING_MAX_BYTES,
    Buffer,
    Greeting,
    HandshakeFlag,
    Info,
    InfoBlockSize,
    InfoExport,
    InfoQuery,
    InfoText,
    MetaContext,
    MetaQuery,
    Option,
    ProtocolError,
    Rep,
    ServerEntry,
    TransmissionFlag,
    decode_info,
    decode_option_header,
    decode_option_reply_header,
    decode_string,
    encode_option,
    encode_option_reply,
    encode_string,
)
from cowfence.units import KIB, MIB

ALLOCATION_CONTEXT_ID = 1
"""The id under which this server reports base:allocation."""

_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_SKIP_MAX_BYTES = MIB
_REPLIES_MAX_BYTES = 4 * MIB
_SKIP_STEP_BYTES = 64 * KIB
_DEFAULT_SIZES = InfoBlockSize(1, 4096, PAYLOAD_MAX_BYTES)

Script: TypeAlias = Generator[int, bytes, None]


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client may know of an export. Sizes in bytes; ``flags`` without SEND_DF, which the negotiation adds."""

    name: str
    size_bytes: int
    flags: int
    description: str = ""
    minimum_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    maximum_block_bytes: int = PAYLOAD_MAX_BYTES


Exports: TypeAlias = Mapping[str, ExportInfo]
"""Exports by name. A value is asked for when a client names it, so the mapping may make it then."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What both sides agreed on when the transmission begins.

    ``allocation_context``: the id under which base:allocation was selected, None if it was not.
    """

    export: ExportInfo
    structured: bool
    allocation_context: int | None


class _Negotiation:
    """Feeds a script with exact pieces of what arrives and collects what it says."""

    def __init__(self) -> None:
        self.result: Negotiated | None = None
        self.ended = False
        self.trailing = b""
        self._received = bytearray()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._script = self._converse()
        self._need_bytes = next(self._script)

    def _converse(self) -> Script:
        raise NotImplementedError

    def _say(self, message: bytes) -> None:
        self._out.append(message)
        self._out_bytes += len(message)

    def receive(self, data: Buffer = b"") -> bytes:
        """Take what arrived and return what to send. Bytes after the end of the negotiation go to ``trailing``."""
        received = self._received
        received += data
        position = 0
        while not self.ended and len(received) - position >= self._need_bytes:
            piece = bytes(memoryview(received)[position : position + self._need_bytes])
            position += self._need_bytes
            try:
                self._need_bytes = self._script.send(piece)
            except StopIteration:
                self.ended = True
            except CowfenceError:
                self.ended = True
                raise
        del received[:position]
        if self.ended:
            self.trailing += bytes(received)
            received.clear()
        return self._take()

    def _take(self) -> bytes:
        said = b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        return said


class ServerHandshake(_Negotiation):
    """The server's side. ``receive`` never raises: where the client breaks the rules, ``problem`` says how and it has ended.

    ``receive()`` without data right after the connection was made returns the greeting.
    """

    def __init__(self, exports: Exports, *, options_max: int = 1000) -> None:
        self.problem: ProtocolError | None = None
        self.stopping = False
        self._exports = exports
        self._options_max = options_max
        self._structured = False
        self._context_of: str | None = None
        super().__init__()

    def receive(self, data: Buffer = b"") -> bytes:
        try:
            return super().receive(data)
        except ProtocolError as error:
            self.problem = error
            return self._take()

    def _converse(self) -> Script:
        self._say(Greeting(_FLAGS).encode())
        (client_flags,) = CLIENT_FLAGS.unpack((yield CLIENT_FLAGS.size))
        if client_flags & ~_FLAGS:
            raise ProtocolError(f"unknown client flags {client_flags:#x}")
        for _ in range(self._options_max):
            option, length_bytes = decode_option_header((yield OPTION_HEADER.size))
            if option == Option.EXPORT_NAME:
                if length_bytes > STRING_MAX_BYTES:
                    raise ProtocolError(f"export name of {length_bytes} bytes")
                self._export_name((yield length_bytes), padded=not client_flags & HandshakeFlag.NO_ZEROES)
                return
            if not client_flags & HandshakeFlag.FIXED_NEWSTYLE:
                raise ProtocolError(f"option {option} without the fixed newstyle negotiation")
            if length_bytes > OPTION_MAX_BYTES:
                yield from self._skip(option, length_bytes)
                continue
            data = yield length_bytes
            if option == Option.ABORT:
                self._reply(option, Rep.ACK)
                return
            self._answer(option, data)
            if self.result is not None:
                return
            if self._out_bytes > _REPLIES_MAX_BYTES:
                # The specification wants one option at a time; who piles them up makes us work for nothing.
                raise ProtocolError("options sent without waiting for their replies")
        raise ProtocolError(f"more than {self._options_max} options")

    def _skip(self, option: int, length_bytes: int) -> Script:
        if length_bytes > _SKIP_MAX_BYTES:
            raise ProtocolError(f"option {option} with {length_bytes} bytes of data")
        while length_bytes:
            length_bytes -= len((yield min(length_bytes, _SKIP_STEP_BYTES)))
        self._reply_error(option, Rep.ERR_TOO_BIG, f"option data is limited to {OPTION_MAX_BYTES} bytes")

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._say(encode_option_reply(option, reply, data))

    def _reply_error(self, option: int, reply: int, text: str) -> None:
        self._reply(option, reply, encode_string(text))

    def _find(self, name: str) -> ExportInfo | None:
        """The export of that name; the empty name means the default: the one of that name, else the only one."""
        export = self._exports.get(name)
        if export is None and not name and len(self._exports) == 1:
            (export,) = self._exports.values()
        return export

    def _export_name(self, data: bytes, *, padded: bool) -> None:
        # This option has no error reply: "the server MUST terminate the session".
        name = decode_string(data, "export name")
        export = None if self.stopping else self._find(name)
        if export is None:
            raise ProtocolError("no such export")
        agreed = self._agree(export)
        self._say(EXPORT_SIZE_FLAGS.pack(export.size_bytes, agreed.export.flags))
        if padded:
            self._say(bytes(EXPORT_NAME_PADDING_BYTES))
        self.result = agreed

    def _agree(self, export: ExportInfo) -> Negotiated:
        flags = export.flags | (TransmissionFlag.SEND_DF if self._structured else 0)
        context = ALLOCATION_CONTEXT_ID if self._context_of == export.name else None
        agreed = ExportInfo(
            export.name,
            export.size_bytes,
            int(flags),
            export.description,
            export.minimum_block_bytes,
            export.preferred_block_bytes,
            export.maximum_block_bytes,
        )
        return Negotiated(agreed, self._structured, context)

    def _answer(self, option: int, data: bytes) -> None:
        answer = self._ANSWERS.get(option)
        if self.stopping:
            self._reply_error(option, Rep.ERR_SHUTDOWN, "the server is stopping")
        elif answer is None:
            self._reply_error(option, Rep.ERR_UNSUP, f"option {option} is not known here")
        else:
            try:
                answer(self, option, data)
            except ProtocolError as error:
                # A malformed option costs only itself: its length was right, so the stream is still in step.
                self._reply_error(option, Rep.ERR_INVALID, str(error))

    def _list(self, option: int, data: bytes) -> None:
        if data:
            raise ProtocolError("LIST takes no data")
        for name in self._exports:
            export = self._exports.get(name)
            if export is not None:
                self._reply(option, Rep.SERVER, ServerEntry(export.name, export.description).encode())
        self._reply(option, Rep.ACK)

    def _starttls(self, option: int, data: bytes) -> None:
        if data:
            raise ProtocolError("STARTTLS takes no data")
        self._reply_error(option, Rep.ERR_POLICY, "this server does not offer TLS")

    def _structured_reply(self, option: int, data: bytes) -> None:
        if data:
            raise ProtocolError("STRUCTURED_REPLY takes no data")
        self._structured = True
        self._reply(option, Rep.ACK)

    def _info_or_go(self, option: int, data: bytes) -> None:
        query = InfoQuery.decode(data)
        export = self._find(query.name)
        if export is None:
            self._reply_error(option, Rep.ERR_UNKNOWN, "no such export")
            return
        agreed = self._agree(export)
        self._reply(option, Rep.INFO, InfoExport(export.size_bytes, agreed.export.flags).encode())
        if Info.NAME in query.requests:
            self._reply(option, Rep.INFO, InfoText(Info.NAME, export.name).encode())
        if Info.DESCRIPTION in query.requests and export.description:
            self._reply(option, Rep.INFO, InfoText(Info.DESCRIPTION, export.description).encode())
        if Info.BLOCK_SIZE in query.requests:
            sizes = InfoBlockSize(export.minimum_block_bytes, export.preferred_block_bytes, export.maximum_block_bytes)
            self._reply(option, Rep.INFO, sizes.encode())
        self._reply(option, Rep.ACK)
        if option == Option.GO:
            self.result = agreed

    def _meta_context(self, option: int, data: bytes) -> None:
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._context_of = None  # a new selection replaces the old one "including when this command fails"
        if not self._structured:
            raise ProtocolError("metadata contexts need structured replies")
        query = MetaQuery.decode(data)
        export = self._find(query.name)
        if export is None:
            self._reply_error(option, Rep.ERR_UNKNOWN, "no such export")
            return
        # A bare "base:" is a wildcard for listing and selects nothing; no queries list everything and select nothing.
        wanted = BASE_ALLOCATION in query.queries
        if not setting:
            wanted = wanted or not query.queries or "base:" in query.queries
        if wanted:
            context_id = ALLOCATION_CONTEXT_ID if setting else 0
            self._reply(option, Rep.META_CONTEXT, MetaContext(context_id, BASE_ALLOCATION).encode())
        self._reply(option, Rep.ACK)
        if setting and wanted:
            self._context_of = export.name

    _ANSWERS: Mapping[int, Callable[[ServerHandshake, int, bytes], None]] = {
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info_or_go,
        Option.GO: _info_or_go,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _meta_context,
        Option.SET_META_CONTEXT: _meta_context,
    }


class ClientHandshake(_Negotiation):
    """The client's side: asks for structured replies, base:allocation and the export, falling back where the server cannot.

    ``receive`` raises ``ProtocolError`` where the server breaks the rules and ``Unsupported`` where it refuses the export.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        super().__init__()

    def _converse(self) -> Script:
        flags = Greeting.decode((yield GREETING.size)).flags
        self._say(CLIENT_FLAGS.pack(flags & _FLAGS))
        padded = not flags & HandshakeFlag.NO_ZEROES
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            yield from self._plain_export_name(padded=padded)
            return
        replies: list[tuple[int, bytes]] = []
        yield from self._ask(Option.STRUCTURED_REPLY, b"", replies)
        structured = replies[-1][0] == Rep.ACK
        context = None
        if structured:
            yield from self._ask(Option.SET_META_CONTEXT, MetaQuery(self._name, (BASE_ALLOCATION,)).encode(), replies)
            if replies[-1][0] == Rep.ACK:
                context = self._selected(replies)
        yield from self._ask(Option.GO, InfoQuery(self._name, (Info.BLOCK_SIZE,)).encode(), replies)
        reply, text = replies[-1]
        if reply == Rep.ERR_UNSUP:
            yield from self._plain_export_name(padded=padded, structured=structured, context=context)
            return
        if reply != Rep.ACK:
            what = decode_string(text[:STRING_MAX_BYTES], "error text") if text else _name_of(reply)
            raise Unsupported(f"NBD export '{self._name}'", f"the server refuses it: {what}")
        self.result = Negotiated(self._described(replies), structured, context)

    def _ask(self, option: int, data: bytes, replies: list[tuple[int, bytes]]) -> Script:
        """Send one option; its replies, up to the final one, are left in ``replies``."""
        replies.clear()
        self._say(encode_option(option, data))
        while True:
            answered, reply, length_bytes = decode_option_reply_header((yield OPTION_REPLY_HEADER.size))
            if answered != option:
                raise ProtocolError(f"a reply to option {answered} where {option} was asked")
            if length_bytes > OPTION_MAX_BYTES or len(replies) >= 1000:
                raise ProtocolError(f"replies to option {option} without end")
            replies.append((reply, (yield length_bytes)))
            if reply == Rep.ACK or reply & REP_ERROR_BIT:
                return

    @staticmethod
    def _selected(replies: list[tuple[int, bytes]]) -> int | None:
        for reply, data in replies:
            if reply == Rep.META_CONTEXT:
                context = MetaContext.decode(data)
                if context.name == BASE_ALLOCATION:
                    return context.context_id
        return None

    def _described(self, replies: list[tuple[int, bytes]]) -> ExportInfo:
        export: InfoExport | None = None
        sizes = _DEFAULT_SIZES
        for reply, data in replies:
            information = decode_info(data) if reply == Rep.INFO else None
            if isinstance(information, InfoExport):
                export = information
            elif isinstance(information, InfoBlockSize):
                sizes = information
        if export is None:
            raise ProtocolError("the server gave no size of the export")
        return self._export(export.size_bytes, export.flags, sizes)

    def _export(self, size_bytes: int, flags: int, sizes: InfoBlockSize) -> ExportInfo:
        if size_bytes >= 1 << 63:
            raise ProtocolError(f"an export of {size_bytes} bytes")
        if not flags & TransmissionFlag.HAS_FLAGS:
            flags = 0
        # Where a server names no limit or a higher one, requests still stay at the portable limit.
        maximum = min(sizes.maximum_bytes, PAYLOAD_MAX_BYTES)
        return ExportInfo(self._name, size_bytes, flags, "", sizes.minimum_bytes, sizes.preferred_bytes, maximum)

    def _plain_export_name(self, *, padded: bool, structured: bool = False, context: int | None = None) -> Script:
        self._say(encode_option(Option.EXPORT_NAME, encode_string(self._name)))
        size_bytes, flags = EXPORT_SIZE_FLAGS.unpack((yield EXPORT_SIZE_FLAGS.size))
        if padded:
            yield EXPORT_NAME_PADDING_BYTES
        self.result = Negotiated(self._export(size_bytes, flags, _DEFAULT_SIZES), structured, context)


def _name_of(reply: int) -> str:
    try:
        return Rep(reply).name
    except ValueError:
        return f"error {reply & ~REP_ERROR_BIT}"
