"""Small images and guest scripts for the order tests: every kind of target, in as few sectors as can be."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from cowfence.crash.explore import Step, tagged
from cowfence.disk.base import Disk
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


class _Patch:
    """Byte surgery on a small image with 16-bit refcounts in one block, for features that the engine does not write yet."""

    def __init__(self, content: bytes) -> None:
        self.data = bytearray(content)

    def word(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.data, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.data, at, value)

    def count(self, cluster: int, change: int) -> None:
        block = self.word(self.word(48))
        at = block + cluster * 2
        struct.pack_into(">H", self.data, at, struct.unpack_from(">H", self.data, at)[0] + change)

    def l2_at(self, guest: int) -> int:
        l1 = self.word(40)
        l2 = self.word(l1 + guest // (64 * CLUSTER) * 8) & 0x00FF_FFFF_FFFF_FE00
        return l2 + guest // CLUSTER % 64 * 8

    def append(self, data: bytes) -> int:
        offset = -(-len(self.data) // CLUSTER) * CLUSTER
        self.data.extend(bytes(offset - len(self.data)))
        self.data.extend(data.ljust(-(-len(data) // CLUSTER) * CLUSTER, b"\0"))
        return offset


def compressed(content: bytes, guest: int) -> bytes:
    """``content`` with the written cluster at ``guest`` compressed into a cluster of its own."""
    patch = _Patch(content)
    at = patch.l2_at(guest)
    host = patch.word(at) & 0x00FF_FFFF_FFFF_FE00
    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    data = deflate.compress(bytes(patch.data[host : host + CLUSTER])) + deflate.flush()
    offset = patch.append(data)
    patch.count(offset // CLUSTER, 1)
    patch.count(host // CLUSTER, -1)
    patch.put(at, 1 << 62 | offset)
    return bytes(patch.data)


def snapshotted(content: bytes) -> bytes:
    """``content`` with an internal snapshot of all of it: counts up, COPIED off, the L1 table copied."""
    patch = _Patch(content)
    l1, entries = patch.word(40), struct.unpack_from(">I", patch.data, 36)[0]
    copied = 1 << 63
    for index in range(entries):
        l1_entry = patch.word(l1 + index * 8) & ~copied
        patch.put(l1 + index * 8, l1_entry)
        if l1_entry:
            patch.count(l1_entry // CLUSTER, 1)
            for at in range(l1_entry, l1_entry + CLUSTER, 8):
                entry = patch.word(at) & ~copied
                patch.put(at, entry)
                if entry & 0x00FF_FFFF_FFFF_FE00:
                    patch.count((entry & 0x00FF_FFFF_FFFF_FE00) // CLUSTER, 1)
    copy = patch.append(bytes(patch.data[l1 : l1 + entries * 8]))
    patch.count(copy // CLUSTER, 1)
    size = patch.word(24)
    table = patch.append(struct.pack(">QIHHIIQII", copy, entries, 1, 1, 0, 0, 0, 0, 16) + struct.pack(">QQ", 0, size) + b"1s")
    patch.count(table // CLUSTER, 1)
    struct.pack_into(">IQ", patch.data, 60, 1, table)
    return bytes(patch.data)


def short_l1(content: bytes) -> bytes:
    """``content`` whose L1 table maps only the first half of the disk."""
    patch = _Patch(content)
    struct.pack_into(">I", patch.data, 36, 1)
    return bytes(patch.data)


@dataclass(frozen=True)
class Scenario:
    """An image, a script, and how the image is opened. ``inside``: a step that runs inside the first prepare fence."""

    name: str
    content: bytes
    script: Sequence[Step]
    options: Options = OPTIONS
    inside: Step | None = None

    def guest(self) -> bytes:
        disk = open_plain(MemoryStorage(self.content, name="image", writable=False), False)
        return disk.read(0, disk.size)


def W(cluster: int, clusters: int = 1) -> Step:  # noqa: N802 - reads as a letter in the scripts
    return Step("write", cluster * CLUSTER, clusters * CLUSTER)


FLUSH = Step("flush")


@functools.cache
def scenarios() -> dict[str, Scenario]:
    """Every target of the contract that this engine can meet, with the scripts that exercise it."""
    fresh = image()
    used = written(fresh, (0, 4 * CLUSTER), (70 * CLUSTER, CLUSTER))
    narrow = image(64, size=256 * CLUSTER)
    # 64-bit counts: one block covers 64 clusters, so that a few writes need the next one.
    nearly_full = written(narrow, (0, 46 * CLUSTER))
    packed = compressed(used, 0)
    shared = snapshotted(used)
    found = [
        Scenario("allocate", fresh, [W(0), FLUSH]),
        Scenario("allocate-two-tables", fresh, [W(63, 2), FLUSH, W(5), FLUSH]),
        Scenario("in-place", used, [W(0), FLUSH, W(1)]),
        Scenario("in-place-and-new", used, [W(0), W(10), FLUSH]),
        Scenario("compressed", packed, [W(0), W(9), FLUSH, W(10), FLUSH]),
        Scenario("shared", shared, [W(0), FLUSH, W(1), W(20), FLUSH]),
        Scenario("discard-then-write", used, [Step("discard", 0, CLUSTER), W(9), FLUSH, W(10), FLUSH]),
        Scenario("zero-then-write", used, [Step("zero", 0, 2 * CLUSTER), W(9), FLUSH, W(0), FLUSH]),
        Scenario("keep-zero", used, [Step("keep_zero", 0, CLUSTER), FLUSH, W(0), FLUSH]),
        Scenario("keep-zero-unflushed", used, [Step("keep_zero", 0, CLUSTER), W(0), FLUSH]),
        Scenario("discard-flush-write", used, [Step("discard", 0, 2 * CLUSTER), FLUSH, W(8, 3), FLUSH]),
        Scenario("version-2", image(version=2), [W(0), FLUSH, Step("discard", 0, CLUSTER), W(1), FLUSH]),
        Scenario("refcount-block", nearly_full, [W(60, 12), FLUSH, W(100, 4), FLUSH]),
        Scenario("refcount-block-unflushed", nearly_full, [W(60, 40), FLUSH]),
        Scenario("one-bit", image(1), [W(0), FLUSH, Step("discard", 0, CLUSTER), FLUSH, W(3), FLUSH]),
        Scenario("l1-growth", short_l1(written(fresh, (0, CLUSTER))), [W(70), FLUSH, W(0), FLUSH]),
        Scenario("tight-cache", packed, [W(0), W(70), W(1), FLUSH], options=TIGHT),
        Scenario("kill-reopen", used, [W(10), FLUSH, W(11), Step("kill"), W(12), FLUSH, Step("discard", 0, CLUSTER), FLUSH]),
        Scenario("inside-fence", used, [W(10), FLUSH, W(11), FLUSH], inside=W(12)),
        Scenario("inside-fence-in-place", used, [W(10), FLUSH, FLUSH], inside=W(0)),
        Scenario("inside-fence-discard", used, [W(10), FLUSH, W(13), FLUSH], inside=Step("discard", CLUSTER, CLUSTER)),
    ]
    return {scenario.name: scenario for scenario in found}


def disk_of(scenario: Scenario, storage: Storage, writable: bool) -> Disk:
    return open_plain(storage, writable, options=scenario.options)
