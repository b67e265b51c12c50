"""The main job, shown: serve an overlay, kill the server in mid-write, and find the guest's data whole.

``python demo/demo.py [IMAGE]``. Without an image it makes one: a real ext4 file system from a real directory tree where mke2fs
is installed, else a tar archive of the tree on a raw disk. An image that is given is only ever read: every write goes to an
overlay in ``demo-work``.

What is counted: every 4 KiB block that the client wrote, by what it was promised. A block whose write was flushed must hold
that write or a later one, and so, thanks to the keeper, must one whose write was answered and not flushed; a block whose last
write was not answered may hold old or new bytes; every other block must be the base's.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import cowfence
from cowfence.disk.base import Request, Verb
from cowfence.errors import CowfenceError
from cowfence.nbd.client import NbdDisk
from cowfence.ops.check import Mode, check
from cowfence.ops.info import info
from cowfence.units import MIB, align_up, format_size

BLOCK = 4096
WRITING_SECONDS = 4.0
BATCH = 16
BATCHES_PER_FLUSH = 12


class Screen:
    """Plain lines; colour on a terminal."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0

    def title(self, text: str) -> None:
        print(f"\n{self._paint('1', text)}")
        print(self._paint("2", "─" * 78))

    def step(self, text: str) -> None:
        self._step += 1
        print(f"\n{self._paint('1;36', f' {self._step} ')} {self._paint('1', text)}", flush=True)

    def fact(self, name: str, value: str, mark: str = "") -> None:
        marks = {"good": self._paint("1;32", "✓ "), "bad": self._paint("1;31", "✗ "), "": "  "}
        print(f"    {marks[mark]}{name:<34} {value}", flush=True)

    def note(self, text: str) -> None:
        print(f"      {self._paint('2', text)}", flush=True)

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text


@dataclass
class Ledger:
    """What the client was promised, block by block. Serials grow with each write; 0 is the base image."""

    issued: dict[int, list[int]] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)
    flushed: dict[int, int] = field(default_factory=dict)
    writes: int = 0
    flushes: int = 0
    flushed_bytes: int = 0

    def issue(self, block: int) -> int:
        self.writes += 1
        self.issued.setdefault(block, []).append(self.writes)
        return self.writes

    def flush_returned(self, promised: dict[int, int]) -> None:
        self.flushes += 1
        self.flushed_bytes += BLOCK * sum(1 for block, serial in promised.items() if self.flushed.get(block) != serial)
        self.flushed.update(promised)


