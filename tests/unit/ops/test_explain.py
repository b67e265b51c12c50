"""``explain``: held against qemu-img's map, and against every cluster of images with all kinds of structures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import cowfence
from cowfence.errors import OutOfRange
from cowfence.ops.explain import explain
from cowfence.qcow2.verify import survey
from cowfence.storage.file import FileStorage
from helpers_cli import cowfence as command
from judges import run

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    path = folder / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "base", "4M"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "qcow2", path, "4M"])
    words = []
    rng = random.Random(3)
    for number, place in enumerate(rng.sample(range(1000), 60)):
        verb = rng.choice(["write -P 3", "write -z", "write -c -P 7"])
        words += ["-c", f"{verb} {place * 4}k 4k"]
        if number == 30:
            run(["qemu-io", *words, path])
            run(["qemu-img", "snapshot", "-c", "s", path])
            words = []
    run(["qemu-io", *words, path])
    run(["qemu-img", "bitmap", "--add", path, "b"])
    run(["qemu-io", "-c", "write -P 9 3M 8k", path])
    return path


def test_every_guest_cluster_as_qemu_maps_it(image: Path) -> None:
    extents = json.loads(run(["qemu-img", "map", "--output=json", image]).stdout)
    for extent in extents:
        offset = extent["start"] + extent["length"] - 1
        guest = explain(image, offset, host=False).guest
        assert guest is not None
        if extent["depth"]:
            assert (guest.state, guest.backing) == ("unallocated", "base")
        elif extent["zero"]:
            assert guest.state == "zero"
        elif "offset" in extent:
            assert (guest.state, guest.host_offset) == ("data", extent["offset"] + extent["length"] - 1)
        else:
            assert guest.state == "compressed"


def test_every_host_cluster_has_what_leads_to_it(image: Path) -> None:
    storage = FileStorage.open(image)
    census = survey(storage).census
    storage.close()
    kinds = set()
    for cluster in range(census.clusters):
        host = explain(image, cluster * 4096 + 17, guest=False).host
        assert host is not None
        assert len(host.structures) + len(host.ways) == host.references == int(census.references[cluster])
        assert host.verdict == ("in use" if host.references else "free")
        kinds |= {text.split(",")[0].split(" of ")[0].rstrip("0123456789 ") for text in host.structures}
        kinds |= {way.state for way in host.ways}
    assert {"header", "L1 table", "refcount table", "refcount block", "L2 table", "snapshot table", "data"} <= kinds
    assert {"compressed", "bitmap directory"} & kinds


def test_a_leak_and_a_danger_are_named(tmp_path: Path) -> None:
    with cowfence.create(tmp_path / "a", MIB) as disk:
        disk.write(0, b"1" * 65536)
    run(["qemu-img", "check", "-q", tmp_path / "a"])
    guest = explain(tmp_path / "a", 0, host=False).guest
    assert guest is not None
    assert guest.host_offset is not None
    content = bytearray((tmp_path / "a").read_bytes())
    block = int.from_bytes(content[65536 : 65536 + 8], "big")
    at = block + 2 * (guest.host_offset >> 16)
    for count, verdict in ((0, "in danger: more lead to it than are counted"), (2, "in use, and counted too often")):
        content[at : at + 2] = count.to_bytes(2, "big")
        (tmp_path / "a").write_bytes(content)
        host = explain(tmp_path / "a", guest.host_offset, guest=False).host
        assert host is not None
        assert host.verdict == verdict
    content[guest.l2_offset or 0 : (guest.l2_offset or 0) + 8] = bytes(8)
    (tmp_path / "a").write_bytes(content)
    host = explain(tmp_path / "a", guest.host_offset, guest=False).host
    assert host is not None
    assert host.verdict.startswith("leaked")


def test_outside(image: Path) -> None:
    with pytest.raises(OutOfRange):
        explain(image, 5 * MIB, host=False)
    host = explain(image, 1 << 40).host
    assert host is not None
    assert host.verdict == "past the end of the file"


def test_the_command(image: Path, tmp_path: Path) -> None:
    said = command("explain", image, "3M").stdout
    assert said.startswith("guest offset 0x300000: data\n")
    told = json.loads(command("explain", "--output=json", "--host", image, "0").stdout)
    assert told["host"]["structures"] == ["header"]
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    done = command("explain", tmp_path / "junk", "0", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_damage_is_explained_too(image: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    content = image.read_bytes()
    for _ in range(60):
        spoiled = bytearray(content)
        at = rng.randrange(len(content) // 8) * 8
        spoiled[at : at + 8] = rng.randbytes(8)
        (tmp_path / "spoiled").write_bytes(spoiled)
        try:
            explain(tmp_path / "spoiled", rng.randrange(4 * MIB))
        except cowfence.CowfenceError:
            continue
