"""info, map and create say what qemu-img says, byte for byte; dd makes the files that it makes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfence.units import KIB, MIB
from helpers_cli import cowfence
from judges import run

Build = Callable[[Path], str]


@pytest.fixture(autouse=True)
def one_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def qemu_img(directory: Path, *words: str) -> str:
    here = Path.cwd()
    os.chdir(directory)
    try:
        return run(["qemu-img", *words]).stdout
    finally:
        os.chdir(here)


def qemu_io(directory: Path, image: str, *commands: str) -> None:
    run(["qemu-io", *(word for command in commands for word in ("-c", command)), directory / image])


def empty(directory: Path) -> str:
    qemu_img(directory, "create", "-f", "qcow2", "a", "1G")
    return "a"


def version_2(directory: Path) -> str:
    qemu_img(directory, "create", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "a", "10M")
    qemu_io(directory, "a", "write -P 1 1M 100k", "write -P 2 5M 1k")
    return "a"


def of_no_size(directory: Path) -> str:
    qemu_img(directory, "create", "-f", "qcow2", "a", "0")
    return "a"


def other_options(directory: Path) -> str:
    options = "compression_type=zstd,refcount_bits=1,lazy_refcounts=on,cluster_size=512"
    qemu_img(directory, "create", "-f", "qcow2", "-o", options, "a", "1M")
    qemu_io(directory, "a", "write 0 100k", "write -z 200k 50k", "discard 10k 10k")
    return "a"


def preallocated(directory: Path) -> str:
    qemu_img(directory, "create", "-f", "qcow2", "-o", "preallocation=metadata", "a", "3M")
    qemu_io(directory, "a", "write 1M 128k")
    return "a"


def chain(directory: Path) -> str:
    """Raw, shorter than what lies on it; qcow2 with zeros; qcow2, larger again, with a bit of everything, in a directory."""
    (directory / "base.raw").write_bytes(b"x" * 100 * KIB + bytes(200 * KIB))
    os.truncate(directory / "base.raw", 50 * KIB)
    os.truncate(directory / "base.raw", 300 * KIB)
    qemu_img(directory, "create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid", "2M")
    qemu_io(directory, "mid", "write -P 2 1M 64k", "write -z 1200k 64k")
    (directory / "sub").mkdir()
    qemu_img(directory, "create", "-f", "qcow2", "-b", "../mid", "-F", "qcow2", "sub/top", "3M")
    qemu_io(directory, "sub/top", "write -P 2 1M 4k", "discard 0 64k", "write -P 1 2560k 128k", "write -z 2600k 64k")
    return "sub/top"


def with_snapshots_and_bitmaps(directory: Path) -> str:
    qemu_img(directory, "create", "-f", "qcow2", "a", "8M")
    qemu_io(directory, "a", "write 0 1M")
    qemu_img(directory, "snapshot", "-c", "first", "a")
    qemu_img(directory, "snapshot", "-c", "a name that is longer than its column", "a")
    qemu_img(directory, "bitmap", "--add", "a", "one")
    qemu_img(directory, "bitmap", "--add", "--disable", "-g", "128k", "a", "another")
    return "a"


def marked(directory: Path) -> str:
    qemu_img(directory, "create", "-f", "qcow2", "a", "8M")
    with (directory / "a").open("r+b") as image:
        image.seek(79)
        image.write(b"\x03")
    return "a"


READABLE = [empty, version_2, of_no_size, other_options, preallocated, chain, with_snapshots_and_bitmaps]


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("build", [*READABLE, marked])
def test_info(tmp_path: Path, build: Build, output: str) -> None:
    image = build(tmp_path)
    share = ["-U"] if build is marked else []
    expected = qemu_img(tmp_path, "info", *share, f"--output={output}", image)
    assert cowfence("info", "--output", output, image, cwd=tmp_path).stdout == expected


@pytest.mark.parametrize("output", ["human", "json"])
def test_info_of_rarer_kinds(tmp_path: Path, output: str) -> None:
    for options in ("extended_l2=on", "data_file=d,data_file_raw=on"):
        qemu_img(tmp_path, "create", "-f", "qcow2", "-o", options, "a", "1M")
        expected = qemu_img(tmp_path, "info", f"--output={output}", "a")
        assert cowfence("info", "--output", output, "a", cwd=tmp_path).stdout == expected


@pytest.mark.parametrize("output", ["human", "json"])
def test_info_of_raw(tmp_path: Path, output: str) -> None:
    (tmp_path / "a").write_bytes(b"r" * 1000)
    expected = qemu_img(tmp_path, "info", "-f", "raw", f"--output={output}", "a")
    assert cowfence("info", "-f", "raw", "--output", output, "a", cwd=tmp_path).stdout == expected


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("build", READABLE)
def test_info_of_a_chain(tmp_path: Path, build: Build, output: str) -> None:
    image = build(tmp_path)
    expected = qemu_img(tmp_path, "info", "--backing-chain", f"--output={output}", image)
    done = cowfence("info", "--backing-chain", "--output", output, "--ref-root", tmp_path, image, cwd=tmp_path)
    assert done.stdout == expected


@pytest.mark.parametrize(
    "part", [[], ["--start-offset=1M"], ["--start-offset=1100k", "--max-length=100k"], ["--start-offset=9G"]]
)
@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("build", READABLE)
def test_map(tmp_path: Path, build: Build, output: str, part: list[str]) -> None:
    image = build(tmp_path)
    expected = qemu_img(tmp_path, "map", *part, f"--output={output}", image)
    assert cowfence("map", *part, "--output", output, "--ref-root", tmp_path, image, cwd=tmp_path).stdout == expected


@pytest.mark.parametrize("output", ["human", "json"])
def test_map_of_raw(tmp_path: Path, output: str) -> None:
    with (tmp_path / "a").open("wb") as image:
        image.write(b"r" * 64 * KIB)
        image.seek(MIB)
        image.write(b"r" * 64 * KIB)
        image.truncate(3 * MIB)
    expected = qemu_img(tmp_path, "map", "-f", "raw", f"--output={output}", "a")
    assert cowfence("map", "-f", "raw", "--output", output, "a", cwd=tmp_path).stdout == expected


def test_map_of_compressed_clusters(tmp_path: Path) -> None:
    qemu_img(tmp_path, "create", "-f", "qcow2", "a", "1M")
    qemu_io(tmp_path, "a", "write -c -P 1 64k 64k")
    expected = qemu_img(tmp_path, "map", "--output=json", "a")
    assert cowfence("map", "--output=json", "a", cwd=tmp_path).stdout == expected
    done = cowfence("map", "a", cwd=tmp_path, check=False)
    assert done.returncode == run(["qemu-img", "map", tmp_path / "a"], check=False).returncode == 1
    assert "compressed" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["new", "1G"],
        ["new", "1000"],
        ["new", "0"],
        ["-o", "compat=0.10,cluster_size=4k,preallocation=metadata", "new", "3M"],
        ["-o", "compat=v3,lazy_refcounts=on,refcount_bits=1", "-o", "compression_type=zstd,preallocation=off", "new", "3M"],
        ["-o", "size=2M,cluster_size=512", "new"],
        ["-o", "preallocation=full", "new", "1M"],
        ["-b", "base", "-F", "qcow2", "new"],
        ["-b", "base", "-F", "qcow2", "-o", "compat=v2", "new", "9M"],
        ["-o", "backing_file=base,backing_fmt=qcow2", "new"],
        ["-u", "-b", "missing", "-F", "raw", "new", "1M"],
    ],
)
def test_create(tmp_path: Path, words: list[str]) -> None:
    qemu_img(tmp_path, "create", "-f", "qcow2", "base", "5M")
    expected = qemu_img(tmp_path, "create", "-f", "qcow2", *words)
    described = qemu_img(tmp_path, "info", "-U", "--output=json", "new")
    (tmp_path / "new").unlink()
    assert cowfence("create", "-f", "qcow2", *words, cwd=tmp_path).stdout == expected
    without_sizes = [line for line in described.splitlines() if "actual-size" not in line]
    ours = qemu_img(tmp_path, "info", "-U", "--output=json", "new").splitlines()
    assert [line for line in ours if "actual-size" not in line] == without_sizes
    if "missing" not in words:
        qemu_img(tmp_path, "check", "new")
        compared = run(["qemu-img", "map", "--output=json", tmp_path / "new"]).stdout
        assert '"data": true' not in compared or "preallocation" in "".join(words)


def test_create_raw(tmp_path: Path) -> None:
    expected = qemu_img(tmp_path, "create", "-f", "raw", "-o", "preallocation=full", "new", "1M")
    assert cowfence("create", "-f", "raw", "-o", "preallocation=full", "new", "1M", cwd=tmp_path).stdout == expected
    assert (tmp_path / "new").read_bytes() == bytes(MIB)
    assert cowfence("create", "-q", "new", "1M", cwd=tmp_path).stdout == ""


@pytest.mark.parametrize("words", [[], ["bs=1M"], ["bs=1000", "skip=7"], ["bs=64k", "count=3"], ["count=0"], ["bs=10M"]])
@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_dd(tmp_path: Path, words: list[str], target: str) -> None:
    image = chain(tmp_path)
    qemu_img(tmp_path, "dd", "-O", target, f"if={image}", "of=theirs", *words)
    cowfence("dd", "-O", target, f"if={image}", "of=ours", *words, "--ref-root", tmp_path, cwd=tmp_path)
    # A disk is made of whole sectors: of a last half one qemu-img's raw file has the rest, and ours has not.
    run(["qemu-img", "compare", "-f", target, "-F", target, tmp_path / "ours", tmp_path / "theirs"])
    if target == "qcow2":
        run(["qemu-img", "check", tmp_path / "ours"])


def test_dd_counts_behind_what_it_skips(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * KIB + b"b" * KIB + b"c" * KIB)
    cowfence("dd", "-f", "raw", "if=a", "of=b", "bs=1k", "skip=1", "count=1", cwd=tmp_path)
    assert (tmp_path / "b").read_bytes() == b"b" * KIB


def test_dd_keeps_holes(tmp_path: Path) -> None:
    cowfence("create", "a", "100M", cwd=tmp_path)
    qemu_io(tmp_path, "a", "write -P 1 50M 64k", "write -P 0 60M 1M")
    cowfence("dd", "if=a", "of=b", cwd=tmp_path)
    assert (tmp_path / "b").stat().st_size == 100 * MIB
    assert (tmp_path / "b").stat().st_blocks * 512 <= 128 * KIB
