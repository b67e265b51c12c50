"""``cowfence-nbd`` beside qemu-nbd: what it refuses, what it serves, how it lives and ends, and what it lists."""

from __future__ import annotations

import json
import os
import re
import signal
import socket as socket_module
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfence.nbd.client import NbdDisk
from golden.beside import theirs
from helpers_cli import ENVIRONMENT
from helpers_programs import Programs
from helpers_tls import Authority
from judges import require, run

MIB = 1 << 20
OURS = [sys.executable, "-m", "cowfence.cli.nbd"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run(["qemu-img", "create", "-q", "-f", "qcow2", "base", "4M"])
    run(["qemu-io", "-c", "write -P 3 0 64k", "base"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "a"])
    run(["qemu-img", "bitmap", "--add", "a", "on"])
    run(["qemu-img", "bitmap", "--add", "a", "off"])
    run(["qemu-io", "-c", "write -P 7 1M 128k", "a"])
    run(["qemu-img", "bitmap", "--disable", "a", "off"])
    run(["qemu-img", "snapshot", "-c", "s", "a"])
    run(["qemu-io", "-c", "write -P 8 1M 64k", "a"])
    (tmp_path / "raw").write_bytes(bytes(MIB) + b"x" * MIB)
    return tmp_path


REFUSED = """
nope
-f qcow2
a base
-p x a
-e -1 a
-e x a
-o x -f raw raw
-o 3M -f raw raw
-o -5 -f raw raw
-B nope -f qcow2 a
-B off -f raw raw
-l nope -f qcow2 a
-l snapshot.id=9 a
-s -l s a
--cache=foo a
--aio=foo a
--aio=native a
--discard=foo a
--detect-zeroes=foo a
--detect-zeroes=unmap --discard=ignore a
-n --cache=none a
--cache none --cache writeback a
-f foo a
-f qcow2 raw
-k /nonexistent/x -f qcow2 a
-L a
-L -k /nonexistent
-L -p 1
-c /dev/nbd0 a
--tls-creds=x a
--tls-authz=x a
--object secret a
--object tls-creds-x509,dir=/nonexistent a
--object tls-creds-x509,id=t,dir=/nonexistent,endpoint=server --tls-creds t a
--object tls-creds-x509,id=t,dir=/nonexistent,endpoint=client --tls-creds t a
--object foo,id=x a
-x
--foo
--pid-file=/nonexistent/p -k sock -f qcow2 a
--image-opts -f raw driver=raw,file.filename=raw
--selinux-label=x -k sock a
--fork -f qcow2 nope
""".strip().splitlines()


@pytest.mark.parametrize("line", ["", *REFUSED])
def test_both_refuse(programs: Programs, folder: Path, line: str) -> None:
    if "-l snapshot.id" not in line and "--object tls" not in line:  # those it may leave to the first client
        assert theirs(line.split(), folder, program="qemu-nbd").returncode == 1
    done = programs.run(line.split(), folder, program="cowfence-nbd")
    assert done.returncode == 1
    assert done.stderr.startswith("cowfence-nbd: ")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not (folder / "sock").exists()


def test_without_a_format_nothing_raw_is_written(programs: Programs, folder: Path) -> None:
    done = programs.run(["raw"], folder, program="cowfence-nbd")
    assert done.returncode == 1
    assert "add -f raw" in done.stderr


def _listens(path: Path) -> bool:
    """The file of a socket is there a moment before anybody listens."""
    with socket_module.socket(socket_module.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True


@contextmanager
def serving(program: list[str], words: str, socket: Path) -> Iterator[subprocess.Popen[str]]:
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        [*program, "-k", str(socket), *words.split()], env=ENVIRONMENT, text=True, stderr=subprocess.PIPE
    )
    for _ in range(1000):
        if _listens(socket) or process.poll() is not None:
            break
        time.sleep(0.01)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=20)


