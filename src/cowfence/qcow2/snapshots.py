"""Internal snapshots: create, apply, delete (section "Snapshots" of the specification; crash contract, R12).

Each is an alteration: it has the image for itself, all that was pending is committed, and it ends fenced. What it leads to is
counted tree by tree (``trees``), straight in the refcount blocks; its pointers flip in one transaction with one LINK, which is
one write inside sector 0. So the list is old or new, the disk is before or after, and a crash anywhere else leaves leaks.

============  =====================================================================  =========================================
operation     transactions                                                           a crash after each
============  =====================================================================  =========================================
create        1 COPIED off in the active tables                              fence   nothing: a flag that is off is harmless
              2 PREPARE  active tree +1; copy of L1, new snapshot table      fence   leaks
                LINK     the header names the new table                      fence   the snapshot is there
                RECLAIM  the old table                                       fence
apply         1 COPIED off in the snapshot's tables                          fence   nothing
              2 PREPARE  the snapshot's tree +1; a new L1 with COPIED off    fence   leaks
                LINK     size, length and place of L1, in one write          fence   the disk is the snapshot's
                RECLAIM  the old L1 and its tree -1                          fence
delete        1 PREPARE  new snapshot table                                  fence   leaks
                LINK     the header names it                                 fence   the snapshot is gone
                RECLAIM  the old table, the snapshot's L1, its tree -1       fence   COPIED off where it could be on
              2 LINK     COPIED on in the active tables where one is left    fence
============  =====================================================================  =========================================

An apply dirties all of every bitmap that records.

What lies past the size of the disk in an L1 table (the saved state of a machine) belongs to its tree like all else, and is
kept. An operation that fails before its LINK has begun takes its counts back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from cowfence.errors import CowfenceError, Invalid, Unsupported
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.entries import COPIED
from cowfence.qcow2.extensions import Incompatible
from cowfence.qcow2.geometry import HostOffset
from cowfence.qcow2.header import Header, disk_patch, read_header, snapshots_patch
from cowfence.qcow2.snapshot_table import (
    Snapshot,
    check_disk_size,
    encode_table,
    find_for_delete,
    find_snapshot,
    new_id,
    new_snapshot,
    read_snapshots,
)
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind, Table
from cowfence.qcow2.transaction import Stage
from cowfence.qcow2.trees import Trees
from cowfence.storage.base import read_exact


def create(alteration: Alteration, name: str, date_nanoseconds: int) -> Snapshot:
    """Take a snapshot of the disk as it is now. ``date_nanoseconds``: since the Epoch.

    Raises Invalid (the name, no room in the table, refcounts too narrow) and Corrupt with nothing changed.
    """
    state = alteration.state
    header, snapshots = state.header, _snapshots(state)
    snapshot_id = new_id(snapshots)

    def entry(l1_offset: int) -> Snapshot:
        return new_snapshot(
            snapshot_id,
            name,
            l1_offset=l1_offset,
            l1_entries=header.l1_entries,
            disk_size_bytes=header.size_bytes,
            date_nanoseconds=date_nanoseconds,
        )

    encode_table((*snapshots, entry(0)), state.storage.name)
    trees = Trees(state)
    tree = trees.references(header.l1_offset, header.l1_entries)
    trees.check_room(tree)

    def plan() -> Snapshot:
        l1 = state.l1.content()
        l1_offset, table_offset = _reserve(state, len(l1), len(encode_table((*snapshots, entry(0)), state.storage.name)))
        _put(state, l1_offset, l1, "snapshot_l1.new", Kind.SNAPSHOT_L1)
        snapshot = entry(l1_offset)
        _switch_table(state, table_offset, (*snapshots, snapshot), snapshots)
        return snapshot

    with _undone_if_it_fails(alteration, trees, active=True):
        if trees.clear_copied(header.l1_offset, header.l1_entries, active=True):
            state.committer.fence("copied.fence")
        trees.raise_counts(tree)
        alteration.read_again()
        return alteration.transaction(plan)


def apply(alteration: Alteration, which: str) -> Snapshot:
    """Make the disk what it was when a snapshot (by id, or else by name) was taken, its size included.

    Raises Invalid (no such snapshot, refcounts too narrow) and Corrupt with nothing changed.
    """
    state = alteration.state
    geometry = state.geometry
    snapshot = _found(find_snapshot(_snapshots(state), which), which, state)
    check_disk_size(snapshot, geometry, state.storage.name)
    alteration.before_other_disk(snapshot.disk_size_bytes)
    header = state.header
    entries = max(snapshot.l1_entries, geometry.l1_entries_for(snapshot.disk_size_bytes))
    trees = Trees(state)
    old = trees.references(header.l1_offset, header.l1_entries)
    new = trees.references(snapshot.l1_offset, snapshot.l1_entries)
    trees.check_room(new)
    stored = read_exact(state.storage, snapshot.l1_offset, snapshot.l1_entries * 8, Kind.SNAPSHOT_L1.value)
    l1 = Table.from_bytes(Kind.L1, 0, 0, stored.ljust(entries * 8, b"\0"))
    words = l1.view()
    words &= np.uint64(COPIED - 1)

    def plan() -> None:
        content = l1.content()
        (offset,) = _reserve(state, len(content))
        _put(state, offset, content, "l1.new", Kind.L1)
        patch = disk_patch(header, snapshot.disk_size_bytes, HostOffset(offset), entries)
        state.pending.patch_header(*patch, "header.link")
        _free(state, header.l1_offset, header.l1_entries * 8)

    try:
        with _undone_if_it_fails(alteration, trees, active=False):
            if trees.clear_copied(snapshot.l1_offset, snapshot.l1_entries, active=False):
                state.committer.fence("copied.fence")
            trees.raise_counts(new)
            alteration.read_again()
            alteration.transaction(plan)
        alteration.forget()
        trees.lower_counts(old)
    finally:
        # Also where it failed after its LINK: a bitmap that missed that would call itself true when it is stored.
        alteration.forget()
        alteration.read_again()
        alteration.after_other_disk()
    return snapshot


def delete(alteration: Alteration, which: str) -> Snapshot:
    """Delete a snapshot (by name, or else by id; see ``snapshot_table``).

    Raises Invalid (no such snapshot) and Corrupt with nothing changed.
    """
    state = alteration.state
    header, snapshots = state.header, _snapshots(state)
    snapshot = _found(find_for_delete(snapshots, which), which, state)
    left = [other for other in snapshots if other is not snapshot]
    trees = Trees(state)
    tree = trees.references(snapshot.l1_offset, snapshot.l1_entries)

    def plan() -> None:
        (offset,) = _reserve(state, len(encode_table(left, state.storage.name)))
        _switch_table(state, offset, left, snapshots)
        _free(state, snapshot.l1_offset, snapshot.l1_entries * 8)

    alteration.transaction(plan)
    alteration.forget()
    trees.lower_counts(tree)
    state.committer.fence("reclaim.fence")
    trees.set_copied(header.l1_offset, header.l1_entries)
    return snapshot


def _snapshots(state: State) -> tuple[Snapshot, ...]:
    header = state.header
    if header.incompatible & Incompatible.DATA_FILE:
        raise Unsupported(state.storage.name, "internal snapshots of an image with an external data file")
    return read_snapshots(state.storage, header) if header.snapshot_count else ()


def _found(snapshot: Snapshot | None, which: str, state: State) -> Snapshot:
    if snapshot is None:
        raise Invalid(f"{state.storage.name}: there is no snapshot {which!a}")
    return snapshot


def _reserve(state: State, *lengths_bytes: int) -> list[int]:
    """Room for some tables, all counted: the offset of each, 0 where it is empty."""
    geometry = state.geometry
    sizes = [geometry.clusters_for(length_bytes) for length_bytes in lengths_bytes]
    if not any(sizes):
        return [0] * len(sizes)
    run = state.allocator.reserve_contiguous(sum(sizes), wait=True)
    state.refcounts.increment(run.first, run.clusters)
    offsets, first = [], run.first
    for clusters in sizes:
        offsets.append(first << geometry.cluster_bits if clusters else 0)
        first += clusters
    return offsets


def _put(state: State, offset: int, content: bytes, mark: str, kind: Kind) -> None:
    """A table's first content, to the end of its last cluster."""
    if content:
        clusters = state.geometry.clusters_for(len(content))
        state.layout.claim_new(offset, clusters, kind)
        state.pending.put(Stage.PREPARE, offset, content.ljust(clusters << state.geometry.cluster_bits, b"\0"), mark, kind)


