"""``map --html``: held against ``explain``, cluster by cluster, and drawn by a browser where there is one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cowfence.ops.explain import explain
from cowfence.ops.layout import Use, layout
from helpers_cli import cowfence as command
from judges import run

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("map") / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "4M"])
    words = ["-c", "write -P 3 0 300k"]
    for number in range(10):
        words += ["-c", f"write -c -P {number + 1} {1024 + 4 * number}k 4k"]
    run(["qemu-io", *words, path])
    run(["qemu-img", "snapshot", "-c", "s", path])
    run(["qemu-img", "bitmap", "--add", path, "b"])
    run(["qemu-io", "-c", "write -P 9 200k 200k", path])
    return path


def test_every_cluster_as_it_is_explained(image: Path) -> None:
    found = layout(image)
    for cluster, use in enumerate(found.uses.tolist()):
        host = explain(image, cluster * 4096, guest=False).host
        assert host is not None
        texts = " ".join(host.structures)
        if use == Use.FREE:
            assert host.verdict == "free"
        elif use in (Use.DATA, Use.SHARED):
            assert host.ways
            assert {way.state for way in host.ways} <= {"data", "compressed"}
        elif use == Use.COMPRESSED:
            assert any(way.state == "compressed" for way in host.ways)
        else:
            word = {Use.L2: "L2 table", Use.L1: "L1", Use.REFCOUNTS: "refcount", Use.HEADER: "header"}.get(Use(use), "")
            assert host.structures
            assert word in texts
    assert {Use.DATA, Use.SHARED, Use.COMPRESSED, Use.L2, Use.L1, Use.REFCOUNTS, Use.HEADER, Use.SNAPSHOTS, Use.BITMAPS} <= set(
        found.totals()
    )


def test_what_is_wrong_is_shown(image: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled"
    content = bytearray(image.read_bytes().ljust(image.stat().st_size + 4095 & ~4095, b"\0") + bytes(4096))
    table = int.from_bytes(content[48:56], "big")
    block = int.from_bytes(content[table : table + 8], "big")
    data = int(np.flatnonzero(layout(image).uses == Use.DATA)[0])
    content[block + 2 * data : block + 2 * data + 2] = bytes(2)
    last = len(content) // 4096 - 1
    content[block + 2 * last : block + 2 * last + 2] = b"\0\1"
    spoiled.write_bytes(content)
    uses = layout(spoiled).uses
    assert (uses[data], uses[last]) == (Use.IN_DANGER, Use.LEAKED)


def test_the_page(image: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command("map", "--html", page, image)
    text = page.read_text()
    cells = re.findall(r'<i class="(\w+)" title="([^"]*)"', text)
    assert len(cells) == len(layout(image).uses)
    assert cells[0] == ("header", "cluster 0, from 0x0: header")
    assert "<script" not in text
    assert "http:" not in text


def test_names_are_escaped_and_large_files_are_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "<b>&\n"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,preallocation=metadata", path, "8M"])
    command("map", "--html", tmp_path / "page", path)
    text = (tmp_path / "page").read_text()
    assert "<b>" not in text
    assert len(re.findall(r'title="clusters \d+ to', text)) <= 6000


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(65536))
    done = command("map", "-f", "raw", "--html", tmp_path / "page", tmp_path / "raw", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not (tmp_path / "page").exists()
