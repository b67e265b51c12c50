"""Scripts for other programs: qemu-io's commands, one a line, and whole command lines of qemu-img between them (of qemu-io
too, where files are prepared).

    write [-c] [-f] [-P BYTE] OFFSET LENGTH     write -z [-u] OFFSET LENGTH     discard OFFSET LENGTH     flush
    aio_write [-z [-u]] [-P BYTE] OFFSET LENGTH     aio_flush     qemu-img ARGUMENTS
    kill        (the program is killed and the image opened again)

A write without ``-P`` gets sectors that name their own place and serial number, so that foreign data shows. ``aio_write`` takes
no bytes from a file in QEMU; it gets a byte of its own for each write. In command lines ``IMG`` stands for the image that is
judged, and any other word of three capitals or more for a further file of the run, such as ``BASE``.
"""

from __future__ import annotations

import getopt
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from cowfence.crash.images import tagged
from cowfence.errors import Invalid
from cowfence.units import SECTOR_BYTES, parse_size

Verb = Literal["write", "zero", "discard", "flush", "aio_write", "aio_zero", "aio_flush", "tool", "kill"]

_OPTIONS: Final = {"write": "cfzuqP:", "aio_write": "fzuqP:", "discard": "q", "flush": "", "aio_flush": "", "kill": ""}
_LONGEST: Final = 256 * 1024 * 1024
_FILE_WORD: Final = re.compile(r"\b[A-Z][A-Z0-9]{2,}\b")


@dataclass(frozen=True, slots=True)
class Command:
    """One line of a script. ``text``: as it stands there. Offsets and lengths in bytes, multiples of 512."""

    verb: Verb
    text: str
    offset: int = 0
    length_bytes: int = 0
    pattern: int | None = None
    flags: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()

    def data(self, serial: int) -> bytes:
        """What the command writes as the ``serial``-th of its script; nothing where it writes nothing."""
        if self.verb in ("zero", "aio_zero"):
            return bytes(self.length_bytes)
        if self.verb not in ("write", "aio_write"):
            return b""
        if self.pattern is not None:
            return bytes([self.pattern]) * self.length_bytes
        if self.verb == "aio_write":
            return bytes([self.aio_byte(serial)]) * self.length_bytes
        return tagged(self.offset, self.length_bytes, serial)

    def aio_byte(self, serial: int) -> int:
        return 0x40 + serial % 0xB0

    def qemu_io(self, serial: int, pattern_file: str) -> str:
        """The line for qemu-io; ``pattern_file`` holds ``data(serial)``."""
        flags = "".join(f" -{flag}" for flag in sorted(self.flags))
        if self.verb == "write":
            source = f"-s {pattern_file}" if self.pattern is None else f"-P {self.pattern}"
            return f"write{flags} {source} {self.offset} {self.length_bytes}"
        if self.verb == "aio_write":
            byte = self.aio_byte(serial) if self.pattern is None else self.pattern
            return f"aio_write{flags} -P {byte} {self.offset} {self.length_bytes}"
        if self.verb in ("zero", "aio_zero", "discard"):
            name = {"zero": "write -z", "aio_zero": "aio_write -z", "discard": "discard"}[self.verb]
            return f"{name}{flags} {self.offset} {self.length_bytes}"
        return self.verb


def parse(lines: Iterable[str]) -> tuple[Command, ...]:
    """Commands from lines; empty ones and comments (``#``) are left out. Raises Invalid with the line."""
    found = []
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if text:
            try:
                found.append(_command(text))
            except (ValueError, getopt.GetoptError) as error:
                raise Invalid(f"line {number}, {text!a}: {error}") from None
    return tuple(found)


def _command(text: str) -> Command:
    words = shlex.split(text)
    name, rest = words[0], words[1:]
    if name in ("qemu-img", "qemu-io"):
        return Command("tool", text, words=tuple(words))
    if name not in _OPTIONS:
        raise ValueError(f"there is no command {name!a} here; there are {', '.join(_OPTIONS)} and qemu-img")
    options, operands = getopt.getopt(rest, _OPTIONS[name])
    given = {option.lstrip("-"): value for option, value in options if option != "-q"}
    if name in ("flush", "aio_flush", "kill"):
        if operands:
            raise ValueError("it takes no operands")
        return Command("flush" if name == "flush" else "kill" if name == "kill" else "aio_flush", text)
    if len(operands) != 2:
        raise ValueError("it takes an offset and a length")
    offset, length_bytes = (parse_size(operand) for operand in operands)
    if offset % SECTOR_BYTES or length_bytes % SECTOR_BYTES or not 0 < length_bytes <= _LONGEST:
        raise ValueError("offset and length are multiples of 512, and the length is from 512 bytes to 256 MiB")
    pattern = None
    if "P" in given:
        pattern = int(given.pop("P"), 0)
        if not 0 <= pattern <= 0xFF:
            raise ValueError("a pattern is a byte")
    verb: Verb = "discard" if name == "discard" else "aio_write" if name == "aio_write" else "write"
    if "z" in given:
        del given["z"]
        verb = "zero" if name == "write" else "aio_zero"
        if pattern is not None:
            raise ValueError("-z and -P exclude each other")
    return Command(verb, text, offset, length_bytes, pattern, frozenset(given))


def file_words(commands: Iterable[Command]) -> list[str]:
    """The names of files that command lines mention: ``IMG``, ``BASE`` and the like."""
    found: dict[str, None] = {}
    for command in commands:
        for word in command.words:
            found.update(dict.fromkeys(_FILE_WORD.findall(word)))
    return list(found)


def with_paths(words: Iterable[str], paths: dict[str, str]) -> list[str]:
    """A command line with the paths in place of the names of files; the name of a backing file stays relative."""
    found: list[str] = []
    for word in words:
        is_backing = bool(found) and found[-1] in ("-b", "-B") and found[1] in ("create", "rebase")
        found.append(word if is_backing else _FILE_WORD.sub(lambda match: paths.get(match[0], match[0]), word))
    return found
