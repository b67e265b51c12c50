"""An undo log: what is needed to take a set of changes to one file back, on whatever way through them a crash stopped.

It is made before the first change, from a rehearsal (an overlay with a recorder): for each sector that will be written, its
bytes now, and a digest of every version that it takes on the way. A sector never tears, so after a crash each of them holds one
of its versions. A file in which one holds anything else is not the one that the log was made for, or has changed since.

    as a file   "cowundo1" | size before, size after, sectors: u64 each | SHA-256 of all that follows
                for each sector, in order: number u64 | versions u16 | their digests (BLAKE2b, 16 bytes each) | 512 old bytes

Sectors past the end of the file read as zeros. All numbers are big-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cowfence.errors import Corrupt, Invalid, Unsupported
from cowfence.storage.base import Buffer, Storage, read_padded
from cowfence.storage.oplog import Fence, Operation, Write
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import GIB, SECTOR_BYTES

MAX_LOG_BYTES: Final = GIB
_MAGIC: Final = b"cowundo1"
_HEADER: Final = struct.Struct(">8sQQQ32s")
_RECORD: Final = struct.Struct(">QH")
_DIGEST_BYTES: Final = 16
_MAX_VERSIONS: Final = 255
_MAX_SIZE_BYTES: Final = (1 << 63) - 1


class _Sector(NamedTuple):
    """``versions``: digests, the old bytes' first."""

    old: bytes
    versions: tuple[bytes, ...]


def _digest(sector: Buffer) -> bytes:
    return hashlib.blake2b(sector, digest_size=_DIGEST_BYTES).digest()


def _sector(storage: Storage, number: int) -> bytes:
    buffer = bytearray(SECTOR_BYTES)
    read_padded(storage, number * SECTOR_BYTES, buffer)
    return bytes(buffer)


