"""Options that all commands have, or all that change images: ``--output=json``, and ``--dry-run``: nothing is written, and what
it says is what then happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cowfence.cli.main import COMMANDS
from helpers_cli import snapshot_of
from helpers_programs import Programs
from judges import run

LINES = """
amend -o compat=0.10 top
amend -o refcount_bits=64 top
amend -o size=20M top
bitmap --add base b
bitmap --add --disable -g 4k base b
commit top
commit -d top
commit -b base top
create new 1G
create -o preallocation=metadata new 100M
create -o data_file=data new 100M
create -b base -F qcow2 new
create top 5G
create -f raw new 5M
dd -O qcow2 if=top of=new
dd bs=1k skip=3 if=top of=new
dd if=top of=raw
rebase -b  top
rebase -u -b elsewhere -F raw top
rebase -b other -F qcow2 top
resize top +1G
resize --shrink top 2M
resize --preallocation=full base +3M
resize -f raw raw 3M
snapshot -c s top
snapshot -a old snapped
snapshot -d old snapped
check -r all leaking
repair --apply leaking
repair --apply -r leaks --undo new leaking
compact leaking
""".strip().splitlines()
# What bench -w times is the writing itself.
CRASH = tuple(f"crash {name}" for name in ("explore", "replay", "record", "judge"))
NEVER_CHANGE = (
    "ctl",
    "compare",
    "completion",
    "crash",
    "diff",
    "explain",
    "info",
    "inspect",
    "map",
    "measure",
    "serve",
    "bench",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "base", "8M"])
    run(["qemu-io", "-c", "write -P 1 0 2M", folder / "base"])
    for name in ("top", "other"):
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", folder / name])
        run(["qemu-io", "-c", "write -P 2 1M 2M", "-c", "write -P 3 6M 100k", folder / name])
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "snapped", "8M"])
    run(["qemu-io", "-c", "write -P 2 1M 2M", folder / "snapped"])
    run(["qemu-img", "snapshot", "-c", "old", folder / "snapped"])
    run(["qemu-io", "-c", "write -P 3 1M 2M", folder / "snapped"])
    (folder / "raw").write_bytes(b"r" * (1 << 20))
    leaking = bytearray((folder / "base").read_bytes())
    block = int.from_bytes(leaking[0x10000:0x10008], "big")
    leaking += bytes(3 << 16)
    for cluster in range(len(leaking) // 65536 - 3, len(leaking) // 65536):
        leaking[block + 2 * cluster : block + 2 * cluster + 2] = b"\0\1"
    (folder / "leaking").write_bytes(leaking)
    return folder


@pytest.mark.parametrize("line", LINES)
def test_nothing_is_written_and_the_lengths_are_true(programs: Programs, images: Path, tmp_path: Path, line: str) -> None:
    for path in images.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = snapshot_of(tmp_path)
    command, *words = line.split(" ")
    rehearsed = programs.run([command, "--dry-run", "--output=json", *words], tmp_path, program="cowfence")
    assert snapshot_of(tmp_path) == before
    told = json.loads(rehearsed.stdout)
    assert told["dry-run"] is True
    human = programs.run([command, "--dry-run", *words], tmp_path, program="cowfence")
    assert human.returncode == rehearsed.returncode
    assert human.stdout
    assert snapshot_of(tmp_path) == before
    done = programs.run([command, "--output=json", *words], tmp_path, program="cowfence")
    assert done.returncode == rehearsed.returncode == 0, (done.stderr, rehearsed.stderr)
    after = snapshot_of(tmp_path)
    changed = {Path(name).name for name in after if after[name] != before.get(name)}
    if "files" not in told:
        return
    assert {Path(file["filename"]).name for file in told["files"]} >= changed
    for file in told["files"]:
        assert len(after[str(tmp_path / Path(file["filename"]).name)]) == file["new-file-size"]
    if command != "snapshot":  # the time is another one
        same = json.loads(done.stdout).items()
        assert all(told[key] == value for key, value in same)


def test_every_command_that_changes_an_image_has_it(programs: Programs, tmp_path: Path) -> None:
    for command in COMMANDS:
        said = programs.run([command, "--help"], tmp_path, program="cowfence").stdout
        assert ("--dry-run" in said) == (command not in NEVER_CHANGE), command


@pytest.mark.parametrize(
    "line",
    [
        "amend --dry-run -o compat=5 top",
        "snapshot --dry-run -d nobody top",
        "snapshot --dry-run -l top",
        "resize --dry-run top 1M",
        "create --dry-run -o cluster_size=5 new 1M",
        "check --dry-run top",
        "repair --dry-run --plan top",
        "bitmap --dry-run --extents top b",
        "dd --dry-run if=nothing of=new",
        "commit --dry-run base",
    ],
)
def test_what_would_fail_fails(programs: Programs, images: Path, line: str) -> None:
    before = snapshot_of(images)
    done = programs.run(line.split(), images, program="cowfence")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert snapshot_of(images) == before


def test_a_file_that_may_not_be_written_can_be_rehearsed_on(programs: Programs, images: Path, tmp_path: Path) -> None:
    """It is opened for reading: the lock of a reader, and no more rights than that."""
    path = tmp_path / "a"
    path.write_bytes((images / "base").read_bytes())
    path.chmod(0o444)
    done = programs.run(["resize", "--dry-run", "a", "+1G"], tmp_path, program="cowfence")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name != "crash"), *CRASH])
def test_every_command_can_answer_in_json(programs: Programs, tmp_path: Path, command: str) -> None:
    said = programs.run([*command.split(), "--help"], tmp_path, program="cowfence").stdout
    assert "--output {human,json}" in said
