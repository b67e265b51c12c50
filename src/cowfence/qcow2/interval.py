"""The commit interval: an idle guest's writes do not wait for ever."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from cowfence.errors import CowfenceError


class Committing(Protocol):
    """A disk that can commit what is pending."""

    def commit(self) -> None: ...


class IntervalCommit:
    """Commits what an idle guest left pending, a while after the first change. One thread, started when it is first needed."""

    def __init__(self, disk: Committing, seconds: float) -> None:
        self._disk = weakref.ref(disk, lambda _: self._let_go())
        self._seconds = seconds
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        """Held while the thread is started or stopped."""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Something is pending: commit it at the end of the interval."""
        if self._thread is None:
            with self._guard:
                if self._thread is None and not self._stopped.is_set():
                    thread = threading.Thread(target=self._loop, name="cowfence-commit-interval", daemon=True)
                    thread.start()
                    self._thread = thread
        if not self._wake.is_set():
            self._wake.set()

    def _let_go(self) -> None:
        """The disk is gone without being closed: the thread ends. Called by the collector, so it takes no lock."""
        self._stopped.set()
        self._wake.set()

    def stop(self) -> None:
        with self._guard:
            self._stopped.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait()
            if self._stopped.wait(self._seconds):
                return
            self._wake.clear()
            disk = self._disk()
            if disk is None:
                return
            try:
                disk.commit()
            except CowfenceError:
                # The guest learns of it at its next flush; what is pending stays pending.
                self._wake.set()
            del disk
