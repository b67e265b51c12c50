"""TLS, metadata contexts and sparse replies of our server before libnbd's and QEMU's clients, and our client before theirs."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowfence
from cowfence.nbd.client import NbdDisk, list_exports
from cowfence.nbd.export import Export
from cowfence.nbd.messages import ALLOCATION_DEPTH, BASE_ALLOCATION
from cowfence.nbd.server import Limits, Server
from cowfence.nbd.tls import server_context
from helpers_tls import make_pki
from judges import require, run

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    make_pki(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    path = folder / "top.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "base.qcow2", str(SIZE)])
    run(["qemu-io", "-c", "write -P 7 0 1M", "-c", "write -P 8 3M 100k", folder / "base.qcow2"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path])
    run(["qemu-img", "bitmap", "--add", path, "b"])
    run(["qemu-img", "bitmap", "--add", path, "other"])
    run(["qemu-io", "-c", "write -P 9 512k 1M", "-c", "write -z 5M 1M", path])
    run(["qemu-img", "bitmap", "--disable", path, "b"])
    run(["qemu-img", "bitmap", "--disable", path, "other"])
    return path


@contextmanager
def serving(image: Path, pki: Path) -> Iterator[Server]:
    with cowfence.open(image) as disk:
        bitmaps = {bitmap.name: (lambda *_, name=bitmap.name: disk.bitmaps.ranges(name)) for bitmap in disk.bitmaps}
        exports = {
            "": Export(disk, bitmaps=bitmaps, allocation_depth=True, description="all of it"),
            "hers": Export(disk, clients=frozenset({"alice"})),
        }
        made = Server(exports, limits=Limits(stop_seconds=1), tls=server_context(str(pki / "server")), tls_required=True)
        made.listen_tcp()
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.stop()
        thread.join(20)


def nbds(server: Server, pki: Path, who: str = "alice", export: str = "") -> str:
    port = server.uri().rsplit(":", 1)[1].split("/")[0]
    return f"nbds://{who}@localhost:{port}/{export}?tls-certificates={pki / who}"


def test_libnbd_over_tls(image: Path, pki: Path, tmp_path: Path) -> None:
    with serving(image, pki) as server:
        (shown,) = json.loads(run(["nbdinfo", "--json", nbds(server, pki)]).stdout)["exports"]
        assert shown["export-size"] == SIZE
        assert set(shown["contexts"]) == {
            BASE_ALLOCATION,
            ALLOCATION_DEPTH,
            "qemu:dirty-bitmap:b",
            "qemu:dirty-bitmap:other",
        }
        run(["nbdcopy", nbds(server, pki), tmp_path / "copy"])
        run(["qemu-img", "convert", "-O", "raw", image, tmp_path / "expected"])
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "expected").read_bytes()
        listed = json.loads(run(["nbdinfo", "--list", "--json", nbds(server, pki, "bob")]).stdout)["exports"]
        assert [shown["export-name"] for shown in listed] == [""]
        assert run(["nbdinfo", nbds(server, pki, "bob", "hers")], check=False).returncode
        assert run(["nbdinfo", nbds(server, pki, "alice", "hers")], check=False).returncode == 0
        plain = nbds(server, pki).replace("nbds://alice@", "nbd://").partition("?")[0]
        assert run(["nbdinfo", plain], check=False).returncode


def test_qemu_over_tls(image: Path, pki: Path, tmp_path: Path) -> None:
    with serving(image, pki) as server:
        port = server.uri().rsplit(":", 1)[1].split("/")[0]
        credentials = f"tls-creds-x509,id=t,dir={pki / 'alice'},endpoint=client"
        source = f"driver=nbd,host=localhost,port={port},tls-creds=t"
        run(["qemu-img", "convert", "--object", credentials, "--image-opts", source, "-O", "raw", tmp_path / "copy"])
        run(["qemu-img", "convert", "-O", "raw", image, tmp_path / "expected"])
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("context", [BASE_ALLOCATION, ALLOCATION_DEPTH, "qemu:dirty-bitmap:b"])
def test_maps_are_those_of_qemu_nbd(image: Path, pki: Path, tmp_path: Path, context: str) -> None:
    with serving(image, pki) as server:
        ours = json.loads(run(["nbdinfo", f"--map={context}", "--json", nbds(server, pki)]).stdout)
    socket = tmp_path / "theirs"
    with qemu_nbd(["-r", "-A", "-B", "b", "-B", "other", "-f", "qcow2", "-k", str(socket), str(image)], socket):
        theirs = json.loads(run(["nbdinfo", f"--map={context}", "--json", f"nbd+unix:///?socket={socket}"]).stdout)
    assert ours == theirs


@contextmanager
def qemu_nbd(words: list[str], socket: Path) -> Iterator[None]:
    server = subprocess.Popen([require("qemu-nbd"), "-t", *words])
    try:
        for _ in range(500):
            if socket.exists():
                break
            time.sleep(0.01)
        yield
    finally:
        server.terminate()
        server.wait()


def test_our_client_before_qemu_nbd_with_tls(pki: Path, tmp_path: Path) -> None:
    content = random.Random(2).randbytes(SIZE)
    (tmp_path / "disk").write_bytes(content)
    socket = tmp_path / "sock"
    words = ["--object", f"tls-creds-x509,id=t,dir={pki / 'server'},endpoint=server,verify-peer=on", "--tls-creds", "t"]
    with qemu_nbd([*words, "-x", "an export", "-D", "words", "-f", "raw", "-k", str(socket), str(tmp_path / "disk")], socket):
        uri = f"nbds+unix:///an%20export?socket={socket}&tls-certificates={pki / 'alice'}&tls-hostname=localhost"
        with NbdDisk(uri) as disk:
            assert disk.read(0, SIZE) == content
            disk.write(5, b"moo")
            disk.flush()
        (listed,) = list_exports(uri)
        assert (listed.name, listed.description) == ("an export", "words")
        assert listed.info is not None
        assert listed.info.size_bytes == SIZE
        assert BASE_ALLOCATION in listed.info.contexts
    assert (tmp_path / "disk").read_bytes() == content[:5] + b"moo" + content[8:]
