"""The command line as a user runs it."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from helpers_programs import ENVIRONMENT, Programs

ROOT = Path(__file__).resolve().parents[1]
COWFENCE = (sys.executable, "-m", "cowfence.cli.main")
__all__ = ["COWFENCE", "ENVIRONMENT", "ROOT", "cowfence", "running", "shared_programs", "snapshot_of"]


@cache
def shared_programs() -> Programs:
    """For all tests of a worker."""
    programs = Programs()
    atexit.register(programs.close)
    return programs


def cowfence(
    *words: str | os.PathLike[str], cwd: Path | None = None, before: Sequence[str] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``cowfence``; ``before`` are words of a program that starts it. With ``check`` any exit code but 0 fails."""
    programs = shared_programs()
    given = [os.fspath(word) for word in words]
    if not before and not programs.busy:
        done = programs.run(given, cwd or os.getcwd(), program="cowfence")
    else:
        done = subprocess.run(
            [*before, *COWFENCE, *given], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
        )
    assert not check or done.returncode == 0, done.stderr
    return done


def snapshot_of(directory: Path) -> Mapping[str, bytes]:
    """Every regular file below ``directory`` with its content: to see that nothing changed."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@contextmanager
def running(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``cowfence serve`` with words in ``folder``; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        argv = [*COWFENCE, "serve", *words]
        server = subprocess.Popen(argv, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(server)
        return server

    try:
        yield begin
    finally:
        for server in started:
            server.kill()
            server.communicate()
