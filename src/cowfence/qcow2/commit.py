"""Committing: what an image holds goes into a backing file below it, and the image lets go of it (crash contract, C8, R6).

=========  =======================================================================  ==========================================
step       on disk                                                                  a crash after it
=========  =======================================================================  ==========================================
grow       the base, where it is smaller (see ``resize``)                           the disk is what it was: zeros are zeros
copy       every cluster that the image, or one between, holds: into the base;      the disk is what it was: the image's own
           then the base is flushed                                                 clusters stand above those of the base
let go     the image's L1 entries lead nowhere, one table after the other           the same disk, out of the base
=========  =======================================================================  ==========================================

So what is seen through the image never changes; the base alone is in between until it is flushed. Internal snapshots of the
image would change with the base, so an image that has some is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from cowfence.disk.base import Disk
from cowfence.errors import Unsupported
from cowfence.extents import Extent
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.mapping import RunKind, runs
from cowfence.qcow2.resize import unlink_behind
from cowfence.qcow2.state import State
from cowfence.units import MIB

Progress: TypeAlias = Callable[[float], None]
"""Told the fraction that is done, 0 to 1."""

_PIECE_BYTES: Final = MIB


def commit(
    alteration: Alteration,
    base: Disk,
    grow: Callable[[int], None],
    *,
    keep: bool = False,
    progress: Progress | None = None,
    pace: Callable[[int], None] | None = None,
) -> None:
    """Write what the image holds into ``base``, a disk open for writing somewhere below it, and, unless ``keep``, empty the
    image. ``grow``: gives the base another size. ``pace``: told how many bytes are written next; it may wait.

    With a base that is not the first backing file, ``keep``: those between would show through. Raises Unsupported (internal
    snapshots), NoSpace and what reading and writing raise; then the disk is what it was.
    """
    state = alteration.state
    if state.header.snapshot_count:
        raise Unsupported(state.storage.name, "committing an image with internal snapshots, which would change with the base")
    size = state.size
    if base.size < size:
        grow(size)
    with state.lock:
        # The base may be longer now, and still below.
        state.backing_bytes = 0 if state.backing is None else min(state.backing.size, size)
    for extent in _above(alteration, base):
        if extent.zero:
            base.zero(extent.start, extent.length_bytes)
        else:
            for at in range(extent.start, extent.end, _PIECE_BYTES):
                length_bytes = min(_PIECE_BYTES, extent.end - at)
                if pace is not None:
                    pace(length_bytes)
                base.write(at, alteration.read(at, length_bytes))
        if progress is not None:
            progress(extent.end / size)
    # Durable, before the image lets go of anything.
    base.flush()
    if not keep:
        unlink_behind(alteration, 0)


def _above(alteration: Alteration, base: Disk) -> Iterator[Extent]:
    """The extents of the disk that stand above ``base``."""
    state = alteration.state
    at, size = 0, state.size
    while at < size:
        end = min(size, (at >> state.geometry.l1_shift) + 1 << state.geometry.l1_shift)
        with state.lock:
            found = list(runs(state, at, end - at, wait=True))
        for run in found:
            if run.kind is RunKind.UNALLOCATED:
                yield from _between(state, base, run.offset, run.length_bytes)
            else:
                is_zero = run.kind is RunKind.ZERO
                yield Extent(run.offset, run.length_bytes, zero=is_zero, data=not is_zero, present=True)
        at = end


def _between(state: State, base: Disk, start: int, length_bytes: int) -> Iterator[Extent]:
    """Those of the images between."""
    levels, disk = 0, state.backing
    while disk is not None and disk is not base:
        levels, disk = levels + 1, getattr(disk, "backing", None)
    inside = min(length_bytes, state.backing_bytes - start)
    if levels and inside > 0 and state.backing is not None:
        for extent in state.backing.extents(start, inside):
            if extent.depth < levels and extent.present:
                yield extent
