"""Extended headers, several metadata contexts, and replies without their zeros: the machine alone, and both sides together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.disk.base import Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import Invalid
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.export import Export
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    EXTENDED_CHUNK_HEADER,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    NbdErrno,
    ProtocolError,
    encode_status_query,
)
from cowfence.nbd.transmission import Batch, ServerTransmission, zero_runs
from helpers_nbd import serving
from helpers_storage import TinyStorage

MIB = 1 << 20
SIZE = 4 * MIB
PAYLOAD = CommandFlag.PAYLOAD_LEN


def patchy() -> bytearray:
    rng = random.Random(3)
    content = bytearray(SIZE)
    for at in range(0, SIZE, 128 * 1024):
        content[at : at + 70_000] = rng.randbytes(70_000)
    return content


@pytest.fixture
def disk() -> RawDisk:
    storage = TinyStorage(SIZE)
    storage.bytes[:] = patchy()
    return RawDisk(storage)


@pytest.fixture
def uri(tmp_path: Path, disk: RawDisk) -> Iterator[str]:
    export = Export(
        disk,
        allocation_depth=True,
        bitmaps={"some": lambda *_: [(4096, 8192), (MIB, MIB)], "none": lambda *_: []},
    )
    with serving(tmp_path, {"": export}) as server:
        yield server.uri()


@pytest.mark.parametrize("style", list(Style))
def test_every_style_moves_the_same_bytes(uri: str, style: Style) -> None:
    content = patchy()
    with NbdDisk(uri, style=style) as disk:
        assert disk.style is style
        for offset, length in ((0, SIZE), (5, SIZE - 5), (69_000, 33_001), (100, 0), (SIZE - 1, 1), (70_000, 58_000)):
            assert disk.read(offset, length) == content[offset : offset + length]
        disk.write(77, b"moo", fua=True)
        disk.zero(MIB, MIB)
        disk.discard(2 * MIB, 4096)
        disk.flush()
        content[77:80] = b"moo"
        content[MIB : 2 * MIB] = bytes(MIB)
        assert disk.read(0, 2 * MIB) == content[: 2 * MIB]
        outcomes = disk.submit([Request(Verb.READ, SIZE - 1, 2), Request(Verb.READ, 77, 3)])
        assert isinstance(outcomes[0], Exception)
        assert outcomes[1] == b"moo"
        assert sum(extent.length_bytes for extent in disk.extents(0, SIZE)) == SIZE


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_several_contexts_at_once(uri: str, style: Style) -> None:
    names = (BASE_ALLOCATION, "qemu:dirty-bitmap:some", "qemu:dirty-bitmap:none", ALLOCATION_DEPTH, "qemu:dirty-bitmap:nope")
    with NbdDisk(uri, style=style, contexts=names) as disk:
        assert set(disk.contexts) == set(names[:4])
        assert list(disk.status("qemu:dirty-bitmap:some", 0, SIZE)) == [
            (0, 4096, 0),
            (4096, 8192, 1),
            (12_288, MIB - 12_288, 0),
            (MIB, MIB, 1),
            (2 * MIB, 2 * MIB, 0),
        ]
        assert list(disk.status("qemu:dirty-bitmap:some", 5000, 3000)) == [(5000, 3000, 1)]
        assert list(disk.status("qemu:dirty-bitmap:none", 10, SIZE - 10)) == [(10, SIZE - 10, 0)]
        assert {state for *_, state in disk.status(ALLOCATION_DEPTH, 0, SIZE)} == {0}  # holes of a raw disk
        assert sum(length for _, length, _ in disk.status(BASE_ALLOCATION, 0, SIZE)) == SIZE
        with pytest.raises(Invalid):
            disk.status("qemu:dirty-bitmap:nope", 0, 1)


def extended(command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 1) -> bytes:
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)


def machine(contexts: tuple[int, ...] = (1, 2)) -> ServerTransmission:
    return ServerTransmission(SIZE, style=Style.EXTENDED, contexts=contexts)


def fed(data: bytes, side: ServerTransmission | None = None) -> Batch:
    side = side or machine()
    side.feed(data)
    return side.next_batch(1000, 1 << 30)


def errors(batch: Batch) -> list[tuple[int, int]]:
    """Cookie and error number of each reply."""
    found = []
    for reply in batch.replies:
        _, _, kind, cookie, _, _ = EXTENDED_CHUNK_HEADER.unpack_from(reply)
        found.append((cookie, int.from_bytes(bytes(reply[32:36]), "big") if kind == Chunk.ERROR else 0))
    return found


def test_long_lengths() -> None:
    side = ServerTransmission(1 << 50, style=Style.EXTENDED, contexts=(1,))
    batch = fed(
        extended(Command.WRITE_ZEROES, 0, 1 << 50, cookie=1)
        + extended(Command.TRIM, 1 << 40, 1 << 41, cookie=2)
        + extended(Command.BLOCK_STATUS, 5, 1 << 45, cookie=3)
        + extended(Command.READ, 0, 1 << 33, cookie=4),
        side,
    )
    assert [(request.verb, request.length_bytes) for request in batch.requests] == [
        (Verb.ZERO, 1 << 50),
        (Verb.DISCARD, 1 << 41),
    ]
    assert [(query.offset, query.length_bytes) for query in batch.queries] == [(5, 1 << 45)]
    assert errors(batch) == [(4, NbdErrno.EINVAL)]


def test_a_payload_is_said_to_be_there() -> None:
    batch = fed(extended(Command.WRITE, 5, 3, PAYLOAD) + b"moo" + extended(Command.FLUSH, cookie=2))
    assert [bytes(request.data) for request in batch.requests] == [b"moo", b""]
    with pytest.raises(ProtocolError):
        fed(extended(Command.WRITE, 5, 3) + b"moo")


def test_a_payload_nobody_wants_is_skipped() -> None:
    batch = fed(
        extended(Command.READ, 0, 5, PAYLOAD)
        + b"abcde"
        + extended(Command.TRIM, 0, 3, PAYLOAD, cookie=2)
        + b"xyz"
        + extended(99, 0, 4, PAYLOAD, cookie=3)
        + b"1234"
        + extended(Command.BLOCK_STATUS, 0, 5000, PAYLOAD, cookie=4)
        + bytes(5000)
        + extended(Command.READ, 1, 1, cookie=5)
    )
    assert errors(batch) == [(number, NbdErrno.EINVAL) for number in (1, 2, 3, 4)]
    assert batch.cookies == [5]
    with pytest.raises(ProtocolError):
        fed(extended(Command.TRIM, 0, 1 << 40, PAYLOAD))


def test_block_status_of_some_contexts() -> None:
    query = encode_status_query(1 << 20, (2,))
    whole = extended(Command.BLOCK_STATUS, 7, len(query), PAYLOAD) + query
    side = machine()
    for cut in range(len(whole)):
        side.feed(whole[cut : cut + 1])
        batch = side.next_batch(10, 1 << 20)
        assert bool(batch.queries) == (cut == len(whole) - 1)
    assert [(one.offset, one.length_bytes, one.contexts) for one in batch.queries] == [(7, 1 << 20, (2,))]
    for bad in (
        encode_status_query(1 << 20, (3,)),
        encode_status_query(1 << 20, (1, 1)),
        encode_status_query(1 << 20, ()),
        encode_status_query(1 << 60, (1,)),
        encode_status_query(0, (1,)),
        b"short",
    ):
        assert errors(fed(extended(Command.BLOCK_STATUS, 7, len(bad), PAYLOAD) + bad)) == [(1, NbdErrno.EINVAL)]


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_zeros_are_not_sent(style: Style, disk: RawDisk) -> None:
    side = ServerTransmission(SIZE, style=style)
    batch = Batch()
    batch.requests.append(Request(Verb.READ, 0, SIZE))
    batch.cookies.append(1)
    replies: list[bytes | bytearray | memoryview] = []
    side.answer_finally(replies, batch, disk.submit(batch.requests))
    assert sum(map(len, replies)) < SIZE * 0.6
    replies.clear()
    batch.undivided.add(1)
    side.answer_finally(replies, batch, disk.submit(batch.requests))
    assert [len(reply) for reply in replies][1:] == [SIZE]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9000)), min_size=1, max_size=20), st.integers(0, 3))
def test_runs_of_zeros(parts: list[tuple[bool, int]], seed: int) -> None:
    rng = random.Random(seed)
    content = b"".join(bytes(length) if zero else rng.randbytes(length) for zero, length in parts).ljust(4096, b"\1")
    runs = zero_runs(memoryview(content))
    assert runs[0][0] == 0
    assert runs[-1][1] == len(content)
    for (_, end, zero), (start, _, other) in itertools.pairwise(runs):
        assert end == start
        assert zero != other or other is False
    for start, end, zero in runs:
        assert start < end
        assert not zero or not any(content[start:end])
