"""Hostile images: parsed, or refused by name, and nothing else.

Every mutation of every image is opened for reading and read, then opened for writing and written, zeroed, discarded, flushed
and closed. Each call works or raises an error of the tree that says what the caller can do. It takes at most 5 seconds and 256
MiB; and what is written never lands on a table that is in use.
"""

from __future__ import annotations

import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowfence.disk.base import BLOCKED, Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import Corrupt, CowfenceError, Invalid, NoSpace, NotThisFormat, ReadOnly, Refused, Unsupported
from cowfence.qcow2.image import Options, open_image
from cowfence.storage.base import Buffer, Storage
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import GIB, KIB, MIB
from hostile.corpus import FIELDS, NAMES, corpus, hostile_entries, patched, tables_of, words

ALLOWED = (Corrupt, Unsupported, NotThisFormat, Refused, ReadOnly, NoSpace, Invalid)
MEMORY_BYTES = 256 * MIB
SECONDS = 5.0
READ_BYTES = 4 * MIB
"""How much of a disk is read: its beginning and its end; all of it where it is not longer."""
FILE_BYTES = 48 * MIB
"""How long the file may become: a write behind that is refused, as a host refuses one that is too far out."""

KINDS_BY_MARK = {
    "l1.link": {"L1 table"},
    "l2.link": {"L2 table"},
    "refcount_table.link": {"refcount table"},
    "refcount.increment": {"refcount block"},
    "refcount.decrement": {"refcount block"},
    "header.link": {"header"},
    "copied_off.link": {"L1 table", "L2 table"},
    "copied_on.link": {"L1 table", "L2 table"},
}
"""On which kinds of tables a write may land; all other marks on none that is in use before and after."""

_BACKING = bytes(range(256)) * 512


class Watched(StorageWrapper):
    """Remembers what was written where, and refuses to grow without bound."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.written: list[tuple[int, int, str]] = []

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        length_bytes = sum(map(len, buffers))
        if offset + length_bytes > FILE_BYTES:
            raise NoSpace(f"{self.name}: no room at {offset}")
        self.written.append((offset, length_bytes, mark))
        self.inner.writev(offset, buffers, mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self.written.append((offset, length_bytes, mark))
        self.inner.discard(offset, length_bytes, mark)


class TooSlow(BaseException):
    """Raised by the alarm; no handler of the engine's takes it."""


@contextmanager
def bounded() -> Iterator[None]:
    """At most 256 MiB more than now, and 5 seconds."""

    def ring(_: int, __: FrameType | None) -> None:
        raise TooSlow

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _read(content: bytes) -> None:
    disk = open_image(MemoryStorage(content, "hostile", writable=False), backing=_backing(content), writable=False)
    size = disk.size
    for offset in (0, max(0, size - READ_BYTES)):
        try:
            disk.read(offset, min(size - offset, READ_BYTES))
        except ALLOWED:
            _read_in_pieces(disk.read, offset, min(size - offset, READ_BYTES))
    position = 0
    try:
        for extent in disk.extents(0, size):
            assert extent.start == position
            position = extent.end
        assert position == size
    except ALLOWED:
        pass
    disk.close()


def _read_in_pieces(read: object, offset: int, length_bytes: int) -> None:
    assert callable(read)
    for at in range(offset, offset + length_bytes, 64 * KIB):
        try:
            read(at, min(64 * KIB, offset + length_bytes - at))
        except ALLOWED:
            continue


def _backing(content: bytes) -> RawDisk | None:
    has_name = len(content) > 16 and content[8:16] != bytes(8)
    return RawDisk(MemoryStorage(_BACKING, "base", writable=False)) if has_name else None


