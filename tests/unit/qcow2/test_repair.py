"""Repair: what it mends, what it leaves, and that a crash at any of its operations leaves the image as good as before."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest

from cowfence.errors import Corrupt, CowfenceError, NoSpace, ReadOnly
from cowfence.qcow2.entries import COPIED, Compressed, encode_l2
from cowfence.qcow2.findings import Grade, Report
from cowfence.qcow2.geometry import HostOffset
from cowfence.qcow2.header import read_header
from cowfence.qcow2.image import open_image
from cowfence.qcow2.repair import Mode, rebuild_dirty, repair
from cowfence.qcow2.verify import verify
from cowfence.storage.fault import Arrived, FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Fence, Operation, OpLog, Write
from cowfence.storage.record import RecordingStorage
from helpers_check import Scalpel, guest_clusters, new_image

Damage = Callable[[Scalpel], None]


def leak(image: Scalpel) -> None:
    image.append(2)
    image.set_count(image.cluster_of(image.l2_at(0, 4)), 3)


def too_low(image: Scalpel) -> None:
    image.set_count(image.cluster_of(image.l2_at(0, 4)), 0)
    image.set_count(image.cluster_of(image.l1_at(0)), 0)


def too_low_and_leaked(image: Scalpel) -> None:
    too_low(image)
    leak(image)


def all_counts_lost(image: Scalpel) -> None:
    for cluster in range(len(image.data) // image.header.cluster_bytes):
        image.set_count(cluster, 0)


def refcount_table_emptied(image: Scalpel) -> None:
    image.put(image.table_at(0), 0)


def refcount_table_reserved_bits(image: Scalpel) -> None:
    image.put(image.table_at(0), image.word(image.table_at(0)) | 3)


def refcount_table_past_end(image: Scalpel) -> None:
    image.data[48:56] = (1 << 30).to_bytes(8)


def refcount_block_past_end(image: Scalpel) -> None:
    image.put(image.table_at(1), 1 << 40)


def refcount_block_on_data(image: Scalpel) -> None:
    image.put(image.table_at(1), image.cluster_of(image.l2_at(0, 4)) << image.header.cluster_bits)


def refcount_table_on_l1(image: Scalpel) -> None:
    image.data[48:56] = int(image.header.l1_offset).to_bytes(8)


def flags_wrong(image: Scalpel) -> None:
    for at in (image.l1_at(0), image.l2_at(0, 2), image.l2_at(0, 8)):
        image.put(at, image.word(at) ^ COPIED)


def flags_set_on_shared(image: Scalpel) -> None:
    image.add_snapshot()
    for at in (image.l1_at(0), image.l2_at(0, 2), image.l2_at(0, 8)):
        image.put(at, image.word(at) | COPIED)


def shared_too_low(image: Scalpel) -> None:
    image.add_snapshot()
    image.set_count(image.cluster_of(image.l2_at(0, 4)), 1)
    image.append(1)


def dirty(image: Scalpel) -> None:
    image.set_features(1)
    too_low(image)


def marked_corrupt(image: Scalpel) -> None:
    image.set_features(2)
    flags_wrong(image)


REPAIRABLE: list[Damage] = [
    leak,
    too_low,
    too_low_and_leaked,
    all_counts_lost,
    refcount_table_emptied,
    refcount_table_reserved_bits,
    refcount_table_past_end,
    refcount_block_past_end,
    refcount_block_on_data,
    refcount_table_on_l1,
    flags_wrong,
    flags_set_on_shared,
    shared_too_low,
    dirty,
    marked_corrupt,
]


def reserved_bits_in_l2(image: Scalpel) -> None:
    image.put(image.l2_at(0, 4), image.word(image.l2_at(0, 4)) | 8)
    too_low_and_leaked(image)


def entry_past_end(image: Scalpel) -> None:
    image.put(image.l2_at(0, 5), 1 << 40)
    too_low_and_leaked(image)


def entry_just_past_end(image: Scalpel) -> None:
    """Where a new refcount structure would stand if it were written behind the last cluster."""
    image.append(8)
    image.put(image.l2_at(0, 5), len(image.data))
    too_low(image)


def l1_entry_past_end(image: Scalpel) -> None:
    image.put(image.l1_at(1), 1 << 40)
    too_low_and_leaked(image)


def data_on_l2(image: Scalpel) -> None:
    image.put(image.l2_at(0, 5), image.word(image.l1_at(0)) & ~COPIED)


def snapshot_table_lost(image: Scalpel) -> None:
    image.add_snapshot()
    table = int(image.header.snapshots_offset)
    image.data[table + 36 : table + 40] = (5000).to_bytes(4)
    image.append(1)


UNREPAIRABLE: list[Damage] = [
    reserved_bits_in_l2,
    entry_past_end,
    entry_just_past_end,
    l1_entry_past_end,
    data_on_l2,
    snapshot_table_lost,
]


def damaged(damage: Damage, **geometry: int) -> bytes:
    image = Scalpel(new_image(**geometry))
    damage(image)
    return bytes(image.data)


def repaired(data: bytes, mode: Mode = Mode.ALL) -> tuple[bytes, Report]:
    storage = MemoryStorage(data, writable=True)
    report = repair(storage, mode)
    assert report.after == verify(MemoryStorage(storage.snapshot()))
    return storage.snapshot(), report.after


def fatal(report: Report) -> set[str]:
    """The fatal findings. That a cluster has several owners shows in its count, its place or its flag: it is one fact here."""
    return {
        f"{finding.problem.value} {finding.where}" if finding.cluster is None else f"on {finding.cluster}"
        for finding in report.findings
        if finding.grade is Grade.FATAL
    }


def readable(data: bytes) -> list[bytes | None] | None:
    """What the guest reads; None where the image cannot be opened at all (its refcount table lies outside of the file)."""
    try:
        return guest_clusters(data)
    except Corrupt:
        return None


@pytest.mark.parametrize("damage", REPAIRABLE)
def test_repair_of_all_gives_a_clean_image(damage: Damage) -> None:
    before = damaged(damage)
    assert not verify(MemoryStorage(before)).clean
    after, report = repaired(before)
    assert report.clean, [str(finding) for finding in report.findings]
    assert read_header(MemoryStorage(after)).incompatible == 0
    guest = readable(before)
    assert guest is None or guest == guest_clusters(after)


@pytest.mark.parametrize("geometry", [{"refcount_bits": 1}, {"refcount_bits": 64}, {"cluster_bytes": 65536}, {"version": 2}])
@pytest.mark.parametrize("damage", [leak, too_low, too_low_and_leaked, all_counts_lost, refcount_table_emptied, flags_wrong])
def test_repair_in_other_geometries(damage: Damage, geometry: dict[str, int]) -> None:
    image = Scalpel(new_image(**geometry, size_bytes=2 << 20))
    if geometry.get("refcount_bits") == 1 and damage in (leak, too_low_and_leaked):
        image.append(3)
    else:
        damage(image)
    after, report = repaired(bytes(image.data))
    assert report.clean, [str(finding) for finding in report.findings]
    assert guest_clusters(after) == guest_clusters(bytes(image.data))


@pytest.mark.parametrize("damage", UNREPAIRABLE)
def test_what_cannot_be_repaired_stays_and_is_reported(damage: Damage) -> None:
    before = damaged(damage)
    after, report = repaired(before)
    assert report.fatal
    assert fatal(report) <= fatal(verify(MemoryStorage(before)))
    assert guest_clusters(after) == guest_clusters(before)


def test_leaks_only() -> None:
    before = damaged(leak)
    after, report = repaired(before, Mode.LEAKS)
    assert report.clean
    assert guest_clusters(after) == guest_clusters(before)
    assert len(after) == len(before)


def test_repair_of_leaks_leaves_corruptions() -> None:
    after, report = repaired(damaged(too_low_and_leaked), Mode.LEAKS)
    assert report.leaks == 0
    assert not report.refcounts_sound
    assert (
        read_header(MemoryStorage(after)).refcount_table_offset == read_header(MemoryStorage(new_image())).refcount_table_offset
    )


def test_nothing_is_freed_where_references_may_be_hidden() -> None:
    for damage in (l1_entry_past_end, snapshot_table_lost):
        before = damaged(damage)
        for mode in Mode:
            after, _ = repaired(before, mode)
            old, new = Scalpel(before), Scalpel(after)
            structure = set(range(old.word(48) // 512, old.word(48) // 512 + 1)) | {old.word(old.table_at(0)) // 512}
            for cluster in set(range(len(before) // 512)) - structure:
                assert new.count(cluster) >= old.count(cluster)


def test_the_corrupt_bit_stays_while_something_is_fatal() -> None:
    image = Scalpel(damaged(entry_past_end))
    image.set_features(3)
    after, report = repaired(bytes(image.data))
    assert report.refcounts_sound
    assert read_header(MemoryStorage(after)).incompatible == 2


def test_references_that_do_not_fit_are_reported() -> None:
    image = Scalpel(new_image(refcount_bits=1))
    image.put(image.l2_at(0, 5), image.word(image.l2_at(0, 4)))
    storage = MemoryStorage(bytes(image.data), writable=True)
    done = repair(storage, Mode.ALL)
    assert not done.rebuilt
    assert "do not fit into 1 bits" in done.unrepairable[0]
    assert guest_clusters(storage.snapshot()) == guest_clusters(bytes(image.data))


def test_read_only_storage_is_refused() -> None:
    with pytest.raises(ReadOnly):
        repair(MemoryStorage(new_image(), writable=False), Mode.ALL)


def test_a_dirty_image_is_rebuilt_when_it_is_opened() -> None:
    before = damaged(dirty)
    storage = MemoryStorage(before, writable=True)
    with open_image(storage, backing=None, writable=True) as disk:
        assert disk.header.incompatible == 0
    assert verify(MemoryStorage(storage.snapshot())).clean
    assert guest_clusters(storage.snapshot()) == guest_clusters(before)


def test_a_dirty_image_that_cannot_be_rebuilt_is_refused() -> None:
    image = Scalpel(new_image(refcount_bits=1))
    image.put(image.l2_at(0, 5), image.word(image.l2_at(0, 4)))
    image.set_features(1)
    storage = MemoryStorage(bytes(image.data), writable=True)
    with pytest.raises(Corrupt, match="do not fit into 1 bits"):
        rebuild_dirty(storage)
    assert read_header(storage).incompatible == 1


def test_outdated_bitmaps_lose_their_extension_before_their_clusters() -> None:
    image = Scalpel(new_image())
    directory = image.append(1)
    extension = struct.pack(">IIIIQQII", 0x23852875, 24, 1, 0, 32, directory * 512, 0, 0)
    image.data[112 : 112 + len(extension)] = extension
    log = OpLog()
    storage = MemoryStorage(bytes(image.data), writable=True)
    assert repair(RecordingStorage(storage, log), Mode.LEAKS).after.clean
    marks = [operation.mark for operation in log.operations()]
    assert marks == ["repair.fence", "header.link", "link.fence", "refcount.decrement", "reclaim.fence"]
    assert read_header(storage).bitmaps is None


# Crashes


def operations(data: bytes, mode: Mode) -> list[Operation]:
    log = OpLog()
    repair(RecordingStorage(MemoryStorage(data, writable=True), log), mode)
    return log.operations()


def applied(data: bytes, done: list[Operation]) -> bytes:
    storage = MemoryStorage(data, writable=True)
    for operation in done:
        if isinstance(operation, Write):
            storage.writev(operation.offset, [operation.data], operation.mark)
        else:
            assert isinstance(operation, Fence)
    return storage.snapshot()


def crash_states(data: bytes, done: list[Operation]) -> Iterator[bytes]:
    """Prefixes (a killed process), and what a power cut can leave: any sectors of what was written since the last fence."""
    rng = random.Random(5)
    for count in range(len(done) + 1):
        yield applied(data, done[:count])
    start = 0
    for at, operation in enumerate(done):
        if not isinstance(operation, Fence):
            continue
        durable, volatile = done[:start], done[start:at]
        sectors = [
            Write(write.file, write.offset + part, write.data[part : part + 512], write.mark)
            for write in volatile
            if isinstance(write, Write)
            for part in range(0, len(write.data), 512)
        ]
        for _ in range(12 if sectors else 0):
            kept: list[Operation] = [sector for sector in sectors if rng.random() < 0.5]
            yield applied(data, durable + kept)
        start = at


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("damage", REPAIRABLE + UNREPAIRABLE)
def test_a_crash_at_any_operation_leaves_what_was_there_or_better(damage: Damage, mode: Mode) -> None:
    before = damaged(damage)
    report, guest = verify(MemoryStorage(before)), readable(before)
    final, end = repaired(before, mode)
    for state in crash_states(before, operations(before, mode)):
        crashed = verify(MemoryStorage(state))
        assert fatal(crashed) <= fatal(report)
        assert guest is None or readable(state) == guest
        again, settled = repaired(state, mode)
        assert fatal(settled) == fatal(end)
        assert settled.clean == end.clean
        assert guest is None or guest_clusters(again) == guest
    assert guest is None or guest_clusters(final) == guest


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("damage", REPAIRABLE + UNREPAIRABLE)
def test_the_second_repair_changes_nothing(damage: Damage, mode: Mode) -> None:
    after, _ = repaired(damaged(damage), mode)
    assert [type(operation) for operation in operations(after, mode)] == [Fence]


@pytest.mark.parametrize("damage", [leak, too_low_and_leaked, flags_set_on_shared, dirty])
def test_a_fault_at_any_operation_leaves_what_was_there_or_better(damage: Damage) -> None:
    before = damaged(damage)
    report, guest = verify(MemoryStorage(before)), guest_clusters(before)
    nth = 0
    while True:
        nth += 1
        storage = MemoryStorage(before, writable=True)
        plan = FaultPlan(nth=nth, kinds={Kind.WRITE, Kind.FENCE}, arrived=Arrived.HALF)
        try:
            repair(FaultyStorage(storage, plan), Mode.ALL)
            break
        except CowfenceError:
            assert fatal(verify(MemoryStorage(storage.snapshot()))) <= fatal(report)
            assert guest_clusters(storage.snapshot()) == guest
    assert nth > 3


def test_the_dirty_bit_is_cleared_after_a_fence() -> None:
    done = operations(damaged(dirty), Mode.ALL)
    marks = [operation.mark for operation in done]
    assert marks[:2] == ["repair.fence", "refcount_table.new"]
    assert marks[-3:] == ["link.fence", "header.link", "link.fence"]
    last = done[-2]
    assert isinstance(last, Write)
    assert last.offset == 72


def test_the_new_structure_avoids_what_a_damaged_entry_leads_to() -> None:
    before = damaged(entry_just_past_end)
    storage = MemoryStorage(before, writable=True)
    done = repair(storage, Mode.ALL)
    assert done.rebuilt
    assert done.after.refcounts_sound
    assert storage.size() == len(before)


def test_without_room_for_a_new_structure_nothing_changes() -> None:
    image = Scalpel(new_image())
    image.put(image.l2_at(0, 5), len(image.data))
    too_low(image)
    storage = MemoryStorage(bytes(image.data), writable=True)
    done = repair(storage, Mode.ALL)
    assert not done.rebuilt
    assert "no room" in done.unrepairable[0]
    assert guest_clusters(storage.snapshot()) == guest_clusters(bytes(image.data))


class Full(MemoryStorage):
    """A host with no room for a longer file."""

    def writev(self, offset: int, buffers: object, mark: str) -> None:
        assert isinstance(buffers, list | tuple)
        if offset >= self.size():
            raise NoSpace("full")
        super().writev(offset, buffers, mark)


def test_a_full_host_leaves_the_image_as_it_was() -> None:
    before = damaged(too_low)
    storage = Full(before, writable=True)
    with pytest.raises(NoSpace):
        repair(storage, Mode.ALL)
    assert storage.snapshot() == before


def test_compressed_clusters_keep_their_references() -> None:
    image = Scalpel(new_image())
    first = image.append(1)
    geometry = image.header.geometry
    for at, start in ((5, 0), (7, 100), (9, 200)):
        image.put(image.l2_at(0, at), encode_l2(Compressed(HostOffset(first * 512 + start), 100), geometry))
    after, report = repaired(bytes(image.data))
    assert report.clean
    assert Scalpel(after).count(first) == 3
