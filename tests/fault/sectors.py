"""The fault injector for images: what a failed write leaves is cut between sectors."""

from __future__ import annotations

from collections.abc import Sequence

from cowfence.storage.base import Buffer
from cowfence.storage.fault import FaultyStorage, Kind
from cowfence.units import SECTOR_BYTES


class SectorFaults(FaultyStorage):
    """Half of a write ends at the end of a sector: a sector never tears (crash contract, models)."""

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        def write_half() -> None:
            data = b"".join(buffers)
            middle = (offset + len(data) // 2) // SECTOR_BYTES * SECTOR_BYTES
            if middle > offset:
                self.inner.writev(offset, (data[: middle - offset],), mark)

        self._call(Kind.WRITE, offset, mark, lambda: self.inner.writev(offset, buffers, mark), write_half)
