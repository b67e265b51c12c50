"""``OverlayStorage`` against a file in memory that is really changed."""

from __future__ import annotations

import random

import pytest

from cowfence.errors import Closed
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.overlay import OverlayStorage


def _content(storage: MemoryStorage | OverlayStorage) -> bytes:
    buffer = bytearray(storage.size())
    storage.readv(0, (buffer,))
    return bytes(buffer)


@pytest.mark.parametrize("seed", range(20))
def test_it_reads_as_if_it_were_written(seed: int) -> None:
    rng = random.Random(seed)
    initial = rng.randbytes(rng.randrange(60_000))
    below = MemoryStorage(initial, writable=False)
    overlay, real = OverlayStorage(below), MemoryStorage(initial)
    for _ in range(40):
        offset, length = rng.randrange(70_000), rng.randrange(9_000)
        for storage in (overlay, real):
            state = rng.getstate()
            kind = rng.randrange(4)
            if kind == 0:
                storage.writev(offset, (rng.randbytes(length), rng.randbytes(100)), "")
            elif kind == 1:
                storage.zero(offset, length, "")
            elif kind == 2:
                storage.truncate(offset, "")
            else:
                storage.fence("")
            after = rng.getstate()
            rng.setstate(state if storage is overlay else after)
        assert overlay.size() == real.size()
        assert _content(overlay) == _content(real)
    assert below.snapshot() == initial
    redone = bytearray(initial.ljust(overlay.size(), b"\0")[: overlay.size()])
    for change in overlay.changes():
        assert initial[change.offset :][: len(change.before)] == change.before
        redone[change.offset : change.offset + len(change.after)] = change.after
    assert redone == _content(real)


def test_what_is_written_back_is_no_change() -> None:
    overlay = OverlayStorage(MemoryStorage(b"1" * 10_000, writable=False))
    overlay.writev(5_000, (b"1" * 100,), "")
    assert overlay.changes() == []
    overlay.writev(5_000, (b"2",), "")
    (change,) = overlay.changes()
    assert (change.offset, len(change.after)) == (4096, 4096)


def test_closed() -> None:
    overlay = OverlayStorage(MemoryStorage(b""))
    overlay.close()
    with pytest.raises(Closed):
        overlay.size()
