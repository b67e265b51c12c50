"""Rebasing: the image stands over another backing file, and its disk stays what it was (crash contract, C8, C9).

==============  =====================================================================  =======================================
step            transactions                                                           a crash after each
==============  =====================================================================  =======================================
merge           where the old and the new backing file differ, what the guest reads    the disk is what it was, over the old
                of the old becomes the image's own: data, or zero clusters             backing file
switch          PREPARE the name, LINK sector 0 (see ``header_change``)                 the same disk over the new one
==============  =====================================================================  =======================================

Internal snapshots would not stay what they were: what they do not hold themselves is read from the backing file. So an image
that has some is rebased by its header alone only ("unsafe"), by those who know that the new file holds the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeAlias

from cowfence.disk.base import Disk
from cowfence.errors import Invalid, Unsupported
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.extensions import ExtensionType
from cowfence.qcow2.geometry import MAX_BACKING_NAME_BYTES
from cowfence.qcow2.header_change import switch_header, with_extension
from cowfence.qcow2.mapping import RunKind, runs
from cowfence.units import MIB, align_down, align_up

Progress: TypeAlias = Callable[[float], None]
"""Told the fraction that is done, 0 to 1."""

_PIECE_BYTES: Final = MIB


def rebase(
    alteration: Alteration,
    name: str | None,
    format_name: str | None,
    new: Disk | None,
    *,
    merge: bool = True,
    progress: Progress | None = None,
) -> None:
    """Put the image over the backing file ``name`` (None: over none), which is open as ``new``; the disk owns it from then on.

    ``merge``: keep what the guest reads. Without it only the header changes, and the image has to be opened again. Raises
    Invalid (the name), Unsupported (internal snapshots, no room in the header), NoSpace and what reading the backing files and
    writing raise: then the image stands over the old one.
    """
    state = alteration.state
    raw_name = None if name is None else name.encode("utf-8", "surrogateescape")
    if raw_name is not None and not 0 < len(raw_name) <= MAX_BACKING_NAME_BYTES:
        raise Invalid(f"{state.storage.name}: a backing file's name has 1 to {MAX_BACKING_NAME_BYTES} bytes")
    if raw_name is not None and state.raw_data:
        raise Unsupported(state.storage.name, "a backing file under an external data file that can be read by itself")
    if merge:
        if state.header.snapshot_count:
            raise Unsupported(state.storage.name, "rebasing an image with internal snapshots, which would not stay the same")
        _merge(alteration, new, progress)
    raw_format = None if name is None or format_name is None else format_name.encode()

    def switch() -> None:
        switch_header(
            state,
            lambda now: replace(
                now,
                backing_name=raw_name,
                backing_offset=0,
                extensions=with_extension(now, ExtensionType.BACKING_FORMAT, raw_format),
            ),
        )

    alteration.transaction(switch)
    if merge:
        with state.lock:
            old, state.backing = state.backing, new
        if old is not None and old is not new:
            old.close()
    alteration.read_again()


def _merge(alteration: Alteration, new: Disk | None, progress: Progress | None) -> None:
    """Make the image's own what would read otherwise over ``new``."""
    state = alteration.state
    piece_bytes = align_up(_PIECE_BYTES, state.geometry.cluster_bytes)
    old_bytes = state.backing_bytes
    at, size = 0, state.size
    while at < size:
        end = min(at + max(piece_bytes, state.geometry.l2_coverage_bytes), size)
        with state.lock:
            found = [run for run in runs(state, at, end - at, wait=True) if run.kind is RunKind.UNALLOCATED]
        for run in found:
            # Past the end of both, both are zeros.
            stop = min(run.offset + run.length_bytes, max(old_bytes, 0 if new is None else new.size))
            for start in range(run.offset, stop, piece_bytes):
                _merge_piece(alteration, new, old_bytes, start, min(piece_bytes, stop - start))
        at = end
        if progress is not None:
            progress(at / size)


def _merge_piece(alteration: Alteration, new: Disk | None, old_bytes: int, start: int, length_bytes: int) -> None:
    """Unallocated clusters or subclusters from ``start`` on: those in which old and new differ."""
    state = alteration.state
    unit_bytes = state.geometry.subcluster_bytes
    if _reads_zero(state.backing, start, length_bytes) and _reads_zero(new, start, length_bytes):
        return
    below, above = _read(state.backing, old_bytes, start, length_bytes), _read(new, None, start, length_bytes)
    if below == above:
        return
    differing = [at for at in range(0, length_bytes, unit_bytes) if below[at : at + unit_bytes] != above[at : at + unit_bytes]]
    zeros = bytes(unit_bytes)
    at = 0
    while at < len(differing):
        first = differing[at]
        is_zero = not _any(below, first, zeros)
        end = first + unit_bytes
        at += 1
        while at < len(differing) and differing[at] == end and _any(below, end, zeros) is not is_zero:
            end += unit_bytes
            at += 1
        if is_zero:
            _zero(alteration, start + first, end - first)
        else:
            _write(alteration, start + first, memoryview(below)[first : min(end, length_bytes)])


def _reads_zero(disk: Disk | None, start: int, length_bytes: int) -> bool:
    """True if the range is known to be zeros without a look at its bytes."""
    inside = 0 if disk is None else max(0, min(length_bytes, disk.size - start))
    return not inside or disk is None or all(extent.zero for extent in disk.extents(start, inside))


def _any(content: bytes, at: int, zeros: bytes) -> bool:
    """True if the cluster or subcluster at ``at`` is not all zeros."""
    unit = content[at : at + len(zeros)]
    return unit != zeros[: len(unit)]


def _read(disk: Disk | None, limit_bytes: int | None, start: int, length_bytes: int) -> bytes:
    """What an image over ``disk`` reads, of its first ``limit_bytes``; zeros behind it."""
    size = 0 if disk is None else disk.size if limit_bytes is None else min(disk.size, limit_bytes)
    inside = max(0, min(length_bytes, size - start))
    data = disk.read(start, inside) if inside and disk is not None else b""
    return data.ljust(length_bytes, b"\0")


def _write(alteration: Alteration, start: int, data: memoryview) -> None:
    assert alteration.zeroes is not None
    writes, at = alteration.zeroes, 0
    while at < len(data):
        at += alteration.transaction(lambda at=at: writes.write(start + at, data[at:], wait=True))  # type: ignore[misc]


def _zero(alteration: Alteration, start: int, length_bytes: int) -> None:
    """Zero clusters or subclusters, also where zeros are read now because the old backing file ends before."""
    zeroes, state = alteration.zeroes, alteration.state
    assert zeroes is not None
    if state.header.version < 3:
        for at in range(start, min(start + length_bytes, state.size), _PIECE_BYTES):
            end = min(at + _PIECE_BYTES, start + length_bytes, state.size)
            _write(alteration, at, memoryview(bytes(end - at)))
        return
    with state.lock:
        known_bytes = state.backing_bytes
        state.backing_bytes = align_up(state.size, state.geometry.cluster_bytes)
    try:
        at = align_down(start, state.geometry.subcluster_bytes)
        while at < start + length_bytes:
            left = start + length_bytes - at
            at += alteration.transaction(lambda at=at, left=left: zeroes.zero(at, left, unmap=True, wait=True))  # type: ignore[misc]
    finally:
        with state.lock:
            state.backing_bytes = known_bytes
