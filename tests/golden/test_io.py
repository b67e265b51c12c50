"""``cowfence-io`` beside ``qemu-io``: the same commands, on copies of the same images; what they print, leave and return."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cowfence.cli.io_commands import carry_out
from cowfence.cli.io_language import Session
from helpers_cli import ENVIRONMENT, shared_programs
from judges import require, run

MIB = 1 << 20
_OURS = [sys.executable, "-m", "cowfence.cli.io"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "base.qcow2", "4M"])
    run(["qemu-io", "-c", "write -P 7 0 300k", "-c", "write -P 8 2M 128k", folder / "base.qcow2"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", folder / "image"])
    run(["qemu-io", "-c", "write -P 9 1M 100k", "-c", "write -z 64k 64k", folder / "image"])
    (folder / "raw").write_bytes(random.Random(1).randbytes(MIB))
    (folder / "pattern").write_bytes(b"0123456789")
    return folder


def _both(
    images: Path, tmp_path: Path, words: list[str], stdin: str = "", format_name: str = "qcow2"
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """The same with both programs, each in a folder of its own."""
    for name in ("theirs", "ours"):
        if not (tmp_path / name).exists():
            shutil.copytree(images, tmp_path / name)
    theirs = subprocess.run(
        [require("qemu-io"), *words],
        cwd=tmp_path / "theirs",
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    (tmp_path / "stdin").write_text(stdin)
    ours = shared_programs().run(words, tmp_path / "ours", program="cowfence-io", stdin=str(tmp_path / "stdin"))
    image = "raw" if format_name == "raw" else "image"
    compare = ["qemu-img", "compare", "-q", "-f", format_name, "-F", format_name]
    same = run([*compare, tmp_path / "theirs" / image, tmp_path / "ours" / image], check=False)
    assert not same.returncode, words
    return theirs, ours


def _plain(text: str) -> str:
    """Without times, rates, and the program's name."""
    text = re.sub(r"[\d:.]+( sec)? \([\d.]+ \w+/sec and [\d.]+ ops/sec\)", "TIME", text)
    text = re.sub(r",\d+:\d\d:[\d.]+,[\d.]+,[\d.]+", ",TIMES", text)
    return text.replace("cowfence-io", "qemu-io").replace("  --", " --")


COMMANDS = """
read 0 512|read -v 0 40|read -v 0xfff0 33|read -P 7 0 64k|read -P 1 1k 3k|read -P 7 -s 512 -l 512 0 3k
read -P 1 -s 1k -l 9 0 3k|read -P 7 -s 1k 0 3k|read -P 7 -l 1k 0 64k|read -P 7 -s 3k -l 1k 0 3k|read -C 0 1M
read -q 0 1k|read -q -P 1 0 1k|read -qv 0 16|read -p 0 10|read 1.5k 0x200|read 0 0|read 3M 2M|read 4M 512|read 0 3G
read x 5|read 0 5x|read 0 -5|read|read 0|read 0 1 1|read -s 512 0 1k|read -l 9 0 5|read -P 300 0 1|read -P x 0 1
read -P 0x07 0 1|read -P 07 0 1|read -P|read -y 0 1|read 99999999999999999999 1|readv -P 7 0 1k 2k|readv -v 0 16 32
readv 0 1000 x|readv 3M 1M 1k|readv -P 1 0 1 1|write 1 3|write -P 0xab 1k 3k|write -P 300 0 1|write -f 0 512
write 0 1k 1k|write 4M 1|write -q 0 1k|write -C 1M 1M|write 0 0|write -z 64k 64k|write -z -u 64k 64k
write -zn 512k 64k|write -n 0 512|write -u 0 1|write -z -P 5 0 1|write -s pattern 5 1k|write -s x 0 512
write -s pattern -P 5 0 1|write -c 128k 64k|write -c -P 6 128k 64k|write -c 128k 1k|write -c -z 0 64k|write -cf 0 64k
write -r 0 1|write 0x10 010|writev -P 3 0 1k 2k|writev 0 1|writev -P 3 0 1k 2|writev 4M 5 5|discard 1M 64k
discard -C 0 64k|discard -q 0 64k|discard 0|discard 0 x|discard 5M 1M|discard 0 1 1|aio_read 0 64k|aio_read -P 4 0 5
aio_read -P 7 0 5|aio_read -v 0 16|aio_read -q 0 5|aio_read 5M 512|aio_read|aio_write -P 9 0 64k|aio_write -z 0 64k
aio_write -C 0 1k 1k|aio_write 5M 512|aio_write -u 0 1|aio_write -f 3 5|aio_write -q 0 9|aio_flush|flush|length|map
info|alloc 0|alloc 0 4M|alloc 64k 1|alloc 5M|alloc 3M 2M|alloc x|alloc|info 1|map -x|truncate 8M|truncate 1x
truncate -m foo 5M|truncate -m falloc 5M|truncate|open image|open|open -x|close|reopen|reopen -r|reopen -w|reopen -rw
reopen -c foo|reopen -c none|reopen -o x=y|sleep 1|sleep x|sleep|sigraise 0|sigraise x|abort x|break a b|resume a
remove_break a|quit|quit 1|foo|help foo
"""


