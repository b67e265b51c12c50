"""Images behind URLs: a server on the loopback that serves ranges, or does not, or serves less than it said."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cowfence.errors import ReadOnly, StorageFailed, WouldBlock
from cowfence.storage.remote import RemoteStorage
from helpers_cli import cowfence as command
from judges import run

pytest.importorskip("aiohttp")
MIB = 1 << 20


class _Server(ThreadingHTTPServer):
    files: dict[str, bytes]
    ranges: list[tuple[str, int, int]]
    behaviour = ""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        content = self.server.files.get(self.path)
        wanted = self.headers.get("Range")
        if content is None or (self.server.behaviour == "fails" and wanted):
            self._answer(404 if content is None else 500, b"", body=body)
            return
        if wanted and self.server.behaviour != "whole":
            first, last = (int(text) for text in wanted.removeprefix("bytes=").split("-"))
            self.server.ranges.append((self.path, first, last))
            part = content[first : last + 1]
            if self.server.behaviour == "short":
                part = part[:-1]
            self._answer(206, part, ("Content-Range", f"bytes {first}-{last}/{len(content)}"), body=body)
            return
        self._answer(200, content, ("Accept-Ranges", "bytes"), body=body)

    def _answer(self, code: int, content: bytes, *headers: tuple[str, str], body: bool) -> None:
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    rng = random.Random(4)
    raw = bytearray(12 * MIB)
    for at in range(0, 12 * MIB, MIB):
        raw[at : at + 300_000] = rng.randbytes(300_000)
    (tmp_path / "a.raw").write_bytes(raw)
    run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "a.raw", tmp_path / "a.qcow2"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", tmp_path / "over"])
    served = _Server(("127.0.0.1", 0), _Handler)
    served.files = {f"/{name}": (tmp_path / name).read_bytes() for name in ("a.raw", "a.qcow2", "over")}
    served.ranges = []
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def _url(server: _Server, name: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


@pytest.mark.parametrize("words", ["-O raw a.qcow2", "-c -O qcow2 a.qcow2", "-f raw -O qcow2 a.raw"])
def test_an_image_behind_a_url(server: _Server, tmp_path: Path, words: str) -> None:
    *options, name = words.split()
    command("convert", *options, _url(server, name), tmp_path / "out")
    run(
        [
            "qemu-img",
            "compare",
            "-f",
            "raw",
            "-F",
            "raw" if "raw" in options[-1:] else "qcow2",
            tmp_path / "a.raw",
            tmp_path / "out",
        ]
    )
    sizes = [last - first + 1 for _, first, last in server.ranges]
    assert max(sizes) <= MIB
    # Nothing comes twice.
    assert sum(sizes) <= len(server.files[f"/{name}"])


def test_info_of_an_image_behind_a_url(server: _Server, tmp_path: Path) -> None:
    local = command("info", tmp_path / "a.qcow2").stdout.splitlines()
    remote = command("info", _url(server, "a.qcow2")).stdout.splitlines()
    assert remote[0] == f"image: {_url(server, 'a.qcow2')}"
    assert remote[3] == "disk size: unavailable"
    assert [*remote[1:3], *remote[4:]] == [*local[1:3], *local[4:]]
    assert command("info", _url(server, "over"), check=False).returncode == 1


def test_image_opts_and_json_name_urls(server: _Server, tmp_path: Path) -> None:
    url = _url(server, "a.qcow2")
    command("convert", "--image-opts", "-O", "raw", f"driver=qcow2,file.driver=http,file.url={url}", tmp_path / "one")
    described = f'json:{{"driver": "qcow2", "file": {{"driver": "http", "url": "{url}"}}}}'
    command("convert", "-O", "raw", described, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == server.files["/a.raw"]


def test_compare_reads_urls_too(server: _Server, tmp_path: Path) -> None:
    command("compare", _url(server, "a.qcow2"), tmp_path / "a.qcow2")


@pytest.mark.parametrize("behaviour", ["whole", "short", "fails"])
def test_a_server_that_does_not_do_what_it_should(server: _Server, tmp_path: Path, behaviour: str) -> None:
    server.behaviour = behaviour
    done = command("convert", "-O", "raw", "-f", "raw", _url(server, "a.raw"), tmp_path / "out", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cowfence: {_url(server, 'a.raw')}: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nothing", "over"])
def test_what_cannot_be_opened(server: _Server, tmp_path: Path, name: str) -> None:
    done = command("convert", "-O", "raw", _url(server, name), tmp_path / "out", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not (tmp_path / "out").exists()


def test_a_storage_that_is_only_read(server: _Server) -> None:
    storage = RemoteStorage(_url(server, "a.raw"))
    try:
        buffers = [bytearray(10), bytearray(2 * MIB), bytearray(5)]
        with pytest.raises(WouldBlock):
            storage.readv(0, buffers, wait=False)
        assert storage.readv(7, buffers) == 2 * MIB + 15
        assert b"".join(buffers) == server.files["/a.raw"][7 : 7 + 2 * MIB + 15]
        assert storage.readv(12 * MIB - 3, [bytearray(10)]) == 3
        assert storage.readv(12 * MIB, [bytearray(10)]) == 0
        assert bytes(storage.read_cached(0, 5)) == server.files["/a.raw"][:5]
        with pytest.raises(ReadOnly):
            storage.writev(0, [b"1"], "")
    finally:
        storage.close()


def test_what_failed_once_is_asked_for_again(server: _Server) -> None:
    storage = RemoteStorage(_url(server, "a.raw"))
    try:
        server.behaviour = "fails"
        with pytest.raises(StorageFailed):
            storage.readv(0, [bytearray(10)])
        server.behaviour = ""
        assert storage.readv(0, [bytearray(10)]) == 10
    finally:
        storage.close()