SERVED = [
    "-t -f qcow2 a",
    "-t -f qcow2 -r a",
    "-t -f qcow2 -x name -D words -A -r -B off a",
    "-t -f qcow2 -B on a",
    "-t -r -B on -f qcow2 a",
    "-t -f qcow2 -l s a",
    "-t -f qcow2 -l snapshot.name=s a",
    "-t -f qcow2 -s a",
    "-t -f raw -o 1048576 raw",
    "-t -f raw -o 4096 -r raw",
    "-t --image-opts driver=qcow2,file.filename=a",
    "-t -r raw",
    "a -t -f qcow2 -e 5 --cache=none --discard=unmap --detect-zeroes=unmap",
]


@pytest.mark.parametrize("words", SERVED)
def test_both_serve_the_same(folder: Path, words: str) -> None:
    """What a client may know of it, its bytes, and every map of it."""
    seen = []
    export = "name" if "-x" in words else ""
    for program in ([require("qemu-nbd")], OURS):
        socket = folder / "sock"
        uri = f"nbd+unix:///{export}?socket={socket}"
        with serving(program, words, socket):
            (shown,) = json.loads(run(["nbdinfo", "--json", uri]).stdout)["exports"]
            for differs in ("can_multi_conn", "block_size_preferred", "block_size_minimum", "content", "uri"):
                shown.pop(differs, None)
            run(["nbdcopy", uri, folder / "copy"])
            maps = [run(["nbdinfo", "--json", f"--map={context}", uri]).stdout for context in shown["contexts"]]
            listed = theirs(["-L", "-k", str(socket)], folder, program="qemu-nbd").stdout
            seen.append(
                (shown, (folder / "copy").read_bytes(), maps, re.sub(r"(flags|opt block|min block): .*|multi ", "", listed))
            )
            (folder / "copy").unlink()
    assert seen[0] == seen[1]


def test_both_list_the_same(programs: Programs, folder: Path) -> None:
    with serving([require("qemu-nbd")], "-t -f qcow2 -A -x it -D words a", folder / "sock"):
        expected = theirs(["-L", "-k", f"{folder}/sock"], folder, program="qemu-nbd").stdout
        assert programs.run(["-L", "-k", "sock"], folder, program="cowfence-nbd").stdout == expected
    with serving(OURS, "-t -f qcow2 -A -x it -D words a", folder / "sock"):
        expected = theirs(["-L", "-k", f"{folder}/sock"], folder, program="qemu-nbd").stdout
        assert programs.run(["-L", "-k", "sock"], folder, program="cowfence-nbd").stdout == expected


@pytest.mark.parametrize("program", ["theirs", "ours"])
def test_it_ends_with_its_last_client(folder: Path, program: str) -> None:
    which = [require("qemu-nbd")] if program == "theirs" else OURS
    with serving(which, "-f qcow2 a", folder / "sock") as process:
        theirs(["-L", "-k", f"{folder}/sock"], folder, program="qemu-nbd")  # a look is no use
        assert process.poll() is None
        run(["qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", f"nbd+unix:///?socket={folder}/sock"])
        assert process.wait(20) == 0
    run(["qemu-io", "-c", "read -P 9 0 64k", "a"])
    assert not (folder / "sock").exists()


def test_temporary_writes_are_forgotten(folder: Path) -> None:
    before = (folder / "a").read_bytes()
    with serving(OURS, "-s -f qcow2 a", folder / "sock"), NbdDisk(f"nbd+unix:///?socket={folder}/sock") as disk:
        disk.write(5, b"moo")
        disk.flush()
        assert disk.read(4, 5) == b"\3moo\3"
    assert (folder / "a").read_bytes() == before


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_well(folder: Path, name: signal.Signals) -> None:
    with serving(OURS, "-t -f qcow2 --pid-file pid a", folder / "sock") as process:
        run(["qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", f"nbd+unix:///?socket={folder}/sock"])
        assert int((folder / "pid").read_text()) == process.pid
        process.send_signal(name)
        assert process.wait(20) == 0
    assert not (folder / "pid").exists()
    run(["qemu-img", "check", "-q", "a"])
    run(["qemu-io", "-c", "read -P 9 0 64k", "a"])


