"""The guest's side: what each sector of its disk, and each fact about the image, may be after a crash.

A sector is its value at the last returned flush, or a value written to that very sector since (crash contract, C2 and C3). The
model follows the notes of the log: a write makes its values possible when it begins; a flush that returns makes what was
acknowledged before it the only past that is left. A *fact* (size, snapshots, backing file, features) is old or new while an
operation changes it, and new from the moment that the operation returns (C6 to C9).

An *alteration* changes the image as a whole, and facts with it. It may put another disk in the place of the guest's: until it
returns a state shows the one or the other, never a mix (C7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from cowfence.units import SECTOR_BYTES

_ZERO: Final = bytes(SECTOR_BYTES)
_BITMAP_CLUSTERS: Final = 6
"""What storing a bitmap may leave over: table and bits, old and new, and the directory's share."""
_ANY_NUMBER: Final = 1 << 62


Moment: TypeAlias = "tuple[bytes, Mapping[int, set[bytes]]]"
"""The disk's content, and by sector what else may stand there, for the guest cannot know (a discard)."""


class Handover(NamedTuple):
    """``next_bitmap`` takes over. ``good``: the backup is known to be good, so that the other bitmap may be gone."""

    next_bitmap: bytes
    good: bool = False


@dataclass(slots=True)
class _Values:
    serial: int
    values: tuple[bytes, ...]
    """More than one where the guest cannot know (a discard leaves the old bytes or zeros)."""
    acknowledged: bool


