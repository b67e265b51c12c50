"""Every call of the storage fails once, or for good, and the image survives it.

A workload is run again and again; in run n the n-th call fails, with EIO or ENOSPC, having done nothing, half or all of its
work. The program does not stop at an error: it goes on with the next operation, as a guest does. Whatever then stands in the
file, left as it is or closed, must be a sound image in which each sector holds a value that the guest may find (crash contract,
C16).
"""

from __future__ import annotations

import errno
import functools
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cowfence.crash.images import tagged
from cowfence.crash.model import GuestModel
from cowfence.crash.operations import Step
from cowfence.crash.structure import fatal_findings
from cowfence.errors import CowfenceError, NoSpace, ReadOnly, StorageFailed
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.qcow2.tables import RefcountBlock
from cowfence.qcow2.transaction import Committer, Frozen, Pending
from cowfence.storage.fault import CHANGES, Arrived, FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.units import SECTOR_BYTES
from crash.scenarios import CLUSTER, FLUSH, OPTIONS, TIGHT, W, compressed, image, short_l1, snapshotted, written
from judges import run

CHANGE_COUNTERS = tuple(CHANGES - {Kind.FENCE})


@dataclass(frozen=True)
class Workload:
    """An image, and what the guest does with it. ``covers``: marks that a run without faults must contain."""

    content: bytes
    script: Sequence[Step]
    covers: frozenset[str]
    options: Options = OPTIONS

    def guest(self) -> bytes:
        return read_all(self.content)


def read_all(content: bytes) -> bytes:
    disk = open_image(MemoryStorage(content, "image", writable=False), backing=None, writable=False)
    return disk.read(0, disk.size)


def zero(cluster: int, clusters: int = 1) -> Step:
    return Step("zero", cluster * CLUSTER, clusters * CLUSTER)


def keep_zero(cluster: int, clusters: int = 1) -> Step:
    return Step("keep_zero", cluster * CLUSTER, clusters * CLUSTER)


def discard(cluster: int, clusters: int = 1) -> Step:
    return Step("discard", cluster * CLUSTER, clusters * CLUSTER)


