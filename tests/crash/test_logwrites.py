"""dm-log-writes logs: made by hand, broken in every place, and written by QEMU."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.crash.logwrites import MAGIC, Flag, LogEntry, entries_of, operations_of, read_log
from cowfence.errors import Corrupt, Invalid
from cowfence.storage.oplog import Discard, Done, Fence, Note, Write
from judges import run


def entry(
    sector: int, data: bytes = b"", flags: int = 0, *, sectors: int | None = None, mark: bytes = b"", size: int = 512
) -> bytes:
    count = len(data) // size if sectors is None else sectors
    return (struct.pack("<QQQQ", sector, count, flags, len(mark)) + mark).ljust(size, b"\0") + data


def log(*entries: bytes, count: int | None = None, version: int = 1, size: int = 512) -> bytes:
    head = struct.pack("<QQQI", MAGIC, version, len(entries) if count is None else count, size).ljust(size, b"\0")
    return head + b"".join(entries)


A, B = b"a" * 512, b"b" * 1024


def test_entries_are_read_with_their_places_in_bytes() -> None:
    found = list(read_log(log(entry(3, A), entry(8, B), entry(0, flags=Flag.FLUSH))))
    assert found == [
        LogEntry(0, 3 * 512, 512, Flag(0), A),
        LogEntry(1, 8 * 512, 1024, Flag(0), B),
        LogEntry(2, 0, 0, Flag.FLUSH, b""),
    ]


def test_sectors_may_be_larger() -> None:
    data = b"x" * 4096
    (found,) = read_log(log(entry(2, data, size=4096), size=4096))
    assert (found.offset, found.data) == (8192, data)


def test_a_log_goes_on_behind_its_count_and_ends_at_a_torn_entry() -> None:
    whole = log(entry(0, A), entry(1, A), entry(2, B), count=1)
    assert len(list(read_log(whole))) == 3
    assert len(list(read_log(whole[:-1]))) == 2
    assert len(list(read_log(whole + b"\xff" * 512))) == 3


def test_flags_say_what_is_fenced() -> None:
    def marks(flags: Flag) -> list[str]:
        return [type(one).__name__ for one in operations_of(LogEntry(0, 0, 512, flags, A), "f")]

    assert marks(Flag(0)) == ["Write"]
    assert marks(Flag.FLUSH) == ["Fence", "Write"]
    assert marks(Flag.FUA) == ["Write", "Fence"]
    assert marks(Flag.FLUSH | Flag.FUA) == ["Fence", "Write", "Fence"]


def test_a_mark_is_text_and_changes_nothing() -> None:
    content = log(entry(0, flags=Flag.MARK, mark=b"mkfs"), entry(1, A))
    assert next(read_log(content)).data == b"mkfs"
    assert [type(one) for one in entries_of(content, "f")] == [Write, Done]


def test_a_discard_is_zeroed_or_unchanged() -> None:
    content = log(entry(4, flags=Flag.DISCARD, sectors=2), entry(1, A))
    zeroed = entries_of(content, "f", discards="zeroed")
    assert isinstance(zeroed[0], Discard)
    assert (zeroed[0].offset, zeroed[0].length_bytes) == (2048, 1024)
    assert [type(one) for one in entries_of(content, "f", discards="unchanged")] == [Write, Done]
    with pytest.raises(Invalid):
        entries_of(content, "f", discards="perhaps")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "no magic"),
        (b"QFI\xfb" + bytes(600), "no magic"),
        (log(version=2), "version 2"),
        (log(size=512)[:24] + struct.pack("<I", 3) + bytes(500), "sector size of 3"),
        (log(size=512)[:24] + struct.pack("<I", 1 << 30) + bytes(500), "sector size"),
        (log(entry(0, A), count=2), "ends after 1"),
        (log(entry(0, A, sectors=2)), "needs 1024 bytes"),
        (log(entry(0, A, sectors=1 << 50)), "needs"),
        (log(entry(1 << 60, A)), "past any file's end"),
        (log(entry(0, A, flags=64)), "unknown flags 0x40"),
        (log(struct.pack("<QQQQ", 0, 0, 8, 600).ljust(512, b"\0")), "a mark of 600"),
        (log(entry(0))[:-490], "ends inside"),
    ],
)
def test_what_breaks_the_format_is_refused_by_name(content: bytes, what: str) -> None:
    with pytest.raises(Corrupt, match=what):
        list(read_log(content))


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=40))
def test_hostile_logs_are_read_or_corrupt(at: int, junk: bytes) -> None:
    content = bytearray(log(entry(3, A), entry(8, B, Flag.FLUSH), entry(1, flags=Flag.DISCARD, sectors=2)))
    content[at : at + len(junk)] = junk
    try:
        for one in read_log(bytes(content)):
            assert len(one.data) <= len(content)
    except Corrupt:
        pass


def test_qemus_own_log_gives_the_image(tmp_path: Path) -> None:
    image, log_file = tmp_path / "i.qcow2", tmp_path / "log"
    run(["qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4k", image, "256k"])
    before = bytearray(image.read_bytes())
    log_file.touch()
    options = f"driver=qcow2,file.driver=blklogwrites,file.file.driver=file,file.file.filename={image}"
    options += f",file.log.driver=file,file.log.filename={log_file}"
    run(["qemu-io", "--image-opts", options, "-c", "write -P 7 4k 8k", "-c", "flush", "-c", "write -f -P 9 0 512"])
    operations = entries_of(log_file.read_bytes(), "image")
    assert any(isinstance(one, Fence) for one in operations)
    for one in operations:
        if isinstance(one, Write):
            before.extend(bytes(max(0, one.offset + len(one.data) - len(before))))
            before[one.offset : one.offset + len(one.data)] = one.data
    assert not any(isinstance(one, Note) for one in operations)
    assert bytes(before) == image.read_bytes()
