"""Promises against the image: what was found after the kill.

The image first (our check and QEMU's: at most leaks), then the disk in it (QEMU reads the same bytes as we do), then the file
system (its journal replayed, a full check finds nothing), then every file. Nothing is mounted: e2fsck and debugfs work on an
exported raw file.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from guest.console import Promises
from guest.content import SLOTS, Verdict, verdict_of
from guest.disks import BASE_FILES, BASE_WRITER, Checked, Disk, cowfence_check, export, qemu_agrees, qemu_check
from guest.fetch import program


@dataclass
class Found:
    """What a reopened image held; ``problems`` is empty where every promise was kept."""

    ours: Checked
    theirs: Checked
    journal_replayed: bool = False
    files: Counter[Verdict] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def judge(disk: Disk, promises: Promises) -> Found:
    """Reopen and judge everything. Raises Missing without a tool."""
    found = Found(cowfence_check(disk.image), qemu_check(disk.image))
    for who, checked in (("cowfence check", found.ours), ("qemu-img check", found.theirs)):
        if not checked.good:
            found.problems.append(f"{who}: exit code {checked.exit_code}, {checked.corruptions} errors; {checked.message}")
    if not disk.base_is_untouched():
        found.problems.append("the base image has changed")
    raw, tree = disk.folder / "exported.raw", disk.folder / "files"
    try:
        export(disk.image, raw)
    except subprocess.CalledProcessError as error:
        found.problems.append(f"cowfence dd: exit code {error.returncode}")
        return found
    if not qemu_agrees(disk.image, raw):
        found.problems.append("QEMU reads other bytes than cowfence")
    _check_file_system(raw, found)
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    _debugfs(f"rdump / {tree}", raw)
    judge_files(tree, promises, found)
    if not found.problems:
        raw.unlink()
        shutil.rmtree(tree)
    return found


def judge_files(tree: Path, promises: Promises, found: Found) -> None:
    """Every file that was ever promised, and every file there is, into ``found``."""
    for serial in range(BASE_FILES):
        _judge_file(tree / "base" / f"f{serial}", BASE_WRITER, serial, None, found)
    for writer in range(promises.writers):
        folder = tree / f"w{writer}"
        for slot in range(SLOTS):
            promised, under_way = promises.promised(writer, slot), promises.under_way(writer, slot)
            _judge_file(folder / f"f{slot}", writer, promised, under_way, found)
        known = {f"f{slot}" for slot in range(SLOTS)} | {"new"}
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        found.problems += [f"w{writer}/{name}: nobody made this file" for name in sorted(names - known)]


def _judge_file(path: Path, writer: int, promised: int | None, under_way: int | None, found: Found) -> None:
    held = path.read_bytes() if path.is_file() else None
    if held is None and promised is None:
        return
    verdict = verdict_of(held, writer, promised, under_way)
    found.files[verdict] += 1
    if verdict in (Verdict.LOST, Verdict.FOREIGN):
        promise = "nothing" if promised is None else f"write {promised}"
        size = "no file" if held is None else f"{len(held)} bytes"
        found.problems.append(f"{path.parent.name}/{path.name}: {verdict.value}; promised {promise}, found {size}")


def _check_file_system(raw: Path, found: Found) -> None:
    """Replay the journal as a mount would, then hold the whole file system against e2fsck, which may change nothing."""
    replayed = _e2fsck("-p", raw)
    found.journal_replayed = "recovering journal" in replayed.stdout
    if replayed.returncode not in (0, 1):
        found.problems.append(f"e2fsck -p: exit code {replayed.returncode}: {_last_line(replayed)}")
    checked = _e2fsck("-fn", raw)
    if checked.returncode != 0:
        found.problems.append(f"e2fsck -fn: exit code {checked.returncode}: {_last_line(checked)}")


def _e2fsck(option: str, raw: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("e2fsck"), option, str(raw)], capture_output=True, text=True, check=False)


def _debugfs(command: str, raw: Path) -> None:
    subprocess.run([program("debugfs"), "-R", command, str(raw)], capture_output=True, check=False)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stdout.strip() or done.stderr.strip()).splitlines() or ["no message"])[-1]
