"""The log of what a program did to its files: the crash explorer's raw material.

Several files share one log, in one order. An operation is entered when it is *issued*, and a ``Done`` is entered when its
call has returned. The two instants are what the crash models ask for:

- *Kill*: at an instant of the log, an operation whose ``Done`` stands before it has survived; one that was issued and has
  no ``Done`` yet is in flight and survives in any part. In a run of one thread each operation is followed by its ``Done``,
  and the states are the prefixes of the log.
- *Power*: a fence that returned covers, in its own file, the operations whose ``Done`` stands before the fence was issued.
  What was in flight then, or issued while the fence ran, is not covered.

A ``Done`` with ``failed`` ends a call that raised: its bytes may have arrived in any part, and a failed fence covers
nothing. ``Note`` carries the guest's side of the story (what was asked, acknowledged, flushed) and the keeper's (publish,
retire) at its place in the same order; it touches no file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Write:
    """``data`` written at ``offset`` of the file named ``file``, in the step ``mark`` of a transaction."""

    file: str
    offset: int
    data: bytes
    mark: str


@dataclass(frozen=True, slots=True)
class Zero:
    """A range made to read as zeros; the file grows where needed."""

    file: str
    offset: int
    length_bytes: int
    mark: str


@dataclass(frozen=True, slots=True)
class Discard:
    """A range given back to the host: its bytes are undefined afterwards."""

    file: str
    offset: int
    length_bytes: int
    mark: str


@dataclass(frozen=True, slots=True)
class Truncate:
    """The length of the file set, shorter or longer."""

    file: str
    size_bytes: int
    mark: str


@dataclass(frozen=True, slots=True)
class Fence:
    """A durable barrier of one file."""

    file: str
    mark: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened outside the files, such as a guest's request (``guest.write``) and its acknowledgement."""

    event: str
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """The operation at ``position`` of the log has returned, or raised if ``failed``."""

    position: int
    failed: bool = False


Operation: TypeAlias = Write | Zero | Discard | Truncate | Fence
Entry: TypeAlias = Operation | Note | Done


@dataclass(frozen=True, slots=True)
class Span:
    """One operation and its time in the log: issued at position ``issued``, over at ``done`` (None: the log ends before)."""

    operation: Operation
    issued: int
    done: int | None
    failed: bool

    def is_covered_by(self, fence: Span) -> bool:
        """True if ``fence``, once returned, made this operation durable."""
        return (
            isinstance(fence.operation, Fence)
            and fence.operation.file == self.operation.file
            and fence.done is not None
            and not fence.failed
            and self.done is not None
            and self.done < fence.issued
        )


class OpLog:
    """Entries in one order, appended by any number of threads."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, position: int) -> Entry:
        return self._entries[position]

    def append(self, entry: Entry) -> int:
        """Enter it and return its position."""
        with self._guard:
            self._entries.append(entry)
            return len(self._entries) - 1

    def note(self, event: str, **fields: object) -> int:
        return self.append(Note(event, fields))

    def entries(self) -> Sequence[Entry]:
        """A copy of the log up to now."""
        with self._guard:
            return tuple(self._entries)

    def operations(self) -> list[Operation]:
        """What was issued, in order, without notes and ends: the whole story where one thread worked and nothing failed."""
        return [entry for entry in self.entries() if not isinstance(entry, Note | Done)]

    def spans(self) -> list[Span]:
        """The operations in the order in which they were issued, each with its end."""
        entries = self.entries()
        ends = {entry.position: (at, entry.failed) for at, entry in enumerate(entries) if isinstance(entry, Done)}
        spans = []
        for issued, entry in enumerate(entries):
            if not isinstance(entry, Note | Done):
                done, failed = ends.get(issued, (None, False))
                spans.append(Span(entry, issued, done, failed))
        return spans
