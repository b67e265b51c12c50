"""What the mutations found in this engine, each as a small case of its own."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest

from cowfence.crash.images import tagged
from cowfence.disk.base import Request, Verb
from cowfence.errors import Closed, Corrupt, ReadOnly, StorageFailed
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import Options, Qcow2Disk, open_image
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from cowfence.units import MIB
from crash.scenarios import CLUSTER, OPTIONS, image, written
from hostile.corpus import COMPRESSED, Tables, tables_of


def opened(content: bytes) -> tuple[MemoryStorage, Qcow2Disk]:
    storage = MemoryStorage(content, "image")
    return storage, open_image(storage, backing=None, writable=True, options=OPTIONS)


def with_word(content: bytes, at: int, word: int) -> bytes:
    return content[:at] + struct.pack(">Q", word) + content[at + 8 :]


def first(tables: Tables, kind: str) -> int:
    return next(tables.of(kind))[0]


@pytest.mark.parametrize("kind", ["header", "refcount table", "refcount block", "L1 table", "L2 table"])
@pytest.mark.parametrize("how", ["discard plain", "discard compressed", "write compressed"])
def test_table_that_an_entry_leads_to_is_not_freed(kind: str, how: str) -> None:
    """The entry's reference was taken from the table: its count fell to 0, it was punched, and given to the next write."""
    content = written(image(), (0, 4 * CLUSTER))
    tables = tables_of(content)
    target, l2 = first(tables, kind), first(tables, "L2 table")
    if how == "discard plain" and kind == "header":
        pytest.skip("offset 0 is no data cluster")
    entry = target if how == "discard plain" else COMPRESSED | target
    storage, disk = opened(with_word(content, l2, entry))
    if how.startswith("discard"):
        disk.discard(0, CLUSTER)
    else:
        disk.write(0, tagged(0, CLUSTER, 1))
    disk.flush()
    for cluster in range(10, 20):
        disk.write(cluster * CLUSTER, tagged(cluster * CLUSTER, CLUSTER, 2))
    disk.close()
    after = storage.snapshot()
    assert tables_of(after).clusters().items() >= tables.clusters().items()
    storage, disk = opened(after)
    assert disk.read(CLUSTER, 3 * CLUSTER) == tagged(CLUSTER, 3 * CLUSTER, 90)
    assert disk.read(10 * CLUSTER, 10 * CLUSTER) == tagged(10 * CLUSTER, 10 * CLUSTER, 2)


def test_snapshot_tables_past_the_end_cost_no_memory() -> None:
    """2,000 snapshots with L1 tables of 32 MiB each, none of them in the file: each cluster of them was listed."""
    content = image()
    end = len(content)
    entries = b"".join(
        struct.pack(">QIHHIIQII", (1 << 40) + index * (32 << 20), 1 << 22, 0, 0, 0, 0, 0, 0, 0) for index in range(2000)
    )
    content = content[:60] + struct.pack(">IQ", 2000, end) + content[72:] + entries
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match=r"snapshot's L1 table at offset 0x10000000000: it reaches past the end of the file"):
            opened(content)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_errors_of_a_batch_hold_no_buffers() -> None:
    """Each failed read of a large compressed cluster kept its data until the whole batch was answered: gigabytes."""
    cluster_bytes = 2 * MIB
    storage = MemoryStorage(name="image")
    write_new(storage, NewImage(4 * MIB, cluster_bytes))
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
    disk.write(0, bytes(random.Random(1).randbytes(cluster_bytes)))
    disk.close()
    content = storage.snapshot()
    l2 = first(tables_of(content), "L2 table")
    host = int.from_bytes(content[l2 : l2 + 8]) & (1 << 56) - 1
    content = with_word(content, l2, COMPRESSED | 0xFFF << 49 | host)
    disk = open_image(MemoryStorage(content, "image"), backing=None, writable=True, options=Options(commit_interval=None))
    requests = [Request(verb, 512 * at, 512, bytes(512)) for at in range(64) for verb in (Verb.READ, Verb.WRITE)]
    tracemalloc.start()
    try:
        outcomes = disk.submit(requests)
        assert all(isinstance(outcome, Corrupt) for outcome in outcomes)
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()


def test_error_that_is_raised_again_does_not_grow() -> None:
    """One error is raised to every caller after a failed fence or a close; each raise made its traceback longer."""
    plan = FaultPlan(2, kinds={Kind.FENCE})
    disk = open_image(FaultyStorage(MemoryStorage(image(), "image"), plan), backing=None, writable=True, options=OPTIONS)
    disk.write(0, bytes(CLUSTER))
    with pytest.raises(StorageFailed):
        disk.flush()
    attempts: list[Callable[[], None]] = [lambda: disk.write(0, bytes(CLUSTER)), disk.flush]
    for kind in (ReadOnly, Closed):
        for attempt in attempts:
            lengths = set()
            for _ in range(3):
                with pytest.raises(kind) as caught:
                    attempt()
                lengths.add(len(caught.traceback))
            assert len(lengths) == 1
        if kind is ReadOnly:
            with pytest.raises(ReadOnly):
                disk.close()
