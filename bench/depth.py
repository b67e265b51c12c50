"""``python -m bench.depth``: requests a second against queue depth and number of connections: ours, qemu-nbd, and nbdkit's file
plugin, which serves the raw disk and has no tables to look into. In a tmpfs; fio, 4 KiB at random, in place.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.measure import cowfence_serve, fio, qemu_nbd, served, version_of

_DEPTHS = (1, 4, 32, 128)
_CONNECTIONS = (1, 2, 4)
_SECONDS = 2.0


def nbdkit_file(image: Path, socket: Path) -> list[str]:
    """nbdkit over the raw disk beside ``image``, of the same content."""
    return ["nbdkit", "-f", "-U", str(socket), "file", str(image.with_suffix(".raw"))]


def _qemu_nbd(image: Path, socket: Path) -> list[str]:
    return [*qemu_nbd(image, socket), "-e", "0"]


SERVERS: dict[str, Callable[[Path, Path], list[str]]] = {
    "ours": cowfence_serve,
    "qemu-nbd": _qemu_nbd,
    "nbdkit file": nbdkit_file,
}


def main() -> int:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        image, socket = Path(folder, "disk.qcow2"), Path(folder, "sock")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
        subprocess.run(["qemu-io", "-c", "write -P 1 0 1G", str(image)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(image.with_suffix(".raw"))], check=True)
        print(f"{version_of('qemu-nbd')}, {version_of('nbdkit')}; requests a second\n")
        print("| work | connections | depth | " + " | ".join(SERVERS) + " |\n" + "|---" * (3 + len(SERVERS)) + "|")
        for rw in ("randread", "randwrite"):
            for connections in _CONNECTIONS:
                for depth in _DEPTHS:
                    rates = []
                    for command in SERVERS.values():
                        with served(command(image, socket), socket):
                            extra = [f"--numjobs={connections}", "--group_reporting", "--size=1G"]
                            rates.append(fio(socket, rw, depth=depth, seconds=_SECONDS, extra=extra))
                    print(
                        f"| {rw} | {connections} | {depth} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |", flush=True
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
