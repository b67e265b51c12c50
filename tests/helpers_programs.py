"""Our command lines, each in a child of a process that has everything loaded (``programs_server``): as a user runs them, at a
fifth of the price."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_SERVER: Final = Path(__file__).with_name("programs_server.py")
_ROOT: Final = Path(__file__).resolve().parents[1]
ENVIRONMENT: Final = os.environ | {"PYTHONPATH": str(_ROOT / "src"), "LC_ALL": "C", "TZ": "UTC"}


class Programs:
    """Started once. One command line at a time: ``busy`` tells others."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._environment = dict(ENVIRONMENT)
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Threads of numpy's would not survive the forks.
            env={**ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )

    @property
    def busy(self) -> bool:
        return self._guard.locked()

    def run(
        self,
        words: Sequence[str],
        folder: str | os.PathLike[str],
        *,
        program: str = "cowfence-img",
        stdin: str = "/dev/null",
        timeout_seconds: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        with self._guard:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            changed = {name: value for name, value in ENVIRONMENT.items() if self._environment.get(name) != value}
            request = [program, list(words), os.fspath(folder), stdin, changed]
            print(json.dumps(request), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], timeout_seconds)[0]:
                self._process.kill()
                raise subprocess.TimeoutExpired(list(words), timeout_seconds)
            code, out, err = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(list(words), code, out, err)

    def close(self) -> None:
        self._process.communicate()
