"""The guest's side: what each sector of its disk may hold after a crash (crash contract, C2 and C3).

A sector is its value at the last returned flush, or a value written to that very sector since. The model follows the notes of
the log: a write makes its values possible when it begins; a flush that returns makes what was acknowledged before it the only
past that is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cowfence.units import SECTOR_BYTES

_ZERO = bytes(SECTOR_BYTES)


@dataclass(slots=True)
class _Values:
    serial: int
    values: tuple[bytes, ...]
    """More than one where the guest cannot know (a discard leaves the old bytes or zeros)."""
    acknowledged: bool


@dataclass(slots=True)
class GuestModel:
    """Possible values of each sector of a guest's disk of ``size`` bytes, a multiple of 512."""

    size: int
    content: bytearray
    """What the guest reads now, as far as it can know."""
    _history: dict[int, list[_Values]] = field(default_factory=dict)
    _serial: int = 0
    changes: int = 0
    """Grows with each change of what is allowed, so that verdicts can be remembered by it."""

    def begin_write(self, offset: int, data: bytes) -> int:
        """A write of any bytes (zeros too) begins. Returns the token for ``end``."""
        self.content[offset : offset + len(data)] = data
        return self._enter(offset, len(data), discard=False)

    def begin_discard(self, offset: int, length_bytes: int) -> int:
        """A discard begins: each whole sector may keep its bytes or read as zeros."""
        return self._enter(offset, length_bytes, discard=True)

    def _enter(self, offset: int, length_bytes: int, *, discard: bool) -> int:
        self._serial += 1
        self.changes += 1
        for sector in range(offset // SECTOR_BYTES, -(-(offset + length_bytes) // SECTOR_BYTES)):
            value = bytes(self.content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
            history = self._history.setdefault(sector, [])
            values: tuple[bytes, ...] = (value,)
            if discard:
                values = tuple({_ZERO, *(history[-1].values if history else (value,))})
            history.append(_Values(self._serial, values, acknowledged=False))
        return self._serial

    def end(self, token: int) -> None:
        """The write or discard was acknowledged.

        Where others began on a sector since it began, they went on at the same time: either may have come last.
        """
        for history in self._history.values():
            at = next((at for at, entry in enumerate(history) if entry.serial == token), None)
            if at is None:
                continue
            history[at].acknowledged = True
            if at + 1 < len(history):
                self._serial += 1
                self.changes += 1
                values = {value for entry in history[at:] for value in entry.values}
                history.append(_Values(self._serial, tuple(values), acknowledged=True))

    def withdraw(self, token: int) -> None:
        """The write was refused before anything of it was done."""
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
        self.end(self.begin_write(0, content))

    def begin_flush(self) -> int:
        return self._serial

    def end_flush(self, token: int) -> None:
        """A flush returned: what was acknowledged when it began is durable."""
        self.changes += 1
        for history in self._history.values():
            flushed = [at for at, entry in enumerate(history) if entry.serial <= token and entry.acknowledged]
            if flushed:
                del history[: flushed[-1]]
                history[0].serial = 0

    def start(self, content: bytes) -> None:
        """The disk's bytes before the log begins, all durable."""
        self.content[:] = content
        for sector in range(self.size // SECTOR_BYTES):
            value = bytes(content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
            self._history[sector] = [_Values(0, (value,), acknowledged=True)]

    def wrong_sectors(self, guest: bytes) -> list[int]:
        """Sectors of ``guest`` whose bytes are none of those allowed."""
        wrong = []
        for sector, history in self._history.items():
            value = guest[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]
            if not any(value in entry.values for entry in history):
                wrong.append(sector)
        return wrong
