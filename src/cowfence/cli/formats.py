"""``-f`` for subcommands that read a disk: without it the file is looked at.

``cowfence`` does not take what is no qcow2 image for raw without a word of the user: a truncated or foreign image would pass as
a disk. The programs that stand in for QEMU's do, as those do, where nothing is written into the disk and the file begins with
no magic string of another format: scripts rely on it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from cowfence.disk.opener import printable
from cowfence.errors import NotThisFormat, Unsupported
from cowfence.qcow2.describe import probe
from cowfence.storage.file import FileStorage

if TYPE_CHECKING:
    from cowfence.storage.base import Storage

STRICT_PROGRAM: Final = "cowfence"
_MAGICS: Final = {
    b"LUKS\xba\xbe": "luks",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
    b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels",
    b"Bochs Virtual HD Image": "bochs",
}
"""What formats that QEMU probes begin with."""
_MAGIC_BYTES: Final = max(map(len, _MAGICS))


def add_format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f",
        dest="format",
        choices=("qcow2", "raw", "luks"),
        help="format of the image (default: qcow2 if it looks so, else none)",
    )


def source_format(arguments: argparse.Namespace, image: str, *, writes: bool = False) -> str:
    """The format that ``-f`` gives, or else what ``looked_at`` says."""
    return looked_at(image, arguments, writes=writes) if arguments.format is None else str(arguments.format)


def looked_at(image: str, arguments: argparse.Namespace, *, writes: bool = False) -> str:
    """The format of the file where nobody said it. ``writes``: into the disk, whose first bytes would then decide next time.

    Raises NotThisFormat for what may or may not be raw, Unsupported for what looks like another format.
    """
    storage = FileStorage.open(image, lock=False)
    try:
        if probe(storage) == "qcow2":
            return "qcow2"
        if arguments.program != STRICT_PROGRAM and not writes:
            return _other_format(storage, image)
    finally:
        storage.close()
    raise not_qcow2(image)


def _other_format(storage: Storage, image: str) -> str:
    start = bytearray(_MAGIC_BYTES)
    storage.readv(0, (start,))
    found = next((name for magic, name in _MAGICS.items() if start.startswith(magic)), "raw")
    if found not in ("raw", "luks"):
        raise Unsupported(printable(image), f"image format {found!a}; cowfence opens qcow2, raw and luks")
    return found


def not_qcow2(image: str) -> NotThisFormat:
    """Of what has no magic string, where nobody has said what it is."""
    return NotThisFormat(printable(image), "not a qcow2 image (at offset 0: no magic string); if it is raw, add -f raw")
