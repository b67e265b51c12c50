"""The crash states of a foreign run, from the device models of ``kill`` and ``power``.

A power cut is walked at two grains. *Operations*: each subset of the operations that no fence covers yet, across all files.
That is a part of the power model which stays small where sectors are many, and most bugs are in it: a fence too few, an entry
before its data. *Sectors*: all of the model, as far as its ``limit`` goes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from cowfence.crash.device import Choice, CrashState, Device, Unit, Version
from cowfence.crash.foreign_run import ForeignRun, operation_range
from cowfence.crash.kill import KillModel
from cowfence.crash.power import PowerModel
from cowfence.storage.oplog import Discard, Done, Fence, Note, Operation, Truncate

Model = Literal["kill", "power"]
Grain = Literal["operations", "sectors"]
"""Of a power cut: which whole operations are missing, or which versions of which sectors."""

_SUBSETS_OF: Final = 10
"""So many un-fenced operations have all their subsets tried."""
_SETTLING: Final = ("flush.end", "tool.end")
"""Notes after which the states of the instant must satisfy more than before."""


class Crash(NamedTuple):
    """What a crash behind entry ``position`` may leave. The state is valid until the walk goes on."""

    position: int
    state: CrashState


class Noted(NamedTuple):
    """A note of the log at its place between the states."""

    position: int
    note: Note


class Walk:
    """Goes along the log of a run. ``limit`` bounds the states of one instant."""

    def __init__(self, run: ForeignRun, model: Model, *, grain: Grain = "sectors", limit: int = 4096, seed: int = 0) -> None:
        self._run = run
        self._limit = limit
        kind = KillModel if model == "kill" else PowerModel if grain == "sectors" else OperationsModel
        self._device: Device = kind(run.initial, limit=limit, seed=seed)

    @property
    def sampled(self) -> bool:
        """States were left out."""
        return self._device.sampled > 0

    def __iter__(self) -> Iterator[Crash | Noted]:
        for position, entry in enumerate(self._run.entries):
            if isinstance(entry, Note):
                yield Noted(position, entry)
            # Where the model samples it would go on far beyond its limit.
            for state in itertools.islice(self._states(position), self._limit):
                yield Crash(position, state)

    def _states(self, position: int) -> Iterator[CrashState]:
        entries, device = self._run.entries, self._device
        entry = entries[position]
        if isinstance(entry, Note):
            return device.settle() if entry.event in _SETTLING else iter(())
        if isinstance(entry, Done):
            operation = entries[entry.position]
            assert not isinstance(operation, Note | Done)
            return device.done(position, entry.position, operation, failed=entry.failed)
        return device.issue(position, entry)


@dataclass(slots=True)
class _Pending:
    """An operation that no fence covers yet, and the versions of units that it made."""

    operation: Operation
    versions: dict[Unit, Version] = field(default_factory=dict)


class OperationsModel(PowerModel):
    """The power model at the grain of operations: each un-fenced one arrives whole or not at all.

    A unit is then at the version that the newest operation on it left that arrived, and a file has the least of its lengths
    that holds what arrived.
    """

    def __init__(self, initial: Mapping[str, bytes], *, limit: int = 4096, seed: int = 0) -> None:
        super().__init__(initial, limit=limit, seed=seed)
        self._pending: dict[int, _Pending] = {}

    def _apply(self, position: int, operation: Operation) -> None:
        self._pending[position] = _Pending(operation)
        super()._apply(position, operation)

    def _version(self, unit: Unit, data: bytes, mark: str, position: int) -> None:
        super()._version(unit, data, mark, position)
        volatile = self._volatile.get(unit)
        if volatile is not None:
            self._pending[position].versions[unit] = volatile.versions[-1]

    def _make_durable(self, file: str, covered: frozenset[int]) -> None:
        super()._make_durable(file, covered)
        for position in [at for at, one in self._pending.items() if one.operation.file == file and at in covered]:
            del self._pending[position]

    def _states(self, newest: int | None) -> Iterator[CrashState]:
        units = sorted(self._volatile)
        versions = [self._volatile[unit].versions for unit in units]
        names = list(self._files)
        lengths = [self._files[name].lengths for name in names]
        pending = list(self._pending.values())
        numbers = {unit: number for number, unit in enumerate(units)}
        moves = [list(_moves(one, numbers, versions)) for one in pending]
        for kept in self._subsets(len(pending), newest_stays=newest is not None):
            pick = [0] * len(units)
            arrived = [one.operation for one, keep in zip(pending, kept, strict=True) if keep]
            for move in itertools.compress(moves, kept):
                for number, version in move:
                    pick[number] = version
            pick += [_length_of(name, had, arrived) for name, had in zip(names, lengths, strict=True)]
            state = self._compose(units, versions, names, lengths, pick)
            choices = [self._choice(one, keep) for one, keep in zip(pending, kept, strict=True)]
            yield CrashState(state.key, state.bases, state.overrides, state.lengths, choices)

    def _subsets(self, count: int, *, newest_stays: bool) -> Iterator[tuple[bool, ...]]:
        """Which of the pending operations arrived. Where there are too many: prefixes and suffixes, one operation that goes
        against the rest, and a sample."""
        last = (True,) if newest_stays else ()
        count -= len(last)
        if count <= _SUBSETS_OF:
            for kept in itertools.product((False, True), repeat=count):
                yield kept + last
            return
        self.sampled += 1
        for corner in (False, True):
            yield (corner,) * count + last
            for first in range(count):
                yield (corner,) * first + (not corner,) * (count - first) + last
                yield (corner,) * first + (not corner,) + (corner,) * (count - first - 1) + last
        for _ in range(self._limit // 4):
            yield tuple(self._random.random() < 0.5 for _ in range(count)) + last

    def _choice(self, one: _Pending, arrived: bool) -> Choice:
        """For reports: the operation as a choice between all of it and nothing."""
        operation = one.operation
        unit = (operation.file, operation_range(operation)[0] // self.unit_bytes)
        return Choice(unit, (Version(unit, b"", "before", -1), Version(unit, b"", operation.mark, 0)), int(arrived))


def _moves(one: _Pending, numbers: Mapping[Unit, int], versions: Sequence[Sequence[Version]]) -> Iterator[tuple[int, int]]:
    """(number of the unit, number of its version) for all that an operation wrote and that is not durable."""
    for unit, wrote in one.versions.items():
        if unit in numbers:
            has = versions[numbers[unit]]
            yield numbers[unit], next((at for at, version in enumerate(has) if version is wrote), 0)


def _length_of(file: str, had: Sequence[tuple[int, int]], arrived: Sequence[Operation]) -> int:
    """Which of the lengths that a file had is the least that holds all that arrived, or the one it was cut to."""
    if len(had) == 1:
        return 0
    length_bytes = had[0][1]
    for operation in arrived:
        if operation.file == file and not isinstance(operation, Discard | Fence):
            first, end = operation_range(operation)
            length_bytes = first if isinstance(operation, Truncate) else max(length_bytes, end)
    # An operation that goes on while its file is cut behind it may end past all lengths that are left.
    length_bytes = min(length_bytes, max(had_bytes for _, had_bytes in had))
    return min((at for at, (_, had_bytes) in enumerate(had) if had_bytes >= length_bytes), key=lambda at: had[at][1])
