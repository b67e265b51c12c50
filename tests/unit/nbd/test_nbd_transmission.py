"""Requests and replies without sockets: every rule's answer, payloads skipped in step, bounds, and arbitrary bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from cowfence.disk.base import Disk

import itertools
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers_nbd
from cowfence.disk.base import BLOCKED, Outcome, Request, Verb
from cowfence.errors import Corrupt, CowfenceError, NoSpace, OutOfRange, ReadOnly
from cowfence.extents import Extent
from cowfence.nbd import messages as m
from cowfence.nbd.client_transmission import ClientTransmission, Completion
from cowfence.nbd.export import Export, block_descriptors
from cowfence.nbd.framing import Descriptors, Style
from cowfence.nbd.messages import Command, CommandFlag, NbdErrno, ProtocolError, RequestHeader
from cowfence.nbd.transmission import Batch, Query, Reply, ServerTransmission, export_flags

SIZE = 1 << 20
MAX = 32 << 20


def header(command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7) -> bytes:
    return RequestHeader(flags, command, cookie, offset, length).encode()


def machine(*, size: int = SIZE, writable: bool = True, structured: bool = True, context: int | None = 1) -> ServerTransmission:
    return ServerTransmission(
        size,
        writable=writable,
        block_bytes=4096,
        style=Style.STRUCTURED if structured else Style.SIMPLE,
        contexts=() if context is None else (context,),
    )


def drain(server: ServerTransmission) -> Batch:
    """All batches as one, with data kept."""
    whole = Batch()
    while True:
        batch = server.next_batch(1000, 1 << 40)
        server.keep_data(batch, range(len(batch.requests)))
        whole.requests += batch.requests
        whole.cookies += batch.cookies
        whole.replies += batch.replies
        whole.queries += batch.queries
        if not server.has_complete:
            return whole


def fed(data: bytes, server: ServerTransmission | None = None) -> Batch:
    server = server or machine()
    server.feed(data)
    return drain(server)


def error_of(replies: list[Reply]) -> int:
    """The error of the single reply."""
    raw = b"".join(map(bytes, replies))
    if raw[:4] == bytes.fromhex("67446698"):
        assert len(raw) == 16
        return int.from_bytes(raw[4:8], "big")
    assert raw[:4] == bytes.fromhex("668e33ef")
    assert len(raw) == 20 + int.from_bytes(raw[16:20], "big")
    return int.from_bytes(raw[20:24], "big") if raw[6] & 0x80 else 0


@pytest.mark.parametrize(
    ("data", "request_"),
    [
        (header(Command.READ, 512, 100), Request(Verb.READ, 512, 100)),
        (header(Command.READ, 0, SIZE, CommandFlag.DF), Request(Verb.READ, 0, SIZE)),
        (header(Command.READ, 0, 1, CommandFlag.FUA), Request(Verb.READ, 0, 1)),
        (header(Command.WRITE, 3, 4) + b"abcd", Request(Verb.WRITE, 3, 4, b"abcd")),
        (header(Command.WRITE, 3, 4, CommandFlag.FUA) + b"abcd", Request(Verb.WRITE, 3, 4, b"abcd", fua=True)),
        (header(Command.FLUSH), Request(Verb.FLUSH)),
        (header(Command.TRIM, 1, 2), Request(Verb.DISCARD, 1, 2)),
        (header(Command.TRIM, 1, 2, CommandFlag.FUA), Request(Verb.DISCARD, 1, 2, fua=True)),
        (header(Command.WRITE_ZEROES, 1, 2), Request(Verb.ZERO, 1, 2)),
        (header(Command.WRITE_ZEROES, 1, 2, CommandFlag.NO_HOLE), Request(Verb.ZERO, 1, 2, unmap=False)),
        (header(Command.WRITE_ZEROES, 4096, 8192, CommandFlag.FAST_ZERO), Request(Verb.ZERO, 4096, 8192)),
    ],
)
def test_requests_that_a_disk_does(data: bytes, request_: Request) -> None:
    batch = fed(data)
    assert batch.requests == [request_]
    assert batch.cookies == [7]
    assert not batch.replies


def test_queries() -> None:
    batch = fed(header(Command.BLOCK_STATUS, 5, 6, CommandFlag.REQ_ONE, cookie=1) + header(Command.CACHE, 7, 8, cookie=2))
    assert batch.queries == [Query(Command.BLOCK_STATUS, 1, 5, 6, True, (1,)), Query(Command.CACHE, 2, 7, 8, contexts=(1,))]


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (header(Command.READ, SIZE, 1), NbdErrno.EINVAL),
        (header(Command.READ, SIZE - 1, 2), NbdErrno.EINVAL),
        (header(Command.READ, (1 << 64) - 1, 2), NbdErrno.EINVAL),
        (header(Command.READ, 0, MAX + 1), NbdErrno.EINVAL),
        (header(Command.READ, 0, 1, CommandFlag.NO_HOLE), NbdErrno.EINVAL),
        (header(Command.READ, 0, 1, 1 << 15), NbdErrno.EINVAL),
        (header(Command.WRITE, SIZE, 4) + b"abcd", NbdErrno.ENOSPC),
        (header(Command.WRITE, (1 << 64) - 4, 4) + b"abcd", NbdErrno.ENOSPC),
        (header(Command.WRITE, 0, 4, CommandFlag.DF) + b"abcd", NbdErrno.EINVAL),
        (header(Command.WRITE, 0, MAX + 1) + bytes(MAX + 1), NbdErrno.EINVAL),
        (header(Command.WRITE_ZEROES, SIZE - 1, 2), NbdErrno.ENOSPC),
        (header(Command.WRITE_ZEROES, 1, 4096, CommandFlag.FAST_ZERO), NbdErrno.ENOTSUP),
        (header(Command.WRITE_ZEROES, 0, 4096, CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE), NbdErrno.ENOTSUP),
        (header(Command.WRITE_ZEROES, 0, 4096, CommandFlag.REQ_ONE), NbdErrno.EINVAL),
        (header(Command.TRIM, SIZE, 1), NbdErrno.EINVAL),
        (header(Command.TRIM, 0, 1, CommandFlag.NO_HOLE), NbdErrno.EINVAL),
        (header(Command.FLUSH, 1), NbdErrno.EINVAL),
        (header(Command.FLUSH, 0, 1), NbdErrno.EINVAL),
        (header(Command.CACHE, 0, SIZE + 1), NbdErrno.EINVAL),
        (header(Command.CACHE, 0, 1, CommandFlag.NO_HOLE), NbdErrno.EINVAL),
        (header(Command.BLOCK_STATUS, SIZE, 1), NbdErrno.EINVAL),
        (header(Command.BLOCK_STATUS, 0, 0), NbdErrno.EINVAL),
        (header(8, 0, 1), NbdErrno.EINVAL),
        (header(0xFFFF), NbdErrno.EINVAL),
    ],
)
def test_refusals_leave_the_stream_in_step(data: bytes, error: int, structured: bool) -> None:
    server = machine(structured=structured)
    batch = fed(data + header(Command.READ, 0, 512, cookie=8), server)
    assert error_of(batch.replies) == error
    assert (batch.requests, batch.cookies) == ([Request(Verb.READ, 0, 512)], [8])


def test_df_needs_structured_replies() -> None:
    assert error_of(fed(header(Command.READ, 0, 1, CommandFlag.DF), machine(structured=False)).replies) == NbdErrno.EINVAL


def test_block_status_needs_a_selected_context() -> None:
    assert error_of(fed(header(Command.BLOCK_STATUS, 0, 1), machine(context=None)).replies) == NbdErrno.EINVAL


@pytest.mark.parametrize("data", [header(Command.WRITE, 0, 4) + b"abcd", header(Command.TRIM, 0, 4), header(6, 0, 4)])
def test_a_read_only_export_refuses_writes(data: bytes) -> None:
    batch = fed(data + header(Command.FLUSH), machine(writable=False))
    assert error_of(batch.replies) == NbdErrno.EPERM
    assert batch.requests == [Request(Verb.FLUSH)]


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE])
@pytest.mark.parametrize("structured", [False, True])
def test_nothing_at_all_is_done_at_once(command: Command, structured: bool) -> None:
    batch = fed(header(command, SIZE, 0), machine(structured=structured))
    assert error_of(batch.replies) == 0
    assert not batch.requests


def test_a_server_that_stops_answers_so_and_skips_payloads() -> None:
    server = machine()
    server.stopping = True
    batch = fed(header(Command.WRITE, 0, 4) + b"abcd" + header(Command.READ, 0, 4), server)
    assert not batch.requests
    assert [error_of([reply]) for reply in batch.replies] == [NbdErrno.ESHUTDOWN] * 2


@pytest.mark.parametrize("data", [b"\0" * 28, b"GET / HTTP/1.1\r\nHost: localhost\r\n", header(Command.WRITE, 0, 2 * MAX + 1)])
def test_what_cannot_be_trusted_ends_the_connection(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        fed(header(Command.READ, 0, 1) + data)


def test_disconnect_ends_the_reading() -> None:
    server = machine()
    batch = fed(header(Command.READ, 0, 1) + header(Command.DISC) + b"whatever comes after it, 28+ bytes", server)
    assert len(batch.requests) == 1
    assert server.disconnecting


def test_a_batch_keeps_its_bounds() -> None:
    server = machine()
    server.feed(header(Command.READ, 0, 1000) * 10)
    assert len(server.next_batch(3, 1 << 30).requests) == 3
    assert server.has_complete
    assert len(server.next_batch(100, 2500).requests) == 3  # the bytes run out within the third
    assert len(server.next_batch(100, 1).requests) == 1  # at least one
    assert len(server.next_batch(100, 1 << 30).requests) == 3
    assert not server.has_complete


def test_the_buffer_grows_for_a_large_write_and_shrinks_again() -> None:
    server = machine(size=1 << 30)
    data = bytes(range(256)) * (MAX // 256)
    stream = memoryview(header(Command.WRITE, 0, MAX) + data + header(Command.READ, 0, 1))
    requests: list[Request] = []
    while stream:
        space = server.space()
        count = min(len(space), len(stream), 200_000)
        space[:count] = stream[:count]
        server.received(count)
        stream = stream[count:]
        batch = server.next_batch(100, 1 << 30)
        requests += batch.requests
        server.keep_data(batch, range(len(batch.requests)))
    assert [request.verb for request in requests] == [Verb.WRITE, Verb.READ]
    assert bytes(requests[0].data) == data
    assert len(server.space()) < 1 << 20


def test_a_long_payload_in_small_pieces_is_not_copied_for_each() -> None:
    """As TLS brings it: a client that dribbles would keep the server busy with copying."""
    server = machine(size=1 << 30)
    server.feed(header(Command.WRITE, 0, MAX))
    buffers: list[object] = []
    for _ in range(64):
        for piece in (b"x" * (MAX // 64 - 1), b"x"):
            assert not server.next_batch(10, 1 << 30).requests
            server.feed(piece)
            if not buffers or server._inbox.view.obj is not buffers[-1]:
                buffers.append(server._inbox.view.obj)
    (request,) = server.next_batch(10, 1 << 30).requests
    assert bytes(request.data) == b"x" * MAX
    assert len(buffers) <= 2


def test_data_that_is_kept_outlives_the_buffer() -> None:
    server = machine()
    server.feed(header(Command.WRITE, 0, 4) + b"abcd")
    batch = server.next_batch(10, 1 << 30)
    server.keep_data(batch, [0])
    server.feed(header(Command.WRITE, 0, 4) + b"XXXX")
    assert bytes(batch.requests[0].data) == b"abcd"


def test_data_that_is_lent_outlives_the_buffer_until_it_is_back() -> None:
    server = machine(size=1 << 30)
    for number in range(4):
        server.feed(header(Command.WRITE, 0, 1 << 20, cookie=1) + bytes((number,)) * (1 << 20))
        server.feed(header(Command.READ, 0, 512, cookie=2) + header(Command.WRITE, 0, 4, cookie=3) + b"abcd")
        server.feed(header(Command.FLUSH, cookie=4)[:10])
        batch = server.next_batch(10, 1 << 30)
        assert batch.payload_bytes == (1 << 20) + 4
        writes = server.lend_data(batch)
        assert writes is not None
        assert (batch.cookies, writes.cookies) == ([2], [1, 3])
        assert [request.verb for request in batch.requests] == [Verb.READ]
        buffer = server._inbox.view.obj
        assert writes.lent is not None
        assert buffer is not writes.lent
        assert server.has_more
        server.feed(header(Command.FLUSH, cookie=4)[10:] + header(Command.WRITE, 0, 1 << 20) + b"XXXX" * (1 << 18))
        assert server.next_batch(10, 1 << 30).cookies == [4, 7]
        assert not server.has_more
        assert [bytes(request.data) for request in writes.requests] == [bytes((number,)) * (1 << 20), b"abcd"]
        assert batch.lent is None
        server.take_back(writes.lent)


def test_lent_buffers_come_round() -> None:
    """New memory costs as much as the copy into it."""
    server = machine(size=1 << 30)
    seen: list[bytearray] = []
    out: list[bytearray] = []
    for _ in range(20):
        server.feed(header(Command.WRITE, 0, 1 << 20))
        server.feed(bytes(1 << 20))
        lent = server.lend_data(server.next_batch(10, 1 << 30))
        assert lent is not None
        assert lent.lent is not None
        if not any(lent.lent is buffer for buffer in seen):
            seen.append(lent.lent)
        out.append(lent.lent)
        if len(out) > 1:
            server.take_back(out.pop(0))
    assert len(seen) <= 4
    # A long one is let go of.
    server.feed(header(Command.WRITE, 0, MAX) + bytes(MAX))
    lent = server.lend_data(server.next_batch(10, 1 << 30))
    assert lent is not None
    assert lent.lent is not None
    server.take_back(lent.lent)
    assert all(len(buffer) < 8 << 20 for buffer in server._inbox._spare)
    assert len(server._inbox.view) < 8 << 20


def test_data_that_is_flushed_is_not_lent() -> None:
    server = machine()
    server.feed(header(Command.WRITE, 0, 4) + b"abcd" + header(Command.WRITE, 4, 4, flags=CommandFlag.FUA) + b"efgh")
    batch = server.next_batch(10, 1 << 30)
    assert server.lend_data(batch) is None
    assert len(batch.requests) == 2


def test_what_lacks_payload() -> None:
    server = machine()
    assert not server.lacks_payload
    server.feed(header(Command.WRITE, 0, 8) + b"abc")
    server.next_batch(10, 1 << 30)
    assert server.lacks_payload
    server.feed(b"def")
    assert server.lacks_payload
    server.stopping = True  # it is refused without its payload
    assert not server.lacks_payload
    server.stopping = False
    server.feed(b"gh")
    assert not server.lacks_payload
    assert len(server.next_batch(10, 1 << 30).requests) == 1
    assert not server.lacks_payload


VALID = (
    header(Command.READ, 0, 512, cookie=1)
    + header(Command.WRITE, 0, 5, cookie=2)
    + b"hello"
    + header(Command.WRITE, SIZE, 70, cookie=3)
    + bytes(70)
    + header(Command.BLOCK_STATUS, 0, 512, cookie=4)
    + header(Command.FLUSH, cookie=5)
    + header(99, cookie=6)
    + header(Command.WRITE, 9, 3, CommandFlag.FUA, cookie=7)
    + b"end"
    + header(Command.DISC)
)


@given(st.lists(st.integers(0, len(VALID)), max_size=12))
def test_the_cuts_of_the_network_change_nothing(cuts: list[int]) -> None:
    expected = fed(VALID)
    server, got = machine(), Batch()
    places = [0, *sorted(cuts), len(VALID)]
    for start, end in itertools.pairwise(places):
        part = fed(VALID[start:end], server)
        got.requests += part.requests
        got.cookies += part.cookies
        got.queries += part.queries
        got.replies += part.replies
    assert (got.requests, got.cookies, got.queries) == (expected.requests, expected.cookies, expected.queries)
    assert got.replies == expected.replies
    assert server.disconnecting


requests_of_any_kind = st.builds(
    header, st.integers(0, 9), st.integers(0, 2 * SIZE), st.integers(0, 200), st.integers(0, 63), st.integers(0, (1 << 64) - 1)
)


@given(st.lists(st.one_of(st.binary(max_size=64), requests_of_any_kind)), st.booleans(), st.booleans())
def test_any_bytes_are_requests_replies_or_a_protocol_error(pieces: list[bytes], structured: bool, writable: bool) -> None:
    server = machine(structured=structured, writable=writable)
    with suppress(ProtocolError):
        for piece in pieces:
            batch = fed(piece, server)
            for reply in batch.replies:
                assert error_of([reply]) in {0, *NbdErrno}
            for request in batch.requests:
                assert request.offset + request.length_bytes <= SIZE
                assert writable or request.verb in (Verb.READ, Verb.FLUSH)
                assert request.verb is not Verb.WRITE or len(request.data) == request.length_bytes


# --- replies ---


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (NoSpace("full"), NbdErrno.ENOSPC),
        (ReadOnly("no"), NbdErrno.EPERM),
        (Corrupt("L2", "bad"), NbdErrno.EIO),
        (OutOfRange(0, 1, 0), NbdErrno.EINVAL),
        (CowfenceError("x" * 10_000), NbdErrno.EIO),
        (None, NbdErrno.EIO),  # a read without bytes
        (b"short", NbdErrno.EIO),
        (bytes(513), NbdErrno.EIO),
    ],
)
def test_failures_of_a_read(outcome: Outcome, error: int, structured: bool) -> None:
    server, out = machine(structured=structured), list[Reply]()
    assert server.answer(out, fed(header(Command.READ, 0, 512), server), [outcome]) == []
    assert error_of(out) == error


def test_bytes_in_answer_to_a_write_are_a_failure() -> None:
    server, out = machine(), list[Reply]()
    server.answer(out, fed(header(Command.FLUSH), server), [b""])
    assert error_of(out) == NbdErrno.EIO


def test_blocked_requests_are_left_for_later() -> None:
    server, out = machine(), list[Reply]()
    batch = fed(header(Command.FLUSH, cookie=1) + header(Command.READ, 0, 2, cookie=2), server)
    assert server.answer(out, batch, [BLOCKED, b"ab"]) == [0]
    late = list[Reply]()
    server.answer_finally(late, fed(header(Command.FLUSH, cookie=1), server), [None])
    assert late == [helpers_nbd.encode_simple_reply(1)]
    server.answer_finally(late, fed(header(Command.FLUSH, cookie=1), server), [BLOCKED])
    assert error_of(late[1:]) == NbdErrno.EIO


def extent(start: int, length: int, *, zero: bool = False, present: bool = True) -> Extent:
    return Extent(start, length, zero=zero, data=not zero, present=present)


@pytest.mark.parametrize(
    ("extents", "one", "descriptors"),
    [
        ([extent(0, 100)], False, [(50, 0)]),
        ([extent(0, 20), extent(20, 5), extent(25, 100, zero=True)], False, [(15, 0), (35, 3)]),
        ([extent(10, 20, zero=True, present=False), extent(30, 30)], False, [(20, 3), (30, 0)]),
        ([extent(10, 20, zero=True, present=False), extent(30, 30)], True, [(20, 3)]),
        ([extent(10, 20, present=False)], False, [(20, 0)]),  # the rest is not told
        ([], False, [(50, 0)]),
        ([extent(0, 5), extent(70, 5)], False, [(50, 0)]),  # nothing about the range
        ([extent(0, 1 << 70, zero=True)], False, [(50, 3)]),
        ([extent(10, 0), extent(10, 10)], False, [(10, 0)]),
    ],
)
def test_block_descriptors(extents: list[Extent], one: bool, descriptors: Descriptors) -> None:
    disk = SimpleNamespace(extents=lambda _offset, _length: iter(extents))
    assert Export(cast("Disk", disk)).status(1, 10, 50, one=one) == descriptors


def test_the_number_of_descriptors_is_bounded() -> None:
    many = ((start, 1, start % 2) for start in range(1_000_000))
    assert len(block_descriptors(many, 0, 1_000_000, 4096)) == 4096


def test_export_flags() -> None:
    assert export_flags(writable=True) == 0b1101_0110_1101
    assert export_flags(writable=False) == 0b0101_0000_1111


# --- the client's side ---


def client(*, structured: bool = True) -> ClientTransmission:
    return ClientTransmission(style=Style.STRUCTURED if structured else Style.SIMPLE, contexts=(1,))


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return helpers_nbd.encode_simple_reply(cookie, error) + data


def data_chunk(cookie: int, offset: int, data: bytes, *, done: bool = True) -> bytes:
    return helpers_nbd.encode_chunk(cookie, m.Chunk.OFFSET_DATA, offset.to_bytes(8, "big") + data, done=done)


def test_a_read_is_put_together_from_chunks_in_any_order() -> None:
    side = client()
    cookie, _ = side.request(Command.READ, 100, 10)
    stream = (
        data_chunk(cookie, 107, b"xyz", done=False)
        + helpers_nbd.encode_hole_chunk(cookie, 104, 3, done=False)
        + data_chunk(cookie, 100, b"abcd", done=False)
        + helpers_nbd.encode_chunk(cookie, m.Chunk.NONE, b"")
    )
    completions = [completion for byte in stream for completion in side.receive(bytes((byte,)))]
    assert completions == [Completion(cookie, 0, "", bytearray(b"abcd\0\0\0xyz"))]
    assert not side.pending


def test_simple_replies_and_errors() -> None:
    side = client(structured=False)
    side.request(Command.READ, 0, 3)
    side.request(Command.WRITE, 0, 3)
    done = side.receive(simple(2, NbdErrno.ENOSPC) + simple(1, 0, b"abc"))
    assert done == [Completion(2, NbdErrno.ENOSPC), Completion(1, 0, "", bytearray(b"abc"))]


def test_an_error_chunk_fails_the_read_even_after_all_its_data() -> None:
    side = client()
    side.request(Command.READ, 0, 3)
    (done,) = side.receive(data_chunk(1, 0, b"abc", done=False) + helpers_nbd.encode_error_chunk(1, NbdErrno.EIO, "lost"))
    assert (done.error, done.text) == (NbdErrno.EIO, "lost")


@pytest.mark.parametrize(
    "stream",
    [
        b"\0\0\0\0",
        simple(2),  # not asked for
        simple(1),  # simple where structured was agreed on
        data_chunk(1, 99, b"a"),
        data_chunk(1, 109, b"ab"),
        data_chunk(1, 100, b""),
        data_chunk(1, 100, b"abc"),  # done before all is there
        data_chunk(1, 100, b"abcdef", done=False) + data_chunk(1, 105, b"abc", done=False),
        data_chunk(1, 105, b"abc", done=False) + data_chunk(1, 100, b"abcdef", done=False),
        helpers_nbd.encode_hole_chunk(1, 100, 11),
        helpers_nbd.encode_hole_chunk(1, 100, 0),
        helpers_nbd.encode_hole_chunk(1, 1 << 63, 10),
        helpers_nbd.encode_chunk(1, m.Chunk.NONE, b""),
        helpers_nbd.encode_chunk(1, m.Chunk.NONE, b"", done=False),
        helpers_nbd.encode_chunk(1, 77, b""),
        helpers_nbd.encode_chunk(1, m.Chunk.ERROR, b""),
        helpers_nbd.encode_chunk(1, m.Chunk.ERROR, b"\0\0\0\0\0\0"),
        helpers_nbd.encode_chunk(1, m.Chunk.ERROR, b"\0\0\0\5\xff\xff"),
        helpers_nbd.encode_status_chunk(1, 1, [(10, 0)]),
        bytes.fromhex("668e33ef 0001 0001 0000000000000001 ffffffff"),  # 4 GiB announced
        bytes.fromhex("668e33ef 0001 8001 0000000000000001 7fffffff"),
    ],
)
def test_what_a_server_may_not_send(stream: bytes) -> None:
    side = client()
    side.request(Command.READ, 100, 10)
    with pytest.raises(ProtocolError):
        side.receive(stream)
    with pytest.raises(ProtocolError):
        side.receive(b"")


@pytest.mark.parametrize(
    "stream",
    [
        helpers_nbd.encode_status_chunk(1, 2, [(10, 0)]),  # another context
        helpers_nbd.encode_status_chunk(1, 1, [(0, 0)]),
        helpers_nbd.encode_status_chunk(1, 1, []),
        helpers_nbd.encode_chunk(1, m.Chunk.NONE, b""),
        helpers_nbd.encode_chunk(1, m.Chunk.BLOCK_STATUS, b"\0\0\0\1abc"),
        simple(1),
    ],
)
def test_block_status_that_a_server_may_not_send(stream: bytes) -> None:
    side = client()
    side.request(Command.BLOCK_STATUS, 0, 10)
    with pytest.raises(ProtocolError):
        side.receive(stream)


@given(st.lists(st.binary(max_size=80)), st.booleans())
def test_any_bytes_from_a_server(pieces: list[bytes], structured: bool) -> None:
    side = client(structured=structured)
    side.request(Command.READ, 100, 10)
    side.request(Command.BLOCK_STATUS, 100, 10)
    with suppress(ProtocolError):
        for piece in pieces:
            side.receive((b"\x66\x8e\x33\xef" if structured else b"\x67\x44\x66\x98") + piece)


@given(st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=50)), min_size=1, max_size=20))
def test_both_sides_understand_each_other(writes: list[tuple[int, bytes]]) -> None:
    side, server = client(), machine(size=256)
    disk = bytearray(256)
    for offset, data in writes:
        data = data[: 256 - offset]
        _, raw = side.request(Command.WRITE, offset, len(data))
        batch = fed(raw + data, server)
        out = list(batch.replies)
        for request in batch.requests:
            disk[request.offset : request.offset + request.length_bytes] = request.data
        server.answer(out, batch, [None] * len(batch.requests))
        assert [completion.error for completion in side.receive(b"".join(map(bytes, out)))] == [0]
    _, raw = side.request(Command.READ, 0, 256)
    out = []
    server.answer(out, fed(raw, server), [disk])
    assert side.receive(b"".join(map(bytes, out)))[0].data == disk
