"""Snapshots are whole: taken, applied and deleted in any order, on any geometry, and refused before anything changes where they
cannot be."""

from __future__ import annotations

import errno
import random
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

import cowfence
from cowfence.crash.images import Patch, compressed, snapshotted
from cowfence.crash.structure import fatal_findings, inspect
from cowfence.errors import Corrupt, CowfenceError, Invalid, NoSpace, ReadOnly
from cowfence.ops.snapshot import apply_snapshot, create_snapshot, delete_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.header import read_header
from cowfence.qcow2.image import Qcow2Disk, open_image
from cowfence.qcow2.snapshot_table import Snapshot, find_for_delete, find_snapshot, new_id, new_snapshot, read_snapshots
from cowfence.qcow2.verify import verify
from cowfence.storage.base import Buffer, Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper
from helpers_check import DISK_BYTES, QUIET, Scalpel, new_image


def opened(storage: Storage) -> Qcow2Disk:
    return open_image(storage, backing=None, writable=True, options=QUIET)


def view(content: bytes, which: str | None = None) -> bytes:
    """What the disk, or a snapshot of it, reads as."""
    storage = MemoryStorage(content, name="image", writable=False)
    with open_image(storage, backing=None, writable=False, options=QUIET, snapshot=which) as disk:
        return disk.read(0, disk.size)


def listed(content: bytes) -> tuple[Snapshot, ...]:
    storage = MemoryStorage(content, name="image", writable=False)
    return read_snapshots(storage, read_header(storage))


def check_clean(content: bytes) -> None:
    """Not a leak, and every COPIED flag as QEMU wants it."""
    report = verify(MemoryStorage(content, name="image", writable=False))
    assert report.clean, [str(finding) for finding in report.findings[:3]]
    assert fatal_findings(content) == []


GEOMETRIES = [
    (512, 16, 3),
    (512, 16, 2),
    (4096, 16, 3),
    (512, 2, 3),
    (512, 4, 3),
    (512, 8, 3),
    (512, 32, 3),
    (512, 64, 3),
    (65536, 16, 3),
]


