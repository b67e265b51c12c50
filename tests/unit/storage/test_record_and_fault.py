"""The recorder's log and the fault injector's plan: what the crash explorer stands on."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from cowfence.errors import NoSpace, StorageFailed
from cowfence.storage.base import Storage
from cowfence.storage.fault import CHANGES, Arrived, FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Discard, Done, Fence, Note, OpLog, Truncate, Write, Zero
from cowfence.storage.record import RecordingStorage
from cowfence.storage.wrapper import StorageWrapper


def use(storage: Storage) -> None:
    """One call of each kind that changes something."""
    storage.writev(0, (b"ab", b"cd"), "data.write")
    storage.zero(4, 2, "l2.new")
    storage.discard(0, 1, "host.discard")
    storage.truncate(9, "file.grow")
    storage.fence("commit.fence")


def test_a_serial_run_is_logged_call_by_call_each_with_its_end() -> None:
    log = OpLog()
    use(RecordingStorage(MemoryStorage(), log, "image"))
    assert log.operations() == [
        Write("image", 0, b"abcd", "data.write"),
        Zero("image", 4, 2, "l2.new"),
        Discard("image", 0, 1, "host.discard"),
        Truncate("image", 9, "file.grow"),
        Fence("image", "commit.fence"),
    ]
    assert list(log)[1::2] == [Done(position) for position in range(0, 10, 2)]


def test_two_files_and_the_guest_share_one_order() -> None:
    log = OpLog()
    image, data = RecordingStorage(MemoryStorage(), log, "image"), RecordingStorage(MemoryStorage(), log, "data")
    log.note("guest.write", offset=0)
    data.writev(0, (b"x",), "data.write")
    image.fence("commit.fence")
    assert log[0] == Note("guest.write", {"offset": 0})
    write, fence = log.spans()
    assert (write.operation.file, fence.operation.file) == ("data", "image")
    assert not write.is_covered_by(fence), "a fence covers its own file only"


def test_the_log_keeps_the_bytes_of_the_moment_of_the_write() -> None:
    log = OpLog()
    buffer = bytearray(b"old")
    RecordingStorage(MemoryStorage(), log).writev(0, (buffer,), "data.write")
    buffer[:] = b"new"
    assert log.operations() == [Write("memory", 0, b"old", "data.write")]


class _SlowFence(StorageWrapper):
    """A fence that waits, inside, until it is told to go on."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def fence(self, mark: str) -> None:
        self.entered.set()
        assert self.go_on.wait(20)
        self.inner.fence(mark)


def test_a_fence_covers_only_what_was_complete_before_it_was_called() -> None:
    log = OpLog()
    slow = _SlowFence(MemoryStorage())
    storage = RecordingStorage(slow, log)
    storage.writev(0, (b"before",), "data.write")
    fencing = threading.Thread(target=storage.fence, args=("commit.fence",))
    fencing.start()
    assert slow.entered.wait(20)
    storage.writev(6, (b"during",), "data.write")
    slow.go_on.set()
    fencing.join()
    storage.writev(12, (b"after",), "data.write")
    before, fence, during, after = log.spans()
    assert before.is_covered_by(fence)
    assert not during.is_covered_by(fence)
    assert not after.is_covered_by(fence)
    assert fence.done is not None
    assert during.done is not None
    assert fence.issued < during.done < fence.done


def test_a_failed_call_is_logged_as_failed_and_a_failed_fence_covers_nothing() -> None:
    log = OpLog()
    storage = RecordingStorage(FaultyStorage(MemoryStorage(), FaultPlan(1, kinds={Kind.FENCE})), log)
    storage.writev(0, (b"x",), "data.write")
    with pytest.raises(StorageFailed):
        storage.fence("commit.fence")
    write, fence = log.spans()
    assert fence.failed
    assert not write.is_covered_by(fence)


def test_a_plan_without_faults_counts() -> None:
    plan = FaultPlan()
    storage = FaultyStorage(MemoryStorage(), plan)
    use(storage)
    storage.readv(0, (bytearray(1),))
    assert plan.matched == 5
    assert plan.calls == dict.fromkeys(Kind, 1)


@pytest.mark.parametrize("nth", range(1, 6))
def test_the_nth_change_fails_once(nth: int) -> None:
    plan = FaultPlan(nth)
    storage = FaultyStorage(MemoryStorage(), plan)
    calls: tuple[Callable[[], None], ...] = (
        lambda: storage.writev(0, (b"ab",), "a"),
        lambda: storage.zero(4, 2, "b"),
        lambda: storage.discard(0, 1, "c"),
        lambda: storage.truncate(9, "d"),
        lambda: storage.fence("e"),
    )
    for number, call in enumerate(calls, 1):
        if number != nth:
            call()
            continue
        with pytest.raises(StorageFailed) as failed:
            call()
        assert failed.value.errno == errno.EIO
    assert plan.failed == 1


