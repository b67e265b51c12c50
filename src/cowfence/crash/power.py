"""The power model: what a power cut leaves.

Since the last fence of its file that covers it, every version of a unit of ``unit_bytes`` (512: the proof; 4096: the fast mode)
is kept, and a state picks one version of each unit independently, and for each file one of the lengths that it had. A fence
covers, in its own file, the calls that had returned before it was called. A unit never tears.

While the product of the choices is at most ``limit`` the enumeration is exhaustive. Above it come all states that deviate from
"everything arrived" or "nothing arrived" in up to three places (where there are more pairs or triples than four times
``limit``, a sample of them), and a seeded sample of the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cowfence.crash.device import Choice, CrashState, Device, Unit, Version, absent_key, pieces
from cowfence.storage.oplog import Fence, Operation, Truncate
from cowfence.units import SECTOR_BYTES


@dataclass(slots=True)
class _Volatile:
    """A unit with bytes that no fence covers yet. ``versions[0]`` is the durable one."""

    versions: list[Version]


@dataclass(slots=True)
class _File:
    current: bytearray
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(position, length): the durable one first."""


class PowerModel(Device):
    """States after a power cut."""

    def __init__(
        self, initial: Mapping[str, bytes], *, limit: int = 4096, seed: int = 0, unit_bytes: int = SECTOR_BYTES
    ) -> None:
        super().__init__(initial, limit=limit, seed=seed, unit_bytes=unit_bytes)
        self._files = {file: _File(bytearray(content), [(-1, len(content))]) for file, content in initial.items()}
        self._volatile: dict[Unit, _Volatile] = {}
        self._ended: set[int] = set()
        """Positions of operations that have returned."""
        self._fences: dict[int, frozenset[int]] = {}
        """Fences under way, by position, with what had returned when they were called: what they cover if they return."""

    def issue(self, position: int, operation: Operation) -> Iterator[CrashState]:
        if isinstance(operation, Fence):
            self._fences[position] = frozenset(self._ended)
            return
        self._apply(position, operation)
        yield from self._states(newest=position)

    def _apply(self, position: int, operation: Operation) -> None:
        file = self._files[operation.file]
        current = file.current
        before = len(current)
        touched: list[int] = []
        if isinstance(operation, Truncate):
            size = operation.size_bytes
            del current[size:]
            current.extend(bytes(size - len(current)))
            touched.extend(range(size // self.unit_bytes, -(-before // self.unit_bytes)))
        else:
            put = pieces(operation, before)
            if put is not None and put[1]:
                offset, data = put
                if offset > len(current):
                    current.extend(bytes(offset - len(current)))
                current[offset : offset + len(data)] = data
                touched.extend(range(offset // self.unit_bytes, (offset + len(data) - 1) // self.unit_bytes + 1))
        for number in touched:
            start = number * self.unit_bytes
            self._version(
                (operation.file, number),
                bytes(current[start : start + self.unit_bytes]).ljust(self.unit_bytes, b"\0"),
                operation.mark,
                position,
            )
        if len(current) != before:
            file.lengths.append((position, len(current)))

    def _version(self, unit: Unit, data: bytes, mark: str, position: int) -> None:
        volatile = self._volatile.get(unit)
        if volatile is None:
            old = self.bases[unit[0]].unit(unit[1])
            if old == data:
                return  # bytes that do not change make no state
            volatile = self._volatile[unit] = _Volatile([Version(unit, old, "before", -1)])
        if volatile.versions[-1].data != data:
            volatile.versions.append(Version(unit, data, mark, position))

    def done(self, position: int, issued: int, operation: Operation, *, failed: bool) -> Iterator[CrashState]:  # noqa: ARG002
        if not isinstance(operation, Fence):
            if not failed:
                self._ended.add(issued)
        elif not failed:
            self._make_durable(operation.file, self._fences.pop(issued))
        yield from ()

    def _make_durable(self, file: str, covered: frozenset[int]) -> None:
        for unit in [unit for unit in self._volatile if unit[0] == file]:
            versions = self._volatile[unit].versions
            last = max((at for at, version in enumerate(versions) if version.position in covered), default=0)
            if last:
                self._put(unit, versions[last].data)
                del versions[:last]
            if len(versions) == 1:
                del self._volatile[unit]
        lengths = self._files[file].lengths
        last = max((at for at, (position, _) in enumerate(lengths) if position in covered), default=0)
        del lengths[:last]
        base = self.bases[file].content
        if len(base) > lengths[0][1] and len(lengths) == 1:
            del base[lengths[0][1] :]

    def settle(self) -> Iterator[CrashState]:
        yield from self._states(newest=None)

    def _states(self, newest: int | None) -> Iterator[CrashState]:
        units = sorted(self._volatile)
        versions = [self._volatile[unit].versions for unit in units]
        names = list(self._files)
        lengths = [self._files[name].lengths for name in names]
        counts = [len(one) for one in versions] + [len(one) for one in lengths]
        fresh = [
            at
            for at in range(len(counts))
            if newest is not None
            and (versions[at][-1].position if at < len(units) else lengths[at - len(units)][-1][0]) == newest
        ]
        if newest is not None and not fresh:
            return
        for pick in self._picks(counts, fresh):
            yield self._compose(units, versions, names, lengths, pick)

    def _picks(self, counts: list[int], fresh: list[int]) -> Iterator[Sequence[int]]:
        """Choices of a version for each place; where ``fresh`` is not empty, only those with one of its newest."""
        if math.prod(counts) <= self._limit:
            if not fresh:
                yield from itertools.product(*map(range, counts))
                return
            ranges: list[Sequence[int]] = [range(count) for count in counts]
            for at in fresh:
                # The first of the fresh places at its newest is this one: so no state comes twice.
                ranges[at] = (counts[at] - 1,)
                yield from itertools.product(*ranges)
                ranges[at] = range(counts[at] - 1)
            return
        self.sampled += 1
        seen: set[tuple[int, ...]] = set()
        for pick in self._sample(counts):
            if pick not in seen and (not fresh or any(pick[at] == counts[at] - 1 for at in fresh)):
                seen.add(pick)
                yield pick

    def _sample(self, counts: list[int]) -> Iterator[tuple[int, ...]]:
        movable = [at for at, count in enumerate(counts) if count > 1]
        corners = ([0] * len(counts), [count - 1 for count in counts])
        for corner in corners:
            yield tuple(corner)
            for first, second in self._some(movable, 2):
                for a in range(counts[first]):
                    for b in range(counts[second]):
                        pick = list(corner)
                        pick[first], pick[second] = a, b
                        yield tuple(pick)
        for corner in corners:
            for places in self._some(movable, 3):
                pick = list(corner)
                for at in places:
                    pick[at] = self._random.randrange(counts[at]) if counts[at] > 2 else 1 - pick[at]
                yield tuple(pick)
        for _ in range(self._limit):
            yield tuple(self._random.randrange(count) for count in counts)

    def _some(self, places: list[int], count: int) -> Iterator[Sequence[int]]:
        """All choices of so many places, or, where they are more than four times the limit, some of them."""
        if math.comb(len(places), count) <= 4 * self._limit:
            return itertools.combinations(places, count)
        return (self._random.sample(places, count) for _ in range(self._limit))

    def _compose(
        self,
        units: list[Unit],
        versions: list[list[Version]],
        names: list[str],
        lengths: list[list[tuple[int, int]]],
        pick: Sequence[int],
    ) -> CrashState:
        key = self._key
        overrides: dict[Unit, Version] = {}
        held_lengths = {
            name: lengths[at][choice][1] for at, (name, choice) in enumerate(zip(names, pick[len(units) :], strict=True))
        }
        for unit, has, choice in zip(units, versions, pick, strict=False):
            if unit[1] * self.unit_bytes >= held_lengths[unit[0]]:
                key ^= has[0].key ^ absent_key(unit)  # whatever was written there is cut off
            elif choice:
                overrides[unit] = has[choice]
                key ^= has[0].key ^ has[choice].key
        choices = _Choices(units, versions, pick)
        return CrashState((key, tuple(held_lengths.values())), self.bases, overrides, held_lengths, choices)


class _Choices(Sequence[Choice]):
    """The choices of a state, made when somebody asks: hardly any state is asked."""

    __slots__ = ("_pick", "_units", "_versions")

    def __init__(self, units: list[Unit], versions: list[list[Version]], pick: Sequence[int]) -> None:
        self._units = units
        self._versions = versions
        self._pick = pick

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: Any) -> Any:
        return Choice(self._units[index], tuple(self._versions[index]), self._pick[index])
