"""Changing the header as a whole, atomically: one write of sector 0 (crash contract, R5).

The fields stand in sector 0, and so do the extensions that may change (backing format, bitmaps, encryption, data file), first
in the chain. What follows them (feature names, extensions that we do not know) may stand further back in the first cluster,
where a filler extension leads to it. A header laid out otherwise is brought into that shape by the change that needs it:

    PREPARE   the rest of the chain, and the backing file's name, in bytes of cluster 0 that are not used yet   | fence
    LINK      sector 0: the fields, the extensions that change, the filler                                      | fence

Where cluster 0 has no room for the old and the new version side by side, the feature name table, which serves messages only, is
left out. A filler is an extension of a type that nobody knows, so that every reader skips it. The name always stands behind the
chain, where readers end their search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from cowfence.errors import Unsupported
from cowfence.qcow2.extensions import END_BYTES, Extension, ExtensionType, encode_chain
from cowfence.qcow2.header import Header, encode_fields, parse_header
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind
from cowfence.qcow2.transaction import Stage
from cowfence.units import SECTOR_BYTES, align_up

FILLER_TYPE: Final = 0x46494C4C
"""Of an extension that means nothing; repair gives it to one that shall be ignored, too."""
_CHANGING: Final = (
    ExtensionType.BACKING_FORMAT,
    ExtensionType.DATA_FILE_NAME,
    ExtensionType.ENCRYPTION,
    ExtensionType.BITMAPS,
)


class Plan(NamedTuple):
    """``prepare``: (offset, bytes) behind sector 0. ``sector``: the new sector 0."""

    prepare: list[tuple[int, bytes]]
    sector: bytes


def switch_header(state: State, change: Callable[[Header], Header]) -> None:
    """Enter into the pending transaction of an alteration what makes the header ``change(header)``; that gets the header as it
    is on disk now, and gives it back with other values (``dataclasses.replace``).

    A header remembered from before will not do: the refcount table may have grown into another place since, for the
    reservation of this very plan too. Raises Unsupported where the first cluster has no room for it, and the storage's errors;
    then nothing was entered.
    """
    assert all(entry.kind is not Kind.HEADER for entry in state.pending.loose), "one change of the header at a time"
    area = bytearray(state.geometry.cluster_bytes)
    state.storage.readv(0, (area,))
    now = parse_header(bytes(area), state.storage.name)
    plan = plan_header(bytes(area), now, change(now), state.storage.name)
    for offset, data in plan.prepare:
        state.pending.put(Stage.PREPARE, offset, data, "header.new", Kind.HEADER)
    state.pending.patch_header(0, plan.sector, "header.link")


def with_extension(header: Header, kind: ExtensionType, data: bytes | None) -> tuple[Extension, ...]:
    """The extensions of ``header`` with one put in, replaced, or (None) taken out."""
    rest = tuple(extension for extension in header.extensions if extension.type != kind)
    return rest if data is None else (Extension(kind, data), *rest)


def plan_header(cluster0: bytes, old: Header, wanted: Header, name: str) -> Plan:
    """How to get from the header in ``cluster0``, which is ``old``, to ``wanted``. Raises Unsupported."""
    changing = [extension for extension in wanted.extensions if extension.type in _CHANGING]
    others = [extension for extension in wanted.extensions if extension.type not in (*_CHANGING, FILLER_TYPE)]
    without_names = [extension for extension in others if extension.type != ExtensionType.FEATURE_NAMES]
    for rest in (others, without_names) if len(without_names) < len(others) else (others,):
        found = _Layout(cluster0, old, wanted).fit(changing, rest)
        if found is not None:
            return found
    raise Unsupported(name, "this change of the header: its first cluster has no room for the old and the new version")


class _Layout:
    """What stands where in cluster 0."""

    def __init__(self, cluster0: bytes, old: Header, wanted: Header) -> None:
        self._old_bytes = cluster0
        self._old = old
        self._wanted = wanted
        self._name = wanted.backing_name or b""
        self._used: list[tuple[int, int]] = []
        """(start, end) of what the old header uses behind sector 0."""
        self._boundaries: list[int] = []
        """Where extensions of the old chain begin."""
        at = old.header_length
        for extension in old.extensions:
            length_bytes = 8 + (align_up(len(extension.data), 8) if extension.type != FILLER_TYPE else 0)
            self._use(at, length_bytes)
            self._boundaries.append(at)
            at += 8 + align_up(len(extension.data), 8)
        self._use(at, END_BYTES)
        self._boundaries.append(at)
        if old.backing_name:
            self._use(old.backing_offset, len(old.backing_name))

    def _use(self, start: int, length_bytes: int) -> None:
        if start + length_bytes > SECTOR_BYTES:
            self._used.append((max(start, SECTOR_BYTES), start + length_bytes))

    def fit(self, changing: Sequence[Extension], rest: Sequence[Extension]) -> Plan | None:
        """The plan, or None where it does not fit."""
        at = self._wanted.header_length
        whole = encode_chain([*changing, *rest])
        if at + len(whole) <= SECTOR_BYTES:
            return self._finish(whole, None, b"")
        head = encode_chain(changing)[:-END_BYTES]
        filler_at = at + len(head)
        tail = encode_chain(rest)
        if filler_at + 8 > SECTOR_BYTES:
            return None
        for place in self._places(tail):
            filler = FILLER_TYPE.to_bytes(4) + (place - filler_at - 8).to_bytes(4)
            found = self._finish(head + filler, place, tail)
            if found is not None:
                return found
        return None

    def _places(self, tail: bytes) -> Iterator[int]:
        """Where the rest of the chain may stand: where it stands already, else in free bytes."""
        for at in self._boundaries:
            if at >= SECTOR_BYTES and self._old_bytes[at : at + len(tail)] == tail:
                yield at
        yield from self._free(SECTOR_BYTES, len(tail))

    def _free(self, start: int, length_bytes: int) -> Iterator[int]:
        """Offsets from ``start`` on, behind sector 0, with so many bytes that the old header does not use."""
        for at in sorted({start, *(align_up(end, 8) for _, end in self._used if end > start)}):
            end = at + length_bytes
            if end <= self._wanted.cluster_bytes and all(end <= first or at >= last for first, last in self._used):
                yield at

    def _finish(self, chain: bytes, place: int | None, tail: bytes) -> Plan | None:
        """Sector 0 with ``chain`` in it, and the name behind all."""
        prepare = []
        end = self._wanted.header_length + len(chain)
        if place is not None:
            end = place + len(tail)
            if self._old_bytes[place:end] != tail:
                prepare.append((place, tail))
        name_at = 0
        in_sector = b""
        if self._name:
            same = self._name == self._old.backing_name and self._old.backing_offset >= end
            if same:
                name_at = self._old.backing_offset
                in_sector = self._name[: max(0, SECTOR_BYTES - name_at)]
            elif end + len(self._name) <= SECTOR_BYTES:
                name_at, in_sector = end, self._name
            else:
                free = next(self._free(max(SECTOR_BYTES, align_up(end, 8)), len(self._name)), None)
                if free is None:
                    return None
                name_at = free
                prepare.append((name_at, self._name))
        sector = encode_fields(self._wanted, name_at) + chain
        if in_sector:
            sector = sector.ljust(name_at, b"\0") + in_sector
        return Plan(prepare, sector[:SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0"))
