"""Kernel, busybox and the programs that the test needs, from Debian's packages.

The kernel and busybox are downloaded and unpacked into a cache, not installed. QEMU and e2fsprogs are installed where they are
missing and we may (as root with apt-get; ``COWFENCE_NO_INSTALL=1`` forbids it); else `Missing` says what to install.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from guest.initramfs import build
from guest.modules import guest_modules

KERNEL = "linux-image-cloud-amd64"
"""The smallest of Debian's kernels: made for virtual machines."""

BUSYBOX = "busybox-static"

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
}
"""What runs on the host, and the Debian package that brings it."""

_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


class Missing(Exception):
    """Something that the test needs is not here; the text says what, and how to get it."""


@dataclass(frozen=True)
class Guest:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path
    release: str


def program(name: str) -> str:
    """The path of a program of `PROGRAMS`. Raises Missing."""
    path = shutil.which(name, path=_PATH)
    if path is None:
        raise _missing([name])
    return path


def install_programs() -> list[str]:
    """Install the packages of missing programs; returns their names. Raises Missing where one is missing still."""
    packages = _packages(_absent())
    if packages and os.getuid() == 0 and not os.environ.get("COWFENCE_NO_INSTALL") and shutil.which("apt-get"):
        _apt("update", "-qq")
        _apt("install", "-qq", "-y", "--no-install-recommends", *packages)
    if still := _absent():
        raise _missing(still)
    return packages


def _absent() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


def _packages(names: list[str]) -> list[str]:
    return sorted({PROGRAMS[name] for name in names})


def _missing(names: list[str]) -> Missing:
    return Missing(f"not installed: {', '.join(names)} (Debian: apt-get install {' '.join(_packages(names))})")


def fetch(cache: Path) -> Guest:
    """Kernel and initramfs, from the cache where it has them. Raises Missing."""
    cache.mkdir(parents=True, exist_ok=True)
    kernel_tree, busybox_tree = cache / "kernel", cache / "busybox"
    if not kernel_tree.exists():
        _unpack(_kernel_package(), kernel_tree)
    if not busybox_tree.exists():
        _unpack(BUSYBOX, busybox_tree)
    kernel = next((kernel_tree / "boot").glob("vmlinuz-*"))
    trees = [tree for tree in kernel_tree.rglob("modules.builtin") if tree.is_file()]
    busybox = next(busybox_tree.rglob("bin/busybox"))
    initramfs = cache / "initramfs.gz"
    initramfs.write_bytes(build(busybox.read_bytes(), guest_modules(trees[0].parent)))
    return Guest(kernel, initramfs, kernel.name.removeprefix("vmlinuz-"))


def _kernel_package() -> str:
    """The package behind the one that always depends on the newest kernel."""
    described = _described(KERNEL)
    if not described and os.getuid() == 0:
        _apt("update", "-qq")
        described = _described(KERNEL)
    found = re.search(r"^Depends: (linux-image-[\w.+-]+)", described, re.MULTILINE)
    if found is None:
        raise Missing(f"apt knows no package {KERNEL}: this needs Debian on amd64, and its package lists (apt-get update)")
    return found[1]


def _described(package: str) -> str:
    if shutil.which("apt-cache") is None:
        return ""
    return subprocess.run(["apt-cache", "show", package], capture_output=True, text=True, check=False).stdout


def _unpack(package: str, tree: Path) -> None:
    """Download a package and unpack it; the tree has its name only when it is whole."""
    part = tree.with_name(tree.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    # Where apt drops root's rights for downloads, that user cannot write here.
    _apt("download", "-qq", "-o", "APT::Sandbox::User=root", package, cwd=part)
    archive = next(part.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=part, check=True)
    archive.unlink()
    part.rename(tree)


def _apt(*words: str, cwd: Path | None = None) -> None:
    """Run apt-get. Raises Missing with its last message."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        done = subprocess.run(["apt-get", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Missing("apt-get is not here: the kernel comes from Debian's packages") from error
    if done.returncode != 0:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Missing(f"apt-get {' '.join(words)}: {message}")
