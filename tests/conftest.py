"""Our command lines run in one process for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from golden.beside import Programs


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    started = Programs()
    yield started
    started.close()