def test_in_the_background(folder: Path) -> None:
    done = subprocess.run(
        [*OURS, "-k", f"{folder}/sock", "--fork", "--pid-file", "pid", "-t", "-f", "qcow2", "a"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # It is ready now, not soon.
    pid = int((folder / "pid").read_text())
    run(["qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", f"nbd+unix:///?socket={folder}/sock"])
    os.kill(pid, signal.SIGTERM)
    for _ in range(1000):
        if not (folder / "sock").exists() and not (folder / "pid").exists():
            break
        time.sleep(0.01)
    run(["qemu-io", "-c", "read -P 9 0 64k", "a"])
    run(["qemu-img", "check", "-q", "a"])


def test_one_client_at_a_time(folder: Path) -> None:
    with serving(OURS, "-t -f qcow2 a", folder / "sock"):
        uri = f"nbd+unix:///?socket={folder}/sock"
        with NbdDisk(uri), pytest.raises(Exception, match="timed out"):
            NbdDisk(uri, timeout_seconds=0.3)
        NbdDisk(uri).close()


def test_zeros_are_detected(folder: Path) -> None:
    with (
        serving(OURS, "-t -f qcow2 --detect-zeroes=unmap a", folder / "sock"),
        NbdDisk(f"nbd+unix:///?socket={folder}/sock") as disk,
    ):
        disk.write(1 * MIB, bytes(128 * 1024))
        disk.flush()
    found = json.loads(run(["qemu-img", "map", "--output=json", "a"]).stdout)
    assert not any(entry["data"] for entry in found if entry["start"] == MIB)


def test_socket_activation(folder: Path) -> None:
    """As systemd does it: the socket is there before the program is."""
    script = (
        "import os,socket,sys\n"
        "s=socket.socket(socket.AF_UNIX); s.bind('sock'); s.listen()\n"
        "os.dup2(s.fileno(),3); os.set_inheritable(3,True)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()),LISTEN_FDS='1')\n"
        "os.execv(sys.argv[1],sys.argv[1:])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, *OURS, "-f", "qcow2", "a"], env=ENVIRONMENT)
    for _ in range(1000):
        if (folder / "sock").exists():
            break
        time.sleep(0.01)
    run(["qemu-io", "-f", "raw", "-c", "read -P 3 0 64k", f"nbd+unix:///?socket={folder}/sock"])
    assert process.wait(20) == 0


def test_tls_and_who_may_come_in(folder: Path) -> None:
    authority = Authority(folder)
    server, alice, bob = (
        authority.directory("server", "localhost", known_by="server"),
        authority.directory("client", "alice"),
        authority.directory("client", "bob"),
    )
    words = (
        f"-t -f qcow2 --object tls-creds-x509,id=t,dir={server},endpoint=server,verify-peer=yes --tls-creds t "
        "--object authz-simple,id=z,identity=alice --tls-authz z -x it a"
    )
    with serving(OURS, words, folder / "sock"):
        for who, code in ((alice, 0), (bob, 1)):
            uri = f"nbds+unix:///it?socket={folder}/sock&tls-certificates={who}&tls-hostname=localhost"
            if code:
                with pytest.raises(Exception, match="no such export"):
                    NbdDisk(uri)
            else:
                NbdDisk(uri).close()
            ours = subprocess.run(
                [
                    *OURS,
                    "-L",
                    "-k",
                    f"{folder}/sock",
                    "--object",
                    f"tls-creds-x509,id=t,dir={who},endpoint=client",
                    "--tls-creds",
                    "t",
                    "--tls-hostname",
                    "localhost",
                ],
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
            assert ours.stdout.startswith(f"exports available: {1 - code}"), ours.stderr
        assert run(["nbdinfo", f"nbd+unix:///it?socket={folder}/sock"], check=False).returncode
