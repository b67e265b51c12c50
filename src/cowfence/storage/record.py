"""``RecordingStorage``: every change and fence of a file goes into a shared log (see ``oplog``).

A call is entered before it is passed on, with a copy of its bytes as they were then, and its end is entered after it has
returned or raised. Put a fault injector *around* a recorder, so that a write which it cuts short is logged as what really
reached the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cowfence.storage.base import Buffer, Storage
from cowfence.storage.oplog import Discard, Done, Fence, Operation, OpLog, Truncate, Write, Zero
from cowfence.storage.wrapper import StorageWrapper


class RecordingStorage(StorageWrapper):
    """A storage whose changes are logged under the name ``file`` (by default that of ``inner``)."""

    def __init__(self, inner: Storage, log: OpLog, file: str | None = None) -> None:
        super().__init__(inner)
        self.log = log
        self.file = inner.name if file is None else file

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        with self._entered(Write(self.file, offset, b"".join(buffers), mark)):
            self.inner.writev(offset, buffers, mark)

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        with self._entered(Zero(self.file, offset, length_bytes, mark)):
            self.inner.zero(offset, length_bytes, mark)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        with self._entered(Discard(self.file, offset, length_bytes, mark)):
            self.inner.discard(offset, length_bytes, mark)

    def truncate(self, size_bytes: int, mark: str) -> None:
        with self._entered(Truncate(self.file, size_bytes, mark)):
            self.inner.truncate(size_bytes, mark)

    def fence(self, mark: str) -> None:
        with self._entered(Fence(self.file, mark)):
            self.inner.fence(mark)

    @contextmanager
    def _entered(self, operation: Operation) -> Iterator[None]:
        position = self.log.append(operation)
        try:
            yield
        except BaseException:
            self.log.append(Done(position, failed=True))
            raise
        self.log.append(Done(position))
