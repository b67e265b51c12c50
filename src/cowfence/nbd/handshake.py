"""The server's side of the negotiation (``negotiation`` has what both sides share).

What it promises to itself: every length is checked before a byte of it is kept; an option's data is at most 64 KiB, larger ones
are skipped without being stored, and absurd ones close; a client has a bounded number of options and a bounded number of reply
bytes; nothing is opened or looked up before a client names an export; names are keys of a table and never paths.

TLS is refused as policy (``Tls.OFF``, "NOTLS mode"), offered ("SELECTIVETLS mode"), or required ("FORCEDTLS mode"). What a
client chose before TLS began is forgotten: somebody else may have chosen it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from typing import TypeAlias

from cowfence.nbd.framing import Style
from cowfence.nbd.messages import (
    CLIENT_FLAGS,
    DIRTY_BITMAP,
    EXPORT_NAME_PADDING_BYTES,
    EXPORT_SIZE_FLAGS,
    OPTION_HEADER,
    OPTION_MAX_BYTES,
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
    decode_option_header,
    decode_string,
    encode_option_reply,
    encode_string,
)
from cowfence.nbd.negotiation import ExportInfo, Negotiated, Negotiation, Script
from cowfence.units import KIB, MIB

_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_SKIP_MAX_BYTES = MIB
_REPLIES_MAX_BYTES = 4 * MIB
_SKIP_STEP_BYTES = 64 * KIB
_WILDCARDS = ("base:", "qemu:", DIRTY_BITMAP)

Exports: TypeAlias = Mapping[str, ExportInfo]
"""Exports by name. A value is asked for when a client names it, so the mapping may make it then."""


class Tls(Enum):
    """What the server does about TLS."""

    OFF = "off"
    OFFERED = "offered"
    REQUIRED = "required"


class ServerHandshake(Negotiation):
    """The server's side. ``receive`` never raises: where the client breaks the rules, ``problem`` says how and it has ended.

    ``receive()`` without data right after the connection was made returns the greeting.
    """

    def __init__(self, exports: Exports, *, tls: Tls = Tls.OFF, options_max: int = 1000) -> None:
        self.problem: ProtocolError | None = None
        self.stopping = False
        self._exports = exports
        self._tls = tls
        self._is_secure = False
        self._options_max = options_max
        self._style = Style.SIMPLE
        self._selected: tuple[str, dict[str, int]] | None = None
        super().__init__()

    def secured_with(self, exports: Exports) -> None:
        """TLS has begun, and this is what may be exported to whom it showed."""
        self.secured()
        self._is_secure = True
        self._exports = exports
        self._style = Style.SIMPLE
        self._selected = None

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
        if self._needs_tls:
            raise ProtocolError("an export was asked for without TLS")
        export = None if self.stopping else self._find(name)
        if export is None or export.held:
            raise ProtocolError(_why_not(export))
        agreed = self._agree(export)
        self._say(EXPORT_SIZE_FLAGS.pack(export.size_bytes, agreed.export.flags))
        if padded:
            self._say(bytes(EXPORT_NAME_PADDING_BYTES))
        self.result = agreed

    @property
    def _needs_tls(self) -> bool:
        return self._tls is Tls.REQUIRED and not self._is_secure

    def _agree(self, export: ExportInfo) -> Negotiated:
        flags = export.flags
        if self._style >= Style.STRUCTURED:
            flags |= TransmissionFlag.SEND_DF
        if self._style >= Style.EXTENDED:
            flags |= TransmissionFlag.BLOCK_STAT_PAYLOAD
        name, contexts = self._selected or ("", {})
        chosen = contexts if name == export.name else {}
        return Negotiated(replace(export, flags=int(flags)), self._style, chosen)

    def _answer(self, option: int, data: bytes) -> None:
        answer = self._ANSWERS.get(option)
        if self.stopping:
            self._reply_error(option, Rep.ERR_SHUTDOWN, "the server is stopping")
        elif self._needs_tls and option != Option.STARTTLS:
            self._reply_error(option, Rep.ERR_TLS_REQD, "TLS is required here")
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
        if self._is_secure:
            raise ProtocolError("TLS has begun already")
        if self._tls is Tls.OFF:
            self._reply_error(option, Rep.ERR_POLICY, "this server does not offer TLS")
            return
        self._reply(option, Rep.ACK)
        self.wants_tls = True

    def _structured_reply(self, option: int, data: bytes) -> None:
        if data:
            raise ProtocolError("STRUCTURED_REPLY takes no data")
        if self._style is Style.EXTENDED:
            raise ProtocolError("extended headers were agreed on, which have structured replies")
        self._style = Style.STRUCTURED
        self._reply(option, Rep.ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        if data:
            raise ProtocolError("EXTENDED_HEADERS takes no data")
        if self._style is Style.EXTENDED:
            raise ProtocolError("extended headers were agreed on already")
        self._style = Style.EXTENDED
        self._reply(option, Rep.ACK)

    def _info_or_go(self, option: int, data: bytes) -> None:
        query = InfoQuery.decode(data)
        export = self._find(query.name)
        if export is None or export.held:
            self._reply_error(option, Rep.ERR_UNKNOWN, _why_not(export))
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
            self._selected = None  # a new selection replaces the old one "including when this command fails"
        if self._style < Style.STRUCTURED:
            raise ProtocolError("metadata contexts need structured replies")
        query = MetaQuery.decode(data)
        export = self._find(query.name)
        if export is None or export.held:
            self._reply_error(option, Rep.ERR_UNKNOWN, _why_not(export))
            return
        # A bare namespace is a wildcard for listing and selects nothing; no queries list everything and select nothing.
        wanted, wildcards = set(query.queries), tuple(text for text in query.queries if text in _WILDCARDS)
        chosen: dict[str, int] = {}
        for context_id, name in enumerate(export.contexts, 1):
            listed = not setting and (not query.queries or name.startswith(wildcards))
            if name in wanted or listed:
                chosen[name] = context_id
                self._reply(option, Rep.META_CONTEXT, MetaContext(context_id if setting else 0, name).encode())
        self._reply(option, Rep.ACK)
        if setting:
            self._selected = export.name, chosen

    _ANSWERS: Mapping[int, Callable[[ServerHandshake, int, bytes], None]] = {
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info_or_go,
        Option.GO: _info_or_go,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.EXTENDED_HEADERS: _extended_headers,
        Option.LIST_META_CONTEXT: _meta_context,
        Option.SET_META_CONTEXT: _meta_context,
    }


def _why_not(export: ExportInfo | None) -> str:
    """The protocol has one error for both: "the requested export is not available"."""
    return "no such export" if export is None else "the export is being changed; try again"
