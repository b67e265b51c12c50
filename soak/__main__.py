"""``python -m soak``: exit code 0 where every promise was kept, else 1."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from soak import Soak, as_json


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="(default: 1800)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=".") as folder:
        soak = Soak(
            Path(folder),
            seconds=arguments.seconds,
            seed=arguments.seed,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        outcome = soak.run()
    print(as_json(outcome))
    for line in outcome.wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
