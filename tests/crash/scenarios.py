"""Small images for tests: every kind of target, in as few sectors as can be."""

from __future__ import annotations

import struct

from cowfence.crash import images
from cowfence.crash.images import tagged
from cowfence.crash.operations import Step
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.storage.base import Storage
from cowfence.storage.memory import MemoryStorage

CLUSTER = 512
SIZE = 128 * CLUSTER
OPTIONS = Options(cache_bytes=64 * CLUSTER, commit_interval=None)
TIGHT = Options(cache_bytes=CLUSTER, commit_interval=None)


def open_plain(storage: Storage, writable: bool, *, options: Options = OPTIONS) -> Qcow2Disk:
    return open_image(storage, backing=None, writable=writable, options=options)


def image(refcount_bits: int = 16, version: int = 3, size: int = SIZE) -> bytes:
    storage = MemoryStorage(name="image")
    write_new(storage, NewImage(size, CLUSTER, refcount_bits, version))
    return storage.snapshot()


def written(content: bytes, *places: tuple[int, int], serial: int = 90) -> bytes:
    """``content`` after clean writes of (offset, length in bytes)."""
    storage = MemoryStorage(content, name="image")
    disk = open_plain(storage, True)
    for offset, length_bytes in places:
        disk.write(offset, tagged(offset, length_bytes, serial))
    disk.close()
    return storage.snapshot()


def compressed(content: bytes, guest: int) -> bytes:
    """``content`` with the written cluster at ``guest`` compressed into a cluster of its own."""
    return images.compressed(content, [guest], share=False)


def snapshotted(content: bytes) -> bytes:
    """``content`` with an internal snapshot of all of it."""
    return images.snapshotted(content)


def short_l1(content: bytes) -> bytes:
    """``content`` whose L1 table maps only the first half of the disk."""
    patch = images.Patch(content)
    struct.pack_into(">I", patch.data, 36, 1)
    return bytes(patch.data)


def W(cluster: int, clusters: int = 1) -> Step:  # noqa: N802 - reads as a letter in the scripts
    return Step("write", cluster * CLUSTER, clusters * CLUSTER)


FLUSH = Step("flush")