def content(block: int, serial: int) -> bytes:
    """Bytes that name their block and their write, so that foreign data shows."""
    return f"cowfence demo: block {block}, write {serial}. ".encode().ljust(64, b".") * (BLOCK // 64)


def make_base(work: Path, screen: Screen) -> Path:
    """A qcow2 image with a file system (or an archive) made from Python's own library and our sources."""
    tree = work / "tree"
    source = Path(cowfence.__file__).parent
    shutil.copytree(source, tree / "cowfence", ignore=shutil.ignore_patterns("__pycache__"))
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("asyncio", "email", "encodings", "json", "unittest", "xml"):
        shutil.copytree(library / package, tree / "python" / package, ignore=shutil.ignore_patterns("__pycache__"))
    files = [path for path in tree.rglob("*") if path.is_file()]
    raw = work / "base.raw"
    size = 256 * MIB
    mke2fs = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if mke2fs:
        with raw.open("wb") as file:
            file.truncate(size)
        subprocess.run([mke2fs, "-q", "-t", "ext4", "-L", "demo", "-d", str(tree), str(raw)], check=True)
        what = "ext4 file system (mke2fs)"
    else:
        with tarfile.open(raw, "w") as archive:
            archive.add(tree, "tree")
        os.truncate(raw, align_up(max(raw.stat().st_size, size), MIB))
        what = "tar archive (no mke2fs here)"
    base = work / "base.qcow2"
    with cowfence.create(base, raw.stat().st_size) as disk, raw.open("rb") as file:
        offset = 0
        while piece := file.read(64 * 1024):
            if any(piece):
                disk.write(offset, piece)
            offset += len(piece)
    raw.unlink()
    shutil.rmtree(tree)
    screen.fact("made from", f"{len(files)} files, {format_size(size)} {what}")
    return base


class Server:
    """``cowfence serve`` as a process of its own."""

    def __init__(self, overlay: Path, socket: Path, roots: list[Path]) -> None:
        arguments = [sys.executable, "-m", "cowfence.cli.main", "serve", str(overlay), "--socket", str(socket)]
        for root in roots:
            arguments += ["--ref-root", str(root)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.uri = self.process.stdout.readline().strip()
        if not self.uri:
            raise SystemExit("the server did not start; its message is above")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def write_until_killed(client: NbdDisk, ledger: Ledger, rng: random.Random, stop: threading.Event) -> None:
    """Batches of random 4 KiB writes, a flush now and then, until the connection breaks."""
    blocks = client.size // BLOCK
    hot = [rng.randrange(blocks) for _ in range(30_000)]
    try:
        while not stop.is_set():
            for _ in range(BATCHES_PER_FLUSH):
                chosen = rng.sample(hot, BATCH)
                serials = [ledger.issue(block) for block in chosen]
                requests = [
                    Request(Verb.WRITE, block * BLOCK, BLOCK, content(block, serial))
                    for block, serial in zip(chosen, serials, strict=True)
                ]
                for block, serial, outcome in zip(chosen, serials, client.submit(requests), strict=True):
                    if outcome is None:
                        ledger.acknowledged[block] = serial
            promised = dict(ledger.acknowledged)
            client.flush()
            ledger.flush_returned(promised)
    except CowfenceError:
        # The server is dead: what was not answered was not promised.
        return


@dataclass
class Verdict:
    kept: int = 0
    unflushed: int = 0
    newer: int = 0
    lost: int = 0
    foreign: int = 0
    untouched_wrong: int = 0


def judge(overlay: cowfence.Disk, base: cowfence.Disk, ledger: Ledger) -> Verdict:
    """Hold every block of the disk against the ledger."""
    verdict = Verdict()
    chunk = 256 * BLOCK
    for start in range(0, overlay.size, chunk):
        length = min(chunk, overlay.size - start)
        found = overlay.read(start, length)
        beneath = base.read(start, min(length, max(0, base.size - start))).ljust(length, b"\0")
        for at in range(0, length, BLOCK):
            block = (start + at) // BLOCK
            have, old = found[at : at + BLOCK], beneath[at : at + BLOCK]
            if block not in ledger.issued:
                verdict.untouched_wrong += have != old
                continue
            answered = ledger.acknowledged.get(block, 0)
            if have == (content(block, answered) if answered else old):
                verdict.kept += bool(answered)
                verdict.unflushed += answered != ledger.flushed.get(block, 0)
            elif any(have == content(block, serial) for serial in ledger.issued[block] if serial > answered):
                verdict.newer += 1
            elif have == old or any(have == content(block, serial) for serial in ledger.issued[block]):
                verdict.lost += 1
            else:
                verdict.foreign += 1
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve an overlay, kill the server in mid-write, find the data whole.")
    parser.add_argument("image", nargs="?", help="an image of your own; it is only read")
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    screen = Screen()
    work = Path("demo-work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    screen.title("cowfence: kill the server in mid-write, lose nothing that was answered")

    screen.step("A base image" if arguments.image is None else "Your image, which is only read")
    base_path = make_base(work, screen) if arguments.image is None else Path(arguments.image).resolve()
    described = info(base_path)
    base_format = "qcow2" if described.format == "qcow2" else "raw"
    before = base_path.stat()
    screen.fact("base", f"{base_path.name}, {base_format}, {format_size(described.virtual_bytes)}")

    screen.step("An overlay over it, served over NBD")
    overlay_path = work / "overlay.qcow2"
    refs = cowfence.Refs.under(work, base_path.parent)
    name = os.path.relpath(base_path, work) if arguments.image is None else str(base_path)
    cowfence.create(overlay_path, None, backing=name, backing_format=base_format, refs=refs).close()
    server = Server(overlay_path, work / "nbd.sock", [base_path.parent])
    screen.fact("serving at", server.uri)

    screen.step(f"A client writes random 4 KiB blocks, a flush every {BATCH * BATCHES_PER_FLUSH} writes ... and SIGKILL")
    ledger = Ledger()
    stop = threading.Event()
    writer = threading.Thread(target=lambda: write_until_killed(NbdDisk(server.uri), ledger, rng, stop))
    writer.start()
    time.sleep(WRITING_SECONDS + rng.random())
    server.kill()
    stop.set()
    writer.join()
    unflushed = sum(1 for block, serials in ledger.issued.items() if ledger.flushed.get(block) != serials[-1])
    screen.fact("written", f"{ledger.writes:,} writes, {format_size(ledger.writes * BLOCK)}")
    screen.fact("promised", f"{format_size(ledger.flushed_bytes)} flushed, in {ledger.flushes} flushes")
    screen.fact("in the air when the server died", f"{unflushed} blocks written and not flushed")

    screen.step("Open it again")
    found = check(overlay_path)
    screen.fact("check: errors", str(found.report.corruptions), "good" if not found.report.corruptions else "bad")
    screen.fact("check: leaked clusters", f"{found.report.leaks} (harmless: space, never data)", "good")
    with (
        cowfence.open(overlay_path, refs=refs) as overlay,
        cowfence.open(base_path, format=base_format, refs=refs) as base,
    ):
        verdict = judge(overlay, base, ledger)
    lost_bytes = (verdict.lost + verdict.foreign) * BLOCK
    screen.fact("answered blocks found as promised", f"{verdict.kept:,}", "good")
    screen.fact("of them never flushed", f"{verdict.unflushed:,} (the keeper completed them)", "good")
    screen.fact("blocks that hold a later write", f"{verdict.newer:,} (not yet answered: old or new, never torn)", "good")
    screen.fact("bytes flushed", f"{ledger.flushed_bytes:,}")
    screen.fact("bytes lost", f"{lost_bytes:,}", "good" if not lost_bytes else "bad")
    screen.fact("other blocks changed", f"{verdict.untouched_wrong}", "good" if not verdict.untouched_wrong else "bad")
    after = base_path.stat()
    same = (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    screen.fact("base image untouched", "yes" if same else "NO", "good" if same else "bad")

    screen.step("Reclaim the leaks")
    repaired = check(overlay_path, repair=Mode.LEAKS)
    left = repaired.report.leaks
    screen.fact("leaks reclaimed", f"{repaired.leaks_fixed}; left: {left}", "good" if not left else "bad")

    screen.step("Try it yourself")
    screen.note(f"cowfence serve {overlay_path} --socket /tmp/demo.sock --ref-root {base_path.parent}")
    screen.note("nbdcopy 'nbd+unix:///?socket=/tmp/demo.sock' disk.raw        # or: qemu-img convert, nbdinfo, fio")
    screen.note(f"qemu-system-x86_64 -drive file={overlay_path},format=qcow2")
    good = not (lost_bytes or verdict.untouched_wrong or found.report.corruptions or repaired.report.leaks) and same
    screen.title(f"{'0 bytes lost' if good else 'SOMETHING IS WRONG'}   (seed {seed})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
