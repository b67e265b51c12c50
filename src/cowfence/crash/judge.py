"""The judge: looks at a state once, and knows for which other states the very same look would see the same.

Looking means: judge the structure, open the image for reading and read the whole disk, and, where asked for, repair a copy
and go on working on another. All of it is deterministic and reads the state's bytes through a tracker, unit by unit in order.
So the looks form a tree: which unit is read next depends only on the bytes read before. A state that takes the same way through
the tree as one before it, down to the leaf, shares what was seen there, exactly: what it differs in else was never read.

Units that hold nothing but plain data of the guest are no branches of the tree: their bytes decide nothing, they only pass
through to the guest. The look has verified that the guest reads them; a state that shares the leaf has its own bytes put in
their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from cowfence.crash.device import CrashState, Unit
from cowfence.crash.images import DATA
from cowfence.crash.structure import Bitmap, Finding, Structure, active_digest, inspect
from cowfence.disk.base import Disk
from cowfence.errors import CowfenceError, Invalid
from cowfence.extents import Extent
from cowfence.ops.backup import BackupPlan, begin_backup, end_backup, plan_of
from cowfence.qcow2.image import Qcow2Disk
from cowfence.qcow2.repair import Mode, repair
from cowfence.storage.base import Buffer, Storage, WritableBuffer
from cowfence.storage.memory import MemoryStorage
from cowfence.units import SECTOR_BYTES

_MAGIC: Final = b"QFI\xfb"


class Subject(Protocol):
    """What is judged: how its files make a disk."""

    @property
    def image(self) -> str:
        """The file that is the qcow2 image; the others are its backing and data files."""
        ...

    def open(self, files: Mapping[str, Storage], *, writable: bool) -> Disk:
        """Open the disk. Raises the errors of the tree."""
        ...


@dataclass(slots=True, eq=False)
class Seen:
    """What a state shows."""

    error: str | None = None
    """Why it does not open or read."""
    changed: dict[int, bytes] = field(default_factory=dict)
    """Guest sectors that differ from the disk before the log."""
    structure: Structure = field(default_factory=Structure)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(clause, what) of life after the crash and of repair."""
    taken_back: list[Bitmap] = field(default_factory=list)
    """What a backup that was going on has as its bitmap, once it is ended as one that failed."""


class _Datum(NamedTuple):
    """A guest sector that is part of a unit of plain data, and what it held before the log."""

    unit: Unit
    within: int
    sector: int
    before: bytes


@dataclass(slots=True, eq=False)
class _Leaf:
    seen: Seen
    passing: frozenset[Unit]
    """Units of plain data."""
    data: list[_Datum] = field(default_factory=list)

    def seen_in(self, state: CrashState) -> Seen:
        """What was seen, with the state's own bytes where data of the guest stand."""
        if not self.data:
            return self.seen
        seen = self.seen
        changed = dict(seen.changed)
        for unit, within, sector, before in self.data:
            value = state.unit_data(unit)
            if within or len(value) != SECTOR_BYTES:
                value = value[within : within + SECTOR_BYTES]
            if value != before:
                changed[sector] = value
        return Seen(seen.error, changed, seen.structure, seen.problems, seen.taken_back)


