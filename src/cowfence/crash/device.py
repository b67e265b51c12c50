"""The device models: which contents a file may have after a crash, given the log of what was done to it.

*Kill*: every completed call survives; the call in flight survives up to any 4 KiB page. *Power*: since the last fence that
covers it, every version of a 512-byte sector is kept, and a state picks one version of each sector independently, and one of
the lengths that the file had. A fence covers the calls that had returned before it was called. A sector never tears.

Both are enumerated along the log. At each operation only the states that contain something of this very operation are new;
the others were given at an earlier point. ``settle`` gives all states of the present instant again: a flush has returned, and
the same states must now satisfy more. While the product of the choices is at most ``limit`` the enumeration is exhaustive;
above it come all states that deviate from "everything arrived" or "nothing arrived" in up to two places, and a seeded sample;
``sampled`` counts how often that was so.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cowfence.storage.oplog import Discard, Fence, Operation, Truncate, Write, Zero
from cowfence.units import SECTOR_BYTES

_PAGE_BYTES = 4096


class CrashState(NamedTuple):
    """A content that the file may have. ``lost``: what of the log it lacks, or has out of order, for a report."""

    content: bytes
    lost: tuple[str, ...]


def _touched(operation: Operation, length: int) -> Iterator[tuple[int, bytes]]:
    """The sectors that an operation changes, with their whole new bytes; ``None`` parts are left to the caller."""
    if isinstance(operation, Write):
        offset, data = operation.offset, operation.data
    elif isinstance(operation, Zero | Discard):
        offset, data = operation.offset, bytes(operation.length_bytes)
        if isinstance(operation, Discard):
            data = data[: max(0, length - offset)]
    else:
        return
    at = 0
    while at < len(data):
        sector = (offset + at) // SECTOR_BYTES
        within = (offset + at) % SECTOR_BYTES
        piece = min(SECTOR_BYTES - within, len(data) - at)
        yield sector * SECTOR_BYTES + within, data[at : at + piece]
        at += piece


class KillModel:
    """States after a killed process, for one file and a log of one thread."""

    def __init__(self, initial: bytes) -> None:
        self._content = bytearray(initial)
        self.sampled = 0

    def issue(self, position: int, operation: Operation) -> Iterator[CrashState]:  # noqa: ARG002 - same shape as PowerModel
        """An operation begins: the states in which it was cut at a page."""
        if not isinstance(operation, Write):
            return
        start, end = operation.offset, operation.offset + len(operation.data)
        cut = (start // _PAGE_BYTES + 1) * _PAGE_BYTES
        while cut < end:
            content = bytearray(self._content)
            _apply(content, start, operation.data[: cut - start])
            yield CrashState(bytes(content), (f"{operation.mark} cut at {cut:#x}",))
            cut += _PAGE_BYTES

    def done(self, operation: Operation, issued: int) -> Iterator[CrashState]:  # noqa: ARG002
        """It has returned: the one state in which it is whole."""
        if isinstance(operation, Truncate):
            del self._content[operation.size_bytes :]
            self._content.extend(bytes(operation.size_bytes - len(self._content)))
        for offset, data in _touched(operation, len(self._content)):
            _apply(self._content, offset, data)
        if not isinstance(operation, Fence):
            yield CrashState(bytes(self._content), ())

    def settle(self) -> Iterator[CrashState]:
        yield CrashState(bytes(self._content), ())


def _apply(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


@dataclass(slots=True)
class _Version:
    issued: int
    data: bytes
    mark: str
    done: int | None = None


@dataclass(slots=True)
class _Sector:
    base: bytes
    versions: list[_Version] = field(default_factory=list)


class PowerModel:
    """States after a power cut, for one file."""

    def __init__(self, initial: bytes, *, limit: int = 4096, seed: int = 0) -> None:
        self._durable = bytearray(initial)
        self._current = bytearray(initial)
        self._sectors: dict[int, _Sector] = {}
        self._lengths: list[tuple[int, int]] = [(-1, len(initial))]
        """(issued at, length): the durable one first."""
        self._ends: dict[int, int] = {}
        self._clock = 0
        self._limit = limit
        self._random = random.Random(seed)
        self.sampled = 0

    def issue(self, position: int, operation: Operation) -> Iterator[CrashState]:
        """An operation begins: the states that hold some of it."""
        self._clock = max(self._clock, position)
        if isinstance(operation, Fence):
            return
        before = len(self._current)
        if isinstance(operation, Truncate):
            size = operation.size_bytes
            del self._current[size:]
            self._current.extend(bytes(size - len(self._current)))
            for sector in range(size // SECTOR_BYTES, -(-before // SECTOR_BYTES)):
                self._version(position, sector, operation.mark)
        for offset, data in _touched(operation, len(self._current)):
            _apply(self._current, offset, data)
            self._version(position, offset // SECTOR_BYTES, operation.mark)
        if len(self._current) != before:
            self._lengths.append((position, len(self._current)))
        yield from self._states(newest=position)

    def _version(self, position: int, number: int, mark: str) -> None:
        start = number * SECTOR_BYTES
        data = bytes(self._current[start : start + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")
        sector = self._sectors.get(number)
        if sector is None:
            base = bytes(self._durable[start : start + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")
            sector = self._sectors[number] = _Sector(base)
        last = sector.versions[-1].data if sector.versions else sector.base
        if data != last:
            sector.versions.append(_Version(position, data, mark))

    def done(self, operation: Operation, issued: int) -> Iterator[CrashState]:
        """It has returned. A fence makes durable what had returned before it was issued."""
        self._ends[issued] = self._clock = self._clock + 1
        if isinstance(operation, Fence):
            self._fence(issued)
        yield from ()

    def _fence(self, issued: int) -> None:
        for number in list(self._sectors):
            sector = self._sectors[number]
            covered = [version for version in sector.versions if version.issued < issued and version.issued in self._ends]
            if covered:
                start = number * SECTOR_BYTES
                _apply(self._durable, start, covered[-1].data)
                sector.base = covered[-1].data
                sector.versions = [version for version in sector.versions if version not in covered]
            if not sector.versions:
                del self._sectors[number]
        covered_lengths = [entry for entry in self._lengths if entry[0] < issued]
        if covered_lengths:
            self._lengths = [(-1, covered_lengths[-1][1])] + [entry for entry in self._lengths if entry[0] >= issued]

    def settle(self) -> Iterator[CrashState]:
        """All states of the present instant."""
        yield from self._states(newest=None)

    def _states(self, newest: int | None) -> Iterator[CrashState]:
        numbers = sorted(self._sectors)
        choices = [len(self._sectors[number].versions) + 1 for number in numbers] + [len(self._lengths)]
        product = 1
        for count in choices:
            product *= count
        picks: Iterator[tuple[int, ...]]
        if product <= self._limit:
            picks = itertools.product(*(range(count) for count in choices))
        else:
            self.sampled += 1
            picks = self._sample(choices)
        for pick in picks:
            if newest is None or self._has(numbers, pick, newest):
                yield self._compose(numbers, pick)

    def _has(self, numbers: list[int], pick: tuple[int, ...], newest: int) -> bool:
        for number, choice in zip(numbers, pick, strict=False):
            if choice and self._sectors[number].versions[choice - 1].issued == newest:
                return True
        return self._lengths[pick[-1]][0] == newest

    def _sample(self, choices: list[int]) -> Iterator[tuple[int, ...]]:
        for corner in ([0] * len(choices), [count - 1 for count in choices]):
            for first, second in itertools.combinations(range(len(choices)), 2):
                for a in range(choices[first]):
                    for b in range(choices[second]):
                        pick = list(corner)
                        pick[first], pick[second] = a, b
                        yield tuple(pick)
        for _ in range(self._limit):
            yield tuple(self._random.randrange(count) for count in choices)

    def _compose(self, numbers: list[int], pick: tuple[int, ...]) -> CrashState:
        length = self._lengths[pick[-1]][1]
        content = bytearray(self._durable[:length])
        content.extend(bytes(length - len(content)))
        lost: list[str] = []
        for number, choice in zip(numbers, pick, strict=False):
            sector = self._sectors[number]
            start = number * SECTOR_BYTES
            if start >= length:
                continue
            data = sector.versions[choice - 1].data if choice else sector.base
            content[start : start + SECTOR_BYTES] = data[: length - start]
            if choice < len(sector.versions):
                lost.append(f"{sector.versions[-1].mark} at {start:#x}")
        if pick[-1] < len(self._lengths) - 1:
            lost.append(f"length {length:#x}")
        return CrashState(bytes(content), tuple(lost))
