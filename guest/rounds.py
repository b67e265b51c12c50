"""The run: round after round on one image, each with a kill at a moment that the seed chooses."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from guest.console import Console, Promises
from guest.disks import Disk, cowfence_check
from guest.fetch import Guest, Missing
from guest.judge import Found, judge
from guest.machine import Machine, Server

KILLS = ("server", "both")
"""SIGKILL of the server, whose guest then meets I/O errors; or of the server and QEMU together."""

WRITERS = 4

_BOOT_AND_WRITE_SECONDS = 240.0
_ERRORS_SECONDS = 20.0


@dataclass
class Round:
    """One boot, one kill, and what was found."""

    number: int
    kill: str
    synced: int
    """Writes promised in this boot."""
    failed: int
    """Writers that had met an error when the guest was stopped."""
    found: Found
    leaks_reclaimed: bool = False


@dataclass(frozen=True)
class Plan:
    """What is the same in every round."""

    guest: Guest
    accel: str
    """QEMU's accelerator."""
    cache: str
    """``--cache`` of the server."""
    most_writes: int
    """Before a kill."""


def run_rounds(plan: Plan, disk: Disk, kills: list[str], rng: random.Random) -> Iterator[Round]:
    """Each round as it ends; the first with a problem is the last. Raises Missing where the guest cannot work."""
    promises = Promises(WRITERS)
    for number, kill in enumerate(kills, 1):
        console = Console(promises)
        _boot_and_kill(plan, disk, kill, console, rng)
        found = judge(disk, promises)
        if console.unknown:
            found.problems.append(f"the guest said what cannot be: {console.unknown[0]!r}")
        done = Round(number, kill, console.synced, console.failed, found)
        # Every other round goes on with the leaks of those before.
        if not found.problems and number % 2 == 0:
            _reclaim(disk, promises, found)
            done.leaks_reclaimed = True
        yield done
        if found.problems:
            return


def _boot_and_kill(plan: Plan, disk: Disk, kill: str, console: Console, rng: random.Random) -> None:
    count, moment_seconds, server_first = rng.randint(1, plan.most_writes), rng.random() * 0.1, rng.random() < 0.5
    socket, kernel_log = disk.folder / "nbd.sock", disk.folder / "kernel.log"
    server = Server(disk.image, socket, plan.cache)
    machine = Machine(plan.guest, plan.accel, socket, console, kernel_log)
    try:
        machine.wait_for(lambda seen: seen.synced >= count or bool(seen.broken), _BOOT_AND_WRITE_SECONDS)
        came_far_enough = console.synced >= count
        time.sleep(moment_seconds)
    finally:
        if kill == "both":
            for process in (server, machine) if server_first else (machine, server):
                process.kill()
        server.kill()
        server.wait()
        if kill == "server":
            machine.wait_for(lambda seen: seen.failed >= WRITERS, _ERRORS_SECONDS)
        machine.kill()
        machine.wait()
    if not came_far_enough:
        reason = console.broken or f"{console.synced} of {count} writes in {_BOOT_AND_WRITE_SECONDS:.0f} s"
        said = machine.messages.decode(errors="replace").strip().splitlines()
        raise Missing(f"the guest did not work: {reason} {said[-1] if said else ''} (see {kernel_log})")


def _reclaim(disk: Disk, promises: Promises, found: Found) -> None:
    """Take the leaks back; this must change nothing that a guest sees."""
    repaired = cowfence_check(disk.image, repair_leaks=True)
    if repaired.exit_code != 0:
        found.problems.append(f"cowfence check -r leaks: exit code {repaired.exit_code}, {repaired.leaks} leaks left")
    elif repaired.leaks_fixed:
        found.problems += judge(disk, promises).problems