class _Tracked(MemoryStorage):
    """A file of a state that notes, unit by unit in order, what is read of it. Units that were written over whole (``own``)
    hold nothing of the state any more."""

    __slots__ = ("_file", "_order", "_unit_bytes", "own")

    def __init__(
        self, content: bytes, file: str, order: dict[Unit, None], unit_bytes: int, own: set[int], *, writable: bool
    ) -> None:
        super().__init__(content, name=file, writable=writable)
        self._file = file
        self._order = order
        self._unit_bytes = unit_bytes
        self.own = own

    def touch(self, offset: int, length_bytes: int) -> None:
        if length_bytes > 0:
            order, file, own = self._order, self._file, self.own
            for number in range(offset // self._unit_bytes, (offset + length_bytes - 1) // self._unit_bytes + 1):
                if number not in own:
                    order.setdefault((file, number))

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        end = offset + sum(len(buffer) for buffer in buffers)
        self.own.update(range(-(-offset // self._unit_bytes), end // self._unit_bytes))
        super().writev(offset, buffers, mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self.own.update(range(-(-offset // self._unit_bytes), (offset + length_bytes) // self._unit_bytes))
        super().discard(offset, length_bytes, mark)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        self.touch(offset, sum(len(buffer) for buffer in buffers))
        return super().readv(offset, buffers, wait=wait)

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        self.touch(offset, length_bytes)
        return super().read_cached(offset, length_bytes)


@dataclass(slots=True)
class _Node:
    unit: Unit
    children: dict[int, _Node | _Leaf] = field(default_factory=dict)


class Judge:
    """Looks at states of a disk that held ``before``. ``live``: repair and go on working too (C10 to C12)."""

    def __init__(self, subject: Subject, before: bytes, *, unit_bytes: int = SECTOR_BYTES, live: bool = True) -> None:
        self._subject = subject
        self._before = before
        self._unit_bytes = unit_bytes
        self._live = live
        self._roots: dict[tuple[int, ...], _Node | _Leaf] = {}
        self.looks = 0
        """States that were really opened."""

    def look(self, state: CrashState) -> Seen:
        """What the state shows, seen now or before."""
        lengths = state.key[1]
        node = self._roots.get(lengths)
        while node is not None:
            if isinstance(node, _Leaf):
                return node.seen_in(state)
            node = node.children.get(state.unit_key(node.unit))
        order: dict[Unit, None] = {}
        leaf = self._look(state.contents(), order)
        self.looks += 1
        self._remember(state, lengths, [unit for unit in order if unit not in leaf.passing], leaf)
        return leaf.seen_in(state)

    def _remember(self, state: CrashState, lengths: tuple[int, ...], order: list[Unit], leaf: _Leaf) -> None:
        node = self._roots.setdefault(lengths, _Node(order[0]))
        for at, unit in enumerate(order):
            # Both ways read the same up to here, so both read the same unit next.
            if not isinstance(node, _Node) or node.unit != unit:
                raise AssertionError(f"the judge does not look twice in the same order: {unit}")
            key = state.unit_key(unit)
            if at + 1 == len(order):
                node.children[key] = leaf
            else:
                node = node.children.setdefault(key, _Node(order[at + 1]))

    def _look(self, contents: Mapping[str, bytes], order: dict[Unit, None]) -> _Leaf:
        subject = self._subject
        seen = Seen()

        def files(*, writable: bool, after: Mapping[str, _Tracked] | None = None) -> dict[str, _Tracked]:
            """The files anew; ``after``: the image, and its data file, as they were left."""
            made = {}
            for file, content in contents.items():
                mine = file in (subject.image, DATA)
                own = after[file].own if after is not None and mine else set()
                whole = after[file].snapshot() if after is not None and mine else content
                made[file] = _Tracked(whole, file, order, self._unit_bytes, own, writable=writable and mine)
            return made

        reading = files(writable=False)
        seen.structure = inspect(contents[subject.image], reading[subject.image].touch)
        for file, content in contents.items():
            if file != subject.image and content.startswith(_MAGIC):
                found = inspect(content, reading[file].touch).findings
                seen.structure.findings += [Finding(f"{file}: {finding.text}") for finding in found]
        # Decided by what was read so far, so that every state that shares this part of the way agrees.
        passing = self._passing(seen.structure, set(order))
        try:
            disk = subject.open(reading, writable=False)
            guest = disk.read(0, disk.size)
        except CowfenceError as error:
            seen.error = str(error)
            return _Leaf(seen, passing)
        if seen.structure.raw:
            alone = reading[DATA].snapshot()[: len(guest)].ljust(len(guest), b"\0")
            if alone != guest:
                seen.problems.append(("C15", "the data file, which is raw, does not read as the disk does"))
        if self._live and not seen.structure.findings:
            if not seen.structure.dirty:
                seen.problems.extend(_repaired(subject, files, seen, guest))
            seen.problems.extend(_lived_on(subject, files, seen, guest))
            seen.problems.extend(_backed_up(subject, files, seen))
        data = self._data(contents[self._data_file(seen.structure)], guest, seen.structure, passing)
        passed = {datum.sector for datum in data}
        for sector in range(-(-max(len(guest), len(self._before)) // SECTOR_BYTES)):
            value = guest[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]
            if sector not in passed and value != self._sector_before(sector):
                seen.changed[sector] = value
        return _Leaf(seen, passing, data)

    def _passing(self, structure: Structure, tables: set[Unit]) -> frozenset[Unit]:
        """The units of plain data that hold no table, compressed cluster or data of a snapshot."""
        file, data_bytes = self._data_file(structure), structure.data_bytes
        return frozenset(
            unit
            for _, host_at in structure.data
            for number in range(host_at // self._unit_bytes, (host_at + data_bytes - 1) // self._unit_bytes + 1)
            if (unit := (file, number)) not in tables
        )

    def _data_file(self, structure: Structure) -> str:
        """The file in which the guest's data stands."""
        return DATA if structure.external else self._subject.image

    def _data(self, content: bytes, guest: bytes, structure: Structure, passing: frozenset[Unit]) -> list[_Datum]:
        """The guest's sectors in those units."""
        data = []
        for guest_at, host_at in structure.data:
            for at in range(0, structure.data_bytes, SECTOR_BYTES):
                host, sector = host_at + at, (guest_at + at) // SECTOR_BYTES
                unit = (self._data_file(structure), host // self._unit_bytes)
                value = guest[guest_at + at : guest_at + at + SECTOR_BYTES]
                if unit not in passing or not value:
                    continue
                if value != content[host : host + SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0"):
                    raise AssertionError(f"guest sector {sector} does not read what stands at {host:#x}")
                data.append(_Datum(unit, host % self._unit_bytes, sector, self._sector_before(sector)))
        return data

    def _sector_before(self, sector: int) -> bytes:
        return self._before[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES]


MakeFiles = Callable[..., dict[str, _Tracked]]


def _repaired(subject: Subject, files: MakeFiles, seen: Seen, guest: bytes) -> list[tuple[str, str]]:
    """Leaks are repaired on a copy: nothing but leaks is there, the guest sees nothing of it, and twice is once."""
    copy = files(writable=True)
    image = copy[subject.image]
    before = image.snapshot()
    try:
        repair(image, Mode.LEAKS)
        after = inspect(image.snapshot(), image.touch)
        if after.findings:
            return [("C12", f"repair of leaks leaves: {after.findings[0].text}")]
        if after.leaks:
            return [("C12", f"repair of leaks leaves {after.leaks} leaked clusters")]
        if after.facts != seen.structure.facts:
            return [("C12", "repair of leaks changes the image's facts or snapshots")]
        once = image.snapshot()
        if not _only_counts_differ(before, once, seen.structure) and _read(subject, copy) != guest:
            return [("C12", "repair of leaks changes what the guest reads")]
        repair(image, Mode.LEAKS)
        if image.snapshot() != once:
            return [("C11", "repairing twice is not repairing once")]
    except CowfenceError as error:
        return [("C12", f"repair of leaks fails: {error}")]
    return []


def _only_counts_differ(before: bytes, after: bytes, structure: Structure) -> bool:
    """True if two contents are the same but for refcount blocks, which no read looks at."""
    if before == after:
        return True
    if len(before) != len(after):
        return False
    kept = bytearray(after)
    for block in structure.blocks:
        kept[block : block + structure.cluster_bytes] = before[block : block + structure.cluster_bytes]
    return kept == before


def _read(subject: Subject, files: Mapping[str, Storage]) -> bytes:
    disk = subject.open(files, writable=False)
    return disk.read(0, disk.size)


def _lived_on(subject: Subject, files: MakeFiles, seen: Seen, guest: bytes) -> list[tuple[str, str]]:
    """Without repair: open for writing, write an old, a new and (where there are snapshots) a shared cluster, and flush."""
    copy = files(writable=True)
    image = copy[subject.image]
    expected = bytearray(guest)
    try:
        disk = subject.open(copy, writable=True)
    except CowfenceError as error:
        return [("C1", f"it does not open for writing: {error}")]
    try:
        for place in _places(disk):
            data = b"life after the crash".ljust(SECTOR_BYTES, b"+")
            disk.write(place, data)
            expected[place : place + SECTOR_BYTES] = data
        disk.flush()
        disk.close()
        after = inspect(image.snapshot(), image.touch)
        if after.findings:
            return [("C10", f"after more writes: {after.findings[0].text}")]
        if after.facts != seen.structure.facts:
            return [("C10", "more writes change the image's facts or snapshots")]
        if _read(subject, files(writable=False, after=copy)) != bytes(expected):
            return [("C10", "after more writes the guest does not read what it wrote")]
    except CowfenceError as error:
        return [("C10", f"it cannot be worked on: {error}")]
    return []


def _backed_up(subject: Subject, files: MakeFiles, seen: Seen) -> list[tuple[str, str]]:
    """Where the moment of a backup was kept: it can be taken back, unless its bitmap says that it is not to be trusted; and
    the next backup of that name keeps its own moment."""
    if not seen.structure.has_moment:
        return []
    copy = files(writable=True)
    image = copy[subject.image]
    try:
        disk = subject.open(copy, writable=True)
        assert isinstance(disk, Qcow2Disk)
        plan = next(plan for plan in map(plan_of, disk.snapshots()) if plan is not None)
        try:
            end_backup(disk, plan, failed=True)
        except Invalid as error:
            held = {bitmap.name: bitmap for bitmap in seen.structure.bitmaps}
            old = None if plan.bitmap is None else held.get(plan.bitmap.encode())
            if plan.bitmap is None or (old is not None and not old.in_use):
                return [("C14", f"a backup cannot be taken back: {error}")]
            plan = BackupPlan(plan.name)
        if plan.bitmap is not None:
            bits = disk.bitmaps.bits_of(plan.bitmap)
            seen.taken_back.append(Bitmap(plan.bitmap.encode(), bits.granularity_bits, 0, bytes(bits.packed)))
        begin_backup(disk, plan)
        moment = active_digest(image.snapshot(), image.touch)
        for place in _places(disk):
            disk.write(place, b"after the next moment".ljust(SECTOR_BYTES, b"+"))
        disk.close()
        after = inspect(image.snapshot(), image.touch)
        if after.findings:
            return [("C10", f"after another backup: {after.findings[0].text}")]
        kept = [snapshot for snapshot in after.facts["snapshots"] if snapshot[1] == plan.snapshot_name.encode()]  # type: ignore[attr-defined]
        if [snapshot[-1] for snapshot in kept] != [moment]:
            return [("C6", "another backup does not have what the disk was when it began")]
    except CowfenceError as error:
        return [("C10", f"no other backup can be made: {error}")]
    return []


def _places(disk: Disk) -> list[int]:
    """The first and the last sector that has data, and the first that has none."""
    data: list[Extent] = []
    holes: list[Extent] = []
    for extent in disk.extents(0, disk.size):
        (data if extent.data else holes).append(extent)
    places = []
    if data:
        places += [data[0].start, data[-1].end - SECTOR_BYTES]
    if holes:
        places.append(holes[0].start)
    return places
