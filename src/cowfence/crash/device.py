"""What the device models share: contents that are a base and what differs from it, and a log that is walked.

A model is fed the log, one operation after the other. At each operation it gives the states that contain something of this
very operation; the others were given at an earlier point. ``settle`` gives all states of the present instant again: a flush
has returned, and the same states must now satisfy more.

A state is not composed until somebody asks for its bytes: it is a base and the units that differ from it, and its ``key`` is
the exclusive or of hashes of (file, unit, bytes), so that the same content has the same key wherever it comes up.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple, TypeAlias

from cowfence.storage.oplog import Discard, Operation, Write, Zero

PAGE_BYTES: Final = 4096
Unit: TypeAlias = tuple[str, int]
"""(file, number of the unit in it)."""


@lru_cache(maxsize=64)
def _salt(file: str) -> bytes:
    return blake2b(file.encode(), digest_size=8).digest()


def _hash(unit: Unit, data: bytes) -> int:
    # Without the zeros at the end: a unit that the end of the file cuts counts as filled up with them.
    data = data.rstrip(b"\0")
    return int.from_bytes(blake2b(data, digest_size=16, salt=_salt(unit[0]) + unit[1].to_bytes(8, "big")).digest(), "big")


@lru_cache(maxsize=1 << 16)
def absent_key(unit: Unit) -> int:
    """The key of a unit of zeros, or one past the end of its file."""
    return _hash(unit, b"")


class Version:
    """Bytes that a unit had at some time. ``position``: of the operation that wrote them; -1: there before the log."""

    __slots__ = ("data", "key", "mark", "position")

    def __init__(self, unit: Unit, data: bytes, mark: str, position: int) -> None:
        self.data = data
        self.key = _hash(unit, data)
        self.mark = mark
        self.position = position


class Choice(NamedTuple):
    """What a state holds of one unit: ``versions[held]``; the first is durable, the last is the newest."""

    unit: Unit
    versions: Sequence[Version]
    held: int


class Base:
    """One file's bytes, with the keys of its units as far as they were asked for."""

    __slots__ = ("content", "file", "keys", "unit_bytes")

    def __init__(self, file: str, content: bytes, unit_bytes: int) -> None:
        self.file = file
        self.content = bytearray(content)
        self.unit_bytes = unit_bytes
        self.keys: dict[int, int] = {}

    def unit(self, number: int) -> bytes:
        start = number * self.unit_bytes
        return bytes(self.content[start : start + self.unit_bytes]).ljust(self.unit_bytes, b"\0")

    def key(self, number: int) -> int:
        key = self.keys.get(number)
        if key is None:
            key = self.keys[number] = _hash((self.file, number), self.unit(number))
        return key

    def put(self, number: int, data: bytes) -> None:
        """Set one unit, growing the content where needed."""
        start = number * self.unit_bytes
        if start > len(self.content):
            self.content.extend(bytes(start - len(self.content)))
        self.content[start : start + self.unit_bytes] = data
        self.keys.pop(number, None)


class CrashState:
    """Contents that the files may have. Valid until the model goes on; ``contents`` takes them out for good."""

    __slots__ = ("_choices", "bases", "key", "lengths", "overrides")

    def __init__(
        self,
        key: tuple[int, tuple[int, ...]],
        bases: Mapping[str, Base],
        overrides: Mapping[Unit, Version],
        lengths: Mapping[str, int],
        choices: Sequence[Choice],
    ) -> None:
        self.key = key
        self.bases = bases
        self.overrides = overrides
        self.lengths = lengths
        self._choices = choices

    @property
    def choices(self) -> list[Choice]:
        """Everything about which there was a choice, in order of its place."""
        return [choice for choice in self._choices if len(choice.versions) > 1]

    def unit_key(self, unit: Unit) -> int:
        version = self.overrides.get(unit)
        return version.key if version is not None else self.bases[unit[0]].key(unit[1])

    def unit_data(self, unit: Unit) -> bytes:
        """The bytes of a unit, zeros where the file has ended."""
        base = self.bases[unit[0]]
        version = self.overrides.get(unit)
        data = version.data if version is not None else base.unit(unit[1])
        left = max(0, self.lengths[unit[0]] - unit[1] * base.unit_bytes)
        return data[:left].ljust(base.unit_bytes, b"\0") if left < len(data) else data.ljust(base.unit_bytes, b"\0")

    def contents(self) -> dict[str, bytes]:
        """The bytes of each file."""
        whole = {}
        for file, base in self.bases.items():
            length = self.lengths[file]
            content = bytearray(base.content[:length])
            content.extend(bytes(length - len(content)))
            for (owner, number), version in self.overrides.items():
                start = number * base.unit_bytes
                if owner == file and start < length:
                    content[start : start + base.unit_bytes] = version.data[: length - start]
            whole[file] = bytes(content)
        return whole

    def lost(self) -> tuple[str, ...]:
        """What the state lacks of all that was written, by mark and place."""
        return tuple(
            f"{choice.versions[-1].mark} at {choice.unit[1] * self.bases[choice.unit[0]].unit_bytes:#x}"
            for choice in self.choices
            if choice.held < len(choice.versions) - 1
        )


class Device(ABC):
    """What both models share: the bytes as they are when everything has arrived."""

    def __init__(self, initial: Mapping[str, bytes], *, limit: int, seed: int, unit_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self.bases = {file: Base(file, content, unit_bytes) for file, content in initial.items()}
        self.sampled = 0
        """At how many instants the states were a sample."""
        self._limit = limit
        self._random = random.Random(seed)
        self._key = 0
        """The key of the bases, relative to how they were at first."""

    @abstractmethod
    def issue(self, position: int, operation: Operation) -> Iterator[CrashState]:
        """An operation begins: the states that hold some of it."""

    @abstractmethod
    def done(self, position: int, issued: int, operation: Operation, *, failed: bool) -> Iterator[CrashState]:
        """It has returned."""

    @abstractmethod
    def settle(self) -> Iterator[CrashState]:
        """All states of the present instant."""

    def _put(self, unit: Unit, data: bytes) -> None:
        base = self.bases[unit[0]]
        before = base.key(unit[1])
        base.put(unit[1], data)
        self._key ^= before ^ base.key(unit[1])


def pieces(operation: Operation, length_bytes: int) -> tuple[int, bytes] | None:
    """The bytes that a write, zero or discard puts, and where; ``length_bytes``: of the file then. None for others."""
    if isinstance(operation, Write):
        return operation.offset, operation.data
    if isinstance(operation, Zero):
        return operation.offset, bytes(operation.length_bytes)
    if isinstance(operation, Discard):
        return operation.offset, bytes(max(0, min(operation.length_bytes, length_bytes - operation.offset)))
    return None


def cut_into_units(offset: int, data: bytes, unit_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """(unit number, offset within it, bytes) for each unit that the bytes touch."""
    at = 0
    while at < len(data):
        number, within = divmod(offset + at, unit_bytes)
        piece = data[at : at + unit_bytes - within]
        yield number, within, piece
        at += len(piece)
