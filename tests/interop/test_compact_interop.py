"""``cowfence compact`` on images made by qemu-img: compared, checked and read by it afterwards; and how the command ends."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers_cli import COWFENCE, ENVIRONMENT, cowfence, snapshot_of
from judges import run

MIB = 1 << 20


def made(path: Path, *options: str, compressed: bool = False, size: int = 24 * MIB) -> Path:
    """An image written by QEMU, with holes all over its file: pieces of it are compared with a copy later."""
    dice = random.Random(str(options))
    words = ["-o", ",".join(options)] if options else []
    if compressed:
        raw = path.with_suffix(".raw")
        with raw.open("wb") as file:
            file.truncate(size)
            for at in range(0, size, 65536):
                file.seek(at)
                file.write(dice.randbytes(dice.randrange(20000)))
        run(["qemu-img", "convert", "-q", "-c", "-O", "qcow2", *words, raw, path])
        raw.unlink()
    else:
        run(["qemu-img", "create", "-q", "-f", "qcow2", *words, path, str(size)])
    commands = []
    for number in range(60):
        at, length = dice.randrange(size // 4096) * 4096, dice.choice((4096, 65536, 300 * 1024))
        length = min(length, size - at)
        verb = "discard" if number % 3 == 2 else f"write -P {number + 1}"
        commands += ["-c", f"{verb} {at} {length}"]
    commands += ["-c", f"write -P 99 0 {size // 4}", "-c", f"discard {size // 8} {size // 2}"]
    run(["qemu-io", "-f", "qcow2", *commands, path])
    return path


def judged(path: Path, before: Path) -> None:
    run(["qemu-img", "check", "-q", path])
    run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", path, before])


@pytest.mark.parametrize(
    ("options", "compressed"),
    [
        ((), False),
        (("compat=0.10",), False),
        (("cluster_size=4096",), False),
        (("cluster_size=512", "refcount_bits=64"), False),
        (("extended_l2=on",), False),
        (("refcount_bits=1",), False),
        ((), True),
        (("cluster_size=4096", "compression_type=zstd"), True),
    ],
    ids=str,
)
def test_qemu_reads_the_same(options: tuple[str, ...], compressed: bool, tmp_path: Path) -> None:
    image = made(tmp_path / "image", *options, compressed=compressed, size=MIB * (2 if "cluster_size=512" in options else 24))
    before = tmp_path / "before"
    before.write_bytes(image.read_bytes())
    planned = json.loads(cowfence("compact", "--dry-run", "--output=json", image).stdout)
    assert image.read_bytes() == before.read_bytes()
    done = json.loads(cowfence("compact", "--output=json", image).stdout)
    assert {**planned, "dry-run": False} == done
    assert image.stat().st_size == done["file-size"] <= done["old-file-size"] == before.stat().st_size
    judged(image, before)
    cowfence("check", image)
    if not compressed:
        assert done["file-size"] < done["old-file-size"]


def test_snapshots_and_backing_file(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image])
    for number in range(3):
        run(["qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number * 512 * 1024} 4M", image])
        run(["qemu-img", "snapshot", "-c", f"s{number}", image])
    run(["qemu-img", "snapshot", "-d", "s0", image])
    before = tmp_path / "before"
    before.write_bytes(image.read_bytes())
    cowfence("compact", "-q", image)
    assert image.stat().st_size < before.stat().st_size
    judged(image, before)
    for name in ("s1", "s2"):
        for path in (image, before):
            run(["qemu-img", "convert", "-q", "-l", f"snapshot.name={name}", "-O", "raw", path, path.with_suffix(".raw")])
        assert image.with_suffix(".raw").read_bytes() == before.with_suffix(".raw").read_bytes()


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_encrypted(method: str, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("passphrase")
    secret = ["--object", f"secret,id=one,file={tmp_path / 'one'}"]
    image = tmp_path / "image"
    run(
        [
            "qemu-img",
            "create",
            "-q",
            *secret,
            "-f",
            "qcow2",
            "-o",
            f"encrypt.format={method},encrypt.key-secret=one{',encrypt.iter-time=10' if method == 'luks' else ''}",
            image,
            "8M",
        ]
    )
    opened = ["--image-opts", f"driver=qcow2,encrypt.key-secret=one,file.filename={image}"]
    work = ["-c", "write -P 1 0 4M", "-c", "write -P 2 4M 2M", "-c", "discard 1M 2M"]
    run(["qemu-io", *secret, *work, *opened])
    size = image.stat().st_size
    refused = cowfence("compact", image, check=False)
    if method == "luks":
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
    cowfence("compact", *secret, image)
    assert image.stat().st_size < size
    run(["qemu-img", "check", "-q", *secret, *opened])
    reads = ["-c", "read -P 1 0 1M", "-c", "read -P 0 1M 2M", "-c", "read -P 1 3M 1M", "-c", "read -P 2 4M 2M"]
    assert "verification failed" not in run(["qemu-io", *secret, *reads, *opened]).stdout


def test_persistent_bitmaps(tmp_path: Path) -> None:
    image = made(tmp_path / "image")
    run(["qemu-img", "bitmap", "--add", image, "one"])
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 1M", "-c", "discard 8M 8M", image])
    extents = cowfence("bitmap", "--extents", "--output=json", image, "one").stdout
    before = tmp_path / "before"
    before.write_bytes(image.read_bytes())
    cowfence("compact", image)
    judged(image, before)
    assert cowfence("bitmap", "--extents", "--output=json", image, "one").stdout == extents
    assert "in-use" not in run(["qemu-img", "info", image]).stdout


def test_killed_at_any_time_the_disk_is_whole(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "cluster_size=4096")
    image = tmp_path / "image"
    dice = random.Random(5)
    for _ in range(6):
        image.write_bytes(source.read_bytes())
        process = subprocess.Popen([*COWFENCE, "compact", "-q", image], env=ENVIRONMENT)
        time.sleep(dice.uniform(0.15, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run(["qemu-img", "check", "-q", image], check=False).returncode in (0, 3)
        run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", image, source])
    cowfence("compact", "-q", image)
    judged(image, source)


def test_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(4096))
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", tmp_path / "with-data", "1M"])
    before = snapshot_of(tmp_path)
    for name, line in (("raw", "not a qcow2"), ("with-data", "external data file"), ("missing", "No such file")):
        for words in ((), ("--dry-run",)):
            done = cowfence("compact", *words, tmp_path / name, check=False)
            assert done.returncode == 1
            assert line in done.stderr
            assert len(done.stderr.splitlines()) == 1
    assert snapshot_of(tmp_path) == before


def test_words(tmp_path: Path) -> None:
    image = made(tmp_path / "image")
    assert "would be" in cowfence("compact", "--dry-run", image).stdout
    assert "(100.00/100%)" in cowfence("compact", "-p", image).stdout
    assert cowfence("compact", image).stdout == "The file is as short as it can be.\n"
    assert cowfence("compact", "-q", image).stdout == ""