@pytest.mark.parametrize("part", range(6))
def test_each_command(images: Path, tmp_path: Path, part: int) -> None:
    for command in COMMANDS.replace("\n", "|").strip("|").split("|")[part::6]:
        theirs, ours = _both(images, tmp_path, ["-f", "qcow2", "-c", command, "image"])
        told = (command, _plain(ours.stdout), _plain(ours.stderr), ours.returncode)
        assert told == (command, _plain(theirs.stdout), _plain(theirs.stderr), theirs.returncode)
    run(["qemu-img", "check", "-q", tmp_path / "ours" / "image"])


SCRIPTS = [
    "write -P 5 0 1k\n\n  read   -P 5 0 1k  \nfoo\nquit\nread 0 1\n",
    "close\nlength\nread 0 1\nmap\ninfo\nopen image\nopen -r image\nclose\n"
    "open -r image\nwrite 0 1\nreopen -w\nwrite 0 1\nread -P 205 0 1\n",
    "close\nopen -o driver=qcow2,file.filename=image\nlength\nread 0 1;read 1 1\nclose\nclose\n",
    "aio_write -P 1 0 64k\naio_flush\naio_write -P 2 64k 64k\naio_flush\nread -P 1 0 64k\nread -P 2 64k 64k\n",
    "write -P 3 0 64k\nreopen -r\nread -P 3 0 64k\nwrite 0 1\nflush\n",
    "truncate 6M\nlength\nwrite -P 4 5M 64k\nmap\ntruncate 4M\nlength\n",
    "close\nopen -s image\nwrite -P 99 0 1M\nread -P 99 0 1M\nclose\nopen -n image\nread -P 7 0 64k\n",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_on_standard_input(images: Path, tmp_path: Path, script: str) -> None:
    theirs, ours = _both(images, tmp_path, ["-f", "qcow2", "image"], script)
    assert _plain(ours.stdout) == _plain(theirs.stdout)
    assert _plain(ours.stderr) == _plain(theirs.stderr)
    assert ours.returncode == theirs.returncode


@pytest.mark.parametrize(
    "line",
    [
        "-c|read 0 1|-c|foo|-c|read 0 2|image",
        "-r|-c|write 0 1|image",
        "-r|-c|discard 0 1|image",
        "-s|-c|write -P 3 0 1M|-c|read -P 3 0 1M|image",
        "--image-opts|-c|length|driver=qcow2,file.filename=image",
        "-n|-c|write -P 6 4k 8k|image",
        "-t|none|-c|write -P 6 4k 8k|image",
        "-t|writethrough|-c|write -P 6 4k 8k|image",
        "-t|unsafe|-c|write -P 6 4k 8k|image",
        "-d|unmap|-c|discard 1M 1M|image",
        "-d|ignore|-c|discard 1M 1M|-c|map|image",
        "-U|-r|-c|length|image",
        "-c|help",
        "-c|length",
    ],
)
def test_the_command_line(images: Path, tmp_path: Path, line: str) -> None:
    theirs, ours = _both(images, tmp_path, line.split("|"))
    assert (_plain(ours.stdout), _plain(ours.stderr)) == (_plain(theirs.stdout), _plain(theirs.stderr))
    assert ours.returncode == theirs.returncode


@pytest.mark.parametrize(
    "command",
    ["length", "map", "info", "read -v 0 64", "write -P 5 100 5000", "write -z 0 64k", "write -c 0 64k", "truncate 2M"],
)
def test_a_raw_image(images: Path, tmp_path: Path, command: str) -> None:
    theirs, ours = _both(images, tmp_path, ["-f", "raw", "-c", command, "raw"], format_name="raw")
    assert (_plain(ours.stdout), _plain(ours.stderr)) == (_plain(theirs.stdout), _plain(theirs.stderr))
    assert ours.returncode == theirs.returncode


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "-t|foo|image",
        "-d|foo|image",
        "-i|foo|image",
        "-f|foo|image",
        "--image-opts|-f|qcow2|x=y",
        "-x|image",
        "image|image",
    ],
)
def test_what_cannot_be_opened(images: Path, tmp_path: Path, line: str) -> None:
    theirs, ours = _both(images, tmp_path, ["-c", "length", *line.split("|")])
    assert theirs.returncode == ours.returncode == 1
    assert not ours.stdout
    assert len(ours.stderr.splitlines()) == 1
    assert ours.stderr.startswith("cowfence-io: ")


