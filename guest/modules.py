"""Which kernel modules the guest loads, and in which order.

A Debian package brings no ``modules.dep`` (depmod makes it at installation), but each module names what it needs in its
``.modinfo`` section: ``depends=virtio,virtio_ring``. What is built into the kernel is listed in ``modules.builtin``.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterable
from pathlib import Path

WANTED = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
"""The disk and its file system; ext4 asks for its checksum by an alias, which no ``depends`` names."""

_DEPENDS = re.compile(rb"\0depends=([\w,-]*)\0")


def module_name(path: str) -> str:
    """``kernel/fs/ext4/ext4.ko.xz`` is ``ext4``; the kernel takes - and _ for the same."""
    return path.rsplit("/", 1)[-1].split(".", 1)[0].replace("-", "_")


def needs_of(module: bytes) -> list[str]:
    """The names of the modules that this one needs."""
    found = _DEPENDS.search(module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def load_order(wanted: Iterable[str], needs: Callable[[str], list[str]], built_in: frozenset[str]) -> list[str]:
    """The wanted modules and all that they need, each after what it needs; without those built into the kernel."""
    order: list[str] = []
    done = set(built_in)

    def visit(name: str) -> None:
        if name in done:
            return
        done.add(name)
        for needed in needs(name):
            visit(needed)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def guest_modules(tree: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of the modules to load, in order, from ``lib/modules/VERSION`` of an unpacked kernel package.

    Raises KeyError with the name of a module that is neither there nor built in.
    """
    files = {module_name(path.name): path for path in tree.rglob("*.ko*")}
    built_in = frozenset(module_name(line) for line in (tree / "modules.builtin").read_text().split())

    def read(name: str) -> bytes:
        path = files[name]
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()

    return [(name, read(name)) for name in load_order(WANTED, lambda name: needs_of(read(name)), built_in)]
