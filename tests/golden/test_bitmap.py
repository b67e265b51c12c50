"""``bitmap`` beside qemu-img's, option by option."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.beside import Programs, same
from judges import run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "a", "8M"])
    run(["qemu-img", "bitmap", "--add", folder / "a", "b"])
    run(["qemu-io", "-c", "write 1M 200k", folder / "a"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "other", "8M"])
    run(["qemu-img", "bitmap", "--add", folder / "other", "c"])
    run(["qemu-io", "-c", "write 3M 64k", folder / "other"])
    (folder / "raw").write_bytes(bytes(1 << 20))
    return folder


SCRIPTS = """
bitmap --add a new
bitmap --remove a b
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))
