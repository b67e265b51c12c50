"""Rebase, commit and amend between QEMU and us: qemu-img finds the same disk, and takes turns with us on one image."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from helpers_cli import cowfence
from judges import run

OPTIONS = {
    "v3": "cluster_size=64k",
    "v2": "compat=0.10,cluster_size=4k",
    "small": "cluster_size=512,refcount_bits=1",
    "wide": "cluster_size=2M,refcount_bits=64",
}
_SIZE = 3 << 20


def info(image: Path) -> dict[str, object]:
    found = json.loads(run(["qemu-img", "info", "--output=json", image]).stdout)
    assert isinstance(found, dict)
    return found


def content(image: Path, tmp_path: Path) -> bytes:
    """What QEMU reads, in an image that its check finds clean."""
    run(["qemu-img", "check", "-q", image])
    run(["qemu-img", "convert", "-O", "raw", image, tmp_path / "out"])
    return (tmp_path / "out").read_bytes()


def scribble(image: Path, rng: random.Random) -> None:
    """Data and zeros, in clusters and in parts of them, by QEMU."""
    words: list[str] = []
    for _ in range(8):
        at, length = rng.randrange(_SIZE // 512 - 300) * 512, rng.randrange(1, 300) * 512
        words += ["-c", rng.choice([f"write -P {rng.randrange(1, 255)} {at} {length}", f"write -z -u {at} {length}"])]
    run(["qemu-io", *words, image])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rebase_and_commit_in_turn(options: str, tmp_path: Path) -> None:
    rng = random.Random(options)
    one, two, image = tmp_path / "one.raw", tmp_path / "two.qcow2", tmp_path / "image.qcow2"
    one.write_bytes(rng.randbytes(2 << 20) + bytes(1 << 20))
    run(["qemu-img", "create", "-q", "-f", "qcow2", two, str(4 << 20)])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", "one.raw", "-F", "raw", image, str(_SIZE)])
    scribble(two, rng)
    scribble(image, rng)
    before = content(image, tmp_path)
    cowfence("rebase", "-b", "two.qcow2", "-F", "qcow2", image)
    assert (info(image)["backing-filename"], info(image)["backing-filename-format"]) == ("two.qcow2", "qcow2")
    assert content(image, tmp_path) == before
    run(["qemu-img", "rebase", "-b", "one.raw", "-F", "raw", image])
    assert content(image, tmp_path) == before
    cowfence("rebase", "-p", "-b", "two.qcow2", "-F", "qcow2", image)
    assert content(image, tmp_path) == before
    assert cowfence("commit", image).stdout == "Image committed.\n"
    assert content(image, tmp_path) == before
    assert content(two, tmp_path)[:_SIZE] == before
    assert json.loads(run(["qemu-img", "map", "--output=json", image]).stdout)[0]["depth"] == 1
    scribble(image, rng)
    before = content(image, tmp_path)
    cowfence("commit", "-q", "-d", image)
    assert content(two, tmp_path)[:_SIZE] == content(image, tmp_path) == before
    cowfence("rebase", "-b", "", image)
    assert "backing-filename" not in info(image)
    assert content(image, tmp_path) == before


def test_commit_grows_a_raw_base(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 4096)
    image = tmp_path / "image.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", image, "1M"])
    run(["qemu-io", "-c", "write -P 7 512k 64k", image])
    before = content(image, tmp_path)
    cowfence("commit", image)
    assert (tmp_path / "base.raw").read_bytes() == before == content(image, tmp_path)


@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k"])
def test_amended_for_qemu(cluster_size: str, tmp_path: Path) -> None:
    """Every width, both versions, with persistent bitmaps where QEMU put their extension behind the feature names."""
    rng = random.Random(cluster_size)
    image = tmp_path / "image.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", image, str(_SIZE)])
    run(["qemu-img", "bitmap", "--add", image, "bits"])
    scribble(image, rng)
    before = content(image, tmp_path)
    for words in ("refcount_bits=1", "refcount_bits=64,lazy_refcounts=on", "refcount_bits=8", "refcount_bits=16"):
        cowfence("amend", "-o", words, image)
        assert content(image, tmp_path) == before
    data = info(image)["format-specific"]["data"]  # type: ignore[index]
    assert (data["refcount-bits"], data["lazy-refcounts"], data["bitmaps"][0]["name"]) == (16, True, "bits")
    run(["qemu-img", "bitmap", "--remove", image, "bits"])
    cowfence("amend", "-q", "-o", "compat=0.10", image)
    assert content(image, tmp_path) == before
    assert info(image)["format-specific"]["data"]["compat"] == "0.10"  # type: ignore[index]
    cowfence("amend", "-o", "compat=v3,size=5M", image)
    assert content(image, tmp_path) == before.ljust(5 << 20, b"\0")
    run(["qemu-img", "amend", "-o", "refcount_bits=32", image])
    cowfence("amend", "-o", "refcount_bits=16,size=3M", image)
    assert content(image, tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ["amend", "IMAGE"],
        ["amend", "-o", "foo=bar", "IMAGE"],
        ["amend", "-o", "compat=0.12", "IMAGE"],
        ["amend", "-o", "lazy_refcounts=maybe", "IMAGE"],
        ["amend", "-o", "refcount_bits=3", "IMAGE"],
        ["amend", "-o", "refcount_bits=128", "IMAGE"],
        ["amend", "-o", "compat=0.10,refcount_bits=8", "IMAGE"],
        ["amend", "-o", "compat=0.10,lazy_refcounts=on", "IMAGE"],
        ["amend", "-o", "data_file=x", "IMAGE"],
        ["amend", "-o", "data_file_raw=on", "IMAGE"],
        ["amend", "-o", "size=100", "IMAGE"],
        ["amend", "-f", "raw", "-o", "size=1M", "RAW"],
        ["rebase", "IMAGE"],
        ["rebase", "-u", "-b", "x", "IMAGE"],
        ["rebase", "-u", "-b", "x", "-F", "raw", "IMAGE"],
        ["rebase", "-b", "", "IMAGE"],
        ["commit", "IMAGE"],
        ["commit", "-b", "nothing", "IMAGE"],
    ],
    ids=" ".join,
)
def test_the_words_are_qemus(words: list[str], tmp_path: Path) -> None:
    told = []
    for is_qemu in (True, False):
        image, raw = tmp_path / "image", tmp_path / "raw"
        run(["qemu-img", "create", "-q", "-f", "qcow2", image, "10M"])
        raw.write_bytes(bytes(4096))
        command = [{"IMAGE": str(image), "RAW": str(raw)}.get(word, word) for word in words]
        done = run(["qemu-img", *command], check=False) if is_qemu else cowfence(*command, check=False)
        lines = [line.split(": ")[-1] for line in done.stderr.splitlines() if line]
        told.append((done.returncode, done.stdout.strip(), lines[:1]))
    assert told[0] == told[1]


@pytest.mark.parametrize("name", ["cluster_size=4k", "preallocation=full", "compression_type=zstd", "backing_file=x"])
def test_what_cannot_be_amended_is_refused_by_name(name: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"])
    assert run(["qemu-img", "amend", "-o", name, image], check=False).returncode == 1
    done = cowfence("amend", "-o", name, image, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Invalid parameter" in done.stderr or "rebase" in done.stderr
