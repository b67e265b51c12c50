"""How the run is shown: a line for each round, then what it comes to. The same facts as JSON."""

from __future__ import annotations

import os
from typing import Any, TextIO

from guest.content import Verdict
from guest.rounds import Round

_HEAD = f"  {'round':>5}  {'killed':<13} {'synced':>7} {'kept':>7} {'newer':>6} {'lost':>5} {'foreign':>8} {'leaks':>6}  e2fsck"
_PROBLEMS_SHOWN = 12


class Screen:
    """Plain lines; colour on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colour = stream.isatty() and "NO_COLOR" not in os.environ

    def title(self, text: str) -> None:
        self._print(f"\n{self._paint('1', text)}\n{self._paint('2', '─' * 78)}")

    def fact(self, name: str, value: str) -> None:
        self._print(f"  {name:<12} {value}")

    def begin(self, layout: str, what: str) -> None:
        """A layout's rounds are about to begin."""
        self._print(f"\n  {self._paint('1;36', layout)}: {what}")
        self._print(self._paint("2", _HEAD))

    def round(self, done: Round) -> None:
        """One round, with its problems."""
        files = done.found.files
        killed = "server" if done.kill == "server" else "server, qemu"
        checked = "journal replayed, clean" if done.found.journal_replayed else "clean"
        reclaimed = "; leaks reclaimed" if done.leaks_reclaimed and done.found.ours.leaks else ""
        good = not done.found.problems
        mark = self._paint("1;32", "✓") if good else self._paint("1;31", "✗")
        self._print(
            f"{mark} {done.number:>5}  {killed:<13} {done.synced:>7,} {files[Verdict.KEPT]:>7,} {files[Verdict.NEWER]:>6,}"
            f" {files[Verdict.LOST]:>5,} {files[Verdict.FOREIGN]:>8,} {done.found.ours.leaks:>6,}"
            f"  {checked if good else 'see below'}{reclaimed}"
        )
        for problem in done.found.problems[:_PROBLEMS_SHOWN]:
            self._print(f"        {self._paint('31', problem)}")
        if len(done.found.problems) > _PROBLEMS_SHOWN:
            self._print(f"        and {len(done.found.problems) - _PROBLEMS_SHOWN:,} more")

    def verdict(self, rounds: list[Round], seed: int, *, good: bool) -> None:
        """The last lines."""
        synced = sum(done.synced for done in rounds)
        lost = sum(done.found.files[Verdict.LOST] + done.found.files[Verdict.FOREIGN] for done in rounds)
        self.title(
            f"{len(rounds)} kills, {synced:,} writes whose fsync returned, {lost} lost"
            f"{'' if good else ': SOMETHING IS WRONG'}   (seed {seed})"
        )
        self._print("  kept: the promised bytes. newer: a write that was under way. Leaks are space, never data.")

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text


def as_json(layout: str, done: Round) -> dict[str, Any]:
    """One round as a JSON object."""
    found = done.found
    return {
        "layout": layout,
        "round": done.number,
        "kill": done.kill,
        "synced": done.synced,
        "writers-failed": done.failed,
        "files": {verdict.value: found.files[verdict] for verdict in Verdict},
        "check": {"corruptions": found.ours.corruptions, "leaks": found.ours.leaks},
        "qemu-img-check": {"corruptions": found.theirs.corruptions, "leaks": found.theirs.leaks},
        "journal-replayed": found.journal_replayed,
        "leaks-reclaimed": done.leaks_reclaimed,
        "problems": found.problems,
    }
