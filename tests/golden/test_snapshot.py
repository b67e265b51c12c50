"""``snapshot`` beside qemu-img's, option by option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden.beside import SECRET, plain, same, theirs
from helpers_programs import Programs

SCRIPTS = """
snapshot -l snap
snapshot snap -l
snapshot -l -q snap
snapshot -l a
snapshot a
snapshot -l raw
snapshot -l -U snap
snapshot -l --force-share snap
snapshot -l ext
snapshot -l data
snapshot -l dirty
snapshot -l corrupt
snapshot -c x dirty; snapshot -l dirty
snapshot -c new a; snapshot -l a
snapshot a -c new
snapshot -cnew a
snapshot -q -c new a
snapshot -c one snap; snapshot -l snap; snapshot -a one snap; snapshot -d one snap; snapshot -l snap
snapshot -c "" a; snapshot -l a
snapshot -c "two words" a; snapshot -l a
snapshot -a one snap
snapshot -a 1 snap
snapshot -a two snap
snapshot -q -a 2 snap
snapshot -d one snap
snapshot -d two snap
snapshot -q -d two snap
snapshot -d one snap; snapshot -d two snap; snapshot -l snap
snapshot -d one snap; snapshot -c three snap; snapshot -l snap
snapshot -c 1 snap; snapshot -l snap; snapshot -a 1 snap
snapshot -c 1 snap; snapshot -d 1 snap; snapshot -l snap
snapshot -c snapshot.id=7,snapshot.name=q a; snapshot -l a
snapshot -c x v2; snapshot -l v2; >-c "write 0 128k" v2; snapshot -a x v2
snapshot -c x ext; >-c "write 2k 4k" ext; snapshot -a x ext; snapshot -d x ext
snapshot -c x comp; >-c "write 0 64k" comp; snapshot -a x comp
snapshot -c x base; >-c "write 0 64k" base; snapshot -d x base
snapshot -c x top; snapshot -l top; >-c "write 0 64k" top; snapshot -a x top
snapshot -c x upper
snapshot -c x snap; resize -q snap 2M; snapshot -l snap; snapshot -a one snap
create -q -f qcow2 -o refcount_bits=1 n 1M; snapshot -c x n
create -q -f qcow2 -o refcount_bits=2 n 1M; snapshot -c x n; snapshot -c y n; snapshot -c z n; snapshot -l n
create -q -f qcow2 -o preallocation=metadata n 1M; snapshot -c x n; snapshot -a x n
create -q -f qcow2 n 0; snapshot -c x n; snapshot -a x n; snapshot -d x n
snapshot --image-opts -l driver=qcow2,file.filename=snap
snapshot --image-opts -c three driver=qcow2,file.filename=snap
snapshot --image-opts -a one driver=qcow2,file.filename=snap
snapshot --image-opts -d one driver=qcow2,file.filename=snap
snapshot --image-opts -l driver=raw,file.filename=snap
snapshot -l 'json:{"driver":"qcow2","file":{"driver":"file","filename":"snap"}}'
snapshot -c x 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}'
snapshot -l --object secret,id=k,file=key snap
snapshot --object secret,id=k,file=key --image-opts -c x driver=qcow2,file.filename=luks,encrypt.key-secret=k
snapshot --object secret,id=k,file=key --image-opts -l driver=qcow2,file.filename=luks,encrypt.key-secret=k
snapshot -l -c x snap
snapshot -c x -d one snap
snapshot -a one -l snap
snapshot -l -l snap
snapshot --image-opts -l snap
~snapshot -U -c three snap
~snapshot -U -a one snap
~snapshot -U -d one snap
~snapshot -a 3 snap
~snapshot -a none snap
~snapshot -a none a
~snapshot -a "" snap
~snapshot -d none snap
~snapshot -d none a
~snapshot -d "" snap
~snapshot -c
~snapshot -a
~snapshot -d
~snapshot
~snapshot a snap
~snapshot -l a snap
~snapshot -l nowhere
~snapshot -c x nowhere
~snapshot -c x bad
~snapshot -c x raw
~snapshot -a x raw
~snapshot -d x raw
~snapshot -c x data
~snapshot -c x corrupt
~snapshot -l json:foo
~snapshot -l --object secret,id=k snap
~snapshot -l --object secret,id=k,file=nowhere snap
~snapshot -z snap
~snapshot -p -c new a
~snapshot -t none -c new a
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


def test_without_an_action_they_are_listed(programs: Programs, folder: Path) -> None:
    listed = theirs(["snapshot", "-l", "snap"], folder).stdout
    for words in (["snap"], ["-q", "snap"], ["--image-opts", "driver=qcow2,file.filename=snap"]):
        done = programs.run(["snapshot", *words], folder)
        assert (plain(done.stdout), done.returncode) == (plain(listed), 0)


def test_an_id_is_deleted_too(programs: Programs, folder: Path) -> None:
    assert programs.run(["snapshot", "-d", "1", "snap"], folder).returncode == 0
    assert [found["name"] for found in json.loads(theirs(["info", "--output=json", "snap"], folder).stdout)["snapshots"]] == [
        "two"
    ]


def test_a_name_is_never_cut(programs: Programs, folder: Path) -> None:
    before = (folder / "a").read_bytes()
    done = programs.run(["snapshot", "-c", "n" * 256, "a"], folder)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert (folder / "a").read_bytes() == before


def test_a_bitmap_that_records_is_dirty_all_over_after_an_apply(programs: Programs, folder: Path) -> None:
    for words in (["-c", "x", "a"], ["-a", "x", "a"]):
        assert programs.run(["snapshot", *words], folder).returncode == 0
    recorded = {name: programs.run(["bitmap", "--extents", "--output=json", "a", name], folder).stdout for name in ("b", "off")}
    assert json.loads(recorded["b"]) == [{"start": 0, "length": 1 << 20, "dirty": True}]
    assert json.loads(recorded["off"]) == []


def test_neither_backing_file_nor_secret_is_needed(programs: Programs, folder: Path) -> None:
    for image in ("lost", "luks"):
        assert programs.run(["snapshot", "-c", "x", image], folder).returncode == 0
        assert " x " in programs.run(["snapshot", "-l", image], folder).stdout
        assert programs.run(["snapshot", "-a", "x", image], folder).returncode == 0
    opened = ["--object", SECRET, "--image-opts", "driver=qcow2,file.filename=luks,encrypt.key-secret=k"]
    assert theirs([*opened, "-c", "read -P 14 0 4k"], folder, program="qemu-io").returncode == 0


def test_what_begins_like_qcow2_is_never_raw(programs: Programs, folder: Path) -> None:
    done = programs.run(["snapshot", "-l", "bad"], folder)
    assert done.returncode == 1
    assert "qcow2 version 0" in done.stderr
