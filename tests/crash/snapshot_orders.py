"""The broken orders of operations on snapshots, like those of ``orders``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from cowfence.crash.cases import parse_case
from cowfence.qcow2 import snapshots
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.census import Counts
from cowfence.qcow2.snapshot_table import Snapshot, find_snapshot, read_snapshots
from cowfence.qcow2.tables import Kind
from cowfence.qcow2.transaction import Stage
from cowfence.qcow2.trees import Trees
from cowfence.storage.base import read_exact
from crash.orders import Mutant, counted_down_at_once


@contextmanager
def _named_before_it_is_counted() -> Iterator[None]:
    """The header leads to the snapshot; only then is what it leads to counted."""
    true_raise, true_transaction = Trees.raise_counts, Alteration.transaction
    held: list[tuple[Trees, Counts]] = []

    def transaction(self: Alteration, plan: Callable[[], Any]) -> Any:
        result = true_transaction(self, plan)
        for trees, tree in held:
            true_raise(trees, tree)
        held.clear()
        return result

    with (
        mock.patch.object(Trees, "raise_counts", lambda self, tree: held.append((self, tree))),
        mock.patch.object(Alteration, "transaction", transaction),
    ):
        yield


@contextmanager
def _flags_left_on() -> Iterator[None]:
    with mock.patch.object(Trees, "clear_copied", return_value=False):
        yield


def _apply_in_place(alteration: Alteration, which: str) -> Snapshot:
    """The snapshot's L1 table is written over the active one."""
    state = alteration.state
    header = state.header
    snapshot = find_snapshot(read_snapshots(state.storage, header), which)
    assert snapshot is not None
    trees = Trees(state)
    old = trees.references(header.l1_offset, header.l1_entries)
    trees.raise_counts(trees.references(snapshot.l1_offset, snapshot.l1_entries))
    alteration.read_again()
    l1 = bytes(read_exact(state.storage, snapshot.l1_offset, snapshot.l1_entries * 8, "L1"))
    alteration.transaction(lambda: state.pending.put(Stage.LINK, header.l1_offset, l1, "l1.link", Kind.L1))
    trees.lower_counts(old)
    return snapshot


@contextmanager
def _applied_in_place() -> Iterator[None]:
    with mock.patch.object(snapshots, "apply", _apply_in_place):
        yield


@contextmanager
def _bitmaps_forgotten() -> Iterator[None]:
    with mock.patch.object(Alteration, "after_other_disk", return_value=None):
        yield


@contextmanager
def _freed_before_it_is_gone() -> Iterator[None]:
    """Delete: what the snapshot leads to is counted down while the header still leads to it."""
    true_lower, true_transaction = Trees.lower_counts, Alteration.transaction
    made: list[tuple[Trees, Counts]] = []
    true_references = Trees.references

    def references(self: Trees, l1_offset: int, l1_entries: int) -> Counts:
        made.append((self, true_references(self, l1_offset, l1_entries)))
        return made[-1][1]

    def transaction(self: Alteration, plan: Callable[[], Any]) -> Any:
        for trees, tree in made:
            true_lower(trees, tree)
        made.clear()
        self.read_again()
        return true_transaction(self, plan)

    with (
        mock.patch.object(Trees, "references", references),
        mock.patch.object(Trees, "lower_counts", return_value=None),
        mock.patch.object(Alteration, "transaction", transaction),
    ):
        yield


@contextmanager
def _flags_on_for_all() -> Iterator[None]:
    """Delete: COPIED on without a look at the counts."""
    true = Trees._single

    def single(self: Trees, entries: Any) -> Any:
        stored, self._stored = self._stored, np.ones_like(self._stored)
        try:
            return true(self, entries)
        finally:
            self._stored = stored

    with mock.patch.object(Trees, "_single", single):
        yield


SNAPSHOT_CASES = {
    name: parse_case(text)
    for name, text in {
        "create": "v3,c512,r16,t64,aged | snapshot_create",
        "create-second": "v3,c512,r16,t64,aged,s1 | snapshot_create",
        "apply": "v3,c512,r16,t64,aged,s1,diverged | snapshot_apply",
        "apply-smaller": "v3,c512,r16,t64,aged,s2,smaller,diverged | snapshot_apply",
        "apply-wide": "v3,c512,r16,t64,s1,wide | write:2096640+1024 flush snapshot_apply",
        "apply-with-bitmap": "v3,c512,r16,t64,aged,s1,diverged,bitmap | snapshot_apply reopen",
        "apply-smaller-with-bitmap": "v3,c512,r16,t64,aged,s2,smaller,diverged,bitmap | snapshot_apply reopen",
        "delete": "v3,c512,r16,t64,aged,s1,diverged | snapshot_delete",
        "delete-one-of-two": "v3,c512,r16,t64,aged,s2,diverged | snapshot_delete",
    }.items()
}

SNAPSHOT_MUTANTS = [
    Mutant("M16 named in the header before refcounts up", "create", _named_before_it_is_counted, clauses=("C5", "C7")),
    Mutant("M16 old table freed before the switch", "create-second", counted_down_at_once(tables=True), clauses=("C5", "C7")),
    Mutant("M17 applied with a stale COPIED flag", "apply", _flags_left_on, clauses=("C5", "C10")),
    Mutant("M18 applied in place, L1 of two sectors", "apply-wide", _applied_in_place, power_only=True, clauses=("C7",)),
    Mutant("M34 applied without a mark in the bitmap", "apply-with-bitmap", _bitmaps_forgotten, clauses=("C14",)),
    Mutant("M19 COPIED not cleared when created", "create", _flags_left_on, clauses=("C5", "C6", "C10")),
    Mutant("M4 deleted: refcounts down before the header", "delete", _freed_before_it_is_gone, clauses=("C5", "C6")),
    Mutant("M19 deleted: COPIED on where others lead there", "delete-one-of-two", _flags_on_for_all, clauses=("C5", "C10")),
]
