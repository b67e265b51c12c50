"""An alteration has the image for itself, ends fenced, and leaves nothing behind when it fails."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import BLOCKED, Request, Verb
from cowfence.errors import CowfenceError, OutOfRange, ReadOnly
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.image import Qcow2Disk
from cowfence.qcow2.tables import Kind
from cowfence.qcow2.transaction import Stage
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Fence, OpLog
from cowfence.storage.record import RecordingStorage
from cowfence.units import SECTOR_BYTES
from crash.scenarios import CLUSTER, image, open_plain

_SIZE_AT = 24


def opened(storage: Storage) -> Qcow2Disk:
    return open_plain(storage, True)


def shrink(alteration: Alteration) -> None:
    """One cluster less, as a header field alone: enough of an alteration for the machinery."""
    state = alteration.state
    size = state.size - CLUSTER
    alteration.transaction(lambda: state.pending.patch_header(_SIZE_AT, size.to_bytes(8), "header.link"))


def test_it_begins_committed_and_ends_fenced_and_read_again() -> None:
    log = OpLog()
    memory = MemoryStorage(image(), name="image")
    disk = opened(RecordingStorage(memory, log, "image"))
    disk.write(0, b"x" * CLUSTER)
    size = disk.size
    disk.alter(shrink)
    assert disk.size == size - CLUSTER
    assert disk.read(0, CLUSTER) == b"x" * CLUSTER
    with pytest.raises(OutOfRange):
        disk.write(size - CLUSTER, b"x")
    assert isinstance([entry for entry in log.entries() if hasattr(entry, "mark")][-1], Fence)
    disk.write(CLUSTER, b"y" * CLUSTER)
    disk.close()
    assert fatal_findings(memory.snapshot()) == []


def test_guests_wait_at_the_gate_and_find_the_new_size() -> None:
    disk = opened(MemoryStorage(image(), name="image"))
    size, inside, go_on = disk.size, threading.Event(), threading.Event()

    def body(alteration: Alteration) -> None:
        inside.set()
        assert go_on.wait(20)
        shrink(alteration)

    outcomes: list[object] = []

    def guest() -> None:
        try:
            disk.write(size - CLUSTER, b"g" * CLUSTER)
        except CowfenceError as error:
            outcomes.append(error)

    altering = threading.Thread(target=lambda: disk.alter(body))
    altering.start()
    assert inside.wait(20)
    writing = threading.Thread(target=guest)
    writing.start()
    requests = [Request(Verb.READ, 0, CLUSTER), Request(Verb.WRITE, 0, CLUSTER, bytes(CLUSTER)), Request(Verb.ZERO, 0, CLUSTER)]
    assert disk.submit(requests, wait=False) == [BLOCKED] * 3
    time.sleep(0.05)
    assert not outcomes
    go_on.set()
    altering.join(20)
    writing.join(20)
    assert [type(outcome) for outcome in outcomes] == [OutOfRange]
    assert disk.read(0, CLUSTER) == bytes(CLUSTER)
    disk.close()


def new_l1(alteration: Alteration) -> None:
    """A copy of the L1 table elsewhere: content in PREPARE, the header in LINK, the old one freed."""
    state = alteration.state

    def plan() -> None:
        run = state.allocator.reserve_contiguous(1, wait=True)
        offset = run.first << state.geometry.cluster_bits
        state.layout.claim_new(offset, 1, Kind.L1)
        state.refcounts.increment(run.first)
        state.pending.put(Stage.PREPARE, offset, state.l1.content().ljust(CLUSTER, b"\0"), "l1.new", Kind.L1)
        state.pending.patch_header(40, offset.to_bytes(8), "header.link")
        state.pending.free(state.l1.offset >> state.geometry.cluster_bits, table=True)

    alteration.transaction(plan)


def test_content_put_in_prepare_is_there_after_it() -> None:
    memory = MemoryStorage(image(), name="image")
    disk = opened(memory)
    disk.write(0, b"x" * CLUSTER)
    old = disk.header.l1_offset
    disk.alter(new_l1)
    assert disk.header.l1_offset != old
    assert disk.read(0, CLUSTER) == b"x" * CLUSTER
    disk.write(CLUSTER, b"y" * CLUSTER)
    disk.close()
    assert fatal_findings(memory.snapshot()) == []


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_the_nth_call_fails(error: int) -> None:
    """Before LINK the image goes on as it was; in LINK, and at a fence, nothing more is written."""
    broken = unharmed = 0
    for nth in range(1, 30):
        memory = MemoryStorage(image(), name="image")
        plan = FaultPlan(None, error=error)
        disk = opened(FaultyStorage(memory, plan))
        disk.write(0, b"x" * CLUSTER)
        disk.flush()
        plan.matched, plan.nth = 0, nth
        try:
            disk.alter(new_l1)
        except CowfenceError:
            plan.nth = None
            try:
                disk.write(CLUSTER, b"y" * CLUSTER)
                disk.flush()
                unharmed += 1
            except ReadOnly:
                broken += 1
        else:
            assert broken
            assert unharmed
            return
        assert disk.read(0, CLUSTER) == b"x" * CLUSTER
        content = memory.snapshot()
        assert fatal_findings(content) == []
        again = opened(MemoryStorage(content, name="image"))
        assert again.read(0, CLUSTER) == b"x" * CLUSTER
        again.close()
    pytest.fail("it never came to its end")


def test_a_body_that_raises_leaves_the_image_as_it_was() -> None:
    memory = MemoryStorage(image(), name="image")
    disk = opened(memory)

    def body(alteration: Alteration) -> None:
        with alteration.state.lock:
            alteration.state.pending.set(alteration.state.l1, 0, 0x1000 | COPIED)
        raise CowfenceError("changed my mind")

    with pytest.raises(CowfenceError, match="changed my mind"):
        disk.alter(body)
    disk.write(0, b"x" * SECTOR_BYTES)
    disk.close()
    assert fatal_findings(memory.snapshot()) == []


def test_a_read_only_disk_is_not_altered() -> None:
    from cowfence.qcow2.image import open_image

    disk: Qcow2Disk = open_image(MemoryStorage(image(), name="image", writable=False), backing=None, writable=False)
    with pytest.raises(ReadOnly):
        disk.alter(shrink)
