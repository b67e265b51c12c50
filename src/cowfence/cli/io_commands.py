"""The commands of ``cowfence-io``: the table of all, those about the file, and how one is carried out."""

from __future__ import annotations

import errno
import getopt
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from cowfence.cli import io_report
from cowfence.cli.io_image import Wish, check_cache
from cowfence.cli.io_language import Command, Complaint, Quit, Session, Usage, image_of, number, require_writable
from cowfence.cli.io_requests import aio_read, aio_write, discard, in_background, reading, writing
from cowfence.errors import CowfenceError

_NO_FILE: Final = "no file open, try 'help open'"


def carry_out(session: Session, line: str) -> bool:
    """One command line. Returns False if it failed, having said why. Raises Quit."""
    words = line.split()
    if not words:
        return True
    try:
        return _run(session, words[0], words[1:])
    except Complaint as complaint:
        _say(str(complaint), to_stdout=complaint.to_stdout)
    except CowfenceError as error:
        _say(f"{session.program}: {error}", to_stdout=False)
    return False


def _say(text: str, *, to_stdout: bool) -> None:
    print(text, file=sys.stdout if to_stdout else sys.stderr, flush=True)


def _run(session: Session, name: str, words: list[str]) -> bool:
    command = COMMANDS.get(name)
    if command is None:
        raise Complaint(f'command "{name}" not found', to_stdout=False)
    if session.image is None and not command.without_file:
        raise Complaint(_NO_FILE, to_stdout=False)
    if len(words) < command.least or (command.most is not None and len(words) > command.most):
        if command.most is None:
            wanted = f"at least {command.least} arguments"
        elif command.least == command.most:
            wanted = f"{command.least} arguments"
        else:
            wanted = f"between {command.least} and {command.most} arguments"
        raise Complaint(f"bad argument count {len(words)} to {name}, expected {wanted}", to_stdout=False)
    try:
        given, rest = getopt.gnu_getopt(words, command.options)
    except getopt.GetoptError as error:
        what = "option requires an argument" if "requires" in error.msg else "invalid option"
        _say(f"{name}: {what} -- '{error.opt}'", to_stdout=False)
        raise Complaint(command.line) from None
    try:
        done = command.run(session, {option[1:]: value for option, value in given}, rest)
    except Usage:
        raise Complaint(command.line) from None
    return done is not False


# --- the file ---


def _flush(session: Session, _: dict[str, str], __: list[str]) -> None:
    if image_of(session).disk.writable:
        image_of(session).disk.flush()


def _truncate(session: Session, options: dict[str, str], words: list[str]) -> None:
    from cowfence.disk.raw import RawDisk
    from cowfence.ops.create import PREALLOCATIONS
    from cowfence.ops.resize import resize_disk
    from cowfence.qcow2.image import Qcow2Disk

    preallocation = options.get("m", "off")
    if preallocation not in PREALLOCATIONS:
        raise Complaint(f"{session.program}: Invalid preallocation mode '{preallocation}'", to_stdout=False)
    if len(words) != 1:
        raise Usage
    size = number(words[0])
    require_writable(session)
    disk = image_of(session).disk
    if not isinstance(disk, Qcow2Disk | RawDisk):
        raise Complaint(f"{session.program}: Image format driver does not support resize", to_stdout=False)
    resize_disk(disk, size, shrink=True, preallocation=preallocation)


def _show_length(session: Session, _: dict[str, str], __: list[str]) -> None:
    print(io_report.size(image_of(session).disk.size))


def _alloc(session: Session, _: dict[str, str], words: list[str]) -> None:
    offset = number(words[0])
    count = number(words[1]) if len(words) > 1 else 512
    disk = image_of(session).disk
    count = max(0, min(count, disk.size - offset))
    held = sum(length for _, length, allocated in _runs(session, offset, count) if allocated)
    print(f"{held}/{count} bytes allocated at offset {io_report.size(offset)}")


def _map(session: Session, _: dict[str, str], __: list[str]) -> None:
    for start, length, allocated in _runs(session, 0, image_of(session).disk.size):
        word = "    allocated" if allocated else "not allocated"
        print(f"{io_report.size(length)} ({length:#x}) bytes {word} at offset {io_report.size(start)} ({start:#x})")


