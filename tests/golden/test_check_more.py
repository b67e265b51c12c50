"""``check`` of many images, and in plain words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers_cli import cowfence as command
from judges import run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("clean", "leaky", "corrupt"):
        run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / name, "1M"])
        run(["qemu-io", "-c", "write -P 3 0 128k", tmp_path / name])
    mapped = json.loads(run(["qemu-img", "map", "--output=json", tmp_path / "clean"]).stdout)
    cluster = mapped[0]["offset"] >> 16
    content = (tmp_path / "clean").read_bytes()
    block = int.from_bytes(content[65536:65544], "big")
    for name, number, count in (("leaky", len(content) + 65535 >> 16, 1), ("corrupt", cluster, 0)):
        with (tmp_path / name).open("r+b") as file:
            file.seek(block + 2 * number)
            file.write(count.to_bytes(2, "big"))
            file.truncate((len(content) + 65535 >> 16) + 1 << 16)
    (tmp_path / "junk").write_bytes(b"junk")
    return tmp_path


def test_a_table_and_one_exit_code(images: Path) -> None:
    for names, code in (
        (["clean", "clean"], 0),
        (["clean", "leaky"], 3),
        (["leaky", "junk"], 1),
        (["clean", "nothing"], 1),
        (["junk", "corrupt", "leaky"], 2),
    ):
        done = command("check", *names, cwd=images, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["RESULT", "CORRUPTIONS", "LEAKS", "IMAGE"]
        assert [line.split()[-1] for line in lines[1:]] == names
    told = json.loads(command("check", "--output=json", "clean", "corrupt", "junk", cwd=images, check=False).stdout)
    assert [image["result"] for image in told] == ["clean", "corrupt", "not checked"]


def test_many_are_repaired(images: Path) -> None:
    assert command("check", "-r", "all", "clean", "leaky", "corrupt", cwd=images).returncode == 0
    for name in ("clean", "leaky", "corrupt"):
        run(["qemu-img", "check", "-q", images / name])


def test_findings_in_plain_words_of_many(images: Path) -> None:
    done = command("check", "--explain", "clean", "corrupt", cwd=images, check=False)
    assert "    wrong:  A cluster is in use more often than its stored refcount says." in done.stdout
    assert "wrong" not in command("check", "clean", "corrupt", cwd=images, check=False).stdout
