"""The FUSE recorder: a mount that passes files through and logs all that any program does to them.

The mount is one flat directory that shows the given files under the given names. Writes, truncations, punched and zeroed ranges
and fsyncs go into one operation log, each with its begin and its end, so that calls in flight at the same time are in flight in
the log. (Linux lets writes to one file through one after the other, as on most file systems, unless libfuse is 3.15 or newer
and they lie inside the file.) Reads are not logged. Nothing can be created, renamed or removed there: a log that lacked a file
would be worth nothing.

The kernel caches no data of the mount (``direct_io``), so that each call comes here whole, up to the largest request that FUSE
has, and O_DIRECT works as everywhere. Locks stay with the kernel, which keeps them for the mount. A descriptor opened with
O_SYNC or O_DSYNC gets a fence behind each write. Punching and zeroing always succeed: where the host's file system cannot,
zeros are written, so that the log does not depend on the host.

Needs libfuse3 (Debian: libfuse3-3; for users but root also fuse3), /dev/fuse, and the binding mfusepy (extra ``[fuse]``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from cowfence.errors import CowfenceError, Invalid
from cowfence.storage import host
from cowfence.storage.oplog import Discard, Done, Fence, Operation, OpLog, Truncate, Write, Zero

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_MOUNT_SECONDS: Final = 10.0
_MNT_DETACH: Final = 2
_ZEROS: Final = bytes(1 << 20)


class NoFuse(CowfenceError):
    """FUSE cannot be used here; the text says what to install."""


def _binding() -> ModuleType:
    try:
        import mfusepy
    except ImportError:
        raise NoFuse("recording through a mount needs mfusepy: pip install 'cowfence[fuse]'") from None
    except (OSError, AttributeError) as error:
        raise NoFuse(f"recording through a mount needs libfuse3 (Debian: apt-get install libfuse3-3): {error}") from None
    if not os.path.exists("/dev/fuse"):
        raise NoFuse("recording through a mount needs /dev/fuse, which this machine does not have")
    module: ModuleType = mfusepy
    return module


class FuseRecorder:
    """A mount at the directory ``mountpoint`` that shows ``files`` (name to path) and logs what is done to them.

    A context manager: the mount stands while it is entered. Raises NoFuse, Invalid. The mount is served by threads of this
    process: whoever starts programs gives them a working directory outside of it, else starting them waits for ever.
    """

    def __init__(
        self, mountpoint: str | os.PathLike[str], files: Mapping[str, str | os.PathLike[str]], log: OpLog | None = None
    ) -> None:
        self.mountpoint = os.path.abspath(os.fspath(mountpoint))
        self.log = OpLog() if log is None else log
        self._fuse = _binding()
        self._files = {name: os.path.abspath(path) for name, path in files.items()}
        for name, path in self._files.items():
            if "/" in name or not os.path.isfile(path):
                raise Invalid(f"{path}: not a regular file that could be recorded as {name!a}")
        if not os.path.isdir(self.mountpoint):
            raise Invalid(f"{self.mountpoint}: not a directory")
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._serve, name="cowfence-fuse", daemon=True)

    def __enter__(self) -> FuseRecorder:
        before = os.stat(self.mountpoint).st_dev
        # libfuse goes to the root directory before it serves, as a daemon would; the process goes on here.
        here = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            self._thread.start()
            deadline = time.monotonic() + _MOUNT_SECONDS
            while os.stat(self.mountpoint).st_dev == before:
                if not self._thread.is_alive() or time.monotonic() > deadline:
                    self._unmount()
                    raise NoFuse(
                        f"{self.mountpoint}: cannot mount here ({self._failure or 'no answer'}); it takes root, or fusermount3 "
                        "(Debian: apt-get install fuse3)"
                    )
                time.sleep(0.002)
        finally:
            os.fchdir(here)
            os.close(here)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._unmount()
        self._thread.join(_MOUNT_SECONDS)

    def _unmount(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(self.mountpoint), _MNT_DETACH) != 0 and (helper := shutil.which("fusermount3")):
            subprocess.run([helper, "-u", "-z", self.mountpoint], check=False, capture_output=True)

    def _serve(self) -> None:
        try:
            operations = _operations(self._fuse, self._files, self.log)
            options: dict[str, object] = {"fsname": "cowfence", "subtype": "record", "direct_io": True}
            if (self._fuse.fuse_version_major, self._fuse.fuse_version_minor) >= (3, 12):
                # Its own default is out of range in some releases, which then complain on stderr.
                options |= {"max_threads": 8, "max_idle_threads": 8}
            self._fuse.FUSE(operations, self.mountpoint, raw_fi=True, foreground=True, **options)
        except BaseException as error:
            self._failure = str(error) or type(error).__name__


def _operations(fuse: ModuleType, files: Mapping[str, str], log: OpLog) -> object:
    """The callbacks, in a class made here because its base exists only where the binding is installed."""

    class Operations(_Recorder, fuse.Operations):  # type: ignore[misc, name-defined]
        pass

    return Operations(fuse, files, log)


class _Recorder:
    """Callbacks of libfuse's high-level interface, called by its threads. Errors are OSErrors, which the binding passes on."""

    use_ns = True

    def __init__(self, fuse: ModuleType, files: Mapping[str, str], log: OpLog) -> None:
        self._fuse = fuse
        self._files = files
        self._log = log
        self._synchronous: set[int] = set()

    def init(self, path: str) -> None:
        """Nothing is to be made ready."""

    def _path(self, path: str) -> str:
        found = self._files.get(path[1:])
        if found is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found

    def access(self, path: str, amode: int) -> int:
        return 0 if path == "/" or os.access(self._path(path), amode) else -errno.EACCES

    def getattr(self, path: str, fi: Any = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2, "st_uid": os.getuid(), "st_gid": os.getgid()}
        status = os.fstat(fi.fh) if fi is not None else os.stat(self._path(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize")
        found = {name: getattr(status, name) for name in names}
        return found | {f"st_{name}time": getattr(status, f"st_{name}time_ns") for name in "amc"}

    def readdir(self, path: str, fi: Any) -> list[str]:  # noqa: ARG002
        return [".", "..", *self._files]

    def statfs(self, path: str) -> dict[str, int]:  # noqa: ARG002
        status = os.statvfs(next(iter(self._files.values())))
        names = (
            "f_bavail",
            "f_bfree",
            "f_blocks",
            "f_bsize",
            "f_favail",
            "f_ffree",
            "f_files",
            "f_flag",
            "f_frsize",
            "f_namemax",
        )
        return {name: getattr(status, name) for name in names}

    def open(self, path: str, fi: Any) -> int:
        # Direct I/O is between the program and us; append and truncation are done by the calls that come.
        flags = fi.flags & ~(os.O_DIRECT | os.O_APPEND | os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_SYNC)
        if flags & os.O_ACCMODE == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        fd = os.open(self._path(path), flags | os.O_CLOEXEC)
        fi.fh = fd
        fi.direct_io = 1
        if hasattr(type(fi), "parallel_direct_writes"):
            fi.parallel_direct_writes = 1
        if fi.flags & os.O_DSYNC:
            self._synchronous.add(fd)
        if fi.flags & os.O_TRUNC:
            self._truncate(path, fd, 0)
        return 0

    def release(self, path: str, fi: Any) -> int:  # noqa: ARG002
        self._synchronous.discard(fi.fh)
        os.close(fi.fh)
        return 0

    def flush(self, path: str, fi: Any) -> int:  # noqa: ARG002
        return 0

    def read(self, path: str, size: int, offset: int, fi: Any) -> bytes:  # noqa: ARG002
        return os.pread(fi.fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fi: Any) -> int:
        done = 0
        with self._entered(Write(path[1:], offset, bytes(data), f"write of {len(data)} bytes at {offset:#x}")):
            while done < len(data):
                done += os.pwrite(fi.fh, data[done:], offset + done)
        if fi.fh in self._synchronous:
            self.fsync(path, 1, fi)
        return done

    def truncate(self, path: str, length: int, fi: Any = None) -> int:
        if fi is not None:
            self._truncate(path, fi.fh, length)
            return 0
        fd = os.open(self._path(path), os.O_RDWR | os.O_CLOEXEC)
        try:
            self._truncate(path, fd, length)
        finally:
            os.close(fd)
        return 0

    def _truncate(self, path: str, fd: int, length: int) -> None:
        with self._entered(Truncate(path[1:], length, f"truncate to {length} bytes")):
            os.ftruncate(fd, length)

    def fsync(self, path: str, datasync: int, fi: Any) -> int:
        with self._entered(Fence(path[1:], "fdatasync" if datasync else "fsync")):
            (os.fdatasync if datasync else os.fsync)(fi.fh)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, length: int, fi: Any) -> int:
        size = os.fstat(fi.fh).st_size
        end = offset + length
        if mode in (0, _KEEP_SIZE):
            if end > size and not mode & _KEEP_SIZE:
                self._truncate(path, fi.fh, end)
            return 0
        if mode not in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE, _ZERO_RANGE | _KEEP_SIZE):
            return -errno.EOPNOTSUPP
        if mode & _KEEP_SIZE:
            end = min(end, size)
        if end <= offset:
            return 0
        operation: Operation = Zero(path[1:], offset, end - offset, f"zero range at {offset:#x}")
        if mode & _PUNCH_HOLE:
            operation = Discard(path[1:], offset, end - offset, f"punched hole at {offset:#x}")
        with self._entered(operation):
            _make_zero(fi.fh, mode, offset, end)
        return 0

    @contextmanager
    def _entered(self, operation: Operation) -> Iterator[None]:
        position = self._log.append(operation)
        try:
            yield
        except BaseException:
            self._log.append(Done(position, failed=True))
            raise
        self._log.append(Done(position))


def _make_zero(fd: int, mode: int, offset: int, end: int) -> None:
    try:
        host.fallocate(fd, mode, offset, end - offset)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        while offset < end:
            offset += os.pwrite(fd, _ZEROS[: end - offset], offset)
