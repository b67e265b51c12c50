"""``convert --each``: many images at once, a table and one exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers_programs import Programs
from judges import run

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.raw", "b.img", "c")):
        (tmp_path / name).write_bytes(bytes([number + 1]) * MIB + bytes(MIB))
    (tmp_path / "out").mkdir()
    return tmp_path


def test_each_becomes_an_image_of_its_own(programs: Programs, folder: Path) -> None:
    words = ["convert", "-f", "raw", "-O", "qcow2", "-c", "--verify", "--each", "out", "a.raw", "b.img", "c"]
    done = programs.run(words, folder, program="cowfence")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["RESULT", "done", "done", "done"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.qcow2", "b.qcow2", "c.qcow2"]
    for name, made in (("a.raw", "a"), ("b.img", "b"), ("c", "c")):
        run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder / name, folder / "out" / f"{made}.qcow2"])
        run(["qemu-img", "check", folder / "out" / f"{made}.qcow2"])


def test_one_that_fails_stops_none_of_the_others(programs: Programs, folder: Path) -> None:
    (folder / "b.img").unlink()
    words = ["convert", "-f", "raw", "-O", "qcow2", "--each", "out", "--output=json", "a.raw", "b.img", "c"]
    done = programs.run(words, folder, program="cowfence")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    told = json.loads(done.stdout)
    assert [one["result"] for one in told] == ["done", "failed", "done"]
    assert "b.img" in told[1]["error"]
    assert told[0]["file-size"] == (folder / "out" / "a.qcow2").stat().st_size
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.qcow2", "c.qcow2"]


def test_a_dry_run_makes_none(programs: Programs, folder: Path) -> None:
    words = ["convert", "-f", "raw", "-O", "qcow2", "--each", "out", "--dry-run", "--output=json", "a.raw", "c"]
    done = programs.run(words, folder, program="cowfence")
    told = json.loads(done.stdout)
    assert not list((folder / "out").iterdir())
    done = programs.run([word for word in words if word != "--dry-run"], folder, program="cowfence")
    assert [one["file-size"] for one in told] == [one["file-size"] for one in json.loads(done.stdout)]


@pytest.mark.parametrize(
    "words",
    [
        "--each nowhere a.raw",
        "--each . a.raw b.img",  # a.raw would be its own target
        "--each out a.raw out/../a.raw",
        "--each out -n a.raw",
        "--each out -",
        "--each out",
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(programs: Programs, folder: Path, words: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = programs.run(["convert", "-f", "raw", "-O", "raw", *words.split()], folder, program="cowfence")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
