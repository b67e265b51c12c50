"""What a client may do after it has lost the connection to an NBD server, and why that is safe. Without I/O; for clients that
wait, and for asyncio.

With ``reconnect_seconds``, a new connection is made when it is needed, with growing pauses. It must offer the same export on
the same terms; else, and where a server breaks the protocol, the disk has failed for good. What happens to each request:

- *Reads and block status* that were not answered, or to which the server said that it stops, are asked again: they change
  nothing. Each for ``reconnect_seconds`` at most.
- *Writes, zeroes and discards* that were not answered fail. The server may have done them, in part or not, and may even do
  them yet, while it works off what it had received on the old connection: NBD has no way to make sure. So they are never
  repeated, and later ones that overlap them are refused: such a late write could land on top of what was acknowledged since.
  Whoever knows that the old server is dead opens the disk anew. What was never sent is not meant here, and goes to the new
  connection; a message of which one byte was sent counts as sent.
- *Flush*, and what was acknowledged before: a server that died has lost what it acknowledged and had not flushed, and one that
  lives may be another. If at the moment of the loss every acknowledged change was covered by a flush (one that was sent after
  the acknowledgement came, and answered), or was made with FUA, nothing was at stake: a flush that was not answered is sent
  again, and later ones mean what is written on the new connection. If not, the promise is broken: every flush fails from then
  on and nothing more is written, as after a fence that failed. Reading goes on. What counts as acknowledged is every reply
  that came, at the moment it was taken from the stream, whether or not who waits for it has seen it since. Replies that arrived
  before the end of the connection are taken before it is lost.

``Ledger`` counts for one connection; ``Recovery`` decides for the disk.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Final

from cowfence.disk.base import Request, overlaps, range_of
from cowfence.errors import CowfenceError, Invalid, ReadOnly, StorageFailed
from cowfence.nbd.client_transmission import Completion
from cowfence.nbd.messages import Command, CommandFlag, NbdErrno, ProtocolError
from cowfence.nbd.negotiation import Negotiated
from cowfence.nbd.terms import Piece

CHANGES: Final = (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)

_FIRST_PAUSE_SECONDS: Final = 0.02
_MOST_PAUSE_SECONDS: Final = 2.0
_MOST_OPEN_SECONDS: Final = 60.0
"""For one attempt: a host that does not answer may be replaced by one that does."""


class Ledger:
    """What was asked over one connection, and what was answered. ``lost``: why it has ended. ``answered``: at least one reply
    came."""

    def __init__(self) -> None:
        self.lost: CowfenceError | None = None
        self.answered = False
        self._asked: dict[int, tuple[Piece, int]] = {}
        """What waits for its reply, by its cookie, and how many changes had been acknowledged when it was sent."""
        self._acknowledged = self._flushed = 0

    @property
    def unflushed(self) -> bool:
        """Changes were acknowledged that no flush covers."""
        return self._acknowledged > self._flushed

    @property
    def unanswered_changes(self) -> list[tuple[int, int]]:
        """The offset and the end of each."""
        changes = (piece for piece, _ in self._asked.values() if piece.command in CHANGES)
        return [(piece.offset, piece.offset + piece.length_bytes) for piece in changes]

    def send(self, cookie: int, piece: Piece) -> None:
        """Note a message before its first byte is sent."""
        self._asked[cookie] = piece, self._acknowledged

    def unsend(self, cookie: int) -> None:
        """No byte of it was sent after all, nor will be."""
        del self._asked[cookie]

    def take(self, completion: Completion) -> None:
        """Note a reply."""
        self.answered = True
        piece, acknowledged = self._asked.pop(completion.cookie)
        if completion.error:
            return
        if piece.command is Command.FLUSH:
            self._flushed = max(self._flushed, acknowledged)
        elif piece.command in CHANGES and not piece.flags & CommandFlag.FUA:
            self._acknowledged += 1


class Recovery:
    """Of one disk, over all its connections. ``name``: for messages. ``seconds``: for how long a request that meets a lost
    connection may look for a new one; 0: there is none. ``promise_broken``: why nothing can be flushed and written any more.

    Raises Invalid for ``seconds`` below 0.
    """

    def __init__(self, name: str, seconds: float) -> None:
        if not seconds >= 0:  # nor NaN
            raise Invalid("reconnect_seconds is 0 or more")
        self.seconds = seconds
        self.promise_broken: CowfenceError | None = None
        self._name = name
        self._agreed: Negotiated | None = None
        self._failed: CowfenceError | None = None
        self._unanswered: list[tuple[int, int]] = []
        """Ranges (offset, end) of changes that a server may have made, or may make yet."""
        self._pause_seconds = 0.0

    # --- what becomes of a request ---

    def check_change(self, request: Request) -> None:
        """Raises ReadOnly where a write, zero or discard must not be sent."""
        if self.promise_broken is not None:
            raise ReadOnly(f"{self._name}: read-only since {self.promise_broken}")
        if overlaps(range_of(request), self._unanswered):
            raise ReadOnly(
                f"{self._name}: offset {request.offset}: an earlier change here was not answered when the connection was lost, "
                "and the server may still make it; open the disk anew once it cannot"
            )

    def check_flush(self) -> None:
        """Raises StorageFailed where no flush can keep the promise."""
        if self.promise_broken is not None:
            raise self.promise_broken.with_traceback(None)

    def is_leaving(self, completion: Completion) -> bool:
        """The server stops, and will close the connection: as if it had not answered, where there may be another."""
        return completion.error == NbdErrno.ESHUTDOWN and self.seconds > 0

    def patience(self, ledger: Ledger, now: float, deadline: float | None) -> float:
        """Until when a request that the connection of this ledger left unanswered may look for another, in seconds by the clock
        of ``now``. ``deadline``: what this said when the request met its first lost connection; None: this is the first.

        Raises why there was no answer, where the time is over."""
        deadline = now + self.seconds if deadline is None else deadline
        if now >= deadline:
            stopping = OSError(errno.ESHUTDOWN, "the server is stopping")
            raise (ledger.lost or StorageFailed(self._name, "exchange", 0, stopping)).with_traceback(None)
        return deadline

    # --- connections ---

    def accept(self, agreed: Negotiated) -> None:
        """Hold the terms of a new connection against those of the first. Raises Invalid where they are others."""
        if self._agreed is None:
            self._agreed = agreed
        elif agreed != self._agreed:
            raise Invalid(f"{self._name}: the server has come back with another export or on other terms")

    def lose(self, ledger: Ledger, error: CowfenceError) -> None:
        """The connection has ended, and all that arrived has been taken."""
        ledger.lost = error
        if isinstance(error, ProtocolError):
            self._failed = error
        self._unanswered += ledger.unanswered_changes
        if ledger.unflushed:
            cause = OSError(errno.EIO, f"acknowledged writes may be lost: {error}")
            self.promise_broken = StorageFailed(self._name, "flush", 0, cause)

    def fail(self, error: CowfenceError) -> CowfenceError:
        """Nothing can be done any more; returns why."""
        self._failed = error
        return error

    def wants_another(self, ledger: Ledger) -> bool:
        """Whether the connection of this ledger has to be replaced. Raises why it cannot be."""
        if self._failed is not None:
            raise self._failed.with_traceback(None)
        if ledger.lost is not None and not self.seconds:
            raise ledger.lost.with_traceback(None)
        return ledger.lost is not None

    def attempts(self, ledger: Ledger, clock: Callable[[], float]) -> Iterator[tuple[float, float]]:
        """How to try to replace the connection of this ledger, as often as there is time: how long to pause, and how long the
        attempt may take then, in seconds. ``clock``: the time in seconds. Pauses grow, also from one connection that answers
        nothing to the next."""
        deadline = clock() + self.seconds
        if ledger.answered:
            self._pause_seconds = 0.0
        while (left_seconds := deadline - clock()) > 0:
            pause_seconds = min(self._pause_seconds, left_seconds)
            self._pause_seconds = min(max(2 * self._pause_seconds, _FIRST_PAUSE_SECONDS), _MOST_PAUSE_SECONDS)
            yield pause_seconds, min(max(left_seconds - pause_seconds, _FIRST_PAUSE_SECONDS), _MOST_OPEN_SECONDS)
