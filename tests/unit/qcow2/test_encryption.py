"""Encrypted images: what the guest reads, what the file holds, keys, faults, and hostile headers."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from functools import cache

import pytest

from cowfence.codec import luks
from cowfence.crash.structure import fatal_findings
from cowfence.disk.raw import RawDisk
from cowfence.errors import Corrupt, CowfenceError, Invalid, ReadOnly, Unsupported
from cowfence.ops.amend import Amendment, amend_disk
from cowfence.ops.resize import resize_disk
from cowfence.ops.snapshot import apply_snapshot, create_snapshot
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.encryption import KeyChange, read_luks
from cowfence.qcow2.header import read_header
from cowfence.qcow2.image import Qcow2Disk, open_image
from cowfence.qcow2.verify import verify
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage
from cowfence.storage.memory import MemoryStorage
from helpers_check import QUIET
from hostile.test_corpus import ALLOWED, bounded

SECRET, SECOND = b"first secret", b"second secret"
METHODS = ("luks", "aes", "luks-extended", "luks-v3-512")


@cache
def area() -> bytes:
    return luks.create(luks.NewLuks(key_bits=128, chaining="cbc", iter_time_ms=1), SECRET)[0]


def new(method: str, size_bytes: int = 1 << 20, *, backed: bool = False, preallocate: bool = False) -> MemoryStorage:
    memory = MemoryStorage(name="image")
    write_new(
        memory,
        NewImage(
            size_bytes,
            {"luks-extended": 16384, "luks-v3-512": 512}.get(method, 4096),
            extended_l2=method == "luks-extended",
            luks_area=area() if method != "aes" else None,
            backing_name="below" if backed else None,
            backing_format="raw" if backed else None,
            preallocate_metadata=preallocate,
        ),
    )
    if method == "aes":
        memory.writev(32, (struct.pack(">I", 1),), "test")
    return memory


def again(memory: MemoryStorage) -> MemoryStorage:
    """The file, for who opens it next."""
    return MemoryStorage(memory.snapshot(), name="image")


def opened(storage: Storage, secret: bytes | None = SECRET, below: bytes | None = None, *, writable: bool = True) -> Qcow2Disk:
    backing = RawDisk(MemoryStorage(below, name="below", writable=False)) if below is not None else None
    secrets = None if secret is None else lambda _: [secret]
    return open_image(storage, backing=backing, writable=writable, options=QUIET, secrets=secrets)


def check_clean(content: bytes) -> None:
    report = verify(MemoryStorage(content, name="image", writable=False))
    assert report.clean, [str(finding) for finding in report.findings[:3]]
    assert fatal_findings(content) == []


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_walk(method: str, backed: bool) -> None:
    """Of any offsets and lengths, over a backing file, through snapshots and resizing; nothing of it stands plainly."""
    rng = random.Random(method)
    size = 600 * 1024 if method != "luks-v3-512" else 60 * 1024
    below = rng.randbytes(size * 2 // 3) if backed else None
    memory = new(method, size, backed=backed)
    disk = opened(memory, below=below)
    now = bytearray((below or b"").ljust(size, b"\0"))
    kept: dict[str, bytes] = {}
    for step in range(120):
        at = rng.randrange(len(now))
        length = min(rng.choice([1, 3, 512, 700, 4096, 20000, 70000]), len(now) - at)
        verb = rng.choice(["write", "write", "write", "zero", "read", "snapshot", "apply", "reopen", "resize"])
        if verb == "write":
            data = rng.choice([rng.randbytes(length), b"plain text " * (length // 11) + bytes(length % 11)])
            disk.write(at, data)
            now[at : at + length] = data
        elif verb == "zero":
            disk.zero(at, length, unmap=rng.random() < 0.5)
            now[at : at + length] = bytes(length)
        elif verb == "read":
            assert disk.read(at, length) == now[at : at + length]
        elif verb == "snapshot" and len(kept) < 3:
            create_snapshot(disk, f"s{step}")
            kept[f"s{step}"] = bytes(now)
        elif verb == "apply" and kept:
            which = rng.choice(sorted(kept))
            apply_snapshot(disk, which)
            now[:] = kept[which]
        elif verb == "reopen":
            disk.close()
            check_clean(memory.snapshot())
            memory = again(memory)
            disk = opened(memory, below=below)
        elif verb == "resize" and len(now) < 2 * size:
            longer = min(len(now) + 512 * rng.randrange(1, 40), 2 * size)
            resize_disk(disk, longer, preallocation=rng.choice(["off", "metadata"]))
            now.extend(bytes(longer - len(now)))
    assert disk.read(0, len(now)) == now
    disk.close()
    check_clean(memory.snapshot())
    assert b"plain text plain" not in memory.snapshot()
    assert opened(again(memory), below=below, writable=False).read(0, len(now)) == now


def test_without_the_secret_it_is_looked_at_only() -> None:
    memory = new("luks")
    disk = opened(memory)
    disk.write(0, b"x" * 5000)
    disk.close()
    memory = again(memory)
    disk = opened(memory, None)
    assert [extent.data for extent in disk.extents(0, 1 << 20)] == [True, False]
    assert disk.read(500_000, 10) == bytes(10)
    create_snapshot(disk, "s")
    for work in (lambda: disk.read(0, 10), lambda: disk.write(0, b"y"), lambda: disk.write(300_000, b"y")):
        with pytest.raises(Invalid, match="its secret was not given"):
            work()
    disk.close()
    check_clean(memory.snapshot())
    with pytest.raises(Invalid, match="Invalid password, cannot unlock any keyslot"):
        opened(again(memory), b"wrong")


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_what_it_cannot_hold_is_refused(method: str) -> None:
    disk = opened(new(method))
    with pytest.raises(Unsupported, match="encrypted"):
        disk.write_compressed(0, bytes(4096))
    if method == "luks":
        with pytest.raises(Unsupported, match="LUKS"):
            amend_disk(disk, Amendment(version=2))


def test_what_is_allocated_ahead_reads_as_zeros() -> None:
    memory = new("luks", preallocate=True)
    disk = opened(memory)
    assert disk.read(0, 1 << 20) == bytes(1 << 20)
    disk.write(5000, b"a")
    resize_disk(disk, 2 << 20, preallocation="falloc")
    assert disk.read(0, 2 << 20) == (bytes(5000) + b"a").ljust(2 << 20, b"\0")
    disk.close()
    check_clean(memory.snapshot())


# Keys


def keys(disk: Qcow2Disk, secret: bytes = SECRET, **change: object) -> None:
    amend_disk(disk, Amendment(keys=KeyChange(iter_time_ms=1, **change)), lambda _: [secret])  # type: ignore[arg-type]


def test_keys_are_added_and_erased() -> None:
    memory = new("luks")
    disk = opened(memory)
    disk.write(0, b"data")
    keys(disk, new_secret=SECOND)
    keys(disk, secret=SECOND, new_secret=b"third", keyslot=5)
    assert read_luks(memory, disk.header).active == [0, 1, 5]
    keys(disk, old_secret=SECRET)
    keys(disk, keyslot=5)
    assert disk.read(0, 4) == b"data"
    disk.write(4, b"more")
    disk.close()
    check_clean(memory.snapshot())
    assert opened(again(memory), SECOND).read(0, 8) == b"datamore"
    for gone in (SECRET, b"third"):
        with pytest.raises(Invalid, match="Invalid password"):
            opened(again(memory), gone)


def test_what_could_still_open_it_is_wiped() -> None:
    """When the call returns, the old header is nowhere in the file any more, and what it stood on is free."""
    memory = new("luks")
    before = memory.snapshot()
    header = read_luks(memory, read_header(memory))
    at = read_header(memory).encryption
    assert at is not None
    start = at.offset + header.slots[0].material_sector * 512
    material = before[start : start + 4096]
    disk = opened(memory)
    keys(disk, new_secret=SECOND)
    keys(disk, old_secret=SECRET)
    after = memory.snapshot()
    assert before.count(material) == 1
    assert material not in after
    disk.write(0, b"x" * 200_000)
    disk.close()
    check_clean(memory.snapshot())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"old_secret": SECRET}, "only active keyslot 0"),
        ({"keyslot": 0}, "only active keyslot 0"),
        ({"old_secret": b"nobody"}, "No keyslots match"),
        ({"new_secret": SECOND, "keyslot": 0}, "Refusing to overwrite active keyslot 0"),
        ({"new_secret": SECOND, "keyslot": 8}, "Invalid keyslot 8"),
        ({"secret": b"wrong", "new_secret": SECOND}, "Invalid password"),
        ({}, "either 'keyslot' or 'old-secret'"),
    ],
)
def test_refused_changes_change_nothing(change: dict[str, object], what: str) -> None:
    memory = new("luks")
    disk = opened(memory)
    before = memory.snapshot()
    with pytest.raises(Invalid, match=what):
        keys(disk, **change)  # type: ignore[arg-type]
    disk.close()
    assert memory.snapshot() == before


def test_by_force() -> None:
    memory = new("luks")
    disk = opened(memory)
    keys(disk, new_secret=SECOND, keyslot=0, force=True)
    disk.close()
    memory = again(memory)
    disk = opened(memory, SECOND)
    keys(disk, keyslot=0, force=True)
    disk.close()
    with pytest.raises(Invalid, match="Invalid password"):
        opened(again(memory), SECOND)


@pytest.mark.parametrize("keep_failing", [False, True])
def test_the_nth_call_of_a_key_change_fails(keep_failing: bool) -> None:
    """Before and after it somebody's passphrase opens the image, and nothing but leaks is wrong with it."""
    start = new("luks").snapshot()
    for nth in range(1, 100):
        memory = MemoryStorage(start, name="image")
        plan = FaultPlan(keep_failing=keep_failing)
        disk = opened(FaultyStorage(memory, plan))
        plan.nth, plan.matched = nth, 0
        with suppress(CowfenceError):
            keys(disk, new_secret=SECOND)
        finished = plan.failed == 0
        plan.nth = None
        try:
            disk.close()
        except ReadOnly:
            assert not finished
        assert fatal_findings(memory.snapshot()) == []
        assert opened(again(memory), SECRET, writable=False).read(0, 10) == bytes(10)
        if finished:
            return
    raise AssertionError("it never came to its end")


