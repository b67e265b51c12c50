"""TLS: offered, required, refused; who may use what; and what an attacker may try in between."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfence.disk.raw import RawDisk
from cowfence.errors import CowfenceError, Invalid, StorageFailed, Unsupported
from cowfence.nbd.client import NbdDisk, list_exports
from cowfence.nbd.export import Export
from cowfence.nbd.handshake import ServerHandshake, Tls
from cowfence.nbd.messages import InfoQuery, Option, ProtocolError, Rep, decode_option_reply_header, encode_option
from cowfence.nbd.negotiation import ExportInfo
from cowfence.nbd.server import Limits, Server
from cowfence.nbd.tls import TlsSession, client_context, psk_context, server_context
from helpers_storage import TinyStorage
from helpers_tls import Authority, make_pki

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    make_pki(folder)
    (folder / "others").mkdir()
    Authority(folder / "others", "another CA").directory("client", "mallory")
    return folder


@pytest.fixture(params=[True, False], ids=["required", "offered"])
def server(request: pytest.FixtureRequest, tmp_path: Path, pki: Path) -> Iterator[Server]:
    exports = {
        "": Export(RawDisk(TinyStorage(SIZE))),
        "hers": Export(RawDisk(TinyStorage(SIZE)), clients=frozenset({"alice"})),
        "named": Export(RawDisk(TinyStorage(SIZE)), clients=frozenset({"CN=bob,O=Cows\\, Ltd,C=IS"})),
    }
    made = Server(exports, limits=Limits(stop_seconds=1), tls=server_context(str(pki / "server")), tls_required=request.param)
    made.listen_unix(str(tmp_path / "sock"))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.stop()
    thread.join(20)
    assert not thread.is_alive()


def uri(folder: Path, pki: Path | None, who: str = "alice", export: str = "") -> str:
    if pki is None:
        return f"nbd+unix:///{export}?socket={folder}/sock"
    return f"nbds+unix:///{export}?socket={folder}/sock&tls-certificates={pki / who}&tls-hostname=localhost"


@pytest.mark.usefixtures("server")
def test_a_disk_through_tls(tmp_path: Path, pki: Path) -> None:
    data = random.Random(1).randbytes(3 * MIB + 5)
    with NbdDisk(uri(tmp_path, pki)) as disk, NbdDisk(uri(tmp_path, pki, "bob")) as other:
        disk.write(7, data)
        disk.flush()
        assert other.read(7, len(data)) == data
        disk.zero(0, SIZE)
        assert other.read(0, SIZE) == bytes(SIZE)
        assert [(extent.start, extent.length_bytes) for extent in disk.extents(0, SIZE)]


def test_without_tls(server: Server, tmp_path: Path) -> None:
    if server._tls_mode is Tls.REQUIRED:
        with pytest.raises(Unsupported, match="TLS is required"):
            NbdDisk(uri(tmp_path, None))
        with pytest.raises(Unsupported, match="TLS is required"):
            list_exports(uri(tmp_path, None))
    else:
        with NbdDisk(uri(tmp_path, None)) as disk:
            assert disk.read(0, 1) == b"\0"
        assert [listed.name for listed in list_exports(uri(tmp_path, None))] == [""]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("who", "allowed"), [("alice", ["", "hers"]), ("bob", ["", "named"])])
def test_exports_for_some_are_not_there_for_others(tmp_path: Path, pki: Path, who: str, allowed: list[str]) -> None:
    assert [listed.name for listed in list_exports(uri(tmp_path, pki, who))] == allowed
    for export in ("", "hers", "named"):
        if export in allowed:
            NbdDisk(uri(tmp_path, pki, who, export)).close()
        else:
            with pytest.raises(Unsupported, match="no such export"):
                NbdDisk(uri(tmp_path, pki, who, export))


@pytest.mark.usefixtures("server")
def test_a_certificate_of_another_authority(tmp_path: Path, pki: Path) -> None:
    mallory = pki / "others" / "mallory"
    with pytest.raises(ProtocolError, match="not accepted"):
        NbdDisk(f"nbds+unix:///?socket={tmp_path}/sock&tls-certificates={mallory}")
    with pytest.raises(CowfenceError):
        NbdDisk(f"nbds+unix:///?socket={tmp_path}/sock&tls-certificates={mallory}&tls-verify-peer=no").read(0, 1)
    # And none at all.
    with pytest.raises(CowfenceError):
        NbdDisk(f"nbds+unix:///?socket={tmp_path}/sock&tls-verify-peer=no").read(0, 1)
    # The server lives.
    NbdDisk(uri(tmp_path, pki)).close()


@pytest.mark.usefixtures("server")
def test_a_server_of_another_name(tmp_path: Path, pki: Path) -> None:
    with pytest.raises(ProtocolError, match="not accepted"):
        NbdDisk(uri(tmp_path, pki).replace("tls-hostname=localhost", "tls-hostname=elsewhere"))


def test_a_server_without_tls(tmp_path: Path, pki: Path) -> None:
    made = Server({"": Export(RawDisk(TinyStorage(SIZE)))})
    made.listen_unix(str(tmp_path / "sock"))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        with pytest.raises(Unsupported, match="refuses TLS"):
            NbdDisk(uri(tmp_path, pki))
    finally:
        made.stop()
        thread.join(20)


@pytest.mark.usefixtures("server")
def test_garbage_inside_of_tls_costs_one_connection(tmp_path: Path, pki: Path) -> None:
    for begin in (b"\x16\x03\x01\xff\xff", b"GET / HTTP/1.0\r\n\r\n", bytes(100)):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(tmp_path / "sock"))
            sock.recv(18)
            sock.sendall(bytes((0, 0, 0, 3)) + encode_option(Option.STARTTLS))
            assert decode_option_reply_header(sock.recv(20))[1] == Rep.ACK
            sock.sendall(begin)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass
    NbdDisk(uri(tmp_path, pki)).close()


EXPORTS = {"": ExportInfo("", 4096, 1)}


def begun(tls: Tls) -> ServerHandshake:
    handshake = ServerHandshake(EXPORTS, tls=tls)
    handshake.receive()
    handshake.receive(bytes((0, 0, 0, 3)))
    return handshake


def answer(handshake: ServerHandshake, option: int, data: bytes = b"") -> int:
    return decode_option_reply_header(handshake.receive(encode_option(option, data))[:20])[1]


def test_required_means_before_anything_else() -> None:
    handshake = begun(Tls.REQUIRED)
    for option in (Option.LIST, Option.STRUCTURED_REPLY, Option.GO, Option.INFO, Option.SET_META_CONTEXT, 99):
        assert answer(handshake, option, InfoQuery("").encode()) == Rep.ERR_TLS_REQD
    assert answer(handshake, Option.STARTTLS) == Rep.ACK
    handshake.secured_with(EXPORTS)
    assert answer(handshake, Option.STARTTLS) == Rep.ERR_INVALID
    assert answer(handshake, Option.GO, InfoQuery("").encode()) == Rep.INFO
    handshake = begun(Tls.REQUIRED)
    handshake.receive(encode_option(Option.EXPORT_NAME, b""))
    assert handshake.ended
    assert handshake.result is None


def test_what_was_agreed_on_before_tls_is_forgotten() -> None:
    handshake = begun(Tls.OFFERED)
    assert answer(handshake, Option.STRUCTURED_REPLY) == Rep.ACK
    assert answer(handshake, Option.STARTTLS) == Rep.ACK
    handshake.secured_with(EXPORTS)
    assert answer(handshake, Option.GO, InfoQuery("").encode()) == Rep.INFO
    assert handshake.result is not None
    assert not handshake.result.style


def test_what_is_put_behind_starttls_is_not_heard() -> None:
    """Somebody on the way could add it, in the client's name (CVE-2021-3716 of nbdkit)."""
    handshake = begun(Tls.OFFERED)
    said = handshake.receive(encode_option(Option.STARTTLS) + encode_option(Option.LIST))
    assert handshake.ended
    assert handshake.problem is not None
    assert handshake.result is None
    assert decode_option_reply_header(said[:20])[1] == Rep.ACK
    assert len(said) == 20


