"""What a check finds: one value for each finding, its grade, and the report that holds them.

A hostile image can break a rule in every one of its entries, so a report keeps the first findings of each sort and counts the
rest. A finding is numbers; its words are made when somebody reads them, because the crash explorer asks millions of times and
reads almost never.

The grades are those of the crash contract (C5). QEMU knows two: it counts everything here but leaks as a corruption, harmless
flags too, and ``Report.corruptions`` is that number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

KEPT_FINDINGS: Final = 1000
"""How many findings of one problem and grade a report keeps; all are counted."""


class Grade(Enum):
    """How bad it is. FATAL: data can be wrong, or a write can destroy some. LEAK: only space is lost."""

    FATAL = "fatal"
    HARMLESS = "harmless"
    LEAK = "leak"


class Problem(Enum):
    """Which rule is broken."""

    REFCOUNT_TOO_LOW = "refcount-too-low"
    REFCOUNT_TOO_HIGH = "refcount-too-high"
    COPIED_SET = "copied-set"
    COPIED_CLEAR = "copied-clear"
    COPIED_ON_COMPRESSED = "copied-on-compressed"
    COPIED_WITHOUT_CLUSTER = "copied-without-cluster"
    RESERVED_BITS = "reserved-bits"
    ZERO_FLAG = "zero-flag"
    SUBCLUSTERS = "subclusters"
    MISALIGNED = "misaligned"
    PAST_END = "past-end"
    OVERLAP = "overlap"
    SNAPSHOT_TABLE = "snapshot-table"
    BITMAP_DIRECTORY = "bitmap-directory"
    DATA_FILE = "data-file"


_WORDS: Final[Mapping[Problem, str]] = {
    Problem.REFCOUNT_TOO_LOW: "its stored refcount is {stored}, but it has {references} references",
    Problem.REFCOUNT_TOO_HIGH: "its stored refcount is {stored}, but it has {references} references: space is lost",
    Problem.COPIED_SET: (
        "the COPIED flag is set, but the stored refcount of the cluster at {offset:#x} is {stored} ({references} references)"
    ),
    Problem.COPIED_CLEAR: "the COPIED flag is clear, but the stored refcount of the cluster at {offset:#x} is 1",
    Problem.COPIED_ON_COMPRESSED: "the COPIED flag is set on a compressed cluster in {entry:#018x}",
    Problem.COPIED_WITHOUT_CLUSTER: "the COPIED flag is set without a host offset in {entry:#018x}",
    Problem.RESERVED_BITS: "reserved bits are set in {entry:#018x}",
    Problem.ZERO_FLAG: "the zero flag is set in {entry:#018x}, which this image's entries do not have",
    Problem.SUBCLUSTERS: "the subcluster bitmap {entry:#018x} contradicts the entry",
    Problem.MISALIGNED: "the offset {offset:#x} is not aligned to the cluster size",
    Problem.PAST_END: "the offset {offset:#x} lies past the end of the file",
    Problem.OVERLAP: "another structure lies on the same cluster ({references} references)",
    Problem.SNAPSHOT_TABLE: "{detail}",
    Problem.BITMAP_DIRECTORY: "{detail}",
    Problem.DATA_FILE: "{detail}",
}


class Finding(NamedTuple):
    """One finding: ``place`` and ``indices`` say where it stands, the rest are the numbers that it is about.

    ``cluster`` and ``offset``: the host cluster concerned, and its offset in bytes (or the byte offset that an entry names).
    ``entry``: the word found. ``stored``, ``references``: the refcount on disk, and the references counted. ``detail``: what a
    structure that could not be read said.
    """

    problem: Problem
    grade: Grade
    place: str
    indices: tuple[int, ...] = ()
    cluster: int | None = None
    offset: int | None = None
    entry: int | None = None
    stored: int | None = None
    references: int | None = None
    detail: str = ""

    @property
    def where(self) -> str:
        """``L2[3][17]``, ``cluster 42 at offset 0x2a0000``."""
        if self.indices:
            return self.place + "".join(f"[{index}]" for index in self.indices)
        if self.cluster is not None:
            return f"{self.place} {self.cluster} at offset {self.offset:#x}"
        return self.place

    @property
    def what(self) -> str:
        return _WORDS[self.problem].format_map(self._asdict())

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Collector:
    """Keeps the first findings of each problem and grade, and counts all."""

    __slots__ = ("kept", "totals")

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.totals: Counter[tuple[Problem, Grade]] = Counter()

    def add(self, finding: Finding) -> None:
        key = (finding.problem, finding.grade)
        if self.totals[key] < KEPT_FINDINGS:
            self.kept.append(finding)
        self.totals[key] += 1

    def add_many(self, problem: Problem, grade: Grade, total: int, first: Callable[[int], Iterable[Finding]]) -> None:
        """``total`` findings of one sort; ``first(n)`` makes the first n of them."""
        if not total:
            return
        room = KEPT_FINDINGS - self.totals[problem, grade]
        if room > 0:
            self.kept.extend(first(min(room, total)))
        self.totals[problem, grade] += total


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. ``findings``: the first of each sort. ``totals``: how many there are of each.

    ``complete``: every structure that holds references could be read, so that what is called a leak is one.
    ``refcounts_damaged``: the refcount structures themselves are broken, whatever they count.
    ``image_end_bytes``: where the last cluster that is in use ends. ``total_clusters``: of the guest's disk;
    ``fragmented_clusters``: those that do not follow their neighbour, compressed ones all.
    """

    findings: tuple[Finding, ...]
    totals: Mapping[tuple[Problem, Grade], int]
    complete: bool
    refcounts_damaged: bool
    image_end_bytes: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int

    def count(self, grade: Grade) -> int:
        return sum(total for (_, found), total in self.totals.items() if found is grade)

    @property
    def fatal(self) -> int:
        return self.count(Grade.FATAL)

    @property
    def harmless(self) -> int:
        return self.count(Grade.HARMLESS)

    @property
    def leaks(self) -> int:
        return self.count(Grade.LEAK)

    @property
    def corruptions(self) -> int:
        """What QEMU counts: everything but leaks."""
        return self.fatal + self.harmless

    @property
    def clean(self) -> bool:
        return not self.totals

    @property
    def refcounts_sound(self) -> bool:
        """No stored refcount is below the references, and the refcount structures are whole."""
        return not self.refcounts_damaged and (Problem.REFCOUNT_TOO_LOW, Grade.FATAL) not in self.totals
