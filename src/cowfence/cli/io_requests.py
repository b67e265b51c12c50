"""The requests of ``cowfence-io``: reads, writes and discards, at once or in the background."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from cowfence.cli import io_report
from cowfence.cli.io_image import Image
from cowfence.cli.io_language import (
    Complaint,
    Session,
    Usage,
    check_range,
    image_of,
    length_of,
    number,
    offset_and_length,
    pattern_of,
    reason,
    require_writable,
)
from cowfence.errors import CowfenceError, Unsupported

Run: TypeAlias = Callable[[Session, dict[str, str], list[str]], bool | None]


@dataclass(frozen=True)
class _Check:
    """What a read is held against: ``length`` bytes of ``pattern`` from ``start`` of what was read on."""

    pattern: int
    start: int
    length: int


def _read(session: Session, name: str, options: dict[str, str], words: list[str], failed: str) -> bool:
    offset, length, check = _read_plan(name, options, words)
    check_range(image_of(session), offset, length, failed)
    text, good = _read_now(image_of(session), options, offset, length, check, failed)
    if text:
        print(text, flush=True)
    return good


def _read_plan(name: str, options: dict[str, str], words: list[str]) -> tuple[int, int, _Check | None]:
    if "b" in options:
        raise Complaint(f"{name} -b: there is no VM state here")
    pattern = pattern_of(options["P"]) if "P" in options else None
    start = number(options["s"]) if "s" in options else 0
    count = length_of(options["l"]) if "l" in options else None
    offset, length = offset_and_length(words, several=name != "read")
    if pattern is None:
        if "s" in options or "l" in options:
            raise Usage
        return offset, length, None
    if count is None:
        count = length - start
    if count < 0 or start + count > length:
        raise Complaint("pattern verification range exceeds end of read data")
    return offset, length, _Check(pattern, start, count)


def _read_now(
    image: Image, options: dict[str, str], offset: int, length: int, check: _Check | None, failed: str
) -> tuple[str, bool]:
    began = time.perf_counter()
    buffer = bytearray(length)
    try:
        image.disk.read_into(offset, buffer)
    except CowfenceError as error:
        return f"{failed} failed: {reason(error)}", False
    seconds = time.perf_counter() - began
    lines = []
    good = True
    if check is not None:
        part = memoryview(buffer)[check.start : check.start + check.length]
        good = part == bytes([check.pattern]) * check.length
        if not good:
            lines.append(f"Pattern verification failed at offset {offset + check.start}, {check.length} bytes")
    if "q" not in options:
        if "v" in options and buffer:
            lines.append(io_report.dump(buffer, offset))
        lines.append(io_report.report("read", seconds, offset, length, length, machine="C" in options))
    return "\n".join(lines), good


def _write(session: Session, name: str, options: dict[str, str], words: list[str]) -> bool:
    _check_write_options(name, options)
    pattern = pattern_of(options["P"]) if "P" in options else 0xCD
    offset, length = offset_and_length(words, several=name == "writev")
    require_writable(session)
    data = b"" if "z" in options else _data(options, pattern, length)
    failed = "writev" if name == "writev" else "write"
    check_range(image_of(session), offset, length, failed)
    text, good = _write_now(image_of(session), options, offset, length, data, failed)
    if text:
        print(text, flush=True)
    return good


def _check_write_options(name: str, options: dict[str, str]) -> None:
    if "b" in options:
        raise Complaint(f"{name} -b: there is no VM state here")
    if "f" in options and "c" in options:
        raise Complaint("-f and -b or -c cannot be specified at the same time")
    if "n" in options and "z" not in options:
        raise Complaint("-n requires -z to be specified")
    if "u" in options and "z" not in options:
        raise Complaint("-u requires -z to be specified")
    if sum(option in options for option in "zPs") > 1:
        raise Complaint("Only one of -z, -P, and -s can be specified at the same time")


def _data(options: dict[str, str], pattern: int, length: int) -> bytes:
    if "s" not in options:
        return bytes([pattern]) * length
    try:
        with open(options["s"], "rb") as file:
            content = file.read(length)
    except OSError as error:
        raise Complaint(f"{options['s']}: {error.strerror}", to_stdout=False) from None
    if not content and length:
        raise Complaint(f"{options['s']}: the file is empty", to_stdout=False)
    return (content * (length // max(1, len(content)) + 1))[:length]


def _write_now(image: Image, options: dict[str, str], offset: int, length: int, data: bytes, failed: str) -> tuple[str, bool]:
    began = time.perf_counter()
    fua = "f" in options
    try:
        if "z" in options:
            image.disk.zero(offset, length, unmap="u" in options and image.discards, fua=fua)
        elif "c" in options:
            _compress(image, offset, data)
        else:
            image.disk.write(offset, data, fua=fua)
    except CowfenceError as error:
        return f"{failed} failed: {reason(error)}", False
    seconds = time.perf_counter() - began
    if "q" in options:
        return "", True
    return io_report.report("wrote", seconds, offset, length, length, machine="C" in options), True


def _compress(image: Image, offset: int, data: bytes) -> None:
    from cowfence.qcow2.image import Qcow2Disk

    if not isinstance(image.disk, Qcow2Disk):
        raise Unsupported(image.path, "compressed clusters of a raw image")
    image.disk.write_compressed(offset, data)


def aio_read(session: Session, options: dict[str, str], words: list[str]) -> None:
    offset, length, check = _read_plan("aio_read", options, words)
    image = image_of(session)
    _check_aio(image, offset, length, "readv", options)
    session.in_background(lambda: _read_now(image, options, offset, length, check, "readv")[0])


def aio_write(session: Session, options: dict[str, str], words: list[str]) -> None:
    if "u" in options and "z" not in options:
        raise Complaint("-u requires -z to be specified")
    pattern = pattern_of(options["P"]) if "P" in options else 0xCD
    offset, length = offset_and_length(words, several=True)
    require_writable(session)
    image = image_of(session)
    _check_aio(image, offset, length, "aio_write", options)
    data = b"" if "z" in options else bytes([pattern]) * length
    session.in_background(lambda: _write_now(image, options, offset, length, data, "aio_write")[0])


def _check_aio(image: Image, offset: int, length: int, failed: str, options: dict[str, str]) -> None:
    """A request that goes wrong is still one that was begun."""
    if "i" in options:
        raise Complaint("-i: no statistics are kept here")
    if offset + length > image.disk.size:
        print(f"{failed} failed: {os.strerror(errno.EIO)}", flush=True)
        raise _Begun


class _Begun(Exception):
    pass


def discard(session: Session, options: dict[str, str], words: list[str]) -> bool:
    offset, length = offset_and_length(words, several=False)
    require_writable(session)
    image = image_of(session)
    check_range(image, offset, length, "discard")
    began = time.perf_counter()
    try:
        if image.discards:
            image.disk.discard(offset, length)
    except CowfenceError as error:
        raise Complaint(f"discard failed: {reason(error)}") from None
    seconds = time.perf_counter() - began
    if "q" not in options:
        print(io_report.report("discard", seconds, offset, length, length, machine="C" in options), flush=True)
    return True


def reading(name: str, failed: str) -> Run:
    return lambda session, options, words: _read(session, name, options, words, failed)


def writing(name: str) -> Run:
    return lambda session, options, words: _write(session, name, options, words)


def in_background(run: Callable[[Session, dict[str, str], list[str]], None]) -> Run:
    def begin(session: Session, options: dict[str, str], words: list[str]) -> None:
        try:
            run(session, options, words)
        except _Begun:
            return

    return begin
