"""``cowfence crash`` as a user runs it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from cowfence.crash.logwrites import MAGIC
from helpers_cli import cowfence
from helpers_fuse import require_fuse
from judges import require, run


def test_violations_are_told_and_counted_in_the_exit_code() -> None:
    require("qemu-io")
    done = cowfence("crash", "judge", "--workload", "compressed-part", "--model", "kill", check=False)
    assert done.returncode == 2
    assert "C2, kill model: guest sector 0 was flushed as" in done.stdout
    assert "replay: cowfence crash judge --workload compressed-part --model kill" in done.stdout
    done = cowfence("crash", "judge", "--workload", "allocate")
    assert "no violations" in done.stdout


def test_json_is_one_object() -> None:
    require("qemu-io")
    words = ("--workload", "zero-unmap", "--commands", "write -z -u 0 512; write 16k 512", "--model", "kill", "--json")
    found = json.loads(cowfence("crash", "judge", *words, check=False).stdout)
    assert found["exhaustive"] is True
    assert found["states"] >= found["distinct"] > 0
    (violation,) = found["violations"]
    assert {"clause", "model", "operations", "edge", "replay"} <= violation.keys()
    assert violation["operations"] == ["write -z -u 0 512", "write 16k 512"]


def test_a_script_is_judged(tmp_path: Path) -> None:
    require("qemu-io")
    (tmp_path / "s").write_text("qemu-img create -f qcow2 -o cluster_size=512 IMG 64k\n---\nwrite 0 1k\nflush\n")
    assert "no violations" in cowfence("crash", "judge", "--script", tmp_path / "s").stdout


def test_a_command_is_recorded_and_judged_later(tmp_path: Path) -> None:
    require("qemu-img")
    require_fuse()
    image, mount, log = tmp_path / "i.qcow2", tmp_path / "mount", tmp_path / "log"
    mount.mkdir()
    run(["qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=512", image, "64k"])
    run(["qemu-io", "-c", "write -P 1 0 2k", "-c", "write -P 2 40k 2k", image])
    words = ("crash", "record", "--atomic", "--mount", mount, "--log", log, image, "--", "qemu-img", "resize")
    cowfence(*words, mount / "i.qcow2", "128k")
    assert "no violations" in cowfence("crash", "judge", "--log", log).stdout
    cowfence(*words, "--shrink", mount / "i.qcow2", "32k")
    assert "C8" in cowfence("crash", "judge", "--log", log, check=False).stdout


def test_a_dm_log_writes_log_is_judged_with_its_image(tmp_path: Path) -> None:
    require("qemu-io")
    image, log = tmp_path / "i.qcow2", tmp_path / "log"
    run(["qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4k", image, "256k"])
    run(["qemu-io", "-c", "write -c -P 1 0 4k", image])
    before = tmp_path / "before"
    shutil.copy(image, before)
    log.touch()
    options = f"driver=qcow2,file.driver=blklogwrites,file.file.driver=file,file.file.filename={image}"
    options += f",file.log.driver=file,file.log.filename={log}"
    run(
        [
            "qemu-io",
            "-t",
            "writeback",
            "--image-opts",
            options,
            "-c",
            "write -P 2 0 4k",
            "-c",
            "write -P 3 64k 4k",
            "-c",
            "flush",
        ]
    )
    done = cowfence("crash", "judge", "--log", log, "--image", before, check=False)
    assert done.returncode == 2
    assert "guest sector 0 cannot be read" in done.stdout
    assert "--image" in cowfence("crash", "judge", "--log", log, check=False).stderr


def test_what_would_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    require("qemu-img")
    run(["qemu-img", "create", "-f", "qcow2", tmp_path / "i", "1M"])
    (tmp_path / "log").write_bytes(
        struct.pack("<QQQI", MAGIC, 1, 1, 512).ljust(512, b"\0")
        + struct.pack("<QQQQ", 1 << 40, 1, 0, 0).ljust(512, b"\0")
        + bytes(512)
    )
    done = cowfence("crash", "judge", "--log", tmp_path / "log", "--image", tmp_path / "i", check=False)
    assert (done.returncode, "larger files are not judged" in done.stderr) == (1, True)
    run(["qemu-img", "create", "-f", "qcow2", tmp_path / "large", "2T"])
    (tmp_path / "log").write_bytes(struct.pack("<QQQI", MAGIC, 1, 0, 512).ljust(512, b"\0"))
    done = cowfence("crash", "judge", "--log", tmp_path / "log", "--image", tmp_path / "large", check=False)
    assert (done.returncode, "are not judged" in done.stderr) == (1, True)


def test_without_qemu_a_log_is_judged_all_the_same(tmp_path: Path) -> None:
    require("qemu-img")
    require_fuse()
    (tmp_path / "mount").mkdir()
    run(["qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=512", tmp_path / "i", "64k"])
    run(["qemu-io", "-c", "write -P 1 0 2k", "-c", "write -P 2 40k 2k", tmp_path / "i"])
    words = ("crash", "record", "--atomic", "--mount", tmp_path / "mount", "--log", tmp_path / "log", tmp_path / "i", "--")
    cowfence(*words, "qemu-img", "resize", "-f", "qcow2", "--shrink", tmp_path / "mount" / "i", "32k")
    done = cowfence("crash", "judge", "--log", tmp_path / "log", before=("env", f"PATH={tmp_path}"), check=False)
    assert done.returncode == 2
    assert "not put before QEMU: qemu-img is not installed" in done.stdout


def test_workloads_are_listed() -> None:
    assert "compressed-part" in cowfence("crash", "judge", "--workload", "list").stdout


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("judge", "--workload", "nonesuch"), "there is no workload"),
        (("judge",), "required"),
        (("record", "--mount", ".", "--log", "l", "f"), "then --, then a program"),
        (("judge", "--log", "/dev/null"), "neither a log"),
        (("judge", "--log", "no/such"), "No such file"),
        (("judge", "--workload", "allocate", "--program", "nbd://localhost"), "--image FILE and --mount DIR"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], what: str, tmp_path: Path) -> None:
    done = cowfence("crash", *words, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert what in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    done = cowfence("crash", "judge", "--workload", "allocate", before=("env", f"PATH={tmp_path}"), check=False)
    assert done.returncode == 1
    assert done.stderr == "cowfence: qemu-img is not installed (Debian: apt-get install qemu-utils)\n"
