"""Images both ways: what QEMU wrote we read identically, what we wrote QEMU reads identically and finds clean; and other
people's clients on our qcow2 export."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowfence
from cowfence.units import KIB, MIB
from helpers_cli import COWFENCE, ENVIRONMENT
from judges import run

SIZE = 4 * MIB + 512 * 3


def qemu_img(*words: str | Path) -> str:
    return run(["qemu-img", *(str(word) for word in words)]).stdout


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    run(["qemu-io", "-f", "qcow2", *words, str(image)])


def as_raw(image: Path) -> bytes:
    """The guest's bytes as QEMU sees them."""
    raw = image.with_suffix(".as-raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


def noise(path: Path, seed: int, size: int = SIZE) -> Path:
    """A raw disk of text, random bytes, zeros and holes."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 64 * KIB):
            kind = rng.randrange(4)
            file.seek(start)
            length = min(64 * KIB, size - start)
            if kind == 0:
                file.write(rng.randbytes(length))
            elif kind == 1:
                file.write((b"%d the quick brown fox\n" % start * (length // 16))[:length])
            elif kind == 2:
                file.write(bytes(length))
    return path


def plain(directory: Path, *options: str) -> Path:
    image = directory / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *options, image, str(SIZE))
    qemu_io(image, "write -P 1 0 100k", "write -P 2 1000k 64k", "write -z 64k 64k", "write -z -u 1000k 4k", "discard 0 64k")
    return image


def zeros(directory: Path, *options: str) -> Path:
    image = plain(directory, *options)
    qemu_io(image, "write -P 3 2M 256k", "write -z 2M 64k", "write -z -u 2112k 64k", "discard 2176k 64k")
    return image


def compressed(kind: str) -> Callable[..., Path]:
    def build(directory: Path, *options: str) -> Path:
        image = directory / "packed.qcow2"
        words = ["-o", f"compression_type={kind}"] if kind != "zlib" else []
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *options, *words, noise(directory / "n.raw", 1), image)
        return image

    return build


def with_snapshots(directory: Path, *options: str) -> Path:
    image = plain(directory, *options)
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 7 10k 300k")
    qemu_img("snapshot", "-c", "two", image)
    return image


def chain(directory: Path, *options: str) -> Path:
    raw = noise(directory / "base.raw", 2, SIZE // 2 + 512)
    middle, top = directory / "middle.qcow2", directory / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw.name, "-F", "raw", middle, str(SIZE // 2))
    qemu_io(middle, "write -P 9 100k 100k", "write -z 300k 64k")
    qemu_img("create", "-q", "-f", "qcow2", *options, "-b", middle.name, "-F", "qcow2", top, str(SIZE))
    qemu_io(top, "write -P 8 64k 10k", "discard 0 64k")
    return top


BUILDERS = {
    "plain": plain,
    "zeros": zeros,
    "zlib": compressed("zlib"),
    "zstd": compressed("zstd"),
    "snapshots": with_snapshots,
    "chain": chain,
}
SHAPES = {
    "default": (),
    "512-byte-clusters": ("-o", "cluster_size=512"),
    "2M-clusters": ("-o", "cluster_size=2M"),
    "1-bit": ("-o", "refcount_bits=1"),
    "64-bit": ("-o", "refcount_bits=64,cluster_size=4k"),
    "v2": ("-o", "compat=0.10"),
}
MATRIX = [
    pytest.param(builder, shape, id=f"{builder}-{shape}")
    for builder in BUILDERS
    for shape in SHAPES
    # One bit counts no second reference, and version 2 knows no other compression than deflate.
    if not (builder == "snapshots" and shape == "1-bit") and not (builder == "zstd" and shape == "v2")
    # Compressed clusters share a host cluster, which takes more than one bit.
    if not (builder in ("zlib", "zstd") and shape == "1-bit")
]


@pytest.mark.parametrize(("builder", "shape"), MATRIX)
def test_written_by_either_read_by_both(tmp_path: Path, builder: str, shape: str) -> None:
    image = BUILDERS[builder](tmp_path, *SHAPES[shape])
    expected = bytearray(as_raw(image))
    snapshots = _snapshots(image)
    with cowfence.open(image) as disk:
        assert disk.read(0, disk.size) == expected
    rng = random.Random(f"{builder}{shape}")
    with cowfence.open(image, writable=True) as disk:
        for _ in range(60):
            offset = rng.randrange(disk.size)
            length = rng.choice([rng.randrange(2000), rng.randrange(300_000)])
            length = min(length, disk.size - offset)
            match rng.randrange(4):
                case 0:
                    disk.zero(offset, length, unmap=rng.random() < 0.5)
                    expected[offset : offset + length] = bytes(length)
                case 1:
                    disk.discard(offset, length)
                    expected[offset : offset + length] = disk.read(offset, length)
                case _:
                    data = rng.randbytes(length)
                    disk.write(offset, data)
                    expected[offset : offset + length] = data
        disk.flush()
    assert "No errors were found" in qemu_img("check", image)
    assert as_raw(image) == expected
    assert _snapshots(image) == snapshots


def _snapshots(image: Path) -> dict[str, bytes]:
    """Each snapshot's bytes, as QEMU reads them."""
    found = {}
    with cowfence.open(image) as disk:
        names = [snapshot.name for snapshot in disk.info().snapshots]
    for name in names:
        raw = image.with_suffix(f".{name}")
        qemu_img("convert", "-l", name, "-f", "qcow2", "-O", "raw", image, raw)
        found[name] = raw.read_bytes()
    return found


@contextmanager
def served(image: Path, *words: str) -> Iterator[str]:
    server = subprocess.Popen(
        [*COWFENCE, "serve", str(image), "--socket", str(image.parent / "nbd.sock"), *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0


@pytest.mark.parametrize("over", ["nothing", "chain"])
def test_clients_of_others_on_our_export(tmp_path: Path, over: str) -> None:
    image = chain(tmp_path) if over == "chain" else plain(tmp_path)
    raw = noise(tmp_path / "in.raw", 5)
    with served(image) as uri:
        assert '"export-size"' in run(["nbdinfo", "--json", uri]).stdout
        run(["nbdcopy", str(raw), uri])
        run(["nbdcopy", uri, str(tmp_path / "out.raw")])
        qemu_img("convert", "-f", "raw", "-O", "raw", uri, tmp_path / "converted.raw")
    assert (tmp_path / "out.raw").read_bytes()[:SIZE] == raw.read_bytes()
    assert (tmp_path / "converted.raw").read_bytes()[:SIZE] == raw.read_bytes()
    assert "No errors were found" in qemu_img("check", image)
    assert as_raw(image)[:SIZE] == raw.read_bytes()


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_fio_verifies_what_it_wrote(tmp_path: Path, cluster_size: int) -> None:
    image = tmp_path / "fio.qcow2"
    cowfence.create(image, 64 * MIB, cluster_size=cluster_size).close()
    with served(image) as uri:
        run(
            [
                "fio",
                "--name=verify",
                "--ioengine=nbd",
                f"--uri={uri}",
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=32",
                "--size=32m",
                "--fsync=100",
                "--verify=crc32c",
                "--verify_fatal=1",
            ]
        )
    assert "No errors were found" in qemu_img("check", image)
