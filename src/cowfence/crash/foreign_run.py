"""What a run of somebody else's program left: files before, the log of what was done to them, and the guest's side as notes.

This is the seam between recorders (``fuse``, ``logwrites``) and the explorer. The notes, each with its ``command``:

- ``write.begin`` (token, offset, data), ``discard.begin`` (token, offset, length_bytes) and ``end`` (token): acknowledged;
- ``flush.begin`` (token), ``flush.end`` (token): the flush returned;
- ``tool.begin``, ``tool.end`` (ok): a program that works on the whole image, such as ``qemu-img snapshot``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cowfence.storage.oplog import Discard, Done, Entry, Fence, Note, Operation, OpLog, Truncate, Write, Zero

IMAGE = "IMG"
"""The name, in a run, of the image that is judged. Backing files have names of their own."""


@dataclass(frozen=True, slots=True)
class ForeignRun:
    """A recorded run. ``guest``: the disk's bytes before it. ``program``: who ran, for reports."""

    initial: Mapping[str, bytes]
    guest: bytes
    entries: Sequence[Entry]
    program: str
    commands: tuple[str, ...]
    image: str = IMAGE


@dataclass(slots=True)
class GuestNotes:
    """Notes the guest's side of a script in a log."""

    log: OpLog
    _outstanding: list[int] = field(default_factory=list)

    def begin_write(self, command: str, offset: int, data: bytes) -> int:
        return self.log.note("write.begin", command=command, offset=offset, data=data)

    def begin_discard(self, command: str, offset: int, length_bytes: int) -> int:
        return self.log.note("discard.begin", command=command, offset=offset, length_bytes=length_bytes)

    def end(self, token: int) -> None:
        """It was acknowledged. One that failed gets no end: its bytes may have arrived or not."""
        self.log.note("end", token=token)

    def postpone(self, token: int) -> None:
        """It goes on while the script does, until ``end_postponed``."""
        self._outstanding.append(token)

    def end_postponed(self) -> None:
        for token in self._outstanding:
            self.end(token)
        self._outstanding.clear()

    def begin_flush(self, command: str) -> int:
        return self.log.note("flush.begin", command=command)

    def end_flush(self, token: int) -> None:
        self.log.note("flush.end", token=token)


def apply(content: bytearray, operation: Operation) -> None:
    """Carry ``operation`` out on the bytes of its file."""
    if isinstance(operation, Fence):
        return
    if isinstance(operation, Truncate):
        del content[operation.size_bytes :]
        content.extend(bytes(operation.size_bytes - len(content)))
        return
    if isinstance(operation, Write):
        offset, data = operation.offset, operation.data
    else:
        offset, data = operation.offset, bytes(operation.length_bytes)
        if isinstance(operation, Discard):
            data = data[: max(0, len(content) - offset)]
    if not data:
        return
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def replay(run: ForeignRun, until: int | None = None) -> dict[str, bytes]:
    """The files after the first ``until`` entries of the log (all by default), as if everything arrived."""
    contents = {name: bytearray(content) for name, content in run.initial.items()}
    for entry in run.entries[:until]:
        if isinstance(entry, Done) and not entry.failed:
            operation = run.entries[entry.position]
            assert not isinstance(operation, Note | Done)
            apply(contents.setdefault(operation.file, bytearray()), operation)
    return {name: bytes(content) for name, content in contents.items()}


def operation_range(operation: Operation) -> tuple[int, int]:
    """First and last-plus-one byte that ``operation`` changes in its file (empty for a fence)."""
    if isinstance(operation, Write):
        return operation.offset, operation.offset + len(operation.data)
    if isinstance(operation, Zero | Discard):
        return operation.offset, operation.offset + operation.length_bytes
    if isinstance(operation, Truncate):
        return operation.size_bytes, 1 << 62
    return 0, 0
