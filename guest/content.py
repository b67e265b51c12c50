"""What a write of the guest puts where: a function of its writer and its serial alone, so that no list need be kept.

Each writer has a directory of ``SLOTS`` files and goes around them; a file is made, overwritten in place and replaced by a
rename in turn, so that space is taken, rewritten and given back (the guest mounts with ``discard``). Every line of 512 bytes
names writer, serial and line: a block that is foreign, old or at a wrong place shows.

``content.awk`` and ``writer.sh`` say the same inside the guest; a test runs them against this file.
"""

from __future__ import annotations

from enum import Enum

SLOTS = 64
"""Files of each writer."""

LINE_BYTES = 512
"""One sector: short lines would keep an emulated processor busy."""


class Manner(Enum):
    """How a write changes its file."""

    FRESH = 0
    """The file is removed and made anew."""
    IN_PLACE = 1
    """Overwritten; the length stays."""
    REPLACED = 2
    """Written beside it, synced, and renamed over it."""


class Verdict(Enum):
    """What a file was found to hold."""

    KEPT = "kept"
    """The write that was promised last."""
    NEWER = "newer"
    """One that was under way, whole or in part where its manner allows parts."""
    LOST = "lost"
    """Missing, or an older write: a promise was broken."""
    FOREIGN = "foreign"
    """Bytes that were never written there."""


def slot_of(serial: int) -> int:
    """The number of the file that a write goes to."""
    return serial % SLOTS


def manner_of(serial: int) -> Manner:
    """How this write changes its file."""
    return Manner(_stage(serial) % 3)


def line_count(writer: int, serial: int) -> int:
    """The length of the file after this write, in lines; an overwriting has the length of the write before it."""
    return 1 + (writer * 104729 + slot_of(serial) * 7919 + (_stage(serial) + 1) // 3 * 15485863) % 251


def _stage(serial: int) -> int:
    return serial // SLOTS + slot_of(serial)


def content(writer: int, serial: int) -> bytes:
    """What the file holds after this write."""
    start = f"cowfence writer {writer:02d} serial {serial:08d} line "
    return b"".join(
        f"{start}{line:06d}".ljust(LINE_BYTES - 1, ".").encode() + b"\n" for line in range(line_count(writer, serial))
    )


def verdict_of(found: bytes | None, writer: int, promised: int | None, under_way: int | None) -> Verdict:
    """Judge one file: its bytes (None: there is no file), the write promised last, and one that may have been under way."""
    old = None if promised is None else content(writer, promised)
    if found == old:
        return Verdict.KEPT
    if under_way is not None and _may_be_partial(found, old, content(writer, under_way), manner_of(under_way)):
        return Verdict.NEWER
    if found is None or (promised is not None and _is_older(found, writer, promised)):
        return Verdict.LOST
    return Verdict.FOREIGN


def _may_be_partial(found: bytes | None, old: bytes | None, new: bytes, manner: Manner) -> bool:
    if found == new:
        return True
    if manner is Manner.REPLACED:
        return False
    if manner is Manner.IN_PLACE and old is not None:
        return found is not None and len(found) == len(old) and _made_of(found, (old, new))
    return found is None or (len(found) <= len(new) and _made_of(found, (new, bytes(len(new)))))


def _made_of(found: bytes, versions: tuple[bytes, ...]) -> bool:
    """Whether each line is that of one of the versions."""
    lines = (slice(start, start + LINE_BYTES) for start in range(0, len(found), LINE_BYTES))
    return all(any(found[line] == version[line][: len(found[line])] for version in versions) for line in lines)


def _is_older(found: bytes, writer: int, promised: int) -> bool:
    """Whether the file is empty or holds an earlier write, whole or in part."""
    older = range(slot_of(promised), promised, SLOTS)
    return not found or any(_made_of(found, (content(writer, serial), content(writer, promised))) for serial in older)
