"""``convert`` beyond qemu-img: into a pipe, measured, verified, preallocated, by effort; qemu-img is the judge."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cowfence
from cowfence.ops.convert import How, convert_disk, convert_to_pipe
from cowfence.ops.create import CreateOptions
from helpers_cli import cowfence as command
from judges import run

MIB = 1 << 20
_SECRET = "--object secret,id=s,file=secret"
_LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(3)
    content = bytearray(5 * MIB + 512)
    for _ in range(14):
        at = rng.randrange(len(content) - 100_352) & ~511
        content[at : at + 100_352] = rng.choice([rng.randbytes(100_352), b"text pa " * 12_544])
    (folder / "a.raw").write_bytes(content)
    (folder / "secret").write_bytes(b"abc")
    return folder


def _piped(folder: Path, words: str, target: Path) -> subprocess.CompletedProcess[bytes]:
    """The image goes through a pipe, not into a file."""
    line = f"{sys.executable} -m cowfence.cli.main convert {words} - | cat > {target}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, check=False)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "-c",
        "-c -W -m 4",
        "-c -o compression_type=zstd --effort best",
        "-c --effort best",
        "-S 0",
        "-o extended_l2=on,cluster_size=128k",
        "-o compat=0.10,cluster_size=4k -c",
        "-c -o cluster_size=512,refcount_bits=64",
    ],
)
def test_a_pipe_gets_a_whole_image(folder: Path, tmp_path: Path, options: str) -> None:
    out = tmp_path / "out"
    done = _piped(folder, f"-f raw -O qcow2 {options} a.raw", out)
    assert (done.returncode, done.stderr) == (0, b"")
    run(["qemu-img", "check", "-q", "-f", "qcow2", out])
    run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder / "a.raw", out])


def test_an_encrypted_image_in_a_pipe(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not _piped(folder, f"-f raw -O qcow2 {_SECRET} -o {_LUKS} a.raw", out).returncode
    secret = ["--object", f"secret,id=s,file={folder / 'secret'}", "--image-opts"]
    image = f"driver=qcow2,file.filename={out},encrypt.key-secret=s"
    run(["qemu-img", "check", "-q", *secret, image])
    run(["qemu-img", "compare", *secret, f"driver=raw,file.filename={folder / 'a.raw'}", image])


def test_over_a_backing_file_in_a_pipe(folder: Path) -> None:
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", folder / "over"])
    run(["qemu-io", "-c", "write -P 3 1M 70k", "-c", "write -z 3M 128k", folder / "over"])
    assert not _piped(folder, "-O qcow2 -B a.raw -F raw over", folder / "copy").returncode
    run(["qemu-img", "compare", folder / "over", folder / "copy"])
    assert (folder / "copy").stat().st_size < MIB


def test_raw_in_a_pipe(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not _piped(folder, "-f raw -O raw a.raw", out).returncode
    assert out.read_bytes() == (folder / "a.raw").read_bytes()


def test_a_reader_that_leaves(folder: Path) -> None:
    line = f"{sys.executable} -m cowfence.cli.main convert -f raw -O qcow2 a.raw - | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rb"cowfence: standard output: write at offset \d+: Broken pipe\n", done.stderr)


def test_a_source_that_changes_between_the_passes(tmp_path: Path) -> None:
    with cowfence.create(tmp_path / "a", MIB) as disk:
        disk.write(0, b"1" * 65536)
        calls: list[int] = []

        def change(done: int, size: int) -> None:  # noqa: ARG001
            if not calls:
                disk.write(MIB // 2, b"2" * 65536)
            calls.append(done)

        null = os.open(os.devnull, os.O_WRONLY)
        try:
            with pytest.raises(cowfence.Invalid, match="changed while it was read"):
                convert_to_pipe(disk, "a", null, CreateOptions(), progress=change)
        finally:
            os.close(null)


@pytest.mark.parametrize("words", ["-n", "--bitmaps", "--verify", "--output=json", "-o preallocation=full", "-o data_file=d"])
def test_what_a_pipe_cannot_have(folder: Path, words: str) -> None:
    done = command("convert", "-f", "raw", "-O", "qcow2", *words.split(), "a.raw", "-", cwd=folder, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


@pytest.mark.parametrize("kind", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("more", ["", ",extended_l2=on", ",data_file=d", ",compat=0.10"])
def test_preallocated(folder: Path, tmp_path: Path, kind: str, more: str) -> None:
    out = tmp_path / "out"
    done = command(
        "convert", "-f", "raw", "-O", "qcow2", "-o", f"preallocation={kind}{more}", "--verify", "a.raw", out, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    # qemu-img looks for the data file from where it stands.
    with contextlib.chdir(tmp_path):
        run(["qemu-img", "check", "-q", out])
        run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder / "a.raw", out])
    if "data_file" not in more:
        mapped = json.loads(run(["qemu-img", "map", "--output=json", out]).stdout)
        assert all("offset" in extent for extent in mapped)
    if kind != "metadata":
        assert (tmp_path / ("d" if "data_file" in more else "out")).stat().st_blocks * 512 >= 5 * MIB


def test_preallocated_and_encrypted(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["-o", f"preallocation=metadata,{_LUKS}", *_SECRET.split()]
    assert not command("convert", "-f", "raw", "-O", "qcow2", *options, "--verify", "a.raw", out, cwd=folder).returncode
    secret = ["--object", f"secret,id=s,file={folder / 'secret'}", "--image-opts"]
    image = f"driver=qcow2,file.filename={out},encrypt.key-secret=s"
    run(["qemu-img", "compare", *secret, f"driver=raw,file.filename={folder / 'a.raw'}", image])


def test_compressed_and_preallocated_exclude_each_other(folder: Path) -> None:
    words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "preallocation=metadata", "a.raw", "no"]
    ours = command(*words, cwd=folder, check=False)
    theirs = subprocess.run(["qemu-img", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert (ours.returncode, ours.stderr.partition(": ")[2]) == (theirs.returncode, theirs.stderr.partition(": ")[2])
    assert not (folder / "no").exists()


@pytest.mark.parametrize("words", ["-O qcow2", "-c -O qcow2", "-O raw", "-c -O qcow2 -o compression_type=zstd,cluster_size=4k"])
def test_a_dry_run_tells_the_length(folder: Path, tmp_path: Path, words: str) -> None:
    out = tmp_path / "out"
    line = ["convert", "-f", "raw", *words.split(), "--output=json", "a.raw", str(out)]
    told = json.loads(command(*line, "--dry-run", cwd=folder).stdout)
    assert not list(tmp_path.iterdir())
    assert told["dry-run"]
    made = json.loads(command(*line, cwd=folder).stdout)
    assert told["file-size"] == out.stat().st_size
    assert told["data"] == made["data"]


def test_verify_finds_what_was_written_wrong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cowfence.cli import main
    from cowfence.ops import sinks

    monkeypatch.setattr(sinks.QcowSink, "prepare", lambda _, start, data: _spoiled(start, data))
    monkeypatch.chdir(folder)
    assert main.entry(["convert", "--verify", "-f", "raw", "-O", "qcow2", "a.raw", str(tmp_path / "out")]) == 1
    assert not list(tmp_path.iterdir())


def _spoiled(start: int, data: memoryview) -> object:
    from cowfence.ops.pieces import Prepared

    content = bytearray(data)
    content[70_000] ^= 1
    return Prepared(start, memoryview(content), [(0, len(content))], [])


def test_more_effort_makes_a_smaller_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[: 3 * MIB])
    sizes = []
    for effort in ("fastest", "fast", "best"):
        done = command("convert", "-c", "--effort", effort, "-f", "raw", "-O", "qcow2", source, tmp_path / effort)
        assert done.returncode == 0, done.stderr
        run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, tmp_path / effort])
        sizes.append((tmp_path / effort).stat().st_size)
    run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, tmp_path / "theirs"])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2]
    # Their last cluster is not written to its end.
    assert sizes[2] - 65536 < (tmp_path / "theirs").stat().st_size


def test_progress_for_programs(folder: Path, tmp_path: Path) -> None:
    done = command("convert", "--progress=json", "-f", "raw", "-O", "qcow2", "a.raw", tmp_path / "out", cwd=folder)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert not done.stdout
    assert lines[0]["fraction"] == 0
    assert lines[-1]["fraction"] == 1
    assert lines[-1]["done-bytes"] == lines[-1]["total-bytes"] == 5 * MIB + 512


def test_a_target_behind_nbd(folder: Path, tmp_path: Path) -> None:
    image, socket = tmp_path / "disk", tmp_path / "socket"
    image.write_bytes(b"9" * 6 * MIB)
    server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", str(socket), "-t", str(image)])
    try:
        while not socket.exists():
            assert server.poll() is None
        words = ["-n", "-f", "raw", "a.raw"]
        assert command("convert", *words, f"nbd+unix:///?socket={socket}", cwd=folder).returncode == 0
        expected = (folder / "a.raw").read_bytes()
        assert image.read_bytes() == expected + b"9" * (6 * MIB - len(expected))
        image.write_bytes(b"9" * 6 * MIB)
        described = f"driver=nbd,path={socket}"
        assert command("convert", "--target-image-opts", *words, described, cwd=folder).returncode == 0
        assert image.read_bytes()[: len(expected)] == expected
    finally:
        server.terminate()
        server.wait()


def test_target_image_opts_name_a_file(folder: Path, tmp_path: Path) -> None:
    run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "there", "8M"])
    described = f"driver=qcow2,file.filename={tmp_path / 'there'}"
    done = command("convert", "-n", "--target-image-opts", "-f", "raw", "a.raw", described, cwd=folder)
    assert done.returncode == 0, done.stderr
    run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", folder / "a.raw", tmp_path / "there"])
    done = command("convert", "--target-image-opts", "-f", "raw", "a.raw", described, cwd=folder, check=False)
    assert (done.returncode, done.stderr) == (1, "cowfence: --target-image-opts requires use of -n flag\n")


def test_what_fails_before_publishing_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def fails(_: object) -> None:
        raise cowfence.Invalid("no")

    with (
        cowfence.open(folder / "a.raw", format="raw") as disk,
        pytest.raises(cowfence.Invalid),
    ):
        convert_disk(disk, "a.raw", tmp_path / "out", CreateOptions(), How(), before_publishing=fails)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "--effort best",
        "-c -O qcow2 --spool-limit 1G",
        "--dry-run --verify",
        "--dry-run --rate-limit 1M",
        "--dry-run -t none",
        "-n --target-image-opts -O qcow2",
        "--reconnect 5",
        "--reconnect x",
        "--reconnect=-1",
    ],
)
def test_what_would_be_ignored_is_refused(folder: Path, tmp_path: Path, words: str) -> None:
    done = command("convert", "-f", "raw", *words.split(), "a.raw", tmp_path / "out", cwd=folder, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not list(tmp_path.iterdir())
