"""What every disk for asyncio has to do."""

from __future__ import annotations

import itertools

import pytest

from cowfence.aio import AsyncDisk
from cowfence.disk.base import Request, Verb
from cowfence.errors import OutOfRange

MIB = 1 << 20
SIZE = 4 * MIB


async def exercise(disk: AsyncDisk) -> None:
    """Every kind of request, on an empty disk of ``SIZE`` that is writable."""
    assert (disk.size, disk.writable) == (SIZE, True)
    await disk.write(100, b"hello")
    await disk.write(MIB, bytearray(b"x" * 2 * MIB), fua=True)
    await disk.zero(MIB + 5, 70_000)
    await disk.discard(2 * MIB, 65536)
    await disk.flush()
    assert await disk.read(98, 9) == b"\0\0hello\0\0"
    buffer = bytearray(6)
    await disk.read_into(MIB, buffer)
    assert buffer == b"xxxxx\0"
    requests = [Request(Verb.READ, 100, 5), Request(Verb.WRITE, SIZE, 0, b"no"), Request(Verb.WRITE, 0, 0, b"ab")]
    first, second, third = await disk.submit(requests)
    assert (bytes(first or b""), type(second), third) == (b"hello", OutOfRange, None)  # type: ignore[arg-type]
    extents = [extent async for extent in disk.extents(0, SIZE)]
    assert sum(extent.length_bytes for extent in extents) == SIZE
    assert all(earlier.end == later.start for earlier, later in itertools.pairwise(extents))
    for wrong in (disk.read(SIZE, 1), disk.write(-1, b"x"), disk.zero(SIZE - 1, 2)):
        with pytest.raises(OutOfRange):
            await wrong
    with pytest.raises(OutOfRange):
        disk.extents(0, SIZE + 1)
