"""What the guest boots from: modules in an order that loads, and an archive that cpio programs read."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from guest.initramfs import build, entry
from guest.modules import WANTED, guest_modules, load_order, module_name, needs_of

NEEDS = {
    "virtio_pci": ["virtio_ring", "virtio"],
    "virtio_blk": ["virtio", "virtio_ring"],
    "virtio_ring": ["virtio"],
    "virtio": [],
    "ext4": ["jbd2", "mbcache"],
    "jbd2": [],
    "mbcache": [],
    "crc32c_generic": [],
}


def module(*needs: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


def test_names_and_needs() -> None:
    assert module_name("kernel/arch/x86/crypto/crc32c-intel.ko.xz") == "crc32c_intel"
    assert needs_of(module("virtio", "crc32c-intel")) == ["virtio", "crc32c_intel"]
    assert needs_of(module()) == []
    assert needs_of(b"no module") == []


def test_each_module_comes_after_what_it_needs() -> None:
    order = load_order(WANTED, NEEDS.__getitem__, frozenset())
    assert sorted(order) == sorted(NEEDS)
    assert all(order.index(needed) < order.index(name) for name in order for needed in NEEDS[name])


def test_what_is_built_in_is_not_loaded() -> None:
    built_in = frozenset({"ext4", "crc32c_generic", "virtio"})
    assert load_order(WANTED, NEEDS.__getitem__, built_in) == ["virtio_ring", "virtio_pci", "virtio_blk"]


def test_needs_that_go_in_a_circle_end() -> None:
    assert load_order(["a"], {"a": ["b"], "b": ["a"]}.__getitem__, frozenset()) == ["b", "a"]


def test_modules_are_found_in_a_package_and_unpacked(tmp_path: Path) -> None:
    for name, needs in NEEDS.items():
        (tmp_path / f"{name}.ko.xz").write_bytes(lzma.compress(module(*needs)))
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/crypto/crc32c_generic.ko\n")
    assert guest_modules(tmp_path) == [
        (name, module(*NEEDS[name])) for name in ("virtio", "virtio_ring", "virtio_pci", "virtio_blk")
    ]
    (tmp_path / "virtio.ko.xz").unlink()
    with pytest.raises(KeyError, match="virtio"):
        guest_modules(tmp_path)


def test_an_entry_is_padded_to_four_bytes() -> None:
    made = entry(7, "ab", 0o100644, b"12345")
    assert made.startswith(b"070701" + b"00000007")
    assert len(made) % 4 == 0
    assert made[110:113] == b"ab\0"
    assert made[116:124] == b"12345\0\0\0"


def test_the_archive_is_one_that_cpio_lists() -> None:
    archive = gzip.decompress(build(b"busybox", [("virtio", b"1"), ("ext4", b"22")]))
    assert archive.count(b"070701") == 11
    lister = shutil.which("cpio") or shutil.which("bsdtar")
    if lister is None:
        pytest.skip("neither cpio nor bsdtar is installed")
    words = ["-t"] if lister.endswith("cpio") else ["-tf", "-"]
    done = subprocess.run([lister, *words], input=archive, capture_output=True, check=True)
    assert {"init", "modules/00-virtio.ko", "modules/01-ext4.ko"} <= set(done.stdout.decode().split())
