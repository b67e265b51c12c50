"""A violation made small, and said in one sentence.

A witness is a state taken out of the walk: durable bytes, and for each unit the versions among which a crash may choose. It is
made smaller unit by unit, towards "everything arrived" or towards "nothing arrived", whichever leaves fewer units that differ;
what is left is what the violation hangs on. The sentence names the edge that is missing: the pointer that is durable, what it
leads to that is not, and the marks between which a fence is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cowfence.crash.device import Base, Choice, CrashState
from cowfence.crash.images import DATA
from cowfence.crash.judge import Judge, Seen, Subject
from cowfence.crash.model import GuestModel
from cowfence.crash.oracles import Oracle, Verdict
from cowfence.crash.structure import locate
from cowfence.storage.oplog import Done, Entry, Note, Truncate
from cowfence.units import SECTOR_BYTES


@dataclass(slots=True)
class Witness:
    """``bases``: by file, what is durable, as long as the state's file; ``choices``: what the state holds of each unit about
    which there was a choice; ``guest``: what the guest may find in it."""

    bases: dict[str, bytes]
    lengths: dict[str, int]
    choices: list[Choice]
    guest: GuestModel
    unit_bytes: int

    @classmethod
    def of(cls, state: CrashState, guest: GuestModel, unit_bytes: int) -> Witness:
        """Taken out of a walk, for good."""
        choices = state.choices
        if any(choice.versions[-1].data == b"" for choice in choices):
            # A call cut by a kill: no versions to choose from, so the state itself is the base.
            return cls(state.contents(), dict(state.lengths), [], guest, unit_bytes)
        bases = {file: bytes(base.content) for file, base in state.bases.items()}
        return cls(bases, dict(state.lengths), choices, guest, unit_bytes)

    def contents(self) -> dict[str, bytes]:
        return self.state().contents()

    def lost(self) -> list[str]:
        """What has not arrived, by mark and place."""
        return [
            f"{choice.versions[-1].mark} at {choice.unit[1] * self.unit_bytes:#x}"
            for choice in self.choices
            if choice.held < len(choice.versions) - 1
        ]

    def arrived(self) -> list[str]:
        """What has arrived although no fence said so, by mark and place."""
        return [
            f"{choice.versions[choice.held].mark} at {choice.unit[1] * self.unit_bytes:#x}"
            for choice in self.choices
            if choice.held
        ]

    @property
    def deviating(self) -> int:
        """Units that differ from the nearer of "everything arrived" and "nothing arrived"."""
        newest = sum(1 for choice in self.choices if choice.held < len(choice.versions) - 1)
        oldest = sum(1 for choice in self.choices if choice.held)
        return min(newest, oldest)

    def state(self) -> CrashState:
        """The state itself."""
        return self._state([choice.held for choice in self.choices])

    def _state(self, held: Sequence[int]) -> CrashState:
        bases = {file: Base(file, content, self.unit_bytes) for file, content in self.bases.items()}
        overrides = {choice.unit: choice.versions[at] for choice, at in zip(self.choices, held, strict=True) if at}
        return CrashState((0, tuple(self.lengths.values())), bases, overrides, self.lengths, [])

    def seen(self, subject: Subject, held: Sequence[int] | None = None) -> Seen:
        """What it shows, or what it would show with these versions."""
        judge = Judge(subject, self.guest.initial, unit_bytes=self.unit_bytes)
        return judge.look(self._state([choice.held for choice in self.choices] if held is None else held))

    def verdict(self, subject: Subject, oracles: Sequence[Oracle], held: Sequence[int] | None = None) -> Verdict | None:
        """Judge it anew, or what it would be with these versions."""
        seen = self.seen(subject, held)
        for oracle in oracles:
            verdict = oracle.judge(seen, self.guest)
            if verdict is not None:
                return verdict
        return None

    def shrunk(self, subject: Subject, oracles: Sequence[Oracle], clause: str) -> Witness:
        """The smaller of the two ways: as much as can be arrived, or as little as can be."""
        best = self
        for towards_newest in (True, False):
            held = [choice.held for choice in self.choices]
            for at, choice in enumerate(self.choices):
                wanted = len(choice.versions) - 1 if towards_newest else 0
                if held[at] != wanted:
                    before, held[at] = held[at], wanted
                    verdict = self.verdict(subject, oracles, held)
                    if verdict is None or verdict.clause != clause:
                        held[at] = before
            choices = [choice._replace(held=at) for choice, at in zip(self.choices, held, strict=True)]
            smaller = Witness(self.bases, self.lengths, choices, self.guest, self.unit_bytes)
            if smaller.deviating < best.deviating:
                best = smaller
        return best


def edge(witness: Witness, verdict: Verdict, entries: Sequence[Entry], position: int, image: str) -> str:
    """One sentence: which pointer is there, what is missing behind it, and where the fence or the order is wrong."""
    content = witness.contents()[image]
    pointer_at, target_at = verdict.pointer_at, verdict.target_at
    name, target_file = "", image
    if verdict.sector is not None:
        place = locate(content, verdict.sector * SECTOR_BYTES)
        if place is None:
            return verdict.what
        within = verdict.sector * SECTOR_BYTES % (1 << int.from_bytes(content[20:24], "big"))
        pointer_at, name = place.entry_at, place.name
        target_at = None if place.host_offset is None else place.host_offset + within
        target_file = DATA if place.external else image
    if pointer_at is None and (found := re.search(r"offset (0x[0-9a-f]+)", verdict.what)):
        # The engine says where it could not read: somebody wrote there what does not belong.
        marks = [mark for mark in _writes(entries, image, int(found[1], 16)) if mark.position <= position]
        if marks:
            return f"{verdict.what}: {_too_early(marks[-1])}"
    if pointer_at is None:
        return f"{verdict.what}; not arrived: {', '.join(witness.lost()) or 'nothing'}"
    pointer = _written(entries, position, image, pointer_at, witness)
    if target_at is None and verdict.clause != "C2":
        return f"{verdict.what}: written by `{pointer.name}`" if pointer is not None else verdict.what
    if target_at is None or verdict.clause == "C2":
        in_place = target_at is not None and not _is_lost(witness, image, pointer_at)
        file, at = (target_file, target_at) if in_place and target_at is not None else (image, pointer_at)
        return _lost(name or f"the entry at {pointer_at:#x}", at, verdict, entries, file, position)
    target = _missing(entries, position, target_file, target_at, witness)
    order = _order(pointer, target)
    if verdict.name:
        return f"{verdict.name} is durable, its count at {target_at:#x} is not ({verdict.what}): {order}"
    what = f"{name or f'the entry at {pointer_at:#x}'} -> {target_at:#x}"
    return f"{what} is durable, the data at {target_at:#x} is not ({verdict.what}): {order}"


def _is_lost(witness: Witness, image: str, offset: int) -> bool:
    """True if the newest bytes at an offset did not arrive."""
    unit = (image, offset // witness.unit_bytes)
    return any(choice.unit == unit and choice.held < len(choice.versions) - 1 for choice in witness.choices)


@dataclass(frozen=True, slots=True)
class _Mark:
    name: str
    position: int


def _too_early(mark: _Mark) -> str:
    return f"`{mark.name}` changed what a durable entry still leads to: it must wait for the fence of its unlink"


def _order(pointer: _Mark | None, target: _Mark | None) -> str:
    if target is None:
        return f"nothing that `{pointer.name}` relies on was written" if pointer else "nobody wrote it"
    if pointer is None:
        return _too_early(target)
    if target.position > pointer.position:
        return f"`{target.name}` comes after `{pointer.name}`: it must come before, with a fence between"
    return f"a fence is missing between `{target.name}` and `{pointer.name}`"


def _lost(name: str, at: int, verdict: Verdict, entries: Sequence[Entry], image: str, position: int) -> str:
    later = next((mark for mark in _writes(entries, image, at) if mark.position > position), None)
    if later is not None:
        return f"{verdict.what}: `{later.name}` at {at:#x} ({name}) comes after the flush had returned"
    last = max((mark for mark in _writes(entries, image, at)), key=lambda mark: mark.position, default=None)
    if last is not None:
        return (
            f"{verdict.what}: `{last.name}` at {at:#x} ({name}) was written and no fence followed it before the flush returned"
        )
    return f"{verdict.what}: {name} was never written"


def _writes(entries: Sequence[Entry], image: str, offset: int) -> list[_Mark]:
    """The operations of the log that put bytes at an offset of the image."""
    found = []
    for position, entry in enumerate(entries):
        if isinstance(entry, Note | Done) or entry.file != image or isinstance(entry, Truncate):
            continue
        start = getattr(entry, "offset", None)
        if start is None:
            continue
        data = getattr(entry, "data", None)
        length = len(data) if isinstance(data, bytes) else getattr(entry, "length_bytes", 0)
        if start <= offset < start + length:
            found.append(_Mark(entry.mark, position))
    return found


def _written(entries: Sequence[Entry], position: int, image: str, offset: int, witness: Witness) -> _Mark | None:
    """The last operation that put the bytes which the state holds at ``offset``; None: they were there before."""
    held = _held(witness, image, offset)
    marks = [mark for mark in _writes(entries, image, offset) if mark.position <= (position if held is None else held)]
    return marks[-1] if marks else None


def _missing(entries: Sequence[Entry], position: int, image: str, offset: int, witness: Witness) -> _Mark | None:
    """The operation whose bytes at ``offset`` the state lacks: lost in a power cut, or later in the log; else the last one."""
    held = _held(witness, image, offset)
    marks = _writes(entries, image, offset)
    after = [mark for mark in marks if mark.position > (position if held is None else held)]
    return after[0] if after else marks[-1] if marks else None


def _held(witness: Witness, image: str, offset: int) -> int | None:
    """The position of the version that a state holds of a unit; None where there was no choice."""
    for choice in witness.choices:
        if choice.unit == (image, offset // witness.unit_bytes):
            return choice.versions[choice.held].position
    return None


def sector_map(witness: Witness, seen_guest: Mapping[int, bytes]) -> list[str]:
    """For the report: each guest sector as same, old, new, foreign or lost."""
    guest = witness.guest
    states = []
    wrong = dict(guest.wrong_sectors(seen_guest))
    for sector in range(len(guest.initial) // SECTOR_BYTES):
        value = seen_guest.get(sector)
        if sector in wrong:
            states.append("lost" if guest.is_past(sector, wrong[sector]) or not wrong[sector].strip(b"\0") else "foreign")
        elif value is None:
            states.append("old")
        else:
            states.append("new" if value == guest.content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES] else "old")
    return states