def test_from_then_on_and_only_with_the_mark() -> None:
    plan = FaultPlan(2, marks={"l2.link"}, error=errno.ENOSPC, keep_failing=True)
    storage = FaultyStorage(MemoryStorage(), plan)
    storage.writev(0, (b"1",), "l2.link")
    storage.writev(1, (b"2",), "data.write")
    for _ in range(2):
        with pytest.raises(NoSpace):
            storage.writev(2, (b"3",), "l2.link")
    storage.writev(3, (b"4",), "data.write")
    assert plan.failed == 2


@pytest.mark.parametrize(
    ("arrived", "expected"),
    [
        (Arrived.NOTHING, b"." * 2048),
        (Arrived.HALF, b"a" * 512 + b"." * 1536),
        (Arrived.ALL, b"a" * 900 + b"b" * 300 + b"." * 848),
    ],
)
def test_a_failed_write_may_have_arrived(arrived: Arrived, expected: bytes) -> None:
    log = OpLog()
    memory = MemoryStorage(b"." * 2048)
    storage = FaultyStorage(RecordingStorage(memory, log), FaultPlan(1, arrived=arrived))
    with pytest.raises(StorageFailed):
        storage.writev(0, (b"a" * 900, b"b" * 300), "data.write")
    assert memory.snapshot() == expected
    logged = [operation.data for operation in log.operations() if isinstance(operation, Write)]
    assert logged == ([] if arrived is Arrived.NOTHING else [expected.rstrip(b".")]), "the log has what reached the file"


def test_one_plan_counts_over_two_files() -> None:
    plan = FaultPlan(2, kinds={Kind.WRITE})
    first, second = FaultyStorage(MemoryStorage(), plan), FaultyStorage(MemoryStorage(), plan)
    first.writev(0, (b"1",), "a")
    with pytest.raises(StorageFailed):
        second.writev(0, (b"2",), "a")
    first.writev(0, (b"3",), "a")


def test_a_fence_after_a_failed_one_reports_good_and_makes_nothing_durable() -> None:
    log = OpLog()
    storage = FaultyStorage(RecordingStorage(MemoryStorage(), log), FaultPlan(1, kinds={Kind.FENCE}))
    storage.writev(0, (b"x",), "data.write")
    with pytest.raises(StorageFailed):
        storage.fence("commit.fence")
    storage.fence("commit.fence")
    assert not any(isinstance(operation, Fence) for operation in log.operations())


def test_reads_fail_too() -> None:
    storage = FaultyStorage(MemoryStorage(b"abcd"), FaultPlan(2, kinds={Kind.READ}))
    buffer = bytearray(2)
    assert storage.readv(0, (buffer,)) == 2
    with pytest.raises(StorageFailed):
        storage.readv(0, (buffer,))
    assert CHANGES.isdisjoint({Kind.READ})


def test_the_hook_runs_inside_the_call_and_not_inside_itself() -> None:
    seen: list[tuple[Kind, str, bytes]] = []
    memory = MemoryStorage(b"old")
    plan = FaultPlan()
    storage = FaultyStorage(memory, plan)

    def during(kind: Kind, mark: str) -> None:
        seen.append((kind, mark, memory.snapshot()))
        storage.writev(0, (b"hook",), "guest")

    plan.on_call = during
    buffer = bytearray(3)
    storage.readv(0, (buffer,))
    assert buffer == b"old", "the host had read before the hook wrote"
    storage.writev(0, (b"new!",), "data.write")
    storage.fence("commit.fence")
    assert seen == [(Kind.READ, "", b"old"), (Kind.WRITE, "data.write", b"new!"), (Kind.FENCE, "commit.fence", b"hook")]
    assert memory.snapshot() == b"hook"


@pytest.mark.parametrize(("offset", "length", "zeroed"), [(0, 512, 0), (0, 1024, 512), (512, 1536, 512), (100, 600, 0)])
def test_half_of_a_zero_tears_no_sector(offset: int, length: int, zeroed: int) -> None:
    memory = MemoryStorage(b"a" * 4096, name="file")
    storage = FaultyStorage(memory, FaultPlan(1, arrived=Arrived.HALF))
    with pytest.raises(StorageFailed):
        storage.zero(offset, length, "test")
    assert memory.snapshot() == b"a" * offset + bytes(zeroed) + b"a" * (4096 - offset - zeroed)
