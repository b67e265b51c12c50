"""``cowfence-img``, and ``bench`` beside qemu-img's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers_cli import ENVIRONMENT
from judges import run

IMG = [sys.executable, "-m", "cowfence.cli.img"]


def img(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*IMG, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    return tmp_path


BENCH = [
    "-f raw -c 100 a.raw",
    "-f raw a.raw -c 100 -d 3 -s 8k -S 16k -o 4k",
    "-f raw -c 100 -w --pattern 5 -d 4 --flush-interval 10 a.raw",
    "-f raw -c 0 a.raw",
    "-f raw --flush-interval=10 a.raw",
    "-f raw --pattern=300 -w a.raw",
    "-f raw -w --flush-interval=1 -c 10 a.raw",
    "-f raw -c x a.raw",
    "-f raw -S x a.raw",
    "-f raw -t foo a.raw",
    "-f raw -c 10 -t none a.raw",
    "-f raw a.raw a.raw",
    "",
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", BENCH)
def test_bench(words: str) -> None:
    theirs, ours = run(["qemu-img", "bench", *words.split()], check=False), img("bench", *words.split())
    spoken = [re.sub(r"\d+\.\d+ seconds", "N seconds", done.stdout) for done in (ours, theirs)]
    assert spoken[0] == spoken[1], ours.stderr
    assert ours.returncode == theirs.returncode
    assert bool(ours.stderr) == bool(theirs.stderr)


def test_its_name_and_its_subcommands(folder: Path) -> None:
    done = img("info", "nope")
    assert done.returncode == 1
    assert done.stderr.startswith("cowfence-img: ")
    done = img("compare", "no\npe", "q")
    assert done.returncode == 2
    assert done.stderr.startswith("cowfence-img: ")
    assert len(done.stderr.splitlines()) == 1
    done = img("check", "-f", "raw", "a.raw")
    assert done.returncode == 63
    assert done.stderr.startswith("cowfence-img: ")
    assert img("serve", "a.raw").returncode == 1
    assert img("crash").returncode == 1
    assert img("create", "q", "-f", "qcow2", "1M", "-o", "cluster_size=4k").returncode == 0
    assert img("check", "q").returncode == 0
    assert (folder / "q").exists()
    assert img("--help").stdout.startswith("usage: cowfence-img")
    refused = img("bench", "-f", "raw", "-n", "a.raw")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