def _change(storage: Storage, content: bytes) -> None:
    disk = open_image(storage, backing=_backing(content), writable=True, options=Options(commit_interval=None))
    size = disk.size
    places = sorted({offset for offset in (0, 512, 4 * KIB, 45 * KIB, 64 * KIB, 130 * KIB, size - 5000) if 0 <= offset < size})
    for offset in places:
        room = min(size - offset, 6 * KIB)
        for action in (
            lambda offset=offset, room=room: disk.write(offset, b"w" * min(room, 700)),
            lambda offset=offset, room=room: disk.zero(offset, room, unmap=False),
            lambda offset=offset, room=room: disk.write(offset, b"x" * room),
            lambda offset=offset, room=room: disk.discard(offset, room),
            disk.flush,
            lambda offset=offset, room=room: disk.write(offset, b"y" * room),
            lambda offset=offset, room=room: disk.zero(offset, room),
        ):
            try:
                action()
            except ALLOWED:
                continue
    end = min(size, 256 * KIB)
    requests = [Request(Verb.WRITE, at, 512, b"b" * 512) for at in range(0, end - 511, 9 * KIB)]
    requests += [Request(Verb.READ, at, 512) for at in range(KIB, end - 511, 9 * KIB)]
    for outcome in disk.submit(requests, wait=True):
        assert outcome is not BLOCKED
        assert not isinstance(outcome, CowfenceError) or isinstance(outcome, ALLOWED)
    for offset, length_bytes in ((0, size), (0, min(size, MIB))):
        try:
            if size < GIB:
                disk.discard(offset, length_bytes)
            else:
                disk.zero(offset, min(length_bytes, MIB))
        except ALLOWED:
            pass
    with suppress(*ALLOWED):
        disk.close()


def exercise(content: bytes, what: str) -> None:
    """The rule of this file for one image."""
    memory = MemoryStorage(content, "hostile")
    storage = Watched(memory)
    uses: tuple[Callable[[], None], ...] = (lambda: _read(content), lambda: _change(storage, content))
    for use in uses:
        try:
            with bounded():
                use()
        except ALLOWED:
            continue
        except TooSlow:
            pytest.fail(f"{what}: it took more than {SECONDS} s")
        except MemoryError:
            pytest.fail(f"{what}: it took more than {MEMORY_BYTES} bytes")
    check_tables(content, memory.snapshot(), storage.written, what)


