"""Block status: the extents of a guest range, through the backing chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cowfence.extents import Extent
from cowfence.qcow2.mapping import GuestRun, RunKind, runs
from cowfence.qcow2.plans import Plans
from cowfence.qcow2.state import State

_PIECE_TABLES = 4096
"""L2 tables that are looked at in one go, under the lock."""


def extents(state: State, plans: Plans, enter: Callable[[int, int], None], offset: int, length_bytes: int) -> Iterator[Extent]:
    """In order and without gaps; neighbours of one state are not joined. ``enter``: see ``Qcow2Disk``."""
    end = offset + length_bytes
    while offset < end:
        piece = min(end - offset, _PIECE_TABLES << state.geometry.l1_shift)

        def plan(wait: bool, start: int = offset, count: int = piece) -> list[GuestRun]:
            return list(runs(state, start, count, wait=wait))

        def check(start: int = offset, count: int = piece) -> None:
            enter(start, count)

        for kind, start, run_bytes, host, _ in plans.run(plan, check):
            if kind is RunKind.DATA:
                # What is enciphered is not to be read at its place.
                plain_at = host if state.cipher is None else None
                yield Extent(start, run_bytes, zero=False, data=True, present=True, host_offset=plain_at)
            elif kind is RunKind.COMPRESSED:
                yield Extent(start, run_bytes, zero=False, data=True, present=True, compressed=True)
            elif kind is RunKind.ZERO:
                yield Extent(
                    start, run_bytes, zero=True, data=False, present=True, host_offset=host if state.cipher is None else None
                )
            else:
                yield from _below(state, start, run_bytes, host)
        offset += piece


def _below(state: State, start: int, length_bytes: int, host: int | None) -> Iterator[Extent]:
    """The states of an unallocated run: those of the backing disk one level deeper, a hole past its end. ``host``: the place
    that is kept for it."""
    inside = max(0, min(length_bytes, state.backing_bytes - start))
    if inside and state.backing is not None:
        for extent in state.backing.extents(start, inside):
            yield extent._replace(depth=extent.depth + 1)
    if inside < length_bytes:
        kept = None if host is None else host + inside
        yield Extent(start + inside, length_bytes - inside, zero=True, data=False, present=False, host_offset=kept)
