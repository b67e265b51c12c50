"""Our command lines run in one process for all tests of a worker."""

from __future__ import annotations

import signal

import pytest

from helpers_cli import shared_programs
from helpers_programs import Programs

# A job in the background ignores Ctrl-C, and so would the tests of it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def programs() -> Programs:
    return shared_programs()
