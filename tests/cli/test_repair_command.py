"""``cowfence repair`` and ``check --explain``: what they print, how they end, and that a refusal changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers_check import Scalpel, new_image
from helpers_cli import cowfence, snapshot_of
from judges import run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Leaked clusters, a count that is too low, and a wrong flag."""
    damaged = Scalpel(new_image())
    damaged.append(2)
    damaged.set_count(damaged.cluster_of(damaged.l2_at(0, 4)), 0)
    path = tmp_path / "image.qcow2"
    path.write_bytes(damaged.data)
    return path


def test_plan_apply_undo(image: Path) -> None:
    before = image.read_bytes()
    kept, way_back = image.with_name("plan"), image.with_name("undo")
    printed = cowfence("repair", "--plan", image)
    cowfence("repair", "--plan", "--plan-file", kept, image)
    assert image.read_bytes() == before
    plan = json.loads(kept.read_text())
    assert json.loads(printed.stdout) == plan
    assert plan["leaks-fixed"] == 2
    assert plan["ranges"]
    assert {"refcount_block.new", "header.link", "prepare.fence"} <= {step["step"] for step in plan["steps"]}
    done = cowfence("repair", "--apply", "--plan-file", kept, "--undo", way_back, image)
    assert "Repaired: 2 corruptions, 2 leaked clusters." in done.stdout
    assert cowfence("check", image).returncode == 0
    repaired = image.read_bytes()
    for offset, length_bytes in ((entry["offset"], entry["length"]) for entry in plan["ranges"]):
        before = before.ljust(len(repaired), b"\0")
        before = before[:offset] + repaired[offset : offset + length_bytes] + before[offset + length_bytes :]
    assert before == repaired
    assert cowfence("repair", "--apply", image).stdout.startswith("Nothing was changed.")
    undone = json.loads(cowfence("repair", "--undo-from", way_back, "--output=json", image).stdout)
    assert undone["restored-bytes"] > 0
    assert cowfence("check", image, check=False).returncode == 2
    cowfence("repair", "--undo-from", way_back, "-q", image)


def test_undo_is_byte_identical(image: Path) -> None:
    before = image.read_bytes()
    cowfence("repair", "--apply", "--undo", image.with_name("undo"), "-q", image)
    assert image.read_bytes() != before
    cowfence("repair", "--undo-from", image.with_name("undo"), image)
    assert image.read_bytes() == before


def test_leaks_only(image: Path) -> None:
    done = cowfence("repair", "--apply", "-r", "leaks", "--output=json", image, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["leaks-fixed"] == 2


def test_qemu_agrees(image: Path) -> None:
    cowfence("repair", "--apply", "-q", image)
    run(("qemu-img", "check", image))


def test_a_changed_image_keeps_its_changes(image: Path) -> None:
    way_back = image.with_name("undo")
    cowfence("repair", "--apply", "--undo", way_back, "-q", image)
    cowfence("snapshot", "-c", "one", image)
    before = snapshot_of(image.parent)
    done = cowfence("repair", "--undo-from", way_back, image, check=False)
    assert done.returncode == 1
    assert "has changed since" in done.stderr
    assert snapshot_of(image.parent) == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "one of the arguments --plan --apply --undo-from is required"),
        (("--plan", "--apply"), "not allowed with argument"),
        (("--plan", "--undo", "u"), "--undo goes with --apply"),
        (("--apply", "-U"), "-U goes with --plan"),
        (("--undo-from", "u", "-r", "all"), "--undo-from takes no plan"),
        (("--undo-from", "u"), "no undo file"),
        (("--undo-from", "missing"), "No such file"),
        (("--plan", "-p"), "-p with --plan needs --plan-file"),
        (("--apply", "--plan-file", "u"), "no repair plan"),
        (("--apply", "--undo", "u"), "never overwritten"),
        (("--apply", "--undo", "missing/u"), "No such file"),
    ],
)
def test_one_line_and_nothing_changed(words: tuple[str, ...], line: str, image: Path) -> None:
    image.with_name("u").write_bytes(b"something else")
    before = snapshot_of(image.parent)
    done = cowfence("repair", *words, image.name, cwd=image.parent, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert snapshot_of(image.parent) == before


def test_the_plan_never_goes_over_the_image(image: Path) -> None:
    before = image.read_bytes()
    assert "image itself" in cowfence("repair", "--plan", "--plan-file", image, image, check=False).stderr
    shutil.copy(image, image.with_name("copy"))
    assert "never overwritten" in cowfence("repair", "--apply", "--undo", image, image, check=False).stderr
    assert image.read_bytes() == before


def test_what_has_no_check_has_no_repair(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1000))
    assert cowfence("repair", "--plan", tmp_path / "raw", check=False).returncode == 63


def test_explained(image: Path) -> None:
    done = cowfence("check", "--explain", image, check=False)
    assert done.returncode == 2
    for word in ("wrong:  ", "risk:   ", "repair: ", "repair --plan"):
        assert word in done.stdout
    findings = json.loads(cowfence("check", "--explain", "--output=json", image, check=False).stdout)["findings"]
    assert all(finding["wrong"] and finding["risk"] and finding["repair"] for finding in findings)
    assert "wrong" not in cowfence("check", "--output=json", image, check=False).stdout
    assert "--explain with -q" in cowfence("check", "--explain", "-q", image, check=False).stderr
