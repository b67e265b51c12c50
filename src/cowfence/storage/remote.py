"""``RemoteStorage``: a file behind a URL (HTTP, object storage), read in ranges through fsspec.

The file is read in blocks of 1 MiB, several requests at a time; whoever reads on from where the last read ended has the next
blocks fetched before he asks. At most 64 blocks are held. The file must not change: what no longer has the length that it had
is an error, and no bytes are made up.
"""
# ruff: noqa: ARG002 - what is never written has no use for marks and bytes

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NoReturn

from cowfence.errors import Closed, CowfenceError, ReadOnly, StorageFailed, Unsupported, WouldBlock
from cowfence.extents import Extent
from cowfence.storage.base import Buffer, Capabilities, WritableBuffer
from cowfence.units import MIB

SCHEMES: Final = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "ftp", "sftp")
_BLOCK_BYTES: Final = MIB
_BLOCKS_HELD: Final = 64
_BLOCKS_AHEAD: Final = 8
_REQUESTS: Final = 8


def is_remote(name: str) -> bool:
    """True if ``name`` is a URL of one of the schemes that are read through fsspec."""
    scheme, separator, _ = name.partition("://")
    return bool(separator) and scheme in SCHEMES


class RemoteStorage:
    """``Storage`` for reading. Thread-safe."""

    writable = False

    def __init__(self, url: str) -> None:
        """Asks for the length. Raises Unsupported (fsspec, or what it needs for this scheme, is not installed; the server does
        not tell the length), StorageFailed (there is no such file, the server cannot be reached)."""
        self.name = url
        self._guard = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._next_block = 0
        self._closed = False
        try:
            from fsspec.core import url_to_fs

            self._files, self._path = url_to_fs(url)
        except ImportError as error:
            raise Unsupported(url, f"reading URLs without a library: {error} (pip install 'cowfence[fs]')") from None
        except ValueError as error:
            raise Unsupported(url, str(error)) from None
        size_bytes = self._asked("open", 0, self._files.info, self._path).get("size")
        if not isinstance(size_bytes, int):
            raise Unsupported(url, "a server that does not tell the file's length")
        self._size_bytes = size_bytes
        self._requests = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="cowfence-remote")

    def _asked(self, operation: str, offset: int, ask: Any, *arguments: Any, **named: Any) -> Any:
        """What a call of the library gives; its many errors become one."""
        try:
            return ask(*arguments, **named)
        except CowfenceError:
            raise
        except OSError as error:
            raise StorageFailed(self.name, operation, offset, error) from error
        except Exception as error:  # The libraries under fsspec have errors of their own, without a common base.
            cause = OSError(errno.EIO, f"{type(error).__name__}: {error}")
            raise StorageFailed(self.name, operation, offset, cause) from error

    def capabilities(self) -> Capabilities:
        return Capabilities(punches_holes=False)

    def size(self) -> int:
        return self._size_bytes

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        done = 0
        for buffer in buffers:
            view = memoryview(buffer)
            end = min(offset + done + len(view), self._size_bytes)
            if offset + done >= end:
                break
            done += self._fill(offset + done, view[: end - offset - done], wait=wait)
        return done

    def read_cached(self, offset: int, length_bytes: int) -> bytes | bytearray:
        buffer = bytearray(max(0, min(length_bytes, self._size_bytes - offset)))
        self.readv(offset, (buffer,), wait=False)
        return buffer

    def _fill(self, offset: int, view: memoryview, *, wait: bool) -> int:
        first, last = offset // _BLOCK_BYTES, (offset + len(view) - 1) // _BLOCK_BYTES
        at = 0
        for number in range(first, last + 1):
            asked = self._wanted(number, last, wait=wait)
            try:
                block = asked.result()
            except BaseException:
                with self._guard:
                    if self._blocks.get(number) is asked:
                        del self._blocks[number]  # Whoever comes next asks again.
                raise
            within = offset + at - number * _BLOCK_BYTES
            part = block[within : within + len(view) - at]
            view[at : at + len(part)] = part
            at += len(part)
        return at

    def _wanted(self, number: int, last: int, *, wait: bool) -> Future[bytes]:
        """A block of a read that goes on to ``last``; those behind it are asked for at the same time."""
        with self._guard:
            if self._closed:
                raise Closed(f"{self.name}: the storage is closed")
            held = self._blocks.get(number)
            if not wait and (held is None or not held.done()):
                raise WouldBlock(f"{self.name}: block {number} is not in memory")
            follows = number in (self._next_block - 1, self._next_block)
            ahead = _BLOCKS_AHEAD if follows else min(last - number, _BLOCKS_AHEAD)
            blocks = -(-self._size_bytes // _BLOCK_BYTES)
            for wanted in range(number, min(number + ahead + 1, blocks)):
                if wanted not in self._blocks:
                    self._blocks[wanted] = self._requests.submit(self._block, wanted)
            self._next_block = number + 1
            found = self._blocks[number]
            self._blocks.move_to_end(number)
            while len(self._blocks) > _BLOCKS_HELD:
                self._blocks.popitem(last=False)
        return found

    def _block(self, number: int) -> bytes:
        start = number * _BLOCK_BYTES
        end = min(start + _BLOCK_BYTES, self._size_bytes)
        data: bytes = self._asked("read", start, self._files.cat_file, self._path, start=start, end=end)
        if len(data) != end - start:
            cause = OSError(errno.EIO, f"{len(data)} bytes came instead of {end - start}: no ranges, or the file has changed")
            raise StorageFailed(self.name, "read", start, cause)
        return data

    def extents(self, offset: int, length_bytes: int) -> Iterator[Extent]:
        end = min(offset + length_bytes, self._size_bytes)
        if offset < end:
            yield Extent(offset, end - offset, zero=False, data=True, present=True, depth=0, host_offset=offset)

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> NoReturn:
        self._refuse()

    def zero(self, offset: int, length_bytes: int, mark: str) -> NoReturn:
        self._refuse()

    def discard(self, offset: int, length_bytes: int, mark: str) -> NoReturn:
        self._refuse()

    def truncate(self, size_bytes: int, mark: str) -> NoReturn:
        self._refuse()

    def fence(self, mark: str) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ReadOnly(f"{self.name}: what is behind a URL is only read")

    def close(self) -> None:
        with self._guard:
            self._closed = True
            self._blocks.clear()
        self._requests.shutdown(wait=True, cancel_futures=True)
