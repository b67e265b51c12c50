"""Messages: what is encoded decodes to itself, and no bytes make a decoder raise anything but ``ProtocolError``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers_nbd
from cowfence.nbd import messages as m

names = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=100)
u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, (1 << 64) - 1)


@given(names, st.lists(u16, max_size=20))
def test_info_queries_round_trip(name: str, requests: list[int]) -> None:
    query = m.InfoQuery(name, tuple(requests))
    assert m.InfoQuery.decode(query.encode()) == query


@given(names, st.lists(names, max_size=5))
def test_meta_queries_round_trip(name: str, queries: list[str]) -> None:
    query = m.MetaQuery(name, tuple(queries))
    assert m.MetaQuery.decode(query.encode()) == query


@given(names, names)
def test_listed_exports_round_trip(name: str, description: str) -> None:
    assert m.ServerEntry.decode(m.ServerEntry(name, description).encode()) == (name, description)


@given(u32, names)
def test_meta_contexts_round_trip(context_id: int, name: str) -> None:
    assert m.MetaContext.decode(m.MetaContext(context_id, name).encode()) == (context_id, name)


@given(u16, u16, u64, u64, u32)
def test_requests_round_trip(flags: int, command: int, cookie: int, offset: int, length: int) -> None:
    header = m.RequestHeader(flags, command, cookie, offset, length)
    assert m.RequestHeader.decode(header.encode()) == header


@given(u64, u16)
def test_export_information_round_trips(size: int, flags: int) -> None:
    assert m.decode_info(m.InfoExport(size, flags).encode()) == (size, flags)


@given(st.lists(st.tuples(st.integers(1, 0xFFFF_FFFF), u32), min_size=1, max_size=20))
def test_block_status_round_trips(descriptors: list[tuple[int, int]]) -> None:
    payload = helpers_nbd.encode_status_chunk(7, 3, descriptors)[m.CHUNK_HEADER.size :]
    assert m.decode_status_payload(payload) == (3, descriptors)


@given(st.text())
def test_strings_are_cut_at_a_character_and_lose_nul(text: str) -> None:
    raw = m.encode_string(text * 50)
    assert len(raw) <= m.STRING_MAX_BYTES
    assert "\0" not in m.decode_string(raw, "text")


@pytest.mark.parametrize(
    "decode",
    [
        m.Greeting.decode,
        m.decode_option_header,
        m.decode_option_reply_header,
        m.InfoQuery.decode,
        m.MetaQuery.decode,
        m.ServerEntry.decode,
        m.MetaContext.decode,
        m.decode_info,
        m.RequestHeader.decode,
        m.decode_error_payload,
        m.decode_hole_payload,
        m.decode_status_payload,
    ],
)
@given(data=st.binary(max_size=64))
def test_any_bytes_decode_or_are_a_protocol_error(decode: Callable[[bytes], object], data: bytes) -> None:
    with suppress(m.ProtocolError):
        decode(data)


@pytest.mark.parametrize(
    "sizes",
    [(0, 4096, 4096), (3, 4096, 4096), (1 << 17, 1 << 17, 1 << 20), (512, 256, 4096), (1, 1000, 4096), (512, 512, 1000)],
)
def test_block_sizes_that_break_the_rules_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(m.ProtocolError):
        m.decode_info(m.InfoBlockSize(*sizes).encode())


def test_an_oldstyle_server_is_named() -> None:
    greeting = m.GREETING.pack(m.INIT_MAGIC, m.OLDSTYLE_MAGIC, 0)
    with pytest.raises(m.ProtocolError, match="oldstyle"):
        m.Greeting.decode(greeting)
