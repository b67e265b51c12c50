"""The rest of the matrix: scripts of nbdsh, and nbdfuse, over our server; nbdkit's odd and slow servers before our client."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfence.disk.base import Request, Verb
from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError, StorageFailed
from cowfence.nbd.client import NbdDisk, list_exports
from cowfence.nbd.export import Export
from cowfence.nbd.server import Limits, Server
from cowfence.nbd.tls import server_context
from cowfence.storage.file import FileStorage
from helpers_nbd import serving
from helpers_tls import Authority
from judges import require, run

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "disk").write_bytes(b"d" * MIB + bytes(SIZE - MIB))
    disk = RawDisk(FileStorage.open(tmp_path / "disk", writable=True))
    exports = {
        "": Export(disk, description="words", bitmaps={"b": lambda _offset, _length: [(4096, 8192)]}, allocation_depth=True),
        "ro": Export(disk, read_only=True),
    }
    with serving(tmp_path, exports, Limits(stop_seconds=1)) as made:
        yield made
    disk.close()


def nbdsh(script: str) -> str:
    """With the system's Python, for which it was made."""
    require("nbdsh")
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["nbdsh", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPTS = {
    "sparse reads come in chunks": """
h.connect_uri(URI)
seen = []
h.pread_structured(2 << 20, 0, lambda data, offset, kind, error: seen.append((offset, len(data), kind)))
assert sorted(seen) == [(0, 1 << 20, nbd.READ_DATA), (1 << 20, 1 << 20, nbd.READ_HOLE)], seen
seen.clear()
h.pread_structured(2 << 20, 0, lambda data, offset, kind, error: seen.append((offset, len(data), kind)), nbd.CMD_FLAG_DF)
assert seen == [(0, 2 << 20, nbd.READ_DATA)], seen
""",
    "several contexts at once": """
for name in ("base:allocation", "qemu:dirty-bitmap:b", "qemu:allocation-depth"):
    h.add_meta_context(name)
h.connect_uri(URI)
seen = {}
h.block_status(1 << 20, 0, lambda name, offset, entries, error: seen.setdefault(name, entries))
assert seen["qemu:dirty-bitmap:b"] == [4096, 0, 8192, 1, (1 << 20) - 12288, 0], seen
assert seen["base:allocation"] == [1 << 20, 0], seen
assert seen["qemu:allocation-depth"] == [1 << 20, 1], seen
seen.clear()
h.block_status(1 << 20, 4096, lambda name, offset, entries, error: seen.setdefault(name, entries), nbd.CMD_FLAG_REQ_ONE)
assert all(len(entries) == 2 for entries in seen.values()), seen
""",
    "contexts are listed by their spaces": """
h.set_opt_mode(True)
h.connect_uri(URI)
def listed(*queries):
    seen = []
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    h.opt_list_meta_context(seen.append)
    return seen
assert listed() == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"]
assert listed("base:") == ["base:allocation"]
assert listed("qemu:") == ["qemu:allocation-depth", "qemu:dirty-bitmap:b"]
assert listed("qemu:dirty-bitmap:") == ["qemu:dirty-bitmap:b"]
assert listed("qemu:dirty-bitmap:x") == []
names = []
h.opt_list(lambda name, description: names.append((name, description)))
assert names == [("", "words"), ("ro", "")], names
h.set_export_name("ro")
h.opt_info()
assert h.is_read_only() and not h.can_trim()
h.opt_abort()
""",
    "what the export cannot do is refused, and costs nothing else": """
import errno
h.set_strict_mode(0)
h.connect_uri(URI)
def fails(code, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == code, (error.errnum, code)
    else:
        raise AssertionError(call)
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.pread, 512, size - 1)
fails(errno.ENOSPC, h.pwrite, b"x" * 512, size)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.EINVAL, h.pread, 1, 0, nbd.CMD_FLAG_NO_HOLE)
h.pwrite(b"moo", 5, nbd.CMD_FLAG_FUA)
assert h.pread(3, 5) == b"moo"
h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 8192)
h.cache(4096, 0)
h.flush()
h.shutdown()
""",
    "many requests in flight": """
h.connect_uri(URI)
buffers = [nbd.Buffer.from_bytearray(bytearray([number % 256]) * 4096) for number in range(200)]
cookies = [h.aio_pwrite(buffer, number * 4096) for number, buffer in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(-1)
for cookie in cookies:
    assert h.aio_command_completed(cookie)
h.flush()
for number in range(200):
    assert h.pread(4096, number * 4096) == bytes([number % 256]) * 4096
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_nbdsh(server: Server, name: str) -> None:
    nbdsh(f"URI = {server.uri()!r}\n{SCRIPTS[name]}")


def test_nbdfuse(server: Server, tmp_path: Path) -> None:
    """A file system of others on our export: read, write and sync through the kernel."""
    file = tmp_path / "mounted"
    file.touch()
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse")
    mounted = subprocess.Popen([require("nbdfuse"), str(file), server.uri()], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(500):
            if file.stat().st_size == SIZE or mounted.poll() is not None:
                break
            time.sleep(0.02)
        if mounted.poll() is not None:
            pytest.skip(f"nbdfuse: {mounted.communicate()[1]}")
        with file.open("r+b") as disk:
            assert disk.read(4) == b"dddd"
            disk.seek(2 * MIB)
            disk.write(b"through the kernel")
            disk.flush()
        data = random.Random(1).randbytes(300_000)
        with file.open("r+b") as disk:
            disk.seek(MIB + 5)
            disk.write(data)
    finally:
        mounted.terminate()
        mounted.wait(20)
    content = (tmp_path / "disk").read_bytes()
    assert content[2 * MIB : 2 * MIB + 18] == b"through the kernel"
    assert content[MIB + 5 : MIB + 5 + len(data)] == data


# --- our client ---


@contextmanager
def nbdkit(tmp_path: Path, *words: str) -> Iterator[str]:
    socket = tmp_path / "kit"
    process = subprocess.Popen([require("nbdkit"), "-f", "-U", str(socket), *words])
    try:
        for _ in range(500):
            if socket.exists():
                break
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait()


def test_a_slow_server_holds_up_no_reply_that_is_there(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "memory", str(SIZE), "rdelay=50ms") as uri, NbdDisk(uri) as disk:
        began = time.monotonic()
        outcomes = disk.submit([Request(Verb.READ, number * 4096, 4096) for number in range(32)])
        assert all(outcome == bytes(4096) for outcome in outcomes)
        assert time.monotonic() - began < 32 * 0.05, "one after the other"


@pytest.mark.parametrize(
    "words",
    [
        [
            "--filter=blocksize-policy",
            "memory",
            str(SIZE),
            "blocksize-minimum=512",
            "blocksize-maximum=64k",
            "blocksize-error-policy=error",
        ],
        ["--filter=protect", "memory", str(SIZE)],
        ["--filter=multi-conn", "memory", str(SIZE), "multi-conn-mode=disable"],
        ["--filter=nozero", "memory", str(SIZE), "zeromode=emulate"],
        ["--filter=rate", "memory", str(SIZE), "rate=800M"],
        ["--mask-handshake=0", "memory", str(SIZE)],
        ["--mask-handshake=1", "memory", str(SIZE)],
        ["sparse-random", str(SIZE)],
        ["pattern", str(SIZE)],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_odd_servers(tmp_path: Path, words: list[str]) -> None:
    with nbdkit(tmp_path, *words) as uri, NbdDisk(uri) as disk:
        assert disk.size == SIZE
        before = disk.read(0, SIZE)
        assert sum(extent.length_bytes for extent in disk.extents(0, SIZE)) == SIZE
        if not disk.writable or words[0] in ("sparse-random", "pattern"):
            return
        data = random.Random(2).randbytes(200_704)
        disk.write(512, data)
        disk.zero(8192, 65536)
        disk.flush()
        expected = bytearray(before)
        expected[512 : 512 + len(data)] = data
        expected[8192 : 8192 + 65536] = bytes(65536)
        assert disk.read(0, SIZE) == expected


@pytest.mark.parametrize("call", ["pread", "pwrite", "zero", "extents"])
def test_errors_in_half_of_the_requests(tmp_path: Path, call: str) -> None:
    """Each fails or succeeds by itself, and the connection goes on."""
    words = ["--filter=error", "memory", str(SIZE), f"error-{call}=EIO", f"error-{call}-rate=50%"]
    with nbdkit(tmp_path, *words) as uri, NbdDisk(uri) as disk:
        failed = 0
        for number in range(40):
            try:
                if call == "pread":
                    assert disk.read(number, 10) == bytes(10)
                elif call == "pwrite":
                    disk.write(number, b"\0")
                elif call == "zero":
                    disk.zero(number * 4096, 4096)
                else:
                    list(disk.extents(0, SIZE))
            except StorageFailed:
                failed += 1
        assert 0 < failed < 40


def test_a_server_that_leaves_in_the_middle(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "memory", str(SIZE), "rdelay=5") as uri, NbdDisk(uri) as disk:
        killer = threading.Timer(0.3, lambda: subprocess.run(["pkill", "-9", "-f", f"U {tmp_path}/kit"], check=False))
        killer.start()
        with pytest.raises(StorageFailed):
            disk.read(0, 4096)
        with pytest.raises(CowfenceError):
            disk.read(0, 4096)


def test_tls_of_nbdkit(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    there, alice = authority.directory("server", "localhost", known_by="server"), authority.directory("client", "alice")
    words = ["--tls=require", f"--tls-certificates={there}", "--tls-verify-peer", "memory", str(SIZE)]
    with nbdkit(tmp_path, *words) as plain:
        uri = plain.replace("nbd+unix", "nbds+unix") + f"&tls-certificates={alice}&tls-hostname=localhost"
        with NbdDisk(uri) as disk:
            data = random.Random(3).randbytes(SIZE)
            disk.write(0, data)
            assert disk.read(0, SIZE) == data
        assert [listed.name for listed in list_exports(uri)] == [""]
        with pytest.raises(CowfenceError):
            NbdDisk(plain)


def test_nbdcopy_between_our_server_with_tls_and_itself(tmp_path: Path, server: Server) -> None:
    authority = Authority(tmp_path)
    there, alice = authority.directory("server", "localhost", known_by="server"), authority.directory("client", "alice")
    (tmp_path / "target").write_bytes(bytes(SIZE))
    disk = RawDisk(FileStorage.open(tmp_path / "target", writable=True))
    secure = Server({"": Export(disk)}, limits=Limits(stop_seconds=1), tls=server_context(str(there)), tls_required=True)
    secure.listen_tcp()
    thread = threading.Thread(target=secure.serve_forever)
    thread.start()
    port = secure.uri().rsplit(":", 1)[1].split("/")[0]
    run(["nbdcopy", server.uri(), f"nbds://localhost:{port}/?tls-certificates={alice}"])
    secure.stop()
    thread.join(20)
    disk.close()
    assert (tmp_path / "target").read_bytes() == (tmp_path / "disk").read_bytes()
