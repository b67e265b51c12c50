"""``rebase`` beside qemu-img's, option by option."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.beside import SECRET, same, theirs
from helpers_programs import Programs

SCRIPTS = """
rebase -b base -F qcow2 upper
rebase -b "" upper
rebase -b "" top
rebase -b "" -F qcow2 top
rebase -f qcow2 -b base -F qcow2 upper
rebase -q -b base -F qcow2 upper
rebase -p -b base -F qcow2 upper
rebase -p -q -b base -F qcow2 upper
rebase -bbase -Fqcow2 upper
rebase upper -b base -F qcow2
rebase -b ./base -F qcow2 upper
rebase -b top -F qcow2 upper
rebase -b base -F raw upper
rebase -t none -b base -F qcow2 upper
rebase -t unsafe -b base -F qcow2 upper
rebase -T none -b base -F qcow2 upper
rebase -T writeback -b base -F qcow2 upper
rebase -t writethrough -T directsync -b base -F qcow2 upper
rebase -t none -T none -b "" upper
rebase -u -b base -F qcow2 upper
rebase -u -p -b base -F qcow2 upper
rebase -u -b "" top
rebase -u -b base -F raw top
rebase -u -b base -F qcow2 lost
rebase -u -b nowhere -F qcow2 top; rebase -u -b base -F qcow2 top
rebase -u -b raw -F raw snap
rebase -u -b "" snaptop
rebase -u top
rebase -u -F raw top
rebase -u -b upper -F qcow2 base; rebase -u -b "" base
rebase -b raw -F raw top
rebase -b raw -F raw overraw
rebase -b "" overraw
rebase -b a -F qcow2 overraw
rebase -b long -F qcow2 top
rebase -b short -F qcow2 top
rebase -b short -F qcow2 upper
rebase -b base -F qcow2 long
rebase -b short -F qcow2 long
rebase -b "" long
rebase -b "" short
rebase -b long -F qcow2 short
rebase -b base -F qcow2 a
rebase -b raw -F raw v2; rebase -b "" v2
rebase -b raw -F raw ext
rebase -b base -F qcow2 ext
rebase -b raw -F raw data
rebase -b raw -F raw comp
rebase -b comp -F qcow2 top
rebase -b ext -F qcow2 top
rebase -b v2 -F qcow2 top
rebase -b snap -F qcow2 top
rebase -b data -F qcow2 top
create -q -f qcow2 -o extended_l2=on -b base -F qcow2 e; >-c "write 1k 5k" -c "write -z 64k 2k" e; rebase -b comp -F qcow2 e
create -q -f qcow2 -o extended_l2=on -b base -F qcow2 e; >-c "write 1k 5k" -c "write -z 64k 2k" e; rebase -b "" e
create -q -f qcow2 -o cluster_size=2M -b base -F qcow2 e; rebase -b top -F qcow2 e; rebase -b "" e
resize -f raw -q --shrink raw 1000000; create -q -f qcow2 -b raw -F raw e 1M; rebase -t none -T none -b base -F qcow2 e
resize -f raw -q --shrink raw 1000000; create -q -f qcow2 -b raw -F raw e 1M; rebase -t none -T none -b "" e
create -q -f qcow2 -o compat=0.10 -b short -F qcow2 e 1M; rebase -b base -F qcow2 e
create -q -f qcow2 -o compat=0.10 -b base -F qcow2 e 1M; rebase -b short -F qcow2 e
create -q -f qcow2 -o compat=0.10 -b base -F qcow2 e 1M; rebase -b "" e; rebase -b raw -F raw e
create -q -f qcow2 -o compat=0.10 -b base -F qcow2 e 1M; >-c "write 96k 64k" e; rebase -b raw -F raw e; rebase -b "" e
create -q -f qcow2 -b short -F qcow2 e 1M; rebase -b base -F qcow2 e
rebase -b comp -F qcow2 long; rebase -b "" long
create -q -f qcow2 -o preallocation=metadata e 1M; rebase -b base -F qcow2 e
bitmap --add upper b; rebase -b base -F qcow2 upper
rebase -b "" dirty
rebase -u -b top -F qcow2 dirty
rebase -b dirty -F qcow2 upper
rebase -b corrupt -F qcow2 upper
rebase --image-opts -b base -F qcow2 driver=qcow2,file.filename=upper
rebase -b base -F qcow2 'json:{"driver":"qcow2","file":{"driver":"file","filename":"upper"}}'
rebase --object secret,id=k,file=key -b base -F qcow2 upper
rebase top
rebase -F qcow2 top
rebase -b base top
rebase -u -b nowhere top
rebase --image-opts -b base -F qcow2 upper
rebase --image-opts -f qcow2 -b base -F qcow2 driver=qcow2,file.filename=upper
rebase -t foo -b base -F qcow2 upper
rebase -T foo -b base -F qcow2 upper
~rebase --image-opts -b base -F qcow2 driver=qcow2,file.filename=upper,backing.driver=qcow2,backing.file.filename=base
~rebase -u -b nowhere -F foo top
~rebase -b base -F foo top
~rebase -b nowhere -F qcow2 top
~rebase -b raw -F qcow2 top
~rebase -b top -F qcow2 top
~rebase -b upper -F qcow2 top
~rebase -b base -F qcow2 raw
~rebase -f raw -b base -F qcow2 raw
~rebase -f raw -b base -F qcow2 top
~rebase -f foo -b base -F qcow2 upper
~rebase -b base -F qcow2 bad
~rebase -b base -F qcow2 nowhere
~rebase -b base -F qcow2 lost
~rebase -b "" corrupt
~rebase -u -b top -F qcow2 corrupt
~rebase -b luks -F qcow2 top
~rebase -b nbd://localhost/x -F raw upper
~rebase
~rebase -b base
~rebase -b
~rebase -b base -F qcow2 top upper
~rebase -r 1M -b base -F qcow2 upper
~rebase -c -b base -F qcow2 upper
~rebase --object secret,id=k,file=nowhere -b base -F qcow2 upper
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


