"""The bits of a dirty bitmap in memory: one for each granule of the disk, packed as they stand on disk.

Bit ``n`` is bit ``n % 8`` of byte ``n // 8`` (specification, "Bitmap data"). A disk of 1 TiB at 64 KiB has 2 MiB of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from cowfence.units import div_up

_WINDOW_BITS: Final = 1 << 16


class DirtyBits:
    """Which granules of ``1 << granularity_bits`` bytes of a disk of ``size_bytes`` were written to."""

    def __init__(self, granularity_bits: int, size_bytes: int, packed: bytes | bytearray | None = None) -> None:
        self.granularity_bits = granularity_bits
        self.size_bytes = size_bytes
        length = div_up(self.count, 8)
        self.packed = bytearray(length) if packed is None else bytearray(packed[:length].ljust(length, b"\0"))
        self._cut()

    @property
    def count(self) -> int:
        """How many bits there are."""
        return div_up(self.size_bytes, 1 << self.granularity_bits)

    def _cut(self) -> None:
        """Bits behind the last one are 0."""
        extra = len(self.packed) * 8 - self.count
        if extra:
            self.packed[-1] &= 0xFF >> extra

    def mark(self, offset: int, length_bytes: int) -> None:
        """A range was written to: all granules that it touches are dirty."""
        if length_bytes <= 0:
            return
        first = offset >> self.granularity_bits
        last = offset + length_bytes - 1 >> self.granularity_bits
        packed = self.packed
        if first == last:
            packed[first >> 3] |= 1 << (first & 7)
            return
        start, stop = first >> 3, last >> 3
        head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> 7 - (last & 7)
        if start == stop:
            packed[start] |= head & tail
            return
        packed[start] |= head
        packed[start + 1 : stop] = b"\xff" * (stop - start - 1)
        packed[stop] |= tail

    def clear(self) -> None:
        self.packed = bytearray(len(self.packed))

    def resize(self, size_bytes: int) -> None:
        """Follow the disk; what is new is clean, for nobody has written there."""
        self.size_bytes = size_bytes
        length = div_up(self.count, 8)
        del self.packed[length:]
        self.packed.extend(bytes(length - len(self.packed)))
        self._cut()

    def merge(self, other: DirtyBits) -> None:
        """Dirty wherever ``other`` is, which may have another granularity."""
        if other.granularity_bits == self.granularity_bits:
            length = min(len(self.packed), len(other.packed))
            mine = np.frombuffer(self.packed, np.uint8)
            mine[:length] |= np.frombuffer(other.packed, np.uint8)[:length]
            self._cut()
            return
        for offset, length_bytes in other.ranges():
            inside = min(length_bytes, self.size_bytes - offset)
            self.mark(offset, inside)

    def ranges(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The dirty ranges (offset, length in bytes) of the granules between two offsets, in order; the last ends as the disk.
        They are looked for as they are asked for: there may be millions."""
        bits_end = self.count if end is None else min(self.count, div_up(end, 1 << self.granularity_bits))
        bits_start = offset >> self.granularity_bits
        start = stop = bits_start  # the run that is not told yet
        for window in range(bits_start & -8, bits_end, _WINDOW_BITS):
            packed = bytes(self.packed[window >> 3 : (window + _WINDOW_BITS) >> 3])
            count = min(_WINDOW_BITS, bits_end - window)
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=count)
            bits[: max(0, bits_start - window)] = 0
            edges = (np.flatnonzero(np.diff(np.concatenate(([0], bits, [0])).astype(np.int8))) + window).tolist()
            for first, last in zip(edges[::2], edges[1::2], strict=True):
                if first > stop:
                    if start < stop:
                        yield self._bytes_of(start, stop)
                    start = first
                stop = last
        if start < stop:
            yield self._bytes_of(start, stop)

    def _bytes_of(self, start: int, stop: int) -> tuple[int, int]:
        offset = start << self.granularity_bits
        return offset, min(stop << self.granularity_bits, self.size_bytes) - offset

    def dirty_bytes(self) -> int:
        """How many bytes of the disk are dirty."""
        return sum(length_bytes for _, length_bytes in self.ranges())
