"""Tables that grew while guests wrote stay where they are when the header is switched afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cowfence.crash.images import Patch
from cowfence.crash.structure import fatal_findings
from cowfence.ops.amend import Amendment, amend_disk
from cowfence.ops.rebase import rebase_disk
from cowfence.ops.resize import resize_disk
from cowfence.ops.snapshot import apply_snapshot, create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Qcow2Disk, open_image
from cowfence.storage.memory import MemoryStorage
from helpers_check import QUIET

_SIZE = 3 << 20


def bitmaps(disk: Qcow2Disk) -> None:
    disk.bitmaps.add("bits", granularity_bytes=65536)


def snapshots(disk: Qcow2Disk) -> None:
    create_snapshot(disk, "s")
    disk.write(0, b"y" * 512)
    apply_snapshot(disk, "s")


@pytest.mark.parametrize(
    "change",
    [
        bitmaps,
        snapshots,
        lambda disk: resize_disk(disk, 2 * _SIZE),
        lambda disk: rebase_disk(disk, None, None, None),
        lambda disk: amend_disk(disk, Amendment(lazy_refcounts=True)),
        lambda disk: amend_disk(disk, Amendment(refcount_bits=32)),
    ],
    ids=["bitmaps", "snapshots", "resize", "rebase", "lazy", "refcounts"],
)
def test_after_growth(change: Callable[[Qcow2Disk], None]) -> None:
    memory = MemoryStorage(name="image")
    write_new(memory, NewImage(_SIZE, 512, 64))
    patch = Patch(memory.snapshot())
    # Its L1 table has to grow, too.
    patch.data[36:40] = (1).to_bytes(4)
    memory = MemoryStorage(bytes(patch.data), name="image")
    disk = open_image(memory, backing=None, writable=True, options=QUIET)
    data = bytes(range(256)) * (_SIZE // 256)
    disk.write(0, data)
    disk.flush()
    assert patch.data[48:56] != memory.snapshot()[48:56], "the refcount table has grown"
    change(disk)
    assert disk.read(0, _SIZE) == data
    disk.write(0, b"x" * 4096)
    disk.close()
    content = memory.snapshot()
    assert fatal_findings(content) == []
    with open_image(MemoryStorage(content, name="image"), backing=None, writable=False) as again:
        assert again.read(0, _SIZE) == b"x" * 4096 + data[4096:]