@dataclass(slots=True)
class GuestModel:
    """Possible values of each sector of a guest's disk that held ``initial``, all durable, before the log began."""

    initial: bytes
    facts: dict[str, tuple[object, ...]] = field(default_factory=dict)
    """What each fact may be."""
    cluster_bytes: int = SECTOR_BYTES
    leaks_before: int = 0
    bitmaps: dict[bytes, list[Moment]] = field(default_factory=dict)
    """By name, when the bitmap was last all clean."""
    backups: dict[bytes, Handover] = field(default_factory=dict)
    """Of incremental backups that were begun, by the bitmap that has recorded so far."""
    changes: int = 0
    """Grows with each change of what is allowed, so that verdicts can be remembered by it."""
    content: bytearray = field(init=False)
    """What the guest reads now, as far as it can know."""
    _history: dict[int, list[_Values]] = field(default_factory=dict)
    _past: dict[int, set[bytes]] = field(default_factory=dict)
    """By sector: values that a flush has made impossible."""
    _serial: int = 0
    _under_way: set[int] = field(default_factory=set)
    """Tokens of what has begun and not ended."""
    _touched: list[tuple[int, int]] = field(default_factory=list)
    """(serial, clusters that an operation may have left over), since the flush before the last."""
    _last_flush: int = 0
    _altering: bool = False
    """An alteration goes on, or failed: all that it counts may be left over."""
    _other: bytes | None = None
    """The disk that it may put in the place of this one."""
    _other_changed: dict[int, bytes] = field(default_factory=dict)
    _other_written: dict[int, set[bytes]] = field(default_factory=dict)
    """By sector, what was written since: after an alteration that failed the guest goes on, on the one or on the other."""
    _allowed: dict[int, set[bytes]] = field(default_factory=dict)
    _acknowledged: dict[int, set[bytes]] = field(default_factory=dict)
    _allowed_at: int = -1

    def __post_init__(self) -> None:
        self.content = bytearray(self.initial)

    # What the notes say

    def begin_write(self, offset: int, data: bytes) -> int:
        """A write of any bytes (zeros too) begins. Returns the token for ``end``."""
        self.content[offset : offset + len(data)] = data
        return self._enter(offset, len(data), discard=False)

    def begin_discard(self, offset: int, length_bytes: int) -> int:
        """A discard begins: each whole sector may keep its bytes or read as zeros."""
        return self._enter(offset, length_bytes, discard=True)

    def begin_fact(self, name: str, value: object) -> None:
        """An operation begins that will make a fact ``value``."""
        self.changes += 1
        self.facts[name] = (*self.facts.get(name, ()), value)

    def end_fact(self, name: str) -> None:
        """It has returned."""
        self.changes += 1
        self.facts[name] = self.facts[name][-1:]

    def begin_bitmap(self, name: bytes) -> None:
        """An operation begins after which a bitmap is all clean: until it returns, by the old moment or by the new one."""
        self.changes += 1
        self._serial += 1
        self._touched.append((self._serial, _BITMAP_CLUSTERS))
        uncertain = {sector: values for sector in self._history if len(values := self.readable(sector)) > 1}
        self.bitmaps[name] = [*self.bitmaps.get(name, []), (bytes(self.content), uncertain)]

    def end_bitmap(self, name: bytes) -> None:
        """It has returned."""
        self.changes += 1
        self.bitmaps[name] = self.bitmaps[name][-1:]

    def begin_backup(self, bitmap: bytes, next_bitmap: bytes) -> None:
        """An incremental backup begins. ``next_bitmap`` is to have all that changes from the moment on (``begin_bitmap``)."""
        self.changes += 1
        self.backups[bitmap] = Handover(next_bitmap)

    def end_backup(self, bitmap: bytes) -> None:
        """It is known to be good, and about to be ended."""
        self.changes += 1
        self.backups[bitmap] = self.backups[bitmap]._replace(good=True)

    def forget_backup(self, bitmap: bytes) -> None:
        """It has been ended."""
        self.changes += 1
        del self.backups[bitmap]

    def differing(self, changed: Mapping[int, bytes], clean: list[Moment]) -> Iterator[tuple[int, bytes]]:
        """Sectors, with their bytes, that are as at none of the moments ``clean``."""
        sectors = set(changed)
        for content, _ in clean:
            sectors |= self.changed_sectors(content).keys()
        for sector in sorted(sectors):
            value = changed.get(sector, self._initial(sector))
            if all(
                value != content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES] and value not in uncertain.get(sector, ())
                for content, uncertain in clean
            ):
                yield sector, value

    def begin_alteration(self, facts: Mapping[str, object], content: bytes | None) -> int:
        """An alteration begins that will make facts these, and, unless ``content`` is None, the disk that. Returns the token
        for ``end_alteration``."""
        self.changes += 1
        for name, value in facts.items():
            self.begin_fact(name, value)
        self._altering, self._other = True, content
        self._other_changed = {} if content is None else self.changed_sectors(content)
        self._other_written = {}
        return self.begin_flush()

    def end_alteration(self, token: int, facts: Mapping[str, object], *, done: bool) -> None:
        """It has returned, or been refused: it is durable, and so is all that was acknowledged before it."""
        for name in facts:
            self.end_fact(name)
        self.end_flush(token)
        if self._other is not None and done:
            sectors = -(-max(len(self._other), len(self.content), self.size) // SECTOR_BYTES)
            for sector in range(sectors):
                self._past.setdefault(sector, set()).update(self.allowed(sector))
                value = self._other[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]
                self._history[sector] = [_Values(0, (value,), acknowledged=True)]
                self._past[sector].discard(value)
            self.content = bytearray(self._other)
        self._altering, self._other = False, None

    def is_other_disk(self, changed: Mapping[int, bytes]) -> bool:
        """True if an alteration goes on, or failed, and the disk is to the last sector what it makes of it, but for what was
        written since."""
        if self._other is None:
            return False
        other, written = self._other_changed, self._other_written
        differing = {sector for sector in changed.keys() | other.keys() if changed.get(sector) != other.get(sector)}
        return all(changed.get(sector, self._initial(sector)) in written.get(sector, ()) for sector in differing)

    @property
    def switching(self) -> bool:
        """True while the whole disk may become another one."""
        return self._other is not None

    def _enter(self, offset: int, length_bytes: int, *, discard: bool) -> int:
        self._serial += 1
        self._under_way.add(self._serial)
        self.changes += 1
        self._touched.append((self._serial, 2 * (length_bytes // self.cluster_bytes + 2) + 3))
        for sector in range(offset // SECTOR_BYTES, -(-(offset + length_bytes) // SECTOR_BYTES)):
            history = self._of(sector)
            value = bytes(self.content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
            values: tuple[bytes, ...] = (value,)
            if discard:
                # A write that failed, or goes on, may have come before it or not: any value that may stand there may stay.
                values = tuple(dict.fromkeys((_ZERO, *self.readable(sector))))
            history.append(_Values(self._serial, values, acknowledged=False))
            if self._other is not None:
                self._other_written.setdefault(sector, set()).update(values)
        return self._serial

    def _of(self, sector: int) -> list[_Values]:
        history = self._history.get(sector)
        if history is None:
            history = self._history[sector] = [_Values(0, (self._initial(sector),), acknowledged=True)]
        return history

    def _known(self, sector: int) -> list[_Values]:
        """Like ``_of``, for those who only look: a sector that nobody wrote stays one."""
        return self._history.get(sector) or [_Values(0, (self._initial(sector),), acknowledged=True)]

    def _initial(self, sector: int) -> bytes:
        return self.initial[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]

    def end(self, token: int) -> None:
        """The write or discard was acknowledged.

        Where others began on a sector since it began, or began before and have not ended, they went on at the same time: either
        may have come last, or may yet.
        """
        self.changes += 1
        self._under_way.discard(token)
        for history in self._history.values():
            at = next((at for at, entry in enumerate(history) if entry.serial == token), None)
            if at is None:
                continue
            history[at].acknowledged = True
            beside = [entry for entry in history[:at] if entry.serial in self._under_way]
            if beside or at + 1 < len(history):
                self._serial += 1
                values = {value: 0 for entry in (*beside, *history[at:]) for value in entry.values}
                history.append(_Values(self._serial, tuple(values), acknowledged=True))

    def fail(self, token: int) -> None:
        """The write or discard ended with an error: any part of it may have been done, then or at any time later."""
        self._under_way.discard(token)

    def withdraw(self, token: int) -> None:
        """The write was refused before anything of it was done."""
        self.changes += 1
        self._under_way.discard(token)
        self._touched = [entry for entry in self._touched if entry[0] != token]
        for sector, history in self._history.items():
            if history[-1].serial == token:
                history.pop()
                value = history[-1].values[0]
                self.content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES] = value

    def reopen(self, content: bytes) -> None:
        """The process was killed and the guest came back: what it reads now is what the next flush must keep.

        What was acknowledged and not flushed may be lost from here on.
        """
        for history in self._history.values():
            for entry in history[1:]:
                entry.acknowledged = False
        self.leaks_before += sum(clusters for _, clusters in self._touched)
        self._touched.clear()
        self._under_way.clear()
        # Its size may have changed: what is behind its end reads as nothing.
        length_bytes = max(len(content), len(self.content))
        self.content = bytearray(content)
        self._other = None
        self.end(self._enter(0, length_bytes, discard=False))

    def begin_flush(self) -> int:
        if self.bitmaps:
            # It may be the one before a close, which stores them.
            self._touched.append((self._serial, _BITMAP_CLUSTERS * len(self.bitmaps)))
        return self._serial

    def end_flush(self, token: int) -> None:
        """A flush returned: what was acknowledged when it began is durable."""
        self.changes += 1
        for sector, history in self._history.items():
            flushed = [at for at, entry in enumerate(history) if entry.serial <= token and entry.acknowledged]
            if flushed:
                past = self._past.setdefault(sector, set())
                past.update(value for entry in history[: flushed[-1]] for value in entry.values)
                del history[: flushed[-1]]
                history[0].serial = 0
        if any(self._last_flush < serial <= token for serial, _ in self._touched):
            # It committed something: the transaction before it is no longer the last, and its RECLAIM is durable.
            self._touched = [entry for entry in self._touched if entry[0] > self._last_flush]
            self._last_flush = token

    def end_durable(self, token: int) -> None:
        """A forced write returned: what it wrote is durable."""
        self.changes += 1
        for sector, history in self._history.items():
            at = next((at for at, entry in enumerate(history) if entry.serial == token), 0)
            if at:
                self._past.setdefault(sector, set()).update(value for entry in history[:at] for value in entry.values)
                del history[:at]

    # What may be

    @property
    def leaks_allowed(self) -> int:
        """The most clusters that may be counted too high (C13)."""
        if self._altering:
            return _ANY_NUMBER
        return self.leaks_before + 4 + sum(clusters for _, clusters in self._touched)

    @property
    def size(self) -> int:
        return len(self.initial)

    def changed_sectors(self, guest: bytes) -> dict[int, bytes]:
        """The sectors of ``guest`` that differ from the disk before the log."""
        changed = {}
        for sector in range(-(-max(len(guest), self.size) // SECTOR_BYTES)):
            value = guest[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]
            if value != self._initial(sector):
                changed[sector] = value
        return changed

    def wrong_sectors(self, changed: Mapping[int, bytes], *, acknowledged: bool = False) -> Iterator[tuple[int, bytes]]:
        """Sectors, with their bytes, that hold what they must not. ``acknowledged``: as if all that was acknowledged had been
        flushed (C4)."""
        if self._allowed_at != self.changes:
            self._allowed_at = self.changes
            self._allowed.clear()
            self._acknowledged.clear()
            for sector, history in self._history.items():
                last = max(at for at, entry in enumerate(history) if entry.acknowledged)
                self._allowed[sector] = {value for entry in history for value in entry.values}
                self._acknowledged[sector] = {value for entry in history[last:] for value in entry.values}
        known = self._acknowledged if acknowledged else self._allowed
        for sector, allowed in known.items():
            value = changed.get(sector)
            if value is None:
                value = self._initial(sector)
            if value not in allowed:
                yield sector, value
        for sector, value in changed.items():
            if sector not in known:
                yield sector, value

    def allowed(self, sector: int) -> list[bytes]:
        """The values that a sector may have."""
        return [value for entry in self._known(sector) for value in entry.values]

    def flushed(self, sector: int) -> tuple[bytes, ...]:
        """The values that the last returned flush left possible: one, but after a discard."""
        return self._known(sector)[0].values

    def is_flushed(self, sector: int) -> bool:
        """True if nothing was written to the sector or discarded since."""
        return len(self._known(sector)) == 1

    def readable(self, sector: int) -> set[bytes]:
        """What a living guest may read now: the last acknowledged value, and all that was begun since or at the same time."""
        history = self._known(sector)
        last = max(at for at, entry in enumerate(history) if entry.acknowledged)
        return {value for entry in history[last:] for value in entry.values}

    def is_past(self, sector: int, value: bytes) -> bool:
        """True if the sector had this value once, before a flush made it impossible."""
        return value in self._past.get(sector, ())
