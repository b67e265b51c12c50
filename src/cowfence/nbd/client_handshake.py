"""The client's side of the negotiation, in two conversations: ``ClientHandshake`` begins the transmission of one export,
``ListHandshake`` asks what a server exports (``negotiation`` has what both sides share)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import NamedTuple

from cowfence.errors import Unsupported
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import (
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING_BYTES,
    EXPORT_SIZE_FLAGS,
    GREETING,
    OPTION_MAX_BYTES,
    OPTION_REPLY_HEADER,
    PAYLOAD_MAX_BYTES,
    REP_ERROR_BIT,
    STRING_MAX_BYTES,
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
    decode_option_reply_header,
    decode_string,
    encode_option,
    encode_string,
)
from cowfence.nbd.negotiation import ExportInfo, Negotiated, Negotiation, Script

_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_DEFAULT_SIZES = InfoBlockSize(1, 4096, PAYLOAD_MAX_BYTES)
_REPLIES_MAX = 10_000
_EXPORTS_MAX = 1000


class _Client(Negotiation):
    """Asks one option at a time."""

    _tls: bool

    def _begin(self) -> Generator[int, bytes, int]:
        """Greet, and begin TLS where it is wanted. Returns the server's flags."""
        flags = Greeting.decode((yield GREETING.size)).flags
        self._say(CLIENT_FLAGS.pack(flags & _FLAGS))
        if self._tls:
            if not flags & HandshakeFlag.FIXED_NEWSTYLE:
                raise Unsupported("NBD", "the server is too old for TLS")
            replies: list[tuple[int, bytes]] = []
            yield from self._ask(Option.STARTTLS, b"", replies)
            if replies[-1][0] != Rep.ACK:
                raise Unsupported("NBD", f"the server refuses TLS: {_told(replies[-1])}")
            self.wants_tls = True
            yield 0  # until TLS has begun
        return flags

    def _ask(self, option: int, data: bytes, replies: list[tuple[int, bytes]]) -> Script:
        """Send one option; its replies, up to the final one, are left in ``replies``."""
        replies.clear()
        self._say(encode_option(option, data))
        while True:
            answered, reply, length_bytes = decode_option_reply_header((yield OPTION_REPLY_HEADER.size))
            if answered != option:
                raise ProtocolError(f"a reply to option {answered} where {option} was asked")
            if length_bytes > OPTION_MAX_BYTES or len(replies) >= _REPLIES_MAX:
                raise ProtocolError(f"replies to option {option} without end")
            replies.append((reply, (yield length_bytes)))
            if reply == Rep.ACK or reply & REP_ERROR_BIT:
                return


class ClientHandshake(_Client):
    """Begins the transmission of the export ``name``: asks for the best style of replies, and for the metadata contexts, and
    falls back where the server cannot. ``tls``: it begins with that, or fails.

    ``receive`` raises ``ProtocolError`` where the server breaks the rules and ``Unsupported`` where it refuses.
    """

    def __init__(
        self,
        name: str,
        *,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
        style: Style = Style.EXTENDED,
        tls: bool = False,
    ) -> None:
        self._name = name
        self._contexts = tuple(contexts)
        self._best = style
        self._tls = tls
        super().__init__()

    def _converse(self) -> Script:
        flags = yield from self._begin()
        padded = not flags & HandshakeFlag.NO_ZEROES
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            yield from self._plain_export_name(Negotiated(ExportInfo("", 0, 0), Style.SIMPLE), padded=padded)
            return
        replies: list[tuple[int, bytes]] = []
        style = Style.SIMPLE
        for better, option in ((Style.EXTENDED, Option.EXTENDED_HEADERS), (Style.STRUCTURED, Option.STRUCTURED_REPLY)):
            if better <= self._best and style is Style.SIMPLE:
                yield from self._ask(option, b"", replies)
                if replies[-1][0] == Rep.ACK:
                    style = better
        contexts: dict[str, int] = {}
        if style >= Style.STRUCTURED and self._contexts:
            yield from self._ask(Option.SET_META_CONTEXT, MetaQuery(self._name, self._contexts).encode(), replies)
            if replies[-1][0] == Rep.ACK:
                found = (MetaContext.decode(data) for reply, data in replies if reply == Rep.META_CONTEXT)
                contexts = {context.name: context.context_id for context in found if context.name in self._contexts}
        yield from self._ask(Option.GO, InfoQuery(self._name, (Info.BLOCK_SIZE,)).encode(), replies)
        if replies[-1][0] == Rep.ERR_UNSUP:
            yield from self._plain_export_name(Negotiated(ExportInfo("", 0, 0), style, contexts), padded=padded)
            return
        if replies[-1][0] != Rep.ACK:
            raise Unsupported(f"NBD export '{self._name}'", f"the server refuses it: {_told(replies[-1])}")
        export = _described(self._name, replies)
        if export is None:
            raise ProtocolError("the server gave no size of the export")
        self.result = Negotiated(export, style, contexts)

    def _plain_export_name(self, agreed: Negotiated, *, padded: bool) -> Script:
        self._say(encode_option(Option.EXPORT_NAME, encode_string(self._name)))
        size_bytes, flags = EXPORT_SIZE_FLAGS.unpack((yield EXPORT_SIZE_FLAGS.size))
        if padded:
            yield EXPORT_NAME_PADDING_BYTES
        self.result = replace(agreed, export=_export(self._name, InfoExport(size_bytes, flags), _DEFAULT_SIZES))


