"""``cowfence snapshot`` without QEMU: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cowfence as library
from helpers_cli import cowfence, snapshot_of


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    with library.create(path, 1 << 20) as disk:
        disk.write(0, b"a" * 65536)
    return path


def test_create_apply_delete(image: Path) -> None:
    assert cowfence("snapshot", "-c", "one", image).stdout == ""
    with library.open(image, writable=True) as disk:
        disk.write(0, b"b" * 65536)
    assert "one" in cowfence("snapshot", "-l", image).stdout
    with library.open(image, snapshot="one") as disk:
        assert disk.read(0, 1) == b"a"
    cowfence("snapshot", "-q", "-f", "qcow2", "-a", "one", image)
    with library.open(image) as disk:
        assert disk.read(0, 1) == b"a"
    cowfence("snapshot", "-d", "1", image)
    assert cowfence("snapshot", image).stdout == ""
    assert json.loads(cowfence("snapshot", "--output=json", image).stdout) == []
    assert cowfence("check", image).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-a", "x"), "Could not apply snapshot 'x': "),
        (("-d", "x"), "Could not delete snapshot 'x': "),
        (("-c", "x" * 300), "Could not create snapshot "),
        (("-U", "-d", "x"), "-U is for -l"),
        (("-l", "-a", "x"), "Cannot mix '-l', '-a', '-c', '-d'"),
        (("-f", "raw", "-c", "x"), "internal snapshots of a raw image"),
    ],
)
def test_one_line_and_nothing_changed(words: tuple[str, ...], message: str, image: Path) -> None:
    before = snapshot_of(image.parent)
    done = cowfence("snapshot", *words, image, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert snapshot_of(image.parent) == before


def test_an_image_in_use_is_refused_and_listed_with_force_share(image: Path) -> None:
    cowfence("snapshot", "-c", "one", image)
    with library.open(image, writable=True):
        done = cowfence("snapshot", "-c", "two", image, check=False)
        assert done.returncode == 1
        assert "Could not create snapshot 'two'" in done.stderr
        assert cowfence("snapshot", "-l", image, check=False).returncode == 1
        assert "one" in cowfence("snapshot", "-U", "-l", image).stdout


def test_info_shows_the_same_table(image: Path) -> None:
    cowfence("snapshot", "-c", "one", image)
    assert cowfence("snapshot", "-l", image).stdout in cowfence("info", image).stdout


def test_a_snapshot_is_opened_for_reading_only(image: Path) -> None:
    cowfence("snapshot", "-c", "one", image)
    with pytest.raises(library.Invalid, match="never written"):
        library.open(image, snapshot="one", writable=True)
    with pytest.raises(library.Invalid, match="there is no snapshot"):
        library.open(image, snapshot="two")
