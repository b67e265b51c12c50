"""The keeper's process: wait for the writer's end, then complete what it left pending, and unlock the image.

Started by ``cowfence.keeper.start``, which says what the descriptors are. It ignores the signals that end a writer in order
(SIGTERM, SIGINT, SIGHUP): the writer then closes the image, and that ends the keeper. All that it may need is imported before
it says that it is ready.

Nothing is done unless the writer's lock is still held by the description that we inherited: else the image belongs to others.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import sys
from contextlib import suppress

from cowfence.qcow2.journal import Journal
from cowfence.qcow2.replay import replay
from cowfence.storage.file import FileStorage
from cowfence.storage.locks import KEEPER_BYTE, hold_byte, holds_writers_lock, release_all

_INPUT, _OUTPUT = 0, 1


def main() -> int:
    """Keep until there is nothing to keep. Exit code 1 where something is lost."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    name = sys.argv[1]
    memory, writer, image, own, *external = map(int, sys.argv[2:])
    journal = Journal(mmap.mmap(memory, os.fstat(memory).st_size))
    storage = FileStorage.from_fd(own, name, writable=True)
    data = FileStorage.from_fd(external[1], f"{name}: external data file", writable=True) if external else None
    hold_byte(own, KEEPER_BYTE)
    # The writer may have died meanwhile. Where we replace another keeper, it may have left something to be done.
    with suppress(BrokenPipeError):
        os.write(_OUTPUT, b"ready\n")
    os.close(_OUTPUT)
    _wait(writer, journal)
    return 0 if journal.closed else _finish(journal, storage, data, [image, *external[:1]])


def _wait(writer: int, journal: Journal) -> None:
    """Until the writer is dead or has closed the image."""
    poll = select.poll()
    poll.register(writer, select.POLLIN)
    poll.register(_INPUT, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if writer in ready or journal.closed:
            return
        if _INPUT in ready and not os.read(_INPUT, 16):
            # The writer let go of the disk without closing it. Its threads may still be at work: only its end is the end.
            poll.unregister(_INPUT)


def _finish(journal: Journal, storage: FileStorage, data: FileStorage | None, shared: list[int]) -> int:
    """``shared``: the descriptors in which the writer's locks live, that of the image first."""
    if not holds_writers_lock(shared[0], storage.fileno()):
        if next(journal.unretired(), None) is None:
            return 0
        _say(f"{storage.name}: the writer died, and its lock was gone: what it did since its last flush is lost")
        return 1
    try:
        done = replay(storage, journal, data)
    finally:
        # By hand: a forked child of the writer may hold the description open.
        for fd in shared:
            release_all(fd)
    if done.failure is not None:
        _say(f"{storage.name}: the writer died, and its last writes could not all be completed: {done.failure}")
        return 1
    if done.groups:
        _say(f"{storage.name}: the writer died; {done.groups} of its last changes were completed")
    return 0


def _say(text: str) -> None:
    # The writer's standard error may have died with it.
    with suppress(OSError):
        os.write(2, f"cowfence keeper: {text}\n".encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    code = main()
    # Nothing is left to be tidied up, and whoever waits for the lock need not wait for that.
    os._exit(code)
