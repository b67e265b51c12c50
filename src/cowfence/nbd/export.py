"""What a server exports: a disk under a name, and what may be asked about its blocks (metadata contexts)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Final

from cowfence.disk.base import Disk
from cowfence.extents import Extent
from cowfence.nbd.messages import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, State
from cowfence.nbd.negotiation import ExportInfo
from cowfence.nbd.stats import Stats
from cowfence.nbd.steady import SteadyFile
from cowfence.nbd.transmission import export_flags
from cowfence.units import KIB, MIB

_DESCRIPTORS_MAX: Final = 4096
_DIRTY: Final = 1

Ranges = Callable[[int, int], Iterable[tuple[int, int]]]
"""The dirty ranges (offset, length in bytes) of a bitmap from an offset to an end, or more, in order, as they are now."""


@dataclass(frozen=True, slots=True)
class Export:
    """A disk under a name. ``read_only`` refuses writes even where the disk would take them. ``bitmaps``: whose ranges clients
    may ask for. ``allocation_depth``: they may ask which layer a range comes from. ``clients``: the names of certificates that
    may use it; None: anybody. ``steady``: the file behind it, where nobody changes that."""

    disk: Disk
    read_only: bool = False
    description: str = ""
    bitmaps: Mapping[str, Ranges] = field(default_factory=dict)
    allocation_depth: bool = False
    clients: frozenset[str] | None = None
    steady: SteadyFile | None = None
    stats: Stats = field(default_factory=Stats)
    held: Event = field(default_factory=Event)
    """Set while its disk is made another one: no client gets it then. Only the serving thread sets it (``Server.call``), when
    there is none."""

    @property
    def writable(self) -> bool:
        return self.disk.writable and not self.read_only

    @property
    def contexts(self) -> tuple[str, ...]:
        """The names of its metadata contexts. Their ids are their places here, from 1 on."""
        depth = (ALLOCATION_DEPTH,) if self.allocation_depth else ()
        return (BASE_ALLOCATION, *depth, *(DIRTY_BITMAP + name for name in self.bitmaps))

    def status(self, context_id: int, offset: int, length_bytes: int, *, one: bool = False) -> list[tuple[int, int]]:
        """Descriptors (length in bytes, state) of a range, neighbours of one state merged: at least one, at most one or 4,096,
        none past the range. Raises what the disk raises."""
        context = self.contexts[context_id - 1]
        if context.startswith(DIRTY_BITMAP):
            ranges = self.bitmaps[context.removeprefix(DIRTY_BITMAP)]
            runs = _dirty(ranges(offset, offset + length_bytes), offset, offset + length_bytes)
        else:
            state = _depth_state if context == ALLOCATION_DEPTH else _allocation_state
            extents = self.disk.extents(offset, length_bytes)
            runs = ((extent.start, extent.length_bytes, state(extent)) for extent in extents)
        return block_descriptors(runs, offset, length_bytes, 1 if one else _DESCRIPTORS_MAX)


class ExportTable(Mapping[str, ExportInfo]):
    """The exports as the handshake sees them; a disk is asked about itself only when a client names it.

    ``shared``: more than one client at a time may come. ``names``: of the client's certificate; an export that is for others is
    as if it were not there.
    """

    def __init__(self, exports: Mapping[str, Export], *, shared: bool, names: frozenset[str] = frozenset()) -> None:
        self._exports = exports
        self._shared = shared
        self._names = names

    def __getitem__(self, name: str) -> ExportInfo:
        export = self._exports[name]
        if not self._may_use(export):
            raise KeyError(name)
        preferred_bytes = 1 << max(export.disk.block_bytes - 1, 0).bit_length()
        return ExportInfo(
            name,
            export.disk.size,
            export_flags(writable=export.writable, shared=self._shared),
            export.description,
            preferred_block_bytes=min(max(preferred_bytes, 4 * KIB), 2 * MIB),
            contexts=export.contexts,
            held=export.held.is_set(),
        )

    def _may_use(self, export: Export) -> bool:
        return export.clients is None or bool(export.clients & self._names)

    def __iter__(self) -> Iterator[str]:
        return (name for name, export in list(self._exports.items()) if self._may_use(export))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _allocation_state(extent: Extent) -> int:
    # As QEMU has it: what no bytes are read for is a hole, whether its entry says zeros or nothing.
    return (0 if extent.data else int(State.HOLE)) | (int(State.ZERO) if extent.zero else 0)


def _depth_state(extent: Extent) -> int:
    return extent.depth + 1 if extent.present else 0


def _dirty(ranges: Iterable[tuple[int, int]], offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    position = offset
    for start, length_bytes in ranges:
        start, stop = max(start, position), min(start + length_bytes, end)
        if stop <= start:
            continue
        yield position, start - position, 0
        yield start, stop - start, _DIRTY
        position = stop
    yield position, end - position, 0


def block_descriptors(runs: Iterable[tuple[int, int, int]], offset: int, length_bytes: int, most: int) -> list[tuple[int, int]]:
    """Descriptors (length in bytes, state) of a range out of runs (offset, length in bytes, state).

    What the runs leave out, or say about other ranges, has state 0: for base:allocation allocated data, which "a server MAY
    always safely report".
    """
    descriptors: list[tuple[int, int]] = []
    position, end = offset, offset + length_bytes
    run_bytes, run_state = 0, 0
    for start, run_length_bytes, state in runs:
        stop = min(start + run_length_bytes, end)
        if stop <= position or start > position:
            continue
        if state != run_state and run_bytes:
            descriptors.append((run_bytes, run_state))
            run_bytes = 0
            if len(descriptors) >= most:
                return descriptors
        run_state = state
        run_bytes += stop - position
        position = stop
        if position == end:
            break
    if run_bytes:
        descriptors.append((run_bytes, run_state))
    return descriptors or [(length_bytes, 0)]
