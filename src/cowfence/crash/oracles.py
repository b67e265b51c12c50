"""The oracles: one class for each clause of the crash contract, judging what was seen of a state against what may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cowfence.crash.judge import Seen
from cowfence.crash.model import GuestModel, Moment
from cowfence.crash.structure import Bitmap
from cowfence.units import SECTOR_BYTES


class Verdict(NamedTuple):
    """A clause that is broken. ``sector``: of the guest, where one is to blame. ``pointer_at``, ``target_at``: host offsets of
    the entry that leads wrong and of what it leads to, where known."""

    clause: str
    what: str
    sector: int | None = None
    pointer_at: int | None = None
    target_at: int | None = None
    name: str = ""
    """Of the entry whose count is missing."""


class Oracle(Protocol):
    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None: ...


class Opens:
    """C1: every state opens (for writing too: see ``Life``)."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:  # noqa: ARG002
        if seen.error is None:
            return None
        finding = seen.structure.findings[0] if seen.structure.findings else None
        return Verdict("C1", seen.error, None, finding.pointer_at if finding else None, finding.target_at if finding else None)


class Contents:
    """C2, C3 and C17: each guest sector is its flushed value, or one written to that very sector since. C7: or the whole disk
    is the one that takes its place."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:
        if seen.error is not None or guest.is_other_disk(seen.changed):
            return None
        for sector, value in guest.wrong_sectors(seen.changed):
            if guest.switching:
                return Verdict("C7", f"guest sector {sector} holds {describe(value, sector)}: a mix of two disks", sector)
            if guest.is_past(sector, value):
                return Verdict("C2", f"guest sector {sector} was flushed and holds what it held before", sector)
            return Verdict("C3", f"guest sector {sector} holds {describe(value, sector)}", sector)
        return None


class Acknowledged:
    """C4: with a keeper after a kill, or in write-through mode, every acknowledged write is there."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:
        if seen.error is None and not guest.is_other_disk(seen.changed):
            for sector, value in guest.wrong_sectors(seen.changed, acknowledged=True):
                return Verdict("C4", f"guest sector {sector} was acknowledged and holds {describe(value, sector)}", sector)
        return None


class Sound:
    """C5: only leaks."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:  # noqa: ARG002
        for finding in seen.structure.findings:
            return Verdict("C5", finding.text, None, finding.pointer_at, finding.target_at, finding.name)
        return None


class Facts:
    """C6 to C9: snapshots, size, backing file and features are old or new. Where the list of the snapshots is one of them and
    only what they hold is not, it is C6."""

    _CLAUSES = (("snapshots", "C7"), ("size", "C8"), ("backing", "C9"), ("features", "C9"), ("keys", "C9"))

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:
        facts = seen.structure.facts
        for name, clause in self._CLAUSES:
            allowed = guest.facts.get(name)
            if allowed is not None and name in facts and facts[name] not in allowed:
                if name == "snapshots" and _listed(facts[name]) in map(_listed, allowed):
                    clause = "C6"
                return Verdict(clause, f"{name} is {facts[name]!r}, neither old nor new")
        return None


class Bitmaps:
    """C14: a bitmap that calls itself true has every sector that differs from what it was when the bitmap was last clean."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:
        for bitmap in seen.structure.bitmaps:
            clean = guest.bitmaps.get(bitmap.name)
            lost = _lost(seen, guest, clean, [bitmap]) if bitmap.true and clean is not None else None
            if lost is not None:
                return lost
        return None


class Backups:
    """C14: until an incremental backup is known to be good, nothing that changed since the last one is lost. Its two bitmaps,
    where they call themselves true, have all of it together; the first alone has what the moment has; and where the backup is
    taken back, so has the one that is left. Once the first has stopped, either the next is true or the moment is there."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:
        if seen.error is not None:
            return None
        found = {bitmap.name: bitmap for bitmap in seen.structure.bitmaps}
        for name, (later, good) in guest.backups.items():
            old, clean = found.get(name), guest.bitmaps.get(name)
            if old is None and not good:
                return Verdict("C14", f"bitmap {_text(name)} is gone, and nobody said that its backup is good")
            if old is None or old.in_use or clean is None:
                continue
            pair = [old, found[later]] if later in found else [old]
            taken_back = [bitmap for bitmap in seen.taken_back if bitmap.name == name]
            for bitmaps in (pair, taken_back):
                if bitmaps and not any(bitmap.in_use for bitmap in bitmaps):
                    lost = _lost(seen, guest, clean, bitmaps)
                    if lost is not None:
                        return lost
            if old.records:
                continue
            if not (later in found and found[later].true) and not seen.structure.has_moment:
                return Verdict("C14", f"what has changed since bitmap {_text(name)} has stopped is not known")
            if later in guest.bitmaps:
                moment = guest.changed_sectors(guest.bitmaps[later][-1][0])
                lost = _lost(Seen(changed=moment, structure=seen.structure), guest, clean, [old])
                if lost is not None:
                    return lost
        return None


def _lost(seen: Seen, guest: GuestModel, clean: list[Moment], bitmaps: Sequence[Bitmap]) -> Verdict | None:
    """A sector that differs from what it was when they were clean, and that none of the bitmaps has."""
    size = seen.structure.facts.get("size", 0)
    assert isinstance(size, int)
    for sector, value in guest.differing(seen.changed, clean):
        if sector * SECTOR_BYTES < size and not any(bitmap.covers(sector) for bitmap in bitmaps):
            names = " and ".join(_text(bitmap.name) for bitmap in bitmaps)
            return Verdict("C14", f"bitmap {names} valid, without guest sector {sector}, now {describe(value, sector)}", sector)
    return None


def _text(name: bytes) -> str:
    return ascii(name.decode("utf-8", "replace"))


def _listed(snapshots: object) -> list[object]:
    """Snapshots without what they hold."""
    assert isinstance(snapshots, tuple)
    return [snapshot[:-1] for snapshot in snapshots]


class Leaks:
    """C13: no more clusters leak than un-flushed operations and the last transaction touched."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:
        if seen.structure.leaks > guest.leaks_allowed:
            return Verdict("C13", f"{seen.structure.leaks} clusters leak, at most {guest.leaks_allowed} may")
        return None


class Life:
    """C1 (for writing), C10, C11, C12: what was found when a copy was repaired and another was worked on."""

    def judge(self, seen: Seen, guest: GuestModel) -> Verdict | None:  # noqa: ARG002
        for clause, what in seen.problems:
            return Verdict(clause, what)
        return None


STRUCTURE: tuple[Oracle, ...] = (Opens(), Sound())
"""Without the guest's contents: what a checker alone would see (control J1)."""
ALL: tuple[Oracle, ...] = (Opens(), Contents(), Sound(), Facts(), Bitmaps(), Backups(), Leaks(), Life())


def describe(value: bytes, sector: int) -> str:
    """What a sector's bytes are, for a sentence."""
    if not value.strip(b"\0"):
        return "zeros"
    if value.startswith(b"sector "):
        tag = value[:48].split(b".")[0].decode("ascii", "replace").strip()
        return f"foreign data ({tag})" if value.split()[1] != b"%d" % sector else f"{tag}, which is none of its values now"
    return f"garbage ({value[:16].hex()}...)" if len(value) == SECTOR_BYTES else "nothing"
