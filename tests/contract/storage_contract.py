"""What every ``Storage`` must do, as one suite. A test class for an implementation derives from it and says how to make one."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import pytest

from cowfence.errors import Closed, Invalid, ReadOnly, WouldBlock
from cowfence.storage.base import Storage, read_exact, read_padded

MakeStorage = Callable[..., Storage]


class StorageContract(ABC):
    """Derive, and define ``build``. Every storage that a test makes is closed at its end."""

    @abstractmethod
    def build(self, initial: bytes, *, writable: bool) -> Storage:
        """A storage whose file holds ``initial``."""

    @pytest.fixture
    def make(self) -> Iterator[MakeStorage]:
        made: list[Storage] = []

        def make(initial: bytes = b"", *, writable: bool = True) -> Storage:
            made.append(self.build(initial, writable=writable))
            return made[-1]

        yield make
        for storage in made:
            storage.close()

    def content(self, storage: Storage) -> bytes:
        return bytes(read_exact(storage, 0, storage.size(), "content"))

    def test_reads_what_is_there_and_stops_short_only_at_the_end(self, make: MakeStorage) -> None:
        storage = make(b"0123456789")
        buffer = bytearray(4)
        assert storage.readv(2, (buffer,)) == 4
        assert buffer == b"2345"
        assert storage.readv(8, (buffer,)) == 2
        assert buffer == b"8945"
        assert storage.readv(10, (buffer,)) == 0
        assert storage.readv(1000, (buffer,)) == 0

    def test_a_read_fills_its_buffers_in_turn(self, make: MakeStorage) -> None:
        storage = make(b"abcdefgh")
        buffers = (bytearray(1), bytearray(0), memoryview(bytearray(3)), bytearray(9))
        assert storage.readv(1, buffers) == 7
        assert [bytes(buffer) for buffer in buffers] == [b"b", b"", b"cde", b"fgh" + bytes(6)]
        assert storage.readv(0, ()) == 0

    def test_more_buffers_than_one_system_call_takes(self, make: MakeStorage) -> None:
        storage = make()
        pieces = [bytes([n % 251]) * 3 for n in range(2500)]
        storage.writev(7, pieces, "test")
        buffers = [bytearray(3) for _ in pieces]
        assert storage.readv(7, buffers) == 7500
        assert buffers == pieces

    def test_read_padded_gives_zeros_past_the_end(self, make: MakeStorage) -> None:
        buffer = bytearray(b"....")
        read_padded(make(b"xy"), 0, buffer)
        assert buffer == b"xy\0\0"

    def test_a_write_grows_the_file_and_the_gap_reads_as_zeros(self, make: MakeStorage) -> None:
        storage = make(b"ab")
        storage.writev(5000, (b"cd", b"", memoryview(b"ef")), "test")
        assert storage.size() == 5004
        assert self.content(storage) == b"ab" + bytes(4998) + b"cdef"

    def test_a_write_inside_changes_nothing_else(self, make: MakeStorage) -> None:
        before = bytes(range(256)) * 40
        for offset, length in ((0, 1), (511, 2), (4095, 2), (4096, 4096), (1, 9000), (10239, 1), (8192, 2048)):
            storage = make(before)
            storage.writev(offset, (b"\xee" * length,), "test")
            assert self.content(storage) == before[:offset] + b"\xee" * length + before[offset + length :]

    def test_writes_of_nothing_do_nothing(self, make: MakeStorage) -> None:
        storage = make(b"abc")
        storage.writev(100, (), "test")
        storage.writev(100, (b"", b""), "test")
        storage.zero(100, 0, "test")
        storage.discard(0, 0, "test")
        assert self.content(storage) == b"abc"

    def test_big_transfers_at_odd_offsets(self, make: MakeStorage) -> None:
        data = bytes(range(253)) * 12500  # 3 MiB: several bounce buffers
        storage = make(b"head")
        storage.writev(1021, (data,), "test")
        assert storage.size() == 1021 + len(data)
        buffer = bytearray(len(data) + 100)
        assert storage.readv(1021, (buffer,)) == len(data)
        assert buffer[: len(data)] == data

    def test_zero_clears_a_range_and_grows_the_file(self, make: MakeStorage) -> None:
        before = b"\xaa" * 20000
        for offset, length in ((0, 20000), (1, 8190), (4096, 4096), (19999, 1), (19000, 5000), (30000, 10000)):
            storage = make(before)
            storage.zero(offset, length, "test")
            expected = bytearray(before.ljust(offset + length, b"\0"))
            expected[offset : offset + length] = bytes(length)
            assert self.content(storage) == expected

    def test_discard_keeps_the_length_and_what_lies_around(self, make: MakeStorage) -> None:
        storage = make(b"\xaa" * 20000)
        storage.discard(5000, 8000, "test")
        storage.discard(19000, 50000, "test")
        storage.discard(70000, 4096, "test")
        content = self.content(storage)
        assert len(content) == 20000
        assert content[:5000] == b"\xaa" * 5000
        assert content[13000:19000] == b"\xaa" * 6000

    def test_truncate_cuts_and_what_grows_again_is_zeros(self, make: MakeStorage) -> None:
        storage = make(b"\xaa" * 9000)
        storage.truncate(5000, "test")
        storage.truncate(9001, "test")
        assert self.content(storage) == b"\xaa" * 5000 + bytes(4001)
        storage.truncate(0, "test")
        assert storage.size() == 0

    def test_fences_return_and_may_be_repeated(self, make: MakeStorage) -> None:
        storage = make()
        storage.writev(0, (b"x",), "test")
        storage.fence("test")
        storage.fence("test")

    def test_reads_that_must_not_wait_give_the_same_bytes_or_say_so(self, make: MakeStorage) -> None:
        storage = make(bytes(range(256)) * 16)
        buffer = bytearray(100)
        try:
            got = storage.readv(4050, (buffer,), wait=False)
        except WouldBlock:
            return
        assert got == 46
        assert buffer[:46] == (bytes(range(256)) * 16)[4050:]

    def test_cached_bytes_are_the_files_or_it_says_so(self, make: MakeStorage) -> None:
        content = bytes(range(256)) * 16
        storage = make(content)
        try:
            # Twice: the first may find out what the host can do.
            assert [storage.read_cached(at, 100) for at in (0, 10, 4050, 4096, 9999)] == [
                content[at : at + 100] for at in (0, 10, 4050, 4096, 9999)
            ]
            assert storage.read_cached(10, 100) == content[10:110]
            with pytest.raises(Invalid):
                storage.read_cached(-1, 1)
        except WouldBlock:
            return

    def test_extents_cover_the_range_in_order_and_holes_read_as_zeros(self, make: MakeStorage) -> None:
        storage = make()
        storage.writev(300_000, (b"\xaa" * 5000,), "test")
        storage.truncate(900_000, "test")
        for offset, length in ((0, 900_000), (0, 2_000_000), (1234, 300_000), (299_999, 3), (500_000, 10)):
            position = offset
            for extent in storage.extents(offset, length):
                assert extent.start == position
                assert extent.length_bytes > 0
                assert extent.host_offset == position
                position = extent.end
                if extent.zero:
                    assert not any(read_exact(storage, extent.start, extent.length_bytes, "hole"))
            assert position == min(offset + length, 900_000)
        assert list(storage.extents(900_000, 10)) == []
        assert list(storage.extents(0, 0)) == []

    def test_a_read_only_storage_reads_and_refuses_every_change(self, make: MakeStorage) -> None:
        storage = make(b"abcd", writable=False)
        assert not storage.writable
        changes: tuple[Callable[[], object], ...] = (
            lambda: storage.writev(0, (b"x",), "test"),
            lambda: storage.zero(0, 1, "test"),
            lambda: storage.discard(0, 1, "test"),
            lambda: storage.truncate(0, "test"),
        )
        for change in changes:
            with pytest.raises(ReadOnly):
                change()
        storage.fence("test")
        assert self.content(storage) == b"abcd"

    def test_after_close_every_call_says_closed(self, make: MakeStorage) -> None:
        storage = make(b"abcd")
        storage.close()
        storage.close()
        calls: tuple[Callable[[], object], ...] = (
            lambda: storage.readv(0, (bytearray(1),)),
            lambda: storage.readv(0, (bytearray(1), bytearray(1))),
            lambda: storage.writev(0, (b"x",), "test"),
            lambda: storage.writev(0, (b"x", b"y"), "test"),
            lambda: storage.zero(0, 1, "test"),
            lambda: storage.discard(0, 1, "test"),
            lambda: storage.truncate(0, "test"),
            lambda: storage.fence("test"),
            lambda: storage.size(),
            lambda: list(storage.extents(0, 1)),
        )
        for call in calls:
            with pytest.raises(Closed):
                call()

    def test_a_negative_offset_is_refused(self, make: MakeStorage) -> None:
        storage = make(b"abcd")
        with pytest.raises(Invalid):
            storage.readv(-1, (bytearray(1),))
        with pytest.raises(Invalid):
            storage.writev(-1, (b"x",), "test")

    def test_it_says_what_it_can_do(self, make: MakeStorage) -> None:
        storage = make()
        capabilities = storage.capabilities()
        assert capabilities.alignment_bytes >= 1
        assert capabilities.atomic_bytes == 512
        assert capabilities.holes_past_end
        assert storage.name
        assert storage.writable

    def test_neighbours_written_by_threads_do_not_lose_each_others_bytes(self, make: MakeStorage) -> None:
        storage = make(bytes(4096))

        def write(worker: int) -> None:
            for turn in range(20):
                for position in range(worker * 100, 4096, 400):
                    storage.writev(position, (bytes([worker + 1 + turn]) * min(100, 4096 - position),), "test")

        workers = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert self.content(storage) == b"".join(bytes([n // 100 % 4 + 20]) for n in range(4096))