def _touched(offset: int, length_bytes: int) -> range:
    return range(offset // SECTOR_BYTES, (offset + length_bytes + SECTOR_BYTES - 1) // SECTOR_BYTES)


@dataclass(slots=True)
class UndoLog:
    """See the module. Sizes are those of the whole file, in bytes."""

    old_bytes: int
    new_bytes: int
    sectors: dict[int, _Sector] = field(default_factory=dict)

    @classmethod
    def of(cls, storage: Storage, operations: Iterable[Operation], new_bytes: int) -> UndoLog:
        """For ``operations``, writes and fences, which have not been done to ``storage`` yet; after them the file has
        ``new_bytes``, no fewer than now. Raises Unsupported where the log would be too long."""
        old: dict[int, bytes] = {}
        now: dict[int, bytes] = {}
        versions: dict[int, list[bytes]] = {}
        for operation in operations:
            if isinstance(operation, Fence):
                continue
            assert isinstance(operation, Write), "what shall be undone only writes"
            for number in _touched(operation.offset, len(operation.data)):
                if number not in old:
                    old[number] = now[number] = _sector(storage, number)
                    versions[number] = [_digest(old[number])]
                now[number] = _overwritten(now[number], number, operation.offset, operation.data)
                digest = _digest(now[number])
                if digest not in versions[number]:
                    versions[number].append(digest)
        # Those that are written and stay the same, too: what somebody does there later must be seen.
        touched = {number: _Sector(old[number], tuple(versions[number])) for number in sorted(old)}
        log = cls(storage.size(), new_bytes, touched)
        longest = max((len(sector.versions) for sector in touched.values()), default=0)
        if longest > _MAX_VERSIONS or log.length_bytes > MAX_LOG_BYTES:
            raise Unsupported(storage.name, f"an undo file of {log.length_bytes} bytes (at most {MAX_LOG_BYTES})")
        return log

    @property
    def length_bytes(self) -> int:
        """Of the log as a file."""
        records = (_RECORD.size + SECTOR_BYTES + _DIGEST_BYTES * len(sector.versions) for sector in self.sectors.values())
        return _HEADER.size + sum(records)

    def encode(self) -> bytes:
        body = b"".join(
            _RECORD.pack(number, len(sector.versions)) + b"".join(sector.versions) + sector.old
            for number, sector in sorted(self.sectors.items())
        )
        return _HEADER.pack(_MAGIC, self.old_bytes, self.new_bytes, len(self.sectors), hashlib.sha256(body).digest()) + body

    @classmethod
    def decode(cls, data: bytes, name: str) -> UndoLog:
        """Raises Corrupt, naming the file ``name``, for anything but a whole log."""
        if len(data) < _HEADER.size or data[:8] != _MAGIC:
            raise Corrupt(name, "it is no undo file")
        _, old_bytes, new_bytes, count, digest = _HEADER.unpack_from(data)
        if hashlib.sha256(memoryview(data)[_HEADER.size :]).digest() != digest:
            raise Corrupt(name, "this undo file is not whole")
        if not old_bytes <= new_bytes <= _MAX_SIZE_BYTES:
            raise Corrupt(name, "this undo file names sizes that cannot be")
        log, at, previous = cls(old_bytes, new_bytes), _HEADER.size, -1
        while at < len(data):
            if len(data) - at < _RECORD.size:
                raise Corrupt(name, "this undo file ends within a record")
            number, versions = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            end = at + versions * _DIGEST_BYTES
            if not 1 <= versions <= _MAX_VERSIONS or len(data) - end < SECTOR_BYTES:
                raise Corrupt(name, "this undo file has a record that cannot be")
            if not previous < number < (new_bytes + SECTOR_BYTES - 1) // SECTOR_BYTES:
                raise Corrupt(name, f"this undo file names sector {number} out of order, or past the end")
            digests = tuple(data[start : start + _DIGEST_BYTES] for start in range(at, end, _DIGEST_BYTES))
            old = data[end : end + SECTOR_BYTES]
            if digests[0] != _digest(old):
                raise Corrupt(name, f"this undo file contradicts itself at sector {number}")
            log.sectors[number] = _Sector(old, digests)
            at, previous = end + SECTOR_BYTES, number
        if len(log.sectors) != count:
            raise Corrupt(name, f"this undo file says {count} sectors, and has {len(log.sectors)}")
        return log

    def check(self, storage: Storage) -> None:
        """Raises Invalid unless the file is as one of the changes left it, or none, or an undo that was broken off."""
        if not self.old_bytes <= storage.size() <= self.new_bytes:
            raise Invalid(
                f"{storage.name}: it has {storage.size()} bytes, the undo file is for {self.old_bytes} to {self.new_bytes}: "
                "it has changed since, or is another file"
            )
        for number, sector in self.sectors.items():
            if _digest(_sector(storage, number)) not in sector.versions:
                raise Invalid(
                    f"{storage.name}: offset {number * SECTOR_BYTES:#x} is not as it was left: the file has changed since, or "
                    "is not the one of this undo file"
                )

    def restore(self, storage: Storage) -> None:
        """Every sector, and the length, as they were. Fenced before the first change, behind sector 0, and at the end.

        Sector 0 comes first: it is what leads to the rest. ``check`` before; run again after a crash, it comes to its end.
        """
        storage.fence("undo.fence")
        first = [(number, sector) for number, sector in self.sectors.items() if number == 0]
        rest = [(number, sector) for number, sector in self.sectors.items() if number != 0]
        for part in (first, rest):
            wrote = [self._put_back(storage, number, sector.old) for number, sector in part]
            if any(wrote):
                storage.fence("undo.fence")
        if storage.size() != self.old_bytes:
            storage.truncate(self.old_bytes, "undo.truncate")
            storage.fence("undo.fence")

    def _put_back(self, storage: Storage, number: int, old: bytes) -> bool:
        start = number * SECTOR_BYTES
        data = old[: max(0, self.old_bytes - start)]
        if not data:
            return False
        storage.writev(start, (data,), "undo.write")
        return True


def _overwritten(sector: bytes, number: int, offset: int, data: bytes) -> bytes:
    start = number * SECTOR_BYTES
    low, high = max(start, offset), min(start + SECTOR_BYTES, offset + len(data))
    return sector[: low - start] + data[low - offset : high - offset] + sector[high - start :]


class GuardedStorage(StorageWrapper):
    """Lets through what an undo log can take back, and refuses everything else before it reaches ``inner``."""

    def __init__(self, inner: Storage, log: UndoLog) -> None:
        super().__init__(inner)
        self._log = log

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        data = b"".join(buffers)
        for number in _touched(offset, len(data)):
            new = _overwritten(_sector(self.inner, number), number, offset, data)
            known = self._log.sectors.get(number)
            if _digest(new) not in known.versions if known else new != _sector(self.inner, number):
                self._refuse(offset)
        if offset + len(data) > self._log.new_bytes:
            self._refuse(offset)
        self.inner.writev(offset, (data,), mark)

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:  # noqa: ARG002
        self._refuse(offset)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:  # noqa: ARG002
        self._refuse(offset)

    def truncate(self, size_bytes: int, mark: str) -> None:  # noqa: ARG002
        self._refuse(size_bytes)

    def _refuse(self, offset: int) -> None:
        raise Corrupt(f"{self.name}: offset {offset:#x}", "this change was not in the plan; nothing more is written")
