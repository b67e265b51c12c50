"""Bad input through the real command line: exit code 1 as qemu-img's, one line that names the file, nothing changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowfence as library
from cowfence.ops.create import CreateOptions, create
from cowfence.units import MIB
from helpers_cli import cowfence, snapshot_of

Build = Callable[[Path], None]
COMMANDS = {
    "info": ("info", "-f", "qcow2", "x"),
    "map": ("map", "x"),
    "dd": ("dd", "if=x", "of=out"),
    "serve": ("serve", "--port", "0", "x"),
}


def patched(path: Path, *patches: tuple[int, bytes]) -> None:
    """A new image at ``path`` with some bytes of its header changed."""
    create(path, CreateOptions(size_bytes=MIB))
    with path.open("r+b") as image:
        for offset, data in patches:
            image.seek(offset)
            image.write(data)


def missing(path: Path) -> None:
    assert not path.exists()


def directory(path: Path) -> None:
    path.mkdir()


def random_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(7, 250)) * 40)


def no_bytes(path: Path) -> None:
    path.touch()


def short_header(path: Path) -> None:
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(30))


def version_1(path: Path) -> None:
    patched(path, (4, b"\0\0\0\1"))


def huge_l1(path: Path) -> None:
    patched(path, (36, b"\x7f\xff\xff\xff"))


def l1_elsewhere(path: Path) -> None:
    patched(path, (40, (1 << 40).to_bytes(8)))


def unknown_bit(path: Path) -> None:
    patched(path, (72, (1 << 62).to_bytes(8)))


def wrong_clusters(path: Path) -> None:
    patched(path, (20, b"\0\0\0\x40"))


def loop(path: Path) -> None:
    create(path, CreateOptions(size_bytes=MIB, backing="x", backing_format="qcow2"), open_backing=False)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def backing_elsewhere(path: Path) -> None:
    create(path, CreateOptions(size_bytes=MIB, backing="/etc/passwd", backing_format="raw"), open_backing=False)


def backing_missing(path: Path) -> None:
    create(path, CreateOptions(size_bytes=MIB, backing="nothing", backing_format="raw"), open_backing=False)


def dangling_link(path: Path) -> None:
    path.symlink_to("nothing")


ALL = set(COMMANDS)
OPENED = ALL - {"info"}
TABLE: list[tuple[Build, set[str], str]] = [
    (missing, ALL, "x: open at offset 0: No such file or directory"),
    (directory, ALL, "x: is a directory; an image is a regular file or a block device"),
    (random_bytes, {"info", "serve"}, "x: not a qcow2 image: the magic string is missing"),
    (random_bytes, {"map", "dd"}, "x: not a qcow2 image (at offset 0: no magic string); if it is raw, add -f raw"),
    (no_bytes, {"info", "serve"}, "x: not a qcow2 image: the magic string is missing"),
    (short_header, ALL, "x: header: the file ends after 38 bytes, a header has at least 72"),
    (version_1, ALL, "x: unsupported: qcow2 version 1"),
    (huge_l1, ALL, "x: header: l1_size: is 2147483647, the L1 table must not exceed 33554432 bytes"),
    (l1_elsewhere, OPENED, "x: header: L1 table: is at 0x10000000000, past the end of the file"),
    (unknown_bit, OPENED, "x: unsupported: incompatible feature bit 62"),
    (wrong_clusters, ALL, "x: header: cluster_bits: is 64, must be 9 to 21"),
    (loop, OPENED, "x: refused: the backing files form a loop"),
    (fifo, ALL, "x: is a FIFO; an image is a regular file or a block device"),
    (backing_elsewhere, OPENED, "/etc/passwd: refused: the backing file of x lies outside of"),
    (backing_missing, OPENED, "nothing: open at offset 0: No such file or directory"),
    (dangling_link, ALL, "x: open at offset 0: No such file or directory"),
]


def failed_in_one_line(done: subprocess.CompletedProcess[str], start: str) -> None:
    assert done.returncode == 1
    # As qemu-img does, create says first what it begins.
    assert re.fullmatch(r"(Formatting '.*\n)?", done.stdout)
    assert done.stderr.startswith(f"cowfence: {start}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")


@pytest.mark.parametrize(
    ("build", "command", "line"),
    [
        pytest.param(build, command, line, id=f"{build.__name__}-{command}")
        for build, commands, line in TABLE
        for command in sorted(commands)
    ],
)
def test_bad_images(tmp_path: Path, build: Build, command: str, line: str) -> None:
    build(tmp_path / "x")
    before = snapshot_of(tmp_path)
    failed_in_one_line(cowfence(*COMMANDS[command], cwd=tmp_path, check=False), line)
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["info", "--image-opts", "x"], "Could not open 'x': Cannot find device='x'"),
        (["info", "--object", "secret,id=a", "x"], "--object secret: either 'file' or 'env' must be given"),
        (["map", "-s", "-1", "x"], "Invalid start offset specified."),
        (["create", "x"], "x: Image creation needs a size parameter"),
        (["create", "x", "1X"], "Invalid image size specified. You may use"),
        (["create", "x", "8E"], "Invalid image size specified. Must be between"),
        (["create", "-o", "size=1M", "x", "1M"], "x: The image size must be specified only once"),
        (["create", "-o", "foo=1", "x", "1M"], "x: Invalid parameter 'foo'"),
        (["create", "-o", "cluster_size=3000", "x", "1M"], "x: Cluster size must be a power of two between 512 and 2048k"),
        (["create", "-o", "refcount_bits=x", "x", "1M"], "x: Parameter 'refcount_bits' expects a number"),
        (["create", "-o", "encryption=on", "x", "1M"], "x: unsupported: creating images with AES encryption"),
        (["create", "-o", "encrypt.format=luks", "x", "1M"], "x: Parameter 'encrypt.key-secret' is required for cipher"),
        (["create", "-o", "encrypt.format=luks,encrypt.key-secret=s", "x", "1M"], "No secret with id 's'"),
        (["create", "-o", "encrypt.format=aes", "x", "1M"], "x: unsupported: creating images with encrypt.format=aes"),
        (["create", "-o", "encrypt.cipher-alg=aes-256", "x", "1M"], "x: Parameter 'encrypt.format' is missing"),
        (["create", "-o", "data_file_raw=on", "x", "1M"], "x: data_file_raw needs data_file"),
        (
            ["create", "-o", "data_file=nbd://h/x", "x", "1M"],
            "nbd://h/x: refused: the external data file's name has a protocol",
        ),
        (
            ["create", "-o", "extended_l2=on,cluster_size=4k", "x", "1M"],
            "x: Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        (
            ["create", "-o", "extended_l2=on,compat=0.10", "x", "1M"],
            "x: a table of extended L2 entries needs compatibility level 1.1",
        ),
        (["create", "-b", "y", "x", "1M"], "x: Backing file specified without backing format"),
        (["create", "-b", "json:{}", "-F", "raw", "x", "1M"], "json:{}: refused: the backing file's name has a protocol"),
        pytest.param(["info", "json:" + "[" * 100_000], "Could not parse the JSON options: too deep", id="deep"),
        (["create", "-u", "-b", "nbd:a", "-F", "raw", "x", "1M"], "nbd:a: refused: the backing file's name has a protocol"),
        (["create", "-b", "y", "-F", "raw", "x", "1M"], "y: open at offset 0: No such file"),
        (["create", "-f", "raw", "-o", "cluster_size=4k", "x", "1M"], "x: Invalid parameter 'cluster_size'"),
        (["create", "nowhere/x", "1M"], "nowhere/x: create at offset 0: No such file or directory"),
        (["create", ".", "1M"], ".: is a directory"),
        (["dd", "if=x"], "Must specify both input and output files"),
        (["dd", "if=x", "of=y", "foo=1"], "unrecognized operand foo"),
        (["dd", "-f", "raw", "if=old", "of=y", "bs=0"], "Invalid bs specified. Must be between 1 and 2147483647."),
        (["dd", "-f", "raw", "if=old", "of=y", "skip=100"], "old: cannot skip 51200 bytes, the disk has 3"),
        (["serve", "--bind", "0.0.0.0", "x"], "0.0.0.0 can be reached from other hosts"),
        (["serve", "--force-share", "x"], "--force-share needs --read-only"),
        (["serve", "--socket", "s", "--port", "1", "x"], "a socket excludes an address and a port"),
        (["serve", "--port", "65536", "x"], "argument -p/--port: '65536' is not a port"),
        (["serve", "-f", "raw", "--cache", "unsafe", "old"], "for qcow2 images"),
    ],
)
def test_bad_words(tmp_path: Path, words: list[str], line: str) -> None:
    (tmp_path / "old").write_bytes(b"old")
    done = cowfence(*words, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"(Formatting .*\n)?", done.stdout)
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_an_image_that_is_open_elsewhere(tmp_path: Path, command: str) -> None:
    with library.create(tmp_path / "x", MIB):
        failed_in_one_line(cowfence(*COMMANDS[command], cwd=tmp_path, check=False), "x: is in use by another process")
        if command != "serve":
            cowfence(*COMMANDS[command], "-U", cwd=tmp_path)
        done = cowfence("create", "x", "2M", cwd=tmp_path, check=False)
        failed_in_one_line(done, f"{tmp_path}/x: is in use by another process")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_an_image_that_may_not_be_read(tmp_path: Path, command: str) -> None:
    create(tmp_path / "x", CreateOptions(size_bytes=MIB))
    (tmp_path / "x").chmod(0)
    before: list[str] = []
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root reads everything, and there is no setpriv")
        rights = "-dac_override,-dac_read_search"
        before = [setpriv, "--bounding-set", rights, "--inh-caps", rights]
    done = cowfence(*COMMANDS[command], cwd=tmp_path, before=before, check=False)
    failed_in_one_line(done, "x: open at offset 0: Permission denied")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=False).returncode:
        pytest.skip("only root mounts file systems")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_a_full_disk(tmp_path: Path, small_disk: Path, target: str) -> None:
    (tmp_path / "x").write_bytes(b"x" * 2 * MIB)
    (small_disk / "old").write_bytes(b"old")
    for words in (
        ("dd", "-f", "raw", "-O", target, "if=x", "of=small/old", "bs=1M"),
        ("create", "-f", target, "-o", "preallocation=full", "small/old", "2M"),
    ):
        done = cowfence(*words, cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert done.stderr.count("\n") == 1
        assert [(path.name, path.read_bytes()) for path in small_disk.iterdir()] == [("old", b"old")]


def test_names_that_steer_a_terminal_stay_one_line(tmp_path: Path) -> None:
    name = "a\n\x1b[2Jb"
    create(tmp_path / "x", CreateOptions(size_bytes=MIB, backing=name, backing_format="raw"), open_backing=False)
    shown = cowfence("info", "x", cwd=tmp_path).stdout
    assert "\x1b" not in shown
    assert shown.count("\n") == 14
    for command in sorted(OPENED):
        done = cowfence(*COMMANDS[command], cwd=tmp_path, check=False)
        assert done.stderr.count("\n") == 1
        assert "\x1b" not in done.stderr
