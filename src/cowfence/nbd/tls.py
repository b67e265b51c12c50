"""TLS for NBD, on the standard library's ``ssl``: credentials, and a session without I/O.

Credentials are files in a directory, named as QEMU and libvirt name them: ``ca-cert.pem``, ``ca-crl.pem`` (optional), and
``server-cert.pem`` and ``server-key.pem``, or ``client-cert.pem`` and ``client-key.pem``. Keys that both sides share (PSK)
stand in a file of lines ``NAME:HEX``; for them ``ssl`` needs Python 3.13.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from cowfence.errors import Invalid, StorageFailed, Unsupported
from cowfence.nbd.messages import Buffer, ProtocolError

if TYPE_CHECKING:
    from ssl import SSLContext

_READ_BYTES: Final = 64 * 1024
_PSK_CIPHERS: Final = "PSK"


def server_context(directory: str, *, verify_peer: bool = True) -> SSLContext:
    """What a server shows to clients, and with ``verify_peer`` demands of them: a certificate that the CA has signed.

    Raises Invalid for files that cannot be used, StorageFailed for those that cannot be read.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    _load_own(context, directory, "server")
    if verify_peer:
        _load_ca(context, directory)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(directory: str | None = None, *, verify_peer: bool = True, hostname: str | None = None) -> SSLContext:
    """What a client shows, where the directory has a certificate for it, and by what it knows the server: by the CA of the
    directory, or without one by those that the host trusts. ``hostname``: None does not compare it with the certificate's.

    Raises as ``server_context`` does.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = verify_peer and hostname is not None
    if not verify_peer:
        context.verify_mode = ssl.CERT_NONE
    elif directory is not None:
        _load_ca(context, directory)
    else:
        context.load_default_certs()
    if directory is not None and os.path.exists(os.path.join(directory, "client-cert.pem")):
        _load_own(context, directory, "client")
    return context


def psk_context(path: str, *, user: str | None = None) -> SSLContext:
    """For a client that shares a key with the server, as ``user``; with None, for a server that shares keys with its clients.

    Raises Unsupported before Python 3.13, and as ``server_context`` does.
    """
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        raise Unsupported("TLS", "pre-shared keys before Python 3.13; use certificates")
    keys = _shared_keys(path)
    context = _context(ssl.PROTOCOL_TLS_SERVER if user is None else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # TLS 1.3 has no pre-shared keys without certificates in OpenSSL's callbacks that GnuTLS would take.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    if user is None:
        context.set_psk_server_callback(  # type: ignore[attr-defined, unused-ignore]
            lambda identity: keys.get(identity or "", b"")
        )
        return context
    if user not in keys:
        raise Invalid(f"{path}: it has no key of {user!a}")
    context.set_psk_client_callback(  # type: ignore[attr-defined, unused-ignore]
        lambda _hint: (user, keys[user])
    )
    return context


def _context(protocol: int) -> SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load_own(context: SSLContext, directory: str, role: str) -> None:
    paths = [os.path.join(directory, f"{role}-{kind}.pem") for kind in ("cert", "key")]
    try:
        context.load_cert_chain(*paths)
    except ssl.SSLError as error:
        raise Invalid(f"{directory}: {role}-cert.pem and {role}-key.pem cannot be used: {_reason(error)}") from None
    except OSError as error:
        missing = next((path for path in paths if not os.path.exists(path)), directory)
        raise StorageFailed(missing, "open", 0, error) from error


def _load_ca(context: SSLContext, directory: str) -> None:
    path, revoked = (os.path.join(directory, name) for name in ("ca-cert.pem", "ca-crl.pem"))
    try:
        context.load_verify_locations(path)
        if os.path.exists(revoked):
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except ssl.SSLError as error:
        raise Invalid(f"{directory}: ca-cert.pem or ca-crl.pem cannot be used: {_reason(error)}") from None
    except OSError as error:
        raise StorageFailed(path, "open", 0, error) from error


def _shared_keys(path: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    try:
        with open(path, encoding="utf-8", errors="strict") as lines:
            for line in lines:
                name, colon, digits = line.strip().partition(":")
                if colon:
                    keys[name] = bytes.fromhex(digits)
    except OSError as error:
        raise StorageFailed(path, "open", 0, error) from error
    except ValueError:
        raise Invalid(f"{path}: not lines of NAME:HEX") from None
    return keys


class TlsSession:
    """One side of a TLS connection, without I/O. ``established``: the handshake is over. ``ended``: the peer said goodbye."""

    def __init__(self, context: SSLContext, *, server_side: bool, hostname: str | None = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname if not server_side else None
        )
        self.established = False
        self.ended = False

    def receive(self, data: Buffer = b"") -> bytes:
        """Take what arrived; returns what the peer said in it. Afterwards ``take`` may have something to send.

        Raises ``ProtocolError``, also where the peer is not whom it has to be; then too.
        """
        self._incoming.write(data)
        said: list[bytes] = []
        try:
            if not self.established:
                self._object.do_handshake()
                self.established = True
            while piece := self._object.read(_READ_BYTES):
                said.append(piece)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            raise ProtocolError(f"TLS: {_reason(error)}") from None
        return b"".join(said)

    def take(self) -> bytes:
        """What has to be sent now."""
        return self._outgoing.read()

    def encrypt(self, messages: Iterable[Buffer]) -> bytes:
        """What has to be sent to say ``messages``."""
        write = self._object.write
        for message in messages:
            if len(message):
                write(message)
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        """The end of our side: what has to be sent last."""
        with suppress(ssl.SSLError):  # the peer has not answered, and need not
            self._object.unwrap()
        return self._outgoing.read()

    def peer_names(self) -> frozenset[str]:
        """The names that the peer's certificate, which was verified, gives it: common name, DNS names, and the whole
        distinguished name as RFC 4514 writes it."""
        certificate: dict[str, Any] = self._object.getpeercert() or {}
        subject: list[tuple[str, str]] = [pair for level in certificate.get("subject", ()) for pair in level]
        alternatives: list[tuple[str, str]] = list(certificate.get("subjectAltName", ()))
        names = {value for key, value in subject if key == "commonName"}
        names |= {value for kind, value in alternatives if kind == "DNS"}
        if subject:
            names.add(",".join(f"{_ATTRIBUTES.get(key, key)}={_escaped(value)}" for key, value in reversed(subject)))
        return frozenset(names)


_ATTRIBUTES: Final = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}


def _escaped(value: str) -> str:
    return "".join("\\" + char if char in ',+"\\<>;' else char for char in value)


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    return (error.reason or str(error)).replace("_", " ").lower()
