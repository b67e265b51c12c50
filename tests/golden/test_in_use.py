"""Images that another process writes to: both programs refuse the same, and ``-U`` looks at the same."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import cowfence
from golden.beside import plain, theirs
from helpers_programs import Programs

IMAGE = """
bitmap --add top x
check top
check -U top
check -r all top
check -U --output=json top
commit top
compare top base
compare top top
compare base top
compare -U top upper
compare -U -s top top
measure top
measure -U -O qcow2 top
rebase -b "" top
rebase -u -b base -F qcow2 top
snapshot -c x top
snapshot -a x top
snapshot -d x top
snapshot -l top
snapshot -l -U top
commit upper
commit -b base upper
rebase -b base -F qcow2 upper
rebase -b top -F qcow2 base
compare upper base
compare -U upper base
measure -O qcow2 upper
""".strip().splitlines()


@pytest.mark.parametrize("line", IMAGE)
def test_same_as_qemu_img(programs: Programs, folder: Path, line: str) -> None:
    words = shlex.split(line)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with cowfence.open(folder / "top", writable=True):
        ours, judge = programs.run(words, folder), theirs(words, folder)
        assert (plain(ours.stdout), ours.returncode) == (plain(judge.stdout), judge.returncode), (ours.stderr, judge.stderr)
        assert len(ours.stderr.splitlines()) == bool(judge.stderr)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
