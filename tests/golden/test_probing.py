"""Images whose format nobody said: ``cowfence-img`` takes for raw what qemu-img does, where nothing is written into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.beside import same
from helpers_programs import Programs

SCRIPTS = """
info a.raw
info --output=json a.raw
map --output=json a.raw
compare a.raw b.raw
measure -O qcow2 a.raw
snapshot -l a.raw
convert -O qcow2 a.raw out; convert -O raw out again
dd if=a.raw of=out bs=64k
resize a.raw 2M
resize -q a.raw +1M
~bench -c x a.raw
~check -q a.raw
~amend -o lazy_refcounts=on a.raw
~snapshot -c s a.raw
~rebase -u -b b.raw -F raw a.raw
""".strip().splitlines()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.raw").write_bytes(b"x" * 65536 + bytes((1 << 20) - 65536))
    (folder / "b.raw").write_bytes(bytes(1 << 20))
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


@pytest.mark.parametrize("magic", [b"KDMV", b"QED\0", b"conectix", b"vhdxfile", b"<<< Oracle VM VirtualBox Disk Image >>>\n"])
def test_what_looks_like_another_format_is_not_raw(programs: Programs, tmp_path: Path, magic: bytes) -> None:
    (tmp_path / "a").write_bytes(magic.ljust(4096, b"\0"))
    for words in (["info", "a"], ["convert", "-O", "raw", "a", "b"], ["resize", "a", "1M"]):
        done = programs.run(words, tmp_path)
        assert done.returncode == 1
        assert "image format" in done.stderr
    assert (tmp_path / "a").stat().st_size == 4096
    assert not (tmp_path / "b").exists()


def test_what_is_written_has_to_be_named(programs: Programs, images: Path) -> None:
    done = programs.run(["bench", "-w", "-c", "1", "a.raw"], images)
    assert done.returncode == 1
    assert "add -f raw" in done.stderr


def test_under_our_own_name_nothing_is_taken_for_raw(programs: Programs, images: Path) -> None:
    for words in (["convert", "-O", "qcow2", "a.raw", "out"], ["map", "a.raw"], ["resize", "a.raw", "2M"]):
        done = programs.run(words, images, program="cowfence")
        assert done.returncode == 1
        assert "add -f raw" in done.stderr
    assert "unknown" in programs.run(["info", "a.raw"], images, program="cowfence").stdout