def test_credentials_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed):
        server_context(str(tmp_path))
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(Invalid):
        server_context(str(tmp_path))
    with pytest.raises(Invalid):
        client_context(str(tmp_path))
    if not hasattr(__import__("ssl").SSLContext, "set_psk_server_callback"):
        with pytest.raises(Unsupported, match=r"3\.13"):
            psk_context(str(tmp_path / "keys.psk"))


def test_a_session_in_pieces(pki: Path) -> None:
    """One byte at a time, both ways."""
    ours = TlsSession(server_context(str(pki / "server")), server_side=True)
    theirs = TlsSession(client_context(str(pki / "alice"), hostname="localhost"), server_side=False, hostname="localhost")
    theirs.receive()
    heard = b""
    while not (ours.established and theirs.established):
        for byte in theirs.take():
            heard += ours.receive(bytes([byte]))
        for byte in ours.take():
            theirs.receive(bytes([byte]))
    assert ours.peer_names() == {"alice", "CN=alice,O=Cows\\, Ltd,C=IS"}
    for byte in theirs.encrypt([b"moo", memoryview(b""), bytearray(b"!" * 20_000)]):
        heard += ours.receive(bytes([byte]))
    assert heard == b"moo" + b"!" * 20_000
    ours.receive(theirs.goodbye())
    assert ours.ended
