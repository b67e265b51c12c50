"""The kill model: what a killed process leaves.

Every completed call survives; of the calls in flight any subset survives, each cut at any 4 KiB page. For a run of one thread
these are the prefixes of the log, the last write cut at each page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from cowfence.crash.device import Choice, CrashState, Device, Unit, Version, cut_into_units, pieces
from cowfence.storage.oplog import Fence, Operation, Truncate, Write, Zero
from cowfence.units import SECTOR_BYTES

PAGE_BYTES: Final = 4096


@dataclass(slots=True)
class _Flight:
    position: int
    operation: Operation
    may_stop: bool = False
    """Its call failed: any part of it may have arrived, for good."""


class KillModel(Device):
    """States after a killed process."""

    def __init__(
        self, initial: Mapping[str, bytes], *, limit: int = 4096, seed: int = 0, unit_bytes: int = SECTOR_BYTES
    ) -> None:
        super().__init__(initial, limit=limit, seed=seed, unit_bytes=unit_bytes)
        self._flights: list[_Flight] = []

    def issue(self, position: int, operation: Operation) -> Iterator[CrashState]:
        if isinstance(operation, Fence):
            return
        self._flights.append(_Flight(position, operation))
        yield from self._states(newest=position)

    def done(self, position: int, issued: int, operation: Operation, *, failed: bool) -> Iterator[CrashState]:  # noqa: ARG002
        flight = next((flight for flight in self._flights if flight.position == issued), None)
        if flight is None:
            return
        if failed:
            flight.may_stop = True
            return
        self._flights.remove(flight)
        if isinstance(operation, Truncate):
            self._truncate(operation)
        else:
            for unit, data in self._changes([(operation, None)]).items():
                self._put(unit, data)
        yield from ()

    def _truncate(self, operation: Truncate) -> None:
        base, size = self.bases[operation.file], operation.size_bytes
        numbers = range(size // self.unit_bytes, -(-len(base.content) // self.unit_bytes))
        for number in numbers:
            self._key ^= base.key(number)
            base.keys.pop(number)
        del base.content[size:]
        base.content.extend(bytes(size - len(base.content)))
        for number in numbers:
            self._key ^= base.key(number)

    def settle(self) -> Iterator[CrashState]:
        yield from self._states(newest=None)

    def _states(self, newest: int | None) -> Iterator[CrashState]:
        """Every choice of how far each call in flight came: not at all, up to a page, or whole."""
        flights = self._flights
        choices = []
        for flight in flights:
            cuts: list[int | None] = _page_cuts(flight.operation)
            choices.append(cuts if flight.position == newest else [0, *cuts])
        product = math.prod(len(cuts) for cuts in choices)
        picks: Iterator[tuple[int | None, ...]] = itertools.product(*choices)
        if product > self._limit:
            self.sampled += 1
            picks = itertools.chain(
                itertools.islice(picks, self._limit // 2),
                (tuple(self._random.choice(cuts) for cuts in choices) for _ in range(self._limit // 2)),
            )
        for pick in picks:
            yield self._state([(f.operation, cut) for f, cut in zip(flights, pick, strict=True)])

    def _state(self, arrived: list[tuple[Operation, int | None]]) -> CrashState:
        overrides = {unit: Version(unit, data, "", 0) for unit, data in self._changes(arrived).items()}
        key = self._key
        for unit, version in overrides.items():
            key ^= self.bases[unit[0]].key(unit[1]) ^ version.key
        lengths = {file: len(base.content) for file, base in self.bases.items()}
        for operation, cut in arrived:
            lengths[operation.file] = _length_after(operation, cut, lengths[operation.file])
        choices = [_cut_choice(operation, cut, self.unit_bytes) for operation, cut in arrived]
        return CrashState((key, tuple(lengths.values())), self.bases, overrides, lengths, choices)

    def _changes(self, arrived: list[tuple[Operation, int | None]]) -> dict[Unit, bytes]:
        """The units that these operations change, cut where said, with their bytes afterwards."""
        now: dict[Unit, bytearray] = {}
        lengths = {file: len(base.content) for file, base in self.bases.items()}
        for operation, cut in arrived:
            file = operation.file
            if isinstance(operation, Truncate):
                if cut is None:
                    for number in range(operation.size_bytes // self.unit_bytes, -(-lengths[file] // self.unit_bytes)):
                        data = now.setdefault((file, number), bytearray(self.bases[file].unit(number)))
                        keep = max(0, operation.size_bytes - number * self.unit_bytes)
                        data[keep:] = bytes(self.unit_bytes - keep)
            else:
                put = pieces(operation, lengths[file])
                offset, whole = put if put is not None else (0, b"")
                for number, within, piece in cut_into_units(offset, whole if cut is None else whole[:cut], self.unit_bytes):
                    data = now.setdefault((file, number), bytearray(self.bases[file].unit(number)))
                    data[within : within + len(piece)] = piece
            lengths[file] = _length_after(operation, cut, lengths[file])
        return {unit: bytes(data[: max(0, lengths[unit[0]] - unit[1] * self.unit_bytes)]) for unit, data in now.items()}


def _cut_choice(operation: Operation, cut: int | None, unit_bytes: int) -> Choice:
    """For reports: a call in flight as a choice between nothing of it, its pages, and all of it."""
    unit = (operation.file, getattr(operation, "offset", 0) // unit_bytes)
    versions = [Version(unit, b"", "before", -1), *(Version(unit, b"", operation.mark, 0) for _ in _page_cuts(operation))]
    if cut is None:
        return Choice(unit, versions, len(versions) - 1)
    return Choice(unit, versions, 0 if cut == 0 else _page_cuts(operation).index(cut) + 1)


def _page_cuts(operation: Operation) -> list[int | None]:
    """How many bytes of it may have arrived, above none; None: all."""
    if not isinstance(operation, Write | Zero):
        return [None]
    length_bytes = len(operation.data) if isinstance(operation, Write) else operation.length_bytes
    first = PAGE_BYTES - operation.offset % PAGE_BYTES
    return [*range(first, length_bytes, PAGE_BYTES), None]


def _length_after(operation: Operation, cut: int | None, length_bytes: int) -> int:
    if isinstance(operation, Truncate):
        return operation.size_bytes if cut is None else length_bytes
    if isinstance(operation, Write | Zero) and cut != 0:
        whole = len(operation.data) if isinstance(operation, Write) else operation.length_bytes
        return max(length_bytes, operation.offset + (whole if cut is None else cut)) if whole else length_bytes
    return length_bytes
