"""A small judge of structure (crash contract, C5), written apart from the engine and its checker.

It counts the references of an image of a few dozen clusters in plain Python, which for such images is faster than arrays are.
It shares no code with what it judges. Findings are texts; only fatal ones are given: a count below the references, a COPIED
flag on a cluster with more than one reference, an entry that leads past the end of the file or onto another table, reserved
bits.
"""

from __future__ import annotations

import struct

_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_OFFSET = 0x00FF_FFFF_FFFF_FE00


def fatal_findings(content: bytes) -> list[str]:
    """What is fatally wrong with the image in ``content``; empty for a sound image, leaks or not."""
    return _Judge(content).judge()


class _Judge:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.findings: list[str] = []
        self.references: dict[int, list[str]] = {}
        self.copied: dict[int, list[str]] = {}

    def judge(self) -> list[str]:
        content = self.content
        if len(content) < 72 or content[:4] != b"QFI\xfb":
            return ["the header is gone"]
        version, _, _, bits, _, _, l1_size, l1_offset, table, clusters, snapshots, snapshots_at = struct.unpack_from(
            ">IQIIQIIQQIIQ", content, 4
        )
        order = struct.unpack_from(">I", content, 96)[0] if version >= 3 else 4
        self.bits, self.order, self.version = bits, order, version
        self.end = -(-len(content) // (1 << bits))
        self.tables: dict[int, str] = {}
        self._table(0, 1, "header")
        self._table(table, clusters, "refcount table")
        self._table(l1_offset, -(-l1_size * 8 >> bits), "L1 table")
        blocks = self._words(table, clusters << bits >> 3)
        for index, entry in enumerate(blocks):
            if entry:
                self._table(entry, 1, f"refcount block {index}")
        self._tree(l1_offset, l1_size, "", active=True)
        at = snapshots_at
        for number in range(snapshots):
            l1_at, entries, id_length, name_length = struct.unpack_from(">QIHH", content, at)
            extra = struct.unpack_from(">I", content, at + 36)[0]
            self._table(l1_at, -(-entries * 8 >> bits), f"L1 table of snapshot {number}")
            self._tree(l1_at, entries, f"snapshot {number}: ", active=False)
            at = at + 40 + extra + id_length + name_length + 7 & ~7
        if snapshots:
            self._table(snapshots_at, -(-(at - snapshots_at) >> bits), "snapshot table")
        self._counts(blocks)
        return self.findings

    def _words(self, offset: int, count: int) -> tuple[int, ...]:
        if offset + count * 8 > len(self.content):
            have = max(0, len(self.content) - offset) // 8
            return struct.unpack_from(f">{have}Q", self.content, offset) + (0,) * (count - have)
        return struct.unpack_from(f">{count}Q", self.content, offset)

    def _table(self, offset: int, clusters: int, what: str) -> None:
        for cluster in range(offset >> self.bits, (offset >> self.bits) + clusters):
            holder = self.tables.setdefault(cluster, what)
            if holder is not what:
                self.findings.append(f"{what} stands on the {holder} (cluster {cluster})")
            self._refer(cluster, what, copied=False)

    def _refer(self, cluster: int, what: str, *, copied: bool) -> None:
        if cluster >= self.end:
            self.findings.append(f"{what} leads to cluster {cluster}, past the end of the file")
        self.references.setdefault(cluster, []).append(what)
        if copied:
            self.copied.setdefault(cluster, []).append(what)

    def _tree(self, l1_offset: int, l1_size: int, prefix: str, *, active: bool) -> None:
        cluster_bytes = 1 << self.bits
        for l1_index, l1_entry in enumerate(self._words(l1_offset, l1_size)):
            if not l1_entry:
                continue
            l2_offset = l1_entry & _OFFSET
            what = f"{prefix}L1[{l1_index}]"
            if l1_entry & ~(_OFFSET | _COPIED) or l2_offset & cluster_bytes - 1 or not l2_offset:
                self.findings.append(f"{what} is {l1_entry:#x}")
                continue
            self._refer(l2_offset >> self.bits, what, copied=active and bool(l1_entry & _COPIED))
            for l2_index, entry in enumerate(self._words(l2_offset, cluster_bytes >> 3)):
                if entry:
                    self._entry(entry, f"{prefix}L2[{l1_index}][{l2_index}]", active=active)

    def _entry(self, entry: int, what: str, *, active: bool) -> None:
        if entry & _COMPRESSED:
            shift = 62 - (self.bits - 8)
            offset = entry & (1 << shift) - 1
            sectors = (entry >> shift & (1 << 62 - shift) - 1) + 1
            last = (offset & ~511) + sectors * 512 - 1
            if entry & _COPIED:
                self.findings.append(f"{what} is compressed and COPIED")
            for cluster in range(offset >> self.bits, (last >> self.bits) + 1):
                self._refer(cluster, what, copied=False)
            return
        host = entry & _OFFSET
        zero = entry & 1
        if (
            entry & ~(_OFFSET | _COPIED | 1)
            or host & (1 << self.bits) - 1
            or (zero and self.version < 3)
            or (not host and not zero)
        ):
            self.findings.append(f"{what} is {entry:#x}")
        elif host:
            self._refer(host >> self.bits, what, copied=active and bool(entry & _COPIED))
            if host >> self.bits in self.tables:
                self.findings.append(f"{what} leads onto the {self.tables[host >> self.bits]}")

    def _counts(self, blocks: tuple[int, ...]) -> None:
        width = 1 << self.order
        per_block = (1 << self.bits) * 8 // width
        for cluster, holders in self.references.items():
            index, at = divmod(cluster, per_block)
            block = blocks[index] if index < len(blocks) else 0
            stored = self._count(block, at, width) if block else 0
            if stored < len(holders):
                self.findings.append(f"cluster {cluster} has refcount {stored} and {len(holders)} references: {holders[0]}")
            if len(holders) > 1 and cluster in self.copied:
                self.findings.append(
                    f"{self.copied[cluster][0]} is COPIED, but cluster {cluster} has {len(holders)} references"
                )

    def _count(self, block: int, at: int, width: int) -> int:
        if width < 8:
            byte = self.content[block + at * width // 8 : block + at * width // 8 + 1]
            return (byte[0] >> at * width % 8 & (1 << width) - 1) if byte else 0
        size = width // 8
        return int.from_bytes(self.content[block + at * size : block + (at + 1) * size].ljust(size, b"\0"))
