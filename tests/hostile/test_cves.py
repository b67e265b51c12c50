"""Each known attack on programs that open disk images, tried on ours: the CVE numbers are those of other programs' defects.

What is common to all: a file that is opened is one that the caller named or a policy allowed (counted by an audit hook in a
process of its own), the end is a result or one of our errors, and memory follows the bytes that are there.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import cowfence
from cowfence.chain import open_chain
from cowfence.disk.opener import Refs
from cowfence.errors import Corrupt, CowfenceError, NotThisFormat, OutOfRange, Refused, StorageFailed, Unsupported
from cowfence.ops.create import CreateOptions, create
from cowfence.ops.dd import dd
from cowfence.ops.info import info
from cowfence.ops.map import map_disk
from cowfence.qcow2.extensions import Extension, ExtensionType, Incompatible
from cowfence.qcow2.header import encode, parse_header
from cowfence.units import KIB, MIB
from helpers_cli import ENVIRONMENT, snapshot_of
from helpers_cli import cowfence as command

_MAX_RSS_KIB = 160 * KIB
"""Python and numpy take 45 MiB; an L1 table of 32 MiB that a sparse file really has may be held, and read, at once."""

_WATCHED = """
import sys
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and not arguments[0].endswith((".py", ".pyc")):
        opened.append(arguments[0])
from cowfence.cli import main, info
sys.addaudithook(hook)
code = main.entry(sys.argv[1:])
files = [name for name in opened if not name.startswith("/proc")]
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, peak, *files, sep="\\n", file=sys.stderr)
"""


def watched(directory: Path, *words: str) -> tuple[int, int, list[str]]:
    """Run the command line; its exit code, its peak of memory in KiB, and the files that it opened."""
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, *words], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    lines = done.stderr.splitlines()
    if lines and lines[0].startswith("cowfence:"):
        lines.pop(0)
    assert "Traceback" not in done.stderr
    return int(lines[0]), int(lines[1]), lines[2:]


def image(path: Path, *patches: tuple[int, bytes], size_bytes: int = MIB) -> Path:
    """A new image with some bytes of its header changed."""
    create(path, CreateOptions(size_bytes=size_bytes))
    with path.open("r+b") as stream:
        for offset, data in patches:
            stream.seek(offset)
            stream.write(data)
    return path


def with_data_file(path: Path, name: str) -> Path:
    image(path)
    with path.open("r+b") as stream:
        header = parse_header(stream.read(65536), "x")
        extension = Extension(ExtensionType.DATA_FILE_NAME, name.encode())
        changed = replace(
            header, incompatible=int(Incompatible.DATA_FILE), extensions=(extension, *header.extensions), backing_offset=0
        )
        stream.seek(0)
        stream.write(encode(changed))
    return path


def backed_by(path: Path, name: str, format_name: str = "raw") -> Path:
    """An image over a name that ``create`` would refuse, or a format that it does not know."""
    image(path)
    with path.open("r+b") as stream:
        header = parse_header(stream.read(65536), "x")
        extension = Extension(ExtensionType.BACKING_FORMAT, format_name.encode())
        stream.seek(0)
        stream.write(encode(replace(header, backing_name=name.encode(), extensions=(extension, *header.extensions))))
    return path


def tried(path: Path, *, writable: bool = False) -> None:
    """Open, read, map and describe: a result or one of our errors, and no descriptor left."""
    before = len(os.listdir("/proc/self/fd"))
    for attempt in (lambda: info(path), lambda: _map(path), lambda: _read_all(path, writable=writable)):
        with suppress(CowfenceError):
            attempt()
    assert len(os.listdir("/proc/self/fd")) == before


def _map(path: Path) -> None:
    with open_chain(path) as disk:
        map_disk(disk, str(path))


def _read_all(path: Path, *, writable: bool) -> None:
    with cowfence.open(path, writable=writable, commit_interval=None) as disk:
        for at in range(0, min(disk.size, 2 * MIB), MIB):
            disk.read(at, min(MIB, disk.size - at))


def test_cve_2008_2004_a_raw_disk_stays_raw(tmp_path: Path) -> None:
    """A guest writes a qcow2 header with a backing file into its raw disk."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    disk_path = backed_by(tmp_path / "disk", "secret")
    with cowfence.open(disk_path, format="raw", writable=True) as disk:
        assert disk.read(0, 4) == b"QFI\xfb"
    create(tmp_path / "top", CreateOptions(backing="disk", backing_format="raw"))
    with cowfence.open(tmp_path / "top") as disk:
        assert disk.read(0, 4) == b"QFI\xfb"


