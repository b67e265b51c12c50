"""The log of a run as the report shows it: what the guest asked for and what was done to the file, without the ends of calls.

An end is no entry of its own there; it says how far an operation of the guest reaches, and states that are judged at it count
at the entry before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cowfence.crash.report import ReportEntry
from cowfence.crash.runner import Recording
from cowfence.storage.oplog import Discard, Done, Entry, Fence, Note, Truncate, Write, Zero


@dataclass(frozen=True, slots=True)
class Timeline:
    """``index``: for each position of the log, the entry that it belongs to; -1: before the first."""

    entries: list[ReportEntry]
    index: list[int]

    def point(self, position: int) -> int:
        """The entry that a position of the log belongs to."""
        return max(0, self.index[position]) if self.index else 0

    def points(self, per_position: Mapping[int, int]) -> list[int]:
        """Counts by entry, from counts by position of the log."""
        counts = [0] * len(self.entries)
        for position, count in per_position.items():
            if counts:
                counts[self.point(position)] += count
        return counts


def timeline(recording: Recording) -> Timeline:
    """The time line of a run."""
    entries: list[ReportEntry] = []
    index: list[int] = []
    begun: dict[int, int] = {}
    for position, entry in enumerate(recording.entries):
        shown = _shown(entry)
        if shown is not None:
            begun[position] = len(entries)
            entries.append(shown)
        elif isinstance(entry, Note):
            of = entry.fields.get("of")
            at = begun.get(of) if isinstance(of, int) else None
            if at is not None:
                entries[at] = replace(entries[at], until=len(entries))
        index.append(len(entries) - 1)
    return Timeline(entries, index)


def _shown(entry: Entry) -> ReportEntry | None:
    match entry:
        case Note(event="reopened"):
            return ReportEntry("guest", "kill", "and opened again", until=0)
        case Note(event=event, fields=fields):
            verb, _, instant = event.partition(".")
            return ReportEntry("guest", verb, _place(fields)) if instant == "begin" else None
        case Write(offset=offset, data=data, mark=mark):
            return ReportEntry("write", mark, f"{len(data)} bytes at {offset:#x}")
        case Zero(offset=offset, length_bytes=length, mark=mark):
            return ReportEntry("zero", mark, f"{length} bytes at {offset:#x}")
        case Discard(offset=offset, length_bytes=length, mark=mark):
            return ReportEntry("discard", mark, f"{length} bytes at {offset:#x}")
        case Truncate(size_bytes=size, mark=mark):
            return ReportEntry("truncate", mark, f"to {size} bytes")
        case Fence(mark=mark):
            return ReportEntry("fence", mark)
        case Done():
            return None


def _place(fields: Mapping[str, object]) -> str:
    data = fields.get("data")
    length = len(data) if isinstance(data, bytes) else fields.get("length_bytes")
    return f"{length} bytes at {fields['offset']}" if "offset" in fields else ""
