"""The journal: the pending transaction in memory that outlives the writer (crash contract, "Keeper").

A killed process loses what it held in memory only, and that is the metadata of writes which it has acknowledged and not yet
committed. So each change is noted here too, in memory that the writer shares with its keeper, before the write is
acknowledged; when the writer dies, ``replay`` carries the notes out. The memory is any writable buffer: the crash explorer
uses a ``bytearray``.

**Form.** 64-bit words in the host's byte order: a head, then two areas of equal size. An area holds *groups* one behind the
other: the generation, the number of words of *notes*, these, and the CRC-32 of all that. A group is what one call did; a
generation is what one commit freezes, and stands whole in one area.

**Append only.** A group is written behind the last one, and made visible by one store of the area's count word. Nothing
visible is ever written again. A generation begins in the other area if all that stands there is retired; the count word of
that area is set to 0 by one store first, so that a death at any instant shows retired groups, or none. Generations only grow,
and the retired word names the last one that is done with.

**Bounded.** An operation asks for room before it begins (``room_words``) and commits first where there is none; nothing is
ever left out. So that the notes of a large table are small, a copied table is noted as a copy: what it is copied from stands
on disk untouched until the transaction is retired.

**Notes.** The first word of each is (tag << 59 | place); places are in bits from the start of the file, but for FREED.

=============  ==============================  ==========================================================
tag            place                           more words
=============  ==============================  ==========================================================
1 to 4         of an entry or a count          its new value (absolute, so that doing it twice is harmless)
FRESH          of a new table, all zeros       length in bytes << 8 | kind
COPY           of a new table                  the same, then place and length in bytes of what it begins as
HEADER         of bytes in sector 0            their length, then the bytes, padded to whole words
FREED          first host cluster              number of clusters << 1 | it held a table
=============  ==============================  ==========================================================
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterator
from struct import pack_into
from typing import Final, NamedTuple, TypeAlias
from zlib import crc32

from cowfence.errors import CowfenceError, NotThisFormat

Memory: TypeAlias = "bytearray | memoryview | mmap.mmap"

PLACE_BITS: Final = 59
PLACE_MASK: Final = (1 << PLACE_BITS) - 1
FRESH: Final = 8
COPY: Final = 9
HEADER: Final = 10
FREED: Final = 11

_MAGIC: Final = int.from_bytes(b"cowfenc\x01", "big")
"""The last byte is the version of all that is described above."""
_MAGIC_AT, _RETIRED_AT, _FENCE_AT, _CLOSED_AT = 0, 1, 2, 3
_COUNT_AT, _FIRST_AT = (4, 5), (6, 7)
"""By area: words that are visible, and the generation that it begins with."""
_HEAD_WORDS: Final = 8
_GROUP_WORDS: Final = 3

_NO_FENCE, _INSIDE, _FAILED = 0, 1, 2


class Group(NamedTuple):
    """The notes of one call."""

    generation: int
    notes: array[int]


class Journal:
    """Notes in ``memory``. The writer's methods are called under the image's lock.

    ``observe`` is called after each change that a keeper could see, with its name: the recorder's hook.
    """

    def __init__(self, memory: Memory, *, observe: Callable[[str], object] | None = None) -> None:
        """Read what is there. Raises NotThisFormat."""
        self._bytes = memoryview(memory).cast("B")
        self._words = words = self._bytes.cast("Q")
        self._area_words = (len(words) - _HEAD_WORDS) // 2
        self._observe = observe
        if self._area_words < _GROUP_WORDS or words[_MAGIC_AT] != _MAGIC:
            raise NotThisFormat("journal", "not a journal of this version")
        self._area = 0
        self._used = words[_COUNT_AT[0]]
        self._begun = 0
        """Words of the area that belong to earlier generations than ``generation``."""
        self.generation = 1
        """What is noted now belongs to it."""
        self.damaged = False
        """``unretired`` met a wrong checksum: notes are lost."""
        self.operation_words = _GROUP_WORDS
        """The most that one operation can note. See ``expect``."""
        self.room_words = self._area_words - self._used - self.operation_words
        """With more notes than this to be published, an operation must not begin. Hot paths read it directly."""

    @staticmethod
    def clear(memory: Memory) -> None:
        """Make all of ``memory``, whose length in bytes is a multiple of 8, an empty journal."""
        head = array("Q", bytes(_HEAD_WORDS * 8))
        head[_FIRST_AT[0]] = 1
        head[_MAGIC_AT] = _MAGIC
        memoryview(memory).cast("B")[: _HEAD_WORDS * 8] = head.tobytes()

    @classmethod
    def new(cls, memory: Memory, *, observe: Callable[[str], object] | None = None) -> Journal:
        """An empty journal over ``memory``."""
        cls.clear(memory)
        return cls(memory, observe=observe)

    def snapshot(self) -> bytes:
        """The whole memory as it is now."""
        return self._words.tobytes()

    # The writer's side

    def expect(self, operation_words: int) -> None:
        """An operation notes at most so many words: known when the image is opened, from the size of its tables."""
        self.operation_words = operation_words + _GROUP_WORDS
        self.room_words = self._area_words - self._used - self.operation_words

    def publish(self, notes: list[int]) -> None:
        """Make the notes of finished calls visible."""
        count = len(notes)
        used = self._used + count + _GROUP_WORDS
        if used > self._area_words:
            # Callers ask for room; an operation that is not noted must not be acknowledged.
            raise CowfenceError("the journal is full")
        at = _HEAD_WORDS + self._area * self._area_words + self._used
        last = at + count + 2
        pack_into(f"{count + 2}Q", self._bytes, at << 3, self.generation, count, *notes)
        self._words[last] = crc32(self._bytes[at << 3 : last << 3])
        self._words[_COUNT_AT[self._area]] = used
        self._used = used
        self.room_words = self._area_words - used - self.operation_words
        if self._observe is not None:
            self._observe("keeper.publish")

    def next_generation(self) -> int:
        """A commit freezes what was noted: later notes are of the next generation. Returns the frozen one."""
        frozen = self.generation
        self.generation = frozen + 1
        self._begun = self._used
        self._turn()
        return frozen

    def _turn(self) -> None:
        """Go on in the other area, where that is free. Nothing of this generation is visible yet."""
        # The other area's generations are all older than what this area began with.
        if self._words[_FIRST_AT[self._area]] - 1 <= self._words[_RETIRED_AT]:
            self._area = 1 - self._area
            self._words[_COUNT_AT[self._area]] = 0
            self._words[_FIRST_AT[self._area]] = self.generation
            self._used = self._begun = 0
            self.room_words = self._area_words - self.operation_words

    def retire(self, generation: int) -> None:
        """Everything up to ``generation`` is durable. Before the clusters that it freed become available, or are punched."""
        self._words[_RETIRED_AT] = generation
        if 0 < self._used == self._begun:
            # After a commit that failed this area holds old generations, too.
            self._turn()
        if self._observe is not None:
            self._observe("keeper.retire")

    def fence_begins(self) -> None:
        """From here to ``fence_ended`` nobody knows what reached the disk."""
        self._words[_FENCE_AT] = _INSIDE

    def fence_ended(self) -> None:
        self._words[_FENCE_AT] = _NO_FENCE

    def fence_failed(self) -> None:
        """For good: what the kernel holds may never reach the disk, and nothing may be built upon it."""
        self._words[_FENCE_AT] = _FAILED

    def close(self) -> None:
        """The image was closed in order (or its writer was told that it could not be): nobody has to do anything."""
        self._words[_CLOSED_AT] = 1

    def disown(self) -> None:
        """In a forked child: the journal is the parent's."""

    def release(self) -> None:
        """Let go of the memory. The journal cannot be used any more."""
        self._words.release()
        self._bytes.release()

    # The keeper's side

    @property
    def closed(self) -> bool:
        return bool(self._words[_CLOSED_AT])

    @property
    def poisoned(self) -> bool:
        """A fence failed, and the writer lived to see it."""
        return self._words[_FENCE_AT] == _FAILED

    @property
    def retired(self) -> int:
        """The last generation that is done with."""
        return self._words[_RETIRED_AT]

    def unretired(self) -> Iterator[Group]:
        """What is to be done, oldest first; ends where a checksum is wrong, for all behind it may rely on what was lost."""
        last = 0
        for area in sorted((0, 1), key=lambda area: self._words[_FIRST_AT[area]]):
            begin = _HEAD_WORDS + area * self._area_words
            visible = self._words[begin : begin + min(self._words[_COUNT_AT[area]], self._area_words)]
            while visible:
                if len(visible) < _GROUP_WORDS or visible[1] > len(visible) - _GROUP_WORDS or visible[0] < last:
                    self.damaged = True
                    return
                last, end = visible[0], visible[1] + 2
                if crc32(visible[:end]) != visible[end]:
                    self.damaged = True
                    return
                if last > self.retired:
                    yield Group(last, array("Q", visible[2:end]))
                visible = visible[end + 1 :]


def header_notes(offset: int, data: bytes) -> list[int]:
    """The note of a change of header bytes."""
    padded = data + bytes(-len(data) % 8)
    return [HEADER << PLACE_BITS | offset << 3, len(data), *memoryview(padded).cast("Q")]
