"""What both sides of the fixed newstyle negotiation share: state machines, bytes in, bytes to send out, a result at the end.

Each side is a generator, so that it reads like the specification's conversation: it yields how many bytes it needs next
and gets exactly these, however the network cut them. ``receive`` feeds it and returns what to send. Once ``ended`` is set,
``result`` says what was agreed on (None: the session is over), and ``trailing`` holds bytes that already belong to the
transmission.

Where both agree on TLS, ``wants_tls`` is set: what was said has to be sent, then TLS begins on the connection, then ``secured``
is called, and the conversation goes on inside of it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from cowfence.errors import CowfenceError
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import (
    BASE_ALLOCATION,
    PAYLOAD_MAX_BYTES,
    Buffer,
    ProtocolError,
)

Script: TypeAlias = Generator[int, bytes, None]


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client may know of an export. Sizes in bytes; ``flags`` without those that the negotiation adds. ``contexts``: the
    names of its metadata contexts, whose ids are their places from 1 on. ``held``: for now nobody gets it."""

    name: str
    size_bytes: int
    flags: int
    description: str = ""
    minimum_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    maximum_block_bytes: int = PAYLOAD_MAX_BYTES
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    held: bool = False


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What both sides agreed on when the transmission begins. ``contexts``: the ids of the metadata contexts that were
    selected, by their names."""

    export: ExportInfo
    style: Style
    contexts: Mapping[str, int] = field(default_factory=dict)


class Negotiation:
    """Feeds a script with exact pieces of what arrives and collects what it says."""

    def __init__(self) -> None:
        self.result: Negotiated | None = None
        self.ended = False
        self.trailing = b""
        self.wants_tls = False
        self._received = bytearray()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._script = self._converse()
        self._need_bytes = next(self._script)

    def _converse(self) -> Script:
        raise NotImplementedError

    def _say(self, message: bytes) -> None:
        self._out.append(message)
        self._out_bytes += len(message)

    def receive(self, data: Buffer = b"") -> bytes:
        """Take what arrived and return what to send. Bytes after the end of the negotiation go to ``trailing``."""
        received = self._received
        received += data
        position = 0
        while not (self.ended or self.wants_tls) and len(received) - position >= self._need_bytes:
            piece = bytes(memoryview(received)[position : position + self._need_bytes])
            position += self._need_bytes
            try:
                self._need_bytes = self._script.send(piece)
            except StopIteration:
                self.ended = True
            except CowfenceError:
                self.ended = True
                raise
        del received[:position]
        if self.wants_tls and received:
            # Whoever put them there would speak inside of TLS with another's voice.
            self.ended = True
            raise ProtocolError("bytes that were sent without waiting for TLS")
        if self.ended:
            self.trailing += bytes(received)
            received.clear()
        return self._take()

    def secured(self) -> None:
        """TLS has begun: what arrives from now on came through it."""
        self.wants_tls = False

    def _take(self) -> bytes:
        said = b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        return said
