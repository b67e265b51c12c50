"""``map`` beside qemu-img's, option by option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden.beside import SECRET, same, theirs
from golden.more_disks import LUKS, OPENED, QCOW2_LUKS
from helpers_programs import Programs

SCRIPTS = f"""
map a
map -f qcow2 a
map a -f qcow2
map --output=json a
map --output json a
map --output=human a
map -f raw a
map raw
map --output=json raw
map -f raw odd.raw
map sparse.raw
> -f raw -c 'discard 128k 512k' sparse.raw; map -f raw --output=json sparse.raw
> -f raw -c 'discard 128k 512k' sparse.raw; map -f raw sparse.raw
> -f raw -c 'discard 128k 512k' sparse.raw; map -f raw -s 100k -l 100k --output=json sparse.raw
map zero
map --output=json zero
map v2
map --output=json v2
map tiny
map --output=json tiny
map full
map --output=json full
map upper
map upper --output=json
map --output=json overraw
map --output=json long
map long
map --output=json short
map snap
map --output=json snaptop
map ext
map --output=json ext
map --output=json extover
map data
map --output=json data
map rawdata
map --output=json rawdata
map --output=json comp
map --output=json zstd
> -c 'write -c -P 1 64k 64k' zstd; map --output=json zstd
> -c 'write -z -u 64k 64k' -c 'discard 512k 64k' a; map --output=json a
> -c 'write 100 50' -c 'write -z 30k 30k' tiny; map --output=json tiny
map -s 64k upper
map --start-offset=64k upper
map --start-offset 64k --output=json upper
map -s 100k -l 100k --output=json upper
map -s 100k -l 100k upper
map -l 64k upper
map --max-length=64k --output=json upper
map --max-length 64k upper
map -l 0 upper
map -l 0 --output=json upper
map -s 1M upper
map -s 1M --output=json upper
map -s 4M -l 1M --output=json upper
map -s 100 -l 1000 --output=json upper
map -s 513 -l 511 --output=json overraw
map -s 7E -l 7E --output=json upper
map -s 0x10000 -l 0x10000 --output=json upper
map -s +64k -l 1.5k --output=json upper
map -U upper
map --force-share --output=json upper
map ./upper
map --image-opts driver=qcow2,file.filename=upper
map --image-opts --output=json driver=qcow2,file.filename=upper
map --image-opts driver=raw,file.filename=sparse.raw
map --image-opts driver=file,filename=sparse.raw
map 'json:{{"driver": "qcow2", "file.filename": "upper"}}'
map --object {SECRET} upper
~map {OPENED} {QCOW2_LUKS}
map {OPENED} --output=json {QCOW2_LUKS}
map {OPENED} --output=json {LUKS}
~map {OPENED} {LUKS}
~map comp
map -s x upper
~map -s -1 upper
map -s '' upper
map -s 8E upper
map -l x upper
~map -l -5k upper
map -l 8E upper
map --image-opts -f qcow2 driver=qcow2,file.filename=upper
~map
~map a upper
~map --output=xml upper
~map --output
~map -f
~map -f foo upper
~map -q upper
~map -p upper
~map -z upper
~map --foo upper
~map missing
~map dir
~map -f qcow2 raw
~map -f luks raw
~map -f luks a.luks
~map -f qcow2 bad
~map lost
~map --image-opts driver=foo,file.filename=upper
~map nbd://localhost:1/x
~map --object foo,id=s upper
~map --object secret,id=s,file=missing upper
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, more_images: Path, tmp_path: Path, script: str) -> None:
    same(programs, more_images, tmp_path, script.replace("; ", "\n"))


def test_no_passphrase_is_needed(programs: Programs, more_images: Path) -> None:
    assert theirs(["map", "luks"], more_images).returncode == 1
    expected = theirs(["map", *OPENED.split(), "--output=json", QCOW2_LUKS], more_images)
    assert programs.run(["map", "--output=json", "luks"], more_images).stdout == expected.stdout


def test_clusters_without_a_place_are_named(programs: Programs, more_images: Path) -> None:
    done = programs.run(["map", "comp"], more_images)
    assert done.returncode == 1
    assert "at 0); use --output=json" in done.stderr


def test_the_rest_of_a_half_sector_is_no_run_of_its_own(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    words = ["create", "-q", "-f", "qcow2", "-b", str(more_images / "odd.raw"), "-F", "raw", "over", "1M"]
    assert theirs(words, tmp_path).returncode == 0
    alone = programs.run(["map", "--output=json", "odd.raw"], more_images)
    assert [entry["length"] for entry in json.loads(alone.stdout)] == [165_536]
    done = programs.run(["map", "--output=json", "--ref-root", str(more_images), "over"], tmp_path)
    expected = json.loads(theirs(["map", "--output=json", "over"], tmp_path).stdout)
    assert [entry["length"] for entry in expected] == [165_536, 352, (1 << 20) - 165_888]
    assert [entry["length"] for entry in json.loads(done.stdout)] == [165_536, (1 << 20) - 165_536]


@pytest.mark.parametrize("words", [["a.vmdk"], ["-f", "vmdk", "a.vmdk"]])
def test_other_formats_are_refused_by_name(programs: Programs, more_images: Path, words: list[str]) -> None:
    done = programs.run(["map", *words], more_images)
    assert (done.returncode, done.stdout) == (1, "")
    assert "vmdk" in done.stderr
