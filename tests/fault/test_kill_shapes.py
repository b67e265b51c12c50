"""A server under load is killed with SIGKILL, whatever the shape of its image, and the image holds what clients were promised.

Clients write, zero and discard tagged sectors through NBD, and keep account: what a flush has covered must be there, and every
sector is a value that was written to it since then (crash contract, C2 and C3). Where a keeper runs, and in write-through mode,
what was acknowledged must be there (C4). The next round goes on with the image that the last one left. ``COWFENCE_KILLS`` is
the number of rounds; in CI a few.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

from cowfence.crash.images import tagged
from cowfence.disk.base import Request, Verb
from cowfence.errors import CowfenceError
from cowfence.nbd.client import NbdDisk
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import open_image
from cowfence.storage.file import FileStorage
from cowfence.units import KIB, MIB, SECTOR_BYTES
from helpers_cli import COWFENCE, ENVIRONMENT
from judges import run

KILLS = int(os.environ.get("COWFENCE_KILLS", "10"))
ROUNDS_OF_AN_IMAGE = 5
BLOCK = 4 * KIB
REGION = 2 * MIB
CLIENTS = 3
IN_FLIGHT = 16
LONGEST_SECONDS = 0.6

SHAPES = ((64 * KIB, 16, 3), (4 * KIB, 16, 3), (512, 64, 3), (4 * KIB, 16, 2))
"""Bytes of a cluster, bits of a refcount, version."""
WRITE_THROUGH = ("--cache", "writethrough")
NO_KEEPER = ("--no-keeper",)
SERVERS: tuple[tuple[str, ...], ...] = (
    (),
    ("--commit-interval", "0.01"),
    ("--cache-size", "4096"),
    (*NO_KEEPER, *WRITE_THROUGH),
    NO_KEEPER,
    (*NO_KEEPER, "--cache-size", "4096"),
)


class Account:
    """What each block of a client's region may hold: the number of the write that gave it its bytes; 0 is zeros."""

    def __init__(self, base: int) -> None:
        self.base = base
        self._flushed: dict[int, set[int]] = {}
        self._since: dict[int, list[set[int]]] = {}
        self.flushes = 0
        self.acknowledged = 0

    def may_become(self, block: int, serial: int | None) -> None:
        """A write (None: a discard) is about to be sent."""
        history = self._since.setdefault(block, [])
        last = history[-1] if history else self._flushed.get(block, {0})
        history.append({serial} if serial is not None else last | {0})

    def flushed(self) -> None:
        """A flush returned, and every request before it had been answered."""
        self.flushes += 1
        for block, history in self._since.items():
            self._flushed[block] = history[-1]
        self._since.clear()

    def wrong(self, region: bytes) -> list[str]:
        found = []
        for block in range(REGION // BLOCK):
            allowed = set(self._flushed.get(block, {0})).union(*self._since.get(block, ()))
            start = block * BLOCK
            expected = [tagged(self.base + start, BLOCK, serial) if serial else bytes(BLOCK) for serial in allowed]
            for at in range(0, BLOCK, SECTOR_BYTES):
                sector = region[start + at : start + at + SECTOR_BYTES]
                if not any(sector == value[at : at + SECTOR_BYTES] for value in expected):
                    found.append(f"sector {(self.base + start + at) // SECTOR_BYTES} holds {sector[:28]!r}, allowed {allowed}")
        return found

    def take(self, region: bytes) -> None:
        """The image was reopened: what is there now is where the next round begins."""
        self._since.clear()
        for block in range(REGION // BLOCK):
            found = set()
            for at in range(block * BLOCK, (block + 1) * BLOCK, SECTOR_BYTES):
                sector = region[at : at + SECTOR_BYTES]
                found.add(int(sector.split()[3]) if any(sector) else 0)
            self._flushed[block] = found


class Serials:
    """Numbers of writes, each used once."""

    def __init__(self) -> None:
        self._next = 1

    def take(self) -> int:
        self._next += 1
        return self._next


def load(uri: str, account: Account, serials: Serials, chance: random.Random, *, kept: bool) -> None:
    """Send batches until the server dies. ``kept``: an acknowledgement is a promise, not only a flush."""
    try:
        disk = NbdDisk(uri)
        while True:
            blocks = chance.sample(range(REGION // BLOCK), IN_FLIGHT)
            requests = []
            for block in blocks:
                offset = account.base + block * BLOCK
                kind = chance.random()
                if kind < 0.8:
                    serial = serials.take()
                    account.may_become(block, serial)
                    requests.append(Request(Verb.WRITE, offset, BLOCK, tagged(offset, BLOCK, serial)))
                elif kind < 0.9:
                    account.may_become(block, 0)
                    requests.append(Request(Verb.ZERO, offset, BLOCK, unmap=kind < 0.85))
                else:
                    account.may_become(block, None)
                    requests.append(Request(Verb.DISCARD, offset, BLOCK))
            for outcome in disk.submit(requests):
                if isinstance(outcome, CowfenceError):
                    raise outcome
                account.acknowledged += 1
            if kept:
                account.flushed()
            if chance.random() < 0.4:
                disk.flush()
                account.flushed()
    except CowfenceError:
        return


def serve(image: Path, options: tuple[str, ...]) -> tuple[subprocess.Popen[str], str]:
    server = subprocess.Popen(
        [*COWFENCE, "serve", "--socket", str(image.with_name("sock")), *options, str(image)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    return server, server.stdout.readline().strip()


def new_image(path: Path, chance: random.Random) -> None:
    path.unlink(missing_ok=True)
    path.touch()
    storage = FileStorage.open(path, writable=True)
    write_new(storage, NewImage(CLIENTS * REGION, *chance.choice(SHAPES)))
    storage.close()


def test_killed_server_keeps_its_promises(tmp_path: Path) -> None:
    chance = random.Random(KILLS)
    path = tmp_path / "image"
    accounts: list[Account] = []
    acknowledged = flushes = 0
    for round_ in range(KILLS):
        if round_ % ROUNDS_OF_AN_IMAGE == 0:
            new_image(path, chance)
            accounts = [Account(client * REGION) for client in range(CLIENTS)]
            serials = Serials()
        options = chance.choice(SERVERS)
        server, uri = serve(path, options)
        threads = [
            threading.Thread(
                target=load,
                args=(uri, account, serials, random.Random(chance.random())),
                kwargs={"kept": NO_KEEPER[0] not in options or WRITE_THROUGH[0] in options},
            )
            for account in accounts
        ]
        try:
            for thread in threads:
                thread.start()
            time.sleep(chance.random() ** 2 * LONGEST_SECONDS)
        finally:
            server.send_signal(signal.SIGKILL)
            server.communicate()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        path.with_name("sock").unlink()
        # Whoever opens it waits for the keeper; qemu-img would not.
        FileStorage.open(path).close()
        what = f"round {round_}, {' '.join(options)}"
        checked = run(["qemu-img", "check", "-f", "qcow2", path], check=False)
        assert checked.returncode in (0, 3), f"{what}: {checked.stdout}"
        with open_image(FileStorage.open(path), backing=None, writable=False) as disk:
            for account in accounts:
                region = disk.read(account.base, REGION)
                wrong = account.wrong(region)
                assert not wrong, f"{what}: {wrong[0]}"
                acknowledged, flushes = acknowledged + account.acknowledged, flushes + account.flushes
                account.acknowledged = account.flushes = 0
                account.take(region)
    assert acknowledged > 100 * KILLS
    assert flushes > KILLS


def test_account_sees_what_is_wrong() -> None:
    """The judge judged: lost, foreign and torn data are found."""
    account = Account(0)
    region = bytearray(REGION)
    account.may_become(1, 7)
    account.flushed()
    assert account.wrong(bytes(region))
    region[BLOCK : 2 * BLOCK] = tagged(BLOCK, BLOCK, 7)
    assert not account.wrong(bytes(region))
    account.may_become(1, 8)
    region[BLOCK : BLOCK + SECTOR_BYTES] = tagged(BLOCK, SECTOR_BYTES, 8)
    assert not account.wrong(bytes(region))
    region[BLOCK : BLOCK + SECTOR_BYTES] = tagged(3 * BLOCK, SECTOR_BYTES, 8)
    assert account.wrong(bytes(region))
    assert account.wrong(bytes(REGION))
