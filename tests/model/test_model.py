"""The engine against a ``bytearray``: a state machine of guest operations over every shape of image.

Clusters from 512 bytes to 2 MiB, narrow and wide refcounts, both versions, backing files shorter and longer than the overlay,
an image with compressed and shared clusters, and caches so small that nearly every operation has to commit first. After each
run QEMU is asked twice: is the image sound, with no cluster leaked, and does it hold what the model holds.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cowfence.crash.images import tagged
from cowfence.crash.structure import fatal_findings
from cowfence.disk.base import BLOCKED, Disk, Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.image import CacheMode, Options, Qcow2Disk, open_image
from cowfence.storage.base import Buffer, Storage
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.units import KIB, MIB, SECTOR_BYTES
from crash.scenarios import compressed, image, short_l1, snapshotted, written
from judges import run

SIZES = {
    512: 100 * KIB + 512,
    4096: 2 * MIB + 50 * KIB,
    16384: 200 * KIB + 512,
    65536: 600 * KIB + 512,
    2 * MIB: 5 * MIB + 1024,
}
"""Bytes of the disk for each cluster size: more than one L2 table where that is cheap, and a last cluster that is cut short."""

EXAMPLES = {512: 40, 4096: 25, 16384: 20, 65536: 15, 2 * MIB: 10}
"""Runs for each cluster size, most where the tables are smallest."""

STEPS = 50
_steps_taken = 0


@dataclass(frozen=True)
class Shape:
    """What an image is like and how it is opened. ``backing``: format and whether it is longer than the overlay."""

    cluster_bytes: int
    refcount_bits: int
    version: int
    extended: bool
    backing: tuple[str, bool] | None
    cache_tables: int
    on_file: bool
    mode: CacheMode
    aged: bool


def shapes(cluster_bytes: int) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        cluster_bytes=st.just(cluster_bytes),
        refcount_bits=st.sampled_from([16, 1, 64]),
        version=st.sampled_from([3, 2]) if cluster_bytes != 16384 else st.just(3),
        extended=st.booleans() if cluster_bytes == 65536 else st.just(cluster_bytes == 16384),
        backing=st.sampled_from([None, ("raw", False), ("raw", True), ("qcow2", False), ("qcow2", True)]),
        cache_tables=st.sampled_from([64, 1, 2]),
        on_file=st.sampled_from([False, False, False, True]),
        mode=st.sampled_from([CacheMode.WRITEBACK, CacheMode.WRITEBACK, CacheMode.WRITEBACK, CacheMode.WRITETHROUGH]),
        aged=st.booleans(),
    )


@functools.cache
def aged_image() -> bytes:
    """Compressed, shared and plain clusters, and an L1 table that is shorter than the disk asks for."""
    used = written(image(size=SIZES[512]), (0, 6 * 512), (40 * 512, 512))
    return snapshotted(compressed(used, 512))


@functools.cache
def backing_file(kind: str, cluster_bytes: int, size_bytes: int) -> bytes:
    """The content of a backing file: in its first part data, then a hole, then data."""
    size_bytes -= size_bytes % SECTOR_BYTES
    third = size_bytes // 3 // SECTOR_BYTES * SECTOR_BYTES
    head, tail = tagged(0, third, 70), tagged(2 * third, size_bytes - 2 * third, 71)
    if kind == "raw":
        return head + bytes(third) + tail
    storage = MemoryStorage(name="base")
    write_new(storage, NewImage(size_bytes, min(cluster_bytes, 4096)))
    disk = open_image(storage, backing=None, writable=True, options=Options(commit_interval=None))
    disk.write(0, head)
    disk.write(2 * third, tail)
    disk.close()
    return storage.snapshot()


Place: TypeAlias = tuple[int, int, int]
"""Where and how much, in units of 1 byte, a sector or a cluster: see ``Model.range``."""
PLACES: st.SearchStrategy[Place] = st.tuples(st.integers(0, 5000), st.integers(0, 300), st.integers(0, 2))


class Model(RuleBasedStateMachine):
    """One disk, closed and opened again now and then."""

    folder: Path
    cluster_bytes: int
    disk: Qcow2Disk | None = None

    @initialize(data=st.data())
    def create(self, data: st.DataObject) -> None:
        self.shape = shape = data.draw(shapes(self.cluster_bytes))
        self.serial = 0
        size = SIZES[shape.cluster_bytes]
        self.base: bytes | None = None
        if shape.aged and shape.cluster_bytes == 512 and shape.version == 3 and shape.backing is None:
            self.content = short_l1(aged_image()) if shape.cache_tables > 1 else aged_image()
        else:
            backing_name = backing_format = None
            if shape.backing is not None:
                backing_format, longer = shape.backing
                backing_name = "base"
                self.base = backing_file(backing_format, shape.cluster_bytes, size * 5 // 4 if longer else size * 2 // 3)
            storage = MemoryStorage(name="image")
            wanted = NewImage(
                size,
                shape.cluster_bytes,
                shape.refcount_bits if shape.version == 3 else 16,
                shape.version,
                extended_l2=shape.extended and shape.version == 3,
                backing_name=backing_name,
                backing_format=backing_format,
            )
            write_new(storage, wanted)
            self.content = storage.snapshot()
        self.open()
        self.model = bytearray(self.the_disk.read(0, size))
        if self.base is not None:
            with self.open_backing() as backing:
                inside = min(size, backing.size)
                assert self.model == backing.read(0, inside) + bytes(size - inside)

    # Opening and closing

    def open_backing(self) -> _Closing:
        assert self.base is not None
        assert self.shape.backing is not None
        storage = MemoryStorage(self.base, name="base", writable=False)
        if self.shape.backing[0] == "raw":
            return _Closing(RawDisk(storage))
        return _Closing(open_image(storage, backing=None, writable=False))

    def open(self) -> None:
        shape = self.shape
        storage: Storage
        if shape.on_file:
            path = self.folder / "live.qcow2"
            path.write_bytes(self.content)
            storage = FileStorage.open(path, writable=True)
        else:
            storage = MemoryStorage(self.content, name="image")
        options = Options(cache_bytes=shape.cache_tables * shape.cluster_bytes, mode=shape.mode, commit_interval=None)
        backing = self.open_backing().disk if self.base is not None else None
        self.disk = open_image(storage, backing=backing, writable=True, options=options)

    @property
    def the_disk(self) -> Qcow2Disk:
        assert self.disk is not None
        return self.disk

    def bytes_on_host(self) -> bytes:
        if self.shape.on_file:
            return (self.folder / "live.qcow2").read_bytes()
        storage = self.the_disk.storage
        assert isinstance(storage, MemoryStorage)
        return storage.snapshot()

    def leave(self, *, close: bool) -> None:
        """Close the disk, or drop it as a killed process would."""
        if close:
            self.the_disk.close()
        self.content = self.bytes_on_host()
        if not close:
            self.the_disk.storage.close()
        self.disk = None

    def judge_structure(self) -> None:
        if self.shape.cluster_bytes <= 4096:
            assert fatal_findings(self.content) == []

    # Ranges

    def range(self, place: Place) -> tuple[int, int]:
        """The range of the disk that ``place`` means: its offset and length in bytes."""
        at, span, unit = place
        step = (1, SECTOR_BYTES, self.shape.cluster_bytes)[unit]
        size = len(self.model)
        offset = at * (step if unit else 977) % size
        length_bytes = span % 12 * step if unit else span * 31
        longest = 3 * max(self.shape.cluster_bytes, 40 * KIB)
        return offset, min(length_bytes, size - offset, longest)

    def data(self, length_bytes: int) -> bytes:
        self.serial += 1
        return random.Random(self.serial).randbytes(length_bytes)

    # Steps

    @rule(place=PLACES)
    def read(self, place: Place) -> None:
        _count()
        offset, length_bytes = self.range(place)
        assert self.the_disk.read(offset, length_bytes) == self.model[offset : offset + length_bytes]

    @rule(fua=st.booleans(), place=PLACES)
    def write(self, place: Place, fua: bool) -> None:
        _count()
        offset, length_bytes = self.range(place)
        data = self.data(length_bytes)
        self.the_disk.write(offset, data, fua=fua)
        self.model[offset : offset + length_bytes] = data

    @rule(unmap=st.booleans(), place=PLACES)
    def zero(self, place: Place, unmap: bool) -> None:
        _count()
        offset, length_bytes = self.range(place)
        self.the_disk.zero(offset, length_bytes, unmap=unmap)
        self.model[offset : offset + length_bytes] = bytes(length_bytes)

    @rule(place=PLACES)
    def discard(self, place: Place) -> None:
        _count()
        offset, length_bytes = self.range(place)
        self.the_disk.discard(offset, length_bytes)
        self.take_discarded(offset, length_bytes)

    def take_discarded(self, offset: int, length_bytes: int) -> None:
        """Each sector of a discarded range is old or zero; which of them, the model takes from the disk."""
        now = self.the_disk.read(offset, length_bytes)
        at = 0
        while at < length_bytes:
            piece = min(SECTOR_BYTES - (offset + at) % SECTOR_BYTES, length_bytes - at)
            part = now[at : at + piece]
            assert part == self.model[offset + at : offset + at + piece] or part == bytes(piece)
            at += piece
        self.model[offset : offset + length_bytes] = now

    @rule()
    def flush(self) -> None:
        _count()
        self.the_disk.flush()

    @rule(place=PLACES)
    def extents(self, place: Place) -> None:
        """Extents lie end to end over the range, and what they say of its bytes is so."""
        _count()
        offset, length_bytes = self.range(place)
        host = self.bytes_on_host()
        position = offset
        for extent in self.the_disk.extents(offset, length_bytes):
            assert extent.start == position
            assert extent.length_bytes > 0
            position = extent.end
            guest = self.model[extent.start : extent.end]
            if extent.zero:
                assert not any(guest)
            elif extent.depth == 0 and extent.host_offset is not None:
                stored = host[extent.host_offset : extent.host_offset + extent.length_bytes]
                assert stored.ljust(extent.length_bytes, b"\0") == guest
        assert position == offset + length_bytes

    @rule(
        wanted=st.lists(
            st.tuples(st.sampled_from(Verb), PLACES, st.booleans()),
            min_size=1,
            max_size=12,
        ),
        wait=st.booleans(),
    )
    def submit(self, wanted: list[tuple[Verb, Place, bool]], wait: bool) -> None:
        """A batch whose ranges do not overlap; what is blocked is submitted again by a caller that may wait."""
        _count()
        taken: list[tuple[int, int]] = []
        requests: list[Request] = []
        for verb, place, flag in wanted:
            offset, length_bytes = self.range(place)
            if any(offset < end and start < offset + length_bytes for start, end in taken):
                continue
            taken.append((offset, offset + length_bytes))
            data: Buffer = self.data(length_bytes) if verb is Verb.WRITE else b""
            changes = verb in (Verb.WRITE, Verb.ZERO)
            requests.append(Request(verb, offset, length_bytes, data, fua=changes and flag, unmap=not flag))
        outcomes = self.the_disk.submit(requests, wait=wait)
        blocked = [index for index, outcome in enumerate(outcomes) if outcome is BLOCKED]
        assert not (blocked and wait)
        if blocked:
            again = self.the_disk.submit([requests[index] for index in blocked], wait=True)
            for index, outcome in zip(blocked, again, strict=True):
                outcomes[index] = outcome
        for request, outcome in zip(requests, outcomes, strict=True):
            verb, offset, length_bytes, data, _, _ = request
            assert not isinstance(outcome, CowfenceError)
            if verb is Verb.READ:
                assert outcome == self.model[offset : offset + length_bytes]
            elif verb is Verb.WRITE:
                self.model[offset : offset + length_bytes] = data
            elif verb is Verb.ZERO:
                self.model[offset : offset + length_bytes] = bytes(length_bytes)
            elif verb is Verb.DISCARD:
                self.take_discarded(offset, length_bytes)

    @rule(close=st.booleans())
    def reopen(self, close: bool) -> None:
        _count()
        if not close:
            self.the_disk.flush()
        self.leave(close=close)
        self.judge_structure()
        self.open()
        assert self.the_disk.read(0, len(self.model)) == self.model

    def teardown(self) -> None:
        if self.disk is None:
            return
        assert self.disk.read(0, len(self.model)) == self.model
        # QEMU opens no image whose L1 table is short; a write to the last cluster has it grown.
        self.disk.write(len(self.model) - 1, b"e")
        self.model[-1:] = b"e"
        self.leave(close=True)
        self.judge_structure()
        if self.base is not None:
            (self.folder / "base").write_bytes(self.base)
        (self.folder / "image").write_bytes(self.content)
        (self.folder / "model").write_bytes(self.model)
        run(["qemu-img", "check", "-q", "-f", "qcow2", self.folder / "image"])
        run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", self.folder / "image", self.folder / "model"])


class _Closing:
    """A backing disk that is closed at the end of a ``with``, or handed on."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    def __enter__(self) -> Disk:
        return self.disk

    def __exit__(self, *_: object) -> None:
        self.disk.close()


def _count() -> None:
    global _steps_taken
    _steps_taken += 1


@pytest.fixture
def ram_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: QEMU's tools sync what they close."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("cluster_bytes", sorted(SIZES))
def test_model(cluster_bytes: int, ram_folder: Path) -> None:
    Model.folder, Model.cluster_bytes = ram_folder, cluster_bytes
    before = _steps_taken
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=EXAMPLES[cluster_bytes],
            stateful_step_count=STEPS,
            derandomize=True,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert _steps_taken - before >= EXAMPLES[cluster_bytes] * STEPS * 3 // 4