REFUSED = """
rebase -b raw -F raw snap
rebase -b "" snaptop
rebase -U -b base -F qcow2 upper
rebase -u --force-share -b base -F qcow2 upper
rebase -b file:base -F qcow2 upper
rebase -u -b nbd://localhost/x -F raw top
rebase -u -b json:{} -F raw top
rebase -b base -F vmdk top
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_refused_here(programs: Programs, folder: Path, line: str) -> None:
    words = [word.strip('"') for word in line.split()]
    before = (folder / words[-1]).read_bytes()
    done = programs.run(words, folder)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert (folder / words[-1]).read_bytes() == before


def test_zeros_of_an_old_image_stay_zeros(programs: Programs, folder: Path) -> None:
    """qemu-img 7.2 lets the new backing file show through where an image of compat 0.10 had none before."""
    assert programs.run(["rebase", "-b", "base", "-F", "qcow2", "v2"], folder).returncode == 0
    read = theirs(["-c", "read -P 2 0 64k", "-c", "read -P 0 64k 960k", "v2"], folder, program="qemu-io")
    assert "failed" not in read.stdout
    assert read.returncode == 0
    assert theirs(["check", "-q", "v2"], folder).returncode == 0


def test_an_encrypted_image_keeps_its_disk(programs: Programs, folder: Path) -> None:
    opened = ["--object", SECRET, "--image-opts", "driver=qcow2,file.filename=luks,encrypt.key-secret=k"]
    wanted = ["-b", "short", "-F", "qcow2"]
    assert programs.run(["rebase", *wanted, *opened], folder).returncode == 0
    read = theirs([*opened, "-c", "read -P 14 0 4k", "-c", "read -P 0 4k 60k"], folder, program="qemu-io")
    assert "failed" not in read.stdout
    assert read.returncode == 0


def test_only_what_is_read_or_written_needs_the_secret(programs: Programs, folder: Path) -> None:
    wanted = ["-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", "-b", "base", "-F", "qcow2"]
    assert programs.run(["create", "-q", "-f", "qcow2", "--object", SECRET, *wanted, "e"], folder).returncode == 0
    done = programs.run(["rebase", "-b", "", "e"], folder)
    assert done.returncode == 1
    assert "secret was not given" in done.stderr
    assert programs.run(["rebase", "-u", "-b", "comp", "-F", "qcow2", "e"], folder).returncode == 0
    assert '"backing-filename": "comp"' in theirs(["info", "--output=json", "e"], folder).stdout
