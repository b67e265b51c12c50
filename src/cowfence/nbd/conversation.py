"""How a client begins a connection, with TLS where it is wanted, without I/O: for clients that wait, and for asyncio."""

from __future__ import annotations

import getpass
from collections.abc import Generator
from typing import TYPE_CHECKING

from cowfence.nbd.negotiation import Negotiation
from cowfence.nbd.uri import NbdUri

if TYPE_CHECKING:
    from cowfence.nbd.tls import TlsSession


def conversation(handshake: Negotiation, tls: TlsSession | None) -> Generator[bytes, bytes, bytes]:
    """Carry a negotiation to its end; ``tls`` begins where it wants that.

    Yields what has to be sent, and is sent what arrived; returns what has to be sent last. Raises what the negotiation and
    ``TlsSession.receive`` raise.
    """
    to_send = b""
    while not handshake.ended:
        data = yield to_send
        to_send = b""
        if tls is not None and tls.established:
            data = tls.receive(data)
            to_send = tls.take()
        said = handshake.receive(data)
        to_send += said if tls is None or not tls.established else tls.encrypt((said,))
        if handshake.wants_tls and tls is not None:
            plain = tls.receive()
            to_send += tls.take()
            while not tls.established:
                plain = tls.receive((yield to_send))
                to_send = tls.take()
            handshake.secured()
            to_send += tls.encrypt((handshake.receive(plain),))
    return to_send


def tls_of(uri: NbdUri) -> TlsSession | None:
    """The session that a URI asks for. Raises as ``tls.client_context`` and ``tls.psk_context`` do."""
    if not uri.tls:
        return None
    from cowfence.nbd.tls import TlsSession, client_context, psk_context

    hostname = uri.tls_hostname or (uri.host if uri.socket_path is None else None)
    if uri.psk_file is not None:
        context = psk_context(uri.psk_file, user=uri.user or getpass.getuser())
    else:
        context = client_context(uri.tls_directory, verify_peer=uri.verify_peer, hostname=hostname)
    return TlsSession(context, server_side=False, hostname=hostname)
