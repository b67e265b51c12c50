"""Findings in plain words: what is wrong, what it risks, and what a repair does about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from cowfence.qcow2.findings import Problem


class Meaning(NamedTuple):
    """``wrong``: the rule that is broken. ``risk``: what can come of it. ``repair``: what ``check -r all`` does."""

    wrong: str
    risk: str
    repair: str


MEANINGS: Final[Mapping[Problem, Meaning]] = {
    Problem.REFCOUNT_TOO_LOW: Meaning(
        "More tables lead to a cluster than its refcount says.",
        "The next write can take the cluster for free, or for its own, and destroy what others still read there.",
        "The count is raised to the references that were counted; no data moves.",
    ),
    Problem.REFCOUNT_TOO_HIGH: Meaning(
        "A cluster is counted more often than tables lead to it.",
        "None to data: the space is never used again. A crash between two steps of a write leaves this.",
        "The count is lowered to the references, and the space is given back; also with -r leaks.",
    ),
    Problem.COPIED_SET: Meaning(
        "An entry says that it alone leads to a cluster, and the refcount says otherwise.",
        "A write through this entry goes into the cluster in place, and changes what a snapshot reads there.",
        "The flag is cleared, or the count is raised first, so that the next write copies.",
    ),
    Problem.COPIED_CLEAR: Meaning(
        "An entry does not say that it alone leads to a cluster, though it does.",
        "None to data: the next write copies the cluster without need.",
        "The flag is set.",
    ),
    Problem.COPIED_ON_COMPRESSED: Meaning(
        "An entry of a compressed cluster has the flag for clusters that are written in place.",
        "Some programs refuse the image; none may write in place there.",
        "The flag is cleared.",
    ),
    Problem.COPIED_WITHOUT_CLUSTER: Meaning(
        "An entry that leads nowhere has the flag for clusters that are written in place.",
        "Some programs refuse the image.",
        "The flag is cleared.",
    ),
    Problem.RESERVED_BITS: Meaning(
        "Bits are set that the format does not use: the entry was not written by a program that follows it.",
        "What the entry leads to cannot be trusted; the guest's data there is unreadable.",
        "Nothing: no program can know what stood there. Restore the range from a copy, or write it anew.",
    ),
    Problem.ZERO_FLAG: Meaning(
        "An entry has the flag for zeros, which this version of the format does not have.",
        "Programs read different things there.",
        "Nothing: whether zeros or the data were meant, nobody knows.",
    ),
    Problem.SUBCLUSTERS: Meaning(
        "The bitmap of a cluster's parts contradicts the entry.",
        "What the guest reads in these parts is not certain.",
        "Nothing: no program can know which of the two is right.",
    ),
    Problem.MISALIGNED: Meaning(
        "An offset is not at the start of a cluster.",
        "What it leads to is no table and no data; what stands in those clusters may belong to others.",
        "Nothing is followed, and nothing is freed that it may lead to.",
    ),
    Problem.PAST_END: Meaning(
        "An entry leads past the end of the file: the file was cut off, or the entry is damaged.",
        "The data is gone; if the file grows again, something else will be read there.",
        "Nothing: the data cannot be brought back. Do not write to the image before it is copied.",
    ),
    Problem.OVERLAP: Meaning(
        "Two structures stand on one cluster.",
        "Whoever writes one destroys the other.",
        "A refcount structure is made anew elsewhere; others stay as they are, and writing is refused.",
    ),
    Problem.SNAPSHOT_TABLE: Meaning(
        "The table of snapshots cannot be read to its end, or an entry breaks the rules.",
        "Snapshots may be lost; what they hold must not be freed.",
        "Nothing is freed that a snapshot may hold.",
    ),
    Problem.BITMAP_DIRECTORY: Meaning(
        "The directory of the dirty bitmaps cannot be read.",
        "Incremental backups that rest on them would miss changes.",
        "Nothing is freed that a bitmap may hold. Make a full backup, and new bitmaps.",
    ),
    Problem.DATA_FILE: Meaning(
        "The image has something that images with an external data file do not have.",
        "Programs differ in what they read.",
        "Nothing.",
    ),
}
