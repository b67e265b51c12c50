"""``cowfence serve`` with many exports, and ``cowfence ctl``: what comes and goes, and is changed, while clients are there."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cowfence
from cowfence.errors import CowfenceError, Unsupported
from cowfence.nbd.client import NbdDisk, list_exports
from cowfence.service.config import read_config
from cowfence.service.control import ask
from helpers_cli import COWFENCE, ENVIRONMENT, running
from helpers_cli import cowfence as command
from judges import require, run

MIB = 1 << 20
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run(["qemu-img", "create", "-q", "-f", "qcow2", "base", "8M"])
    run(["qemu-io", "-c", "write -P 3 0 1M", "base"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "a"])
    run(["qemu-io", "-c", "write -P 7 1M 1M", "a"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "b", "4M"])
    (tmp_path / "raw").write_bytes(b"r" * MIB)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts ``cowfence serve``; back when it is ready."""
    with running(folder) as begin:

        def start(*words: str) -> subprocess.Popen[str]:
            server = begin(*words) if "--config" in words else begin("-k", "sock", *words)
            assert server.stdout is not None
            assert server.stdout.readline().startswith("nbd"), server.communicate()[1]
            return server

        yield start


def uri(export: str = "") -> str:
    return f"nbd+unix:///{export}?socket=sock"


def ctl(verb: str, /, **fields: object) -> Any:
    return ask("control", {"command": verb, **fields}, timeout_seconds=30)


def stop(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGTERM)
    assert server.communicate(timeout=30) == ("", "")
    assert server.returncode == 0


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(export: str) -> None:
    """Until the server knows that its clients have left."""
    while ctl("status")["exports"][export]["clients"]:
        time.sleep(0.01)


def names() -> list[str]:
    return [listed.name for listed in list_exports(uri())]


def test_many_images_on_the_command_line(start: Start) -> None:
    server = start("-r", "a", "b")
    assert names() == ["a", "b"]
    with NbdDisk(uri("a")) as disk:
        assert disk.read(MIB, 4) == b"\7\7\7\7"
        assert not disk.writable
    stop(server)


CONFIG = """
[server]
socket = "sock"
control = "control"
clients = 7
idle-seconds = 60

[[export]]
name = "disk"
image = "a"
allocation-depth = true
commit-seconds = 0.5

[[export]]
name = "raw"
image = "raw"
format = "raw"
read-only = true
"""


