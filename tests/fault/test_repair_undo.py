"""Repairs that are planned, applied and taken back; also where somebody pulls the plug in between."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cowfence.errors import CowfenceError, Invalid, StorageFailed
from cowfence.ops import repair as repair_ops
from cowfence.ops.repair import apply_repair, plan_repair, undo_repair
from cowfence.storage.fault import Arrived, FaultPlan, FaultyStorage
from cowfence.storage.file import FileStorage
from helpers_cli import cowfence as command
from judges import run


@pytest.fixture(params=["count too low", "leaks", "refcount table"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "4M"])
    run(["qemu-io", "-c", "write -P 3 0 300k", "-c", "write -P 4 2M 50k", path])
    content = bytearray(path.read_bytes().ljust(path.stat().st_size + 4095 & ~4095, b"\0"))
    table = int.from_bytes(content[48:56], "big")
    block = int.from_bytes(content[table : table + 8], "big")
    if request.param == "count too low":
        for cluster in range(20, 40):
            content[block + 2 * cluster : block + 2 * cluster + 2] = bytes(2)
    elif request.param == "leaks":
        content += bytes(40 * 4096)
        first = len(content) // 4096 - 40
        content[block + 2 * first : block + 2 * (first + 40)] = b"\0\1" * 40
    else:
        content[table : table + 8] = random.Random(1).randbytes(8)
    path.write_bytes(content)
    return path


def _sound(path: Path) -> None:
    run(["qemu-img", "check", "-q", path])
    run(["qemu-io", "-r", "-c", "read -P 3 0 300k", "-c", "read -P 4 2M 50k", path])


def test_there_and_back(broken: Path, tmp_path: Path) -> None:
    before = broken.read_bytes()
    plan = plan_repair(broken)
    assert broken.read_bytes() == before
    assert plan.changes
    result = apply_repair(broken, undo_file=tmp_path / "undo")
    assert result.exit_code == plan.result.exit_code == 0
    _sound(broken)
    after = broken.read_bytes()
    assert len(after) == plan.size_after
    for change in plan.changes:
        assert after[change.offset : change.offset + len(change.after)] == change.after
    assert undo_repair(broken, tmp_path / "undo")
    assert broken.read_bytes() == before
    undo_repair(broken, tmp_path / "undo")
    assert broken.read_bytes() == before


def test_a_plan_that_no_longer_fits(broken: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    told = command("repair", "--plan", "--plan-file", plan, broken, check=False)
    assert json.loads(told.stdout) == json.loads(plan.read_text())
    content = bytearray(broken.read_bytes())
    run(["qemu-img", "check", "-q", "-r", "all", broken], check=False)
    done = command("repair", "--apply", "--plan-file", plan, broken, check=False)
    assert (done.returncode, "no longer the image" in done.stderr) == (1, True)
    broken.write_bytes(content)
    assert command("repair", "--apply", "--plan-file", plan, "--undo", tmp_path / "undo", broken).returncode == 0
    _sound(broken)
    assert command("repair", "--undo-from", tmp_path / "undo", broken).returncode == 0
    assert broken.read_bytes() == content


def test_what_is_refused(broken: Path, tmp_path: Path) -> None:
    undo = tmp_path / "undo"
    before = broken.read_bytes()
    undo.write_bytes(b"something")
    with pytest.raises(Invalid, match="it exists"):
        apply_repair(broken, undo_file=undo)
    assert broken.read_bytes() == before
    for content in (b"", b"cowfence undo 1\n", b"cowfence undo 1\n" + b"\xff" * 8, b"cowfence undo 1\n" + bytes(8) + b"{}"):
        undo.write_bytes(content)
        with pytest.raises(Invalid, match="no undo file"):
            undo_repair(broken, undo)
    (tmp_path / "plan").write_text("{}")
    with pytest.raises(Invalid, match="no repair plan"):
        apply_repair(broken, plan_file=tmp_path / "plan")
    assert broken.read_bytes() == before


def test_an_image_that_went_on(broken: Path, tmp_path: Path) -> None:
    apply_repair(broken, undo_file=tmp_path / "undo")
    run(["qemu-io", "-c", "write -P 9 3M 64k", broken])
    after = broken.read_bytes()
    with pytest.raises(Invalid, match="not as the repair left it"):
        undo_repair(broken, tmp_path / "undo")
    assert broken.read_bytes() == after


def test_a_damaged_undo_file(broken: Path, tmp_path: Path) -> None:
    apply_repair(broken, undo_file=tmp_path / "undo")
    after = broken.read_bytes()
    content = (tmp_path / "undo").read_bytes()
    rng = random.Random(3)
    for _ in range(50):
        spoiled = bytearray(content)
        spoiled[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "spoiled").write_bytes(rng.choice([bytes(spoiled), content[: rng.randrange(len(content))]]))
        with pytest.raises(CowfenceError):
            undo_repair(broken, tmp_path / "spoiled")
        assert broken.read_bytes() == after


@pytest.mark.parametrize("failing", ["repair", "undo"])
def test_pulled_in_between(broken: Path, tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of writes the host fails; then the way back still leads back."""
    before = broken.read_bytes()
    undo = tmp_path / "undo"
    if failing == "undo":
        apply_repair(broken, undo_file=undo)
    start = broken.read_bytes()
    for number in range(1, 12):
        broken.write_bytes(start)
        if failing == "repair":
            undo.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(repair_ops, "FileStorage", _Failing(broken, number))
            try:
                if failing == "repair":
                    apply_repair(broken, undo_file=undo)
                else:
                    undo_repair(broken, undo)
                ended = True
            except StorageFailed:
                ended = False
        if undo.exists():
            undo_repair(broken, undo)
        assert broken.read_bytes() == before
        if ended:
            return


class _Failing:
    """Stands for ``FileStorage``: of the image, writes fail from a certain one on."""

    def __init__(self, image: Path, number: int) -> None:
        self._image = image
        self._number = number

    def open(self, path: Path, **options: bool) -> FaultyStorage | FileStorage:
        storage = FileStorage.open(path, **options)
        if Path(path) != self._image:
            return storage
        plan = FaultPlan(self._number, keep_failing=True, arrived=Arrived.HALF)
        return FaultyStorage(storage, plan)