def full_table() -> bytes:
    """An image whose one cluster of refcount table is full and all of whose counts but a few are taken (they are leaks).

    64-bit counts: a block counts 64 clusters, and a cluster of the table names 64 blocks.
    """
    size = 256 * CLUSTER
    storage = MemoryStorage(name="image")
    write_new(storage, NewImage(size, CLUSTER, 64))
    data = bytearray(written(storage.snapshot(), (0, 8 * CLUSTER)))
    table = struct.unpack_from(">Q", data, 48)[0]
    used = len(data) // CLUSTER
    first = -(-used // 64) * 64
    data.extend(bytes((first + 63) * CLUSTER - len(data)))
    for index in range(1, 64):
        block = (first + index - 1) * CLUSTER
        struct.pack_into(">Q", data, table + index * 8, block)
        data[block : block + CLUSTER] = struct.pack(">Q", 1) * 64
    # What is left of the first block's range but four clusters is taken too.
    block = struct.unpack_from(">Q", data, table)[0]
    for cluster in range(used, 60):
        struct.pack_into(">Q", data, block + cluster * 8, 1)
    return bytes(data)


@functools.cache
def workloads() -> dict[str, Workload]:
    aged = short_l1(snapshotted(compressed(written(image(), (0, 4 * CLUSTER), (40 * CLUSTER, 2 * CLUSTER)), 0)))
    narrow = written(image(64, size=256 * CLUSTER), (0, 44 * CLUSTER))
    return {
        "one": Workload(image(), [W(0), FLUSH], frozenset({"l2.new", "l1.link", "refcount.increment"})),
        # Compressed, shared and plain clusters are written, zeroed and discarded; the L1 table grows.
        "aged": Workload(
            aged,
            [
                *(W(0), W(1), W(10), FLUSH),
                *(W(10), W(2), zero(3), keep_zero(10), FLUSH),
                *(W(70, 2), W(10), discard(1, 2), FLUSH),
                *(W(11, 3), zero(70), W(1), FLUSH, W(0), W(71), FLUSH),
            ],
            frozenset({"l1.new", "header.link", "l2.new", "l1.link", "l2.link", "refcount.decrement", "host.discard"}),
        ),
        # The same with one table in the cache, so that nearly every operation commits first.
        "tight": Workload(
            aged, [W(0), W(70), W(1), zero(3), W(40, 2), FLUSH, discard(0, 2), W(71), FLUSH], frozenset({"l1.new"}), TIGHT
        ),
        # The refcount block is full: the next one is made, in the range covered and alone.
        "blocks": Workload(
            narrow,
            [
                W(60, 6),
                FLUSH,
                W(100, 14),
                FLUSH,
                discard(60, 3),
                W(0),
                FLUSH,
                W(130, 66),
                FLUSH,
                zero(100, 4),
                W(200, 4),
                FLUSH,
            ],
            frozenset({"refcount_block.new", "refcount_table.link"}),
        ),
        # The refcount table is full: a longer one is made.
        "table": Workload(
            full_table(),
            [W(0), W(20, 3), FLUSH, W(30, 6), FLUSH, discard(0, 2), FLUSH, W(1), W(64), FLUSH],
            frozenset({"refcount_table.new", "refcount_block.new", "header.link"}),
        ),
    }


class Guest:
    """Runs a workload on a storage with faults, and keeps account of what it may find."""

    def __init__(self, workload: Workload, plan: FaultPlan) -> None:
        self.memory = MemoryStorage(workload.content, "image")
        self.plan = plan
        self.storage = FaultyStorage(self.memory, plan)
        self.options = workload.options
        guest = workload.guest()
        self.model = GuestModel(guest)
        self.disk: Qcow2Disk | None = None
        self.errors: list[CowfenceError] = []
        self.fence_failed = False
        self._serial = 0

    def attempt(self, action: Callable[[], None]) -> bool:
        fences, failed = self.plan.calls[Kind.FENCE], self.plan.failed
        try:
            action()
        except CowfenceError as error:
            self.errors.append(error)
            # A batch of calls ends with the one that failed; a failed fence is always the last.
            self.fence_failed |= self.plan.calls[Kind.FENCE] > fences and self.plan.failed > failed and "fence" in str(error)
            return False
        return True

    def open(self) -> bool:
        def attempt() -> None:
            self.disk = open_image(self.storage, backing=None, writable=True, options=self.options)

        return self.attempt(attempt)

    @property
    def the_disk(self) -> Qcow2Disk:
        assert self.disk is not None
        return self.disk

    def step(self, step: Step) -> bool:
        verb, offset, length_bytes = step
        disk, model = self.the_disk, self.model
        if verb == "flush":
            token = model.begin_flush()
            done = self.attempt(disk.flush)
            if done:
                model.end_flush(token)
            return done
        self._serial += 1
        data = tagged(offset, length_bytes, self._serial) if verb == "write" else bytes(length_bytes)
        if verb == "discard":
            token = model.begin_discard(offset, length_bytes)
            done = self.attempt(lambda: disk.discard(offset, length_bytes))
        else:
            token = model.begin_write(offset, data)
            if verb == "write":
                done = self.attempt(lambda: disk.write(offset, data))
            else:
                done = self.attempt(lambda: disk.zero(offset, length_bytes, unmap=verb == "zero"))
        if done:
            model.end(token)
        return done

    def changes(self) -> int:
        return sum(self.plan.calls[kind] for kind in CHANGE_COUNTERS)


def changed(model: GuestModel, now: bytes) -> dict[int, bytes]:
    """The sectors of ``now`` that differ from the disk before."""
    sectors = range(len(now) // SECTOR_BYTES)
    values = {sector: now[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES] for sector in sectors}
    return {sector: value for sector, value in values.items() if value != model.initial[sector * SECTOR_BYTES :][:SECTOR_BYTES]}


def judge(guest: Guest, what: str) -> None:
    """The file as it stands is a sound image that holds what the guest may find, and it can be written again."""
    content = guest.memory.snapshot()
    findings = fatal_findings(content)
    assert not findings, f"{what}: {findings[0]}"
    now = read_all(content)
    wrong = next(guest.model.wrong_sectors(changed(guest.model, now)), None)
    assert wrong is None, f"{what}: sector {wrong[0]} holds {wrong[1][:24]!r}"


def live_again(content: bytes) -> bytes:
    """Write over old and new clusters of the image, and judge it once more (crash contract, C10)."""
    before = bytearray(read_all(content))
    storage = MemoryStorage(content, "image")
    disk = open_image(storage, backing=None, writable=True, options=OPTIONS)
    for cluster in (0, 1, 20, 71, 100):
        data = tagged(cluster * CLUSTER, CLUSTER, 999)
        disk.write(cluster * CLUSTER, data)
        before[cluster * CLUSTER : (cluster + 1) * CLUSTER] = data
    disk.close()
    assert fatal_findings(storage.snapshot()) == []
    assert read_all(storage.snapshot()) == before
    return storage.snapshot()


def check_broken(guest: Guest) -> None:
    """After a failed fence: every change is refused with the reason, reads go on, and nothing more is written."""
    disk, changes, fences = guest.the_disk, guest.changes(), guest.plan.calls[Kind.FENCE]
    attempts: list[Callable[[], None]] = [
        lambda: disk.write(0, bytes(CLUSTER)),
        lambda: disk.zero(CLUSTER, CLUSTER),
        lambda: disk.discard(0, CLUSTER),
        disk.flush,
        disk.commit,
    ]
    for attempt in attempts:
        with pytest.raises(ReadOnly, match="a fence failed"):
            attempt()
    assert len(disk.read(0, disk.size)) == disk.size
    with pytest.raises(ReadOnly, match="a fence failed"):
        disk.close()
    assert (guest.changes(), guest.plan.calls[Kind.FENCE]) == (changes, fences)


def run_with_fault(workload: Workload, plan: FaultPlan) -> Guest | None:
    """Carry the script out over a fault. None if the plan's call was never reached."""
    guest = Guest(workload, plan)
    if guest.open():
        for step in workload.script:
            guest.step(step)
    return guest if plan.failed else None


def qemu_check(content: bytes, path: Path) -> None:
    if struct.unpack_from(">I", content, 36)[0] < len(read_all(content)) // CLUSTER // 64:
        return  # QEMU opens no image whose L1 table is short.
    path.write_bytes(content)
    checked = run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=False)
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr


FAULTS = [
    pytest.param(errno.EIO, False, id="EIO-once"),
    pytest.param(errno.EIO, True, id="EIO-for-good"),
    pytest.param(errno.ENOSPC, False, id="ENOSPC-once"),
    pytest.param(errno.ENOSPC, True, id="ENOSPC-for-good"),
]


@pytest.mark.parametrize("name", workloads())
def test_workload_reaches_what_it_is_for(name: str) -> None:
    workload = workloads()[name]
    marks: set[str] = set()
    guest = Guest(workload, FaultPlan(on_call=lambda _, mark: marks.add(mark)))
    assert guest.open()
    assert all(guest.step(step) for step in workload.script)
    assert workload.covers <= marks, sorted(marks)
    judge(guest, "no fault")


@pytest.mark.parametrize("arrived", [Arrived.NOTHING, Arrived.HALF, Arrived.ALL], ids=lambda arrived: arrived.value)
@pytest.mark.parametrize(("error", "keep_failing"), FAULTS)
@pytest.mark.parametrize("name", workloads())
def test_every_change_fails(name: str, error: int, keep_failing: bool, arrived: Arrived, tmp_path: Path) -> None:
    workload = workloads()[name]
    chance = random.Random(f"{name} {error} {keep_failing} {arrived}")
    nth = 0
    while True:
        nth += 1
        plan = FaultPlan(nth, error=error, keep_failing=keep_failing, arrived=arrived)
        guest = run_with_fault(workload, plan)
        if guest is None:
            break
        what = f"call {nth}: {guest.errors[0]}" if guest.errors else f"call {nth}"
        judge(guest, what)
        content = guest.memory.snapshot()
        if chance.random() < 0.05:
            qemu_check(content, tmp_path / "image")
            qemu_check(live_again(content), tmp_path / "image")
        if guest.disk is None:
            continue
        if guest.fence_failed:
            check_broken(guest)
            judge(guest, what)
            continue
        if not keep_failing:
            # The host is well again: what was acknowledged can be flushed, and all of it is there afterwards.
            assert guest.step(FLUSH), f"{what}: {guest.errors[-1]}"
            assert guest.disk.read(0, guest.disk.size) == read_all(guest.memory.snapshot()), what
        guest.attempt(guest.disk.close)
        judge(guest, f"{what}, closed")
    assert nth > len(workload.script)


@pytest.mark.parametrize("name", workloads())
def test_no_space_once_costs_nothing(name: str) -> None:
    """A host that was full for one call: the guest repeats what failed, and everything is there."""
    workload = workloads()[name]
    nth = 0
    while True:
        nth += 1
        plan = FaultPlan(nth, kinds=CHANGES - {Kind.FENCE}, error=errno.ENOSPC, arrived=Arrived.HALF)
        guest = Guest(workload, plan)
        assert guest.open()
        for step in workload.script:
            if not guest.step(step):
                assert isinstance(guest.errors[-1], NoSpace)
                assert guest.step(step), guest.errors[-1]
        if not plan.failed:
            break
        # A sector that was discarded is old or zero; all others are what was written last.
        now = guest.the_disk.read(0, guest.the_disk.size)
        assert not list(guest.model.wrong_sectors(changed(guest.model, now))), f"call {nth}"
        guest.the_disk.close()
        assert read_all(guest.memory.snapshot()) == now, f"call {nth}"
        judge(guest, f"call {nth}")


@pytest.mark.parametrize("keep_failing", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("name", workloads())
def test_every_read_fails(name: str, keep_failing: bool) -> None:
    workload = workloads()[name]
    nth = 0
    while True:
        nth += 1
        plan = FaultPlan(nth, kinds={Kind.READ}, keep_failing=keep_failing)
        guest = run_with_fault(workload, plan)
        if guest is None:
            break
        assert not any(not isinstance(error, StorageFailed) for error in guest.errors), guest.errors
        judge(guest, f"read {nth}")
        if guest.disk is not None:
            if not keep_failing:
                assert guest.step(FLUSH)
            guest.attempt(guest.disk.close)
            judge(guest, f"read {nth}, closed")
    assert nth > 4


def _forget_counts(self: Pending, frozen: Frozen, *, link_begun: bool) -> None:
    """Takes a failed transaction back without the counts of its clusters."""
    for offset, (table, _) in list(frozen.sectors.items()):
        if isinstance(table, RefcountBlock):
            table.frozen = False
            del frozen.sectors[offset]
    _TAKE_BACK(self, frozen, link_begun=link_begun)


_TAKE_BACK = Pending.take_back


@pytest.mark.parametrize(
    ("owner", "method", "broken"),
    [
        pytest.param(Committer, "_check", lambda _: None, id="M28-failed-fence-called-again"),
        pytest.param(Pending, "take_back", _forget_counts, id="M30-entry-without-count"),
        pytest.param(Pending, "take_back", lambda *_, **__: None, id="failed-commit-forgotten"),
    ],
)
def test_broken_engine_is_caught(
    owner: type, method: str, broken: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_every_change_fails("one", errno.EIO, False, Arrived.NOTHING, tmp_path)


def test_random_walks_over_random_faults() -> None:
    """Seeded walks in which calls fail now and then, fences excepted, and the image is reopened."""
    for seed in range(300):
        chance = random.Random(seed)
        workload = chance.choice(list(workloads().values()))
        guest = Guest(workload, FaultPlan())
        clusters = len(guest.model.initial) // CLUSTER
        assert guest.open()
        for _ in range(40):
            nth = guest.plan.matched + chance.randrange(1, 12)
            kinds = CHANGES - {Kind.FENCE} if chance.random() < 0.8 else frozenset({Kind.READ})
            error = chance.choice([errno.EIO, errno.ENOSPC]) if kinds != {Kind.READ} else errno.EIO
            guest.plan.kinds, guest.plan.nth, guest.plan.error = kinds, nth, error
            guest.plan.arrived = chance.choice(list(Arrived))
            cluster = chance.randrange(clusters)
            span = min(chance.randrange(1, 10), clusters - cluster)
            verb = chance.choice([W, W, W, zero, keep_zero, discard])
            guest.step(FLUSH if chance.random() < 0.2 else verb(cluster, span))
        judge(guest, f"seed {seed}")
        guest.plan.nth = None
        assert guest.step(FLUSH), f"seed {seed}"
        guest.the_disk.close()
        judge(guest, f"seed {seed}, closed")
