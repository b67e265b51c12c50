"""The keeper at work, in processes: a writer that dies loses nothing that was acknowledged (crash contract, C4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cowfence
from cowfence.disk.base import Request, Verb
from cowfence.errors import CowfenceError, Invalid, Locked
from cowfence.keeper import start
from cowfence.nbd.client import NbdDisk
from cowfence.ops.check import check
from cowfence.storage import locks
from cowfence.storage.file import FileStorage
from cowfence.units import KIB, MIB
from helpers_cli import COWFENCE, ENVIRONMENT
from helpers_keeper import keepers_for, keepers_of, program, serve, wait_for
from judges import run

WRITES = 200
BLOCK = 4 * KIB
STEP = 68 * KIB
"""Each write allocates a cluster of its own."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    cowfence.create(path, 64 * MIB).close()
    return path


def content(number: int) -> bytes:
    return f"write {number} ".encode().ljust(32, b".") * (BLOCK // 32)


def write_all(client: cowfence.Disk, first: int = 0, count: int = WRITES) -> None:
    """``count`` writes, all acknowledged, none flushed."""
    for begin in range(first, first + count, 16):
        numbers = range(begin, min(begin + 16, first + count))
        requests = [Request(Verb.WRITE, number * STEP, BLOCK, content(number)) for number in numbers]
        assert client.submit(requests) == [None] * len(requests)


def kept(image: Path, count: int = WRITES) -> int:
    """How many of the writes are there; the image is sound but for leaks."""
    with cowfence.open(image) as disk:
        found = sum(disk.read(number * STEP, BLOCK) == content(number) for number in range(count))
    assert not check(image).report.corruptions
    judged = run(["qemu-img", "check", image], check=False)
    assert judged.returncode in (0, 3), judged.stdout + judged.stderr
    return found


def killed(server: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    """Kill the server; what it and its keeper said, once both are gone."""
    server.send_signal(number)
    return server.communicate(timeout=30)[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_every_acknowledged_write_of_a_dead_server_is_there(image: Path, number: int) -> None:
    server, uri = serve(image, "--commit-interval", "1000")
    write_all(NbdDisk(uri))
    said = killed(server, number)
    assert "the writer died" in said
    assert kept(image) == WRITES
    assert not keepers_for(image)
    run(["qemu-img", "check", image])


def test_with_a_data_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper fences both files, and both stay locked until it is done."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.qcow2"
    cowfence.create(path, 64 * MIB, data_file="disk.data").close()
    server, uri = serve(path, "--commit-interval", "1000")
    write_all(NbdDisk(uri))
    said = killed(server)
    assert "the writer died" in said
    assert kept(path) == WRITES
    assert not keepers_for(path)
    run(["qemu-img", "check", path])


def test_without_a_keeper_the_same_writes_are_lost(image: Path) -> None:
    """The canary: the test above shows the keeper's work, and not the luck of a commit."""
    server, uri = serve(image, "--commit-interval", "1000", "--no-keeper")
    write_all(NbdDisk(uri))
    assert not keepers_of(server.pid)
    assert killed(server) == ""
    assert kept(image) == 0


def test_a_server_that_ends_in_order_leaves_no_keeper_and_no_leaks(image: Path) -> None:
    server, uri = serve(image)
    write_all(NbdDisk(uri))
    (keeper,) = keepers_of(server.pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(keeper, number)
    time.sleep(0.1)
    assert keepers_of(server.pid) == [keeper]
    assert killed(server, signal.SIGTERM) == ""
    assert server.returncode == 0
    assert not keepers_for(image)
    run(["qemu-img", "check", image])
    assert kept(image) == WRITES


def test_a_keeper_that_dies_is_replaced_and_the_next_one_knows_all(image: Path) -> None:
    server, uri = serve(image, "--commit-interval", "1000")
    client = NbdDisk(uri)
    write_all(client, 0, 100)
    (first,) = keepers_of(server.pid)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: keepers_of(server.pid) not in ([], [first]))
    assert server.stderr is not None
    assert f"the keeper (process {first}) died" in server.stderr.readline()
    write_all(client, 100, 50)
    client.flush()
    write_all(client, 150, 50)
    # Started is not yet ready.
    looker = os.open(image, os.O_RDONLY)
    wait_for(lambda: locks._is_held(looker, locks.KEEPER_BYTE))
    os.close(looker)
    assert "the writer died" in killed(server)
    assert kept(image) == WRITES


def test_keeper_killed_then_a_flush_then_the_writer_killed(image: Path) -> None:
    server, uri = serve(image, "--commit-interval", "1000")
    client = NbdDisk(uri)
    write_all(client, 0, 100)
    os.kill(keepers_of(server.pid)[0], signal.SIGKILL)
    client.flush()
    write_all(client, 100, 100)
    killed(server)
    assert kept(image, 100) == 100


def test_both_killed_at_once_what_was_flushed_is_there(image: Path) -> None:
    server, uri = serve(image, "--commit-interval", "1000")
    client = NbdDisk(uri)
    write_all(client, 0, 100)
    client.flush()
    write_all(client, 100, 100)
    (keeper,) = keepers_of(server.pid)
    os.kill(keeper, signal.SIGSTOP)
    server.kill()
    os.kill(keeper, signal.SIGKILL)
    server.communicate(timeout=30)
    assert kept(image, 100) == 100


_KILLED_IN_A_COMMIT = """
import os, signal, sys, cowfence
from cowfence.storage.file import FileStorage
nth, after, step, block = int(sys.argv[2]), sys.argv[3] == "after", int(sys.argv[4]), int(sys.argv[5])
calls = 0
def dying(name):
    true = getattr(FileStorage, name)
    def call(self, *words):
        global calls
        if words[-1] in ("data.write", "host.occupy"):
            return true(self, *words)
        calls += 1
        if after:
            true(self, *words)
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            true(self, *words)
    setattr(FileStorage, name, call)
disk = cowfence.open(sys.argv[1], writable=True, keeper=True, commit_interval=None)
for name in ("writev", "fence", "discard"):
    dying(name)
def write(number):
    disk.write(number * step, f"write {number} ".encode().ljust(32, b".") * (block // 32))
    print(number, flush=True)
for number in range(10):
    write(number)
disk.flush()
disk.discard(5 * 65536, 65536)
disk.flush()
print("done", flush=True)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_call_of_a_commit(image: Path, when: str) -> None:
    # Ten writes have to be told apart from what a discard takes: it takes the write at 340 KiB, and no other.
    nth = 0
    while True:
        nth += 1
        image.unlink()
        cowfence.create(image, 64 * MIB).close()
        writer = program(_KILLED_IN_A_COMMIT, str(image), str(nth), when, str(STEP), str(BLOCK))
        said, complaints = writer.communicate(timeout=60)
        if "done" in said:
            break
        assert writer.returncode == -signal.SIGKILL, complaints
        assert said.split() == [str(number) for number in range(10)]
        found = kept(image, 10)
        assert found == 10 or (found == 9 and nth > 4), f"killed {when} call {nth}"
    assert nth > 6


def test_who_opens_the_image_meanwhile_waits_for_the_keeper(image: Path) -> None:
    server, uri = serve(image, "--commit-interval", "1000")
    write_all(NbdDisk(uri))
    began = time.monotonic()
    with pytest.raises(Locked):
        cowfence.open(image, writable=True)
    assert time.monotonic() - began < 1, "a living writer is refused at once"
    (keeper,) = keepers_of(server.pid)
    os.kill(keeper, signal.SIGSTOP)
    server.kill()
    server.wait()
    found: list[int] = []
    opener = threading.Thread(target=lambda: found.append(kept(image)))
    opener.start()
    time.sleep(0.5)
    assert opener.is_alive()
    os.kill(keeper, signal.SIGCONT)
    opener.join(30)
    assert found == [WRITES]
    server.communicate(timeout=30)


def test_nobody_waits_for_ever(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "KEEPER_SECONDS", 0.3)
    server, _ = serve(image)
    (keeper,) = keepers_of(server.pid)
    os.kill(keeper, signal.SIGSTOP)
    server.kill()
    server.wait()
    with pytest.raises(Locked, match="keeper of a killed process"):
        cowfence.open(image)
    os.kill(keeper, signal.SIGCONT)
    server.communicate(timeout=30)
    cowfence.open(image).close()


_FORKS = """
import os, signal, sys, time, cowfence
disk = cowfence.open(sys.argv[1], writable=True, keeper=True, commit_interval=None)
for number in range(10):
    disk.write(number * 65536, b"kept")
child = os.fork()
if not child:
    try:
        disk.write(0, b"child")
    except cowfence.Closed:
        print("closed", flush=True)
    disk.close()
    os.close(1)
    os.close(2)
    time.sleep(60)
    os._exit(0)
time.sleep(0.3)
disk.write(10 * 65536, b"kept")
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_neither_disturbs_the_keeper_nor_holds_the_lock(image: Path) -> None:
    writer = program(_FORKS, str(image))
    said, complaints = writer.communicate(timeout=30)
    word, child = said.split()
    try:
        assert word == "closed", complaints
        with cowfence.open(image, writable=True) as disk:
            assert all(disk.read(number * 65536, 4) == b"kept" for number in range(11))
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_program_that_ends_without_closing_loses_nothing(image: Path) -> None:
    text = """
import sys, cowfence
disk = cowfence.open(sys.argv[1], writable=True, keeper=True, commit_interval=None)
for number in range(10):
    disk.write(number * 65536, b"kept")
"""
    writer = program(text, str(image))
    writer.communicate(timeout=30)
    with cowfence.open(image, writable=True) as disk:
        assert all(disk.read(number * 65536, 4) == b"kept" for number in range(10))


@pytest.mark.parametrize(
    "options", [("--read-only",), ("--cache", "unsafe"), ("-f", "raw"), ("--no-keeper",)], ids=lambda options: options[-1]
)
def test_where_there_is_nothing_to_keep_there_is_no_keeper(image: Path, options: tuple[str, ...]) -> None:
    server, _ = serve(image, *options)
    assert not keepers_of(server.pid)
    killed(server, signal.SIGTERM)


@pytest.mark.parametrize(
    "options",
    [
        {"writable": False},
        {"writable": True, "mode": "unsafe"},
        {"writable": True, "format": "raw"},
        {"writable": True, "lock": False},
    ],
    ids=["read-only", "unsafe", "raw", "without a lock"],
)
def test_the_library_refuses_a_keeper_where_it_makes_no_sense(image: Path, options: dict[str, object]) -> None:
    with pytest.raises(Invalid, match="keeper"):
        cowfence.open(image, keeper=True, **options)  # type: ignore[call-overload]


def test_a_keeper_that_does_not_start_is_said_and_nothing_stays_open(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for executable, word in (("/bin/false", "ready"), ("/nonexistent", "No such file")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(CowfenceError, match=word):
            cowfence.open(image, writable=True, keeper=True)
    assert len(os.listdir("/proc/self/fd")) == before
    cowfence.open(image, writable=True).close()


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_server_with_closed_standard_streams_keeps_its_promises(image: Path, closed: str) -> None:
    """The image must not take the number of a stream: what the keeper says at the end would be written into it."""
    path = image.with_name("sock")
    said = image.with_name("said")
    streams = "".join(
        f" {number}>{said}{number}" for number in (1, 2) if f"{'' if number == 1 else number}>&-" not in closed.split()
    )
    words = [*COWFENCE, "serve", "--commit-interval", "1000", "--socket", str(path), str(image)]
    server = subprocess.Popen(["/bin/sh", "-c", f'exec "$@" {streams} {closed}', "sh", *words], env=ENVIRONMENT)
    wait_for(lambda: path.exists() or server.poll() is not None)
    write_all(NbdDisk(f"nbd+unix:///?socket={path}"))
    assert not {os.path.realpath(f"/proc/{server.pid}/fd/{number}") for number in (0, 1, 2)} & {str(image)}
    server.kill()
    server.wait(30)
    wait_for(lambda: not keepers_for(image))
    assert kept(image) == WRITES


def test_a_library_with_closed_standard_streams_keeps_its_promises(image: Path) -> None:
    text = """
import os, signal, sys
for number in (0, 2):
    os.close(number)
sys.__stderr__ = None
import cowfence
disk = cowfence.open(sys.argv[1], writable=True, keeper=True, commit_interval=None)
disk.write(0, b"kept")
os.kill(os.getpid(), signal.SIGKILL)
"""
    program(text, str(image)).communicate(timeout=30)
    wait_for(lambda: not keepers_for(image))
    with cowfence.open(image) as disk:
        assert disk.read(0, 4) == b"kept"


def test_a_keeper_starts_beside_many_open_files(image: Path) -> None:
    text = """
import os, resource, sys, cowfence
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
null = os.open("/dev/null", os.O_RDONLY)
many = [os.dup(null) for _ in range(1100)]
cowfence.open(sys.argv[1], writable=True, keeper=True).close()
"""
    writer = program(text, str(image))
    assert writer.communicate(timeout=30)[1] == ""
    assert writer.returncode == 0


def test_ctrl_c_while_a_keeper_starts_leaves_none(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def interrupted(_process: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "_await_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cowfence.open(image, writable=True, keeper=True)
    assert not keepers_for(image)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_keeper_whose_writer_dies_before_it_is_ready_completes_the_work(image: Path) -> None:
    server, uri = serve(image, "--commit-interval", "1000")
    write_all(NbdDisk(uri))
    (first,) = keepers_of(server.pid)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: set(keepers_of(server.pid)) - {first})
    (second,) = set(keepers_of(server.pid)) - {first}
    os.kill(second, signal.SIGSTOP)
    server.kill()
    server.wait(30)
    os.kill(second, signal.SIGCONT)
    said = killed(server)
    assert "Traceback" not in said
    assert "were completed" in said
    assert kept(image) == WRITES


def test_a_fork_in_the_middle_of_a_note_disowns_every_disk(image: Path) -> None:
    text = """
import os, sys, cowfence
disks = [cowfence.open(path, writable=True, keeper=True) for path in sys.argv[1:]]
# A thread that computes a checksum has a view of the memory; in the child it never ends.
views = [memoryview(disk._state.pending.journal._memory)[:8] for disk in disks]
child = os.fork()
if not child:
    for disk in disks:
        try:
            disk.read(0, 1)
            os._exit(1)
        except cowfence.Closed:
            pass
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
del views
for disk in disks:
    disk.close()
sys.exit(code)
"""
    other = image.with_name("other.qcow2")
    cowfence.create(other, MIB).close()
    writer = program(text, str(image), str(other))
    assert writer.communicate(timeout=30)[1] == ""
    assert writer.returncode == 0


def test_a_keeper_is_small_and_holds_nothing_else(image: Path) -> None:
    with cowfence.open(image, writable=True, keeper=True):
        (keeper,) = keepers_of(os.getpid())
        assert "numpy" not in Path(f"/proc/{keeper}/maps").read_text()
        # Standard input and error, the image twice, the memory (Python's mmap keeps a second one), the writer.
        assert len(os.listdir(f"/proc/{keeper}/fd")) == 7
    assert not keepers_for(image)


def test_a_keeper_leaves_an_image_alone_whose_lock_was_given_up(image: Path) -> None:
    text = """
import os, signal, sys, cowfence
disk = cowfence.open(sys.argv[1], writable=True, keeper=True, commit_interval=None)
disk.write(0, b"lost")
disk.storage.close()
print("unlocked", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
    writer = program(text, str(image))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "unlocked\n"
    other = FileStorage.open(image, writable=True)
    before = image.read_bytes()
    said = writer.communicate("\n", timeout=30)[1]
    assert "its lock was gone" in said
    assert "completed" not in said
    assert image.read_bytes() == before
    other.close()


def test_a_fence_that_failed_ends_all_keeping(image: Path) -> None:
    text = """
import os, signal, sys, cowfence
from cowfence.storage.file import FileStorage
disk = cowfence.open(sys.argv[1], writable=True, keeper=True, commit_interval=None)
disk.write(0, b"lost")
def fence(self, mark):
    raise cowfence.StorageFailed(self.name, "fence", 0, OSError(5, "Input/output error"))
FileStorage.fence = fence
try:
    disk.flush()
except cowfence.StorageFailed:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    writer = program(text, str(image))
    assert "a fence failed" in writer.communicate(timeout=30)[1]
    with cowfence.open(image) as disk:
        assert disk.read(0, 4) == bytes(4)
    assert not check(image).report.corruptions
