"""What the guest writes is what the judge expects, and the judge can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from guest.console import Promises
from guest.content import LINE_BYTES, SLOTS, Manner, Verdict, content, line_count, manner_of, slot_of, verdict_of
from guest.disks import BASE_FILES, BASE_WRITER, Checked
from guest.judge import Found, judge_files

SCRIPTS = Path(__file__).resolve().parents[2] / "guest"


def serial_with(manner: Manner, *, first: bool = False) -> int:
    """A write of this manner; ``first`` to its file, or one with a write before it."""
    start = 0 if first else 3 * SLOTS
    return next(serial for serial in range(start, start + SLOTS) if manner_of(serial) is manner)


def run_writer(folder: Path, writer: int, first: int, last: int) -> list[str]:
    """``writer.sh`` here instead of in the guest."""
    for name in ("awk", "dd", "sync"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    words = [str(folder), str(writer), str(first), str(last), str(SCRIPTS / "content.awk"), str(SLOTS)]
    done = subprocess.run(["sh", str(SCRIPTS / "writer.sh"), *words], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def tree_with_base(folder: Path) -> Path:
    (folder / "base").mkdir()
    for serial in range(BASE_FILES):
        (folder / "base" / f"f{serial}").write_bytes(content(BASE_WRITER, serial))
    return folder


def judged(tree: Path, last: int) -> Found:
    promises = Promises(1)
    promises.last = [last]
    clean = Checked(0, 0, 0, 0, "")
    found = Found(clean, clean)
    judge_files(tree, promises, found)
    return found


def test_a_line_has_its_length_and_names_its_place() -> None:
    lines = content(3, 17).splitlines(keepends=True)
    assert {len(line) for line in lines} == {LINE_BYTES}
    assert len(set(lines)) == len(lines) == line_count(3, 17)


def test_an_overwriting_has_the_length_of_what_it_overwrites() -> None:
    for serial in range(SLOTS, 8 * SLOTS):
        if manner_of(serial) is Manner.IN_PLACE:
            assert line_count(2, serial) == line_count(2, serial - SLOTS)


def test_the_script_in_the_guest_writes_what_the_judge_expects(tmp_path: Path) -> None:
    tree = tree_with_base(tmp_path)
    (tree / "w0").mkdir()
    last = SLOTS + 9
    assert run_writer(tree / "w0", 0, 0, last) == [f"synced 0 {serial}" for serial in range(last + 1)]
    found = judged(tree, last)
    assert found.problems == []
    assert found.files == {Verdict.KEPT: SLOTS + BASE_FILES}


def test_the_script_ends_at_the_first_error(tmp_path: Path) -> None:
    assert run_writer(tmp_path / "missing", 1, 7, 9) == ["failed 1 7"]


@pytest.mark.parametrize("manner", list(Manner))
def test_what_was_promised_must_be_there(manner: Manner) -> None:
    serial = serial_with(manner)
    whole, old = content(1, serial), content(1, serial - SLOTS)
    assert verdict_of(whole, 1, serial, None) is Verdict.KEPT
    for gone in (None, b"", old):
        assert verdict_of(gone, 1, serial, None) is Verdict.LOST
        assert verdict_of(gone, 1, serial, serial + 1) is not Verdict.KEPT
    assert verdict_of(bytes(len(whole)), 1, serial, None) is Verdict.FOREIGN
    assert verdict_of(content(2, serial), 1, serial, None) is Verdict.FOREIGN
    assert verdict_of(whole[:-1], 1, serial, None) in (Verdict.LOST, Verdict.FOREIGN)


def test_a_write_under_way_is_seen_as_its_manner_allows() -> None:
    fresh, place, replaced = serial_with(Manner.FRESH), serial_with(Manner.IN_PLACE), serial_with(Manner.REPLACED)
    half = 32 * LINE_BYTES

    def verdict(found: bytes | None, serial: int) -> Verdict:
        return verdict_of(found, 0, serial - SLOTS, serial)

    for serial in (fresh, place, replaced):
        assert verdict(content(0, serial), serial) is Verdict.NEWER
        assert verdict(content(0, serial - SLOTS), serial) is Verdict.KEPT
        assert verdict(content(5, serial), serial) is Verdict.FOREIGN
    assert verdict(None, fresh) is verdict(content(0, fresh)[:half], fresh) is Verdict.NEWER
    assert verdict(bytes(half), fresh) is Verdict.NEWER
    mixed = content(0, place - SLOTS)[:half] + content(0, place)[half:]
    assert verdict(mixed, place) is Verdict.NEWER
    assert verdict(None, place) is Verdict.LOST
    assert verdict(mixed[:half], place) is not Verdict.NEWER
    assert verdict(bytes(half) + mixed[half:], place) is Verdict.FOREIGN
    assert verdict(None, replaced) is Verdict.LOST
    assert verdict(content(0, replaced)[:half], replaced) is Verdict.FOREIGN


def test_the_judge_names_what_is_wrong(tmp_path: Path) -> None:
    tree = tree_with_base(tmp_path)
    (tree / "w0").mkdir()
    for serial in range(4):
        (tree / "w0" / f"f{slot_of(serial)}").write_bytes(content(0, serial))
    assert judged(tree, 3).problems == []
    (tree / "w0" / "f1").unlink()
    (tree / "w0" / "f2").write_bytes(os.urandom(100))
    (tree / "w0" / "f40").write_bytes(content(0, 40))
    (tree / "w0" / "odd").touch()
    (tree / "base" / "f5").write_bytes(b"")
    assert [problem.split(":")[0] for problem in judged(tree, 3).problems] == ["base/f5", "w0/f1", "w0/f2", "w0/f40", "w0/odd"]
