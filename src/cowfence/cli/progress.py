"""``-p`` and ``--progress``: how far it is; as qemu-img shows it, with rate and remaining time on a terminal, and for programs
as lines of JSON on standard error."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_SHOWN_EACH_SECONDS = 0.1


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", dest="progress", action="store_const", const="text", help="show how far it is")
    parser.add_argument(
        "--progress",
        dest="progress",
        choices=("text", "json"),
        help="text: as -p; json: a line for programs on standard error, with bytes, rate and the seconds that are left",
    )


@contextmanager
def shown(arguments: argparse.Namespace) -> Iterator[Callable[[float], None] | None]:
    """Whom to tell the fraction that is done, 0 to 1; None where nobody wants to know."""
    meter = _meter(arguments, sys.stdout)
    if meter is None:
        yield None
        return
    with meter.running():
        yield meter.fraction


@contextmanager
def shown_bytes(arguments: argparse.Namespace, *, to_stdout: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """The same for (bytes done, bytes in all). ``to_stdout``: it is free for text."""
    meter = _meter(arguments, sys.stdout if to_stdout else sys.stderr)
    if meter is None:
        yield None
        return
    with meter.running():
        yield meter.bytes_done


def _meter(arguments: argparse.Namespace, out: TextIO) -> _Meter | None:
    if arguments.progress is None or getattr(arguments, "quiet", False):
        return None
    return _Meter(sys.stderr if arguments.progress == "json" else out, as_json=arguments.progress == "json")


class _Meter:
    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self._out = out
        self._json = as_json
        self._began = self._last = time.monotonic()
        self._shown = -1.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """From nothing to all of it, where the block ends well."""
        try:
            self._show(0.0, None)
            yield
            if self._shown < 1:
                self._show(1.0, None)
        finally:
            if not self._json:
                print(file=self._out, flush=True)

    def fraction(self, done: float) -> None:
        if self._due(done >= 1):
            self._show(done, None)

    def bytes_done(self, done_bytes: int, all_bytes: int) -> None:
        if self._due(done_bytes >= all_bytes):
            self._show(done_bytes / all_bytes if all_bytes else 1.0, (done_bytes, all_bytes))

    def _due(self, ended: bool) -> bool:
        now = time.monotonic()
        if now - self._last < _SHOWN_EACH_SECONDS and not ended:
            return False
        self._last = now
        return True

    def _show(self, done: float, counted: tuple[int, int] | None) -> None:
        self._shown = done
        elapsed = time.monotonic() - self._began
        left = elapsed * (1 - done) / done if done else None
        rate = counted[0] / elapsed if counted is not None and elapsed else None
        if self._json:
            self._print_json(done, elapsed, left, rate, counted)
            return
        text = f"    ({done * 100:.2f}/100%)"
        if self._out.isatty() and left is not None:
            text += f"{f'  {rate / (1 << 20):,.0f} MiB/s' if rate else ''}  {left:.0f} s left "
        print(text, end="\r", file=self._out, flush=True)

    def _print_json(
        self, done: float, elapsed: float, left: float | None, rate: float | None, counted: tuple[int, int] | None
    ) -> None:
        line: dict[str, object] = {"event": "progress", "fraction": round(done, 4), "elapsed-seconds": round(elapsed, 3)}
        if counted is not None:
            line |= {"done-bytes": counted[0], "total-bytes": counted[1]}
        if rate is not None:
            line["bytes-per-second"] = round(rate)
        if left is not None:
            line["remaining-seconds"] = round(left, 3)
        print(json.dumps(line), file=self._out, flush=True)
