"""``python -m bench``: measure the rows of the targets and print one table; ``--write`` keeps it in ``bench/RESULTS.md``.

Everything lies in a tmpfs unless the row says "on the disk". Timings decide no test: this reports.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import convert_rows, explorer, rows
from bench.measure import Row

ROWS: dict[str, Callable[[Path, Path, int], Iterator[Row]]] = {
    "P1": convert_rows.plain,
    "P2": convert_rows.zlib,
    "P3": convert_rows.zstd,
    "P4": convert_rows.back,
    "P5": rows.check,
    "P6": rows.snapshot,
    "P7": rows.random_read,
    "P8": rows.random_write_in_place,
    "P9": rows.allocating_write,
    "P10": rows.flushed_write,
    "P11": rows.sequential,
    "P12": rows.library_reads,
    "P13": rows.fences,
    "P14": rows.memory,
    "P15": rows.info_start,
    "P16": explorer.states,
    "P17": rows.cold_read,
}

_HEAD = "| # | work | peer | peer's median | ours | ratio | target | met |\n|---|---|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """A row of the table."""
    alone = row.better in ("limit", "floor")
    ratio = "-" if alone else f"{row.ratio:.2f}"
    peer_value = f"{row.peer_value:,.4g} {row.unit}" if row.peer else "-"
    bound = f"{'<=' if row.better == 'limit' else '>='} {row.target:g}{f' {row.unit}' if alone else ''}"
    work = f"{row.work} ({row.note})" if row.note else row.work
    met = "yes" if row.met else "no"
    return (
        f"| {row.number} | {work} | {row.peer or '-'} | {peer_value} | {row.ours:,.4g} {row.unit} | {ratio} | {bound} | {met} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {' '.join(ROWS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each side (default: 5)")
    parser.add_argument("--write", action="store_true", help="keep the table in bench/RESULTS.md")
    arguments = parser.parse_args()
    chosen = arguments.rows or list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}")
    missing = [name for name in ("qemu-img", "qemu-nbd", "fio", "hyperfine", "strace") if not shutil.which(name)]
    if missing:
        print(f"bench: needs {', '.join(missing)} (Debian: qemu-utils fio hyperfine strace)", file=sys.stderr)
        return 1
    # An installed program has its bytecode; where this is set, ours would be compiled anew at each start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    lines = [_HEAD]
    print(_HEAD, flush=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as fast, tempfile.TemporaryDirectory(dir=".") as slow:
        for name in chosen:
            for row in ROWS[name](Path(fast), Path(slow).resolve(), arguments.pairs):
                lines.append(line(row))
                print(lines[-1], flush=True)
    if arguments.write:
        Path("bench/RESULTS.md").write_text(_page(lines, arguments.pairs))
    return 0


def _page(lines: list[str], pairs: int) -> str:
    model = "unknown processor"
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            model = text.partition(":")[2].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return (
        "# Results\n\n"
        f"`make bench` on {datetime.date.today()}, commit {commit}, {os.cpu_count()} cores ({model}), "
        f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}; medians of {pairs} pairs taken "
        "in turn, in a tmpfs unless a row says otherwise.\n"
        "Ratios: peer / ours for times, ours / peer for rates.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
