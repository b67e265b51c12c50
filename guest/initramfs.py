"""The guest's first file system: busybox, the modules, and our scripts, as a gzipped cpio archive ("newc").

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Each entry is a header of thirteen 8-digit hex
fields behind the magic, the name with a NUL, and the data, both padded to 4 bytes.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

_DIRECTORY = 0o040755
_PROGRAM = 0o100755
_HERE = Path(__file__).parent


def entry(number: int, name: str, mode: int, data: bytes = b"") -> bytes:
    """One cpio entry; ``number`` is its inode number."""
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + "".join(f"{value:08X}" for value in fields).encode() + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def build(busybox: bytes, modules: Sequence[tuple[str, bytes]]) -> bytes:
    """The archive; ``modules`` are loaded in the order given."""
    files = [("bin/busybox", busybox), ("init", _script("init.sh")), ("writer.sh", _script("writer.sh"))]
    files.append(("content.awk", _script("content.awk")))
    files += [(f"modules/{place:02d}-{name}.ko", data) for place, (name, data) in enumerate(modules)]
    parts = [entry(number, name, _DIRECTORY) for number, name in enumerate(("bin", "dev", "disk", "modules"), 1)]
    parts += [entry(number, name, _PROGRAM, data) for number, (name, data) in enumerate(files, len(parts) + 1)]
    parts.append(entry(0, "TRAILER!!!", 0))
    return gzip.compress(b"".join(parts), compresslevel=1, mtime=0)


def _script(name: str) -> bytes:
    return (_HERE / name).read_bytes()
