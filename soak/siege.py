"""``python -m soak.siege``: what a good client gets alone, and beside those that mean no good. Exit code 1: less than half."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cowfence
from cowfence.disk.base import Request, Verb
from cowfence.nbd.client import NbdDisk
from cowfence.nbd.client_handshake import ClientHandshake
from cowfence.nbd.messages import Command, RequestHeader

_SIZE = 64 << 20
_DEPTH = 8
_LEAST = 0.5


def garbage(path: str) -> None:
    """Bytes that are nothing, on one connection after the other."""
    rng = random.Random(1)
    while True:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            sock.connect(path)
            sock.sendall(rng.randbytes(10_000))
            while sock.recv(65536):
                pass


def stall(path: str) -> None:
    """Thirty connections that say nothing, or stop in the middle of the handshake."""
    held: list[socket.socket] = []
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(1)
        with suppress(OSError):
            sock.connect(path)
            sock.sendall(b"\0\0\0\3IHAVEOPT"[: len(held) % 12])
        held.append(sock)
        if len(held) > 30:
            held.pop(0).close()
        time.sleep(0.01)


def _in_transmission(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    handshake = ClientHandshake("", contexts=())
    while not handshake.ended:
        sock.sendall(handshake.receive(sock.recv(4096)))
    return sock


def flood(path: str) -> None:
    """Requests for all there is, and no reply is ever read."""
    request = b"".join(RequestHeader(0, Command.READ, cookie, 0, 4 << 20).encode() for cookie in range(1000))
    while True:
        with suppress(OSError), _in_transmission(path) as sock:
            sock.settimeout(5)
            while True:
                sock.sendall(request)


def greed(path: str) -> None:
    """Requests as fast as the server takes them, every reply read."""
    with NbdDisk(f"nbd+unix:///?socket={path}") as disk:
        batch = [Request(Verb.READ, number * 65536, 65536) for number in range(64)]
        while True:
            disk.submit(batch)


ATTACKS: dict[str, Callable[[str], None]] = {"garbage": garbage, "stall": stall, "flood": flood, "greed": greed}


def _rate(path: str, seconds: float) -> float:
    """Requests a second of a good client."""
    rng = random.Random(2)
    with NbdDisk(f"nbd+unix:///?socket={path}", timeout_seconds=60) as disk:
        count = 0
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds:
            outcomes = disk.submit([Request(Verb.READ, rng.randrange(_SIZE - 4096) & ~4095, 4096) for _ in range(_DEPTH)])
            assert all(isinstance(outcome, bytearray) for outcome in outcomes)
            count += _DEPTH
        return count / elapsed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak.siege", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each attack (default: 60)")
    parser.add_argument("--attack", choices=tuple(ATTACKS), help=argparse.SUPPRESS)
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attack:
        # An attacker, for one of the others.
        threading.Thread(target=ATTACKS[arguments.attack], args=(arguments.socket,), daemon=True).start()
        signal.pause()
    with tempfile.TemporaryDirectory(prefix="siege-") as folder:
        path, image = os.path.join(folder, "sock"), Path(folder, "disk.qcow2")
        with cowfence.create(image, _SIZE) as disk:
            for at in range(0, _SIZE, 1 << 20):
                disk.write(at, random.Random(at).randbytes(1 << 20))
        server = subprocess.Popen(
            [sys.executable, "-m", "cowfence.cli.main", "serve", "-k", path, image], stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        server.stdout.readline()
        found: dict[str, float] = {}
        try:
            alone = _rate(path, arguments.seconds / 2)
            for name in ATTACKS:
                attacker = subprocess.Popen([sys.executable, "-m", "soak.siege", "--attack", name, "--socket", path])
                time.sleep(0.5)
                found[name] = _rate(path, arguments.seconds) / alone
                attacker.kill()
                attacker.wait()
            after = _rate(path, arguments.seconds / 4) / alone
        finally:
            server.terminate()
            server.wait()
    shares = {name: round(share, 2) for name, share in found.items()}
    print(json.dumps({"alone-per-second": round(alone), "beside": shares, "afterwards": round(after, 2)}, indent=4))
    return 1 if min(found.values()) < _LEAST or server.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
