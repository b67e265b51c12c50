"""The images under test, and the commands that look at them: ours through the command line, as a user would run it, and QEMU's.

A layout is a directory with ``disk.qcow2``: ``plain`` holds the file system itself; ``overlay`` is empty at first and stands
over ``base.qcow2`` that holds it, with small clusters. Either way ``/base`` has files that no guest ever changes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cowfence
from cowfence.units import MIB
from guest.content import content
from guest.fetch import program

DISK_BYTES: Final = 512 * MIB
LAYOUTS: Final = ("plain", "overlay")
OVERLAY_CLUSTER_BYTES: Final = 4096
"""Small: nearly every write of the guest is an allocation, and what it discards is given back."""
BASE_FILES: Final = 200
BASE_WRITER: Final = 99
"""Stands in the content of the files that no guest writes."""

_PIECE_BYTES: Final = MIB
_LOCK_WAIT_SECONDS: Final = 12.0


@dataclass(frozen=True)
class Disk:
    """One image under test."""

    layout: str
    folder: Path
    base_digest: str
    """Of the base image; empty for ``plain``."""

    @property
    def image(self) -> Path:
        return self.folder / "disk.qcow2"

    def base_is_untouched(self) -> bool:
        """Whether the base image has the bytes that it had at first."""
        return self.base_digest == _digest_of_base(self.folder)


def make(layout: str, folder: Path) -> Disk:
    """The image of a layout with a fresh ext4 on it. Raises Missing without mke2fs."""
    folder.mkdir(parents=True)
    tree, raw = folder / "tree", folder / "fresh.raw"
    (tree / "base").mkdir(parents=True)
    for serial in range(BASE_FILES):
        (tree / "base" / f"f{serial}").write_bytes(content(BASE_WRITER, serial))
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run([program("mke2fs"), "-q", "-t", "ext4", "-d", str(tree), str(raw)], check=True)
    holder = folder / ("base.qcow2" if layout == "overlay" else "disk.qcow2")
    with cowfence.create(holder, DISK_BYTES) as disk, raw.open("rb") as file:
        for offset in range(0, DISK_BYTES, _PIECE_BYTES):
            piece = file.read(_PIECE_BYTES)
            if any(piece):
                disk.write(offset, piece)
    if layout == "overlay":
        cowfence.create(
            folder / "disk.qcow2", cluster_size=OVERLAY_CLUSTER_BYTES, backing="base.qcow2", backing_format="qcow2"
        ).close()
    raw.unlink()
    return Disk(layout, folder, _digest_of_base(folder))


def _digest_of_base(folder: Path) -> str:
    base = folder / "base.qcow2"
    return hashlib.sha256(base.read_bytes()).hexdigest() if base.exists() else ""


@dataclass(frozen=True)
class Checked:
    """What a check of an image said."""

    exit_code: int
    corruptions: int
    leaks: int
    leaks_fixed: int
    message: str

    @property
    def good(self) -> bool:
        """Clean, or leaks only."""
        return self.exit_code in (0, 3) and not self.corruptions


def cowfence_check(image: Path, *, repair_leaks: bool = False) -> Checked:
    """``cowfence check --output=json``, with ``-r leaks`` where asked for."""
    words = ["check", "--output=json", *(("-r", "leaks") if repair_leaks else ()), str(image)]
    return _checked([sys.executable, "-m", "cowfence.cli.main", *words])


def qemu_check(image: Path) -> Checked:
    """``qemu-img check --output=json``."""
    return _checked([program("qemu-img"), "check", "--output=json", str(image)])


def export(image: Path, raw: Path) -> None:
    """The guest's whole disk as a raw file, by ``cowfence dd``. Raises CalledProcessError."""
    raw.unlink(missing_ok=True)
    words = ["dd", "-O", "raw", "bs=1M", f"if={image}", f"of={raw}"]
    subprocess.run([sys.executable, "-m", "cowfence.cli.main", *words], check=True, stdout=subprocess.DEVNULL)


def qemu_agrees(image: Path, raw: Path) -> bool:
    """Whether QEMU reads the same bytes from the image as we put into the raw file."""
    words = ["compare", "-f", "raw", "-F", "qcow2", str(raw), str(image)]
    return _run_when_unlocked([program("qemu-img"), *words]).returncode == 0


def _checked(argv: list[str]) -> Checked:
    done = _run_when_unlocked(argv)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {}
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return Checked(done.returncode, said.get("corruptions", 0), said.get("leaks", 0), said.get("leaks-fixed", 0), last)


def _run_when_unlocked(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program that opens the image; again while what is left of the killed server holds its lock."""
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode in (0, 3) or "lock" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(0.2)