def test_a_configuration_is_read_again(folder: Path, start: Start) -> None:
    (folder / "c.toml").write_text(CONFIG)
    server = start("--config", "c.toml")
    assert names() == ["disk", "raw"]
    with NbdDisk(uri("disk")) as disk, NbdDisk(uri("raw")) as old:
        disk.write(0, b"moo")
        (folder / "c.toml").write_text(
            CONFIG.replace('name = "raw"', 'name = "other"').replace(
                'image = "a"\nall', 'image = "a"\ndescription = "new"\nall'
            )
        )
        # The one that is described otherwise has a client, and stays; the one that is gone is there for its client only.
        assert ctl("reload") == {"added": ["other"], "removed": ["raw"], "in-use": ["disk"]}
        assert names() == ["disk", "other"]
        assert old.read(0, 1) == b"r"
        assert disk.read(0, 3) == b"moo"
    gone("disk")
    server.send_signal(signal.SIGHUP)
    until(lambda: {listed.name: listed.description for listed in list_exports(uri())}.get("disk") == "new")
    assert {listed.name: listed.description for listed in list_exports(uri())} == {"disk": "new", "other": ""}
    with NbdDisk(uri("disk")) as disk:
        assert disk.read(0, 3) == b"moo"
    (folder / "c.toml").write_text("nonsense")
    with pytest.raises(CowfenceError, match=r"c\.toml"):
        ctl("reload")
    assert sorted(names()) == ["disk", "other"]
    (folder / "c.toml").write_text(CONFIG.replace("clients = 7", "clients = 8"))
    with pytest.raises(CowfenceError, match="start it again"):
        ctl("reload")
    # What a backup is made of stays.
    ctl("backup-begin", export="disk", name="moment")
    (folder / "c.toml").write_text(
        '[server]\nsocket = "sock"\ncontrol = "control"\nclients = 7\nidle-seconds = 60\n[[export]]\nname = "b"\nimage = "b"\n'
    )
    assert ctl("reload") == {"added": ["b"], "removed": ["other"], "in-use": ["disk"]}
    ctl("backup-end", name="moment")
    assert ctl("reload") == {"added": [], "removed": ["disk"], "in-use": []}
    assert names() == ["b"]
    stop(server)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no [[export]]"),
        ("[[export]]\nname = 'x'", "image is missing"),
        ("[[export]]\nimage = 'a'\nfoo = 1", "unknown word 'foo'"),
        ("[server]\nfoo = 1\n[[export]]\nimage = 'a'", "unknown word 'foo'"),
        ("[foo]\n[[export]]\nimage = 'a'", "unknown table 'foo'"),
        ("export = 5", "array of tables"),
        ("[[export]]\nimage = 5", "image is a string"),
        ("[[export]]\nimage = 'a'\nread-only = 1", "true or false"),
        ("[[export]]\nimage = 'a'\nformat = 'vmdk'", "format is one of"),
        ("[[export]]\nimage = 'a'\ncache-size = '1x'", "cache-size"),
        ("[[export]]\nimage = 'a'\nbitmaps = [1]", "list of strings"),
        ("[[export]]\nimage = 'a'\ncommit-seconds = 0", "greater than 0"),
        ("[server]\nclients = 0\n[[export]]\nimage = 'a'", "at least 1"),
        ("[server]\nclients = true\n[[export]]\nimage = 'a'", "a number"),
        ("[[export]]\nimage = 'a'\n[[export]]\nimage = 'b'", "two exports"),
        ("[server]\nport = 70000\n[[export]]\nimage = 'a'", "at most 65535"),
        ("[server]\nclient-bytes = 0\n[[export]]\nimage = 'a'", "at least 1"),
        ('[server]\nsocket = "a\\u0000b"\n[[export]]\nimage = "a"', "socket"),
        ('[[export]]\nimage = "a"\nroots = ["a\\u0000b"]', "roots"),
        ("[[export]]\nimage = 'missing'", "missing"),
        ("[[export]]\nimage = 'a'\nclients = ['x']", "TLS"),
        ("[[export]]\nimage = 'raw'\nformat = 'raw'\nbitmaps = ['x']", "neither bitmaps"),
        ("[", "c.toml"),
        pytest.param("a = " + "[" * 100_000, "too deep", id="deep"),
        pytest.param("a = " + "1" * 6000, "c.toml", id="long"),
    ],
)
def test_what_is_wrong_in_a_configuration(folder: Path, text: str, what: str) -> None:
    (folder / "c.toml").write_text(text)
    done = command("serve", "--config", "c.toml", cwd=folder, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert what in done.stderr


EVERYTHING = """
[server]
bind = "127.0.0.1"
port = 0
insecure = false
tls = "pki"
tls-offered = true
verify-clients = false
metrics = "127.0.0.1:0"
clients = 7
client-requests = 5
client-bytes = "1M"
handshake-seconds = 3
idle-seconds = 60

[[export]]
name = "disk"
description = "d"
image = "a"
roots = ["x"]
untrusted = false
secret-file = "s"
clients = ["c"]
snapshots = true
cache = "none"
discard = false
detect-zeroes = "on"
offset = "1k"
bitmaps = ["b"]
allocation-depth = true
keeper = false
cache-size = "4M"
commit-seconds = 0.5
commit-into-backing = false
temporary = false
read-only = false
format = "qcow2"
assume-backing-format = "raw"

[[export]]
image = "b"
snapshot = "s"
"""


def test_every_word_of_a_configuration(folder: Path) -> None:
    (folder / "c.toml").write_text(EVERYTHING)
    config = read_config(str(folder / "c.toml"))
    assert config.server.tls == str(folder / "pki")
    assert (config.server.limits.connections, config.server.limits.client_bytes) == (7, MIB)
    spec = config.exports[0].spec
    assert (spec.path, spec.offset, spec.clients, spec.keeper) == (str(folder / "a"), 1024, frozenset({"c"}), False)
    assert config.exports[0].roots == (str(folder / "x"),)
    assert config.exports[1].spec.snapshot == "s"


def test_live_changes(folder: Path, start: Start) -> None:
    server = start("--control", "control", "a")
    with NbdDisk(uri()) as disk:
        disk.write(0, b"one")
        ctl("snapshot-create", name="s")
        disk.write(0, b"two")
        ctl("bitmap-add", name="m", granularity=65536)
        disk.write(3 * MIB, b"x")
        ctl("bitmap-add", name="n")
        ctl("bitmap-merge", name="n", source="m")
        ctl("bitmap-disable", name="m")
        with pytest.raises(CowfenceError, match="has clients"):
            ctl("snapshot-apply", name="s")
        assert ctl("resize", size=16 * MIB) == {"old-virtual-size": 8 * MIB, "virtual-size": 16 * MIB}
        assert disk.read(0, 3) == b"two"
        with pytest.raises(CowfenceError):
            disk.read(12 * MIB, 1)  # its size is that of when it came
        assert ctl("check")["check-errors"] == 0
        with NbdDisk(uri()) as other:
            assert other.size == 16 * MIB
            assert other.read(12 * MIB, 1) == b"\0"
    status = ctl("status")["exports"][""]
    assert status["requests"]["write"] >= 3
    assert status["errors"] == 0
    for bad in (
        {"command": "nope"},
        {"command": "resize"},
        {"command": "resize", "size": 5, "foo": 1},
        {"command": "snapshot-delete", "name": "nobody"},
        {"command": "bitmap-add"},
        {"command": "commit"},
        {"command": "check", "export": "nowhere"},
    ):
        with pytest.raises(CowfenceError):
            ask("control", bad)
    assert [one["name"] for one in ctl("snapshot-list")] == ["s"]
    ctl("snapshot-apply", name="s")
    with NbdDisk(uri()) as disk:
        assert disk.read(0, 3) == b"one"
    ctl("snapshot-delete", name="s")
    ctl("stop")
    assert server.communicate(timeout=30) == ("", "")
    run(["qemu-img", "check", "a"])
    with cowfence.open(folder / "a") as image:
        assert {bitmap.name for bitmap in image.bitmaps} == {"m", "n"}
        assert (3 * MIB, 65536) in image.bitmaps.ranges("m")


def test_commit_into_the_backing_file_while_it_is_served(folder: Path, start: Start) -> None:
    server = start("--control", "control", "--commit-into-backing", "a")
    with NbdDisk(uri()) as disk:
        disk.write(0, b"new")
        before = disk.read(0, 8 * MIB)
        ctl("commit")
        assert disk.read(0, 8 * MIB) == before
        disk.write(5, b"later")
    stop(server)
    with cowfence.open(folder / "base") as base:
        assert base.read(0, 8 * MIB) == before
    with cowfence.open(folder / "a") as image:
        assert image.read(0, 10) == b"new\3\3later"


def test_the_socket_is_its_owners(folder: Path, start: Start) -> None:
    start("--control", "control", "a")
    assert (folder / "control").stat().st_mode & 0o777 == 0o600
    done = command("ctl", "-k", "nowhere", "status", cwd=folder, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "EXPORT" in command("ctl", "-k", "control", "status", cwd=folder).stdout
    assert json.loads(command("ctl", "--output=json", "-k", "control", "bitmap-list", cwd=folder).stdout) == []
    assert command("ctl", "-k", "control", "check", cwd=folder).returncode == 0
    command("ctl", "-k", "control", "drain", cwd=folder)


def test_drained_it_ends_with_its_last_client(start: Start) -> None:
    server = start("--control", "control", "a")
    with NbdDisk(uri()) as disk:
        ctl("drain")
        time.sleep(0.2)
        assert server.poll() is None
        with pytest.raises(CowfenceError):
            NbdDisk(uri())
        disk.write(0, b"still here")
    assert server.wait(20) == 0


def test_a_backup_is_the_moment_it_began(folder: Path, start: Start) -> None:
    """While a guest goes on writing all over the disk; and incremental, by bitmap, restored on the full one."""
    server = start("--control", "control", "a")
    stopping = threading.Event()
    content = bytearray(8 * MIB)

    def write(seed: int) -> None:
        rng = random.Random(seed)
        with NbdDisk(uri()) as disk:
            while not stopping.is_set():
                at = rng.randrange(8 * MIB - 100_000)
                disk.write(at, rng.randbytes(rng.randrange(1, 100_000)))
                if not rng.randrange(5):
                    disk.zero(rng.randrange(7) * MIB, 65536)

    def whole(export: str) -> bytes:
        with NbdDisk(uri(export)) as disk:
            return disk.read(0, disk.size)

    guests = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for guest in guests:
        guest.start()
    try:
        ctl("bitmap-add", name="first")
        time.sleep(0.3)
        ctl("backup-begin", name="full", bitmap="first", **{"next-bitmap": "second"})
        content[:] = whole("full")
        for _ in range(3):
            time.sleep(0.1)
            assert whole("full") == content
        with pytest.raises(CowfenceError, match="already"):
            ctl("backup-begin", name="full")
        with pytest.raises(CowfenceError, match="backup"):
            ctl("snapshot-delete", name="cowfence-backup:full")
        ctl("backup-end", name="full")
        time.sleep(0.3)
        ctl("backup-begin", name="next", bitmap="second", **{"next-bitmap": "third"})
        expected = whole("next")
        with NbdDisk(uri("next"), contexts=("qemu:dirty-bitmap:second",)) as backup:
            copied = 0
            for start_, length, dirty in backup.status("qemu:dirty-bitmap:second", 0, backup.size):
                if dirty:
                    content[start_ : start_ + length] = backup.read(start_, length)
                    copied += length
        assert content == expected
        assert copied
        ctl("backup-end", name="next", failed=True)
        assert [bitmap["name"] for bitmap in ctl("bitmap-list")] == ["second"]
    finally:
        stopping.set()
        for guest in guests:
            guest.join()
    stop(server)
    run(["qemu-img", "check", "a"])
    with cowfence.open(folder / "a") as image:
        assert not image.snapshots()


def test_a_backup_while_fio_writes(folder: Path, start: Start) -> None:
    """fio is stopped while the moment is looked at, and writes during all else. (Its jobs would be sessions of their own.)"""
    run(["qemu-img", "create", "-q", "-f", "qcow2", "disk", "64M"])
    server = start("--control", "control", "disk")
    fio = subprocess.Popen(
        [
            *(require("fio"), "--name=guest", "--thread", "--ioengine=nbd", f"--uri={uri()}", "--rw=randwrite"),
            *(
                "--bsrange=512-128k",
                "--bs_unaligned",
                "--iodepth=16",
                "--size=64M",
                "--time_based",
                "--runtime=120",
                "--fsync=100",
                "--randrepeat=0",
            ),
            f"--aux-path={folder}",
        ],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: ctl("status")["exports"][""]["clients"])
        time.sleep(1)
        os.killpg(fio.pid, signal.SIGSTOP)
        time.sleep(0.5)  # the requests that the server has
        run(["nbdcopy", uri(), "moment.raw"])
        ctl("backup-begin", name="then")
        os.killpg(fio.pid, signal.SIGCONT)
        for _ in range(3):
            run(["nbdcopy", uri("then"), "backup.raw"])
            assert (folder / "backup.raw").read_bytes() == (folder / "moment.raw").read_bytes()
        run(["nbdcopy", uri(), "later.raw"])
        assert (folder / "later.raw").read_bytes() != (folder / "moment.raw").read_bytes()
        assert fio.poll() is None
        ctl("backup-end", name="then")
    finally:
        os.killpg(fio.pid, signal.SIGKILL)
        fio.wait()
    stop(server)
    run(["qemu-img", "check", "disk"])


def test_what_a_killed_server_left_of_a_backup_is_cleared_away(folder: Path, start: Start) -> None:
    server = start("--control", "control", "--backup", "old", "a")
    with NbdDisk(uri()) as disk:
        disk.write(0, b"after")
        disk.flush()
        with NbdDisk(uri("old")) as backup:
            assert backup.read(0, 5) == b"\3" * 5
    server.kill()
    server.wait()
    time.sleep(0.5)  # its keeper
    with cowfence.open(folder / "a") as image:
        assert image.read(0, 5) == b"after"
        assert len(image.snapshots()) == 1
    run(["qemu-img", "check", "a"])
    server = start("--control", "control", "--backup", "old", "a")
    with NbdDisk(uri("old")) as backup:
        assert backup.read(0, 5) == b"after"
    stop(server)
    with cowfence.open(folder / "a") as image:
        assert not image.snapshots()
    run(["qemu-img", "check", "a"])


def test_the_snapshot_of_a_backup_is_not_deleted_by_its_id(start: Start) -> None:
    server = start("--control", "control", "--backup", "then", "a")
    (snapshot,) = ctl("snapshot-list")
    with pytest.raises(CowfenceError, match="is a backup's"):
        ctl("snapshot-delete", name=snapshot["id"])
    with NbdDisk(uri()) as disk, NbdDisk(uri("then")) as backup:
        disk.write(MIB, b"now" * 100_000)
        disk.flush()
        assert backup.read(MIB, 300_000) == b"\7" * 300_000
    stop(server)


def test_a_backup_that_cannot_begin_leaves_the_bitmap_recording(folder: Path, start: Start) -> None:
    server = start("--control", "control", "b")
    ctl("bitmap-add", name="mon")
    (folder / "b").rename(folder / "elsewhere")
    (folder / "b").write_bytes(b"another file")
    with NbdDisk(uri()) as disk:
        disk.write(0, b"changed")
        with pytest.raises(CowfenceError):
            ctl("backup-begin", name="full", bitmap="mon", **{"next-bitmap": "tue"})
    assert [(bitmap["name"], bitmap["enabled"]) for bitmap in ctl("bitmap-list")] == [("mon", True)]
    assert ctl("snapshot-list") == []
    (folder / "elsewhere").rename(folder / "b")
    ctl("backup-begin", name="full", bitmap="mon", **{"next-bitmap": "tue"})
    with NbdDisk(uri("full"), contexts=("qemu:dirty-bitmap:mon",)) as backup:
        assert next(iter(backup.status("qemu:dirty-bitmap:mon", 0, backup.size))) == (0, 65536, 1)
    stop(server)


def test_backups_of_one_name_one_right_after_another(start: Start) -> None:
    """The end of the one must not take the snapshot of the next."""
    server = start("--control", "control", "a")
    with NbdDisk(uri()) as disk:
        for number in range(20):
            disk.write(0, bytes([number]) * 4096)
            ctl("backup-begin", name="then")
            assert len(ctl("snapshot-list")) == 1
            disk.write(0, b"x" * 4096)
            with NbdDisk(uri("then")) as backup:
                assert backup.read(0, 4096) == bytes([number]) * 4096
                if number == 1:  # it waits a while for them
                    with pytest.raises(CowfenceError, match="has clients"):
                        ctl("backup-end", name="then")
            gone("then")
            ctl("backup-end", name="then")
            assert ctl("snapshot-list") == []
    stop(server)


def test_a_reload_waits_for_nobody_who_uses_a_snapshot(folder: Path, start: Start) -> None:
    run(["qemu-img", "snapshot", "-c", "s", "a"])
    run(["qemu-img", "snapshot", "-c", "s", "a"])
    text = CONFIG.replace('image = "a"\nall', 'image = "a"\nsnapshots = true\nall').replace(
        'name = "raw"', 'name = "disk@other"'
    )
    (folder / "c.toml").write_text(text)
    server = start("--config", "c.toml")
    assert names() == ["disk", "disk@s", "disk@2", "disk@other"]
    (folder / "c.toml").write_text(text.replace("snapshots = true\n", ""))
    with NbdDisk(uri("disk@s")) as then:
        assert ctl("reload") == {"added": [], "removed": [], "in-use": ["disk"]}
        with pytest.raises(CowfenceError, match="is exported"):
            ctl("snapshot-delete", export="disk", name="2")
        assert then.read(MIB, 1) == b"\7"
    gone("disk@s")
    assert ctl("reload") == {"added": ["disk"], "removed": ["disk"], "in-use": []}
    assert sorted(names()) == ["disk", "disk@other"]
    stop(server)


def test_snapshots_are_exported(start: Start) -> None:
    run(["qemu-img", "snapshot", "-c", "s", "b"])
    server = start("--control", "control", "--snapshots", "b")
    assert names() == ["", "@s"]
    with NbdDisk(uri()) as disk, NbdDisk(uri("@s")) as then:
        disk.write(0, b"now")
        assert then.read(0, 3) == b"\0\0\0"
    with pytest.raises(CowfenceError, match="is exported"):
        ctl("snapshot-delete", name="s")
    with pytest.raises(Unsupported):
        NbdDisk(uri("@nope"))
    stop(server)


def test_metrics_and_health(folder: Path) -> None:
    port = 39_000 + random.Random(str(folder)).randrange(1000)
    server = subprocess.Popen(
        [*COWFENCE, "serve", "-k", "sock", "--metrics", f"127.0.0.1:{port}", "--log", "json", "a"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    server.stdout.readline()
    with NbdDisk(uri()) as disk:
        for _ in range(5):
            disk.write(0, b"x" * 1000)
        disk.flush()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        assert 'cowfence_requests_total{export="",request="write"} 5.0' in text
        assert 'cowfence_bytes_total{direction="written",export=""} 5000.0' in text
        assert 'cowfence_clients{export=""} 1.0' in text
        assert 'cowfence_request_seconds_bucket{export="",le="+Inf"} 6.0' in text
        assert "cowfence_fences_total" in text
    for _ in range(10):  # who leaves without waiting for the answer is no news
        with socket.create_connection(("127.0.0.1", port)) as hasty:
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            hasty.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
        assert json.loads(answer.read())["healthy"]
    server.terminate()
    _, errors = server.communicate(timeout=30)
    assert all(json.loads(line)["level"] for line in errors.splitlines())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "a a",
        "--name x a b",
        "--backup x raw -f raw",
        "--tls-offered a",
        "--client x a",
        "--tls . a",
        "--metrics nonsense a",
        "--temporary -l s a",
        "--snapshots -f raw raw",
        "--snapshots --temporary a",
        "--commit-into-backing b",
        "--commit-into-backing -r a",
        "--config c.toml a",
        "--config c.toml --read-only",
        "-o 9M a",
        "-f raw --cache-size 5M raw",
        "--bind 0.0.0.0 --tls-offered --tls pki a",
    ],
)
def test_what_cannot_be_served(folder: Path, words: str) -> None:
    (folder / "c.toml").write_text(CONFIG)
    done = command("serve", "--port", "0", *words.split(), cwd=folder, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "sock").exists()


@pytest.mark.parametrize("verb", ["stop", "drain"])
def test_who_ends_the_server_is_told_that_it_ends(start: Start, verb: str) -> None:
    for _ in range(5):
        server = start("--control", "control", "a")
        assert ctl(verb) is None
        assert server.wait(20) == 0


@pytest.mark.parametrize("path", ["raw", "a", "/dev/null"])
def test_no_file_is_taken_for_one_with_the_number_of_a_process(folder: Path, path: str) -> None:
    before = (folder / path).read_bytes()
    done = command("serve", "--fork", "--pid-file", path, "-k", "sock", "a", cwd=folder, check=False)
    assert done.returncode == 1
    assert done.stderr == f"cowfence: {path}: there is a file that holds no number of a process\n"
    assert (folder / path).read_bytes() == before


def test_in_the_background_it_holds_nothing_of_who_started_it(folder: Path) -> None:
    reading, writing = os.pipe()
    subprocess.run(
        [*COWFENCE, "serve", "--fork", "--pid-file", "pid", "-k", "sock", "a"],
        cwd=folder,
        env=ENVIRONMENT,
        pass_fds=(writing,),
        check=True,
    )
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b""  # its end has come, while the server runs
    with NbdDisk(uri()) as disk:
        assert disk.read(MIB, 1) == b"\7"
    os.kill(int((folder / "pid").read_text()), signal.SIGTERM)


def test_in_the_background_it_still_says_where_it_is(folder: Path) -> None:
    done = command("serve", "--output=json", "--fork", "--pid-file", "pid", "-k", "sock", "a", cwd=folder)
    said = json.loads(done.stdout)
    assert said["uri"] == uri()
    assert str(said["pid"]) == (folder / "pid").read_text().strip()
    os.kill(said["pid"], signal.SIGTERM)
    for _ in range(400):
        if not (folder / "pid").exists():
            return
        time.sleep(0.05)
    pytest.fail("it did not end")


def test_bitmaps_that_no_client_can_say(folder: Path, start: Start) -> None:
    """Their names may be any bytes: nothing but NBD minds."""
    name = "b\udcff\n"
    with cowfence.open(folder / "a", writable=True) as image:
        image.bitmaps.add(name)
        image.bitmaps.add("x")
    for words in (
        ("info", "a"),
        ("info", "--output=json", "a"),
        ("check", "a"),
        ("check", "--output=json", "a"),
        ("inspect", "a"),
        ("measure", "-O", "qcow2", "a"),
        ("explain", "a", "0"),
        ("bitmap", "--merge", name, "a", "x"),
        ("bitmap", "--disable", "--enable", "--output=json", "a", name),
        ("bitmap", "--extents", "a", name),
        ("convert", "-O", "qcow2", "--bitmaps", "a", "copy"),
        ("resize", "a", "9M"),
    ):
        done = command(*words, cwd=folder)
        assert done.stderr == "", words
    with cowfence.open(folder / "copy") as image:
        assert [bitmap.name for bitmap in image.bitmaps] == [name, "x"]
    refused = command("serve", "-k", "sock", "-B", name, "a", cwd=folder, check=False)
    assert refused.returncode == 1
    assert refused.stderr.endswith("is not\n")
    assert refused.stderr.count("\n") == 1
    server = start("--control", "control", "a")
    assert [bitmap["name"] for bitmap in ctl("bitmap-list")] == [name, "x"]
    assert command("ctl", "-k", "control", "bitmap-list", cwd=folder).stdout.count("\n") == 2
    listed = json.loads(command("ctl", "-k", "control", "--output=json", "bitmap-list", cwd=folder).stdout)
    assert [bitmap["name"] for bitmap in listed] == ["b\ufffd\n", "x"]
    assert command("ctl", "-k", "control", "bitmap-clear", name, cwd=folder).stderr == ""
    with pytest.raises(CowfenceError, match="UTF-8"):
        ctl("backup-begin", name="moment", bitmap=name, **{"next-bitmap": "y"})
    assert [bitmap["name"] for bitmap in ctl("bitmap-list")] == [name, "x"]
    stop(server)


def test_names_that_no_client_can_say(folder: Path, start: Start) -> None:
    """Files and snapshots may be named with any bytes, exports not; sockets may."""
    (folder / "b").rename(folder / "b\udcff")
    for words in (["a", "b\udcff"], ["-x", "\udcff", "a"]):
        done = command("serve", "-k", "sock", *words, cwd=folder, check=False)
        assert done.returncode == 1
        assert done.stderr.endswith("is not\n")
        assert done.stderr.count("\n") == 1
    run(["qemu-img", "snapshot", "-c", "s\udcff", "a"])
    server = start("--control", "control", "--snapshots", "a")
    assert names() == ["", "@1"]
    with pytest.raises(CowfenceError, match="UTF-8"):
        ctl("backup-begin", name="\udcff")
    ctl("snapshot-create", name="two\nlines")
    listed = command("ctl", "-k", "control", "snapshot-list", cwd=folder).stdout.splitlines()
    assert len(listed) == 2
    assert command("ctl", "-k", "control", "stop", cwd=folder).stdout == ""
    assert server.wait(20) == 0
    server = subprocess.Popen(
        [*COWFENCE, "serve", "-k", "so\udcff", "a"], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "nbd+unix:///?socket=so%FF\n"
    with NbdDisk("nbd+unix:///?socket=so%FF") as disk:
        assert disk.read(MIB, 1) == b"\7"
    server.terminate()
    assert server.wait(20) == 0
