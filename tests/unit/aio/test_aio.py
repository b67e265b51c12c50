"""The library for asyncio: slow requests overlap, a cancellation tears nothing, and a disk always ends flushed and closed."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import cowfence
import cowfence.aio
from cowfence.aio import PooledDisk
from cowfence.disk.raw import RawDisk
from cowfence.errors import Closed, Invalid, ReadOnly, StorageFailed
from cowfence.storage.base import Buffer, WritableBuffer
from helpers_aio import SIZE, exercise
from helpers_storage import TinyStorage

MIB = 1 << 20


class SlowStorage(TinyStorage):
    """Reads of a range in ``held``, fences and discards wait for ``gate``; writes go out in pieces, with ``pause_seconds``
    between them."""

    def __init__(self, size_bytes: int = SIZE) -> None:
        super().__init__(size_bytes)
        self.cold = True
        self.gate = None
        self.held: range = range(0)
        self.hold = threading.Event()
        self.hold.set()
        self.begun = threading.Semaphore(0)
        self.pause_seconds = 0.0
        self.piece_bytes = 512

    def _wait(self) -> None:
        self.begun.release()
        assert self.hold.wait(10)

    def readv(self, offset: int, buffers: Sequence[WritableBuffer], *, wait: bool = True) -> int:
        if wait and offset in self.held:
            self._wait()
        return super().readv(offset, buffers, wait=wait)

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        for buffer in buffers:
            for at in range(0, len(buffer), self.piece_bytes):
                super().writev(offset + at, (memoryview(buffer)[at : at + self.piece_bytes],), mark)
                if self.pause_seconds:
                    time.sleep(self.pause_seconds)
            offset += len(buffer)

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        self._wait()
        super().discard(offset, length_bytes, mark)

    def fence(self, mark: str) -> None:
        self._wait()
        super().fence(mark)


async def begun(storage: SlowStorage, count: int = 1) -> None:
    """Until so many calls of the storage wait."""
    for _ in range(count):
        assert await asyncio.to_thread(storage.begun.acquire, timeout=10)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_everything(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        if kind == "raw":
            (tmp_path / "disk").write_bytes(bytes(SIZE))
            opening = cowfence.aio.open(tmp_path / "disk", writable=True, format="raw")
        else:
            opening = cowfence.aio.create(tmp_path / "disk", SIZE)
        async with opening as disk:
            await exercise(disk)
        for late in (disk.read(0, 1), disk.write(0, b"x"), disk.flush(), disk.submit([])):
            with pytest.raises(Closed):
                await late
        await disk.close()
        again = await cowfence.aio.open(tmp_path / "disk", format=kind)
        assert not again.writable
        assert await again.read(100, 5) == b"hello"
        with pytest.raises(ReadOnly):
            await again.write(0, b"x")
        await again.close()

    asyncio.run(main())


def test_an_exception_inside_closes(tmp_path: Path) -> None:
    async def main() -> None:
        async with cowfence.aio.create(tmp_path / "disk", SIZE) as disk:
            await disk.write(0, b"kept")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(main())
    with cowfence.open(tmp_path / "disk", writable=True) as disk:  # neither locked nor lost
        assert disk.read(0, 4) == b"kept"


def test_what_blocks_does_not_stop_the_others() -> None:
    async def main() -> None:
        storage = SlowStorage()
        storage.held = range(512)
        async with PooledDisk(RawDisk(storage)) as disk:
            storage.hold.clear()
            held = [asyncio.create_task(disk.read(0, 10)), asyncio.create_task(disk.zero(MIB, 512))]
            await begun(storage, 2)
            await disk.write(4096, b"others")
            held.append(asyncio.create_task(disk.flush()))
            await begun(storage)
            assert await disk.read(4096, 6) == b"others"
            await asyncio.gather(*(disk.read(8192 * index, 8192) for index in range(1, 100)))
            assert not any(task.done() for task in held)
            storage.hold.set()
            assert await held[0] == bytes(10)
            await asyncio.gather(*held[1:])

    asyncio.run(main())


def test_the_queue_is_bounded_and_drains() -> None:
    async def main() -> None:
        storage = SlowStorage()
        storage.held = range(SIZE)
        async with PooledDisk(RawDisk(storage), workers=2) as disk:
            storage.hold.clear()
            reads = [asyncio.create_task(disk.read(index, 1)) for index in range(300)]
            reads.append(asyncio.create_task(disk.read(0, 300)))
            await begun(storage, 2)
            assert disk._pool._work_queue.qsize() <= 64
            storage.hold.set()
            assert b"".join((await asyncio.gather(*reads))[:300]) == bytes(300)

    asyncio.run(main())


@pytest.mark.parametrize("step", range(12))
def test_a_cancelled_write_never_tears(step: int) -> None:
    old, new, later = b"o" * 8192, bytearray(b"n" * 8192), b"l" * 4096

    async def main() -> tuple[SlowStorage, bytes, bool]:
        storage = SlowStorage()
        async with PooledDisk(RawDisk(storage), workers=2) as disk:
            await disk.write(0, old)
            storage.pause_seconds = 0.0005
            task = asyncio.create_task(disk.write(0, new, fua=True))
            await asyncio.sleep(step * 0.001)
            done = not task.cancel()
            await asyncio.sleep(0.0005)
            assert task.done()
            new[:] = b"?" * len(new)
            found = await disk.read(0, 8192)
            await disk.write(4096, later)
        return storage, found, done

    storage, found, done = asyncio.run(main())
    assert found in (old, b"n" * 8192)
    assert not done or found == b"n" * 8192
    assert storage.bytes[:8192] == found[:4096] + later
    assert storage.closed


def test_close_waits_for_what_was_cancelled() -> None:
    async def main() -> SlowStorage:
        storage = SlowStorage()
        disk = PooledDisk(RawDisk(storage))
        storage.hold.clear()
        changes = [asyncio.create_task(disk.zero(0, 512)), asyncio.create_task(disk.flush())]
        storage.bytes[:512] = b"o" * 512
        await begun(storage)
        for task in changes:
            task.cancel()
        await asyncio.wait(changes)
        closing = asyncio.create_task(disk.close())
        await asyncio.sleep(0.02)
        assert not closing.done()
        with pytest.raises(Closed):
            await disk.read(0, 1)
        closing.cancel()  # it goes on
        storage.hold.set()
        await disk.close()
        assert storage.closed
        return storage

    assert asyncio.run(main()).bytes[:512] == bytes(512)


def test_what_was_not_begun_is_not_done() -> None:
    async def main() -> SlowStorage:
        storage = SlowStorage()
        storage.held = range(512)
        async with PooledDisk(RawDisk(storage), workers=1) as disk:
            storage.hold.clear()
            blocker = asyncio.create_task(disk.read(0, 1))
            await begun(storage)
            queued = [asyncio.create_task(disk.write(512 * index, b"x", fua=True)) for index in range(1, 200)]
            await asyncio.sleep(0.01)
            for task in queued:
                task.cancel()
            await asyncio.wait(queued)
            storage.hold.set()
            await blocker
            assert all(task.cancelled() for task in queued)
        return storage

    assert not any(asyncio.run(main()).bytes)


def test_cancelled_reads_leave_the_buffer_alone() -> None:
    async def main() -> None:
        storage = SlowStorage()
        storage.held = range(SIZE)
        async with PooledDisk(RawDisk(storage)) as disk:
            storage.hold.clear()
            buffer = bytearray(b"mine")
            task = asyncio.create_task(disk.read_into(0, buffer))
            await begun(storage)
            task.cancel()
            await asyncio.wait((task,))
            storage.hold.set()
        assert buffer == b"mine"

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(6))
def test_many_tasks_and_cancellations_on_an_image(tmp_path: Path, seed: int) -> None:
    """Each write is whole or absent; what was acknowledged is there."""
    rng = random.Random(seed)
    regions = 24
    length = 3 * 4096 + 100
    path = tmp_path / "disk"
    acknowledged: dict[int, int] = {}
    last: dict[int, set[int]] = {region: {0} for region in range(regions)}

    async def writer(disk: cowfence.aio.AsyncDisk, region: int) -> None:
        for version in range(1, 6):
            last[region].add(version)
            await disk.write(region * length, bytes([version]) * length, fua=rng.random() < 0.5)
            acknowledged[region] = version
            last[region] = {version}
            if rng.random() < 0.3:
                await disk.flush()

    async def main() -> None:
        async with cowfence.aio.create(path, SIZE, cluster_size=4096) as disk:
            tasks = [asyncio.create_task(writer(disk, region)) for region in range(regions)]
            for task in tasks:
                await asyncio.sleep(rng.random() * 0.004)
                if rng.random() < 0.6:
                    task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() or task.exception() is None for task in tasks)

    asyncio.run(main())
    with cowfence.open(path) as disk:
        for region in range(regions):
            found = disk.read(region * length, length)
            assert found == found[:1] * length
            assert found[0] in last[region]
            assert found[0] >= acknowledged.get(region, 0)


def test_errors_come_through() -> None:
    async def main() -> None:
        storage = SlowStorage()
        broken = OSError(5, "broken")
        storage.failing["fence"] = StorageFailed("tiny", "fence", 0, broken)
        storage.failing["readv"] = StorageFailed("tiny", "readv", 0, broken)
        disk = PooledDisk(RawDisk(storage))
        with pytest.raises(StorageFailed, match="readv"):
            await disk.read(0, 1)
        await disk.write(0, b"x")
        with pytest.raises(StorageFailed, match="fence"):
            await disk.close()
        assert storage.closed
        await disk.close()

    asyncio.run(main())


def test_another_loop_and_another_process(tmp_path: Path) -> None:
    kept: list[PooledDisk] = []

    async def main() -> None:
        async with cowfence.aio.create(tmp_path / "disk", SIZE) as disk:
            kept.append(disk)
            await asyncio.to_thread(refused)
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    refused_in_child(disk)
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
            await disk.write(0, b"still ours")
            assert await disk.read(0, 5) == b"still"

    def refused() -> None:
        with pytest.raises(Invalid, match="event loop"):
            asyncio.run(kept[0].read(0, 1))
        with pytest.raises(Invalid, match="event loop"):
            asyncio.run(kept[0].close())

    asyncio.run(main())
    with cowfence.open(tmp_path / "disk") as disk:
        assert disk.read(0, 10) == b"still ours"


def refused_in_child(disk: cowfence.aio.AsyncDisk) -> None:
    for use in (disk.read(0, 1), disk.flush()):
        with pytest.raises(Closed, match="process"):
            use.send(None)
    with pytest.raises(StopIteration):
        disk.close().send(None)


def test_an_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    cowfence.create(tmp_path / "disk", SIZE).close()

    async def main(delay_seconds: float) -> None:
        task = asyncio.create_task(holding(tmp_path / "disk"))
        await asyncio.sleep(delay_seconds)
        task.cancel()
        await asyncio.wait((task,))

    for step in range(10):
        asyncio.run(main(step * 0.0005))
        end = time.monotonic() + 5
        while True:
            try:
                cowfence.open(tmp_path / "disk", writable=True).close()
                break
            except cowfence.Locked:  # the thread is still at it
                assert time.monotonic() < end
                time.sleep(0.001)


async def holding(path: Path) -> None:
    async with cowfence.aio.open(path, writable=True):
        await asyncio.sleep(10)


def test_the_end_of_the_loop_closes_what_is_closing() -> None:
    storage = SlowStorage()

    async def main() -> None:
        disk = PooledDisk(RawDisk(storage))
        storage.hold.clear()
        task = asyncio.create_task(disk.zero(0, 512))
        await begun(storage)
        task.cancel()
        closing = asyncio.create_task(disk.close())
        await asyncio.sleep(0.01)
        assert task.cancelled()
        assert not closing.done()
        threading.Timer(0.05, storage.hold.set).start()

    asyncio.run(main())
    end = time.monotonic() + 5
    while not storage.closed:
        assert time.monotonic() < end
        time.sleep(0.005)