@pytest.mark.parametrize("offset", [20, 24, 36, 40, 48, 56, 60, 64, 72, 76, 80, 84, 88, 92, 96, 100, 104])
@pytest.mark.parametrize("value", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1"])
def test_cve_2014_0142_to_0147_and_0222_fields_that_lie(tmp_path: Path, offset: int, value: bytes) -> None:
    """Division by zero, overflowing sizes, tables that are nowhere: every field of the header, at its ends."""
    tried(image(tmp_path / "x", (offset, value)), writable=True)


def test_cve_2014_0143_requests_that_overflow(tmp_path: Path) -> None:
    with cowfence.open(image(tmp_path / "x"), writable=True) as disk:
        for offset, length_bytes in (((1 << 64) - 512, 1024), (0, 1 << 64), (-1, 1), (MIB, 1), (0, -1)):
            with pytest.raises(OutOfRange):
                disk.read(offset, length_bytes)
            with pytest.raises(OutOfRange):
                disk.zero(offset, length_bytes)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (8, (1 << 60).to_bytes(8)),  # backing_file_offset
        (16, b"\x7f\xff\xff\xff"),  # backing_file_size
        (36, b"\x00\x40\x00\x01"),  # l1_size: 32 MiB and one entry
        (40, (1 << 55).to_bytes(8)),  # l1_table_offset
        (48, (1 << 55).to_bytes(8)),  # refcount_table_offset
        (56, b"\x7f\xff\xff\xff"),  # refcount_table_clusters
        (60, b"\x00\x01\x00\x01"),  # nb_snapshots: 65537
        (60, b"\0\0\0\1" + (1 << 55).to_bytes(8)),  # snapshots_offset
    ],
)
def test_cve_2014_0144_tables_beyond_the_limits(tmp_path: Path, offset: int, value: bytes) -> None:
    patches = [(offset, value)] if offset != 16 else [(8, (512).to_bytes(8)), (16, value)]
    path = image(tmp_path / "x", *patches)
    before = snapshot_of(tmp_path)
    with pytest.raises(Corrupt, match="x: "):
        cowfence.open(path, writable=True)
    assert snapshot_of(tmp_path) == before


def test_cve_2014_0145_to_0147_broken_bytes_anywhere(tmp_path: Path) -> None:
    """Error paths: tables and header with bytes changed at random (the same ones each time)."""
    chance = random.Random(20081114)
    path = tmp_path / "x"
    create(path, CreateOptions(size_bytes=MIB, cluster_bytes=512))
    with cowfence.open(path, writable=True) as disk:
        disk.write(0, b"x" * 100 * KIB)
    whole = path.read_bytes()
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            broken[chance.randrange(4, 112) if chance.random() < 0.5 else chance.randrange(len(broken))] = chance.randrange(256)
        path.write_bytes(broken[: chance.randrange(100, len(broken))] if chance.random() < 0.2 else broken)
        tried(path)


def test_cve_2014_0222_and_0223_version_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="version 1"):
        cowfence.open(image(tmp_path / "x", (4, b"\0\0\0\1")))


def test_cve_2015_1851_2022_47951_no_other_format_is_guessed(tmp_path: Path) -> None:
    """Uploaded data that looks like a descriptor of another format, naming a file of the host."""
    (tmp_path / "x").write_text('# Disk Descriptor File\nversion=1\ncreateType="monolithicFlat"\nRW 1 FLAT "/etc/passwd" 0\n')
    before = snapshot_of(tmp_path)
    with pytest.raises(NotThisFormat):
        open_chain(tmp_path / "x")
    assert command("dd", "if=x", "of=out", cwd=tmp_path, check=False).returncode == 1
    assert command("map", "x", cwd=tmp_path, check=False).returncode == 1
    assert "file format: unknown" in command("info", "x", cwd=tmp_path).stdout
    with pytest.raises(Unsupported):
        cowfence.open(backed_by(tmp_path / "y", "x", "vmdk"))
    (tmp_path / "y").unlink()
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret",
        "link",
        "sub/../../secret",
        "json:{}",
        'json:{"driver":"file","filename":"/etc/passwd"}',
        "nbd:localhost:1",
        "nbd+unix:///?socket=s",
        "file:secret",
        "fd:0",
        "/dev/null",
        "/proc/self/environ",
    ],
)
def test_cve_2015_5163_and_2024_4467_backing_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    directory = tmp_path / "images"
    (directory / "sub").mkdir(parents=True)
    (directory / "link").symlink_to("../secret")
    path = backed_by(directory / "x", name)
    with pytest.raises(Refused):
        cowfence.open(path)
    with pytest.raises(Refused):
        cowfence.open(path, writable=True, refs=cowfence.Refs.none())
    if ":" in name:
        with pytest.raises(Refused):
            cowfence.open(path, refs=cowfence.Refs.trust_all())
    code, _peak, files = watched(directory, "info", "x")
    assert (code, files) == (0, ["x"])
    for words in (("map", "x"), ("dd", "if=x", "of=out"), ("info", "--backing-chain", "x")):
        assert command(*words, cwd=directory, check=False).returncode == 1
    assert not (directory / "out").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "secret", "json:{}", 'json:{"driver":"nbd","host":"h"}'])
