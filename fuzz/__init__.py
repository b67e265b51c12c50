"""Bytes that nobody would send, before the NBD machines of both sides (``make fuzz``).

Each case has a number, from which all of it follows. Streams are made of messages that are right for the most part, changed in
a few places, and cut into pieces anywhere. What may come of it: legal replies and, where the peer breaks the protocol, its end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError
from cowfence.nbd.client_handshake import ClientHandshake, ListHandshake
from cowfence.nbd.client_transmission import ClientTransmission
from cowfence.nbd.export import Export
from cowfence.nbd.framing import FRAMINGS, Descriptors, Style
from cowfence.nbd.handshake import ServerHandshake, Tls
from cowfence.nbd.messages import (
    BASE_ALLOCATION,
    CHUNK_HEADER,
    EXTENDED_CHUNK_HEADER,
    EXTENDED_CHUNK_MAGIC,
    OPTION_REPLY_HEADER,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    InfoExport,
    InfoQuery,
    MetaContext,
    MetaQuery,
    NbdErrno,
    Option,
    ProtocolError,
    Rep,
    decode_option_reply_header,
    encode_error_payload,
    encode_option,
    encode_option_reply,
    encode_status_query,
)
from cowfence.nbd.negotiation import ExportInfo
from cowfence.nbd.transmission import Reply, ServerTransmission
from cowfence.nbd.uri import NbdUri
from cowfence.storage.memory import MemoryStorage

SIZE = 256 * 1024


class Illegal(AssertionError):
    """What our side said is not what the protocol allows."""


def one_case(number: int) -> str:
    """Carry out the case of this number; returns what it was about. Raises Illegal, or whatever a defect raises."""
    rng = random.Random(number)
    name, target = rng.choice(_TARGETS)
    target(rng)
    return name


def _changed(rng: random.Random, stream: bytes) -> bytes:
    """Mostly as it was; else a few bytes are others, gone, or there twice."""
    if rng.random() < 0.4:
        return stream
    changed = bytearray(stream)
    for _ in range(rng.randrange(1, 6)):
        if not changed:
            break
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + rng.randrange(1, 20)]
            case _:
                changed[at:at] = changed[at : at + rng.randrange(1, 40)]
    return bytes(changed)


def _pieces(rng: random.Random, stream: bytes) -> Iterator[bytes]:
    longest = rng.choice((1, 7, 100, 5000, 1 << 20)) if len(stream) < 4000 else rng.choice((3000, 50_000, 1 << 20))
    at = 0
    while at < len(stream):
        length = rng.randrange(1, longest + 1)
        yield stream[at : at + length]
        at += length


# --- the server ---


def _requests(rng: random.Random, style: Style) -> tuple[bytes, Counter[int]]:
    """A stream of requests, and how often each cookie was used."""
    stream, cookies = bytearray(), Counter[int]()
    framing = FRAMINGS[style]
    for _ in range(rng.randrange(1, 30)):
        command = rng.choice([*Command, Command.READ, Command.WRITE, Command.WRITE, 8, 0xFFFF])
        flags = rng.choice((0, 0, 0, int(CommandFlag.FUA), rng.randrange(64), rng.randrange(1 << 16)))
        offset = rng.choice((0, rng.randrange(SIZE), SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1))
        length = rng.choice((0, 1, 512, 4096, rng.randrange(1, 70_000), SIZE, (1 << 32) - 1))
        payload = b""
        if command == Command.WRITE:
            length = min(length, 70_000)
            payload = rng.randbytes(length)
            flags |= framing.payload_flag
        elif framing.payload_flag and flags & framing.payload_flag:
            payload = encode_status_query(rng.randrange(SIZE), rng.choices((1, 2, 3), k=rng.randrange(4)))
            length = len(payload)
        cookie = rng.randrange(20)
        cookies[cookie] += command != Command.DISC
        stream += framing.request.pack(framing.request_magic, flags, command, cookie, offset, length) + payload
    return bytes(stream), cookies


def _server_transmission(rng: random.Random) -> None:
    style = rng.choice(list(Style))
    stream, cookies = _requests(rng, style)
    changed = _changed(rng, stream)
    content = bytearray(rng.randbytes(SIZE))
    content[4096:65536] = bytes(61_440)
    writable = rng.random() < 0.7
    disk = RawDisk(MemoryStorage(bytes(content)))
    export = Export(disk, read_only=not writable, bitmaps={"b": lambda *_: [(0, 4096), (8192, 10)]})
    side = ServerTransmission(SIZE, writable=writable, block_bytes=4096, style=style, contexts=(1, 2) if style else ())
    said: list[Reply] = []
    try:
        for piece in _pieces(rng, changed):
            at = 0
            while at < len(piece) and not side.disconnecting:
                room = side.space()
                count = min(len(room), len(piece) - at)
                room[:count] = piece[at : at + count]
                side.received(count)
                at += count
                _serve(rng, side, export, said)
    except ProtocolError:
        pass
    _check_replies(b"".join(map(bytes, said)), style, cookies if changed == stream else None)


def _serve(rng: random.Random, side: ServerTransmission, export: Export, said: list[Reply]) -> None:
    while True:
        batch = side.next_batch(rng.randrange(1, 20), rng.randrange(1, 1 << 20))
        replies = batch.replies
        if batch.requests:
            side.answer_finally(replies, batch, export.disk.submit(batch.requests))
        for query in batch.queries:
            if query.command is Command.BLOCK_STATUS:
                found: list[tuple[int, Descriptors]] = [
                    (one, export.status(one, query.offset, query.length_bytes, one=query.one)) for one in query.contexts
                ]
                side.answer_query(replies, query, found)
            else:
                side.answer_query(replies, query, None)
        said.extend(bytes(reply) for reply in replies)
        if not side.has_complete or side.disconnecting:
            return


def _check_replies(said: bytes, style: Style, cookies: Counter[int] | None) -> None:
    """Every reply is one that the protocol has, whole; and each request that was sent as it should be has at most one."""
    at = 0
    done = Counter[int]()
    while at < len(said):
        magic = int.from_bytes(said[at : at + 4], "big")
        if magic == SIMPLE_REPLY_MAGIC:
            if style is Style.EXTENDED:
                raise Illegal("a simple reply among extended ones")
            _, error, cookie = SIMPLE_REPLY.unpack_from(said, at)
            at += SIMPLE_REPLY.size
            if style is Style.SIMPLE and not error and cookies is not None:
                return  # the data of a READ has no mark of its own
            last = True
        elif magic == (EXTENDED_CHUNK_MAGIC if style is Style.EXTENDED else STRUCTURED_REPLY_MAGIC) and style:
            if style is Style.EXTENDED:
                _, flags, kind, cookie, _, length = EXTENDED_CHUNK_HEADER.unpack_from(said, at)
                at += EXTENDED_CHUNK_HEADER.size
            else:
                _, flags, kind, cookie, length = CHUNK_HEADER.unpack_from(said, at)
                at += CHUNK_HEADER.size
            error = int.from_bytes(said[at : at + 4], "big") if kind & 0x8000 else 0
            if kind not in list(Chunk) or at + length > len(said) or (kind == Chunk.NONE) != (length == 0):
                raise Illegal(f"a chunk of kind {kind} with {length} bytes")
            at += length
            last = bool(flags & 1)
        elif style is Style.SIMPLE:
            return
        else:
            raise Illegal(f"no reply begins with {magic:#x}")
        if error and error not in list(NbdErrno):
            raise Illegal(f"error {error}")
        done[cookie] += last
    if cookies is not None and any(count > cookies[cookie] for cookie, count in done.items()):
        raise Illegal("more replies than requests")


_EXPORTS = {
    "": ExportInfo("", SIZE, 0x565),
    "other": ExportInfo("other", 5, 0x567, contexts=(BASE_ALLOCATION, "qemu:dirty-bitmap:x")),
}


def _options(rng: random.Random) -> bytes:
    stream = bytearray(rng.choice((b"\0\0\0\3", b"\0\0\0\1", b"\0\0\0\0", b"\0\0\0\7")))
    names = ("", "other", "nowhere", "x" * 4096, "\u00fc")
    for _ in range(rng.randrange(1, 12)):
        option = rng.choice([*Option, 12, 0xFFFF_FFFF])
        data = b""
        if option in (Option.INFO, Option.GO):
            data = InfoQuery(rng.choice(names), tuple(rng.choices(range(5), k=rng.randrange(5)))).encode()
        elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            queries = rng.choices((BASE_ALLOCATION, "base:", "qemu:", "qemu:dirty-bitmap:x", "\u00fc"), k=rng.randrange(4))
            data = MetaQuery(rng.choice(names), tuple(queries)).encode()
        elif option == Option.EXPORT_NAME:
            data = rng.choice(names).encode()
        elif rng.random() < 0.1:
            data = rng.randbytes(rng.randrange(100_000))
        stream += encode_option(option, data)
    return bytes(stream)


def _server_handshake(rng: random.Random) -> None:
    side = ServerHandshake(_EXPORTS, tls=rng.choice(list(Tls)))
    said = side.receive()[18:]
    for piece in _pieces(rng, _changed(rng, _options(rng))):
        if side.ended:
            break
        said += side.receive(piece)
        if side.wants_tls and not side.ended:
            side.secured_with(_EXPORTS)
    at = 0
    while at < len(said):
        if said[at : at + 8] != bytes.fromhex("0003e889045565a9"):
            if side.result is None:
                raise Illegal("no option reply")
            return  # what EXPORT_NAME is answered with has no magic
        _, reply, length = decode_option_reply_header(said[at : at + OPTION_REPLY_HEADER.size])
        at += OPTION_REPLY_HEADER.size + length
        if reply not in list(Rep) or at > len(said):
            raise Illegal(f"an option reply of type {reply:#x} with {length} bytes")


# --- the client ---


def _client_handshake(rng: random.Random) -> None:
    side = rng.choice((ClientHandshake("disk", tls=rng.random() < 0.2), ListHandshake()))
    greeting = b"NBDMAGICIHAVEOPT" + bytes((0, rng.choice((0, 1, 3, 3, 3, 255))))
    stream = bytearray(greeting)
    for option in (5, 11, 8, 10, 7, 3, 6, 9):
        for _ in range(rng.randrange(3)):
            data = rng.choice(
                (b"", InfoExport(SIZE, 0x567).encode(), MetaContext(1, BASE_ALLOCATION).encode(), rng.randbytes(20))
            )
            stream += encode_option_reply(option, rng.choice([*Rep, 99]), data)
        stream += encode_option_reply(option, rng.choice((Rep.ACK, Rep.ACK, Rep.ERR_UNSUP)))
    _until_refused(rng, bytes(stream), side.receive, lambda: side.ended, lambda: side.wants_tls and side.secured())


def _client_transmission(rng: random.Random) -> None:
    style = rng.choice(list(Style))
    side = ClientTransmission(style=style, contexts=(1, 2))
    framing = FRAMINGS[style]
    stream = bytearray()
    for _ in range(rng.randrange(1, 12)):
        command = rng.choice((Command.READ, Command.WRITE, Command.FLUSH, Command.BLOCK_STATUS))
        offset, length = rng.randrange(SIZE), rng.randrange(1, 5000)
        cookie, _ = side.request(command, offset, length)
        if rng.random() < 0.1:
            stream += framing.error(cookie, offset, rng.choice((5, 0, 22)), "no")
        elif command == Command.READ and style and rng.random() < 0.5:
            half = length // 2
            stream += framing.hole(cookie, offset, offset, half or 1, last=not half)
            if half:
                stream += framing.data(cookie, offset, offset + half, length - half) + rng.randbytes(length - half)
        elif command == Command.READ:
            stream += framing.data(cookie, offset, offset, length) + rng.randbytes(length)
        elif command == Command.BLOCK_STATUS and style:
            stream += framing.status(cookie, offset, 1, [(length, 3)], last=rng.random() < 0.5)
            stream += framing.status(cookie, offset, 2, [(1, 1), (7, 0)], last=True)
        else:
            stream += framing.done(cookie, offset)
    stream += encode_error_payload(5, "more") if rng.random() < 0.1 else b""
    _until_refused(rng, bytes(stream), side.receive)


def _until_refused(
    rng: random.Random,
    stream: bytes,
    receive: Callable[[bytes], object],
    ended: Callable[[], bool] = lambda: False,
    between: Callable[[], object] = lambda: None,
) -> None:
    for piece in _pieces(rng, _changed(rng, stream)):
        if ended():
            return
        try:
            receive(piece)
            between()
        except CowfenceError:
            return


def _uri(rng: random.Random) -> None:
    text = _changed(rng, b"nbds+unix://user@/an%20export?socket=/tmp/s&tls-certificates=/pki&tls-verify-peer=no").decode(
        "latin-1"
    )
    try:
        found = NbdUri.parse(text)
    except CowfenceError:
        return
    if NbdUri.parse(str(found)) != found:
        raise Illegal(f"{text!r} is another URI when it is written out")


_TARGETS: tuple[tuple[str, Callable[[random.Random], None]], ...] = (
    ("requests", _server_transmission),
    ("requests", _server_transmission),
    ("options", _server_handshake),
    ("replies to options", _client_handshake),
    ("replies", _client_transmission),
    ("URIs", _uri),
)