@pytest.mark.parametrize("option", ["-C", "-m", "-k", "-T x"])
def test_what_is_refused_by_name(images: Path, option: str) -> None:
    done = subprocess.run(
        [*_OURS, *option.split(), "image"], cwd=images, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert option.split()[0] in done.stderr


@pytest.mark.parametrize(
    "command", ["read -b 0 512", "write -b 0 512", "aio_read -i 0 1", "wait_break a", "open -C x", "open -k x"]
)
def test_commands_that_are_refused_by_name(images: Path, command: str) -> None:
    words = ["image"] if not command.startswith("open") else []
    done = subprocess.run(
        [*_OURS, "-c", command, *words], cwd=images, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len((done.stdout + done.stderr).splitlines()) == 1


@pytest.mark.parametrize("name", ["read", "write", "open", "aio_write", "discard", "reopen"])
def test_help_of_a_command(images: Path, name: str) -> None:
    theirs = subprocess.run(["qemu-io", "-c", f"help {name}"], cwd=images, capture_output=True, text=True, check=False)
    ours = subprocess.run([*_OURS, "-c", f"help {name}"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ours.stdout.splitlines()[0] == theirs.stdout.splitlines()[0]
    for option in re.findall(r"^ (-\w), -- ", ours.stdout, re.MULTILINE):
        assert option in theirs.stdout


class _Meeting:
    """A disk whose reads end when four of them have begun."""

    size = MIB
    writable = False

    def __init__(self) -> None:
        self._barrier = threading.Barrier(4, timeout=10)

    def read_into(self, offset: int, buffer: bytearray, *, wait: bool = True) -> None:  # noqa: ARG002
        self._barrier.wait()


def test_what_is_in_flight_overlaps(capsys: pytest.CaptureFixture[str]) -> None:
    image: Any = SimpleNamespace(disk=_Meeting(), discards=True)
    session = Session("cowfence-io", lambda _: image, image)
    for at in range(4):
        assert carry_out(session, f"aio_read {at * 65536} 64k")
    assert carry_out(session, "aio_flush")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "at offset" in line] == [
        f"read 65536/65536 bytes at offset {at * 65536}" for at in range(4)
    ]


def test_a_full_host_is_said(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, "4M"])
    line = f"ulimit -f 300; trap '' XFSZ; {' '.join(_OURS)} -c 'write 0 1M' -c 'write 0 1' {image}"
    done = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "write failed: No space left on device" in done.stdout
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    # Clusters may leak, and nothing may be wrong.
    assert run(["qemu-img", "check", "-q", image], check=False).returncode in (0, 3)
    assert os.path.getsize(image) <= 300 * 1024