def test_cve_2024_32498_and_2024_4467_data_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    path = with_data_file(tmp_path / "x", name)
    before = snapshot_of(tmp_path)
    code, _peak, files = watched(tmp_path, "info", "--output", "json", "x")
    assert (code, files) == (0, ["x"])
    for writable in (False, True):
        # Beside the image is where a data file may be, unless the caller says that nothing may be opened.
        with pytest.raises(Refused, match="data file"):
            cowfence.open(path, writable=writable, refs=Refs.none() if name == "secret" else None)
    assert snapshot_of(tmp_path) == before


def _petabytes(path: Path) -> None:
    create(path, CreateOptions(size_bytes=1 << 50, cluster_bytes=2 * MIB))


def _claims_an_l1_of_32_mib(path: Path) -> None:
    image(path, (24, (1 << 50).to_bytes(8)), (36, (4 << 20).to_bytes(4)))


def _has_an_l1_of_32_mib(path: Path) -> None:
    """And all of it holes."""
    image(path, (24, (1 << 50).to_bytes(8)), (36, (4 << 20).to_bytes(4)), (40, (1 << 30).to_bytes(8)))
    os.truncate(path, (1 << 30) + 32 * MIB)


def _claims_65536_snapshots(path: Path) -> None:
    image(path, (60, (65536).to_bytes(4) + (1 << 20).to_bytes(8)))
    os.truncate(path, 1 << 34)


def _claims_snapshots_of_nothing_but_name(path: Path) -> None:
    entry = bytes(12) + b"\xff\xff\xff\xff" + bytes(24)
    image(path, (60, (65536).to_bytes(4) + (1 << 18).to_bytes(8)), (1 << 18, entry))
    os.truncate(path, 1 << 34)


@pytest.mark.parametrize(
    "build",
    [
        _petabytes,
        _claims_an_l1_of_32_mib,
        _has_an_l1_of_32_mib,
        _claims_65536_snapshots,
        _claims_snapshots_of_nothing_but_name,
    ],
)
@pytest.mark.parametrize("words", [("info", "x"), ("map", "x"), ("map", "--output=json", "x")])
def test_cve_2015_5162_and_2018_10908_small_files_that_claim_much(
    tmp_path: Path, build: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    build(tmp_path / "x")
    _code, peak_kib, files = watched(tmp_path, *words)
    assert set(files) == {"x"}
    assert peak_kib < _MAX_RSS_KIB


def test_cve_2022_0485_an_error_of_the_source_fails_the_copy(tmp_path: Path) -> None:
    create(tmp_path / "x", CreateOptions(size_bytes=4 * MIB))
    with cowfence.open(tmp_path / "x", writable=True) as disk:
        disk.write(0, b"x" * 3 * MIB)
    # The second L1 entry's table lies nowhere: what it maps cannot be read.
    with (tmp_path / "x").open("r+b") as stream:
        header = parse_header(stream.read(65536), "x")
        stream.seek(header.l1_offset)
        stream.write(((1 << 63) | (1 << 40)).to_bytes(8))
    before = snapshot_of(tmp_path)
    for target_format in ("raw", "qcow2"):
        with pytest.raises(CowfenceError), open_chain(tmp_path / "x") as disk:
            dd(disk, "x", tmp_path / "out", target_format=target_format)
        done = command("dd", "-O", target_format, "if=x", "of=out", cwd=tmp_path, check=False)
        assert done.returncode == 1
    assert snapshot_of(tmp_path) == before


def test_cve_2024_40767_and_44082_a_raw_upload_that_is_none(tmp_path: Path) -> None:
    """Said to be qcow2 and is raw, or the other way round: never taken for something else by itself."""
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with pytest.raises(NotThisFormat):
        cowfence.open(tmp_path / "raw")
    path = backed_by(tmp_path / "x", "raw")
    with cowfence.open(path, format="raw") as disk:
        assert disk.size == path.stat().st_size
    with pytest.raises(NotThisFormat):
        info(tmp_path / "raw", format="qcow2")


def test_cve_2026_24708_nothing_is_written_after_a_guess(tmp_path: Path) -> None:
    """No command that writes looks at the file to find out its format."""
    (tmp_path / "raw").write_bytes(b"guest" * 1000)
    before = snapshot_of(tmp_path)
    with pytest.raises(NotThisFormat):
        open_chain(tmp_path / "raw", writable=True)
    assert command("serve", "--port", "0", "raw", cwd=tmp_path, check=False).returncode == 1
    assert snapshot_of(tmp_path) == before


def test_the_error_of_a_missing_backing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="nothing"):
        cowfence.open(backed_by(tmp_path / "x", "nothing"))
