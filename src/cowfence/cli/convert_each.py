"""``convert --each DIR``: every source into an image of its own; a table, and one exit code: 0 where all went well, else 1."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from cowfence.cli.main import EXIT_FAILED, complain, one_line, print_json
from cowfence.disk.opener import printable
from cowfence.errors import CowfenceError, Invalid
from cowfence.units import MIB

if TYPE_CHECKING:
    from cowfence.ops.convert import Converted
    from cowfence.qcow2.describe import JsonValue

_ENDINGS: Final = (".raw", ".img", ".qcow2", ".qcow", ".luks")


def convert_each(
    arguments: argparse.Namespace, sources: Sequence[str], convert: Callable[[str, str], tuple[Converted, int]]
) -> int:
    """Call ``convert`` for each source and its target, also after one has failed. Raises Invalid before anything is done where
    two targets, or a source and a target, are the same file."""
    targets = list(_targets(sources, arguments.each, arguments.target_format or "raw"))
    rows: list[str] = []
    told: list[JsonValue] = []
    code = 0
    for source, target in zip(sources, targets, strict=True):
        began = time.monotonic()
        try:
            converted, file_bytes = convert(source, target)
        except CowfenceError as error:
            code = complain(arguments, str(error))
            rows.append(f"{'failed':<10}{'':>12}{'':>12}{'':>10}  {one_line(source)}")
            told.append({"source": source, "target": target, "result": "failed", "error": str(error)})
            continue
        seconds = time.monotonic() - began
        word = "would be" if arguments.dry_run else "done"
        if converted.unreadable:
            # As of one image alone: a warning was given for each part, and --salvage asked for that.
            word = "salvaged"
        length = file_bytes if arguments.dry_run else _length_bytes(target)
        data, made = f"{converted.data_bytes / MIB:.1f} MiB", f"{length / MIB:.1f} MiB"
        rows.append(f"{word:<10}{data:>12}{made:>12}{seconds:>8.1f} s  {one_line(target)}")
        told.append({**converted.to_dict(), "result": word, "file-size": length, "milliseconds": round(seconds * 1000)})
    if arguments.output == "json":
        print_json(told)
    elif not arguments.quiet:
        print(f"{'RESULT':<10}{'DATA':>12}{'FILE':>12}{'TIME':>10}  IMAGE")
        print("\n".join(rows))
    return EXIT_FAILED if code else 0


def _targets(sources: Sequence[str], directory: str, format_name: str) -> Iterator[str]:
    """The name of each source in the directory, with the ending of the new format. Raises Invalid."""
    if not os.path.isdir(directory):
        raise Invalid(f"{printable(directory)}: no directory")
    taken: dict[str, str] = {os.path.realpath(source): "it is a source" for source in sources}
    for source in sources:
        stem, ending = os.path.splitext(os.path.basename(source))
        name = f"{stem if ending in _ENDINGS else stem + ending}.{format_name}"
        target = os.path.join(directory, name)
        where = os.path.realpath(target)
        if where in taken:
            raise Invalid(f"{printable(target)}: cannot be the target of {printable(source)}: {taken[where]}")
        taken[where] = f"it is that of {printable(source)}"
        yield target


def _length_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
