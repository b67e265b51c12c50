"""Check an image, and repair it where that is asked for. Opens exactly one file; backing and data files are not its business.

The numbers and the exit code are those of ``qemu-img check``: everything that is no leak is a corruption, harmless COPIED flags
too, and after a repair they describe what is left. Our grades come on top, with every finding. Two deviations: QEMU counts a
bad entry of an L2 table that a snapshot shares once for each way that leads there, we count it once; and structures that share
a cluster whose refcount is high enough are clean to QEMU's check (its writes refuse them), not to ours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowfence.errors import NotThisFormat, Unsupported
from cowfence.ops.meanings import explain
from cowfence.qcow2.findings import Finding, Mode, Report
from cowfence.qcow2.verify import Progress, verify
from cowfence.storage.base import Storage
from cowfence.storage.file import FileStorage

if TYPE_CHECKING:
    from cowfence.qcow2.describe import JsonValue
    from cowfence.storage.rehearsal import Rehearsal

__all__ = ["CheckResult", "Mode", "NoCheck", "check", "check_storage"]

EXIT_CLEAN: Final = 0
EXIT_CORRUPT: Final = 2
EXIT_LEAKS: Final = 3


class NoCheck(Unsupported):
    """The format has nothing that could be checked."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "checks of this format")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was found; after a repair, what is left, and how much is gone. ``unrepairable``: what was not repaired, and why."""

    filename: str
    report: Report
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    unrepairable: tuple[str, ...] = ()
    format: str = "qcow2"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The first findings of each sort."""
        return self.report.findings

    @property
    def exit_code(self) -> int:
        """As of ``qemu-img check``: 0 clean, 2 corrupt, 3 leaks only."""
        if self.report.corruptions:
            return EXIT_CORRUPT
        return EXIT_LEAKS if self.report.leaks else EXIT_CLEAN

    def to_dict(self, *, explained: bool = False) -> dict[str, JsonValue]:
        """As ``qemu-img check --output=json`` names and orders it; but for ``check-errors``, a number that is 0 is left out.

        ``findings`` is ours, and left out where there are none. ``explained``: each in plain words, too.
        """
        report = self.report
        found: dict[str, JsonValue] = {
            "image-end-offset": report.image_end_bytes,
            "compressed-clusters": report.compressed_clusters,
            "total-clusters": report.total_clusters,
            "corruptions": report.corruptions,
            "corruptions-fixed": self.corruptions_fixed,
            # An internal error raises.
            "check-errors": 0,
            "leaks": report.leaks,
            "leaks-fixed": self.leaks_fixed,
            "allocated-clusters": report.allocated_clusters,
            "filename": self.filename,
            "format": self.format,
            "fragmented-clusters": report.fragmented_clusters,
        }
        found = {key: value for key, value in found.items() if value or key == "check-errors"}
        if self.findings:
            found["findings"] = [_finding_dict(finding, explained) for finding in self.findings]
        return found


def _finding_dict(finding: Finding, explained: bool) -> dict[str, JsonValue]:
    numbers: dict[str, JsonValue] = {
        "cluster": finding.cluster,
        "offset": finding.offset,
        "refcount": finding.stored,
        "references": finding.references,
    }
    return {
        "grade": finding.grade.value,
        "problem": finding.problem.value,
        "where": finding.where,
        "what": finding.what,
        **{key: value for key, value in numbers.items() if value is not None},
        **(explain(finding)._asdict() if explained else {}),
    }


def check(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    repair: Mode | None = None,
    lock: bool = True,
    force_share: bool = False,
    direct: bool = False,
    progress: Progress | None = None,
    rehearsal: Rehearsal | None = None,
) -> CheckResult:
    """Check the image at ``path``. ``format``: None looks at the file. ``direct``: around the page cache. ``progress`` is told
    the fraction that is done, 0 to 1. ``rehearsal``: what a repair would write is kept there.

    Raises NoCheck for what is no qcow2 image (unless ``format`` says that it is: then NotThisFormat), Corrupt and Unsupported
    for a header that cannot be used, Locked, Invalid, StorageFailed.
    """
    writable = repair is not None and rehearsal is None
    storage: Storage = FileStorage.open(path, writable=writable, direct=direct, lock=lock, force_share=force_share)
    if rehearsal is not None:
        storage = rehearsal.over(storage)
    try:
        if format not in (None, "qcow2"):
            raise NoCheck(storage.name)
        return check_storage(storage, repair=repair, progress=progress)
    except NotThisFormat:
        if format is None:
            raise NoCheck(storage.name) from None
        raise
    finally:
        storage.close()


def check_storage(storage: Storage, *, repair: Mode | None = None, progress: Progress | None = None) -> CheckResult:
    """The same for an image in an open storage, which stays open."""
    if repair is None:
        return CheckResult(storage.name, verify(storage, progress=progress))
    from cowfence.qcow2.repair import repair as repair_image

    done = repair_image(storage, repair, progress=progress)
    return CheckResult(storage.name, done.after, done.corruptions_fixed, done.leaks_fixed, done.unrepairable)
