"""``FaultyStorage``: a storage that fails where a plan says, with the errors that a real file would raise.

The plan counts the calls that match it, over all storages that share it (an image and its data file have one order). A run
with a plan that fails nothing tells how many there are; then the loop "fail the n-th, for every n, once and from then on"
covers every path of the program under test.

A fence that failed is like Linux's: called again it reports success, but what was lost stays lost. So once a fence of a
storage has failed, its later ones return without reaching the host, and a recorder inside sees nothing made durable. (A
real ``FileStorage`` raises again; a program under test must not rely on that.)

A failed write may have arrived: not at all, its first half (cut between sectors, for a sector never tears), or whole (the host
reported a failure of something else).

``on_call`` runs inside a call, after the host has done its part and before the caller hears of it. The crash explorer
carries out one more guest operation there; so what an engine does while one of its fences or reads is under way is tested
without a second thread. Calls that the hook itself makes do not run the hook again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from enum import Enum

from cowfence.errors import from_os_error
from cowfence.storage.base import Buffer, Storage, WritableBuffer
from cowfence.storage.wrapper import StorageWrapper
from cowfence.units import SECTOR_BYTES


class Kind(Enum):
    """The calls that can fail."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    DISCARD = "discard"
    TRUNCATE = "truncate"
    FENCE = "fence"


class Arrived(Enum):
    """What a failed call did all the same. A half is the first half of a write or zero; of others, nothing."""

    NOTHING = "nothing"
    HALF = "half"
    ALL = "all"


CHANGES = frozenset(Kind) - {Kind.READ}
"""Every kind but reads."""


class FaultPlan:
    """Which calls fail, and how. Shared by the storages whose calls count together.

    ``nth``: the first matching call that fails, from 1; None fails nothing and only counts. ``kinds`` and ``marks`` say what
    matches (None: any mark; reads have the mark ""). ``keep_failing``: every later match fails too. ``error``: EIO or
    ENOSPC. ``on_call(kind, mark)``: see the module.
    """

    def __init__(
        self,
        nth: int | None = None,
        *,
        kinds: Collection[Kind] = CHANGES,
        marks: Collection[str] | None = None,
        error: int = errno.EIO,
        keep_failing: bool = False,
        arrived: Arrived = Arrived.NOTHING,
        on_call: Callable[[Kind, str], None] | None = None,
    ) -> None:
        self.nth = nth
        self.kinds = frozenset(kinds)
        self.marks = None if marks is None else frozenset(marks)
        self.error = error
        self.keep_failing = keep_failing
        self.arrived = arrived
        self.on_call = on_call
        self.calls: Counter[Kind] = Counter()
        """How often each kind was called, matching or not."""
        self.matched = 0
        """How many calls matched so far."""
        self.failed = 0
        """How many of them failed."""
        self._guard = threading.Lock()
        self._inside_hook = False

    def _fails(self, kind: Kind, mark: str) -> bool:
        """Count a call, and say whether it fails."""
        with self._guard:
            self.calls[kind] += 1
            if kind not in self.kinds or (self.marks is not None and mark not in self.marks):
                return False
            self.matched += 1
            if self.nth is None or self.matched < self.nth or (self.matched > self.nth and not self.keep_failing):
                return False
            self.failed += 1
            return True

    def _run_hook(self, kind: Kind, mark: str) -> None:
        if self.on_call is None or self._inside_hook:
            return
        self._inside_hook = True
        try:
            self.on_call(kind, mark)
        finally:
            self._inside_hook = False


def _half(offset: int, length_bytes: int) -> int:
    """Bytes of the first half of a range, up to the end of a sector: none is ever torn."""
    return max(0, (offset + length_bytes // 2) // SECTOR_BYTES * SECTOR_BYTES - offset)


class FaultyStorage(StorageWrapper):
    """``inner`` with the faults of ``plan`` (None: none, only counting). Raises ``StorageFailed`` and ``NoSpace``."""

    def __init__(self, inner: Storage, plan: FaultPlan | None = None) -> None:
        super().__init__(inner)
        self.plan = FaultPlan() if plan is None else plan
        self._fence_was_lost = False

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        got = 0

        def read() -> None:
            nonlocal got
            got = self.inner.readv(offset, buffers, wait=wait)

        self._call(Kind.READ, offset, "", read)
        return got

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        def write_half() -> None:
            data = b"".join(buffers)
            half_bytes = _half(offset, len(data))
            if half_bytes:
                self.inner.writev(offset, (data[:half_bytes],), mark)

        self._call(Kind.WRITE, offset, mark, lambda: self.inner.writev(offset, buffers, mark), write_half)

    def zero(self, offset: int, length_bytes: int, mark: str) -> None:
        self._call(
            Kind.ZERO,
            offset,
            mark,
            lambda: self.inner.zero(offset, length_bytes, mark),
            lambda: self.inner.zero(offset, _half(offset, length_bytes), mark),
        )

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self._call(Kind.DISCARD, offset, mark, lambda: self.inner.discard(offset, length_bytes, mark))

    def truncate(self, size_bytes: int, mark: str) -> None:
        self._call(Kind.TRUNCATE, size_bytes, mark, lambda: self.inner.truncate(size_bytes, mark))

    def fence(self, mark: str) -> None:
        self._call(Kind.FENCE, 0, mark, self._no_fence if self._fence_was_lost else lambda: self.inner.fence(mark))

    def _no_fence(self) -> None:
        """What the host does for a fence after one that failed."""

    def _call(
        self, kind: Kind, offset: int, mark: str, whole: Callable[[], None], half: Callable[[], None] | None = None
    ) -> None:
        fails = self.plan._fails(kind, mark)
        if not fails or self.plan.arrived is Arrived.ALL:
            whole()
        elif self.plan.arrived is Arrived.HALF and half is not None:
            half()
        self.plan._run_hook(kind, mark)
        if fails:
            self._fence_was_lost |= kind is Kind.FENCE
            raise from_os_error(self.name, kind.value, offset, OSError(self.plan.error, os.strerror(self.plan.error)))