def _free(state: State, offset: int, length_bytes: int) -> None:
    if length_bytes:
        first, clusters = offset >> state.geometry.cluster_bits, state.geometry.clusters_for(length_bytes)
        state.pending.free(first, clusters, table=True)


def _switch_table(state: State, offset: int, new: Sequence[Snapshot], old: Sequence[Snapshot]) -> None:
    """The new snapshot table at ``offset`` takes the place of the old one."""
    name = state.storage.name
    _put(state, offset, encode_table(new, name), "snapshot_table.new", Kind.SNAPSHOT_TABLE)
    state.pending.patch_header(*snapshots_patch(HostOffset(offset), len(new)), "header.link")
    _free(state, state.header.snapshots_offset, len(encode_table(old, name)))


@contextmanager
def _undone_if_it_fails(alteration: Alteration, trees: Trees, *, active: bool) -> Iterator[None]:
    """What fails before its LINK has begun leaves the counts as they were, and, where it switched them off in the ``active``
    tables, the flags. Else everything would be shared with nobody until somebody repairs it."""
    state = alteration.state
    header = state.header
    try:
        yield
    except BaseException:
        with suppress(CowfenceError):
            # Another thread's flush may have been faster than we, and carried out what had failed.
            if alteration.forget() and _same_pointers(read_header(state.storage), header):
                alteration.read_again()
                trees.take_back()
                if active:
                    state.committer.fence("reclaim.fence")
                    trees.set_copied(header.l1_offset, header.l1_entries)
        raise


def _same_pointers(one: Header, other: Header) -> bool:
    return (one.l1_offset, one.snapshots_offset) == (other.l1_offset, other.snapshots_offset)
