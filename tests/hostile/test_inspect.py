"""``inspect --untrusted``: the ways in which uploaded images have hurt somebody (the CVEs are named), and honest images."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from cowfence.ops.inspect import Limits, inspect
from helpers_cli import cowfence as command
from judges import run

KIB, MIB = 1 << 10, 1 << 20


def _image(folder: Path, *options: str, size: str = "4M") -> Path:
    path = folder / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size])
    run(["qemu-io", "-c", "write -P 3 0 300k", path])
    return path


def _verdict(path: Path, *options: str) -> dict[str, Any]:
    done = command("inspect", "--untrusted", "--output=json", *options, path, check=False)
    assert done.returncode in (0, 2), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["verdict"] == "accepted") == (done.returncode == 0)
    return found


def _spoiled(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ("compat=0.10", "version 2"),
        ("extended_l2=on", "extended L2 entries"),
        ("compression_type=zstd", "compression with zstd"),
        ("lazy_refcounts=on", "lazy refcounts"),
        ("cluster_size=512", "version 3"),
    ],
)
def test_honest_images_are_accepted(tmp_path: Path, options: str, feature: str) -> None:
    found = _verdict(_image(tmp_path, "-o", options))
    assert found["reasons"] == []
    assert feature in found["features"]
    assert found["virtual-size"] == 4 * MIB


def test_snapshots_bitmaps_and_compressed_clusters_are_named(tmp_path: Path) -> None:
    path = _image(tmp_path)
    run(["qemu-img", "snapshot", "-c", "s", path])
    run(["qemu-img", "bitmap", "--add", path, "b"])
    run(["qemu-io", "-c", "write -c 1M 64k", path])
    found = _verdict(path)
    assert {"1 internal snapshots", "persistent bitmaps", "compressed clusters"} <= set(found["features"])
    assert found["verdict"] == "accepted"


def test_a_backing_file_is_refused_and_not_opened(tmp_path: Path) -> None:  # CVE-2015-5163
    path = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", path, "1M"])
    found = _verdict(path)
    assert found["backing-filename"] == "/etc/passwd"
    assert any("backing file" in reason for reason in found["reasons"])


def test_an_external_data_file_is_refused(tmp_path: Path) -> None:  # CVE-2024-32498, CVE-2024-4467
    path = _image(tmp_path, "-o", f"data_file={tmp_path / 'd'}")
    (tmp_path / "d").unlink()
    found = _verdict(path)
    assert found["data-filename"] == str(tmp_path / "d")
    assert any("data file" in reason for reason in found["reasons"])


@pytest.mark.parametrize(
    "magic", [b"QFI\xfb\0\0\0\3", b"KDMV", b"# Disk DescriptorFile", b"vhdxfile", b"QED\0", b"LUKS\xba\xbe"]
)
def test_a_raw_disk_that_is_something_else(
    tmp_path: Path, magic: bytes
) -> None:  # CVE-2024-40767, CVE-2022-47951, CVE-2026-24708
    path = tmp_path / "image"
    path.write_bytes(magic.ljust(64 * KIB, b"\0"))
    assert _verdict(path, "-f", "raw")["verdict"] == "refused"


def test_a_raw_disk(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(64 * KIB))
    assert _verdict(path, "-f", "raw")["verdict"] == "accepted"
    found = _verdict(path)
    assert found["format"] == "unknown"
    assert found["reasons"] == ["it is not qcow2: the magic string is missing"]


@pytest.mark.parametrize(
    ("at", "content"),
    [
        (4, struct.pack(">I", 1)),  # version 1: CVE-2014-0222
        (8, struct.pack(">Q", 1 << 50)),  # the backing name past the first cluster: CVE-2014-0144
        (20, struct.pack(">I", 60)),  # cluster_bits
        (36, struct.pack(">I", 1 << 31)),  # the L1 size: CVE-2014-0143, -0144
        (40, struct.pack(">Q", 7)),  # the L1 offset
        (48, struct.pack(">Q", 1 << 60)),  # the refcount table
        (56, struct.pack(">I", 1 << 30)),  # its length
        (60, struct.pack(">I", 1 << 31)),  # snapshots
        (72, struct.pack(">Q", 1 << 60)),  # an unknown incompatible feature
        (72, struct.pack(">Q", 2)),  # marked corrupt
        (96, struct.pack(">I", 63)),  # the refcount order
        (100, struct.pack(">I", 1 << 31)),  # the header's length
    ],
)
def test_a_hostile_header(tmp_path: Path, at: int, content: bytes) -> None:
    path = _image(tmp_path)
    _spoiled(path, at, content)
    found = _verdict(path)
    assert found["verdict"] == "refused"
    assert found["reasons"]


def test_a_damaged_table(tmp_path: Path) -> None:
    path = _image(tmp_path)
    mapped = json.loads(run(["qemu-img", "map", "--output=json", path]).stdout)
    offset = mapped[0]["offset"]
    content = path.read_bytes()
    entry = content.index(struct.pack(">Q", offset | 1 << 63))
    _spoiled(path, entry, struct.pack(">Q", 1 << 62))
    assert any(reason.startswith("damaged") for reason in _verdict(path)["reasons"])


def test_a_small_file_with_a_large_claim_takes_little(tmp_path: Path) -> None:  # CVE-2015-5162, CVE-2018-10908
    path = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "1P"])
    assert _verdict(path, "--seconds", "5", "--memory", "600M")["verdict"] == "accepted"
    found = _verdict(path, "--max-virtual-size", "10T")
    assert found["reasons"] == [f"the disk has {1 << 50} bytes; at most {10 << 40} are accepted"]
    assert _verdict(path, "--max-file-size", "1k")["verdict"] == "refused"


def test_what_takes_too_much_is_refused(tmp_path: Path) -> None:
    path = _image(tmp_path, "-o", "cluster_size=512")
    os.truncate(path, 80 << 30)
    found = _verdict(path, "--memory", "400M")
    assert found["verdict"] == "refused"
    assert any("memory" in reason for reason in found["reasons"])


def test_what_cannot_be_looked_at(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("nothing", "fifo", "."):
        done = command("inspect", "--untrusted", tmp_path / name, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_without_untrusted_the_directory_is_allowed(tmp_path: Path) -> None:
    _image(tmp_path).rename(tmp_path / "base")
    path = tmp_path / "over"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", path])
    assert command("inspect", path).returncode == 0
    (tmp_path / "base").unlink()
    done = command("inspect", path, check=False)
    assert done.returncode == 2
    assert "base" in done.stdout
    assert command("inspect", "--memory", "1G", path, check=False).returncode == 1


def test_the_library(tmp_path: Path) -> None:
    path = _image(tmp_path)
    assert inspect(path).accepted
    assert not inspect(path, limits=Limits(virtual_bytes=MIB)).accepted
    assert not inspect(path, format="raw").accepted
    hostile = tmp_path / "name\nof two lines"
    path.rename(hostile)
    assert "'name\\nof two lines'" in command("inspect", hostile.name, cwd=tmp_path).stdout.splitlines()[0]