def _runs(session: Session, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """(start, length in bytes, whether the image itself has something there), as long as they go."""
    found: list[tuple[int, int, bool]] = []
    raw = image_of(session).format != "qcow2"
    for extent in image_of(session).disk.extents(offset, length) if length else ():
        allocated = raw or (extent.present and not extent.depth)
        if found and found[-1][2] == allocated:
            start, before, _ = found[-1]
            found[-1] = (start, before + extent.length_bytes, allocated)
        else:
            found.append((extent.start, extent.length_bytes, allocated))
    return found


def _info(session: Session, _: dict[str, str], __: list[str]) -> None:
    from cowfence.qcow2.image import Qcow2Disk

    image = image_of(session)
    cluster_bytes = state_at = 0
    lines: list[str] = []
    if isinstance(image.disk, Qcow2Disk):
        from cowfence.cli.info import specific_lines

        geometry = image.disk.header.geometry
        cluster_bytes = geometry.cluster_bytes
        state_at = geometry.l1_entries_for(image.disk.size) << geometry.l1_shift
        lines = specific_lines(image.disk.info())
    print(f"format name: {image.format}")
    print(f"cluster size: {io_report.size(cluster_bytes)}")
    print(f"vm state offset: {io_report.size(state_at)}")
    for line in lines:
        print(line)


def _open(session: Session, options: dict[str, str], words: list[str]) -> bool:
    if session.image is not None:
        raise Complaint(f"{session.program}: file open already, try 'help close'", to_stdout=False)
    for option, what in (("C", "copy on read"), ("k", "native AIO")):
        if option in options:
            raise Complaint(f"{session.program}: open -{option}: there is no {what} here", to_stdout=False)
    if options.get("i", "threads") != "threads":
        raise Complaint(f"{session.program}: open -i {options['i']}: requests are carried out on threads here", to_stdout=False)
    if len(words) > 1 or (bool(words) == ("o" in options)):
        raise Usage
    session.image = session.opened(
        Wish(
            options["o"] if "o" in options else words[0],
            described="o" in options,
            writable="r" not in options,
            temporary="s" in options,
            cache=options.get("t", "none" if "n" in options else "writeback"),
            discard=options.get("d", "unmap"),
            force_share="U" in options,
        )
    )
    return True


def _close(session: Session, _: dict[str, str], __: list[str]) -> None:
    session.close()


def _reopen(session: Session, options: dict[str, str], words: list[str]) -> None:
    if words:
        raise Usage
    if "r" in options and "w" in options:
        raise Complaint(f"{session.program}: Only one -r/-w option may be given", to_stdout=False)
    if "o" in options:
        raise Complaint(f"{session.program}: Cannot change the option '{options['o'].partition('=')[0]}'", to_stdout=False)
    image = image_of(session)
    cache = options.get("c", image.wish.cache)
    check_cache(cache)
    writable = image.wish.writable if not {"r", "w"} & options.keys() else "w" in options
    session.close()
    session.image = session.opened(replace(image.wish, cache=cache, writable=writable))


# --- the rest ---


def _quit(_: Session, __: dict[str, str], ___: list[str]) -> None:
    raise Quit


def _help(_: Session, __: dict[str, str], words: list[str]) -> None:
    if not words:
        for name in sorted(COMMANDS):
            print(COMMANDS[name].line)
        print("\nUse 'help commandname' for extended help.")
        return
    command = COMMANDS.get(words[0])
    if command is None:
        raise Complaint(f"command {words[0]} not found")
    print(command.line)
    if command.manual:
        print(f"\n{command.manual}\n")


def _sleep(_: Session, __: dict[str, str], words: list[str]) -> None:
    if not words[0].isdecimal():
        raise Complaint(f"{words[0]} is not a valid number")
    time.sleep(int(words[0]) / 1000)


def _sigraise(_: Session, __: dict[str, str], words: list[str]) -> None:
    chosen = number(words[0])
    if chosen:
        try:
            signal.raise_signal(chosen)
        except (OSError, ValueError, OverflowError):
            raise Complaint(f"invalid signal number {words[0]}") from None


def _abort(_: Session, __: dict[str, str], ___: list[str]) -> None:
    os.abort()


def _refused(what: str) -> Callable[[Session, dict[str, str], list[str]], None]:
    def refuse(_: Session, __: dict[str, str], words: list[str]) -> None:
        raise Complaint(f"Could not {what.format(*words)}: {os.strerror(errno.ENOTSUP)}")

    return refuse


_SUMMARIES: Final = {
    "aio_read": "asynchronously reads a number of bytes",
    "aio_write": "asynchronously writes a number of bytes",
    "read": "reads a number of bytes at a specified offset",
    "write": "writes a number of bytes at a specified offset",
}
_MEANINGS: Final = {
    "C": "the statistics in a form for programs",
    "P": "this byte: what is written, or what a read has to find",
    "c": "a compressed cluster",
    "f": "durable when it returns",
    "l": "so many bytes have to be the pattern",
    "n": "only if zeros are cheap",
    "q": "no statistics",
    "s": "read: the pattern begins so far on; write: the content of this file, again and again",
    "u": "with -z: the space may be given back",
    "v": "print the bytes",
    "z": "zeros",
}


def _manual(what: str, options: str) -> str:
    """``options``: those of getopt, of a request."""
    return "\n".join([f" {what}", *(f" -{option}, -- {_MEANINGS[option]}" for option in options if option in _MEANINGS)])


def _all() -> Sequence[Command]:
    return (
        Command("abort", _abort, "", "simulate a program crash using abort(3)", without_file=True),
        Command("aio_flush", lambda session, _, __: session.drain(), "", "completes all outstanding aio requests"),
        Command(
            "aio_read",
            in_background(aio_read),
            "[-Ciqv] [-P pattern] off len [len..]",
            _SUMMARIES["aio_read"],
            "CP:iqv",
            least=2,
            most=None,
            manual=_manual("Reads bytes, and prints them with -v.", "CP:iqv"),
        ),
        Command(
            "aio_write",
            in_background(aio_write),
            "[-Cfiquz] [-P pattern] off len [len..]",
            _SUMMARIES["aio_write"],
            "CfiP:quz",
            least=2,
            most=None,
            manual=_manual("Writes bytes: 0xcd, or as told.", "CfiP:quz"),
        ),
        Command("alloc", _alloc, "offset [count]", "checks if offset is allocated in the file", least=1, most=2),
        Command(
            "break",
            _refused("set breakpoint"),
            "event tag",
            "sets a breakpoint on event and tags the stopped request as tag",
            least=2,
            most=2,
        ),
        Command("close", _close, "", "close the current open file"),
        Command(
            "discard",
            discard,
            "[-Cq] off len",
            "discards a number of bytes at a specified offset",
            "Cq",
            least=2,
            most=None,
            manual=_manual("Bytes are no longer needed; their space may be given back.", "Cq"),
        ),
        Command("flush", _flush, "", "flush all in-core file state to disk"),
        Command("help", _help, "[command]", "help for one or all commands", most=1, without_file=True),
        Command("info", _info, "", "prints information about the current file"),
        Command("length", _show_length, "", "gets the length of the current file"),
        Command("map", _map, "", "prints the allocated areas of a file"),
        Command(
            "open",
            _open,
            "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
            "open the file specified by path",
            "snCro:ki:t:d:U",
            least=1,
            most=None,
            without_file=True,
            manual=" Opens a file for the other commands.\n -r, -- for reading only\n -s, -- what is written is thrown away\n"
            " -n, -- around the page cache: -t none\n -t, -- none, writeback, writethrough, directsync, unsafe\n"
            " -d, -- unmap (as without), ignore\n -U, -- beside another writer\n"
            " -o, -- the file, as driver=...,file.filename=...",
        ),
        Command("quit", _quit, "", "exit the program", most=None, without_file=True),
        Command(
            "read",
            reading("read", "read"),
            "[-abCqv] [-P pattern [-s off] [-l len]] off len",
            _SUMMARIES["read"],
            "bCl:pP:qs:v",
            least=2,
            most=None,
            manual=_manual("Reads bytes, and prints them with -v.", "bCl:pP:qs:v"),
        ),
        Command(
            "readv",
            reading("readv", "readv"),
            "[-Cqv] [-P pattern] off len [len..]",
            _SUMMARIES["read"],
            "CP:qv",
            least=2,
            most=None,
            manual=_manual("Reads bytes, and prints them with -v.", "CP:qv"),
        ),
        Command("remove_break", _refused("remove breakpoint {}"), "tag", "remove a breakpoint by tag", least=1, most=1),
        Command(
            "reopen",
            _reopen,
            "[(-r|-w)] [-c cache] [-o options]",
            "reopens an image with new options",
            "c:o:rw",
            most=None,
            manual=" -r, -- for reading only\n -w, -- for writing\n -c, -- the cache mode",
        ),
        Command("resume", _refused("resume request"), "tag", "resumes the request tagged as tag", least=1, most=1),
        Command("sigraise", _sigraise, "signal", "raises a signal", least=1, most=1, without_file=True),
        Command("sleep", _sleep, "", "waits for the given value in milliseconds", least=1, most=1),
        Command(
            "truncate",
            _truncate,
            "[-m prealloc_mode] off",
            "truncates the current file at the given offset",
            "m:",
            least=1,
            most=3,
        ),
        Command(
            "wait_break", _refused("wait for breakpoint {}"), "tag", "waits for the suspension of a request", least=1, most=1
        ),
        Command(
            "write",
            writing("write"),
            "[-bcCfnquz] [-P pattern | -s source_file] off len",
            _SUMMARIES["write"],
            "bcCfnpP:qs:uz",
            least=2,
            most=None,
            manual=_manual("Writes bytes: 0xcd, or as told.", "bcCfnpP:qs:uz"),
        ),
        Command(
            "writev",
            writing("writev"),
            "[-Cfq] [-P pattern] off len [len..]",
            _SUMMARIES["write"],
            "CfqP:",
            least=2,
            most=None,
            manual=_manual("Writes bytes: 0xcd, or as told.", "CfqP:"),
        ),
    )


COMMANDS: Final[dict[str, Command]] = {command.name: command for command in _all()}
