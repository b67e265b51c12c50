"""``bitmap`` beside qemu-img's, option by option."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.beside import same, theirs
from helpers_programs import Programs

SCRIPTS = """
bitmap --add a new
bitmap --remove a b
bitmap --add --disable a new
bitmap a new --add
bitmap --clear a b
bitmap --enable a off; >-c "write 0 64k" a
bitmap --enable a b
bitmap --disable a b; >-c "write 0 64k" a
bitmap --disable a off
bitmap --merge b a off
bitmap --merge fine a b
bitmap --merge b a fine
bitmap --merge=fine a b
bitmap --merge b a b
bitmap --add --merge b --merge fine a sum
bitmap --add --merge b --disable a sum; bitmap --remove a sum
bitmap --remove --add a b
bitmap --add --remove a new
bitmap --clear --merge fine a b
bitmap --add -g 4k a new
bitmap --add -g 512 a new
bitmap --add --granularity 1M a new
bitmap --add --granularity=64k a new
bitmap --add -g4096 a new
bitmap --add -g 2G a new
bitmap --add -g 0 a new
bitmap --add -f qcow2 a new
bitmap --add ext new
bitmap --add snap new
bitmap --add comp new
bitmap --add data new; >-c "write 0 64k" data; bitmap --disable data new
bitmap --add upper new
bitmap --add lost new; create -q -f qcow2 nowhere 1M
bitmap --add -- a new
bitmap --add --object secret,id=k,file=key a new
bitmap --add --object secret,id=k,file=key --image-opts driver=qcow2,file.filename=luks,encrypt.key-secret=k new
bitmap --add --image-opts driver=qcow2,file.filename=a new
bitmap --add --image-opts driver=qcow2,file.driver=file,file.filename=a new
bitmap --add --image-opts file.filename=a new
bitmap --add 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}' new
bitmap --add -b a --merge b ext new
bitmap --add -b a -F qcow2 --merge b ext new
bitmap --add -b a -F qcow2 --merge b --merge fine ext new
bitmap --add -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}' --merge b ext new
bitmap --add dirty new
bitmap --add a b
bitmap --add --add a new
bitmap --remove a none
bitmap --clear a none
bitmap --enable a none
bitmap --disable a none
bitmap --merge none a b
bitmap --merge b a none
bitmap -b a --merge b ext new
bitmap --add -b a --merge none ext new
bitmap --add -b v2 --merge b ext new
bitmap --add -b a --merge b short new
bitmap --add -b a --merge b long new
bitmap --add -F qcow2 --merge b a new
bitmap --add -b a ext new
bitmap -b a --clear a b
bitmap -g 4k --clear a b
bitmap --add --image-opts a new
bitmap --add --image-opts -f qcow2 driver=qcow2,file.filename=a new
~bitmap --add --image-opts driver=raw,file.filename=a new
~bitmap --add --image-opts driver=qcow2 new
~bitmap --add -g 256 a new
~bitmap --add -g 3k a new
~bitmap --add -g 4G a new
~bitmap --add -g x a new
~bitmap --add -g -1 a new
~bitmap --add -g 16E a new
~bitmap --merge
~bitmap --add
~bitmap --add a
~bitmap --add a new more
~bitmap a b
~bitmap
~bitmap --nope a b
~bitmap -q --add a new
~bitmap -t none --add a new
~bitmap -U --add a new
~bitmap -- --add a
~bitmap -b a --merge b a off
~bitmap --add nowhere new
~bitmap --add raw new
~bitmap --add -f raw raw new
~bitmap --add -f qcow2 raw new
~bitmap --add -f foo a new
~bitmap --add -f qcow2 -f raw a new
~bitmap --add bad new
~bitmap --add v2 new
~bitmap --add corrupt new
~bitmap -b a -F raw --merge b a off
~bitmap --add -b a -F foo --merge b ext new
~bitmap --add -b raw -F qcow2 --merge b ext new
~bitmap --add -b nowhere --merge b ext new
~bitmap --add --object secret,id=k,file=nowhere a new
~bitmap --add --object secret,file=key a new
~bitmap --add --object foo,id=k a new
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


def test_nothing_is_added_where_the_source_has_no_bitmaps(programs: Programs, folder: Path) -> None:
    before = (folder / "ext").read_bytes()
    for options in (["-b", "raw"], ["-b", "a", "-F", "raw"]):
        done = programs.run(["bitmap", "--add", *options, "--merge", "b", "ext", "new"], folder)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
    assert (folder / "ext").read_bytes() == before


def test_extents_go_with_nothing_that_changes(programs: Programs, folder: Path) -> None:
    listed = programs.run(["bitmap", "--extents", "a", "fine"], folder)
    assert listed.stdout.splitlines()[1].split() == ["0x80000", "0x1000"]
    for options in (["--clear"], ["-g", "4k"], ["-b", "ext"], ["-F", "qcow2"], ["-f", "raw"]):
        done = programs.run(["bitmap", "--extents", *options, "a", "fine"], folder)
        assert (done.stdout, done.returncode) == ("", 1)
        assert len(done.stderr.splitlines()) == 1


def test_an_encrypted_image_needs_no_secret(programs: Programs, folder: Path) -> None:
    assert programs.run(["bitmap", "--add", "luks", "new"], folder).returncode == 0
    assert '"name": "new"' in theirs(["info", "--output=json", "luks"], folder).stdout
    (folder / "key").write_bytes(b"wrong")
    done = programs.run(["bitmap", "--add", "--object", "secret,id=k,file=key", "luks", "more"], folder)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
