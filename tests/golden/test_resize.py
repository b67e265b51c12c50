"""``resize`` beside qemu-img's, option by option."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.beside import SECRET, same, theirs
from golden.more_disks import LUKS, OPENED, QCOW2_LUKS
from helpers_programs import Programs

SCRIPTS = f"""
resize base 2M
resize -f qcow2 base 2M
resize base +1M
resize base 1M
resize base +0
resize base -0
resize base 1.5M
resize base 0x200000
resize base ++1M
resize base ' 2M'
resize -q base 2M
resize --shrink base 512k
resize --shrink base -512k
resize --shrink base 1M
resize --shrink -q base 4k
resize base 2M; resize --shrink base 700k; resize base +300k
> -c 'write -P 9 1000k 24k' base; resize --shrink base 1004k; resize base 2M
resize v2 20M
resize --shrink v2 32k
resize snap 2M
resize --shrink snap 512k
resize snap 2M; snapshot -l snap
resize snap 2M; snapshot -a one snap
resize a 2M
resize --shrink a 256k
resize top 4M
resize --shrink top 512k
resize long 3M
resize --shrink long 1M
resize short 1M
resize short 1M; > -c 'write -P 1 600k 64k' short
resize overraw 2M
resize ext 2M
resize --shrink ext 64k
resize extover 4M
resize data 2M
resize --shrink data 128k
resize rawdata 2M
resize comp 2M
resize --shrink comp 100k
resize tiny 1M
resize full 2M
resize {OPENED} {QCOW2_LUKS} 128k
resize {OPENED} --shrink {QCOW2_LUKS} 32k
resize --preallocation=off base 2M
resize --preallocation off base +1M
resize --preallocation=metadata base 2M
resize --preallocation=falloc base 2M
resize --preallocation=full base 2M
resize --preallocation full base +1M
resize --preallocation=metadata v2 +1M
resize --preallocation=full ext +1M
resize --preallocation=metadata top 2M
resize --preallocation=falloc data 2M
resize --preallocation=full rawdata 2M
resize -f raw raw 2M
resize -f raw raw +1M
resize -f raw --shrink raw 512k
resize -f raw --shrink raw 1000
resize -f raw --shrink raw -1000
resize -f raw zero 1M
resize -f raw --preallocation=off raw 2M
resize -f raw --preallocation=falloc raw 2M
resize -f raw --preallocation=full raw 2M
resize -f raw -q raw 2M
resize raw 2M
resize -q --shrink raw 512k
resize --image-opts driver=qcow2,file.filename=base 2M
resize --image-opts --shrink -q driver=qcow2,file.filename=base 512k
resize --image-opts driver=raw,file.filename=raw +1M
resize --image-opts driver=raw,file.driver=file,file.filename=raw --preallocation=full +1M
resize 'json:{{"driver": "qcow2", "file.filename": "base"}}' 2M
resize --object {SECRET} base 2M
resize base 0
resize --shrink base 0
resize --shrink base -1M
resize --shrink base -2M
~resize base -512k
~resize base 512k
~resize -f raw raw 1000
~resize base 2000001
~resize base 8E
~resize base 63P
~resize base +7E
resize base x
resize base +x
resize base ''
~resize base -x
resize --preallocation=foo base 2M
resize --preallocation=full base 1M
resize --shrink --preallocation=full base 512k
resize --shrink -f raw --preallocation=falloc raw 512k
~resize -f raw --preallocation=metadata raw 2M
resize --image-opts -f qcow2 driver=qcow2,file.filename=base 2M
~resize
~resize base
~resize base 2M more
~resize missing 2M
~resize missing/a 2M
~resize dir 2M
~resize lost 2M
~resize -f foo base 2M
~resize -f qcow2 raw 2M
~resize -f qcow2 bad 2M
~resize a.vmdk 2M
~resize --image-opts driver=foo,file.filename=base 2M
~resize --object foo,id=s base 2M
~resize --object secret,id=s,file=missing base 2M
~resize -f luks a.luks 128k
~resize -U base 2M
~resize -t none base 2M
~resize --foo base 2M
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, more_images: Path, tmp_path: Path, script: str) -> None:
    same(programs, more_images, tmp_path, script.replace("; ", "\n"))


def test_no_passphrase_is_needed(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    assert theirs(["resize", "luks", "128k"], more_images).returncode == 1
    (tmp_path / "luks").write_bytes((more_images / "luks").read_bytes())
    done = programs.run(["resize", "luks", "128k"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Image resized.\n", "")


def test_options_may_stand_behind_the_size(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes((more_images / "base").read_bytes())
    assert theirs(["resize", "base", "512k", "--shrink"], tmp_path).returncode == 1
    assert programs.run(["resize", "base", "512k", "--shrink"], tmp_path).stdout == "Image resized.\n"


def test_a_raw_file_grows_from_where_it_ends(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.raw").write_bytes((more_images / "odd.raw").read_bytes())
    assert programs.run(["resize", "-f", "raw", "odd.raw", "+1000"], tmp_path).returncode == 0
    assert (tmp_path / "odd.raw").stat().st_size == 166_536


def test_a_luks_file_keeps_its_size(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    for name in ("a.luks", "key"):
        (tmp_path / name).write_bytes((more_images / name).read_bytes())
    for words in (["a.luks"], [*OPENED.split(), LUKS]):
        done = programs.run(["resize", *words, "128k"], tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert "LUKS" in done.stderr
    assert (tmp_path / "a.luks").read_bytes() == (more_images / "a.luks").read_bytes()


def test_what_begins_as_qcow2_is_not_raw(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes((more_images / "bad").read_bytes())
    done = programs.run(["resize", "bad", "1M"], tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (tmp_path / "bad").read_bytes() == (more_images / "bad").read_bytes()