@pytest.mark.parametrize(("cluster_bytes", "refcount_bits", "version"), GEOMETRIES)
def test_any_order_of_operations_keeps_every_snapshot(cluster_bytes: int, refcount_bits: int, version: int) -> None:
    """A random walk of writes and of all three operations, against copies of the disk."""
    rng = random.Random(cluster_bytes + refcount_bits)
    size = max(DISK_BYTES, 8 * cluster_bytes)
    memory = MemoryStorage(name="image")
    write_new(memory, NewImage(size, cluster_bytes, refcount_bits, version))
    disk, now, taken = opened(memory), bytearray(size), dict[str, bytes]()
    most = min(5, (1 << refcount_bits) - 2) if refcount_bits < 64 else 5
    for number in range(60):
        verb = rng.choice(["write"] * 4 + ["zero", "discard", "create", "create", "apply", "delete", "reopen"])
        at = rng.randrange(size // 512) * 512
        length_bytes = min(rng.choice([512, cluster_bytes, 3 * cluster_bytes]), size - at)
        if verb == "write":
            now[at : at + length_bytes] = data = bytes([number + 1]) * length_bytes
            disk.write(at, data)
        elif verb in ("zero", "discard"):
            disk.zero(at, length_bytes, unmap=verb == "discard")
            now[at : at + length_bytes] = bytes(length_bytes)
        elif verb == "create" and len(taken) < most:
            taken[create_snapshot(disk, f"snap{number % 3}").id] = bytes(now)
        elif verb == "apply" and taken:
            which = rng.choice(sorted(taken))
            assert apply_snapshot(disk, which).id == which
            now[:] = taken[which]
        elif verb == "delete" and taken:
            which = rng.choice(sorted(taken))
            del taken[delete_snapshot(disk, which).id]
        elif verb == "reopen":
            disk.close()
            check_clean(memory.snapshot())
            memory = MemoryStorage(memory.snapshot(), name="image")
            disk = opened(memory)
        assert disk.read(0, size) == now
        assert [snapshot.id for snapshot in disk.snapshots()] == sorted(taken, key=int)
        if verb not in ("write", "zero", "discard"):
            disk.flush()
            for which, held in taken.items():
                assert view(memory.snapshot(), which) == held
    disk.close()
    check_clean(memory.snapshot())


def with_compressed(snapshots: int = 0) -> bytes:
    """Two compressed clusters that share a host cluster, zero clusters of both kinds, plain ones."""
    memory = MemoryStorage(new_image(writes=12), name="image")
    disk = opened(memory)
    disk.zero(8 * 512, 512, unmap=False)
    disk.zero(10 * 512, 512, unmap=True)
    disk.close()
    content = compressed(memory.snapshot(), [0, 1024])
    for number in range(snapshots):
        content = snapshotted(content, number)
    return content


def test_compressed_clusters_are_counted_once_for_each_entry() -> None:
    memory = MemoryStorage(with_compressed(), name="image")
    before = view(memory.snapshot())
    disk = opened(memory)
    create_snapshot(disk, "one")
    disk.write(0, b"x" * 512)
    create_snapshot(disk, "two")
    disk.write(1024, b"y" * 512)
    disk.flush()
    check_clean(memory.snapshot())
    assert view(memory.snapshot(), "one") == before
    delete_snapshot(disk, "one")
    check_clean(memory.snapshot())
    assert view(memory.snapshot(), "two") == b"x" * 512 + before[512:]
    apply_snapshot(disk, "two")
    delete_snapshot(disk, "two")
    disk.close()
    check_clean(memory.snapshot())
    assert view(memory.snapshot()) == b"x" * 512 + before[512:]


def test_host_space_that_only_a_snapshot_held_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disk = cowfence.create(path, 1 << 24)
    disk.write(0, b"a" * (1 << 20))
    create_snapshot(disk, "s")
    disk.write(0, b"b" * (1 << 20))
    disk.flush()
    used = path.stat().st_blocks
    delete_snapshot(disk, "s")
    assert path.stat().st_blocks <= used - (1 << 20) // 512
    disk.close()


# What an image keeps


def test_what_lies_past_the_size_of_the_disk_is_kept() -> None:
    """The saved state of a machine: L2 tables behind the last of the disk."""
    content = bytearray(new_image(writes=64))
    state = view(bytes(content))[DISK_BYTES // 2 :]
    content[24:32] = (DISK_BYTES // 2).to_bytes(8)
    memory = MemoryStorage(bytes(content), name="image")
    disk = opened(memory)
    create_snapshot(disk, "with state")
    disk.write(0, b"x" * 512)
    apply_snapshot(disk, "with state")
    delete_snapshot(disk, "with state")
    disk.close()
    check_clean(memory.snapshot())
    content = bytearray(memory.snapshot())
    content[24:32] = DISK_BYTES.to_bytes(8)
    assert view(bytes(content))[DISK_BYTES // 2 :] == state


def test_entries_are_kept_byte_for_byte() -> None:
    """Extra data that nobody knows, a 32-bit size that the 64-bit one replaces, and the padding of the next entry."""
    extra = struct.pack(">QQQ", 1 << 33, DISK_BYTES, 7) + b"of a later version."
    scalpel = Scalpel(new_image(refcount_bits=16))
    scalpel.add_snapshot()
    table = scalpel.header.snapshots_offset
    fixed = bytearray(scalpel.data[table : table + 40])
    fixed[32:40] = struct.pack(">II", 0xABCD, len(extra))
    entry = bytes(fixed) + extra + b"1" + b"snap"
    scalpel.data[table : table + len(entry)] = entry
    memory = MemoryStorage(bytes(scalpel.data), name="image")
    disk = opened(memory)
    create_snapshot(disk, "two")
    create_snapshot(disk, "three")
    delete_snapshot(disk, "two")
    disk.close()
    first, second = listed(memory.snapshot())
    assert (first.stored, first.extra, first.vm_state_bytes, first.icount) == (entry, extra, 1 << 33, 7)
    assert (second.id, second.name) == ("3", "three")
    check_clean(memory.snapshot())


@pytest.mark.parametrize("size", [DISK_BYTES // 2, DISK_BYTES // 2 + 512, DISK_BYTES + 100 * 512])
def test_apply_brings_the_size_of_its_disk(size: int) -> None:
    content = bytearray(with_compressed(snapshots=1))
    table = struct.unpack_from(">Q", content, 64)[0]
    struct.pack_into(">Q", content, table + 48, size)
    memory = MemoryStorage(bytes(content), name="image")
    before = view(bytes(content))
    disk = opened(memory)
    disk.write(0, b"x" * 512)
    apply_snapshot(disk, "1")
    assert disk.size == size
    assert disk.read(0, size) == before[:size].ljust(size, b"\0")
    disk.write(size - 512, b"y" * 512)
    disk.close()
    header = read_header(MemoryStorage(memory.snapshot()))
    assert header.l1_entries >= header.geometry.l1_entries_for(size)
    check_clean(memory.snapshot())


def test_an_old_entry_without_extra_data_has_the_size_of_the_image() -> None:
    content = snapshotted(new_image(version=2))
    patch = Patch(content)
    table = patch.word(64)
    entry = patch.data[table : table + 40]
    entry[14:16], entry[36:40] = (3).to_bytes(2), bytes(4)
    patch.data[table : table + 64] = (bytes(entry) + b"1old").ljust(64, b"\0")
    memory = MemoryStorage(bytes(patch.data), name="image")
    before = view(memory.snapshot())
    disk = opened(memory)
    disk.write(0, b"x" * 1024)
    apply_snapshot(disk, "old")
    assert disk.read(0, disk.size) == before
    delete_snapshot(disk, "old")
    disk.close()
    check_clean(memory.snapshot())


# Names and ids


def snapshot(ident: str, name: str) -> Snapshot:
    return new_snapshot(ident, name, l1_offset=512, l1_entries=1, disk_size_bytes=512, date_nanoseconds=0)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], "1"),
        (["1", "2"], "3"),
        (["7", "2"], "8"),
        (["12abc", "x"], "13"),
        (["9" * 5000], "1"),
        (["18446744073709551615"], "18446744073709551616"),
        ([" 4"], "5"),
    ],
)
def test_a_new_id_is_one_more_than_the_highest(ids: list[str], expected: str) -> None:
    assert new_id([snapshot(ident, "n") for ident in ids]) == expected


def test_lookup_takes_ids_first_and_a_delete_names_first() -> None:
    snapshots = [snapshot("1", "2"), snapshot("2", "x"), snapshot("3", "x")]
    assert find_snapshot(snapshots, "2") is snapshots[1]
    assert find_snapshot(snapshots, "x") is snapshots[1]
    assert find_for_delete(snapshots, "2") is snapshots[0]
    assert find_for_delete(snapshots, "3") is snapshots[2]
    assert find_for_delete(snapshots, "nope") is find_snapshot(snapshots, "nope") is None


# Refused, and nothing changed


def refused(content: bytes, error: type[CowfenceError], match: str, *operations: object) -> None:
    """Each of these is refused, and leaves the file as it was."""
    for operation in operations:
        memory = MemoryStorage(content, name="image")
        disk = opened(memory)
        with pytest.raises(error, match=match):
            operation(disk)  # type: ignore[operator]
        disk.close()
        assert memory.snapshot() == content


def test_refcounts_that_are_too_narrow() -> None:
    refused(new_image(refcount_bits=1), Invalid, "1 bits cannot count", lambda disk: create_snapshot(disk, "x"))
    content = new_image(refcount_bits=2)
    for number in range(2):
        content = snapshotted(content, number)
    for operation in (lambda disk: create_snapshot(disk, "x"), lambda disk: apply_snapshot(disk, "1")):
        refused(content, Invalid, "2 bits cannot count", operation)


def test_no_such_snapshot_and_names_that_cannot_be() -> None:
    content = snapshotted(new_image())
    refused(content, Invalid, "no snapshot", lambda disk: apply_snapshot(disk, "x"), lambda disk: delete_snapshot(disk, "x"))
    for name in ("x" * 256, "é" * 128, "a\0b"):
        refused(content, Invalid, "at most 255 bytes", lambda disk, name=name: create_snapshot(disk, name))


@pytest.mark.parametrize("damage", ["count", "entry", "flag", "snapshot"])
def test_a_damaged_image_is_refused(damage: str) -> None:
    scalpel = Scalpel(snapshotted(new_image()))
    memory = MemoryStorage(bytes(scalpel.data), name="image")
    disk = opened(memory)
    disk.write(0, b"x" * 512)
    disk.close()
    scalpel = Scalpel(memory.snapshot())
    entry_at = scalpel.l2_at(0, 2)
    if damage == "count":
        scalpel.set_count(scalpel.cluster_of(entry_at), 1)
    elif damage == "entry":
        scalpel.put(entry_at, len(scalpel.data) + (1 << 30))
    elif damage == "flag":
        scalpel.put(entry_at, scalpel.word(entry_at) | COPIED)
    else:
        first = listed(bytes(scalpel.data))[0]
        scalpel.put((scalpel.word(first.l1_offset) & OFFSET_MASK), len(scalpel.data) + (1 << 30))
    refused(
        bytes(scalpel.data),
        Corrupt,
        "repaired first",
        lambda disk: create_snapshot(disk, "x"),
        lambda disk: apply_snapshot(disk, "1"),
        lambda disk: delete_snapshot(disk, "1"),
    )


def test_a_snapshot_is_read_and_not_written() -> None:
    storage = MemoryStorage(snapshotted(new_image()), name="image", writable=False)
    with open_image(storage, backing=None, writable=False, snapshot="snap0") as disk:
        with pytest.raises(ReadOnly):
            disk.write(0, b"x")
        with pytest.raises(ReadOnly):
            create_snapshot(disk, "x")
    with pytest.raises(Invalid, match="no snapshot 'y'"):
        open_image(MemoryStorage(storage.snapshot(), writable=False), backing=None, writable=False, snapshot="y")


def test_the_autoclear_bits_are_off_before_anything_changes() -> None:
    """R11: whoever knows bitmaps sees that they do not know of this."""
    scalpel = Scalpel(snapshotted(new_image()))
    scalpel.put(88, 1 << 5)
    memory = MemoryStorage(bytes(scalpel.data), name="image")
    disk = opened(memory)
    apply_snapshot(disk, "1")
    assert read_header(memory).autoclear == 0
    disk.close()


# Failures


OPERATIONS = {
    "create": lambda disk: create_snapshot(disk, "new"),
    "apply": lambda disk: apply_snapshot(disk, "1"),
    "delete": lambda disk: delete_snapshot(disk, "1"),
}


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_nth_call_fails(name: str, error: int) -> None:
    """The image is before or after, sound, and goes on or is read-only; where space ran out before LINK, not even a leak is
    left."""
    content = with_compressed(snapshots=1)
    memory = MemoryStorage(content, name="image")
    disk = opened(memory)
    disk.write(0, b"x" * 1024)
    disk.close()
    content, before = memory.snapshot(), inspect(memory.snapshot()).facts
    disk_before, held = view(content), view(content, "1")
    whole = 0
    for nth in range(1, 60):
        memory = MemoryStorage(content, name="image")
        plan = FaultPlan(None, error=error)
        disk = opened(FaultyStorage(memory, plan))
        plan.matched, plan.nth = 0, nth
        failure: CowfenceError | None = None
        try:
            OPERATIONS[name](disk)
        except CowfenceError as error_raised:
            failure = error_raised
        if plan.matched < nth:
            assert failure is None
            assert whole or error != errno.ENOSPC or name == "delete"
            return
        plan.nth = None
        after = memory.snapshot()
        assert fatal_findings(after) == []
        unchanged = inspect(after).facts == before
        assert failure is not None or name == "apply" or not unchanged
        assert view(after) in ((disk_before,) if name != "apply" else (disk_before, held))
        broken = disk._state.committer.broken is not None
        assert disk.read(0, disk.size) == view(after)
        if name != "delete" or unchanged:
            assert view(after, "1") == held
        if isinstance(failure, NoSpace) and unchanged and not broken and view(after) == disk_before:
            report = verify(MemoryStorage(after, name="image", writable=False))
            whole += report.clean
            assert report.leaks <= 4
            assert name == "apply" or not report.harmless
        disk = opened(MemoryStorage(after, name="image"))
        disk.write(1024, b"y" * 512)
        disk.close()
    pytest.fail("it never came to its end")


def test_an_apply_that_fails_at_its_end_has_dirtied_the_bitmaps() -> None:
    """The disk is another one by then: a bitmap that is stored as true must not have missed it."""
    memory = MemoryStorage(new_image(), name="image")
    disk = opened(memory)
    create_snapshot(disk, "s")
    disk.write(0, b"x" * 512)
    disk.bitmaps.add("b", granularity_bytes=512)
    disk.close()
    content = memory.snapshot()
    failed = 0
    for nth in range(1, 60):
        memory = MemoryStorage(content, name="image")
        plan = FaultPlan(None, error=errno.EIO)
        disk = opened(FaultyStorage(memory, plan))
        disk.write(40 * 512, b"y" * 512)
        disk.flush()
        plan.matched, plan.nth = 0, nth
        with suppress(CowfenceError):
            apply_snapshot(disk, "s")
        failed, plan.nth = plan.matched >= nth, None
        with suppress(CowfenceError):
            disk.close()
        content_now = view(memory.snapshot())
        with open_image(MemoryStorage(memory.snapshot(), writable=False), backing=None, writable=False) as again:
            (bitmap,) = again.bitmaps
            if not bitmap.inconsistent and content_now[:512] != b"x" * 512:
                assert any(start <= 0 < start + length for start, length in again.bitmaps.ranges("b"))
        if not failed:
            return
    pytest.fail("it never came to its end")


class Interrupted(StorageWrapper):
    """Ctrl-C comes in the n-th write."""

    left = 0

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        super().writev(offset, buffers, mark)


@pytest.mark.parametrize("nth", range(1, 7))
def test_ctrl_c_in_the_middle_takes_it_back(nth: int) -> None:
    content = with_compressed()
    memory = MemoryStorage(content, name="image")
    storage = Interrupted(memory)
    disk = opened(storage)
    storage.left = nth
    with pytest.raises(KeyboardInterrupt):
        create_snapshot(disk, "x")
    after = memory.snapshot()
    assert fatal_findings(after) == []
    assert view(after) == view(content)
    report = verify(MemoryStorage(after, name="image", writable=False))
    assert inspect(after).facts["snapshots"] or (report.leaks <= 4 and not report.harmless)


# In use


def test_a_snapshot_of_a_disk_in_use_is_one_moment_of_it() -> None:
    """Two places are written with the same number, one after the other: a snapshot has the same in both, or one more in the
    first."""
    memory = MemoryStorage(new_image(), name="image")
    disk = opened(memory)
    stop = threading.Event()
    failures: list[BaseException] = []

    def guest() -> None:
        number = 0
        try:
            while not stop.is_set():
                number += 1
                disk.write(0, number.to_bytes(8) * 64)
                disk.write(40 * 1024, number.to_bytes(8) * 64)
                if not number % 5:
                    disk.flush()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=guest)
    thread.start()
    for number in range(12):
        create_snapshot(disk, f"s{number}")
        if number % 3 == 2:
            delete_snapshot(disk, f"s{number - 1}")
    stop.set()
    thread.join(20)
    assert not failures
    disk.close()
    check_clean(memory.snapshot())
    for taken in listed(memory.snapshot()):
        held = view(memory.snapshot(), taken.id)
        first, second = int.from_bytes(held[:8]), int.from_bytes(held[40 * 1024 : 40 * 1024 + 8])
        assert first in (second, second + 1)
