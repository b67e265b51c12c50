"""``DetectZeroes``: a disk to which writes of nothing but zeros are told as zeroing, so that they need not take space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cowfence.disk.base import Disk, Outcome, Request, Verb, in_bytes
from cowfence.disk.wrapped import WrappedDisk
from cowfence.storage.base import Buffer
from cowfence.units import MIB

_ZEROS: Final = memoryview(bytes(MIB))


class DetectZeroes(WrappedDisk):
    """``Disk`` over ``inner``. ``unmap``: what is zeroed so may give its space back."""

    def __init__(self, inner: Disk, *, unmap: bool) -> None:
        super().__init__(inner)
        self._unmap = unmap

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        if is_zero(data):
            self.inner.zero(offset, len(in_bytes(data)), unmap=self._unmap, fua=fua)
        else:
            self.inner.write(offset, data, fua=fua)

    def submit(self, requests: Sequence[Request], *, wait: bool = True) -> list[Outcome]:
        return self.inner.submit([self._looked_at(request) for request in requests], wait=wait)

    def _looked_at(self, request: Request) -> Request:
        if request.verb is not Verb.WRITE or not is_zero(request.data):
            return request
        return Request(Verb.ZERO, request.offset, len(in_bytes(request.data)), fua=request.fua, unmap=self._unmap)


def is_zero(data: Buffer) -> bool:
    """True for data of at least one byte that is all zeros; what is not mostly shows it at once."""
    view = memoryview(data).cast("B")
    return len(view) > 0 and all(
        view[at : at + len(_ZEROS)] == _ZEROS[: min(len(_ZEROS), len(view) - at)] for at in range(0, len(view), len(_ZEROS))
    )
