"""Conversions: whatever the way, the disk is the same, QEMU has nothing to say, and an interrupted one leaves nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cowfence
from cowfence.ops.snapshot import create_snapshot
from helpers_cli import cowfence as command
from judges import run

MIB = 1 << 20


def disk_of(seed: int, size: int) -> bytes:
    """Holes, zeros, text and noise, not aligned to anything."""
    rng = random.Random(seed)
    found = bytearray(size)
    for _ in range(size // 40_000):
        at, length = rng.randrange(size), rng.choice([100, 5000, 70_000, 300_000])
        kind = rng.random()
        data = rng.randbytes(length) if kind < 0.4 else (b"cow %d " % at * (length // 6 + 1))[:length]
        found[at : at + length] = data if kind < 0.8 else bytes(length)
    return bytes(found[:size])


@pytest.mark.parametrize("size", [0, 512, 3 * MIB + 512, 21 * MIB])
@pytest.mark.parametrize(
    "options",
    [
        ("-O", "qcow2"),
        ("-O", "qcow2", "-c"),
        ("-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=4k", "-W"),
        ("-O", "qcow2", "-o", "cluster_size=512,refcount_bits=1,compat=1.1", "-c"),
        ("-O", "qcow2", "-o", "compat=0.10,cluster_size=2M", "-m", "1"),
        ("-O", "qcow2", "-S", "0"),
        ("-O", "raw"),
        ("-O", "raw", "-S", "64k"),
        ("-O", "raw", "-S", "0"),
    ],
    ids=" ".join,
)
def test_there_and_back(tmp_path: Path, size: int, options: tuple[str, ...]) -> None:
    raw, target, back = tmp_path / "disk.raw", tmp_path / "target", tmp_path / "back.raw"
    content = disk_of(size, size)
    raw.write_bytes(content)
    command("convert", "-f", "raw", *options, str(raw), str(target))
    if options[1] == "raw":
        assert target.read_bytes() == content
        return
    run(["qemu-img", "check", target])
    run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, target])
    command("convert", "-f", "qcow2", "-O", "raw", str(target), str(back))
    assert back.read_bytes() == content
    with cowfence.open(target, writable=True) as disk:
        if size > 100_000:
            disk.write(70_000, b"written later" * 1000)
    run(["qemu-img", "check", target])


def test_a_compressed_file_is_about_as_small_as_qemus(tmp_path: Path) -> None:
    raw, ours, theirs = tmp_path / "disk.raw", tmp_path / "ours", tmp_path / "theirs"
    raw.write_bytes(disk_of(1, 20 * MIB))
    command("convert", "-f", "raw", "-O", "qcow2", "-c", str(raw), str(ours))
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, theirs])
    assert ours.stat().st_size <= theirs.stat().st_size * 1.15
    assert ours.stat().st_blocks * 512 <= theirs.stat().st_size * 1.15


def test_chains_and_snapshots(tmp_path: Path) -> None:
    base, overlay, out = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2", tmp_path / "out.raw"
    with cowfence.create(base, 8 * MIB) as disk:
        disk.write(MIB, b"below" * 1000)
    with cowfence.create(overlay, 10 * MIB, backing="base.qcow2", backing_format="qcow2") as disk:
        disk.write(9 * MIB, b"above" * 1000)
        then = disk.read(0, disk.size)
        create_snapshot(disk, "then")
        disk.write(MIB, b"later" * 1000)
        now = disk.read(0, disk.size)
    command("convert", "-O", "raw", str(overlay), str(out))
    assert out.read_bytes() == now
    command("convert", "-O", "raw", "-l", "then", str(overlay), str(out))
    assert out.read_bytes() == then
    failed = command("convert", "-O", "raw", "-l", "never", str(overlay), str(out), check=False)
    assert failed.returncode == 1
    assert "never" in failed.stderr
    assert out.read_bytes() == then


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_nothing_under_the_name(tmp_path: Path, signal_: signal.Signals) -> None:
    raw, target = tmp_path / "disk.raw", tmp_path / "target.qcow2"
    raw.write_bytes(random.Random(3).randbytes(64 * MIB))
    words = [sys.executable, "-m", "cowfence", "convert", "-f", "raw", "-O", "qcow2", "-c", "-m", "1", str(raw), str(target)]
    # Whoever started us in the background may have had Ctrl-C ignored; that would be inherited.
    running = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    while not list(tmp_path.glob(".target*")) and running.poll() is None:
        time.sleep(0.01)
    time.sleep(0.05)
    running.send_signal(signal_)
    _, complaints = running.communicate(timeout=60)
    assert running.returncode == (130 if signal_ == signal.SIGINT else -signal.SIGKILL), complaints
    assert not target.exists()
    assert "Traceback" not in complaints
    if signal_ == signal.SIGINT:
        assert os.listdir(tmp_path) == ["disk.raw"]


def test_a_source_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source.qcow2", tmp_path / "target.qcow2"
    with cowfence.create(source, 16 * MIB) as disk:
        disk.write_compressed(0, disk_of(9, 16 * MIB))
    content = bytearray(source.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300_000] = random.Random(1).randbytes(300_000)
    source.write_bytes(content)
    failed = command("convert", "-O", "qcow2", str(source), str(target), check=False)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert not target.exists()


@pytest.mark.parametrize(
    "words",
    [("-O", "raw", "-c"), ("-m", "17"), ("-S", "100"), ("-O", "qcow2", "-o", "size=1M"), ("-O", "qcow2", "-o", "nonsense=1")],
)
def test_options_that_make_no_sense(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    failed = command("convert", "-f", "raw", *words, str(tmp_path / "disk.raw"), str(tmp_path / "out"), check=False)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
