"""What the mutations found in this engine, each as a small case of its own."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from cowfence.crash.explore import tagged
from cowfence.errors import Corrupt
from cowfence.qcow2.image import Qcow2Disk, open_image
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
