"""From the lines of the guest's serial port to what the guest was promised.

A report may still stand in the serial port's buffer when the machine dies. So the guest may be a few writes further than its
last report says: ``LAG`` of them may have been under way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from guest.content import SLOTS, slot_of

LAG = 4
"""Writes after the last reported one that the guest may have begun."""

_REPORT = re.compile(r"(synced|failed) (\d+) (\d+)")


@dataclass
class Promises:
    """What each writer was promised, over all rounds: writes ``0 .. last[writer]`` are durable."""

    writers: int
    last: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.last = [-1] * self.writers

    def promised(self, writer: int, slot: int) -> int | None:
        """The serial that a file was last promised to hold; None where it was never written."""
        last = self.last[writer]
        serial = last - (last - slot) % SLOTS
        return serial if serial >= 0 else None

    def under_way(self, writer: int, slot: int) -> int | None:
        """The serial that may have been on its way to this file."""
        last = self.last[writer]
        return next((serial for serial in range(last + 1, last + 1 + LAG) if slot_of(serial) == slot), None)


@dataclass
class Console:
    """One boot's reports; each ``synced`` moves the promises on."""

    promises: Promises
    synced: int = 0
    """Reports in this boot."""
    failed: int = 0
    """Writers that met an error."""
    booted: bool = False
    mounted: bool = False
    broken: str = ""
    """Why the guest could not work, in its words."""
    unknown: list[str] = field(default_factory=list)

    def feed(self, line: str) -> None:
        """Take one whole line; a serial that does not follow its writer's last one is not believed."""
        text = line.strip()
        report = _REPORT.fullmatch(text)
        if report and int(report[2]) < self.promises.writers:
            writer, serial = int(report[2]), int(report[3])
            if report[1] == "failed":
                self.failed += 1
            elif serial == self.promises.last[writer] + 1:
                self.promises.last[writer] = serial
                self.synced += 1
            else:
                self.unknown.append(text)
        elif text == "booted":
            self.booted = True
        elif text == "mounted":
            self.mounted = True
        elif text.startswith("broken "):
            self.broken = text.removeprefix("broken ")
        elif text and text != "ended":
            self.unknown.append(text)
