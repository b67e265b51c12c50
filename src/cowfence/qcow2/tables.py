"""Tables in memory: L1, L2, refcount table and refcount blocks, each over the bytes that stand on disk.

On disk every entry is big-endian; in memory a table keeps native integers in an ``array``, because single entries are read
80,000 times a second, and ``array`` does that four times as fast as numpy, while numpy can view the same memory for work on a
whole table. A table knows which of its 512-byte sectors differ from what the last frozen transaction holds (``dirty``), and
whether anything on disk may lead to it (``fresh``: not yet, so its whole first content belongs to PREPARE).

What holds on disk: a sector of a table is written whole, never less, so that it is old or new after a power cut.
"""

from __future__ import annotations

import sys
from array import array
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from cowfence.qcow2.journal import PLACE_BITS
from cowfence.units import SECTOR_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SWAP = sys.byteorder == "little"
_TYPECODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


class Kind(Enum):
    """What a host cluster of metadata holds; the overlap check compares it before every write."""

    HEADER = "header"
    L1 = "L1 table"
    L2 = "L2 table"
    REFCOUNT_TABLE = "refcount table"
    REFCOUNT_BLOCK = "refcount block"
    SNAPSHOT_TABLE = "snapshot table"
    SNAPSHOT_L1 = "snapshot's L1 table"
    BITMAPS = "bitmap directory"
    ENCRYPTION = "encryption header"


KIND_NUMBERS: Final = {Kind.L1: 1, Kind.L2: 2, Kind.REFCOUNT_TABLE: 3, Kind.REFCOUNT_BLOCK: 4}
"""How the journal names the kinds of tables: see ``cowfence.qcow2.journal``."""


class Table:
    """A table of 64-bit entries (L1, L2 or refcount table) at ``offset`` of the file."""

    __slots__ = ("dirty", "entries", "fresh", "frozen", "index", "kind", "offset", "place", "used", "words")

    bits = 64
    """Of a word."""

    def __init__(
        self, kind: Kind, index: int, offset: int, entries: array[int], *, words: int = 1, fresh: bool = False
    ) -> None:
        self.kind = kind
        self.words = words
        """Of an entry: 1, or 2 in an extended L2 table, where ``entries`` are the words."""
        self.index = index
        """L2: the entry of L1 that leads here. L1 and refcount table: 0."""
        self.offset = offset
        self.place = KIND_NUMBERS[kind] << PLACE_BITS | offset << 3
        """The journal's word for the first entry; for entry ``n`` it is ``n * bits`` more."""
        self.entries = entries
        self.dirty: set[int] = set()
        """Sectors changed since the last freeze."""
        self.fresh = fresh
        """Nothing on disk leads here, and no LINK that would has been started."""
        self.frozen = False
        """Part of a transaction that is being committed: what stands on disk may be older than what is here."""
        self.used = True
        """For the cache's second chance."""

    @classmethod
    def from_bytes(cls, kind: Kind, index: int, offset: int, data: bytes | bytearray, *, words: int = 1) -> Table:
        entries = array("Q")
        entries.frombytes(data)
        if _SWAP:
            entries.byteswap()
        return cls(kind, index, offset, entries, words=words)

    @classmethod
    def empty(cls, kind: Kind, index: int, offset: int, length_bytes: int, *, words: int = 1) -> Table:
        """A fresh table of ``length_bytes`` whose entries are all 0."""
        return cls(kind, index, offset, array("Q", bytes(length_bytes)), words=words, fresh=True)

    @classmethod
    def empty_table(cls, length_bytes: int) -> Table:
        """A table of ``length_bytes`` that belongs to no image yet, its entries all 0."""
        return cls.empty(Kind.L2, 0, 0, length_bytes)

    def entry(self, index: int) -> int:
        """One entry, as ``entries`` decodes it. (Where it matters, and entries are words, they are read straight.)"""
        if self.words == 1:
            return self.entries[index]
        return self.entries[2 * index] | self.entries[2 * index + 1] << 64

    def set(self, index: int, value: int) -> None:
        """Change one word; its sector is dirty. Both words of an entry stand in one sector."""
        self.dirty.add(index >> 6)
        self.entries[index] = value

    @property
    def length_bytes(self) -> int:
        return len(self.entries) * 8

    @property
    def pinned(self) -> bool:
        """True if the cache must keep it: what is here is not on disk yet."""
        return bool(self.dirty) or self.frozen or self.fresh

    def sector(self, sector: int) -> bytes:
        """One sector as it stands on disk."""
        part = self.entries[sector << 6 : (sector + 1) << 6]
        if _SWAP:
            part.byteswap()
        return part.tobytes()

    def content(self) -> bytes:
        """The whole table as it stands on disk."""
        if not _SWAP:
            return self.entries.tobytes()
        copy = self.entries[:]
        copy.byteswap()
        return copy.tobytes()

    def view(self) -> NDArray[np.uint64]:
        """The entries as a numpy array over the same memory."""
        import numpy as np

        return np.frombuffer(self.entries, dtype=np.uint64)