class Listed(NamedTuple):
    """An export of a listing. ``info``: None where the server does not tell more about it. ``named_sizes``: it told the sizes
    of its blocks."""

    name: str
    description: str
    info: ExportInfo | None
    named_sizes: bool = False


class ListHandshake(_Client):
    """Asks for all exports, and about each; then says goodbye. ``listed`` is the answer once it has ended.

    Raises as ``ClientHandshake`` does.
    """

    def __init__(self, *, tls: bool = False) -> None:
        self.listed: list[Listed] = []
        self._tls = tls
        super().__init__()

    def _converse(self) -> Script:
        flags = yield from self._begin()
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise Unsupported("NBD", "the server is too old to list its exports")
        replies: list[tuple[int, bytes]] = []
        style = Style.SIMPLE
        yield from self._ask(Option.STRUCTURED_REPLY, b"", replies)
        if replies[-1][0] == Rep.ACK:
            style = Style.STRUCTURED
        yield from self._ask(Option.LIST, b"", replies)
        if replies[-1][0] != Rep.ACK:
            raise Unsupported("NBD", f"the server lists no exports: {_told(replies[-1])}")
        entries = [ServerEntry.decode(data) for reply, data in replies if reply == Rep.SERVER]
        for entry in entries[:_EXPORTS_MAX]:
            yield from self._ask(Option.INFO, InfoQuery(entry.name, (Info.DESCRIPTION, Info.BLOCK_SIZE)).encode(), replies)
            told = list(replies) if replies[-1][0] == Rep.ACK else []
            export = _described(entry.name, told)
            if export is not None and style >= Style.STRUCTURED:
                yield from self._ask(Option.LIST_META_CONTEXT, MetaQuery(entry.name).encode(), replies)
                contexts = [MetaContext.decode(data).name for reply, data in replies if reply == Rep.META_CONTEXT]
                export = replace(export, contexts=tuple(contexts))
            named_sizes = any(isinstance(information, InfoBlockSize) for information in _informations(told))
            description = export.description if export is not None and export.description else entry.description
            self.listed.append(Listed(entry.name, description, export, named_sizes))
        self._say(encode_option(Option.ABORT))


def _informations(replies: list[tuple[int, bytes]]) -> list[InfoExport | InfoText | InfoBlockSize | None]:
    return [decode_info(data) for reply, data in replies if reply == Rep.INFO]


def _described(name: str, replies: list[tuple[int, bytes]]) -> ExportInfo | None:
    export: InfoExport | None = None
    sizes, description = _DEFAULT_SIZES, ""
    for information in _informations(replies):
        if isinstance(information, InfoExport):
            export = information
        elif isinstance(information, InfoBlockSize):
            sizes = information
        elif isinstance(information, InfoText) and information.kind == Info.DESCRIPTION:
            description = information.text
    return None if export is None else replace(_export(name, export, sizes), description=description)


def _export(name: str, found: InfoExport, sizes: InfoBlockSize) -> ExportInfo:
    if found.size_bytes >= 1 << 63:
        raise ProtocolError(f"an export of {found.size_bytes} bytes")
    flags = found.flags if found.flags & TransmissionFlag.HAS_FLAGS else 0
    # Where a server names no limit or a higher one, requests still stay at the portable limit.
    maximum = min(sizes.maximum_bytes, PAYLOAD_MAX_BYTES)
    return ExportInfo(name, found.size_bytes, flags, "", sizes.minimum_bytes, sizes.preferred_bytes, maximum, ())


def _told(reply: tuple[int, bytes]) -> str:
    """What a server says about why it refuses."""
    kind, text = reply
    return decode_string(text[:STRING_MAX_BYTES], "error text") if text else _name_of(kind)


def _name_of(reply: int) -> str:
    try:
        return Rep(reply).name
    except ValueError:
        return f"error {reply & ~REP_ERROR_BIT}"
