"""Writers in processes of their own, and the keepers beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers_cli import COWFENCE, ENVIRONMENT


def keepers_of(pid: int) -> list[int]:
    """The keepers that a process has started and that live."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"cowfence.keeper" in command_of(int(child)):
                found.append(int(child))
    return found


def command_of(pid: int) -> bytes:
    """The command line of a process; empty for one that is gone or dead."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def keepers_for(image: Path) -> list[int]:
    """All keepers of an image, whosever they are."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if b"cowfence.keeper" in command_of(pid) and os.fsencode(image) in command_of(pid)]


def wait_for(what: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def serve(image: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """``cowfence serve`` at a socket beside the image, and its URI."""
    server = subprocess.Popen(
        [*COWFENCE, "serve", "--socket", str(image.with_name("sock")), *options, str(image)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    uri = server.stdout.readline().strip()
    assert uri, server.communicate()[1]
    return server, uri


def program(text: str, *words: str) -> subprocess.Popen[str]:
    """A Python program that uses the library."""
    return subprocess.Popen(
        [sys.executable, "-c", text, *words],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
