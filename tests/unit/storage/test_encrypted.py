"""``EncryptedStorage`` against a bytearray, and key slots changed in place at every crash point."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cowfence.codec import luks
from cowfence.codec.sectors import sector_cipher
from cowfence.ops.luks_keys import change_keys
from cowfence.qcow2.encryption import KeyChange
from cowfence.storage.base import Buffer
from cowfence.storage.encrypted import EncryptedStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.wrapper import StorageWrapper


def test_any_offset_and_length() -> None:
    rng = random.Random(1)
    inner = MemoryStorage(bytes(1024 + 64 * 512), name="file")
    storage = EncryptedStorage(inner, sector_cipher("aes", "xts-plain64", bytes(64)), 1024)
    now = bytearray(storage.size())
    assert storage.size() == 64 * 512
    storage.zero(0, len(now), "test")
    for _ in range(400):
        at = rng.randrange(len(now))
        length = min(rng.choice([1, 511, 512, 513, 5000]), len(now) - at)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            storage.writev(at, (data[: length // 3], data[length // 3 :]), "test")
            now[at : at + length] = data
        else:
            first, second = bytearray(length // 2), bytearray(length - length // 2)
            assert storage.readv(at, (first, second)) == length
            assert first + second == now[at : at + length]
    storage.discard(0, len(now), "test")
    buffer = bytearray(len(now) + 10)
    assert storage.readv(0, (buffer,)) == len(now)
    assert buffer[:-10] == now
    assert bytes(now[:4096]) not in inner.snapshot()
    assert [extent.zero for extent in storage.extents(0, 10**9)] == [False]


class _Points(StorageWrapper):
    """Keeps what the file held at each fence, and between the writes."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner)
        self.states: list[bytes] = []

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        before = self.inner.snapshot()  # type: ignore[attr-defined]
        super().writev(offset, buffers, mark)
        after = self.inner.snapshot()  # type: ignore[attr-defined]
        length = sum(map(len, buffers))
        for cut in (0, 512, length // 2 & ~511, length):
            self.states.append(after[: offset + cut] + before[offset + cut :])


def opened_by(content: bytes, passphrase: bytes) -> bool:
    header = luks.parse(content)
    return luks.unlock(header, lambda offset, length_bytes: content[offset : offset + length_bytes], passphrase) is not None


def test_keys_in_place_at_every_crash_point() -> None:
    """Whoever could open it before and after can open it at every point; who is erased cannot once it is done."""
    area, _ = luks.create(luks.NewLuks(key_bits=128, chaining="cbc", iter_time_ms=1), b"one")
    memory = MemoryStorage(area + bytes(4096), name="file")
    points = _Points(memory)
    change_keys(points, KeyChange(new_secret=b"two", iter_time_ms=1), [b"one"])
    assert len(points.states) >= 12
    assert all(opened_by(state, b"one") for state in points.states)
    assert opened_by(memory.snapshot(), b"two")
    points = _Points(memory)
    change_keys(points, KeyChange(old_secret=b"one"), [])
    assert all(opened_by(state, b"two") for state in points.states)
    assert not opened_by(memory.snapshot(), b"one")
    start = luks.parse(area).slots[0].material_sector * 512
    assert area[start : start + 512] not in memory.snapshot()
    assert memory.snapshot()[len(area) :] == bytes(4096)
