"""The overlay: the same bytes as a file that was changed in earnest, the file below as it was, and each range that changed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cowfence.storage.base import Storage, read_exact
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.overlay import OverlayStorage


def content(storage: Storage) -> bytes:
    return bytes(read_exact(storage, 0, storage.size(), "content"))


Change = Callable[[Storage], None]


def some_change(dice: random.Random, size: int) -> Change:
    offset, length = dice.randrange(size + 50), dice.randrange(300)
    data = dice.randbytes(length)
    return dice.choice(
        (
            lambda storage: storage.writev(offset, (data[:7], data[7:]), "test"),
            lambda storage: storage.zero(offset, length, "test"),
            lambda storage: storage.discard(offset, length, "test"),
            lambda storage: storage.truncate(offset, "test"),
        )
    )


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_the_file_would_be_and_says_what_differs(seed: int) -> None:
    dice = random.Random(seed)
    before = dice.randbytes(2000)
    below = MemoryStorage(before, writable=False)
    overlay, earnest = OverlayStorage(below), MemoryStorage(before)
    for _ in range(60):
        change = some_change(dice, earnest.size())
        change(overlay)
        change(earnest)
        now = earnest.snapshot()
        assert content(overlay) == now
        offset, length = dice.randrange(2500), dice.randrange(500)
        buffer = bytearray(length)
        got = overlay.readv(offset, (buffer,))
        assert bytes(buffer[:got]) == now[offset : offset + length]
        end = 0
        for start, length_bytes in overlay.changed():
            assert start > end or start == end == 0
            assert before[end:start] == now[end:start]
            end = start + length_bytes
        assert before[end:] == now[end:]
    assert below.snapshot() == before


def test_ranges_that_changed_are_exact() -> None:
    overlay = OverlayStorage(MemoryStorage(bytes(1000), writable=False))
    assert overlay.changed() == []
    overlay.writev(10, (b"ab",), "test")
    overlay.writev(12, (b"c",), "test")
    overlay.zero(500, 20, "test")
    overlay.discard(990, 100, "test")
    assert overlay.changed() == [(10, 3), (500, 20), (990, 10)]
    overlay.writev(1004, (b"x",), "test")
    assert overlay.changed() == [(10, 3), (500, 20), (990, 15)]
    overlay.truncate(505, "test")
    assert overlay.changed() == [(10, 3), (500, 500)]


def test_what_was_cut_away_does_not_come_back() -> None:
    overlay = OverlayStorage(MemoryStorage(b"\xaa" * 1000, writable=False))
    overlay.truncate(300, "test")
    overlay.truncate(800, "test")
    assert content(overlay) == b"\xaa" * 300 + bytes(500)
    assert [(extent.start, extent.length_bytes, extent.zero) for extent in overlay.extents(0, 1000)] == [
        (0, 300, False),
        (300, 500, True),
    ]


def test_a_huge_range_of_zeros_costs_nothing() -> None:
    overlay = OverlayStorage(MemoryStorage(b"head", writable=False))
    overlay.zero(0, 1 << 50, "test")
    overlay.discard(1 << 20, 1 << 49, "test")
    overlay.writev(1 << 40, (b"x",), "test")
    buffer = bytearray(3)
    overlay.readv((1 << 40) - 1, (buffer,))
    assert buffer == b"\0x\0"
