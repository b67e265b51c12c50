"""What stands in each cluster of an image's file: the ground of a picture of it. A pure reader; the image may be damaged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cowfence.ops.explain import bitmap_clusters
from cowfence.qcow2.entries import COMPRESSED
from cowfence.qcow2.verify import Survey, survey
from cowfence.storage.file import FileStorage


class Use(IntEnum):
    """Of a cluster."""

    FREE = 0
    DATA = 1
    SHARED = 2
    COMPRESSED = 3
    L2 = 4
    L1 = 5
    REFCOUNTS = 6
    HEADER = 7
    SNAPSHOTS = 8
    BITMAPS = 9
    ENCRYPTION = 10
    LEAKED = 11
    IN_DANGER = 12


WORDS: Final = {
    Use.FREE: "free",
    Use.DATA: "data",
    Use.SHARED: "data of several owners",
    Use.COMPRESSED: "compressed data",
    Use.L2: "L2 tables",
    Use.L1: "L1 tables",
    Use.REFCOUNTS: "refcounts",
    Use.HEADER: "header",
    Use.SNAPSHOTS: "snapshot table",
    Use.BITMAPS: "bitmaps",
    Use.ENCRYPTION: "encryption header",
    Use.LEAKED: "leaked",
    Use.IN_DANGER: "in danger: counted too low",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """``uses``: a value of ``Use`` for each cluster of the file."""

    filename: str
    cluster_bytes: int
    virtual_bytes: int
    uses: NDArray[np.uint8]

    def totals(self) -> dict[Use, int]:
        """Clusters of each use that occurs."""
        counts = np.bincount(self.uses, minlength=len(Use)).tolist()
        return {use: counts[use] for use in Use if counts[use]}


def layout(path: str | os.PathLike[str], *, force_share: bool = False) -> Layout:
    """Raises as ``verify`` does."""
    storage = FileStorage.open(path, force_share=force_share)
    try:
        found = survey(storage)
        return Layout(os.fspath(path), found.census.cluster_bytes, found.header.size_bytes, _uses(found))
    finally:
        storage.close()


def _uses(found: Survey) -> NDArray[np.uint8]:
    """What is named last counts: the structures, and what is wrong, over data."""
    clusters = found.census.clusters
    uses = np.zeros(clusters, np.uint8)
    references = found.census.references[:clusters].astype(np.int64)
    stored = np.zeros(clusters, np.int64)
    held = found.census.stored[:clusters]
    stored[: len(held)] = held
    uses[references == 1] = Use.DATA
    uses[references > 1] = Use.SHARED
    uses[_compressed(found)] = Use.COMPRESSED
    uses[_inside(found.judge.tables.clusters, clusters)] = Use.L2
    uses[_inside(found.blocks[1], clusters)] = Use.REFCOUNTS
    for start, stop, name in zip(found.claims.starts, found.claims.stops, found.claims.names, strict=True):
        uses[start:stop] = _of_structure(name)
    for cluster in bitmap_clusters(found):
        if cluster < clusters:
            uses[cluster] = Use.BITMAPS
    uses[(references == 0) & (stored > 0)] = Use.LEAKED
    uses[references > stored] = Use.IN_DANGER
    return uses


def _inside(numbers: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    return numbers[numbers < clusters]


def _compressed(found: Survey) -> NDArray[np.bool_]:
    """Clusters in which a compressed stream begins; most of the others that it touches are among them."""
    geometry = found.geometry
    marks = np.zeros(found.census.clusters, bool)
    for _, _, words in found.judge.pieces():
        entries = words.reshape(-1)
        packed = entries[(entries & np.uint64(COMPRESSED)) != 0] & np.uint64(geometry.compressed_offset_mask)
        numbers = (packed >> np.uint64(geometry.cluster_bits)).astype(np.int64)
        marks[numbers[numbers < len(marks)]] = True
    return marks


def _of_structure(name: str) -> Use:
    """By the name under which ``verify`` claims it."""
    for part, use in (
        ("refcount", Use.REFCOUNTS),
        ("snapshot table", Use.SNAPSHOTS),
        ("bitmap", Use.BITMAPS),
        ("encryption", Use.ENCRYPTION),
        ("L1", Use.L1),
    ):
        if part in name:
            return use
    return Use.HEADER if name == "header" else Use.L1
