"""Findings of a check in plain words: what is wrong, what it risks, and what a repair would do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from cowfence.qcow2.findings import Finding, Grade, Problem


class Explanation(NamedTuple):
    """Three sentences."""

    wrong: str
    risk: str
    repair: str


_NO_RISK: Final = "None: no data is in danger, now or later."
_LEFT: Final = "Nothing: what the entry should say cannot be known. Copy off what can be read (convert), or use a backup."
_FLAG_REPAIR: Final = "The flag is set to what the refcounts say (-r all); data is not touched."

_EXPLANATIONS: Final[Mapping[Problem, Explanation]] = {
    Problem.REFCOUNT_TOO_LOW: Explanation(
        "A cluster is in use more often than its stored refcount says.",
        "A later write may take the cluster for free, or for unshared, and overwrite data that is still needed.",
        "A complete new set of refcounts is written and then switched to (-r all); data is not touched.",
    ),
    Problem.REFCOUNT_TOO_HIGH: Explanation(
        "A cluster is in use less often than its stored refcount says.",
        "Space is lost until it is repaired; no data is in danger.",
        "The refcount goes down to the references there are, so that the space can be used again (-r leaks).",
    ),
    Problem.COPIED_SET: Explanation(
        "An entry says that its cluster belongs to it alone, and the refcount says otherwise.",
        "A write would change the cluster in place, and with it a snapshot that may share it.",
        _FLAG_REPAIR,
    ),
    Problem.COPIED_CLEAR: Explanation(
        "An entry does not say that its cluster belongs to it alone, though it does.",
        "None: a write copies the cluster where it need not.",
        _FLAG_REPAIR,
    ),
    Problem.COPIED_ON_COMPRESSED: Explanation(
        "A compressed cluster is marked as one that can be written in place, which it never can.",
        "Other programs may take the image for damaged.",
        _FLAG_REPAIR,
    ),
    Problem.COPIED_WITHOUT_CLUSTER: Explanation(
        "An entry is marked as the only owner of a cluster, and names none.",
        "Programs refuse the image, or mark it corrupt, when they meet this entry.",
        _FLAG_REPAIR,
    ),
    Problem.RESERVED_BITS: Explanation(
        "An entry has bits set that the format reserves: it was overwritten, or written by a program with a defect.",
        "The entry cannot be trusted; what stands behind it may be wrong, and reading it fails.",
        _LEFT,
    ),
    Problem.ZERO_FLAG: Explanation(
        "An entry says 'reads as zeros' in an image whose entries have no such flag.",
        "Programs differ in what they read there: zeros, or what stands at the offset.",
        _LEFT,
    ),
    Problem.SUBCLUSTERS: Explanation(
        "The bitmap of an entry's parts contradicts the entry.",
        "The cluster cannot be read.",
        _LEFT,
    ),
    Problem.MISALIGNED: Explanation(
        "An entry leads to an offset at which no cluster begins.",
        "What it led to cannot be found; reading it fails.",
        _LEFT,
    ),
    Problem.PAST_END: Explanation(
        "An entry leads past the end of the file: the file was cut, or the entry was overwritten.",
        "The data behind it is not there; reading it fails. Growing the file would make it read as foreign data.",
        _LEFT,
    ),
    Problem.OVERLAP: Explanation(
        "Two structures claim the same cluster.",
        "Writing one of them destroys the other. Write nothing to this image.",
        "Nothing where both are needed; a refcount structure that lies on another is written anew elsewhere (-r all).",
    ),
    Problem.SNAPSHOT_TABLE: Explanation(
        "The table of snapshots breaks the format's rules.",
        "Snapshots may not be readable, and what they use may look free to programs that do not check.",
        "Nothing: no cluster is freed while snapshots may need it.",
    ),
    Problem.BITMAP_DIRECTORY: Explanation(
        "The directory of dirty bitmaps cannot be read.",
        "The next incremental backup has to be a full one; the disk's data is not concerned.",
        "Nothing: remove the bitmaps once the image is open for writing.",
    ),
    Problem.DATA_FILE: Explanation(
        "The image has an external data file, and something that such an image must not have.",
        "Programs differ in what they do with it.",
        "Nothing.",
    ),
}


def explain(finding: Finding) -> Explanation:
    """What is wrong, what it risks, and what a repair would do."""
    explanation = _EXPLANATIONS[finding.problem]
    if finding.grade is Grade.HARMLESS:
        return explanation._replace(risk=explanation.risk if explanation.risk.startswith("None") else _NO_RISK)
    return explanation
