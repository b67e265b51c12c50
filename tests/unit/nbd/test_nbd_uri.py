"""NBD URIs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.errors import Invalid
from cowfence.nbd.uri import NbdUri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://localhost", NbdUri()),
        ("nbd://host:10810/a%20b", NbdUri("a b", "host", 10810)),
        ("nbd://[::1]:5/x", NbdUri("x", "::1", 5)),
        ("nbd+unix:///?socket=/tmp/s", NbdUri(socket_path="/tmp/s")),
        ("nbds://host/x", NbdUri("x", "host", tls=True)),
        ("nbds://me%40here@host/?tls-psk-file=/k", NbdUri("", "host", tls=True, psk_file="/k", user="me@here")),
        (
            "nbds+unix:///?socket=/s&tls-certificates=/pki&tls-hostname=h&tls-verify-peer=no",
            NbdUri("", socket_path="/s", tls=True, tls_directory="/pki", tls_hostname="h", verify_peer=False),
        ),
        ("nbd+unix:///disk%40snap?socket=/tmp/a%20b", NbdUri("disk@snap", socket_path="/tmp/a b")),
    ],
)
def test_uris(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri
    assert NbdUri.parse(str(uri)) == uri


@pytest.mark.parametrize(
    "text",
    [
        "",
        "disk.qcow2",
        "http://localhost/x",
        "nbd:localhost:10809",
        "nbd:///x",
        "nbd://host:port/",
        "nbd://host:99999/",
        "nbd://host/x?socket=/tmp/s",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix://host/x?socket=/tmp/s",
        "nbd+unix:///x?socket=/a&socket=/b",
        "nbd://[::1/x",
        "nbd://host/%ff",
        "nbd://host/x?tls-certificates=/pki",
        "nbds://host/x?tls-verify-peer=maybe",
        "nbds://host/x?tls-hostname=a&tls-hostname=b",
    ],
)
def test_what_is_no_uri(text: str) -> None:
    with pytest.raises(Invalid):
        NbdUri.parse(text)


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.text("/abc é?&#%", min_size=1, max_size=30))
def test_any_name_and_path_survive(export: str, path: str) -> None:
    uri = NbdUri(export, socket_path="/" + path)
    assert NbdUri.parse(str(uri)) == uri


def test_names_of_files_are_any_bytes_and_exports_are_text() -> None:
    uri = NbdUri("ä", socket_path="so\udcff")
    assert str(uri) == "nbd+unix:///%C3%A4?socket=so%FF"
    assert NbdUri.parse(str(uri)) == uri
    assert NbdUri.parse("nbd+unix:///?socket=so\udcff").socket_path == "so\udcff"
    for text in ("nbd://h/%ff", "nbd://h/\udcff", "nbd://\udcff@h/"):
        with pytest.raises(Invalid):
            NbdUri.parse(text)
