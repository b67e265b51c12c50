"""The life of a cloud image, by our tools alone, with qemu-img's and e2fsck's checks between: a root file system of 20 GiB goes
raw -> qcow2 -> compressed -> overlay -> rebase -> commit -> raw, and comes out byte for byte.

``COWFENCE_JOURNEY`` is the tree that it is made of; ``make journey`` takes all of /usr.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from helpers_cli import COWFENCE, ENVIRONMENT
from judges import run

_TREE = os.environ.get("COWFENCE_JOURNEY", "/usr/sbin")
_SECONDS = 3600.0


def _ours(*words: str | os.PathLike[str]) -> None:
    _tool(COWFENCE, *words)


def _digest(path: Path) -> str:
    """Of the bytes that are there; holes count as zeros without being read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            block = os.pread(file.fileno(), 1 << 16, at & ~0xFFFF)
            at &= ~0xFFFF
            if block.strip(b"\0"):
                digest.update(at.to_bytes(8, "big") + block)
            at += 1 << 16
    return f"{size} {digest.hexdigest()}"


def _checked(image: Path) -> None:
    run(["qemu-img", "check", "-q", image], timeout_seconds=_SECONDS)


def test_there_and_back(tmp_path: Path) -> None:
    raw, back = tmp_path / "root.raw", tmp_path / "back.raw"
    run(["mke2fs", "-q", "-t", "ext4", "-d", _TREE, "-L", "root", raw, "20G"], timeout_seconds=_SECONDS)
    before = _digest(raw)

    plain = tmp_path / "plain.qcow2"
    _ours("convert", "-f", "raw", "-O", "qcow2", raw, plain)
    _checked(plain)
    run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, plain], timeout_seconds=_SECONDS)

    small = tmp_path / "small.qcow2"
    _ours("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", plain, small)
    _checked(small)
    assert small.stat().st_size < plain.stat().st_size

    # A new machine: an overlay over the compressed image, in which something is changed and changed back.
    overlay = tmp_path / "overlay.qcow2"
    _ours("create", "-f", "qcow2", "-b", "small.qcow2", "-F", "qcow2", overlay)
    io = [COWFENCE[0], "-m", "cowfence.cli.io"]
    _tool(io, "-c", "write -P 0x55 0 3M", "-c", "write -P 0x66 7G 70000", overlay)
    _restored(io, raw, overlay, 0, 3 << 20)
    _restored(io, raw, overlay, 7 << 30, 70000)
    _checked(overlay)

    # Its base moves: first the content to another base, then the changes into that one.
    _ours("rebase", "-b", "plain.qcow2", "-F", "qcow2", overlay)
    _checked(overlay)
    _ours("compare", "-f", "raw", "-F", "qcow2", raw, overlay)
    _ours("commit", overlay)
    _checked(plain)
    _ours("convert", "-O", "raw", plain, back)
    assert _digest(back) == before
    run(["e2fsck", "-fn", back], timeout_seconds=_SECONDS)
    run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", raw, back], timeout_seconds=_SECONDS)


def _restored(io: list[str], raw: Path, image: Path, offset: int, length: int) -> None:
    """Write what the raw disk has there."""
    part = raw.parent / "part"
    with raw.open("rb") as file:
        file.seek(offset)
        part.write_bytes(file.read(length))
    _tool(io, "-c", f"write -s {part} {offset} {length}", image)


def _tool(program: Sequence[str], *words: str | os.PathLike[str]) -> None:
    done = subprocess.run([*program, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
