"""A server under load for as long as it is given, changed all the while, killed in the end (``make soak``).

Four clients write, zero, read back and flush, each in a part of the disk of its own, whose content it knows. Every few seconds
a snapshot is taken or deleted, a bitmap made, cleared or removed, a backup begun and ended, by the control socket. The server's
memory is looked at; after a warm-up it must not grow. Then the server is killed: its keeper ends what was pending, and every
part holds what its client was told.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cowfence
from cowfence.errors import CowfenceError
from cowfence.nbd.client import NbdDisk
from cowfence.ops.check import check
from cowfence.service.control import ask

CLIENTS = 4
PART_BYTES = 64 << 20
_LONG_BYTES = 256 << 10
_LONGEST_BYTES = 1 << 20
"""Some are long enough that the server leaves them to a thread, and of one length, as clients have it: with any length up to
three MiB the allocator's heap has gaps of a sixth of it, which malloc_trim gives back."""
_WARM_UP = 0.25
_GROWTH_MOST = 0.05


@dataclass(slots=True)
class Outcome:
    """What was seen. ``memory_bytes``: (seconds, RSS of the server). ``wrong``: every promise that was not kept."""

    seconds: float = 0.0
    requests: int = 0
    changes: int = 0
    memory_bytes: list[tuple[float, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Of the memory from the end of the warm-up to the end, as a part of it: the largest of each tenth is compared."""
        steady = [size for at, size in self.memory_bytes if at >= self.seconds * _WARM_UP]
        if len(steady) < 20:
            return 0.0
        tenth = len(steady) // 10
        return max(steady[-tenth:]) / max(steady[:tenth]) - 1

    def to_dict(self) -> dict[str, object]:
        return {
            "seconds": round(self.seconds, 1),
            "requests": self.requests,
            "changes": self.changes,
            "memory-mib": [round(size / 2**20, 1) for _, size in self.memory_bytes[:: max(1, len(self.memory_bytes) // 20)]],
            "growth": round(self.growth, 4),
            "wrong": self.wrong,
        }


class _Client:
    """Writes its part of the disk, and knows what it holds. ``unsure``: what was asked for and not answered."""

    def __init__(self, uri: str, number: int, seed: int) -> None:
        self._uri = uri
        self.start = number * PART_BYTES
        self._rng = random.Random(seed * 1000 + number)
        self.content = bytearray(PART_BYTES)
        self.unsure: tuple[int, bytes] | None = None
        self.requests = 0
        self.wrong: list[str] = []

    def work(self, ended: threading.Event) -> None:
        rng = self._rng
        try:
            with NbdDisk(self._uri) as disk:
                while not ended.is_set():
                    self._one(rng, disk)
        except CowfenceError:
            if not ended.is_set():
                raise

    def _one(self, rng: random.Random, disk: NbdDisk) -> None:
        at, length = self._range(rng)
        what = rng.random()
        if what < 0.55:
            data = rng.randbytes(length)
            self.unsure = at, data
            disk.write(self.start + at, data, fua=rng.random() < 0.02)
            self._known(at, data)
        elif what < 0.65:
            self.unsure = at, bytes(length)
            disk.zero(self.start + at, length, unmap=rng.random() < 0.8)
            self._known(at, bytes(length))
        elif what < 0.95:
            if disk.read(self.start + at, length) != self.content[at : at + length]:
                self.wrong.append(f"a read of {length} bytes at {self.start + at} shows something else")
        else:
            disk.flush()
        self.requests += 1

    @staticmethod
    def _range(rng: random.Random) -> tuple[int, int]:
        length = rng.choice((512, 4096, 65536, rng.randrange(1, _LONG_BYTES)))
        if rng.random() < 0.02:
            length = _LONGEST_BYTES
        at = rng.randrange(PART_BYTES - length)
        return (at & ~4095, length) if rng.random() < 0.7 else (at, length)

    def _known(self, at: int, data: bytes) -> None:
        self.content[at : at + len(data)] = data
        self.unsure = None

    def judge(self, found: bytes) -> list[str]:
        """What the part holds after the end, against what the client was told: what was not answered is old or new, byte by
        byte."""
        if found == self.content:
            return []
        for index in range(0, PART_BYTES, 512):
            if found[index : index + 512] == self.content[index : index + 512]:
                continue
            for at in range(index, min(index + 512, PART_BYTES)):
                if found[at] == self.content[at]:
                    continue
                start, data = self.unsure or (0, b"")
                if not (start <= at < start + len(data) and found[at] == data[at - start]):
                    return [f"the byte at {self.start + at} is {found[at]:#x}; {self.content[at]:#x} was acknowledged"]
        return []


class Soak:
    """One run in ``folder``, which is empty."""

    def __init__(self, folder: Path, *, seconds: float, seed: int, tell: Callable[[str], None]) -> None:
        self._image, self._socket, self._control = folder / "disk.qcow2", folder / "sock", folder / "control"
        self._seconds = seconds
        self._seed = seed
        self._tell = tell
        self._ended = threading.Event()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        cowfence.create(self._image, CLIENTS * PART_BYTES).close()
        server = subprocess.Popen(
            [sys.executable, "-m", "cowfence.cli.main", "serve", "-k", self._socket, "--control", self._control, self._image],
            stdout=subprocess.PIPE,
        )
        assert server.stdout is not None
        server.stdout.readline()
        uri = f"nbd+unix:///?socket={self._socket}"
        clients = [_Client(uri, number, self._seed) for number in range(CLIENTS)]
        failed: list[BaseException] = []
        threads = [threading.Thread(target=self._guarded, args=(client.work, failed)) for client in clients]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        rng = random.Random(self._seed)
        try:
            while (elapsed := time.monotonic() - began) < self._seconds and not failed and server.poll() is None:
                self.outcome.memory_bytes.append((elapsed, _memory_bytes(server.pid)))
                self._change(rng)
                time.sleep(min(rng.uniform(1, 4), self._seconds / 20))
        finally:
            self._ended.set()
            self.outcome.seconds = time.monotonic() - began
            if server.poll() is not None:
                self.outcome.wrong.append(f"the server ended by itself with {server.returncode}")
            server.send_signal(signal.SIGKILL)
            server.wait()
            for thread in threads:
                thread.join()
        self.outcome.wrong += [f"a client failed: {error}" for error in failed]
        self.outcome.requests = sum(client.requests for client in clients)
        self._judge(clients)
        if self.outcome.growth > _GROWTH_MOST:
            self.outcome.wrong.append(f"the server's memory grew by {self.outcome.growth:.1%}")
        return self.outcome

    def _guarded(self, work: Callable[[threading.Event], None], failed: list[BaseException]) -> None:
        try:
            work(self._ended)
        except BaseException as error:
            if not self._ended.is_set():
                failed.append(error)

    def _change(self, rng: random.Random) -> None:
        """Something by the control socket; each must succeed."""

        def ctl(verb: str, /, **fields: object) -> object:
            return ask(str(self._control), {"command": verb, **fields}, timeout_seconds=120)

        snapshots = [one["name"] for one in ctl("snapshot-list") if one["name"].startswith("s")]  # type: ignore[attr-defined]
        bitmaps = [one["name"] for one in ctl("bitmap-list")]  # type: ignore[attr-defined]
        what = rng.randrange(6)
        if what < 2 and len(snapshots) < 4:
            ctl("snapshot-create", name=f"s{self.outcome.changes}")
        elif what < 3 and snapshots:
            ctl("snapshot-delete", name=rng.choice(snapshots))
        elif what < 4 and len(bitmaps) < 4:
            ctl("bitmap-add", name=f"b{self.outcome.changes}")
        elif what < 5 and bitmaps:
            ctl(rng.choice(("bitmap-clear", "bitmap-remove")), name=rng.choice(bitmaps))
        else:
            ctl("backup-begin", name="backup")
            with NbdDisk(f"nbd+unix:///backup?socket={self._socket}") as backup:
                first = backup.read(0, 1 << 20)
                if backup.read(0, 1 << 20) != first:
                    self.outcome.wrong.append("a backup shows something else than before")
            ctl("backup-end", name="backup")
        self.outcome.changes += 1
        if self.outcome.changes % 20 == 0:
            _, size = self.outcome.memory_bytes[-1]
            self._tell(f"{self.outcome.memory_bytes[-1][0]:.0f} s, {self.outcome.changes} changes, {size >> 20} MiB")

    def _judge(self, clients: list[_Client]) -> None:
        # Waits for the keeper.
        with cowfence.open(self._image, writable=True) as disk:
            for client in clients:
                self.outcome.wrong += client.wrong + client.judge(disk.read(client.start, PART_BYTES))
        corruptions = check(self._image).report.corruptions
        if corruptions:
            self.outcome.wrong.append(f"{corruptions} corruptions in the image")


def _memory_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def as_json(outcome: Outcome) -> str:
    """For a report."""
    return json.dumps(outcome.to_dict(), indent=4)
