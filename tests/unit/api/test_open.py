"""Opening and creating through the public API: chains, the policy of references, formats, locks, and what a failure leaves."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowfence
from cowfence import chain
from cowfence.disk.opener import Refs
from cowfence.errors import (
    CowfenceError,
    Invalid,
    Locked,
    NotThisFormat,
    ReadOnly,
    Refused,
    StorageFailed,
    Unsupported,
)
from cowfence.ops.create import CreateOptions
from cowfence.ops.create import create as make
from cowfence.qcow2.create import NewImage, write_new
from cowfence.qcow2.describe import probe
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.units import KIB, MIB

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    gc.collect()  # what earlier tests left behind must not go away in between
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """``top`` over ``base``: base begins with b's, top has t's behind them."""
    with cowfence.create(tmp_path / "base", MIB) as base:
        base.write(0, b"b" * 64 * KIB)
    with cowfence.create(tmp_path / "top", backing="base", backing_format="qcow2") as top:
        assert top.size == MIB
        top.write(64 * KIB, b"t" * 64 * KIB)
    return tmp_path


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, cowfence; print(sorted(n for n in sys.modules if n.startswith('cowfence.') or n == 'numpy'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    assert {name for name in cowfence.__all__ if not hasattr(cowfence, name)} == set()
    assert set(cowfence.__all__) <= set(dir(cowfence))
    with pytest.raises(AttributeError):
        _ = cowfence.nothing  # type: ignore[attr-defined]


def test_a_new_image_is_open_for_writing(tmp_path: Path) -> None:
    with cowfence.create(tmp_path / "a", 3 * MIB, cluster_size=4096, refcount_bits=1) as disk:
        assert (disk.size, disk.writable, disk.block_bytes) == (3 * MIB, True, 4096)
        disk.write(1, b"x")
    with cowfence.open(tmp_path / "a") as disk:
        assert disk.read(0, 3) == b"\0x\0"
        assert not disk.writable
        with pytest.raises(ReadOnly):
            disk.write(0, b"y")


def test_a_chain_reads_as_one_disk(pair: Path) -> None:
    with cowfence.open(pair / "top") as disk:
        assert disk.read(64 * KIB - 1, 2) == b"bt"
        assert [extent.depth for extent in disk.extents(0, 128 * KIB)] == [1, 0]


def test_info_and_file_view_of_an_open_disk(pair: Path) -> None:
    with cowfence.open(pair / "top") as disk:
        found = disk.info()
        assert (found.format, found.virtual_bytes, found.backing_filename) == ("qcow2", MIB, "base")
        assert found.full_backing_filename == str(pair / "base")
        assert found.actual_bytes == (pair / "top").stat().st_blocks * 512
        with disk.as_file() as view:
            view.seek(64 * KIB)
            assert view.read(3) == b"ttt"


def test_backing_files_are_locked_as_readers(pair: Path) -> None:
    with cowfence.open(pair / "top", writable=True):
        with pytest.raises(Locked, match="base"):
            cowfence.open(pair / "base", writable=True)
        with cowfence.open(pair / "base") as below:
            assert below.read(0, 1) == b"b"
    with cowfence.open(pair / "base", writable=True):
        with pytest.raises(Locked, match="base"):
            cowfence.open(pair / "top")
        with cowfence.open(pair / "top", force_share=True) as disk:
            assert disk.read(0, 1) == b"b"
        with cowfence.open(pair / "top", lock=False) as disk:
            assert disk.read(0, 1) == b"b"


def test_the_recorded_format_is_obeyed(pair: Path) -> None:
    with cowfence.create(pair / "over-raw", backing="base", backing_format="raw") as disk:
        assert disk.read(0, 4) == b"QFI\xfb"
        assert disk.size == (pair / "base").stat().st_size
    (pair / "plain").write_bytes(b"p" * 4096)
    with pytest.raises(NotThisFormat, match="plain"):
        cowfence.create(pair / "wrong", backing="plain", backing_format="qcow2")
    assert not (pair / "wrong").exists()


@pytest.mark.parametrize("recorded", [None, "vmdk"])
def test_no_format_or_another_one_is_refused(pair: Path, recorded: str | None) -> None:
    (pair / "odd").touch()
    storage = FileStorage.open(pair / "odd", writable=True)
    write_new(storage, NewImage(MIB, backing_name="base", backing_format=recorded))
    storage.close()
    with pytest.raises(Unsupported if recorded else Refused, match=r"odd|vmdk"):
        cowfence.open(pair / "odd")
    if recorded is None:
        with cowfence.open(pair / "odd", assume_backing_format="qcow2") as disk:
            assert disk.read(0, 1) == b"b"


def test_without_backing_files_nothing_else_is_opened(pair: Path) -> None:
    (pair / "base").unlink()
    with chain.open_chain(pair / "top", backing=False) as disk:
        assert disk.read(0, 1) == b"\0"
        assert disk.read(64 * KIB, 1) == b"t"
    with pytest.raises(StorageFailed, match=r"base.*No such file"):
        cowfence.open(pair / "top")


def test_the_policy_decides(pair: Path) -> None:
    (pair / "sub").mkdir()
    make(pair / "sub/top", CreateOptions(backing="../base", backing_format="qcow2"))
    with pytest.raises(Refused, match="--ref-root"):
        cowfence.open(pair / "sub/top")
    with cowfence.open(pair / "sub/top", refs=Refs.under(pair)) as disk:
        assert disk.read(0, 1) == b"b"
    with pytest.raises(Refused):
        cowfence.open(pair / "top", refs=Refs.none())
    with pytest.raises(Refused):
        cowfence.create(pair / "sub/new", backing="../base", backing_format="qcow2")
    assert not (pair / "sub/new").exists()


def test_loops_are_refused(pair: Path) -> None:
    make(pair / "base", CreateOptions(size_bytes=MIB, backing="top", backing_format="qcow2"), open_backing=False)
    with pytest.raises(Refused, match="loop"):
        cowfence.open(pair / "top")
    with pytest.raises(Refused, match="loop"):
        cowfence.create(pair / "top", backing="top", backing_format="qcow2")


def test_chains_of_32_files_below_the_image_and_no_more(tmp_path: Path) -> None:
    make(tmp_path / "0", CreateOptions(size_bytes=MIB))
    for index in range(1, 34):
        options = CreateOptions(backing=str(index - 1), backing_format="qcow2")
        make(tmp_path / str(index), options)
    with cowfence.open(tmp_path / "32") as disk:
        assert disk.read(0, 1) == b"\0"
    with pytest.raises(Refused, match="deeper than 32"):
        cowfence.open(tmp_path / "33")


def test_a_file_that_is_not_what_it_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"r" * 1000)
    with pytest.raises(NotThisFormat, match="raw"):
        cowfence.open(tmp_path / "raw", writable=True)
    with cowfence.open(tmp_path / "raw", format="raw", writable=True) as disk:
        disk.write(999, b"x")
        assert disk.as_file().read() == b"r" * 999 + b"x"
    with pytest.raises(Unsupported, match="vmdk"):
        cowfence.open(tmp_path / "raw", format="vmdk")
    with pytest.raises(Invalid):
        cowfence.open(tmp_path / "raw", format="raw", mode="unsafe")


def test_probing_never_says_raw() -> None:
    assert probe(MemoryStorage(b"QFI\xfb")) == "qcow2"
    assert probe(MemoryStorage(b"QFI")) == "unknown"
    assert probe(MemoryStorage(b"")) == "unknown"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (CreateOptions(size_bytes=MIB, cluster_bytes=3000), Invalid),
        (CreateOptions(size_bytes=MIB, version=2, refcount_bits=8), Invalid),
        (CreateOptions(size_bytes=-1), Invalid),
        (CreateOptions(size_bytes=1 << 63), Invalid),
        (CreateOptions(size_bytes=1 << 62, cluster_bytes=512), Invalid),
        (CreateOptions(), Invalid),
        (CreateOptions(size_bytes=MIB, preallocation="some"), Invalid),
        (CreateOptions(size_bytes=MIB, compression_type="lzo"), Invalid),
        (CreateOptions(size_bytes=MIB, backing="b"), Invalid),
        (CreateOptions(size_bytes=MIB, backing_format="raw"), Invalid),
        (CreateOptions(size_bytes=MIB, backing="b", backing_format="vmdk"), Unsupported),
        (CreateOptions(size_bytes=MIB, backing="nbd:b", backing_format="raw"), Refused),
        (CreateOptions(size_bytes=MIB, backing="json:{}", backing_format="raw"), Refused),
        (CreateOptions(size_bytes=MIB, backing="missing", backing_format="raw"), StorageFailed),
        (CreateOptions(size_bytes=MIB, backing="b", backing_format="raw", preallocation="full"), Invalid),
        (CreateOptions(size_bytes=MIB, format="raw", backing="b", backing_format="raw"), Invalid),
        (CreateOptions(size_bytes=MIB, format="raw", preallocation="metadata"), Invalid),
        (CreateOptions(size_bytes=MIB, format="vmdk"), Unsupported),
    ],
)
def test_options_that_make_no_image(tmp_path: Path, options: CreateOptions, error: type[CowfenceError]) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(error):
        make(tmp_path / "old", options)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"old")]


@pytest.mark.parametrize("format_name", ["qcow2", "raw"])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_preallocation(tmp_path: Path, format_name: str, preallocation: str) -> None:
    if (format_name, preallocation) == ("raw", "metadata"):
        pytest.skip("a raw image has no metadata")
    made = make(tmp_path / "a", CreateOptions(format_name, 4 * MIB - 1, preallocation=preallocation))
    assert made.size_bytes == 4 * MIB
    allocated = (tmp_path / "a").stat().st_blocks * 512
    assert (allocated >= 4 * MIB) == (preallocation in ("falloc", "full"))
    with cowfence.open(tmp_path / "a", format=format_name) as disk:
        assert disk.size == 4 * MIB
        assert not any(disk.read(0, 4 * MIB))
        if format_name == "qcow2":
            assert all(extent.present for extent in disk.extents(0, 4 * MIB)) == (preallocation != "off")


def test_an_image_in_use_is_not_replaced(pair: Path) -> None:
    with cowfence.open(pair / "base"), pytest.raises(Locked):
        cowfence.create(pair / "base", MIB)
