"""The negotiation: each option's answers, its limits, and that no bytes and no way of cutting them confuse it."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.errors import CowfenceError, Unsupported
from cowfence.nbd.client_handshake import ClientHandshake
from cowfence.nbd.framing import Style
from cowfence.nbd.handshake import ServerHandshake
from cowfence.nbd.messages import (
    BASE_ALLOCATION,
    Info,
    InfoQuery,
    MetaQuery,
    Option,
    ProtocolError,
    Rep,
    ServerEntry,
    TransmissionFlag,
    decode_info,
    decode_option_reply_header,
    encode_option,
)
from cowfence.nbd.negotiation import ExportInfo

EXPORTS: Final = {
    "disk": ExportInfo("disk", 1 << 30, 0x565, "the disk", preferred_block_bytes=65536),
    "other": ExportInfo("other", 4096, 0x567),
}
FIXED = bytes((0, 0, 0, 3))


def replies(said: bytes) -> list[tuple[int, int, bytes]]:
    """Option, type and data of each reply."""
    found = []
    while said:
        option, reply, length = decode_option_reply_header(said[:20])
        found.append((option, reply, said[20 : 20 + length]))
        said = said[20 + length :]
    return found


def begun(exports: dict[str, ExportInfo] | None = None, *, options_max: int = 1000) -> ServerHandshake:
    handshake = ServerHandshake(EXPORTS if exports is None else exports, options_max=options_max)
    assert len(handshake.receive()) == 18
    assert handshake.receive(FIXED) == b""
    return handshake


def types(said: bytes) -> list[int]:
    return [reply for _, reply, _ in replies(said)]


def test_go_with_everything() -> None:
    handshake = begun()
    assert types(handshake.receive(encode_option(Option.STRUCTURED_REPLY))) == [Rep.ACK]
    query = MetaQuery("disk", (BASE_ALLOCATION, "x-other:thing"))
    assert types(handshake.receive(encode_option(Option.SET_META_CONTEXT, query.encode()))) == [Rep.META_CONTEXT, Rep.ACK]
    go = InfoQuery("disk", (Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION, 77))
    answers = replies(handshake.receive(encode_option(Option.GO, go.encode()) + b"early request"))
    assert [reply for _, reply, _ in answers] == [Rep.INFO] * 4 + [Rep.ACK]
    infos = [decode_info(data) for _, _, data in answers[:-1]]
    assert infos == [(1 << 30, 0x565 | TransmissionFlag.SEND_DF), (1, "disk"), (2, "the disk"), (1, 65536, 1 << 25)]
    assert handshake.ended
    assert handshake.trailing == b"early request"
    agreed = handshake.result
    assert agreed is not None
    assert (agreed.export.name, agreed.style, agreed.contexts) == ("disk", Style.STRUCTURED, {BASE_ALLOCATION: 1})


@pytest.mark.parametrize(("client_flags", "length"), [(3, 10), (1, 134)])
def test_export_name_with_and_without_padding(client_flags: int, length: int) -> None:
    handshake = ServerHandshake(EXPORTS)
    handshake.receive()
    said = handshake.receive(client_flags.to_bytes(4, "big") + encode_option(Option.EXPORT_NAME, b"disk"))
    assert said == (1 << 30).to_bytes(8, "big") + b"\x05\x65" + bytes(length - 10)
    assert handshake.result is not None
    assert handshake.result.style is Style.SIMPLE


def test_a_client_of_the_plain_newstyle_may_only_name_an_export() -> None:
    for option, ok in ((encode_option(Option.EXPORT_NAME, b"disk"), True), (encode_option(Option.LIST), False)):
        handshake = ServerHandshake(EXPORTS)
        handshake.receive()
        handshake.receive(bytes(4) + option)
        assert handshake.ended
        assert (handshake.result is not None) is ok


def test_list_names_all_exports() -> None:
    answers = replies(begun().receive(encode_option(Option.LIST)))
    assert [reply for _, reply, _ in answers] == [Rep.SERVER, Rep.SERVER, Rep.ACK]
    assert ServerEntry.decode(answers[0][2]) == ("disk", "the disk")
    assert ServerEntry.decode(answers[1][2]) == ("other", "")


def test_info_does_not_begin_the_transmission() -> None:
    handshake = begun()
    assert types(handshake.receive(encode_option(Option.INFO, InfoQuery("other").encode()))) == [Rep.INFO, Rep.ACK]
    assert not handshake.ended


@pytest.mark.parametrize(
    ("option", "data", "reply"),
    [
        (Option.GO, InfoQuery("nowhere").encode(), Rep.ERR_UNKNOWN),
        (Option.GO, InfoQuery("").encode(), Rep.ERR_UNKNOWN),  # two exports: none is the default
        (Option.INFO, b"", Rep.ERR_INVALID),
        (Option.INFO, InfoQuery("disk").encode() + b"x", Rep.ERR_INVALID),
        (Option.INFO, b"\xff\xff\xff\xff" + b"disk\0\0", Rep.ERR_INVALID),
        (Option.INFO, b"\0\0\0\1\xff\0\0", Rep.ERR_INVALID),
        (Option.INFO, b"\0\0\0\1\0\0\0", Rep.ERR_INVALID),
        (Option.INFO, InfoQuery("x" * 4096).encode(), Rep.ERR_UNKNOWN),
        (Option.INFO, b"\0\0\x10\1" + b"x" * 4097 + b"\0\0", Rep.ERR_INVALID),
        (Option.LIST, b"x", Rep.ERR_INVALID),
        (Option.STRUCTURED_REPLY, b"x", Rep.ERR_INVALID),
        (Option.STARTTLS, b"", Rep.ERR_POLICY),
        (Option.STARTTLS, b"x", Rep.ERR_INVALID),
        (Option.SET_META_CONTEXT, MetaQuery("disk", (BASE_ALLOCATION,)).encode(), Rep.ERR_INVALID),  # not structured yet
        (Option.PEEK_EXPORT, b"", Rep.ERR_UNSUP),
        (12, b"", Rep.ERR_UNSUP),
        (Option.EXTENDED_HEADERS, b"x", Rep.ERR_INVALID),
        (0, b"abc", Rep.ERR_UNSUP),
        (0xFFFF_FFFF, b"", Rep.ERR_UNSUP),
        (Option.LIST, bytes(65537), Rep.ERR_TOO_BIG),
        (77, bytes(1 << 20), Rep.ERR_TOO_BIG),
    ],
)
def test_refused_options_cost_only_themselves(option: int, data: bytes, reply: int) -> None:
    handshake = begun()
    assert types(handshake.receive(encode_option(option, data))) == [reply]
    assert types(handshake.receive(encode_option(Option.GO, InfoQuery("disk").encode())))[-1] == Rep.ACK
    assert handshake.result is not None


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4",  # an unknown client flag
        b"\xff\xff\xff\xff",
        FIXED + b"IHAVEOPX" + bytes(8),
        FIXED + encode_option(Option.EXPORT_NAME, b"nowhere"),
        FIXED + encode_option(Option.EXPORT_NAME, b"\xff\xfe"),
        FIXED + encode_option(Option.EXPORT_NAME, b"x" * 4097),
        FIXED + b"IHAVEOPT" + b"\0\0\0\3" + b"\xff\xff\xff\xff",  # 4 GiB of data
    ],
)
def test_what_cannot_be_answered_ends_the_session(data: bytes) -> None:
    handshake = ServerHandshake(EXPORTS)
    handshake.receive()
    assert handshake.receive(data) == b""
    assert handshake.ended
    assert handshake.result is None
    assert handshake.problem is not None
    assert handshake.receive(b"more") == b""


def test_abort_is_acknowledged() -> None:
    handshake = begun()
    assert types(handshake.receive(encode_option(Option.ABORT, b"bye"))) == [Rep.ACK]
    assert (handshake.ended, handshake.result, handshake.problem) == (True, None, None)


def test_options_are_counted() -> None:
    handshake = begun(options_max=5)
    said = handshake.receive(encode_option(Option.LIST) * 6)
    assert types(said).count(Rep.ACK) == 5
    assert handshake.problem is not None


def test_piled_up_options_do_not_pile_up_replies() -> None:
    many = {f"{number:04}" + "x" * 200: ExportInfo("x", 1, 1, "y" * 4000) for number in range(1000)}
    handshake = begun(many)
    said = handshake.receive(encode_option(Option.LIST) * 500)
    assert len(said) < 10 << 20
    assert handshake.problem is not None


def test_a_server_that_stops_says_so() -> None:
    handshake = begun()
    handshake.stopping = True
    assert types(handshake.receive(encode_option(Option.LIST))) == [Rep.ERR_SHUTDOWN]
    assert types(handshake.receive(encode_option(Option.ABORT))) == [Rep.ACK]


@pytest.mark.parametrize(
    ("option", "queries", "found"),
    [
        (Option.LIST_META_CONTEXT, (), True),
        (Option.LIST_META_CONTEXT, ("base:",), True),
        (Option.LIST_META_CONTEXT, (BASE_ALLOCATION,), True),
        (Option.LIST_META_CONTEXT, ("base:other", "qemu:dirty-bitmap:x"), False),
        (Option.SET_META_CONTEXT, (), False),
        (Option.SET_META_CONTEXT, ("base:",), False),
        (Option.SET_META_CONTEXT, (BASE_ALLOCATION, BASE_ALLOCATION), True),
        (Option.SET_META_CONTEXT, ("without a colon",), False),
    ],
)
def test_metadata_contexts(option: int, queries: tuple[str, ...], found: bool) -> None:
    handshake = begun()
    handshake.receive(encode_option(Option.STRUCTURED_REPLY))
    answers = types(handshake.receive(encode_option(option, MetaQuery("disk", queries).encode())))
    assert answers == ([Rep.META_CONTEXT] if found else []) + [Rep.ACK]


@pytest.mark.parametrize(
    "second", [MetaQuery("disk"), MetaQuery("nowhere", (BASE_ALLOCATION,)), MetaQuery("other", (BASE_ALLOCATION,))]
)
def test_a_selection_replaces_the_one_before_and_holds_for_its_export(second: MetaQuery) -> None:
    handshake = begun()
    handshake.receive(encode_option(Option.STRUCTURED_REPLY))
    handshake.receive(encode_option(Option.SET_META_CONTEXT, MetaQuery("disk", (BASE_ALLOCATION,)).encode()))
    handshake.receive(encode_option(Option.SET_META_CONTEXT, second.encode()))
    handshake.receive(encode_option(Option.GO, InfoQuery("disk").encode()))
    assert handshake.result is not None
    assert not handshake.result.contexts


def test_the_only_export_is_the_default() -> None:
    handshake = begun({"disk": EXPORTS["disk"]})
    handshake.receive(encode_option(Option.GO, InfoQuery("").encode()))
    assert handshake.result is not None
    assert handshake.result.export.name == "disk"


CONVERSATION = (
    FIXED
    + encode_option(99, b"unknown")
    + encode_option(Option.LIST)
    + encode_option(Option.STRUCTURED_REPLY)
    + encode_option(Option.SET_META_CONTEXT, MetaQuery("disk", (BASE_ALLOCATION,)).encode())
    + encode_option(Option.LIST, bytes(70_000))
    + encode_option(Option.GO, InfoQuery("disk", (3,)).encode())
    + b"trailing"
)


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=12))
def test_the_cuts_of_the_network_change_nothing(cuts: list[int]) -> None:
    whole, cut = ServerHandshake(EXPORTS), ServerHandshake(EXPORTS)
    expected = whole.receive() + whole.receive(CONVERSATION)
    places = [0, *sorted(cuts), len(CONVERSATION)]
    said = cut.receive() + b"".join(cut.receive(CONVERSATION[a:b]) for a, b in itertools.pairwise(places))
    assert said == expected
    assert (cut.result, cut.trailing, cut.ended) == (whole.result, b"trailing", True)


@given(
    st.booleans(),
    st.lists(st.one_of(st.binary(max_size=40), st.builds(encode_option, st.integers(0, 12), st.binary(max_size=40)))),
)
def test_any_bytes_give_replies_or_an_end(fixed: bool, pieces: list[bytes]) -> None:
    handshake = ServerHandshake(EXPORTS)
    handshake.receive()
    handshake.receive(FIXED if fixed else b"")
    for piece in pieces:
        for _, reply, _ in replies(handshake.receive(piece)) if fixed and handshake.result is None else ():
            assert reply in set(Rep)
    assert handshake.ended or handshake.problem is None


# --- the client's side ---


def talk(client: ClientHandshake, server: ServerHandshake) -> None:
    to_client = server.receive()
    while not client.ended:
        to_client = server.receive(client.receive(to_client))
        assert to_client or client.ended or server.ended
        if not to_client and not client.ended:
            return


def test_client_and_server_agree() -> None:
    client, server = ClientHandshake("disk"), ServerHandshake(EXPORTS)
    talk(client, server)
    assert server.ended
    assert client.result is not None
    assert client.result.style is Style.EXTENDED
    assert client.result.contexts == {BASE_ALLOCATION: 1}
    assert client.result.export.size_bytes == 1 << 30
    assert client.result.export.preferred_block_bytes == 65536


def test_the_client_hears_why_it_is_refused() -> None:
    with pytest.raises(Unsupported, match="no such export"):
        talk(ClientHandshake("nowhere"), ServerHandshake(EXPORTS))


def test_the_client_falls_back_to_the_plain_newstyle() -> None:
    client = ClientHandshake("disk")
    said = client.receive(b"NBDMAGICIHAVEOPT\0\0")
    assert said == bytes(4) + encode_option(Option.EXPORT_NAME, b"disk")
    client.receive((1 << 20).to_bytes(8, "big") + b"\0\1" + bytes(124))
    assert client.result is not None
    assert client.result.export.size_bytes == 1 << 20


@given(st.lists(st.binary(max_size=60)), st.booleans())
def test_any_bytes_from_a_server_end_in_an_error_of_ours(pieces: list[bytes], greeted: bool) -> None:
    client = ClientHandshake("disk")
    with suppress(CowfenceError):
        client.receive(b"NBDMAGICIHAVEOPT\0\3" if greeted else b"")
        for piece in pieces:
            client.receive(piece)


def test_a_server_that_never_ends_its_replies_is_left() -> None:
    client = ClientHandshake("disk")
    client.receive(b"NBDMAGICIHAVEOPT\0\3")
    reply = bytes.fromhex("0003e889045565a9") + Option.EXTENDED_HEADERS.to_bytes(4, "big") + Rep.INFO.to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="without end"):
        client.receive((reply + bytes(4)) * 10_001)
    client = ClientHandshake("disk")
    client.receive(b"NBDMAGICIHAVEOPT\0\3")
    with pytest.raises(ProtocolError, match="without end"):
        client.receive(reply + b"\xff\xff\xff\xff")
