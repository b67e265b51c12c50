"""``compare`` beside qemu-img's, option by option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cowfence
from cowfence.nbd.export import Export
from golden.beside import same, theirs
from helpers_nbd import serving
from helpers_programs import Programs

SCRIPTS = """
compare a a
compare a base
compare base comp
compare base top
compare -f raw -F raw raw raw
compare raw raw
compare -f raw raw base
compare -F raw base raw
compare -f qcow2 -F qcow2 base comp
compare -s base base
compare -s base comp
compare -s a a
compare -s ext ext
compare -s data data
compare -s v2 v2
compare -s comp comp
compare -s base long
compare -s short base
compare -s -q base comp
compare base comp -q -s
compare -q base comp
compare -q a base
compare -q base long
compare long base
compare base long
compare short base
compare base short
create -q -f qcow2 e 2M; compare e short; compare short e
create -q -f qcow2 e 512k; convert -O qcow2 base e; resize -q e 2M; compare e base; compare base e; compare -s e base
create -q -f qcow2 e 0; compare e e; compare e base; compare base e; compare -s e e
compare -T none base comp
compare -T writeback base comp
compare -T writethrough base comp
compare -T directsync base comp
compare -T unsafe base comp
compare -U base comp
compare --force-share base comp
compare ext base
compare data base
compare v2 base
compare snap base
compare dirty corrupt
compare -s dirty corrupt
compare corrupt base
compare upper top
compare upper base
compare overraw raw
compare -p -q base comp
compare -p -q a base
convert -O qcow2 upper flat; compare upper flat; compare -s upper flat
convert -O qcow2 -o cluster_size=2M upper flat; compare upper flat
convert -O raw base b.raw; compare -f raw b.raw base; compare -s -f raw b.raw base; compare -s -F raw base b.raw
create -q -f qcow2 z 1M; >-c "write -z 0 1M" z; compare z z; create -q -f qcow2 y 1M; compare z y; compare -s z y
create -q -f qcow2 y 1M; create -q -f qcow2 -o preallocation=metadata z 1M; compare y z; compare -s y z; compare -s z z
create -q -f qcow2 y 1M; create -q -f raw z 1M; compare y z; compare -s -F raw y z; compare -s -f raw -F raw z z
create -q -f qcow2 y 1M; >-c "write -P 1 1047552 1k" y; create -q -f qcow2 z 1M; compare y z
convert -O raw base r; >-f raw -c "write -P 9 700001 1" r; compare -f raw r base; compare -F raw base r; compare -sf raw r base
compare --image-opts driver=qcow2,file.filename=base driver=qcow2,file.filename=comp
compare --image-opts driver=raw,file.filename=raw driver=qcow2,file.filename=base
compare --object secret,id=k,file=key --image-opts file.filename=luks,encrypt.key-secret=k driver=raw,file.filename=raw
compare base 'json:{"driver":"qcow2","file":{"driver":"file","filename":"comp"}}'
compare
compare base
compare base comp top
compare -T foo base comp
compare --image-opts base comp
compare --image-opts -f qcow2 driver=qcow2,file.filename=base driver=qcow2,file.filename=comp
~compare -f qcow2 raw base
~compare -F qcow2 base raw
~compare -f foo a base
~compare -F foo a base
~compare nowhere base
~compare base nowhere
~compare lost base
~compare base lost
~compare base json:foo
~compare -r base comp
~compare -c base comp
~compare --object secret,id=k base comp
~compare --object secret,id=k,file=nowhere base comp
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


def test_progress_ends_its_line_before_the_result(programs: Programs, folder: Path) -> None:
    for images, result in (("base comp", "Images are identical."), ("a base", "Content mismatch at offset 0!")):
        told = programs.run(["compare", "-p", *images.split()], folder).stdout
        assert told.endswith(f"\r\n{result}\n")


def test_strict_is_about_allocation_alone(programs: Programs, folder: Path) -> None:
    """qemu-img also tells apart runs of which one goes on to the end of the disk and the other does not."""
    done = programs.run(["compare", "-s", "overraw", "raw"], folder)
    assert (done.stdout, done.returncode) == ("Content mismatch at offset 32768!\n", 1)
    for name in ("y", "z"):
        assert theirs(["create", "-q", "-f", "qcow2", name, "1M"], folder).returncode == 0
    assert theirs(["-c", "write 1020k 1k", "y"], folder, program="qemu-io").returncode == 0
    done = programs.run(["compare", "-s", "y", "z"], folder)
    assert (done.stdout, done.returncode) == ("Strict mode: Offset 983040 block status mismatch!\n", 1)


def test_the_secret_is_asked_for_where_data_is_read(programs: Programs, folder: Path) -> None:
    done = programs.run(["compare", "luks", "raw"], folder)
    assert done.returncode == 4
    assert "secret was not given" in done.stderr


def test_what_begins_like_qcow2_is_never_raw(programs: Programs, folder: Path) -> None:
    done = programs.run(["compare", "bad", "base"], folder)
    assert done.returncode == 2
    assert "qcow2 version 0" in done.stderr


def test_a_raw_disk_behind_nbd_is_allocated_as_the_file_is(programs: Programs, folder: Path) -> None:
    uri = f"nbd+unix:///?socket={folder}/sock"
    with cowfence.open(folder / "raw", format="raw") as disk, serving(folder, {"": Export(disk, read_only=True)}):
        for images in ([uri, "raw"], ["raw", uri]):
            words = ["compare", "-s", "-f", "raw", "-F", "raw", *images]
            ours, judge = programs.run(words, folder), theirs(words, folder)
            assert (ours.stdout, ours.returncode) == (judge.stdout, judge.returncode), ours.stderr


def test_long_options_are_written_out(programs: Programs, folder: Path) -> None:
    done = programs.run(["compare", "--force", "base", "comp"], folder)
    assert done.returncode == 1
    assert "--force" in done.stderr


def test_as_json(programs: Programs, folder: Path) -> None:
    done = programs.run(["compare", "--output=json", "long", "base"], folder)
    assert json.loads(done.stdout) == {
        "identical": False,
        "sizes-differ": True,
        "mismatch-offset": 1536 << 10,
        "status-differs": False,
    }
