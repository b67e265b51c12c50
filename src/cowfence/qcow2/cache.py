"""A bounded cache of tables.

Only tables that equal what is on disk may leave; one that does not is *pinned* until its transaction is committed. So the
cache never writes anything: when everything in it is pinned, the caller commits first (``room_for`` answers False), or, for a
read, does without the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from cowfence.qcow2.tables import RefcountBlock, Table

T = TypeVar("T", Table, RefcountBlock)


class TableCache(Generic[T]):
    """Tables by their index in the table above. ``limit`` is a number of tables."""

    def __init__(self, limit: int) -> None:
        self.limit = max(1, limit)
        self.tables: dict[int, T] = {}
        """Hot paths read this directly."""
        self.loads = 0
        """How many tables were put into it: what it did not have."""

    def get(self, index: int) -> T | None:
        table = self.tables.get(index)
        if table is not None:
            table.used = True
        return table

    def room_for(self, count: int) -> bool:
        """Make room for ``count`` more tables by dropping clean ones; False if pinned tables stand in the way.

        A table that was used since the last sweep gets a second chance.
        """
        excess = len(self.tables) + count - self.limit
        if excess <= 0:
            return True
        for spare_used in (True, False):
            for index in list(self.tables):
                table = self.tables[index]
                if table.pinned:
                    continue
                if spare_used and table.used:
                    table.used = False
                    continue
                del self.tables[index]
                excess -= 1
                if not excess:
                    return True
        return False

    def put(self, table: T) -> None:
        self.loads += 1
        self.tables[table.index] = table

    def forget(self, index: int) -> None:
        self.tables.pop(index, None)

    def __iter__(self) -> Iterator[T]:
        return iter(self.tables.values())
