"""QEMU's tools as somebody else's engine: qemu-io driven one command at a time, qemu-img and qemu-nbd run to their end.

Nothing here knows a crash model. ``QemuIo`` is a conversation over pipes: the prompt says that a command has returned, which is
the instant at which the guest's side of the story is noted.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Final

from cowfence.errors import CowfenceError, Invalid

DEBIAN_PACKAGE: Final = "qemu-utils"
_PROMPT: Final = b"qemu-io> "
_ENVIRONMENT: Final = {"LC_ALL": "C"}
_ANSWER_MAX: Final = 1 << 20


class MissingProgram(CowfenceError):
    """A program that is to be judged, or to judge, is not installed."""

    def __init__(self, name: str, package: str = DEBIAN_PACKAGE) -> None:
        super().__init__(f"{name} is not installed (Debian: apt-get install {package})")


class ProgramFailed(CowfenceError):
    """The program ended, or answered, in a way that the script cannot go on from."""


def find(name: str) -> str:
    """The path of one of QEMU's tools. Raises MissingProgram."""
    path = shutil.which(name)
    if path is None:
        raise MissingProgram(name)
    return path


def version() -> str:
    """As ``qemu-img --version`` gives it: ``7.2.22 (Debian ...)``."""
    first = run(["qemu-img", "--version"]).stdout.splitlines()[0]
    return first.removeprefix("qemu-img version ")


def run(words: Sequence[str], *, check: bool = True, timeout_seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run one of QEMU's tools to its end. Raises MissingProgram, ProgramFailed (with ``check``, an exit code but 0)."""
    try:
        done = subprocess.run(
            [find(words[0]), *words[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=timeout_seconds,
            env=os.environ | _ENVIRONMENT,
        )
    except subprocess.TimeoutExpired:
        raise ProgramFailed(f"{' '.join(words)}: no end after {timeout_seconds:g} s") from None
    if check and done.returncode:
        raise ProgramFailed(f"{' '.join(words)}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done


class QemuIo:
    """qemu-io on one disk. ``arguments``: what follows its name. Commands are answered one by one."""

    def __init__(self, arguments: Sequence[str], *, timeout_seconds: float = 30.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._process = subprocess.Popen(
            [find("qemu-io"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | _ENVIRONMENT,
        )
        try:
            self._answer("the start")
        except BaseException:
            self.kill()
            raise

    def command(self, line: str) -> str:
        """Send a command and wait until it has returned; what it printed. Raises ProgramFailed where qemu-io went away."""
        if "\n" in line:
            raise Invalid("a command is one line")
        self._send(line)
        return self._answer(line)

    def close(self) -> None:
        """End it by ``quit``, as a user does: the image is closed cleanly."""
        try:
            self._send("quit")
            self._process.communicate(timeout=self._timeout_seconds)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.kill()
            raise ProgramFailed("qemu-io does not end") from None

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ProgramFailed(f"qemu-io went away before {line!a}") from None

    def _answer(self, line: str) -> str:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        answer = b""
        deadline = time.monotonic() + self._timeout_seconds
        while not answer.endswith(_PROMPT):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise ProgramFailed(f"qemu-io does not answer {line!a}")
            piece = os.read(descriptor, 65536)
            if not piece or len(answer) > _ANSWER_MAX:
                text = answer.decode(errors="replace").strip()
                raise ProgramFailed(f"qemu-io ended at {line!a}: {text or 'without a word'}")
            answer += piece
        return answer.removesuffix(_PROMPT).decode(errors="replace")
