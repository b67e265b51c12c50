"""SIGKILL at random moments, under fio's load and a client that keeps account, on one image that grows old.

After each kill qemu-img check and our check show at most leaks, every flushed block is there, and each other block that the
client wrote holds an old or a new write. Where a keeper runs, every acknowledged block is there, too; every third server has
none. ``COWFENCE_KILLS`` sets the number of rounds.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import cowfence
from cowfence.disk.base import Request, Verb
from cowfence.errors import CowfenceError
from cowfence.nbd.client import NbdDisk
from cowfence.ops.check import check
from cowfence.units import MIB
from helpers_cli import COWFENCE, ENVIRONMENT
from judges import require, run

KILLS = int(os.environ.get("COWFENCE_KILLS", "10"))
SIZE = 128 * MIB
BLOCK = 4096
BLOCKS = SIZE // 2 // BLOCK
"""The client's half of the disk; fio has the other."""


def content(block: int, serial: int) -> bytes:
    return f"block {block} write {serial} ".encode().ljust(32, b".") * (BLOCK // 32) if serial else bytes(BLOCK)


class Account:
    """By block: the write that was promised last, and those issued since."""

    def __init__(self) -> None:
        self.promised: dict[int, int] = {}
        self.since: dict[int, list[int]] = {}
        self.serial = 0

    def work(self, uri: str, rng: random.Random, *, kept: bool) -> None:
        """Write and flush until the server dies. ``kept``: an acknowledgement is a promise, not only a flush."""
        try:
            with NbdDisk(uri) as client:
                while True:
                    answered: dict[int, int] = {}
                    for _ in range(rng.randrange(1, 6)):
                        requests = []
                        issued = []
                        for block in rng.sample(range(BLOCKS), 12):
                            self.serial += 1
                            self.since.setdefault(block, []).append(self.serial)
                            issued.append((block, self.serial))
                            requests.append(Request(Verb.WRITE, block * BLOCK, BLOCK, content(block, self.serial)))
                        for (block, serial), outcome in zip(issued, client.submit(requests), strict=True):
                            if outcome is None:
                                answered[block] = serial
                        if kept:
                            self._promise(answered)
                    client.flush()
                    self._promise(answered)
        except CowfenceError:
            return

    def _promise(self, answered: dict[int, int]) -> None:
        for block, serial in answered.items():
            self.promised[block] = serial
            self.since[block] = [later for later in self.since[block] if later > serial]

    def settle(self, disk: cowfence.Disk) -> None:
        """Hold the disk against the account; what it holds is the past from now on."""
        for block in range(BLOCKS):
            found = disk.read(block * BLOCK, BLOCK)
            allowed = [self.promised.get(block, 0), *self.since.get(block, ())]
            serial = next((serial for serial in allowed if found == content(block, serial)), None)
            assert serial is not None, f"block {block} holds {found[:32]!r}, allowed are the writes {allowed}"
            self.promised[block] = serial
        self.since.clear()


def test_killed_servers_lose_nothing_that_was_promised(tmp_path: Path) -> None:
    fio = require("fio")
    image, socket = tmp_path / "disk.qcow2", tmp_path / "nbd.sock"
    cowfence.create(image, SIZE, cluster_size=4096, refcount_bits=64).close()
    account = Account()
    rng = random.Random(7)
    for number in range(KILLS):
        kept = number % 3 != 2
        server = subprocess.Popen(
            [*COWFENCE, "serve", str(image), "--socket", str(socket), *(() if kept else ("--no-keeper",))],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        uri = server.stdout.readline().strip()
        load = subprocess.Popen(
            [
                fio,
                "--name=load",
                "--ioengine=nbd",
                f"--uri={uri}",
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=16",
                f"--offset={SIZE // 2}",
                f"--size={SIZE // 2}",
                "--fsync=24",
                "--time_based",
                "--runtime=60",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        worker = threading.Thread(target=account.work, args=(uri, rng), kwargs={"kept": kept})
        worker.start()
        time.sleep(0.3 + rng.random() * 0.7)
        server.kill()
        server.wait()
        worker.join(timeout=30)
        assert not worker.is_alive()
        load.kill()
        load.wait()
        found = check(image)
        assert not found.report.corruptions, f"kill {number}: {found.findings[:3]}"
        judged = run(["qemu-img", "check", str(image)], check=False)
        assert judged.returncode in (0, 3), f"kill {number}: {judged.stdout}{judged.stderr}"
        with cowfence.open(image) as disk:
            account.settle(disk)
    assert account.serial > 100 * KILLS
