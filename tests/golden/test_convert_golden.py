"""``convert`` beside qemu-img's: same words, exit code and output; images that hold the same, over the same backing file."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

import cowfence
from helpers_cli import cowfence as command
from judges import run

MIB = 1 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(1)
    content = bytearray(6 * MIB)
    for _ in range(12):
        at = rng.randrange(6 * MIB - 100_000) & ~511
        content[at : at + 70_144] = rng.choice([rng.randbytes(70_144), b"text " * 14_028 + b"text"])
    (folder / "a.raw").write_bytes(content)
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "a.raw", folder / "base.qcow2"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", folder / "over.qcow2", "7M"])
    run(
        [
            "qemu-io",
            "-c",
            "write -P 5 100k 70k",
            "-c",
            "write -z 600k 200k",
            "-c",
            "write -P 6 6500k 10k",
            folder / "over.qcow2",
        ]
    )
    run(["qemu-img", "snapshot", "-c", "s", folder / "over.qcow2"])
    run(["qemu-io", "-c", "write -P 7 0 300k", folder / "over.qcow2"])
    run(["qemu-img", "bitmap", "--add", "--enable", folder / "over.qcow2", "b"])
    run(["qemu-io", "-c", "write -P 8 1M 100k", folder / "over.qcow2"])
    shutil.copy(folder / "base.qcow2", folder / "base2.qcow2")
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "there.qcow2", "8M"])
    run(["qemu-io", "-c", "write -P 9 0 8M", folder / "there.qcow2"])
    (folder / "there.raw").write_bytes(b"9" * 8 * MIB)
    (folder / "short.raw").write_bytes(b"9" * MIB)
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "empty.qcow2", "8M"])
    return folder


CASES = [
    ("-f raw -O qcow2 a.raw out", "qcow2"),
    ("-O raw over.qcow2 out", "raw"),
    ("-O qcow2 over.qcow2 out", "qcow2"),
    ("-c -O qcow2 over.qcow2 out", "qcow2"),
    ("-c -W -m 4 -O qcow2 -o compression_type=zstd over.qcow2 out", "qcow2"),
    ("-O qcow2 -o cluster_size=4k,compat=0.10 over.qcow2 out", "qcow2"),
    ("-O qcow2 -B base2.qcow2 -F qcow2 over.qcow2 out", "qcow2"),
    ("-O qcow2 -B base2.qcow2 -F qcow2 -o compat=0.10 over.qcow2 out", "qcow2"),
    ("-O qcow2 -B base2.qcow2 -F qcow2 -o extended_l2=on over.qcow2 out", "qcow2"),
    ("-c -O qcow2 -o backing_file=base2.qcow2,backing_fmt=qcow2 over.qcow2 out", "qcow2"),
    ("-O qcow2 -l s over.qcow2 out", "qcow2"),
    ("-O qcow2 --bitmaps over.qcow2 out", "qcow2"),
    ("-O raw -S 0 over.qcow2 out", "raw"),
    ("-O raw -S 64k over.qcow2 out", "raw"),
    ("-O qcow2 over.qcow2 base.qcow2 out", "qcow2"),
    ("-f raw -O raw a.raw a.raw out", "raw"),
    ("-n -O qcow2 over.qcow2 there.qcow2", "qcow2"),
    ("-n -O raw over.qcow2 there.raw", "raw"),
    ("-n --target-is-zero -O qcow2 over.qcow2 empty.qcow2", "qcow2"),
    ("-n -O raw over.qcow2 short.raw", ""),
    ("-t none -T none -f raw -O qcow2 a.raw out", "qcow2"),
    ("-p -f raw -O qcow2 a.raw out", "qcow2"),
    ("-r 1G -f raw -O qcow2 a.raw out", "qcow2"),
    ("--salvage -f raw -O qcow2 a.raw out", "qcow2"),
    ("--image-opts -O raw driver=qcow2,file.filename=over.qcow2 out", "raw"),
    ("--target-is-zero -O qcow2 over.qcow2 out", ""),
    ("--skip-broken-bitmaps -O qcow2 over.qcow2 out", ""),
    ("-O qcow2 -l nobody over.qcow2 out", ""),
    ("-c -O raw over.qcow2 out", ""),
    ("-m 17 -O raw over.qcow2 out", ""),
    ("-S 1000 -O raw over.qcow2 out", ""),
    ("-t foo -O raw over.qcow2 out", ""),
    ("-T foo -O raw over.qcow2 out", ""),
    ("-O qcow2 over.qcow2", ""),
    ("-O qcow2 nope out", ""),
    ("-O qcow2 -o nope=1 over.qcow2 out", ""),
    ("-B base2.qcow2 -F qcow2 -O qcow2 over.qcow2 base.qcow2 out", ""),
]


@pytest.mark.parametrize(("words", "kind"), CASES, ids=[words for words, _ in CASES])
def test_same_as_qemu_img(words: str, kind: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[subprocess.CompletedProcess[str]] = []
    for name in ("theirs", "ours"):
        shutil.copytree(made, tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        given = ["convert", *words.split()]
        done.append(run(["qemu-img", *given], check=False) if name == "theirs" else command(*given, check=False))
    theirs, ours = done
    assert ours.returncode == theirs.returncode, ours.stderr
    assert ours.stdout.splitlines()[-1:] == theirs.stdout.splitlines()[-1:]
    assert bool(ours.stderr) == bool(theirs.stderr), ours.stderr
    monkeypatch.chdir(tmp_path)
    out = words.split()[-1]
    if not kind:
        assert (tmp_path / "ours" / out).exists() == ((made / out).exists())
        return
    run(["qemu-img", "compare", "-f", kind, "-F", kind, f"theirs/{out}", f"ours/{out}"])
    if kind == "qcow2":
        run(["qemu-img", "check", f"ours/{out}"])
        with cowfence.open(f"ours/{out}") as image, cowfence.open(f"theirs/{out}") as other:
            assert image.header.backing_file == other.header.backing_file
            assert list(image.bitmaps) == list(other.bitmaps)
            for bitmap in image.bitmaps:
                assert image.bitmaps.ranges(bitmap.name) == other.bitmaps.ranges(bitmap.name)


def test_salvage_goes_on_where_the_source_cannot_be_read(tmp_path: Path) -> None:
    """A compressed cluster is damaged: one warning for each part that is lost, and all the rest is there."""
    source, raw = tmp_path / "source", tmp_path / "raw"
    raw.write_bytes(b"text " * (MIB // 5))
    command("convert", "-f", "raw", "-c", "-O", "qcow2", str(raw), str(source))
    with cowfence.open(source) as disk:
        entry = next(iter(disk.extents(0, disk.size)))
        assert entry.compressed
    content = bytearray(source.read_bytes())
    content[65536 * 1 : 65536 * 1 + 64] = b"\xff" * 64
    source.write_bytes(content)
    failed = command("convert", "-O", "raw", str(source), str(tmp_path / "out"), check=False)
    assert failed.returncode == 1
    assert not (tmp_path / "out").exists()
    done = command("convert", "--salvage", "-O", "raw", str(source), str(tmp_path / "out"))
    assert "warning: error while reading offset 0" in done.stderr
    out = (tmp_path / "out").read_bytes()
    assert out[:65536] == bytes(65536)
    assert out[65536 : MIB - 65536] == raw.read_bytes()[65536 : MIB - 65536]


def test_a_snapshot_behind_nbd_is_refused(tmp_path: Path) -> None:
    """No server is asked: the option means nothing there."""
    words = ["-l", "s", "-O", "raw", f"nbd+unix:///?socket={tmp_path}/socket", str(tmp_path / "out")]
    done = command("convert", *words, check=False)
    assert done.returncode == 1
    assert "an internal snapshot" in done.stderr
    assert not (tmp_path / "out").exists()
