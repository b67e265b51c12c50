"""An L2 entry that leads past the end of the file: reads and writes refuse it, and the file stays as long as it was."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import cowfence


@pytest.mark.parametrize("host", [1 << 50, 1 << 40, 1 << 30])
def test_a_write_in_place_past_the_end_is_refused(tmp_path: Path, host: int) -> None:
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, 1 << 24) as disk:
        disk.write(0, b"x" * 65536)
    image = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", image, 40)
    (l2,) = struct.unpack_from(">Q", image, l1)
    struct.pack_into(">Q", image, l2 & 0x00FF_FFFF_FFFF_FE00, 1 << 63 | host)
    path.write_bytes(image)
    with cowfence.open(path, writable=True) as disk:
        for data in (b"y" * 65536, b"y"):
            with pytest.raises(cowfence.Corrupt, match="past the end of the file"):
                disk.write(0, data)
            for wait in (False, True):
                outcome = disk.submit([cowfence.Request(cowfence.Verb.WRITE, 0, len(data), data)], wait=wait)[0]
                assert isinstance(outcome, cowfence.Corrupt)
        disk.write(65536, b"z" * 65536)
    assert path.stat().st_size < len(image) + (1 << 20)
