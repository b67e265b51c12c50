"""Command lines run on copies of one folder of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from golden import more_disks
from golden.disks import make


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of each sort (``disks``); nobody changes them."""
    return make(tmp_path_factory.mktemp("images"))


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(images, tmp_path / "folder"))


@pytest.fixture(scope="session")
def more_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those, and more (``more_disks``); nobody changes them."""
    return more_disks.make(images, tmp_path_factory.mktemp("more") / "images")
