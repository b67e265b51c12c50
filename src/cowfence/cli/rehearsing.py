"""``--dry-run``, for subcommands that change images: all is done as it would be, but in memory (``storage.rehearsal``)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cowfence.cli.main import one_line, print_json

if TYPE_CHECKING:
    from cowfence.storage.rehearsal import FileChange, Rehearsal


def add_dry_run_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="write nothing; say what would be written")


def rehearsal_of(arguments: argparse.Namespace) -> Rehearsal | None:
    """Where changes go instead of to the files, if ``--dry-run`` was given."""
    if not arguments.dry_run:
        return None
    from cowfence.storage.rehearsal import Rehearsal

    return Rehearsal()


def tell(arguments: argparse.Namespace, rehearsal: Rehearsal, result: Mapping[str, object], *, code: int = 0) -> int:
    """Print what would be: the ``result`` that the command has, and the files. Returns the exit code ``code``."""
    if arguments.output == "json":
        print_json({**result, "dry-run": True, "files": [change.to_dict() for change in rehearsal.changes]})
    elif not arguments.quiet:
        for change in rehearsal.changes:
            print(_line(change))
        print("Nothing was written.")
    return code


def _line(change: FileChange) -> str:
    path = one_line(change.path)
    if change.old_bytes is None:
        return f"{path}: a file of {change.new_bytes} bytes would be made."
    if not change.changed_bytes:
        return f"{path}: nothing would be changed."
    longer = change.new_bytes - change.old_bytes
    length = f"; {abs(longer)} bytes {'longer' if longer > 0 else 'shorter'}: {change.new_bytes} bytes" if longer else ""
    return f"{path}: {change.changed_bytes} bytes would be changed{length}."
