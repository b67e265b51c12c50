"""The bits of a bitmap: the ranges they stand for."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cowfence.qcow2.dirty_bits import DirtyBits
from cowfence.units import KIB, TIB


def naive(bits: DirtyBits, first: int, last: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    granule = 1 << bits.granularity_bits
    for number in range(first, last):
        if bits.packed[number >> 3] >> (number & 7) & 1:
            if found and sum(found[-1]) == number * granule:
                found[-1] = found[-1][0], found[-1][1] + granule
            else:
                found.append((number * granule, granule))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_ranges_of_a_part(seed: int) -> None:
    rng = random.Random(seed)
    granule = 512
    bits = DirtyBits(9, 200_000 * granule)
    for _ in range(rng.randrange(1, 60)):
        at = rng.randrange(200_000)
        bits.mark(at * granule, rng.choice((1, 9, 1000, 70_000)) * granule if at < 130_000 else granule)
    first, last = sorted((rng.randrange(200_000), rng.randrange(1, 200_001)))
    assert list(bits.ranges(first * granule, last * granule)) == naive(bits, first, last)
    assert list(bits.ranges()) == naive(bits, 0, 200_000)


def test_the_last_range_ends_with_the_disk() -> None:
    bits = DirtyBits(16, 100_000)
    bits.mark(99_999, 1)
    assert list(bits.ranges()) == [(65536, 100_000 - 65536)]
    assert list(bits.ranges(99_999, 100_000)) == [(65536, 100_000 - 65536)]
    assert list(bits.ranges(0, 65536)) == []
    assert list(DirtyBits(16, 0).ranges()) == []


def test_only_what_is_asked_for_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client asks about a disk with millions of ranges piece by piece: each answer must not cost all of them."""
    bits = DirtyBits(16, TIB, b"\x55" * (TIB // (64 * KIB) // 8))
    looked: list[int] = []

    def unpack(packed: npt.NDArray[np.uint8], **options: Any) -> npt.NDArray[np.uint8]:
        looked.append(len(packed))
        return real(packed, **options)

    real = np.unpackbits
    monkeypatch.setattr(np, "unpackbits", unpack)
    assert len(list(islice(bits.ranges(TIB // 2), 4096))) == 4096
    assert sum(looked) < 10_000
