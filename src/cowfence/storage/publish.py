"""New files appear whole or not at all.

A new image is written under a temporary name in the directory of its final one (``.NAME.RANDOM.partial``). ``publish`` then
fences it, renames it over the final name and fences the directory. A crash before the rename leaves the old file, or none,
and at worst a ``.partial`` to delete; a crash after it finds the new file with all of its bytes.

What stands at the final name already:

- a regular file: its image lock is taken first, as a writer would, and held until the rename, so that an image in use is
  refused and not pulled away from under its user. Its mode and, where allowed, its owner go over to the new file.
- a symbolic link: the file that it leads to is replaced; the link stays.
- a block device: a name cannot be moved over it, so it is locked and written in place. ``publish`` only fences it, and after
  a failure its old content is gone.
- anything else (a directory, a FIFO, a character device) is refused.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from types import TracebackType
from typing import Self

from cowfence.errors import from_os_error
from cowfence.storage.file import FileStorage, require_image_kind
from cowfence.storage.host import above_standard

_NAME_BYTES_MAX = 255


class NewFile:
    """A file in the making, a context manager: leaving it without ``publish`` removes what was written.

    ``storage`` is where to write; whoever writes may close it, before ``publish`` too. ``in_place`` is true for a device.
    Raises ``StorageFailed``, ``Locked`` (the existing file is in use), ``Invalid`` (it is no place for an image).
    """

    storage: FileStorage
    in_place: bool

    def __init__(self, path: str | os.PathLike[str], *, direct: bool = False) -> None:
        self.path = os.fspath(path)
        self._target = os.path.realpath(self.path)
        self._partial: str | None = None
        self._old: FileStorage | None = None
        self._fence_fd: FileStorage | None = None
        self._owner_pid = os.getpid()
        self.published = False
        try:
            self._begin(direct)
        except BaseException:
            self._end()
            raise

    def _begin(self, direct: bool) -> None:
        old = stat_target(self.path, self._target)
        self.in_place = old is not None and stat.S_ISBLK(old.st_mode)
        if self.in_place:
            self.storage = FileStorage.open(self._target, writable=True, direct=direct)
        else:
            self._lock_target()
            self.storage = self._create_partial(direct)
        # The same open file description under a second descriptor: it serves to fence when `storage` has been closed, and
        # it hears of the same lost writes, which a descriptor opened later would not.
        self._fence_fd = FileStorage.from_fd(os.dup(self.storage.fileno()), self.path, writable=True)

    def _lock_target(self) -> None:
        """Hold the writer's lock on the file that will be replaced, if there is one. Refuses one that we may not write."""
        if self._old is not None or stat_target(self.path, self._target) is None:
            return
        self._old = FileStorage.open(self._target, writable=True)

    def _create_partial(self, direct: bool) -> FileStorage:
        directory, final_name = os.path.split(self._target)
        ending = f".{os.urandom(4).hex()}.partial"
        stem = os.fsdecode(os.fsencode(final_name)[: _NAME_BYTES_MAX - len(ending) - 1])
        partial = os.path.join(directory, f".{stem}{ending}")
        try:
            fd = above_standard(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        except OSError as exc:
            raise from_os_error(self.path, "create", 0, exc) from exc
        self._partial = partial
        try:
            if self._old is not None:
                old = os.fstat(self._old.fileno())
                with suppress(PermissionError):
                    os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, stat.S_IMODE(old.st_mode) & 0o777)
        except OSError as exc:
            raise from_os_error(self.path, "create", 0, exc) from exc
        finally:
            os.close(fd)
        return FileStorage.open(partial, writable=True, direct=direct)

    @property
    def path_now(self) -> str:
        """Where the file stands as long as it is not published."""
        return self._partial or self._target

    def publish(self) -> None:
        """Make the file durable and give it its final name. Raises ``StorageFailed``; the old file is then still there
        (unless only the fence of the directory failed: then the new one is, but may not survive a power cut).
        """
        if self.published:
            return
        if self.storage.failed_fence is not None:
            raise self.storage.failed_fence
        assert self._fence_fd is not None  # since the constructor returned
        self._fence_fd.fence("publish.file")
        if self._partial is None:
            self.published = True
            return
        self._lock_target()  # one that appeared while we were writing
        try:
            os.rename(self._partial, self._target)
            self._partial = None
            self.published = True
            _fence_directory(os.path.dirname(self._target))
        except OSError as exc:
            raise from_os_error(self.path, "publish", 0, exc) from exc

    def close(self) -> None:
        """Close the file; if it was not published, remove it. May be called again."""
        self._end()

    def _end(self) -> None:
        if self._partial is not None and os.getpid() == self._owner_pid:  # a forked child leaves its parent's file alone
            with suppress(OSError):
                os.unlink(self._partial)
            self._partial = None
        for held in (getattr(self, "storage", None), self._fence_fd, self._old):
            if held is not None:
                held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


def stat_target(path: str, target: str) -> os.stat_result | None:
    """What stands at the final name; None: nothing. ``path``: its name for messages. Raises Invalid,
    StorageFailed."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise from_os_error(path, "open", 0, exc) from exc
    require_image_kind(path, found.st_mode, allow_devices=True)
    return found


def _fence_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
