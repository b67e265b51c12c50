"""Which host clusters hold live metadata: the overlap check that stands before every write.

A write of guest data must touch no cluster listed here; a write of a table must touch only clusters listed under its own
kind. A damaged refcount or a hostile image then ends in ``Corrupt`` before a byte is written, instead of in a destroyed table
(crash contract, C5; design, "Metadata writes pass an overlap check").
"""

from __future__ import annotations

from cowfence.errors import Corrupt
from cowfence.qcow2.tables import Kind


class Layout:
    """Host clusters of metadata, by cluster number."""

    def __init__(self, name: str, cluster_bits: int) -> None:
        self._name = name
        self._bits = cluster_bits
        self.kinds: dict[int, Kind] = {}
        """Hot paths read this directly."""

    def claim(self, offset: int, clusters: int, kind: Kind) -> None:
        """List ``clusters`` clusters from ``offset`` as ``kind``. Raises Corrupt where another structure stands already."""
        first = offset >> self._bits
        kinds = self.kinds
        for cluster in range(first, first + clusters):
            holder = kinds.setdefault(cluster, kind)
            if holder is not kind or (kind is Kind.L2 and clusters > 1):
                raise self._overlap(cluster, kind, holder)

    def claim_new(self, offset: int, clusters: int, kind: Kind) -> None:
        """Like ``claim`` for a structure that shares no cluster with any other, not even one of its own kind."""
        first = offset >> self._bits
        for cluster in range(first, first + clusters):
            holder = self.kinds.get(cluster)
            if holder is not None:
                raise self._overlap(cluster, kind, holder)
        for cluster in range(first, first + clusters):
            self.kinds[cluster] = kind

    def drop(self, cluster: int) -> None:
        """The cluster holds live metadata no more."""
        self.kinds.pop(cluster, None)

    def check_data(self, first: int, count: int) -> None:
        """Raise Corrupt if guest data written to these clusters would land on metadata."""
        kinds = self.kinds
        for cluster in range(first, first + count):
            if cluster in kinds:
                raise self._overlap(cluster, None, kinds[cluster])

    def check_table(self, offset: int, length_bytes: int, kind: Kind) -> None:
        """Raise Corrupt if a write of ``kind`` would land on anything else."""
        first, last = offset >> self._bits, offset + length_bytes - 1 >> self._bits
        if first == last and self.kinds.get(first) is kind:
            return
        for cluster in range(first, last + 1):
            holder = self.kinds.get(cluster)
            if holder is not kind:
                raise self._overlap(cluster, kind, holder)

    def _overlap(self, cluster: int, writer: Kind | None, holder: Kind | None) -> Corrupt:
        what = writer.value if writer else "guest data"
        on = f"the {holder.value}" if holder else "a cluster that holds no metadata"
        return Corrupt(f"{self._name}: cluster {cluster} at offset {cluster << self._bits}", f"{what} would overwrite {on}")
