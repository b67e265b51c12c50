"""The crash states of a foreign run: several files, one order.

The kill and the power model are ``crash.kill``'s and ``crash.power``'s. A power cut is walked at two grains. *Operations*: each
subset of the operations that no fence covers yet, across all files, in its order. That is a part of the power model (each
sector is then at one of its versions) which stays small where sectors are many, and most bugs are in it: a fence too few, an
entry before its data. *Sectors*: all of the model.

This module is the only one of the foreign judge that asks the device models.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cowfence.crash.device import CrashState, Device
from cowfence.crash.foreign_run import ForeignRun, apply
from cowfence.crash.kill import KillModel
from cowfence.crash.power import PowerModel
from cowfence.storage.oplog import Done, Fence, Note, Operation

Model = Literal["kill", "power"]
Grain = Literal["operations", "sectors"]
"""Of a power cut: which whole operations are missing, or which versions of which sectors."""

_SUBSETS_OF = 10
"""So many un-fenced operations have all their subsets tried."""
_SETTLING = ("flush.end", "tool.end")
"""Notes after which the states of the instant must satisfy more than before."""


class CrashedFiles(NamedTuple):
    """What the files hold after a crash behind entry ``position``. ``missing``: what of the log did not arrive."""

    position: int
    files: Mapping[str, bytes]
    missing: tuple[str, ...]


class Noted(NamedTuple):
    """A note of the log at its place between the states."""

    position: int
    note: Note


@dataclass(frozen=True, slots=True)
class _Pending:
    position: int
    operation: Operation


class Walk:
    """Goes along the log of a run. ``limit`` bounds the states of one instant; ``sampled`` says that it cut some off."""

    def __init__(self, run: ForeignRun, model: Model, *, grain: Grain = "sectors", limit: int = 4096, seed: int = 0) -> None:
        self._run = run
        self._power = model == "power"
        self._whole = self._power and grain == "operations"
        self._limit = limit
        self._random = random.Random(seed)
        self._current = {name: bytes(content) for name, content in run.initial.items()}
        self._durable = dict(self._current)
        self._pending: list[_Pending] = []
        self._ended: dict[int, int] = {}
        model_of = PowerModel if self._power else KillModel
        self._device: Device = model_of(run.initial, limit=limit, seed=seed)
        self.sampled = False
        """States were left out."""

    def __iter__(self) -> Iterator[CrashedFiles | Noted]:
        for position, entry in enumerate(self._run.entries):
            if isinstance(entry, Note):
                yield Noted(position, entry)
                if entry.event in _SETTLING:
                    yield from self._settle(position)
            elif isinstance(entry, Done):
                if not entry.failed:
                    yield from self._done(position, entry.position)
            else:
                yield from self._issue(position, entry)

    def _issue(self, position: int, operation: Operation) -> Iterator[CrashedFiles]:
        if self._whole:
            if not isinstance(operation, Fence):
                new = _Pending(position, operation)
                yield from self._subsets(position, new)
                self._pending.append(new)
            return
        yield from self._crashed(position, self._device.issue(position, operation))

    def _crashed(self, position: int, states: Iterator[CrashState]) -> Iterator[CrashedFiles]:
        for state in self._bounded(states):
            yield CrashedFiles(position, state.contents(), state.lost())
        self.sampled |= self._device.sampled > 0

    def _bounded(self, states: Iterator[CrashState]) -> Iterator[CrashState]:
        yield from itertools.islice(states, self._limit)
        if next(states, None) is not None:
            self.sampled = True

    def _done(self, position: int, issued: int) -> Iterator[CrashedFiles]:
        operation = self._run.entries[issued]
        assert not isinstance(operation, Note | Done)
        name = operation.file
        self._ended[issued] = position
        if isinstance(operation, Fence):
            self._fence(name, issued)
        else:
            content = bytearray(self._current[name])
            apply(content, operation)
            self._current[name] = bytes(content)
        if self._whole:
            return
        yield from self._crashed(position, self._device.done(position, issued, operation, failed=False))

    def _fence(self, name: str, issued: int) -> None:
        covered = [
            one for one in self._pending if one.operation.file == name and self._ended.get(one.position, issued) < issued
        ]
        if covered:
            content = bytearray(self._durable[name])
            for one in covered:
                apply(content, one.operation)
            self._durable[name] = bytes(content)
            self._pending = [one for one in self._pending if one not in covered]

    def _settle(self, position: int) -> Iterator[CrashedFiles]:
        if not self._power:
            yield CrashedFiles(position, dict(self._current), ())
            return
        if self._whole:
            yield from self._subsets(position, None)
            return
        yield from self._crashed(position, self._device.settle())

    def _subsets(self, position: int, new: _Pending | None) -> Iterator[CrashedFiles]:
        """The states in which whole operations are missing; with ``new``, those that have it."""
        for kept in self._choices(len(self._pending)):
            chosen = [one for one, keep in zip(self._pending, kept, strict=True) if keep]
            missing = tuple(one.operation.mark for one, keep in zip(self._pending, kept, strict=True) if not keep)
            contents = {name: bytearray(content) for name, content in self._durable.items()}
            for one in (*chosen, new) if new else chosen:
                apply(contents[one.operation.file], one.operation)
            yield CrashedFiles(position, {name: bytes(content) for name, content in contents.items()}, missing)

    def _choices(self, count: int) -> Iterator[tuple[bool, ...]]:
        if count <= _SUBSETS_OF:
            yield from itertools.product((False, True), repeat=count)
            return
        self.sampled = True
        for corner in (False, True):
            yield (corner,) * count
            for first in range(count):
                # A prefix or a suffix of the pending operations, and one operation that goes against the rest.
                yield (corner,) * first + (not corner,) * (count - first)
                yield (corner,) * first + (not corner,) + (corner,) * (count - first - 1)
        for _ in range(self._limit // 4):
            yield tuple(self._random.random() < 0.5 for _ in range(count))
