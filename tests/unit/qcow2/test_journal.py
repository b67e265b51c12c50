"""The journal: what is visible, in which order, in how much memory, and what a damaged word does."""

from __future__ import annotations

import pytest

from cowfence.errors import CowfenceError, NotThisFormat
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import open_image
from cowfence.qcow2.journal import Journal, header_notes
from cowfence.storage.memory import MemoryStorage
from helpers_check import QUIET

HEAD_WORDS = 8


def journal(area_words: int = 64) -> tuple[Journal, bytearray]:
    memory = bytearray((HEAD_WORDS + 2 * area_words) * 8)
    return Journal.new(memory), memory


def visible(memory: bytearray) -> list[tuple[int, list[int]]]:
    """What a keeper that comes now would see."""
    return [(group.generation, list(group.notes)) for group in Journal(memory).unretired()]


def test_groups_are_seen_in_order_and_whole() -> None:
    writer, memory = journal()
    writer.publish([1, 2, 3])
    writer.publish([1 << 63 | 5])
    assert visible(memory) == [(1, [1, 2, 3]), (1, [1 << 63 | 5])]


def test_what_is_written_and_not_counted_is_not_there() -> None:
    writer, memory = journal()
    writer.publish([1])
    before = bytes(memory)
    writer.publish([2])
    # Dead between the group and the store of the count word.
    memory[32:40] = before[32:40]
    assert visible(memory) == [(1, [1])]


def test_a_commit_closes_a_generation_and_retiring_hides_it() -> None:
    writer, memory = journal()
    writer.publish([1])
    assert writer.next_generation() == 1
    writer.publish([2])
    assert visible(memory) == [(1, [1]), (2, [2])]
    writer.retire(1)
    assert visible(memory) == [(2, [2])]
    assert writer.next_generation() == 2
    writer.retire(2)
    assert visible(memory) == []


def test_areas_are_used_in_turn_for_ever() -> None:
    writer, memory = journal(area_words=16)
    for number in range(1, 1000):
        writer.publish([number, number])
        writer.publish([number])
        generation = writer.next_generation()
        assert generation == number
        assert visible(memory) == [(number, [number, number]), (number, [number])]
        if number > 1:
            # At each instant of the turn only this generation is to be seen.
            assert Journal(bytearray(memory)).retired == number - 1
        writer.retire(generation)
        assert visible(memory) == []


def test_a_generation_whose_commit_failed_is_kept_until_a_later_one_ends_well() -> None:
    writer, memory = journal()
    for number in range(1, 7):
        writer.publish([number])
        writer.next_generation()  # each commit fails
    assert visible(memory) == [(number, [number]) for number in range(1, 7)]
    writer.retire(6)
    writer.publish([7])
    assert visible(memory) == [(7, [7])]
    writer.retire(writer.next_generation())
    writer.publish([8])
    assert visible(memory) == [(8, [8])]


def test_after_a_failed_commit_and_a_good_one_the_whole_area_is_free_again() -> None:
    writer, memory = journal(area_words=32)
    writer.next_generation()  # fails, with nothing in it
    writer.publish([0] * 10)
    writer.next_generation()  # fails
    writer.publish([0] * 10)
    frozen = writer.next_generation()
    assert writer.room_words < 10
    writer.retire(frozen)
    assert writer.room_words > 25
    writer.publish([1] * 25)
    assert visible(memory) == [(writer.generation, [1] * 25)]


def test_room_is_known_before_and_nothing_is_dropped() -> None:
    writer, memory = journal(area_words=32)
    writer.expect(5)
    published = 0
    while writer.room_words >= 0:
        writer.publish([published] * 5)
        published += 1
    assert published == 4
    assert len(visible(memory)) == 4
    with pytest.raises(CowfenceError, match="full"):
        writer.publish([0])
    assert len(visible(memory)) == 4
    writer.next_generation()
    assert writer.room_words >= 0
    writer.publish([9] * 5)
    assert len(visible(memory)) == 5


@pytest.mark.parametrize("word", range(3))
def test_a_damaged_group_ends_what_is_seen_even_of_later_generations(word: int) -> None:
    writer, memory = journal()
    for number in (1, 2, 3):
        writer.publish([number])
    writer.next_generation()
    writer.publish([4])
    # The second group of four words, whose checksum is the last.
    at = (HEAD_WORDS + 4 + word) * 8
    memory[at + 2] ^= 1
    assert visible(memory) == [(1, [1])]


def test_damage_in_the_newer_area_spares_the_older_one() -> None:
    writer, memory = journal(area_words=64)
    writer.publish([1])
    writer.next_generation()
    writer.publish([2])
    memory[(HEAD_WORDS + 64 + 2) * 8] ^= 1
    assert visible(memory) == [(1, [1])]


def test_a_count_that_cannot_be_is_no_reason_to_run_away() -> None:
    writer, memory = journal()
    writer.publish([1])
    memory[32:40] = b"\xff" * 8
    assert visible(memory) == [(1, [1])]


def test_other_memory_is_refused() -> None:
    with pytest.raises(NotThisFormat):
        Journal(bytearray(4096))
    _, memory = journal()
    memory[0] ^= 1
    with pytest.raises(NotThisFormat):
        Journal(memory)


def test_state_words_are_seen_by_the_keeper() -> None:
    writer, memory = journal()
    keeper = Journal(memory)
    assert not keeper.poisoned
    assert not keeper.closed
    writer.fence_begins()
    assert not keeper.poisoned
    writer.fence_ended()
    writer.fence_failed()
    assert keeper.poisoned
    writer.close()
    assert keeper.closed


def test_every_change_is_observed_after_it_is_made() -> None:
    memory = bytearray(2048)
    seen: list[tuple[str, int, int]] = []

    def observe(event: str) -> None:
        keeper = Journal(memory)
        seen.append((event, len(list(keeper.unretired())), keeper.retired))

    writer = Journal.new(memory, observe=observe)
    writer.publish([1])
    writer.retire(writer.next_generation())
    assert seen == [("keeper.publish", 1, 0), ("keeper.retire", 0, 1)]


def test_header_bytes_are_padded_to_words() -> None:
    notes = header_notes(40, b"123456789")
    assert len(notes) == 4
    assert notes[0] == 10 << 59 | 40 << 3
    assert notes[1] == 9
    assert notes[2].to_bytes(8, "little")[:8] == b"12345678"


def test_the_largest_piece_of_an_extended_image_fits() -> None:
    """Two words an entry: a write over a whole table, with a keeper, needs no more room than was asked for."""
    image = MemoryStorage(name="image")
    write_new(image, NewImage(64 << 20, 16384, extended_l2=True))
    journal = Journal.new(bytearray(160 * 1024))
    disk = open_image(image, backing=None, writable=True, options=QUIET, journal=journal)
    disk.write(0, bytes(range(256)) * (16 << 12))
    disk.write(0, b"x" * (16 << 20))
    disk.close()
