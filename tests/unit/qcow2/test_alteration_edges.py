"""Where an alteration meets what went wrong just before it, and who closes the disk meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from cowfence.crash.structure import fatal_findings
from cowfence.errors import Closed, StorageFailed
from cowfence.ops.compact import compact_disk
from cowfence.ops.snapshot import apply_snapshot, create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.storage.base import Buffer
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import KIB, MIB

CLUSTER = 512
DISK_BYTES = MIB
OLD, NEW = 40 * CLUSTER, 600 * CLUSTER
"""More clusters than one refcount block counts (256)."""
START, LATER = 256 * KIB, 640 * KIB


class Watched(StorageWrapper):
    """``fail``: the next call of that mark fails. ``hold``: the next one of that mark waits for ``go_on``."""

    def __init__(self) -> None:
        self.memory = MemoryStorage(name="image")
        super().__init__(self.memory)
        self.fail = self.hold = ""
        self.holding, self.go_on = threading.Event(), threading.Event()
        self.closed = False

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if mark == self.fail:
            self.fail = ""
            raise StorageFailed("image", "write", offset, OSError(5, "I/O error"))
        if mark == self.hold:
            self.hold = ""
            self.holding.set()
            assert self.go_on.wait(10)
            assert not self.closed
        super().writev(offset, buffers, mark)

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.fixture
def storage() -> Watched:
    storage = Watched()
    write_new(storage, NewImage(DISK_BYTES, CLUSTER))
    return storage


@pytest.fixture
def disk(storage: Watched) -> Qcow2Disk:
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
    disk.write(0, b"o" * OLD)
    disk.write(START, b"f" * NEW)
    disk.flush()
    return disk


def _snapshot(disk: Qcow2Disk) -> None:
    create_snapshot(disk, "s")


def _snapshot_and_apply(disk: Qcow2Disk) -> None:
    create_snapshot(disk, "s")
    disk.discard(START, OLD)
    apply_snapshot(disk, "s")


def _compact(disk: Qcow2Disk) -> None:
    compact_disk(disk)


@pytest.mark.parametrize("alteration", [_snapshot, _snapshot_and_apply, _compact])
@pytest.mark.parametrize("reclaim", [1, 2])
def test_counts_that_reclaim_could_not_write_do_not_come_late(
    disk: Qcow2Disk, storage: Watched, alteration: Callable[[Qcow2Disk], None], reclaim: int
) -> None:
    """They stood in memory beside what the alteration wrote straight, and were written over it by the next flush."""
    if reclaim == 2:
        disk.discard(START + NEW - OLD, OLD)
        disk.flush()
    disk.discard(0, OLD)
    storage.fail = "refcount.decrement"
    alteration(disk)
    assert not storage.fail
    assert not disk._state.pending
    kept = disk.read(0, DISK_BYTES)
    disk.write(START, b"N" * (NEW // 2))
    disk.write(LATER, b"M" * NEW)
    disk.flush()
    assert disk.read(LATER, NEW) == b"M" * NEW
    assert disk.read(START, NEW // 2) == b"N" * (NEW // 2)
    assert disk.read(START + NEW // 2, NEW // 2) == kept[START + NEW // 2 : START + NEW]
    disk.close()
    assert fatal_findings(storage.memory.snapshot()) == []
    if alteration is not _compact:
        with open_image(MemoryStorage(storage.memory.snapshot(), "image"), backing=None, writable=False, snapshot="s") as then:
            assert then.read(START, NEW // 2) == b"f" * (NEW // 2)


@pytest.mark.parametrize("mark", ["refcount.increment", "snapshot_l1.new", "header.link"])
def test_closing_waits_for_an_alteration(disk: Qcow2Disk, storage: Watched, mark: str) -> None:
    storage.hold = mark
    altering = threading.Thread(target=_snapshot, args=(disk,))
    altering.start()
    assert storage.holding.wait(10)
    closing = threading.Thread(target=disk.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    with pytest.raises(Closed):
        disk.write(0, b"x")
    storage.go_on.set()
    altering.join(10)
    closing.join(10)
    assert not altering.is_alive()
    assert not closing.is_alive()
    assert fatal_findings(storage.memory.snapshot()) == []
    with open_image(MemoryStorage(storage.memory.snapshot(), "image"), backing=None, writable=False, snapshot="s") as then:
        assert then.read(START, NEW) == b"f" * NEW


def test_an_alteration_that_comes_after_closing_is_refused(disk: Qcow2Disk) -> None:
    disk.close()
    with pytest.raises(Closed):
        create_snapshot(disk, "s")
