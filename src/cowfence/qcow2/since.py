"""What of the disk may be other than it was when a snapshot was taken, by the tables alone.

What a snapshot leads to is never changed in place (section "Cluster mapping": only a COPIED cluster may be). So a guest
cluster whose entries in the snapshot's tables and in the active ones are the same, but for that flag, reads the same; any other
may have changed. An L2 table that both lead to is not even read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cowfence.qcow2.census import ImageFile, Words
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.snapshot_table import Snapshot
from cowfence.qcow2.state import State


def changed_since(state: State, snapshot: Snapshot) -> Iterator[tuple[int, int]]:
    """Ranges (offset, length in bytes), in order, the last perhaps past the end of the disk. ``state``: of an image in which
    nothing is pending, and nobody writes meanwhile."""
    header, geometry, file = state.header, state.geometry, ImageFile(state.storage)
    entries = max(header.l1_entries, snapshot.l1_entries)
    span = geometry.l2_entries << geometry.cluster_bits

    def l1(offset: int, count: int) -> Words:
        words = np.zeros(entries, np.uint64)
        words[:count] = file.words(offset, count) & np.uint64(OFFSET_MASK)
        return words

    def l2(offset: int) -> Words:
        count = geometry.l2_entries * geometry.l2_entry_words
        words = file.words(offset, count) if offset else np.zeros(count, np.uint64)
        rows = words.reshape(-1, geometry.l2_entry_words)
        rows[:, 0] &= np.uint64(COPIED - 1)
        return rows

    now, then = l1(header.l1_offset, header.l1_entries), l1(snapshot.l1_offset, snapshot.l1_entries)
    for index in np.flatnonzero(now != then).tolist():
        other = (l2(int(now[index])) != l2(int(then[index]))).any(axis=1)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], other, [False])).astype(np.int8))).tolist()
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            yield index * span + (first << geometry.cluster_bits), end - first << geometry.cluster_bits
    if state.size > snapshot.disk_size_bytes:
        yield snapshot.disk_size_bytes, state.size - snapshot.disk_size_bytes
