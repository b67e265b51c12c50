"""Notes that no writer makes, in groups whose checksum is right: the replay says so and writes nothing."""

from __future__ import annotations

import pytest

from cowfence.errors import Corrupt
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.journal import COPY, FREED, FRESH, HEADER, PLACE_BITS, Journal
from cowfence.qcow2.replay import replay
from cowfence.storage.memory import MemoryStorage
from cowfence.units import KIB, MIB

CLUSTER = 4 * KIB
L2, BLOCK = 2, 4


@pytest.mark.parametrize(
    ("tag", "place", "words"),
    [
        (L2, 0, []),
        (FRESH, 0, []),
        (FRESH, 0, [CLUSTER << 8 | 7]),
        (FRESH, 0, [1 << 40 << 8 | L2]),
        (COPY, 0, [CLUSTER << 8 | L2, 0]),
        (HEADER, 0, [16, 0]),
        (HEADER, 508 << 3, [8, 0]),
        (FREED, 0, []),
        (FREED, 0, [1 << 62]),
        (BLOCK, 2 * CLUSTER << 3, [1 << 40]),
        (31, 0, []),
    ],
)
def test_a_note_that_cannot_be_is_said_and_changes_nothing(tag: int, place: int, words: list[int]) -> None:
    memory = MemoryStorage(b"", "image")
    write_new(memory, NewImage(size_bytes=MIB, cluster_bytes=CLUSTER))
    before = memory.snapshot()
    journal = Journal.new(bytearray(4096))
    journal.publish([tag << PLACE_BITS | place, *words])
    assert isinstance(replay(memory, journal).failure, Corrupt)
    assert memory.snapshot() == before
