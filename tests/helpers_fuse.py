"""Whether this machine lets us mount. Where it does not the test is skipped, in CI too: that is not for the project to say."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from cowfence.crash.fuse import FuseRecorder, NoFuse


def require_fuse() -> None:
    reason = _reason()
    if reason is not None:
        pytest.skip(reason)


@functools.cache
def _reason() -> str | None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "mount").mkdir()
        (Path(name) / "file").touch()
        try:
            with FuseRecorder(Path(name) / "mount", {"file": Path(name) / "file"}):
                return None
        except NoFuse as error:
            return str(error)
