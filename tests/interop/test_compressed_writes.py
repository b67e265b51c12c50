"""Compressed clusters that we write: packed tightly, read by QEMU, written over by both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import pytest

import cowfence
from cowfence.errors import Invalid, OutOfRange
from judges import run

CLUSTER = 65536
CLUSTERS = 24


def content(seed: int) -> bytes:
    """Clusters of text, zeros and noise."""
    rng = random.Random(seed)
    pieces = []
    for number in range(CLUSTERS):
        kind = number % 4
        if kind == 0:
            pieces.append(rng.randbytes(CLUSTER))
        elif kind == 1:
            pieces.append(bytes(CLUSTER))
        else:
            words = [b"%d cow " % rng.randrange(9999) for _ in range(CLUSTER // 4)]
            pieces.append(b"".join(words)[:CLUSTER])
    return b"".join(pieces)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize("refcount_bits", [1, 16])
def test_qemu_reads_what_we_compress(
    tmp_path: Path, compression: Literal["zlib", "zstd"], cluster_bytes: int, refcount_bits: int
) -> None:
    path, plain = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    data = content(1)
    size = max(len(data), cluster_bytes)
    data = data.ljust(size, b"\0")
    plain.write_bytes(data)
    with cowfence.create(
        path, size, cluster_size=cluster_bytes, refcount_bits=refcount_bits, compression_type=compression
    ) as disk:
        disk.write_compressed(0, data)
        assert disk.read(0, size) == data
    run(["qemu-img", "check", path])
    run(["qemu-img", "compare", path, plain])
    with cowfence.open(path) as disk:
        assert disk.read(0, size) == data
    run(["qemu-io", "-c", f"write -P 7 {size // 2} 4k", path])
    run(["qemu-img", "check", path])
    with cowfence.open(path, writable=True) as disk:
        assert disk.read(size // 2, 4096) == b"\x07" * 4096
        disk.write_compressed(0, data)
        disk.write(5, b"over a part of a compressed cluster")
    run(["qemu-img", "check", path])
    expected = data[:5] + b"over a part of a compressed cluster" + data[40:]
    plain.write_bytes(expected)
    run(["qemu-img", "compare", path, plain])


def test_they_are_packed(tmp_path: Path) -> None:
    """As tightly as QEMU packs them, or nearly so."""
    source, ours, theirs = tmp_path / "source.raw", tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    source.write_bytes(content(2))
    with cowfence.create(ours, CLUSTERS * CLUSTER) as disk:
        disk.write_compressed(0, content(2))
    run(["qemu-img", "convert", "-c", "-O", "qcow2", source, theirs])
    assert ours.stat().st_size <= theirs.stat().st_size * 1.15


def test_the_last_cluster_may_be_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, CLUSTER + 512) as disk:
        disk.write_compressed(CLUSTER, b"x" * 512)
        disk.write_compressed(0, b"y" * CLUSTER)
        assert disk.read(0, disk.size) == b"y" * CLUSTER + b"x" * 512
        with pytest.raises(Invalid, match="whole clusters of 65536 bytes"):
            disk.write_compressed(512, b"z" * CLUSTER)
        with pytest.raises(OutOfRange):
            disk.write_compressed(CLUSTER, b"z" * CLUSTER)
    run(["qemu-img", "check", path])


def test_a_packed_cluster_is_given_up_when_it_was_freed(tmp_path: Path) -> None:
    """The cluster that was being packed comes back to the allocator and is somebody else's by the next compressed write."""
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, 8 * CLUSTER) as disk:
        disk.write_compressed(0, b"a" * CLUSTER)
        disk.discard(0, CLUSTER)
        disk.flush()
        disk.write(CLUSTER, b"b" * CLUSTER)
        disk.write_compressed(2 * CLUSTER, b"c" * CLUSTER)
        assert disk.read(0, 3 * CLUSTER) == bytes(CLUSTER) + b"b" * CLUSTER + b"c" * CLUSTER
    run(["qemu-img", "check", path])