def check_tables(before: bytes, after: bytes, written: list[tuple[int, int, str]], what: str) -> None:
    """No write landed on a table that was in use before and still is, but for changes of that very kind of table.

    Where a table was written anew, its cluster had been given up in between. The L2 tables of snapshots are not listed: the
    engine does not know them either.
    """
    if not written:
        assert before == after
        return
    first = tables_of(before)
    last = tables_of(after).clusters()
    in_use = {cluster: kind for cluster, kind in first.clusters().items() if last.get(cluster) == kind}

    def clusters(offset: int, length_bytes: int) -> range:
        return range(offset // first.cluster_bytes, (offset + length_bytes - 1) // first.cluster_bytes + 1)

    for offset, length_bytes, mark in written:
        if mark.endswith(".new"):
            for cluster in clusters(offset, length_bytes):
                in_use.pop(cluster, None)
    for offset, length_bytes, mark in written:
        for cluster in clusters(offset, length_bytes):
            kind = in_use.get(cluster)
            assert kind is None or kind in KINDS_BY_MARK.get(mark, ()), (
                f"{what}: {mark} landed on the {kind}, cluster {cluster}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_sound_image_works(name: str) -> None:
    content = corpus(name)
    with bounded():
        _read(content)
        _change(MemoryStorage(content, "sound"), content)


@pytest.mark.parametrize("name", NAMES)
def test_header_fields(name: str) -> None:
    content = corpus(name)
    end = len(content)
    is_large = name == "ours-2m"
    for field in FIELDS:
        bits = field.length_bytes * 8
        powers = {1 << bit for bit in (0, 1, 2, 3, 4, 5, 6, 8, 9, 16, 20, 22, 30, 31, 32, 40, 55, 56, 62, 63)}
        near = {1, 3, 4, 7, 8, 9, 14, 21, 22, 104, 105, 112, 511, 513, 1023, 1024, end, end - 512, end + 512, 65536, 65537}
        old = int.from_bytes(content[field.at : field.at + field.length_bytes])
        flips = {old ^ 1 << bit for bit in range(0, bits, 3)}
        if is_large:
            powers, near, flips = set(sorted(powers)[::3]), set(), set()
        values = powers | near | flips | {0, (1 << bits) - 1, (1 << bits) - 2, (1 << bits - 1) - 1, old + 1, max(old, 1) - 1}
        for value in sorted(value for value in values if value < 1 << bits):
            data = value.to_bytes(field.length_bytes)
            exercise(patched(content, field.at, data), f"{name}: {field.name} = {value:#x}")


@pytest.mark.parametrize("kind", ["L1 table", "L2 table", "refcount table", "refcount block", "snapshot's L1 table"])
@pytest.mark.parametrize("name", NAMES)
def test_table_entries(name: str, kind: str) -> None:
    content = corpus(name)
    tables = tables_of(content)
    chance = random.Random(f"{name} {kind}")
    values = hostile_entries(content, tables)
    if name == "ours-2m":
        values = chance.sample(values, 16)
    for offset, length_bytes in list(tables.of(kind))[:3]:
        entries = words(content, offset, length_bytes // 8)
        used = [index for index, entry in enumerate(entries) if entry][:3]
        free = [index for index, entry in enumerate(entries) if not entry][:1]
        for index in used + free:
            for value in values if len(used) < 3 else chance.sample(values, len(values) // 2):
                data = value.to_bytes(8)
                exercise(patched(content, offset + index * 8, data), f"{name}: {kind} at {offset:#x}[{index}] = {value:#x}")


@pytest.mark.parametrize("name", NAMES)
def test_whole_tables(name: str) -> None:
    """Tables that are filled with one word, or with noise."""
    content = corpus(name)
    tables = tables_of(content)
    chance = random.Random(name)
    for kind, offset, length_bytes in tables.places:
        if kind != "header":
            length_bytes = min(length_bytes, len(content) - offset)
            for value in chance.sample(hostile_entries(content, tables), 4 if name == "ours-2m" else 12):
                data = (value.to_bytes(8) * (length_bytes // 8 + 1))[:length_bytes]
                exercise(patched(content, offset, data), f"{name}: the whole {kind} is {value:#x}")
            exercise(patched(content, offset, chance.randbytes(length_bytes)), f"{name}: the {kind} is noise")


@pytest.mark.parametrize("name", NAMES)
def test_snapshot_table(name: str) -> None:
    content = corpus(name)
    tables = tables_of(content)
    for offset, _ in tables.of("snapshot table"):
        for at, length_bytes in ((0, 8), (8, 4), (12, 2), (14, 2), (36, 4), (40, 8), (48, 8)):
            bits = length_bytes * 8
            values = {0, 1, (1 << bits) - 1, 1 << bits - 1, 1 << bits // 2, 1 << 22, 1024, 1025}
            if not at:
                values |= set(hostile_entries(content, tables))
            for value in sorted(value for value in values if value < 1 << bits):
                data = value.to_bytes(length_bytes)
                exercise(patched(content, offset + at, data), f"{name}: byte {at} of the snapshot = {value:#x}")


@pytest.mark.parametrize("name", NAMES)
def test_truncated(name: str) -> None:
    content = corpus(name)
    chance = random.Random(name)
    step = max(512, len(content) // 60 // 512 * 512)
    random_places = [chance.randrange(len(content)) for _ in range(20)]
    if name == "ours-2m":
        step *= 6
        del random_places[6:]
    for length in [*range(0, 130, 7), *range(step, len(content), step), *random_places]:
        exercise(content[:length], f"{name}: cut at {length}")


def huge_claims() -> Iterator[tuple[str, bytes]]:
    small, big = corpus("ours-aged"), corpus("qemu-64k")

    def header(content: bytes, **values: int) -> bytes:
        for field in FIELDS:
            if field.name in values:
                content = patched(content, field.at, values[field.name].to_bytes(field.length_bytes))
        return content

    end_small = -(-len(small) // 512) * 512
    for content, cluster_bytes in ((small, 512), (big, 65536)):
        end = -(-len(content) // cluster_bytes) * cluster_bytes
        yield "an L1 table of 2**22 entries", header(content, l1_size=1 << 22)
        yield "an L1 table of 2**22 entries at the end", header(content, l1_size=1 << 22, l1_table_offset=end - cluster_bytes)
        yield "a refcount table of 8 MiB", header(content, refcount_table_clusters=(8 << 20) // cluster_bytes)
        yield (
            "65536 snapshots past the end",
            header(content, nb_snapshots=65536, snapshots_offset=end - cluster_bytes),
        )
        for size in (1 << 63, (1 << 63) - 512, (1 << 64) - 512, 1 << 62, 1 << 50, 1 << 40):
            yield f"a size of {size:#x}", header(content, size=size)
            yield f"a size of {size:#x}, no L1", header(content, size=size, l1_size=0, l1_table_offset=0)
    # Present, not only claimed: a long L1 table whose entries lead past the end, or all to one place, or nowhere.
    for entry, count in ((1 << 40, 1 << 22), (1 << 63 | end_small, 1 << 17), (0, 1 << 22)):
        table = b"".join(struct.pack(">Q", entry + index * 512 if entry else 0) for index in range(1 << 16)) * (count >> 16)
        content = header(small, l1_size=count, l1_table_offset=end_small, size=count * 32 * KIB)
        yield f"{count} L1 entries from {entry:#x}", content.ljust(end_small, b"\0") + table
    # Snapshots whose L1 tables are all as long as they may be, side by side, none of them in the file.
    snapshots = b"".join(
        struct.pack(">QIHHIIQII", (1 << 40) + index * (32 << 20), 1 << 22, 0, 0, 0, 0, 0, 0, 0) for index in range(2000)
    )
    yield (
        "long L1 tables of 2000 snapshots",
        header(small, nb_snapshots=2000, snapshots_offset=end_small).ljust(end_small, b"\0") + snapshots,
    )
    # A refcount table of 8 MiB that is there, its entries side by side and past the end.
    table = b"".join(struct.pack(">Q", (1 << 40) + index * 512) for index in range(1 << 20))
    moved = header(small, refcount_table_offset=end_small, refcount_table_clusters=(8 << 20) // 512)
    yield "2**20 refcount blocks past the end", moved.ljust(end_small, b"\0") + table


@pytest.mark.parametrize("number", range(len(list(huge_claims()))))
def test_huge_claims(number: int) -> None:
    what, content = list(huge_claims())[number]
    exercise(content, what)


@pytest.mark.parametrize("name", ["ours-aged", "qemu-4k", "qemu-512", "qemu-1bit"])
def test_random_words(name: str) -> None:
    """A few words of the metadata at once, each hostile, random, or that of another place."""
    content = corpus(name)
    tables = tables_of(content)
    values = hostile_entries(content, tables)
    places = [
        at
        for kind, offset, length_bytes in tables.places
        for at in range(offset, min(offset + (128 if kind == "header" else length_bytes), len(content) - 8), 8)
        if any(content[at : at + 8]) or at % 128 == 0
    ]
    words_there = [int.from_bytes(content[at : at + 8]) for at in places]
    word = st.one_of(st.sampled_from(values), st.integers(0, (1 << 64) - 1), st.sampled_from(words_there))

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(st.lists(st.tuples(st.sampled_from(places), word), min_size=1, max_size=6))
    def mutate(mutations: list[tuple[int, int]]) -> None:
        mutated = content
        for at, value in mutations:
            mutated = patched(mutated, at, value.to_bytes(8))
        exercise(mutated, f"{name}: {mutations}")

    mutate()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=2000), st.booleans())
def test_random_files(noise: bytes, with_magic: bool) -> None:
    exercise((b"QFI\xfb\0\0\0\x03" if with_magic else b"") + noise, "noise")


def test_entries_on_a_real_file(tmp_path: Path) -> None:
    """A sample on files, where far offsets and holes are the host's."""
    content = corpus("qemu-4k")
    tables = tables_of(content)
    path = tmp_path / "image"
    for kind in ("L1 table", "L2 table", "refcount table", "refcount block"):
        offset, length_bytes = next(tables.of(kind))
        index = next(index for index, entry in enumerate(words(content, offset, length_bytes // 8)) if entry)
        for value in hostile_entries(content, tables):
            path.write_bytes(patched(content, offset + index * 8, value.to_bytes(8)))
            storage = FileStorage.open(path, writable=True)
            try:
                with bounded():
                    _change(storage, content)
            except ALLOWED:
                pass
            finally:
                storage.close()
