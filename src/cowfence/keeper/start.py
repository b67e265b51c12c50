"""The writer's side of the keeper: memory that both share, and the process, started, watched and ended.

The keeper is started by exec, never by a fork that goes on in Python, and inherits these descriptors:

- the image, with the writer's open file description: the lock lives in it, so the lock outlives the writer;
- the image again, with a description of its own, opened before: a fence through it hears of every write that the kernel has
  lost since, also of one that the writer was told of and took to its grave;
- where the guest's data has a file of its own, both once more for that;
- the memory of the journal;
- a pidfd of the writer, opened by the writer itself, so that it can mean nobody else.

It says "ready" when it watches; only then is the image opened for writing. Its standard input is a pipe: a byte there, after
the journal was marked closed, ends it.

A thread waits for the keeper's end. One that dies while the image is open is replaced, with a warning: the memory is the same,
so the next one knows what the last one knew. In between, and if the cgroup, the PID namespace or the host are killed with both
of us in it, what was flushed is safe, as without a keeper.

A disk that is never closed keeps its lock until the process ends; then the keeper completes its work, as after a kill.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Final

from cowfence.errors import CowfenceError
from cowfence.qcow2.journal import Journal
from cowfence.storage.file import FileStorage
from cowfence.storage.host import above_standard
from cowfence.storage.locks import WRITER_BYTE, hold_byte
from cowfence.units import MIB

_log = logging.getLogger(__name__)

_MEMORY_BYTES: Final = 8 * MIB
"""Only what is written to costs memory. One area, half of it, holds the notes of 130,000 writes that allocate."""
_READY_SECONDS: Final = 30.0
_END_SECONDS: Final = 10.0
_LONGEST_PAUSE_SECONDS: Final = 30.0


class KeptJournal(Journal):
    """A journal in memory shared with a keeper process. Made by ``start_keeper``."""

    def __init__(self, storage: FileStorage, data: FileStorage | None) -> None:
        self._storage = storage
        self._data = data
        self._guard = threading.Lock()
        """Held while the process is started or ended."""
        self._closing = threading.Event()
        self._memory_fd = above_standard(os.memfd_create("cowfence-journal", os.MFD_CLOEXEC))
        self._memory: mmap.mmap | None = None
        self._life_fd = -1
        """Not shared with anybody, so that it ends with us: see ``cowfence.storage.locks``."""
        try:
            os.ftruncate(self._memory_fd, _MEMORY_BYTES)
            self._memory = mmap.mmap(self._memory_fd, _MEMORY_BYTES)
            self.clear(self._memory)
            super().__init__(self._memory)
            self._life_fd = above_standard(os.open(f"/proc/self/fd/{storage.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
            hold_byte(self._life_fd, WRITER_BYTE)
            self._process = self._start()
        except BaseException:
            self._let_go()
            raise
        self._watcher = threading.Thread(target=self._watch, name="cowfence-keeper", daemon=True)
        self._watcher.start()

    @property
    def keeper_pid(self) -> int:
        """The process that keeps now."""
        return self._process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        shared = [file.fileno() for file in (self._storage, self._data) if file is not None]
        own: list[int] = []
        try:
            own += (above_standard(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)) for fd in shared)
            writer = above_standard(os.pidfd_open(os.getpid()))
            try:
                files = (number for pair in zip(shared, own, strict=True) for number in pair)
                descriptors = (self._memory_fd, writer, *files)
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "cowfence.keeper", self._storage.name, *map(str, descriptors)],
                    bufsize=0,  # No buffer, no lock of it that a fork could inherit.
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    # Ours, unless it was closed: then the number may stand for any file by now.
                    stderr=None if sys.__stderr__ is not None else subprocess.DEVNULL,
                    pass_fds=descriptors,
                    cwd="/",
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
                    start_new_session=True,
                )
            finally:
                os.close(writer)
        finally:
            for fd in own:
                os.close(fd)
        try:
            _await_ready(process)
        except BaseException:
            # Ctrl-C comes here too: a keeper that nobody knows of would stay until our end.
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
            raise
        return process

    def _watch(self) -> None:
        """Replace a keeper that dies. Pauses between those that die young, so that a broken host is not kept busy."""
        pause = 0.0
        while True:
            begun = time.monotonic()
            process = self._process
            process.wait()
            if self._closing.is_set():
                return
            pause = 0.0 if time.monotonic() - begun > _LONGEST_PAUSE_SECONDS else min(pause * 2 + 0.05, _LONGEST_PAUSE_SECONDS)
            _log.warning(
                "%s: the keeper (process %d) died; starting another. Until it is ready, a kill of this process may lose what "
                "was written since the last flush",
                self._storage.name,
                process.pid,
            )
            _close_input(process)
            while not self._replace(pause):
                pause = min(pause * 2 + 0.05, _LONGEST_PAUSE_SECONDS)

    def _replace(self, pause: float) -> bool:
        """Start another after ``pause`` seconds; True if there is one, or none is needed any more."""
        if self._closing.wait(pause):
            return True
        with self._guard:
            if self._closing.is_set():
                return True
            try:
                self._process = self._start()
            except (OSError, CowfenceError) as error:
                _log.warning("%s: no keeper could be started: %s", self._storage.name, error)
                return False
        return True

    def close(self) -> None:
        """Mark the journal closed, end the keeper, and let the memory go: the last call of all."""
        if self._closing.is_set():
            return
        super().close()
        with self._guard:
            self._closing.set()
        process = self._process
        _close_input(process)
        self._watcher.join(_END_SECONDS)
        if self._watcher.is_alive():
            process.kill()
            self._watcher.join()
        self._let_go()

    def disown(self) -> None:
        """In a forked child: let go of what would make us look alive after the parent's end. No lock is asked for here."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._let_go()
        if self._process.stdin is not None:
            self._process.stdin.close()
        # It is no child of ours: nobody shall wait for it.
        self._process.returncode = 0

    def _let_go(self) -> None:
        os.close(self._memory_fd)
        if self._life_fd >= 0:
            os.close(self._life_fd)
        if self._memory is not None:
            # In a forked child, a thread that is no more may have held a view of it for ever: then it ends with the child.
            with suppress(BufferError):
                self.release()
                self._memory.close()


def _await_ready(process: subprocess.Popen[bytes]) -> None:
    """Until the keeper says that it is ready. Raises OSError where it does not."""
    assert process.stdout is not None
    with process.stdout as stdout:
        # Not select(), which has no word for descriptors past 1023.
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        if poll.poll(_READY_SECONDS * 1000) and os.read(stdout.fileno(), 16) == b"ready\n":
            return
    process.kill()
    raise OSError(f"it did not say that it is ready (exit code {process.wait()})")


def _close_input(process: subprocess.Popen[bytes]) -> None:
    """Wake the keeper: by a byte, because a forked child may hold the pipe open, too."""
    assert process.stdin is not None
    with suppress(OSError):
        os.write(process.stdin.fileno(), b"\n")
    with suppress(OSError):
        process.stdin.close()


def start_keeper(storage: FileStorage, data: FileStorage | None = None) -> KeptJournal:
    """A journal for the image in ``storage``, which is open for writing and locked, as its external ``data`` file is, and a
    keeper that watches over them.

    Raises CowfenceError where this host does not let us have one.
    """
    try:
        return KeptJournal(storage, data)
    except OSError as error:
        raise CowfenceError(
            f"{storage.name}: the keeper cannot be started: {error.strerror or error}; without it (--no-keeper) a kill may "
            "lose what was not flushed"
        ) from error
