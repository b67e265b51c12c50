"""The thread of the commit interval: one, and not longer than its disk."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest

from cowfence.qcow2.image import Options, open_image
from cowfence.qcow2.interval import IntervalCommit
from cowfence.storage.memory import MemoryStorage
from crash.scenarios import image

WAIT_SECONDS = 10.0


class SlowToMake(threading.Thread):
    def __init__(self, **arguments: Any) -> None:
        time.sleep(0.05)
        super().__init__(**arguments)


class Nothing:
    """A disk with nothing to commit."""

    def commit(self) -> None: ...


def test_first_changes_at_once_start_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads with a first write each started the same thread twice, which failed one of the writes."""
    disk = Nothing()
    committing = IntervalCommit(disk, 0.01)
    starters = [threading.Thread(target=committing.start) for _ in range(8)]
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: errors.append(arguments.exc_value))
    monkeypatch.setattr(threading, "Thread", SlowToMake)
    before = threading.active_count()
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert not errors
    assert threading.active_count() == before + 1
    committing.stop()
    assert threading.active_count() == before


def test_thread_ends_with_a_disk_that_was_let_go() -> None:
    disk = open_image(MemoryStorage(image(), "image"), backing=None, writable=True, options=Options(commit_interval=1000))
    before = threading.active_count()
    disk.write(0, b"x")
    assert threading.active_count() == before + 1
    gone = weakref.ref(disk)
    del disk
    gc.collect()
    assert gone() is None
    end = time.monotonic() + WAIT_SECONDS
    while threading.active_count() > before:
        assert time.monotonic() < end, "the thread goes on"
        time.sleep(0.002)
