"""Image locks: mutual refusal with QEMU, between ourselves, and across fork."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import judges
from cowfence.errors import Invalid, Locked
from cowfence.storage import locks
from cowfence.storage.file import FileStorage


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "qemu.qcow2"
    judges.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"])
    return path


def held_bytes(path: Path) -> set[int]:
    """The bytes of the file that anybody holds a lock on, from the kernel's list."""
    inode = f":{path.stat().st_ino} "
    held: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        if inode in line and "OFDLCK" in line:
            first, last = line.split()[-2:]
            held.update(range(int(first), int(last) + 1))
    return held


@contextmanager
def qemu_holds(path: Path, *options: str) -> Iterator[None]:
    """qemu-io with the image open until the block ends."""
    with subprocess.Popen(
        [judges.require("qemu-io"), "-f", "qcow2", *options, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + 20
            while not held_bytes(path) and time.monotonic() < deadline:
                time.sleep(0.01)
            # The first byte is taken some instants before the last one; qemu-io then waits for a command.
            time.sleep(0.2)
            yield
        finally:
            process.communicate(b"quit\n", timeout=20)


def may_open(path: Path, *, writable: bool, force_share: bool = False) -> bool:
    try:
        FileStorage.open(path, writable=writable, force_share=force_share).close()
    except Locked:
        return False
    return True


def test_a_writer_refuses_writers_and_readers_but_not_a_forced_reader(image: Path) -> None:
    writer = FileStorage.open(image, writable=True)
    assert not may_open(image, writable=True)
    assert not may_open(image, writable=False)
    assert may_open(image, writable=False, force_share=True)
    writer.close()
    assert may_open(image, writable=True)


def test_readers_coexist_and_keep_writers_out(image: Path) -> None:
    first, second = FileStorage.open(image), FileStorage.open(image)
    assert not may_open(image, writable=True)
    first.close()
    assert not may_open(image, writable=True)
    second.close()
    assert may_open(image, writable=True)


def test_a_forced_reader_keeps_nobody_out(image: Path) -> None:
    reader = FileStorage.open(image, force_share=True)
    assert may_open(image, writable=True)
    reader.close()


def test_a_writer_cannot_force(image: Path) -> None:
    with pytest.raises(Invalid):
        FileStorage.open(image, writable=True, force_share=True)


def test_the_refusal_says_what_to_do(image: Path) -> None:
    writer = FileStorage.open(image, writable=True)
    with pytest.raises(Locked, match=r"in use by another process.*--force-share \(-U\)"):
        FileStorage.open(image)
    with pytest.raises(Locked, match="in use by another process") as refused:
        FileStorage.open(image, writable=True)
    assert "force" not in str(refused.value)
    writer.close()


def test_a_refused_open_leaves_no_lock_behind(image: Path) -> None:
    reader = FileStorage.open(image)
    before = held_bytes(image)
    assert not may_open(image, writable=True)
    assert held_bytes(image) == before
    reader.close()
    assert held_bytes(image) == set()


def test_without_lock_nothing_is_held_or_asked(image: Path) -> None:
    writer = FileStorage.open(image, writable=True)
    FileStorage.open(image, writable=True, lock=False).close()
    assert not may_open(image, writable=True)
    writer.close()


def test_we_hold_the_bytes_that_qemu_holds(qcow2: Path) -> None:
    choices: list[tuple[Callable[[], FileStorage], tuple[str, ...]]] = [
        (lambda: FileStorage.open(qcow2, writable=True), ()),
        (lambda: FileStorage.open(qcow2), ("-r",)),
        (lambda: FileStorage.open(qcow2, force_share=True), ("-r", "-U")),
    ]
    for ours, options in choices:
        storage = ours()
        our_bytes = held_bytes(qcow2)
        storage.close()
        with qemu_holds(qcow2, *options):
            assert held_bytes(qcow2) == our_bytes, options


def test_qemu_writing_keeps_us_out(qcow2: Path) -> None:
    with qemu_holds(qcow2):
        assert not may_open(qcow2, writable=True)
        assert not may_open(qcow2, writable=False)
        assert may_open(qcow2, writable=False, force_share=True)
    assert may_open(qcow2, writable=True)


def test_qemu_reading_keeps_our_writer_out_only(qcow2: Path) -> None:
    with qemu_holds(qcow2, "-r"):
        assert not may_open(qcow2, writable=True)
        assert may_open(qcow2, writable=False)


def test_our_writer_keeps_qemu_out(qcow2: Path) -> None:
    writer = FileStorage.open(qcow2, writable=True)
    refused = judges.run(["qemu-img", "info", qcow2], check=False)
    assert refused.returncode == 1
    assert 'Failed to get shared "write" lock' in refused.stderr
    assert judges.run(["qemu-img", "info", "-U", qcow2], check=False).returncode == 0
    assert judges.run(["qemu-img", "resize", "-q", qcow2, "2M"], check=False).returncode == 1
    writer.close()
    judges.run(["qemu-img", "resize", "-q", qcow2, "2M"])


def test_our_reader_keeps_qemu_from_writing_only(qcow2: Path) -> None:
    reader = FileStorage.open(qcow2)
    judges.run(["qemu-img", "info", qcow2])
    refused = judges.run(["qemu-img", "resize", "-q", qcow2, "2M"], check=False)
    assert refused.returncode == 1
    assert 'Failed to get "write" lock' in refused.stderr
    reader.close()


def test_a_forked_child_that_closes_unlocks_nothing(image: Path) -> None:
    writer = FileStorage.open(image, writable=True)
    before = held_bytes(image)
    child = os.fork()
    if child == 0:
        writer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert held_bytes(image) == before
    assert not may_open(image, writable=True)
    writer.close()


def test_a_clean_close_unlocks_although_another_process_holds_the_description(image: Path) -> None:
    writer = FileStorage.open(image, writable=True)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(writer.fileno(),)) as holder:
        writer.close()
        assert may_open(image, writable=True)
        holder.communicate(timeout=20)


def test_an_inherited_descriptor_keeps_a_dead_writers_lock(image: Path) -> None:
    """What the keeper builds on: the lock ends with the last holder of the open file description, not with who took it."""
    writer = FileStorage.open(image, writable=True)
    inherited = FileStorage.from_fd(os.dup(writer.fileno()), "inherited", writable=True)
    os.close(writer.fileno())  # as the kernel does for a killed process
    writer._fd = -1
    assert not may_open(image, writable=True)
    inherited.close()
    assert may_open(image, writable=True)


def test_a_keeper_works_when_it_lives_and_its_writer_does_not(image: Path) -> None:
    keeper, writer, other = (os.open(image, os.O_RDWR) for _ in range(3))
    assert not locks.keeper_works(other)
    locks.hold_byte(writer, locks.WRITER_BYTE)
    locks.hold_byte(keeper, locks.KEEPER_BYTE)
    assert not locks.keeper_works(other)
    os.close(writer)
    assert locks.keeper_works(other)
    os.close(keeper)
    assert not locks.keeper_works(other)
    os.close(other)


def test_an_opener_waits_for_a_working_keeper_and_for_nobody_else(image: Path) -> None:
    writer = FileStorage.open(image, writable=True)
    began = time.monotonic()
    assert not may_open(image, writable=False)
    assert time.monotonic() - began < 0.5
    keeper = os.open(image, os.O_RDWR)
    locks.hold_byte(keeper, locks.KEEPER_BYTE)

    def end() -> None:
        time.sleep(0.3)
        locks.release_all(writer.fileno())
        os.close(keeper)

    thread = threading.Thread(target=end)
    thread.start()
    assert may_open(image, writable=True)
    assert time.monotonic() - began > 0.3
    thread.join()
    writer.close()


def test_whose_lock_it_is(image: Path) -> None:
    shared = FileStorage.open(image, writable=True)
    own = os.open(image, os.O_RDWR)
    assert locks.holds_writers_lock(shared.fileno(), own)
    locks.release_all(shared.fileno())
    assert not locks.holds_writers_lock(shared.fileno(), own)
    successor = FileStorage.open(image, writable=True)
    assert not locks.holds_writers_lock(shared.fileno(), own)
    successor.close()
    shared.close()
    os.close(own)
