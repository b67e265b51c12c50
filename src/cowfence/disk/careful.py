"""Disks that change when a request is durable, or whether it is carried out at all, for formats that have no option for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cowfence.disk.base import Outcome, Request, Verb
from cowfence.disk.wrapped import WrappedDisk
from cowfence.storage.base import Buffer

_WRITING: Final = (Verb.WRITE, Verb.ZERO, Verb.DISCARD)


class WriteThrough(WrappedDisk):
    """``Disk`` over ``inner``: what is written is durable when it is answered."""

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:  # noqa: ARG002
        self.inner.write(offset, data, fua=True)

    def zero(self, offset: int, length_bytes: int, *, unmap: bool = True, fua: bool = False) -> None:  # noqa: ARG002
        self.inner.zero(offset, length_bytes, unmap=unmap, fua=True)

    def discard(self, offset: int, length_bytes: int) -> None:
        self.inner.discard(offset, length_bytes)
        self.inner.flush()

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        through = [request._replace(fua=True) if request.verb in _WRITING else request for request in requests]
        return self.inner.submit(through, wait=wait)


class KeepDiscarded(WrappedDisk):
    """``Disk`` over ``inner``: what guests discard stays as it is."""

    def discard(self, offset: int, length_bytes: int) -> None:
        """See ``Disk.discard``, which allows it."""

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        kept = [index for index, request in enumerate(requests) if request.verb is not Verb.DISCARD]
        outcomes: list[Outcome] = [None] * len(requests)
        for index, outcome in zip(kept, self.inner.submit([requests[index] for index in kept], wait=wait), strict=True):
            outcomes[index] = outcome
        return outcomes
