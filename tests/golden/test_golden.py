"""Our command line and qemu-img's side by side: standard output and exit code are the same, and errors are there or not.

What differs on purpose is in ``docs/differences.md``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers_cli import cowfence
from judges import run

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.raw").write_bytes(bytes(10 * MIB))
    (tmp_path / "b.raw").write_bytes(bytes(5_000_000) + b"x" + bytes(10 * MIB - 5_000_001))
    (tmp_path / "c.raw").write_bytes(bytes(11 * MIB))
    (tmp_path / "d.raw").write_bytes(bytes(10_990_000) + b"y" + bytes(11 * MIB - 10_990_001))
    run(["qemu-img", "create", "-q", "-f", "qcow2", "q.qcow2", "10M"])
    run(["qemu-io", "-c", "write -z 0 64k", "q.qcow2"])
    run(["qemu-img", "bitmap", "--add", "q.qcow2", "b"])
    (tmp_path / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    return tmp_path


JSON_NAME = "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "a.raw"}})
COMPARE = [
    "-f raw -F raw a.raw b.raw",
    "-f raw -F raw a.raw c.raw",
    "-f raw -F raw c.raw a.raw",
    "-f raw -F raw a.raw d.raw",
    "-s -f raw -F raw a.raw c.raw",
    "-s -f raw a.raw q.qcow2",
    "-s -f raw -F raw a.raw a.raw",
    "-f raw a.raw q.qcow2",
    "-q -f raw -F raw a.raw b.raw",
    "-f qcow2 -F raw q.qcow2 b.raw",
    "-T none -f raw -F raw a.raw b.raw",
    "-U -f raw -F raw a.raw b.raw",
    "nope q.qcow2",
    "-f qcow2 a.raw q.qcow2",
    "-f foo a.raw q.qcow2",
    "a.raw",
    "",
    "--image-opts driver=raw,file.filename=a.raw driver=qcow2,file.filename=q.qcow2",
    f"{JSON_NAME.replace(' ', '')} q.qcow2",
]
MEASURE = [
    "--size 10G -O qcow2",
    "--output=json --size 10G -O qcow2",
    "-O raw q.qcow2",
    "-O qcow2 q.qcow2",
    "-O qcow2 -o cluster_size=4k,refcount_bits=64 --size 1T",
    "-O qcow2 -o cluster_size=512,refcount_bits=1 --size 7G",
    "-O qcow2 -o extended_l2=on --size 100G",
    "-O qcow2 -o cluster_size=2M --size 3T",
    "-O qcow2 -o extended_l2=on,preallocation=full -f raw b.raw",
    "-O qcow2 -o preallocation=metadata --size 5G",
    "-O qcow2 -o compat=0.10 --size 5G",
    "-O qcow2 -o data_file=x,data_file_raw=on --size 1G",
    "-O qcow2 -f raw b.raw",
    "-O qcow2 -f raw d.raw",
    "-O qcow2 --size 63P",
    "-O qcow2 --size 0",
    "--size 1G -O raw",
    "-O vmdk --size 1G",
    "",
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", [f"compare {words}" for words in COMPARE] + [f"measure {words}" for words in MEASURE])
def test_same_as_qemu_img(words: str) -> None:
    theirs = run(["qemu-img", *words.split()], check=False)
    ours = cowfence(*words.split(), check=False)
    assert (ours.stdout, ours.returncode) == (theirs.stdout, theirs.returncode), ours.stderr
    assert bool(ours.stderr) == bool(theirs.stderr)
    assert len(ours.stderr.splitlines()) <= 1
