"""``python -m fuzz``: cases for as long as it is given, on all cores; ``--case N`` carries one out again."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter

from fuzz import one_case


def _work(begin: int, step: int, seconds: float) -> tuple[Counter[str], list[tuple[int, str]]]:
    counted: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    end = time.monotonic() + seconds
    for number in itertools.count(begin, step):
        if time.monotonic() > end or len(failed) >= 10:
            break
        try:
            counted[one_case(number)] += 1
        except Exception:
            failed.append((number, traceback.format_exc()))
    return counted, failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="(default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="the first case (default: 0)")
    parser.add_argument("--case", type=int, metavar="N", help="this case alone")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(one_case(arguments.case))
        return 0
    workers = os.cpu_count() or 1
    with multiprocessing.Pool(workers) as pool:
        parts = [(arguments.seed + worker, workers, arguments.seconds) for worker in range(workers)]
        results = pool.starmap(_work, parts)
    counted = sum((counts for counts, _ in results), Counter[str]())
    failed = [failure for _, failures in results for failure in failures]
    for number, text in failed:
        print(f"case {number}:\n{text}", file=sys.stderr)
    told = ", ".join(f"{count:,} of {name}" for name, count in sorted(counted.items()))
    print(f"{counted.total():,} cases in {arguments.seconds:g} s ({told}): {len(failed) or 'no'} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
