"""Conversions that are ended from outside: killed, out of space, with a source that changes its length. Either there is a whole
image under the target's name, or what stood there before."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers_cli import COWFENCE, ENVIRONMENT
from judges import run

MIB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "a.raw"
    path.write_bytes(random.Random(1).randbytes(24 * MIB))
    return path


def _begin(*words: str | os.PathLike[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([*COWFENCE, "convert", *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("options", [("-O", "qcow2"), ("-c", "-O", "qcow2"), ("-O", "raw"), ("-W", "-O", "qcow2", "--verify")])
@pytest.mark.parametrize("there_before", [False, True])
def test_killed_at_any_moment(source: Path, tmp_path: Path, options: tuple[str, ...], there_before: bool) -> None:
    target = tmp_path / "out"
    format_name = "raw" if "raw" in options else "qcow2"
    rng = random.Random(2)
    ended = 0
    for _ in range(5):
        if there_before:
            target.write_bytes(b"old")
        process = _begin("-f", "raw", *options, source, target)
        time.sleep(rng.uniform(0.1, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if target.exists() and (not there_before or target.read_bytes() != b"old"):
            ended += 1
            if format_name == "qcow2":
                run(["qemu-img", "check", "-q", target])
            run(["qemu-img", "compare", "-q", "-f", "raw", "-F", format_name, source, target])
            target.unlink()
        else:
            assert target.exists() == there_before
        for left in tmp_path.iterdir():
            assert left == target or left.name.endswith(".partial")
            if left != target:
                left.unlink()
    assert ended < 5


@pytest.mark.parametrize("options", [("-O", "qcow2"), ("-O", "raw"), ("-c", "-O", "qcow2")])
def test_a_source_that_gets_shorter(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    changing, target = tmp_path / "changing", tmp_path / "out"
    changing.write_bytes(source.read_bytes())
    process = _begin("-f", "raw", "-U", "--rate-limit", "8M", *options, changing, target)
    while len(list(tmp_path.iterdir())) == 1 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    os.truncate(changing, MIB)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith(f"cowfence: {changing}: the file has been cut off at")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [changing]


@pytest.mark.parametrize("options", [("-O", "qcow2"), ("-O", "raw"), ("-O", "qcow2", "-o", "preallocation=full")])
def test_a_host_that_is_full(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    target = tmp_path / "out"
    line = f"ulimit -f 8000; trap '' XFSZ; exec {' '.join(COWFENCE)} convert -f raw {' '.join(options)} {source} {target}"
    done = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
