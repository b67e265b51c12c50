"""Our command lines run in one process for all tests of a worker."""

from __future__ import annotations

import pytest

from helpers_cli import shared_programs
from helpers_programs import Programs


@pytest.fixture(scope="session")
def programs() -> Programs:
    return shared_programs()
