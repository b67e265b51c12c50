"""The exports of a running server, which come and go: by name for the server, and open as long as anybody uses them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from cowfence.errors import CowfenceError, Invalid
from cowfence.nbd.export import Export

_log = logging.getLogger(__name__)


_PATIENCE_SECONDS: Final = 3.0


def left_alone(export: Export) -> bool:
    """Whether the export has no clients; one that has just said goodbye may still be on its way out."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while export.stats.clients and time.monotonic() < end:
        time.sleep(0.02)
    return not export.stats.clients


class Served(Protocol):
    """Something that is exported until it is closed."""

    @property
    def export(self) -> Export: ...

    def close(self) -> None: ...


class Registry(Mapping[str, Export]):
    """What the server reads. Entries are added and taken away by any thread; what is taken away is closed once its last client
    has left."""

    def __init__(self) -> None:
        self._guard = threading.Condition()
        self._served: dict[str, Served] = {}
        self._leaving: list[Served] = []
        self._closing: list[Served] = []
        """Out of ``_leaving``, each by one thread."""

    def __getitem__(self, name: str) -> Export:
        return self._served[name].export

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._served))

    def __len__(self) -> int:
        return len(self._served)

    def served(self, name: str) -> Served:
        """Raises Invalid where there is no such export."""
        found = self._served.get(name)
        if found is None:
            raise Invalid(f"there is no export {name!a}")
        return found

    def add(self, name: str, served: Served) -> None:
        """Raises Invalid where the name is taken."""
        with self._guard:
            if name in self._served:
                raise Invalid(f"there is an export {name!a} already")
            # A new dictionary: whoever iterates goes on with the old one.
            self._served = {**self._served, name: served}

    def remove(self, name: str) -> Served:
        """No new client finds it. Raises Invalid where there is none. To be called in the server's thread, or by
        ``Server.call``, so that no client is on its way in."""
        with self._guard:
            found = self.served(name)
            self._served = {key: value for key, value in self._served.items() if key != name}
            self._leaving.append(found)
        self.unused(found.export)
        return found

    def unused(self, export: Export) -> None:
        """An export has no clients: where it was taken away, it is closed, in a thread of its own."""
        with self._guard:
            gone = [served for served in self._leaving if served.export is export and not export.stats.clients]
            self._leaving = [served for served in self._leaving if served not in gone]
            self._closing += gone
        for served in gone:
            threading.Thread(target=self._close, args=(served,), name="nbd-closing").start()

    def _close(self, served: Served) -> None:
        try:
            served.close()
        except CowfenceError as error:
            _log.error("closing an export: %s", error)
        finally:
            with self._guard:
                self._closing.remove(served)
                self._guard.notify_all()

    def wait_until_closed(self, served: Served) -> None:
        """Until somebody else has closed it."""
        with self._guard:
            self._guard.wait_for(lambda: served not in self._leaving and served not in self._closing)

    def close(self) -> None:
        """Close everything; the server has ended. Raises the first of what that raises, after all were closed."""
        with self._guard:
            self._guard.wait_for(lambda: not self._closing)
            everything = [*self._served.values(), *self._leaving]
            self._served, self._leaving = {}, []
        failed: CowfenceError | None = None
        for served in reversed(everything):
            try:
                served.close()
            except CowfenceError as error:
                failed = failed or error
        if failed is not None:
            raise failed
