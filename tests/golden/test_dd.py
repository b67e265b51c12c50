"""``dd`` beside qemu-img's, option by option."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.beside import SECRET, same, theirs
from golden.more_disks import LUKS, OPENED, QCOW2_LUKS
from helpers_programs import Programs

SCRIPTS = f"""
dd if=base of=out
dd of=out if=base
dd -f qcow2 if=base of=out
dd -f qcow2 -O raw if=base of=out
dd -f qcow2 -O qcow2 if=base of=out
dd if=base of=out -O qcow2 -f qcow2
dd bs=64k if=base -O qcow2 of=out
dd -O qcow2 if=upper of=out bs=64k
dd if=upper of=out bs=64k; compare -F raw upper out
dd -f raw if=raw of=out
dd -f raw if=base of=out bs=1M
dd if=sparse.raw of=out bs=1M
dd if=sparse.raw of=out bs=64k count=3
> -f raw -c 'discard 128k 512k' sparse.raw; dd -f raw if=sparse.raw of=out bs=64k skip=1 -O qcow2
dd if=sparse.raw of=out bs=64k skip=16
dd if=sparse.raw of=out bs=64k skip=47
dd if=sparse.raw of=out bs=64k count=0
dd -O qcow2 if=sparse.raw of=out bs=64k count=0
dd if=sparse.raw of=out count=0
dd if=sparse.raw of=out skip=0 bs=64k
dd if=sparse.raw of=out bs=1M skip=3
dd if=sparse.raw of=out bs=1M count=100
dd -O qcow2 if=sparse.raw of=out bs=1M count=2
dd if=raw of=out bs=1k count=1k
dd if=raw of=out bs=512 count=0x10
dd if=raw of=out bs=1000 skip=7 -O qcow2
dd if=raw of=out bs=1.5k count=4
dd if=v2 of=out bs=4k
dd if=tiny of=out bs=100k
dd if=comp of=out bs=64k
dd if=ext of=out bs=64k
dd if=extover of=out bs=1M -O qcow2
dd if=data of=out bs=64k
dd if=rawdata of=out bs=64k
dd if=snap of=out bs=64k
dd if=a of=out bs=64k -O qcow2
dd if=full of=out bs=64k
dd if=overraw of=out bs=64k
dd if=long of=out bs=64k
dd if=short of=out bs=64k
dd if=zero of=out
dd -O qcow2 if=zero of=out
dd if=raw of=base bs=64k
dd -O qcow2 if=raw of=base bs=64k
dd if=raw of=dir/out bs=64k
dd -U if=base of=out
dd --force-share if=base of=out bs=64k
dd --image-opts if=driver=qcow2,file.filename=base of=out bs=64k
dd --image-opts -O qcow2 if=driver=qcow2,file.filename=top of=out bs=64k
dd --image-opts -U if=driver=raw,file.filename=raw of=out bs=64k
dd 'if=json:{{"driver": "qcow2", "file.filename": "base"}}' of=out bs=64k
dd --object {SECRET} if=base of=out bs=64k
dd {OPENED} if={QCOW2_LUKS} of=out
dd {OPENED} if={LUKS} of=out bs=64k
dd {OPENED} -O qcow2 if={LUKS} of=out bs=64k
dd
dd if=base
dd of=out
dd if=base of=out bs=3G
dd if=base of=out bs=2G
dd if=base of=out bs=0
dd if=base of=out bs=-1
dd if=base of=out bs=x
dd if=base of=out bs=
dd if=base of=out bs=8E
dd if=base of=out count=x
dd if=base of=out count=-1
dd if=base of=out count=8E
dd if=base of=out skip=x
dd if=base of=out skip=-1
dd if=base of=out skip=9E
dd base out
dd if=base of=out more
dd if=base of=out foo=1
dd if=base of=out conv=notrunc
dd if=base of=out seek=1
dd --image-opts -f raw if=driver=raw,file.filename=raw of=out
~dd if= of=out
~dd if=base of=
~dd if=missing of=out
~dd if=dir of=out
~dd if=lost of=out
~dd if=base of=dir
~dd if=base of=missing/out
~dd -f foo if=base of=out
~dd -O foo if=base of=out
~dd -f qcow2 if=raw of=out
~dd -f qcow2 if=bad of=out
~dd --image-opts if=driver=foo,file.filename=raw of=out
~dd --image-opts if=base of=out
~dd --object foo,id=s if=base of=out
~dd --object secret,id=s,file=missing if=base of=out
~dd -n if=base of=out
~dd -q if=base of=out
~dd --foo if=base of=out
~dd -f
~dd -O
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, more_images: Path, tmp_path: Path, script: str) -> None:
    same(programs, more_images, tmp_path, script.replace("; ", "\n"))


def _refused(programs: Programs, folder: Path, operands: str, why: str) -> None:
    done = programs.run(["dd", *operands.split()], folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("operands", "why"),
    [
        ("if=raw of=out bs=1M skip=2", "cannot skip 2097152 bytes"),
        ("if=raw of=out bs=1k bs=2k", "bs= is given twice"),
        ("if=raw of=out of=out", "of= is given twice"),
        ("if=raw of=raw", "in use"),
        ("if=luks of=out", "secret was not given"),
        ("if=bad of=out", "qcow2 version 0"),
        ("-O luks if=raw of=out", "invalid choice: 'luks'"),
        ("if=a.vmdk of=out", "vmdk"),
    ],
)
def test_what_is_refused(programs: Programs, more_images: Path, operands: str, why: str) -> None:
    _refused(programs, more_images, operands, why)


def test_what_is_skipped_does_not_count(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    assert (
        programs.run(["dd", f"if={more_images}/sparse.raw", "of=out", "bs=64k", "skip=15", "count=2"], tmp_path).returncode == 0
    )
    assert (tmp_path / "out").read_bytes() == bytes(65536) + b"S" * 65536


def test_a_raw_target_has_as_many_bytes_as_were_asked_for(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    source = f"if={more_images}/odd.raw"
    for operands, size_bytes, rounded in (([], 165_536, 165_888), (["bs=1000", "count=7"], 7000, 7168)):
        assert programs.run(["dd", source, "of=out", *operands], tmp_path).returncode == 0
        assert (tmp_path / "out").stat().st_size == size_bytes
        assert theirs(["dd", source, "of=theirs", *operands], tmp_path).returncode == 0
        assert (tmp_path / "theirs").stat().st_size == rounded


def test_the_secret_that_opens_it_need_not_be_named(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    for name in ("luks", "a.luks"):
        words = ["--object", f"secret,id=k,file={more_images}/key", f"if={more_images}/{name}", f"of={name}.out"]
        done = programs.run(["dd", *words], tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "luks.out").read_bytes() == b"\x0e" * 4096 + bytes(61440)
    assert (tmp_path / "a.luks.out").read_bytes()[:4096] == b"\x0f" * 4096
