"""Repair with a plan and a way back.

A plan is made by running the repair on an overlay in memory: the ranges of the file that it would change, and what the image
would be then. An undo file holds the old and the new bytes of these ranges; it is durable before the first of them is changed.

Taking a repair back writes the old bytes again, and only if every sector is either the old or the new one: so a crash in the
middle of it, or of the repair, does no harm, and it can be run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowfence.errors import Corrupt, Invalid, from_os_error
from cowfence.ops.check import CheckResult, Mode, check_storage
from cowfence.storage.base import Storage, read_padded
from cowfence.storage.file import FileStorage
from cowfence.storage.overlay import Changed, OverlayStorage
from cowfence.storage.publish import NewFile
from cowfence.units import MIB, SECTOR_BYTES

if TYPE_CHECKING:
    from cowfence.qcow2.describe import JsonValue

_MAGIC: Final = b"cowfence undo 1\n"
_PLAN_FORMAT: Final = "cowfence repair plan 1"
_MAX_HEADER_BYTES: Final = 64 * MIB
_MAX_PLAN_BYTES: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Plan:
    """What a repair would do. ``result``: the image as it would be then. Sizes in bytes."""

    filename: str
    mode: Mode
    size_before: int
    size_after: int
    changes: tuple[Changed, ...]
    result: CheckResult

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "format": _PLAN_FORMAT,
            "filename": self.filename,
            "mode": self.mode.value,
            "size-before": self.size_before,
            "size-after": self.size_after,
            "changes": [
                {
                    "offset": change.offset,
                    "length": len(change.after),
                    "sha256-before": _digest(change.before),
                    "sha256-after": _digest(change.after),
                }
                for change in self.changes
            ],
            "result": self.result.to_dict(),
        }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plan_repair(path: str | os.PathLike[str], mode: Mode = Mode.ALL, *, force_share: bool = False) -> Plan:
    """What a repair of the image at ``path`` would do; nothing is written. Raises as ``check`` does."""
    storage = FileStorage.open(path, force_share=force_share)
    try:
        return _plan(storage, os.fspath(path), mode)
    finally:
        storage.close()


def _plan(storage: Storage, name: str, mode: Mode) -> Plan:
    overlay = OverlayStorage(storage)
    result = check_storage(overlay, repair=mode)
    return Plan(name, mode, storage.size(), overlay.size(), tuple(overlay.changes()), result)


def apply_repair(
    path: str | os.PathLike[str],
    mode: Mode = Mode.ALL,
    *,
    plan_file: str | os.PathLike[str] | None = None,
    undo_file: str | os.PathLike[str] | None = None,
) -> CheckResult:
    """Repair the image at ``path``. ``plan_file``: only if the repair would be the planned one. ``undo_file``: made first.

    Raises Invalid (the image is no longer the planned one; the plan file is none; the undo file exists), and as ``check`` does:
    then nothing was changed.
    """
    storage = FileStorage.open(path, writable=True)
    try:
        if plan_file is not None or undo_file is not None:
            planned = None if plan_file is None else _read_plan(plan_file)
            if planned is not None:
                mode = Mode(planned["mode"])
            plan = _plan(storage, os.fspath(path), mode)
            if planned is not None and not _is_planned(plan, planned):
                raise Invalid(f"{os.fspath(path)}: it is no longer the image that was planned for; make a new plan")
            if undo_file is not None:
                _write_undo(undo_file, plan)
        return check_storage(storage, repair=mode)
    finally:
        storage.close()


def _is_planned(plan: Plan, planned: dict[str, JsonValue]) -> bool:
    now = plan.to_dict()
    return all(now[key] == planned.get(key) for key in ("mode", "size-before", "size-after", "changes"))


def _read_plan(path: str | os.PathLike[str]) -> dict[str, JsonValue]:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MAX_PLAN_BYTES))
    except OSError as error:
        raise from_os_error(os.fspath(path), "read", 0, error) from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != _PLAN_FORMAT or found.get("mode") not in ("leaks", "all"):
        raise Invalid(f"{os.fspath(path)}: this is no repair plan")
    return found


def _write_undo(path: str | os.PathLike[str], plan: Plan) -> None:
    """Durable when it returns. Raises Invalid where there is a file: it may be the way back from an earlier repair."""
    if os.path.lexists(path):
        raise Invalid(f"{os.fspath(path)}: it exists; an undo file is not written over another file")
    payload = b"".join(change.before.ljust(len(change.after), b"\0") + change.after for change in plan.changes)
    header = {
        "size-before": plan.size_before,
        "size-after": plan.size_after,
        "ranges": [[change.offset, len(change.after)] for change in plan.changes],
        "sha256": _digest(payload),
    }
    encoded = json.dumps(header).encode()
    with NewFile(path) as new:
        new.storage.writev(0, (_MAGIC, struct.pack(">Q", len(encoded)), encoded, payload), "undo.write")
        new.publish()


def undo_repair(path: str | os.PathLike[str], undo_file: str | os.PathLike[str]) -> int:
    """Take a repair back; may be run again. Returns the number of bytes that were put back.

    Raises Invalid (the undo file is none, is damaged, or belongs to another image or another state of it): then nothing was
    changed.
    """
    size_before, size_after, changes = _read_undo(undo_file)
    storage = FileStorage.open(path, writable=True)
    try:
        foreign = Invalid(f"{os.fspath(path)}: it is not as the repair left it; the undo file does not fit")
        if not min(size_before, size_after) <= storage.size() <= max(size_before, size_after):
            raise foreign
        for change in changes:
            now = bytearray(len(change.after))
            read_padded(storage, change.offset, now)
            for at in range(0, len(now), SECTOR_BYTES):
                sector = now[at : at + SECTOR_BYTES]
                if sector not in (change.before[at : at + SECTOR_BYTES], change.after[at : at + SECTOR_BYTES]):
                    raise foreign
        for change in changes:
            storage.writev(change.offset, (change.before,), "undo.restore")
        storage.truncate(size_before, "undo.size")
        storage.fence("undo.fence")
        return sum(len(change.before) for change in changes)
    finally:
        storage.close()


def _read_undo(path: str | os.PathLike[str]) -> tuple[int, int, list[Changed]]:
    """Sizes before and after, and the ranges. Raises Invalid."""
    wrong = Invalid(f"{os.fspath(path)}: this is no undo file, or it is damaged")
    storage = FileStorage.open(path, allow_devices=False)
    try:
        start = bytearray(len(_MAGIC) + 8)
        if storage.readv(0, (start,)) < len(start) or start[: len(_MAGIC)] != _MAGIC:
            raise wrong
        (length,) = struct.unpack(">Q", start[len(_MAGIC) :])
        if length > min(_MAX_HEADER_BYTES, storage.size()):
            raise wrong
        encoded = bytearray(length)
        storage.readv(len(start), (encoded,))
        payload = bytearray(storage.size() - len(start) - length)
        storage.readv(len(start) + length, (payload,))
    finally:
        storage.close()
    try:
        header = json.loads(encoded)
        sizes = header["size-before"], header["size-after"]
        ranges = [(int(offset), int(size)) for offset, size in header["ranges"]]
        good = header["sha256"] == _digest(bytes(payload)) and sum(size for _, size in ranges) * 2 == len(payload)
        good = good and all(isinstance(size, int) and size >= 0 for size in sizes)
        good = good and all(offset >= 0 and size > 0 and offset + size <= max(sizes) for offset, size in ranges)
    except (ValueError, KeyError, TypeError, Corrupt):
        raise wrong from None
    if not good:
        raise wrong
    changes, at = [], 0
    for offset, size in ranges:
        before, after = bytes(payload[at : at + size]), bytes(payload[at + size : at + 2 * size])
        changes.append(Changed(offset, before, after))
        at += 2 * size
    return int(sizes[0]), int(sizes[1]), changes