class RefcountBlock:
    """One refcount block: a count of ``bits`` bits (1 to 64) for each of the clusters that it covers.

    Widths under a byte are packed from the least significant bit on (specification, "Refcount block entry").
    """

    __slots__ = ("_counts", "bits", "dirty", "fresh", "frozen", "index", "length_bytes", "offset", "place", "used")

    kind = Kind.REFCOUNT_BLOCK

    def __init__(self, index: int, offset: int, bits: int, data: bytes | bytearray, *, fresh: bool = False) -> None:
        self.index = index
        """The entry of the refcount table that leads here."""
        self.offset = offset
        self.place = KIND_NUMBERS[Kind.REFCOUNT_BLOCK] << PLACE_BITS | offset << 3
        self.bits = bits
        self.length_bytes = len(data)
        self._counts: Any
        if bits < 8:
            self._counts = bytearray(data)
        else:
            self._counts = array(_TYPECODES[bits])
            self._counts.frombytes(data)
            if _SWAP:
                self._counts.byteswap()
        self.dirty: set[int] = set()
        self.fresh = fresh
        self.frozen = False
        self.used = True

    @property
    def pinned(self) -> bool:
        return bool(self.dirty) or self.frozen or self.fresh

    def get(self, index: int) -> int:
        bits = self.bits
        if bits >= 8:
            return int(self._counts[index])
        per_byte = 8 // bits
        return int(self._counts[index // per_byte] >> (index % per_byte * bits)) & ((1 << bits) - 1)

    def set(self, index: int, count: int) -> None:
        """Change one count; its sector is dirty. ``count`` must fit (the caller checks, before it changes anything)."""
        bits = self.bits
        self.dirty.add(index * bits // (SECTOR_BYTES * 8))
        if bits >= 8:
            self._counts[index] = count
        else:
            per_byte = 8 // bits
            shift = index % per_byte * bits
            mask = ((1 << bits) - 1) << shift
            at = index // per_byte
            self._counts[at] = self._counts[at] & ~mask | count << shift

    def sector(self, sector: int) -> bytes:
        if self.bits < 8:
            return bytes(self._counts[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
        per_sector = SECTOR_BYTES * 8 // self.bits
        part = self._counts[sector * per_sector : (sector + 1) * per_sector]
        if _SWAP:
            part.byteswap()
        return bytes(part.tobytes())

    def content(self) -> bytes:
        if self.bits < 8:
            return bytes(self._counts)
        part = self._counts[:]
        if _SWAP:
            part.byteswap()
        return bytes(part.tobytes())

    def free_runs(self) -> list[tuple[int, int]]:
        """Runs of clusters whose count is 0, as (first index, number), in order."""
        import numpy as np

        counts = counts_view(self._counts, self.bits)
        if counts.all():
            return []
        zero = np.empty(len(counts) + 2, dtype=np.int8)
        zero[0] = zero[-1] = 0
        zero[1:-1] = counts == 0
        edges = np.flatnonzero(np.diff(zero))
        return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def counts_view(data: Any, bits: int) -> NDArray[Any]:
    """The counts of a block in native order as a numpy array (a view for whole bytes, unpacked for less)."""
    import numpy as np

    if bits >= 8:
        return np.frombuffer(data, dtype=f"u{bits // 8}")
    if bits == 1:
        return np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    packed = np.frombuffer(data, dtype=np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)


def counts_bytes(counts: NDArray[Any], bits: int) -> bytes:
    """The counts of a block as they stand on disk; the reverse of ``counts_view``. They must fit."""
    import numpy as np

    if bits >= 8:
        return counts.astype(f">u{bits // 8}").tobytes()
    if bits == 1:
        return np.packbits(counts.astype(np.uint8), bitorder="little").tobytes()
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed = np.bitwise_or.reduce(counts.astype(np.uint8).reshape(-1, 8 // bits) << shifts, axis=1)
    return bytes(packed.tobytes())


AnyTable = Table | RefcountBlock
