"""A change that is carried out in memory only: what a ``--dry-run`` does.

Files are opened for reading, and what would be written to them is kept beside them (``storage.overlay``) until they are closed.
Everything else is as it would be, errors too, so that what it tells is what would be.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from cowfence.storage.base import Buffer, Storage
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.overlay import OverlayStorage
from cowfence.storage.publish import stat_target

_GUEST_DATA = ("data.write", "create.fill", "resize.fill")


class FileChange(NamedTuple):
    """What would become of a file. ``old_bytes``: its length; None where there would be a new file."""

    path: str
    old_bytes: int | None
    new_bytes: int
    changed_bytes: int

    def to_dict(self) -> dict[str, str | int | None]:
        return {
            "filename": self.path,
            "file-size": self.old_bytes,
            "new-file-size": self.new_bytes,
            "changed-bytes": self.changed_bytes,
        }


class Rehearsal:
    """What would have been written so far. ``changes``: of the files that are closed again."""

    def __init__(self) -> None:
        self.changes: list[FileChange] = []

    def open(self, path: str | os.PathLike[str]) -> Storage:
        """The file at ``path``, as if it were open for writing. Raises as ``FileStorage.open`` does."""
        return self.over(FileStorage.open(path))

    def over(self, storage: Storage) -> Storage:
        """``storage``, which is only read, as if it were open for writing. Takes it over."""
        return _Kept(storage, self, is_new=False)

    def new_file(self, path: str | os.PathLike[str]) -> RehearsedFile:
        """As ``storage.publish.NewFile``."""
        return RehearsedFile(path, self)


class RehearsedFile:
    """A file that is not made. As ``NewFile`` is used; raises as it does for what stands at its path."""

    def __init__(self, path: str | os.PathLike[str], rehearsal: Rehearsal) -> None:
        self.path = os.fspath(path)
        target = os.path.realpath(self.path)
        found = stat_target(self.path, target)
        self.in_place = found is not None and stat.S_ISBLK(found.st_mode)
        if found is not None:
            old = FileStorage.open(target, writable=True)
            if self.in_place:
                self.storage = rehearsal.over(old)
                return
            old.close()
        self.storage = _Kept(MemoryStorage(name=self.path), rehearsal, is_new=True)

    def publish(self) -> None:
        """Nothing gets a name."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.storage.close()


class _Kept(OverlayStorage):
    """Tells what it has kept when it is closed. Nobody reads guest data that was written, so none of that is kept."""

    def __init__(self, inner: Storage, rehearsal: Rehearsal, *, is_new: bool) -> None:
        super().__init__(inner)
        self._rehearsal = rehearsal
        self._old_bytes = None if is_new else inner.size()

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        if mark in _GUEST_DATA:
            self.zero(offset, sum(map(len, buffers)), mark)
        else:
            super().writev(offset, buffers, mark)

    def close(self) -> None:
        if self._is_open:
            changed_bytes = sum(length_bytes for _, length_bytes in self.changed())
            self._rehearsal.changes.append(FileChange(self.name, self._old_bytes, self.size(), changed_bytes))
        super().close()
