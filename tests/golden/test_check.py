"""``check`` beside qemu-img's, option by option, on whole images and on damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfence.qcow2.entries import COPIED
from golden.beside import same, theirs
from helpers_check import Scalpel
from helpers_programs import Programs

SCRIPTS = """
check a
check -f qcow2 a
check base
check top
check comp
check snap
check snaptop
check ext
check data
check v2
check overraw
check raw
check -f raw raw
check --format qcow2 a
check --format=raw raw
check -q a
check a -q
check dirty
check corrupt
check --output=json corrupt
check -r all dirty
check -r all corrupt
check -q raw
check --output=json a
check --output json base
check --output=json comp
check --output=json -q snap
check --output=human a
check --output=json raw
check -r leaks a
check -r all a
check -rall a
check --repair all a
check --repair=leaks a
check -r all --output=json a
check a --output=json -r leaks
check -r all snap
check -r all ext
check -r all data
check -r all v2
check -T none a
check -T none -r all a
check -T writeback a
check -T writethrough a
check -T directsync a
check -T unsafe a
check -U a
check --force-share a
check --image-opts driver=qcow2,file.filename=a
check --image-opts driver=raw,file.filename=raw
check --image-opts -r all driver=qcow2,file.filename=a
check 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}'
check --object secret,id=k,file=key a
check --object secret,id=k,file=key --image-opts driver=qcow2,file.filename=luks,encrypt.key-secret=k
create -q -f qcow2 -o lazy_refcounts=on n 1M; check n; >-c "write 0 64k" n; check -r all n
create -q -f qcow2 -o refcount_bits=1 n 1M; >-c "write 0 64k" n; check n
create -q -f qcow2 -o refcount_bits=64 n 1M; >-c "write 0 64k" n; check n
create -q -f qcow2 -o cluster_size=512 n 1M; >-c "write 0 64k" -c "discard 4k 8k" n; check --output=json n
create -q -f qcow2 -o cluster_size=2M n 4M; >-c "write 0 64k" n; check n
create -q -f qcow2 -o preallocation=metadata n 1M; check n
create -q -f qcow2 n 0; check n; check --output=json n
check -T foo a
check --image-opts a
check --image-opts -f qcow2 driver=qcow2,file.filename=a
~check -f foo a
~check -f qcow2 raw
~check nowhere
~check --output=foo a
~check -r foo a
~check -r
~check
~check -U -r all a
~check -r all raw
~check -t none a
~check -z a
~check json:foo
~check --object secret,id=k a
~check --object secret,id=k,file=nowhere a
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


def _leaks(image: Scalpel) -> None:
    image.append(2)


def _count_too_low(image: Scalpel) -> None:
    image.set_count(image.cluster_of(image.l2_at(0, 2)), 0)


def _count_of_a_snapshot_too_low(image: Scalpel) -> None:
    image.set_count(image.cluster_of(image.l2_at(0, 0)), 1)


def _count_too_high(image: Scalpel) -> None:
    image.set_count(image.cluster_of(image.l2_at(0, 2)), 5)


def _leak_and_too_low(image: Scalpel) -> None:
    image.append(1)
    _count_too_low(image)


def _wrong_flag(image: Scalpel) -> None:
    image.put(image.l2_at(0, 2), image.word(image.l2_at(0, 2)) ^ COPIED)


def _two_on_one_cluster(image: Scalpel) -> None:
    image.put(image.l2_at(0, 3), image.word(image.l2_at(0, 2)))


def _misaligned(image: Scalpel) -> None:
    image.put(image.l2_at(0, 2), image.word(image.l2_at(0, 2)) ^ 1 << 9)


def _no_l2_table(image: Scalpel) -> None:
    image.put(image.l1_at(0), 0)


def _no_refcounts(image: Scalpel) -> None:
    image.put(image.table_at(0), 0)


def _marked_dirty(image: Scalpel) -> None:
    image.set_features(1)


def _marked_corrupt(image: Scalpel) -> None:
    image.set_features(2)


DAMAGES: dict[str, tuple[str, Callable[[Scalpel], None]]] = {
    "leaky": ("a", _leaks),
    "low": ("a", _count_too_low),
    "high": ("a", _count_too_high),
    "both": ("a", _leak_and_too_low),
    "flag": ("a", _wrong_flag),
    "shared": ("a", _two_on_one_cluster),
    "misaligned": ("a", _misaligned),
    "unlinked": ("a", _no_l2_table),
    "uncounted": ("a", _no_refcounts),
    "dirty": ("a", _marked_dirty),
    "corrupt": ("a", _marked_corrupt),
    "snaplow": ("snap", _count_of_a_snapshot_too_low),
    "extleaky": ("ext", _leaks),
    "v2leaky": ("v2", _leaks),
    "copied": ("comp", lambda image: image.put(image.l2_at(0, 0), image.word(image.l2_at(0, 0)) | COPIED)),
}


