"""The table of internal snapshots that ``info`` and ``snapshot -l`` print, byte for byte that of qemu-img 7.2."""

from __future__ import annotations

import time
from collections.abc import Iterable

from cowfence.disk.opener import printable
from cowfence.qcow2.snapshot_table import Snapshot
from cowfence.units import format_size

_NANO = 10**9


def snapshot_lines(snapshots: Iterable[Snapshot]) -> list[str]:
    """The title, the head, and a line for each snapshot. Dates in local time."""
    head = _columns("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    return ["Snapshot list:", head, *map(_line, snapshots)]


def _columns(ident: str, tag: str, vm_size: str, date: str, vm_clock: str, icount: str) -> str:
    return f"{ident:<9} {tag:<16} {vm_size:>8}{date:>20}{vm_clock:>13}{icount:>11}"


def _line(snapshot: Snapshot) -> str:
    seconds, rest = divmod(snapshot.vm_clock_nanoseconds, _NANO)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest // 1000000:03}"
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_seconds))
    icount = "" if snapshot.icount is None else str(snapshot.icount)
    # Names come out of images: one line each, and nothing that steers a terminal.
    return _columns(printable(snapshot.id), printable(snapshot.name), format_size(snapshot.vm_state_bytes), date, clock, icount)
