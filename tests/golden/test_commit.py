"""``commit`` beside qemu-img's, option by option."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from golden.beside import SECRET, same, theirs
from helpers_programs import Programs

SCRIPTS = """
commit top
commit -q top
commit -d top
commit -d -q top
commit -p top
commit -p -q top
commit -f qcow2 top
commit top -q
commit top -b base
commit -t none top
commit -t none -b base upper
commit -t unsafe top
commit -t writeback -d top
commit -t writethrough top
commit -t directsync top
commit -r 1M top
commit -r 0 top
commit -r 10M -p upper
commit -b base upper
commit -b ./base upper
commit -b top upper
commit -b base -d upper
commit -b base top
commit upper; commit top
commit -b base upper; commit upper; commit top
commit long
commit short
commit overraw
commit -b raw overraw
commit --image-opts driver=qcow2,file.filename=top
commit --image-opts driver=qcow2,file.driver=file,file.filename=upper -b base
commit 'json:{"driver":"qcow2","file":{"driver":"file","filename":"top"}}'
commit --object secret,id=k,file=key top
create -q -f qcow2 -o extended_l2=on -b base -F qcow2 e; >-c "write 1k 5k" -c "write -z 64k 2k" e; commit e
create -q -f qcow2 -o compat=0.10 -b base -F qcow2 e; >-c "write 1k 5k" -c "write -z 64k 64k" e; commit e
create -q -f qcow2 -b comp -F qcow2 e; >-c "write 0 4k" e; commit e
create -q -f qcow2 -b v2 -F qcow2 e; >-c "write -z 0 128k" e; commit e
create -q -f qcow2 -b data -F qcow2 e; >-c "write 0 96k" e; commit e
create -q -f qcow2 -b snap -F qcow2 e; >-c "write 0 96k" e; commit e; snapshot -a one snap
create -q -f qcow2 -b a -F qcow2 e; >-c "write 0 96k" e; commit e
create -q -f qcow2 -b base -F qcow2 e; bitmap --add e b; >-c "write 0 96k" e; commit e
create -q -f qcow2 -b base -F qcow2 e; commit e
create -q -f qcow2 -b raw -F raw e 3M; >-c "write 2M 64k" e; commit e
create -q -f qcow2 -b short -F qcow2 e 1M; commit e
create -q -f qcow2 -o compat=0.10 c 512k; create -q -f qcow2 -b c -F qcow2 e 1M; >-c "write -z 0 1M" e; commit e
create -q -f qcow2 -o extended_l2=on c 512k; create -q -f qcow2 -b c -F qcow2 e 1M; >-c "write -z 3k 6k" e; commit e
create -q -f qcow2 -o cluster_size=512 c 512k; create -q -f qcow2 -b c -F qcow2 e 1M; >-c "write -z 3k 6k" e; commit e
snapshot -c x base; create -q -f qcow2 -b base -F qcow2 e; >-c "write 0 1M" e; commit e; snapshot -l base
create -q -f qcow2 -b upper -F qcow2 e; >-c "write -z 0 1M" e; commit -b base e; commit -b top e; commit e
create -q -f qcow2 -b raw -F raw e; >-c "write -z 0 1M" e; commit e
create -q -f qcow2 -b raw -F raw e; >-c "discard 0 64k" e; commit e
resize -q top 1100k; commit top
resize -f raw -q --shrink raw 1000000; create -q -f qcow2 -b raw -F raw e 2M; >-c "write 990000 9k" e; commit -t none e
create -q -f qcow2 -b dirty -F qcow2 e; >-c "write 0 64k" e; commit e
commit dirty
commit -f raw raw
commit -b nowhere top
commit -b raw top
commit -b upper upper
commit -b short top
commit base
commit v2
commit snap
commit ext
commit data
commit comp
commit --image-opts top
commit --image-opts driver=raw,file.filename=raw
commit --image-opts -f qcow2 driver=qcow2,file.filename=top
commit -t foo top
~commit raw
~commit -f raw top
~commit -f foo top
~commit lost
~commit corrupt
~commit bad
~commit nowhere
~commit .
~commit /dev/null
~commit json:foo
~commit nbd+unix:///x?socket=nowhere
~commit luks
~commit
~commit a b
~commit -r x top
~commit -r -1 top
~commit -U top
~commit -z top
~commit -b
~commit --object secret,id=k top
~commit --object secret,id=k,file=nowhere top
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


def test_an_image_with_snapshots_is_refused(programs: Programs, folder: Path) -> None:
    before = [(folder / name).read_bytes() for name in ("snaptop", "base")]
    done = programs.run(["commit", "snaptop"], folder)
    assert done.returncode == 1
    assert "internal snapshots" in done.stderr
    assert [(folder / name).read_bytes() for name in ("snaptop", "base")] == before


def test_a_base_that_is_marked_corrupt_is_refused(programs: Programs, folder: Path) -> None:
    assert theirs(["create", "-q", "-f", "qcow2", "-b", "corrupt", "-F", "qcow2", "e"], folder).returncode == 0
    before = (folder / "corrupt").read_bytes()
    done = programs.run(["commit", "e"], folder)
    assert done.returncode == 1
    assert "marked corrupt" in done.stderr
    assert (folder / "corrupt").read_bytes() == before


def test_the_rate_is_kept(programs: Programs, folder: Path) -> None:
    assert theirs(["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "e", "4M"], folder).returncode == 0
    assert theirs(["-c", "write 0 4M", "e"], folder, program="qemu-io").returncode == 0
    began = time.monotonic()
    assert programs.run(["commit", "-q", "-r", "4M", "e"], folder).returncode == 0
    # Of the four pieces the first is not waited for.
    assert time.monotonic() - began >= 0.75


def test_an_encrypted_image_is_committed_with_its_secret(programs: Programs, folder: Path) -> None:
    wanted = ["-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", "-b", "base", "-F", "qcow2"]
    assert programs.run(["create", "-q", "-f", "qcow2", "--object", SECRET, *wanted, "e"], folder).returncode == 0
    opened = ["--object", SECRET, "--image-opts", "driver=qcow2,file.filename=e,encrypt.key-secret=k"]
    assert theirs([*opened, "-c", "write -P 7 0 64k"], folder, program="qemu-io").returncode == 0
    assert programs.run(["commit", "e"], folder).returncode == 1
    assert programs.run(["commit", *opened], folder).returncode == 0
    read = theirs(["-c", "read -P 7 0 64k", "base"], folder, program="qemu-io")
    assert read.returncode == 0, read.stdout