@pytest.fixture(scope="module")
def damaged(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    for name, (whole, damage) in DAMAGES.items():
        image = Scalpel((images / whole).read_bytes())
        damage(image)
        (folder / name).write_bytes(image.data)
    (folder / "cut").write_bytes((images / "a").read_bytes()[:-65536])
    header = (images / "a").read_bytes()
    (folder / "header").write_bytes(header[:40] + b"\xff" * 8 + header[48:])
    return folder


LOOKED_AT = "leaky low high both flag shared unlinked uncounted dirty corrupt snaplow extleaky v2leaky copied header"
REPAIRED = "leaky flag unlinked dirty corrupt extleaky v2leaky header"
"""Where the same is repaired in the same way."""
LINES = (
    [f"{options} {name}".strip() for name in LOOKED_AT.split() for options in ("", "--output=json", "-q")]
    + [f"-r {mode} {name}" for name in REPAIRED.split() for mode in ("leaks", "all", "all --output=json", "all -q")]
    + ["-r leaks shared", "-r leaks snaplow", "-r leaks --output=json snaplow", "-q misaligned", "-q -r all misaligned"]
    + [f"-q -r all {name}" for name in ("low", "high", "both", "shared", "uncounted", "snaplow")]
)


@pytest.mark.parametrize("line", LINES)
def test_damage(programs: Programs, damaged: Path, tmp_path: Path, line: str) -> None:
    """The same result, and the same exit code; the findings, on standard error, are in words of our own."""
    words = ["check", *line.split()]
    mine, their = tmp_path / "ours", tmp_path / "theirs"
    for folder in (mine, their):
        folder.mkdir()
        shutil.copy(damaged / words[-1], folder)
    ours, judge = programs.run(words, mine), theirs(words, their)
    assert (_without_ours(ours.stdout), ours.returncode) == (judge.stdout, judge.returncode), (ours.stderr, judge.stderr)
    assert bool(ours.stderr) == (ours.returncode != 0)
    left = [theirs(["check", "-q", words[-1]], folder).returncode for folder in (mine, their)]
    assert left[0] == left[1]


def _without_ours(text: str) -> str:
    """Without the findings in the JSON, and without the better news."""
    if '"findings"' in text:
        return json.dumps({key: value for key, value in json.loads(text).items() if key != "findings"}, indent=4) + "\n"
    return text.replace(
        "All of them are harmless: no data is in danger.",
        "Data may be corrupted, or further writes to the image may corrupt it.",
    )


@pytest.mark.parametrize("name", ["low", "both", "uncounted"])
def test_what_leaks_alone_cannot_repair_is_corrupt(programs: Programs, damaged: Path, tmp_path: Path, name: str) -> None:
    """qemu-img gives up, with exit code 1."""
    shutil.copy(damaged / name, tmp_path)
    done = programs.run(["check", "-r", "leaks", name], tmp_path)
    assert done.returncode == 2
    assert "fatal: " in done.stderr
    assert programs.run(["check", "-r", "all", name], tmp_path).returncode == 0
    assert theirs(["check", "-q", name], tmp_path).returncode == 0


def test_what_qemu_img_cannot_repair(programs: Programs, damaged: Path, tmp_path: Path) -> None:
    for name in ("copied", "cut"):
        shutil.copy(damaged / name, tmp_path)
    assert programs.run(["check", "-r", "all", "copied"], tmp_path).returncode == 0
    assert theirs(["check", "-q", "copied"], tmp_path).returncode == 0
    done = programs.run(["check", "cut"], tmp_path)
    assert done.returncode == 2
    assert "bitmap directory" in done.stderr


def test_harmless_findings_are_called_so(programs: Programs, damaged: Path) -> None:
    done = programs.run(["check", "flag"], damaged)
    assert done.stdout.startswith("\n1 errors were found on the image.\nAll of them are harmless: no data is in danger.\n")
    assert json.loads(programs.run(["check", "--output=json", "flag"], damaged).stdout)["findings"][0]["grade"] == "harmless"


def test_neither_backing_file_nor_secret_is_needed(programs: Programs, folder: Path) -> None:
    for image in ("lost", "luks"):
        done = programs.run(["check", image], folder)
        assert (done.stdout.splitlines()[0], done.returncode) == ("No errors were found on the image.", 0)


def test_what_begins_like_qcow2_has_a_check(programs: Programs, folder: Path) -> None:
    done = programs.run(["check", "bad"], folder)
    assert done.returncode == 1
    assert "qcow2 version 0" in done.stderr
