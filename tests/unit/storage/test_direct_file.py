"""Direct I/O on any offset and length, against a bytearray."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfence.errors import Invalid, WouldBlock
from cowfence.storage.base import read_exact
from cowfence.storage.direct import DirectFileStorage
from cowfence.storage.file import FileStorage


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[FileStorage]:
    path = tmp_path / "file"
    path.touch()
    try:
        storage = FileStorage.open(path, writable=True, direct=True)
    except Invalid as exc:
        pytest.skip(str(exc))
    yield storage
    storage.close()


def test_it_is_the_direct_kind_and_names_its_alignment(direct: FileStorage) -> None:
    assert isinstance(direct, DirectFileStorage)
    assert direct.capabilities().alignment_bytes in (512, 1024, 2048, 4096)


def test_reads_that_must_not_wait_are_never_served(direct: FileStorage) -> None:
    with pytest.raises(WouldBlock):
        direct.readv(0, (bytearray(1),), wait=False)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_agree_with_a_bytearray(direct: FileStorage, seed: int) -> None:
    choose = random.Random(seed)
    model = bytearray()
    for _ in range(60):
        offset = choose.choice((choose.randrange(20_000), choose.randrange(5) * 4096, len(model)))
        length = choose.choice((choose.randrange(1, 600), choose.randrange(1, 10_000), 4096, 8192))
        verb = choose.choice(("write", "write", "vector", "zero", "truncate"))
        if verb == "truncate":
            direct.truncate(offset, "test")
            del model[offset:]
            model.extend(bytes(offset - len(model)))
        else:
            data = bytes(length) if verb == "zero" else choose.randbytes(length)
            if verb == "zero":
                direct.zero(offset, length, "test")
            elif verb == "write":
                direct.writev(offset, (data,), "test")
            else:
                direct.writev(offset, (data[:13], data[13:]), "test")
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
        assert direct.size() == len(model)
        assert read_exact(direct, 0, len(model), "content") == model
        start = choose.randrange(len(model) + 1)
        buffers = (bytearray(17), bytearray(choose.randrange(6000)))
        got = direct.readv(start, buffers)
        assert b"".join(buffers)[:got] == model[start : start + got]
        assert got == min(len(model) - start, 17 + len(buffers[1]))
