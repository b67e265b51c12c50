"""``qemu-io``'s command language: what a command is, how its words are read, what it says when it cannot be done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from cowfence.cli.io_image import Image, Wish
from cowfence.errors import CowfenceError, Invalid, NoSpace, StorageFailed, Unsupported
from cowfence.units import parse_size

_MAX_BYTES: Final = 2147483136
"""The longest request, as QEMU has it: just under 2 GiB."""
_AIO_THREADS: Final = 16


class Complaint(Exception):
    """A command cannot be carried out. ``to_stdout``: where qemu-io says this."""

    def __init__(self, text: str, *, to_stdout: bool = True) -> None:
        super().__init__(text)
        self.to_stdout = to_stdout


class Usage(Exception):
    """A command has the wrong words."""


class Quit(Exception):
    """The end was asked for."""


@dataclass
class Session:
    """What the commands work on. ``program``: the name that messages begin with; ``opened``: opens an image."""

    program: str
    opened: Callable[[Wish], Image]
    image: Image | None = None
    pending: list[Future[str]] = field(default_factory=list)
    pool: ThreadPoolExecutor | None = None

    def in_background(self, work: Callable[[], str]) -> None:
        if self.pool is None:
            self.pool = ThreadPoolExecutor(_AIO_THREADS, thread_name_prefix="cowfence-aio")
        self.pending.append(self.pool.submit(work))

    def drain(self) -> None:
        """Wait for what was begun, and print what became of it, in the order in which it was begun."""
        for future in self.pending:
            text = future.result()
            if text:
                print(text, flush=True)
        self.pending.clear()

    def close(self) -> None:
        """Raises what flushing the image raises."""
        self.drain()
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None
        if self.image is not None:
            image, self.image = self.image, None
            image.close()


@dataclass(frozen=True)
class Command:
    """``options``: of getopt. ``least``, ``most``: words behind the command's name, options counted (None: any number)."""

    name: str
    run: Callable[[Session, dict[str, str], list[str]], bool | None]
    usage: str
    summary: str
    options: str = ""
    least: int = 0
    most: int | None = 0
    without_file: bool = False
    manual: str = ""

    @property
    def line(self) -> str:
        return f"{self.name} {self.usage}{' ' if self.usage else ''}-- {self.summary}"


def image_of(session: Session) -> Image:
    assert session.image is not None  # since _run
    return session.image


def number(text: str) -> int:
    """A size as qemu-io takes it, hexadecimal too."""
    try:
        return int(text, 16) if text[:2].lower() == "0x" else parse_size(text)
    except ValueError as error:
        if "too large" in str(error):
            raise Complaint(f"Parsing error: argument too large -- {text}") from None
        raise Complaint(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}") from None


def length_of(text: str) -> int:
    length = number(text)
    if length > _MAX_BYTES:
        raise Complaint(f"length cannot exceed {_MAX_BYTES}, given {text}")
    return length


def pattern_of(text: str) -> int:
    try:
        value = int(text, 8 if text[:1] == "0" and text[1:].isdigit() else 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 255:
        raise Complaint(f"{text} is not a valid pattern byte")
    return value


def offset_and_length(words: list[str], *, several: bool) -> tuple[int, int]:
    """Of a request; ``several``: its length is given in parts."""
    if len(words) < 2 or (len(words) > 2 and not several):
        raise Usage
    offset = number(words[0])
    length = sum(length_of(word) for word in words[1:])
    if length > _MAX_BYTES:
        raise Complaint(f"length cannot exceed {_MAX_BYTES}, given {length}")
    return offset, length


def reason(error: CowfenceError) -> str:
    """As the host would call it."""
    number = errno.EIO
    if isinstance(error, NoSpace):
        number = errno.ENOSPC
    elif isinstance(error, StorageFailed) and isinstance(error.__cause__, OSError) and error.__cause__.errno:
        number = error.__cause__.errno
    elif isinstance(error, Unsupported):
        number = errno.ENOTSUP
    elif isinstance(error, Invalid):
        number = errno.EINVAL
    return os.strerror(number)


def require_writable(session: Session) -> None:
    if not image_of(session).disk.writable:
        raise Complaint(f"{session.program}: Block node is read-only", to_stdout=False)


def check_range(image: Image, offset: int, length: int, failed: str) -> None:
    if offset + length > image.disk.size:
        raise Complaint(f"{failed} failed: {os.strerror(errno.EIO)}")
