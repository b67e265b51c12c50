"""Geometry against the formulas of the specification, over every size that is allowed."""

from __future__ import annotations

import itertools

import pytest

from cowfence.qcow2.geometry import Geometry, GuestOffset, HostOffset
from cowfence.units import GIB, KIB, MIB, PIB


@pytest.mark.parametrize(
    ("cluster_bits", "refcount_order", "extended"),
    [c for c in itertools.product(range(9, 22), range(7), (False, True)) if not c[2] or c[0] >= 14],
)
def test_derived_sizes_follow_the_specification(cluster_bits: int, refcount_order: int, extended: bool) -> None:
    geometry = Geometry(cluster_bits, refcount_order, extended)
    cluster_bytes = 1 << cluster_bits
    l2_entries = cluster_bytes // (16 if extended else 8)
    block_entries = cluster_bytes * 8 // (1 << refcount_order)
    assert geometry.cluster_bytes == cluster_bytes
    assert geometry.l2_entries == l2_entries == 1 << geometry.l2_bits
    assert geometry.l2_coverage_bytes == l2_entries * cluster_bytes
    assert geometry.refcounts_per_block == block_entries
    assert geometry.block_coverage_bytes == block_entries * cluster_bytes
    assert geometry.refcount_max == 2 ** (2**refcount_order) - 1
    assert geometry.compressed_shift == 62 - (cluster_bits - 8)
    offset = 12345 * cluster_bytes + 7
    assert geometry.l1_index(GuestOffset(offset)) == offset // cluster_bytes // l2_entries
    assert geometry.l2_index(GuestOffset(offset)) == offset // cluster_bytes % l2_entries
    assert geometry.refcount_table_index(HostOffset(offset)) == offset // cluster_bytes // block_entries
    assert geometry.refcount_block_index(HostOffset(offset)) == offset // cluster_bytes % block_entries


def test_default_image_has_well_known_numbers() -> None:
    geometry = Geometry(16)
    assert geometry.l2_coverage_bytes == 512 * MIB
    assert geometry.block_coverage_bytes == 2 * GIB
    assert geometry.l1_entries_for(0) == 0
    assert geometry.l1_entries_for(1) == 1
    assert geometry.l1_entries_for(512 * MIB + 1) == 2
    assert geometry.l1_entries_for(2 * PIB) * 8 == 32 * MIB
    assert geometry.clusters_for(64 * KIB + 1) == 2


@pytest.mark.parametrize(
    ("cluster_bits", "refcount_order", "extended", "version"),
    [(8, 4, False, 3), (22, 4, False, 3), (16, 7, False, 3), (16, -1, False, 3), (13, 4, True, 3), (16, 4, False, 1)],
)
def test_sizes_outside_the_limits_are_refused(cluster_bits: int, refcount_order: int, extended: bool, version: int) -> None:
    with pytest.raises(ValueError):
        Geometry(cluster_bits, refcount_order, extended, version)


@pytest.mark.parametrize(("refcount_order", "extended"), [(3, False), (5, False), (4, True)])
def test_version_2_lacks_other_refcounts_and_extended_entries(refcount_order: int, extended: bool) -> None:
    with pytest.raises(ValueError, match="version 2"):
        Geometry(16, refcount_order, extended, version=2)
