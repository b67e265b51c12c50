"""The house rules that a machine can check."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_LINES = 600

LIGHT_MODULES = [
    "cowfence",
    "cowfence.errors",
    "cowfence.extents",
    "cowfence.units",
    "cowfence.storage.base",
    "cowfence.disk.base",
    "cowfence.disk.fileview",
    "cowfence.disk.opener",
    "cowfence.codec.deflate",
    "cowfence.codec.zstd",
    "cowfence.qcow2.entries",
    "cowfence.qcow2.header",
    "cowfence.qcow2.snapshot_table",
    "cowfence.ops.info",
    "cowfence.cli.main",
    "cowfence.cli.info",
]
"""What ``cowfence info`` is made of, and what is as small. Those that do not exist yet are left out."""


def looks_like_a_path(text: str) -> bool:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", text):
        return False
    if text.endswith((".py", ".md", ".toml", ".sh", "/")):
        return True
    first = text.split("/", 1)[0]
    return "/" in text and any((base / first).is_dir() for base in (ROOT, ROOT / "src", ROOT / "src/cowfence"))


def test_paths_in_the_architecture_exist() -> None:
    document = ROOT / "ARCHITECTURE.md"
    if not document.exists():
        pytest.skip("there is no ARCHITECTURE.md yet")
    named = {text for text in re.findall(r"`([^`\n]+)`", document.read_text()) if looks_like_a_path(text)}
    bases = (ROOT, ROOT / "src", ROOT / "src/cowfence")
    assert not sorted(text for text in named if not any((base / text).exists() for base in bases))


def test_no_source_file_is_too_long_to_be_read_in_one_go() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    files = [
        path
        for top in ("src", "tests", "bench", "demo", "guest", "scripts")
        for path in (ROOT / top).rglob("*")
        if path.is_file()
    ]
    files = [path for path in files + list(ROOT.glob("*.md")) if path.suffix in (".py", ".sh", ".md")]
    assert not [str(path.relative_to(ROOT)) for path in files if marks.search(path.read_text())]


def test_every_source_file_says_what_it_is() -> None:
    starts = {str(path.relative_to(ROOT)): path.read_text().lstrip()[:3] for path in SOURCES}
    assert not [name for name, start in starts.items() if start != '"""']


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_do_not_import_heavy_ones(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module} yet")
    program = f"import {module}, sys; print([name for name in ('numpy', 'rich', 'asyncio', 'ctypes') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
