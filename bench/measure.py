"""How things are measured: pairs in turn (A B A B ...), medians, servers started and stopped, fio and hyperfine as clocks."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One line of the table. ``better``: "low" for times and sizes (ratio peer / ours), "high" for rates (ours / peer);
    "limit" and "floor" where there is no peer: ours at most, or at least, the target."""

    number: str
    work: str
    peer: str
    peer_value: float
    ours: float
    unit: str
    target: float
    better: str
    note: str = ""
    ratio: float = field(init=False)
    met: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.better in ("limit", "floor"):
            self.ratio = self.ours
            self.met = self.ours <= self.target if self.better == "limit" else self.ours >= self.target
            return
        top, bottom = (self.peer_value, self.ours) if self.better == "low" else (self.ours, self.peer_value)
        self.ratio = top / bottom if bottom else float("inf")
        self.met = self.ratio >= self.target


def in_turn(pairs: int, peer: Callable[[], float], ours: Callable[[], float]) -> tuple[float, float]:
    """Medians of ``pairs`` measurements of each, taken in turn."""
    peers, own = [], []
    for _ in range(pairs):
        peers.append(peer())
        own.append(ours())
    return statistics.median(peers), statistics.median(own)


def command_seconds(argv: Sequence[str], *, warmup: int = 0, runs: int = 1) -> float:
    """Wall time of a whole command, by hyperfine."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        line = " ".join(_quoted(word) for word in argv)
        subprocess.run(
            ["hyperfine", "-N", "--style", "none", "-w", str(warmup), "-r", str(max(runs, 1)), "--export-json", out.name, line],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return float(json.loads(Path(out.name).read_text())["results"][0]["median"])


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def qemu_nbd(image: Path, socket: Path) -> list[str]:
    return ["qemu-nbd", "--cache=writeback", "--aio=threads", "-f", "qcow2", "-t", "-k", str(socket), str(image)]


def cowfence_serve(image: Path, socket: Path) -> list[str]:
    return [sys.executable, "-m", "cowfence.cli.main", "serve", str(image), "--socket", str(socket)]


@contextmanager
def served(argv: Sequence[str], socket: Path, prefix: Sequence[str] = ()) -> Iterator[int]:
    """A server while the block runs; gives its process id. Stops it with SIGTERM."""
    socket.unlink(missing_ok=True)
    process = subprocess.Popen([*prefix, *argv], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            if socket.exists():
                break
            time.sleep(0.05)
        time.sleep(0.1)
        yield process.pid
    finally:
        target = process.pid if not prefix else int(_child_of(process.pid))
        os.kill(target, signal.SIGTERM)
        process.wait()
        socket.unlink(missing_ok=True)


def _child_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]


def fio(
    socket: Path,
    rw: str,
    *,
    bs: str = "4k",
    depth: int = 32,
    seconds: float = 3.0,
    count: int | None = None,
    extra: Sequence[str] = (),
) -> float:
    """Operations a second of one fio job against an NBD server: for so many ``seconds``, or until ``count`` are done."""
    length = [f"--runtime={seconds}", "--time_based"] if count is None else [f"--number_ios={count}"]
    result = subprocess.run(
        [
            "fio",
            "--name=bench",
            "--ioengine=nbd",
            f"--uri=nbd+unix:///?socket={socket}",
            f"--rw={rw}",
            f"--bs={bs}",
            f"--iodepth={depth}",
            *length,
            "--norandommap",
            "--randrepeat=0",
            "--output-format=json",
            *extra,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    return float(job["write" if "write" in rw else "read"]["iops"])


def peak_rss_mib(pid: int) -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) / 1024


def version_of(program: str) -> str:
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return f"{program} {match[0]}" if match else program
