"""The snapshot table: entries as written, the limits, and QEMU's own tables."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from cowfence.errors import Corrupt
from cowfence.qcow2.geometry import HostOffset
from cowfence.qcow2.header import Header, parse_header
from cowfence.qcow2.snapshot_table import read_snapshots
from cowfence.storage.base import Storage, WritableBuffer


class Bytes:
    """The two members of a storage that reading a table needs."""

    name = "image"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.bytes_read = 0

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        assert wait
        stream = io.BytesIO(self.content)
        stream.seek(offset)
        got = sum(stream.readinto(buffer) for buffer in buffers)
        self.bytes_read += got
        return got


def storage_of(content: bytes) -> Storage:
    return cast("Storage", Bytes(content))


def header_for(count: int) -> Header:
    return Header(
        version=3,
        cluster_bits=9,
        size_bytes=4096,
        l1_entries=1,
        l1_offset=HostOffset(1024),
        refcount_table_offset=HostOffset(512),
        refcount_table_clusters=1,
        snapshot_count=count,
        snapshots_offset=HostOffset(2048),
    )


def entry(
    snapshot_id: bytes, name: bytes, extra: bytes, *, l1_offset: int = 512, l1_entries: int = 3, extra_bytes: int | None = None
) -> bytes:
    length_bytes = len(extra) if extra_bytes is None else extra_bytes
    fixed = struct.pack(">QIHHIIQII", l1_offset, l1_entries, len(snapshot_id), len(name), 1700000000, 42, 99, 7, length_bytes)
    raw = fixed + extra + snapshot_id + name
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


def test_entries_of_every_age() -> None:
    table = entry(b"1", b"old", b"") + entry(b"two", "später".encode(), struct.pack(">QQ", 1 << 40, 8192))
    table += entry(b"3", b"", struct.pack(">QQQ", 0, 512, 77) + b"future") + entry(
        b"4", b"x", struct.pack(">QQQ", 0, 1, 2**64 - 1)
    )
    old, second, third, fourth = read_snapshots(storage_of(bytes(2048) + table), header_for(4))
    assert (old.id, old.name, old.disk_size_bytes, old.vm_state_bytes, old.icount) == ("1", "old", 4096, 7, None)
    assert (old.date_seconds, old.date_nanoseconds, old.vm_clock_nanoseconds) == (1700000000, 42, 99)
    assert (second.name, second.vm_state_bytes, second.disk_size_bytes) == ("später", 1 << 40, 8192)
    assert (third.icount, third.extra[24:], third.l1_offset, third.l1_entries) == (77, b"future", 512, 3)
    assert fourth.icount is None


def test_last_entry_may_lack_its_padding() -> None:
    table = entry(b"1", b"ab", b"").rstrip(b"\0")
    assert read_snapshots(storage_of(bytes(2048) + table), header_for(1))[0].name == "ab"


def test_tables_longer_than_a_slice_stay_in_step() -> None:
    names = [b"n" * (index % 700) for index in range(1000)]
    table = b"".join(entry(str(index).encode(), name, bytes(16)) for index, name in enumerate(names))
    snapshots = read_snapshots(storage_of(bytes(2048) + table), header_for(1000))
    assert [snapshot.id for snapshot in snapshots] == [str(index) for index in range(1000)]
    assert [len(snapshot.name) for snapshot in snapshots] == [len(name) for name in names]


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (b"", "file ends"),
        (entry(b"1", b"a", b"")[:30], "file ends"),
        (entry(b"1", b"a", b"", extra_bytes=1025), "extra data"),
        (entry(b"1", b"a", b"", l1_offset=513), "not aligned"),
        (entry(b"1", b"a", b"", l1_offset=1 << 56), "beyond"),
        (entry(b"1", b"a", b"", l1_entries=(32 << 20) // 8 + 1), "exceeds"),
    ],
)
def test_bad_tables_are_named(table: bytes, what: str) -> None:
    with pytest.raises(Corrupt, match=what):
        read_snapshots(storage_of(bytes(2048) + table), header_for(1))


def test_work_is_bounded_by_the_bytes_present() -> None:
    storage = Bytes(bytes(2048) + entry(b"1", b"a", b""))
    with pytest.raises(Corrupt, match="file ends"):
        read_snapshots(cast("Storage", storage), header_for(65536))
    assert storage.bytes_read < 4096


def test_table_has_a_length_limit() -> None:
    large = entry(b"i" * 65535, b"n" * 65535, bytes(1024))
    count = (64 << 20) // len(large) + 1
    with pytest.raises(Corrupt, match="longer than"):
        read_snapshots(storage_of(bytes(2048) + large * count), header_for(count))


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is the judge here")
def test_tables_of_qemu(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", image, "3M"], check=True)
    for name in ("first", "second one"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, image], check=True)
    raw = image.read_bytes()
    snapshots = read_snapshots(storage_of(raw), parse_header(raw, "image"))
    assert [(snapshot.id, snapshot.name, snapshot.disk_size_bytes) for snapshot in snapshots] == [
        ("1", "first", 3 << 20),
        ("2", "second one", 3 << 20),
    ]
