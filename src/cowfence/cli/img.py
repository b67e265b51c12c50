"""``cowfence-img``: qemu-img's command line, under a name of its own. The same code as ``cowfence``; only subcommands that
qemu-img has."""

from __future__ import annotations

import sys

from cowfence.cli.main import COMMANDS, entry_of

NAMES = (
    "amend",
    "bench",
    "bitmap",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "dd",
    "info",
    "map",
    "measure",
    "rebase",
    "resize",
    "snapshot",
)


def entry() -> int:
    """Run the command line; returns the exit code."""
    return entry_of("cowfence-img", {name: COMMANDS[name] for name in NAMES})


if __name__ == "__main__":
    sys.exit(entry())
