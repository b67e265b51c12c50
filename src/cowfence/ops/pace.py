"""A limit to how much is written a second."""

from __future__ import annotations

import threading
import time


class Pace:
    """Lets ``rate_bytes`` a second pass (None, 0: all of it). Thread-safe."""

    def __init__(self, rate_bytes: int | None) -> None:
        self._rate_bytes = rate_bytes
        self._lock = threading.Lock()
        self._due = time.monotonic()
        """When the next bytes may be written."""

    def wait(self, length_bytes: int) -> None:
        """Wait until so many bytes more may be written."""
        if not self._rate_bytes:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._due)
            self._due = begin + length_bytes / self._rate_bytes
        time.sleep(begin - now)
