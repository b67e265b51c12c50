"""A little of what ``make fuzz`` and ``make soak`` do for as long as they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

import soak
from fuzz import one_case
from soak import Soak


def test_cases_of_the_fuzzer() -> None:
    for number in range(700):
        one_case(number)


def test_a_few_seconds_of_load(tmp_path: Path) -> None:
    outcome = Soak(tmp_path, seconds=3, seed=1, tell=print).run()
    assert not outcome.wrong
    assert outcome.changes
    assert outcome.requests > 100


def test_a_byte_that_was_acknowledged_is_missed() -> None:
    """The judge of the load: what was not answered may be old or new, and nothing else may be anything."""
    client = soak._Client("", 0, 1)
    client.content[5000:5010] = b"0123456789"
    client.unsure = 5005, b"xxxxx"
    found = bytearray(client.content)
    assert not client.judge(bytes(found))
    found[5007] = ord("x")
    assert not client.judge(bytes(found))
    found[5004] = 0
    assert "5004" in client.judge(bytes(found))[0]
    found[5004] = ord("4")
    found[5008] = ord("y")
    assert client.judge(bytes(found))


@pytest.mark.parametrize(("sizes", "grows"), [([100] * 60, False), ([100 + i for i in range(60)], True)])
def test_growth(sizes: list[int], grows: bool) -> None:
    outcome = soak.Outcome(seconds=60, memory_bytes=[(float(at), size) for at, size in enumerate(sizes)])
    assert (outcome.growth > 0.05) == grows
