"""The command line as a user runs it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "LC_ALL": "C", "TZ": "UTC"}
COWFENCE = (sys.executable, "-m", "cowfence.cli.main")


def cowfence(
    *words: str | os.PathLike[str], cwd: Path | None = None, before: Sequence[str] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``cowfence``; ``before`` are words of a program that starts it. With ``check`` any exit code but 0 fails."""
    done = subprocess.run(
        [*before, *COWFENCE, *(os.fspath(word) for word in words)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def snapshot_of(directory: Path) -> Mapping[str, bytes]:
    """Every regular file below ``directory`` with its content: to see that nothing changed."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