# Hostile


def test_hostile_pointers_are_refused() -> None:
    content = new("luks").snapshot()
    at = content.index(struct.pack(">I", 0x0537BE77)) + 8
    for offset, length in ((0, 16), (4096, 600), (len(content), 600), (1 << 55, 600), (4096, 1 << 40), (4097, 600), (4096, 0)):
        memory = MemoryStorage(content[:at] + struct.pack(">QQ", offset, length) + content[at + 16 :], name="image")
        for writable in (False, True):
            with pytest.raises(ALLOWED):
                opened(memory, writable=writable)


def test_hostile_headers_are_bounded() -> None:
    rng = random.Random(3)
    content = new("luks").snapshot()
    pointer = read_header(MemoryStorage(content, name="image")).encryption
    assert pointer is not None
    for _ in range(150):
        image = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            # Not the iterations: up to their limit they may well take longer.
            place = rng.choice([*range(164), *range(168, 212), *range(216, 592), *range(4096, 8192)])
            image[pointer.offset + place] = rng.choice([0, 255, rng.randrange(256)])
        with bounded(), suppress(*ALLOWED):
            opened(MemoryStorage(bytes(image), name="image"), writable=False).read(0, 4096)


def test_no_header_is_corrupt() -> None:
    content = bytearray(new("luks").snapshot())
    at = content.index(struct.pack(">I", 0x0537BE77))
    content[at : at + 4] = b"\1\2\3\4"
    with pytest.raises(Corrupt, match="has no LUKS header"):
        opened(MemoryStorage(bytes(content), name="image"))
    content[32:36] = struct.pack(">I", 3)
    with pytest.raises(Unsupported, match="encryption method 3"):
        opened(MemoryStorage(bytes(content), name="image"))
