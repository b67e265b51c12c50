"""The transmission phase, the server's side, without I/O. The client's is in ``client_transmission``.

``ServerTransmission`` owns the buffer that the socket receives into. One receive usually brings many requests, and all of
them leave together as a ``Batch`` that ``Disk.submit`` takes as it is; the answers become one list of buffers for one
vectored send. Payloads are not copied on the way: the data of a WRITE is a slice of the receive buffer, the data of a READ
is the buffer that the disk returned. Therefore a batch must be answered, or its data taken away with ``keep_data``, before
the next receive.

The rules it keeps ("Transmission phase" of the specification):

- A request that breaks a rule is answered with an error and costs nothing else. The payload of a refused WRITE is skipped
  without being stored; one so large that it can only be an attack closes the connection, as does a wrong magic, after
  which nothing in the stream can be trusted.
- Writes past the end: ENOSPC; anything else past the end: EINVAL; writes to a read-only export: EPERM.
- How replies look is the business of ``framing``. Where it has chunks, a long READ is answered without its zeros.
- A batch is bounded in requests and in bytes, so that a client cannot make one receive cost more than the shell allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np

from cowfence.disk.base import BLOCKED, Outcome, Request, Verb
from cowfence.errors import CowfenceError, Invalid, NoSpace, ReadOnly
from cowfence.nbd.framing import FRAMINGS, Descriptors, Style
from cowfence.nbd.inbox import USUAL_BYTES, Inbox
from cowfence.nbd.messages import (
    PAYLOAD_MAX_BYTES,
    Buffer,
    Command,
    CommandFlag,
    NbdErrno,
    ProtocolError,
    decode_status_query,
)
from cowfence.nbd.messages import TransmissionFlag as Flag
from cowfence.units import KIB


class Part(Protocol):
    """Bytes of a reply that stand elsewhere: whoever sends it knows where."""

    def __len__(self) -> int: ...


Reply: TypeAlias = Buffer
QueryResult: TypeAlias = list[tuple[int, Descriptors]] | CowfenceError | None
"""BLOCK_STATUS: the descriptors of each context. CACHE: None when done. Either: the error."""

_STATUS_QUERY_MAX_BYTES: Final = 4 * KIB
_SKIP_MAX_BYTES: Final = 2 * PAYLOAD_MAX_BYTES
_SPLIT_BYTES: Final = 32 * KIB
"""Zeros are looked for in the data of READs from this length on."""
_BLOCK_BYTES: Final = 4 * KIB

# Plain ints: comparing with an IntFlag member costs a call into enum for each request.
_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_VERB_READ: Final = Verb.READ
_VERB_WRITE: Final = Verb.WRITE
_BUFFER_TYPES: Final = (bytearray, bytes, memoryview)

_VALID_FLAGS: Final = {
    Command.READ: _FUA,
    Command.WRITE: _FUA,
    Command.FLUSH: _FUA,
    Command.TRIM: _FUA,
    Command.CACHE: _FUA,
    Command.WRITE_ZEROES: _FUA | _NO_HOLE | _FAST_ZERO,
    Command.BLOCK_STATUS: _FUA | _REQ_ONE,
}
_WRITING: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))


class Query(NamedTuple):
    """A request that is no ``Disk`` request: BLOCK_STATUS or CACHE. ``contexts``: the ids of what a BLOCK_STATUS asks about."""

    command: Command
    cookie: int
    offset: int
    length_bytes: int
    one: bool = False
    contexts: tuple[int, ...] = ()


class Batch:
    """The requests that stood complete in the receive buffer.

    ``requests[i]`` has the cookie ``cookies[i]``. ``replies`` are answers already given, ``queries`` ask for what
    ``Disk.submit`` does not know. ``undivided``: cookies of READs whose reply must be one chunk. ``payload_bytes``: the data of
    its WRITEs. ``lent``: the receive buffer in which that stands, where it has been lent.
    """

    __slots__ = ("cookies", "lent", "payload_bytes", "queries", "replies", "requests", "undivided")

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.cookies: list[int] = []
        self.queries: list[Query] = []
        self.replies: list[Reply] = []
        self.undivided: set[int] = set()
        self.payload_bytes = 0
        self.lent: bytearray | None = None


class ServerTransmission:
    """The server's side of one connection. ``writable`` and ``flags``: of the export; ``block_bytes``: of its disk.
    ``contexts``: the ids of the metadata contexts that were selected.

    ``disconnecting`` is set once the client has said goodbye; nothing is read after that. ``errors``: how many were answered.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        writable: bool = True,
        block_bytes: int = 1,
        style: Style = Style.SIMPLE,
        contexts: tuple[int, ...] = (),
    ) -> None:
        self.disconnecting = False
        self.stopping = False
        self.errors = 0
        self._framing = FRAMINGS[style]
        self._structured = style >= Style.STRUCTURED
        self._size_bytes = size_bytes
        self._writable = writable
        self._block_bytes = block_bytes
        self._contexts = contexts
        self._skip_bytes = 0
        self._inbox = Inbox()
        self._header_bytes = self._framing.request.size
        self._magic_bytes = self._framing.request_magic.to_bytes(4, "big")
        self._need_bytes = self._header_bytes
        self._fuller = False

    # --- receiving ---

    @property
    def has_complete(self) -> bool:
        """True if the last ``next_batch`` stopped at its bounds and not at the end of what has arrived."""
        return self._fuller

    @property
    def lacks_payload(self) -> bool:
        """True if nothing can be done before more of a payload has arrived."""
        inbox = self._inbox
        return inbox.end - inbox.start < self._need_bytes > self._header_bytes and not self.stopping

    @property
    def has_more(self) -> bool:
        """True if something has arrived that the last batch did not have: the client does not wait for its replies."""
        return self._inbox.end > self._inbox.start

    def space(self) -> memoryview:
        """Where the next receive puts its bytes; never empty."""
        return self._inbox.space(self._need_bytes, self._header_bytes)

    def received(self, count: int) -> None:
        """``count`` bytes were received into ``space()``."""
        self._inbox.end += count
        self._skip()

    def feed(self, data: Buffer) -> None:
        """Bytes that arrived by another way than ``space()``: those that came together with the handshake's last."""
        self._inbox.put(data, self._need_bytes)
        self._skip()

    def _skip(self) -> None:
        if self._skip_bytes:
            inbox = self._inbox
            skipped = min(self._skip_bytes, inbox.end - inbox.start)
            self._skip_bytes -= skipped
            inbox.start += skipped

    def keep_data(self, batch: Batch, kept: Iterable[int]) -> None:
        """Take the data of the WRITEs at these indices out of the receive buffer, for they are answered later.

        Small ones are copied; where they are large, the buffer is left to them and a new one taken.
        """
        requests = batch.requests
        writes = [index for index in kept if requests[index].verb is _VERB_WRITE]
        if sum(requests[index].length_bytes for index in writes) > USUAL_BYTES:
            self._inbox.leave(self._need_bytes)
            return
        for index in writes:
            requests[index] = requests[index]._replace(data=bytes(requests[index].data))

    def lend_data(self, batch: Batch) -> Batch | None:
        """The WRITEs of a batch, which leave it, with the receive buffer in which their data stands; None where one of them is
        to be flushed, too. ``take_back`` it when it is answered."""
        writes, both = Batch(), list(zip(batch.requests, batch.cookies, strict=True))
        writes.requests = [request for request in batch.requests if request.verb is _VERB_WRITE]
        if any(request.fua for request in writes.requests):
            return None
        writes.cookies = [cookie for request, cookie in both if request.verb is _VERB_WRITE]
        batch.cookies = [cookie for request, cookie in both if request.verb is not _VERB_WRITE]
        batch.requests = [request for request in batch.requests if request.verb is not _VERB_WRITE]
        writes.lent = self._inbox.lend()
        return writes

    def take_back(self, lent: bytearray) -> None:
        """The buffer of a batch that ``lend_data`` made and that has been answered."""
        self._inbox.take_back(lent)

    # --- requests ---

    def next_batch(self, requests_max: int, bytes_max: int) -> Batch:
        """All complete requests that have arrived, up to the bounds (at least one, however large).

        Raises ``ProtocolError`` where the stream cannot be trusted any more.
        """
        batch = Batch()
        if self.disconnecting or self._skip_bytes:
            self._fuller = False
            return batch
        inbox = self._inbox
        requests, cookies, view = batch.requests, batch.cookies, inbox.view
        add_request, add_cookie = requests.append, cookies.append
        framing, header_bytes = self._framing, self._header_bytes
        unpack_from, make, request_type = framing.request.unpack_from, tuple.__new__, Request
        size_bytes, plain, expected = self._size_bytes, not self.stopping, framing.request_magic
        write_flags = _FUA | framing.payload_flag if self._writable and plain else -1
        position, end = inbox.start, inbox.end
        payload_bytes = 0
        last_header = end - header_bytes
        left = requests_max
        need_bytes = header_bytes
        while position <= last_header and left > 0 and bytes_max > 0:
            magic, flags, command, cookie, offset, length_bytes = unpack_from(view, position)
            if magic != expected:
                raise ProtocolError(f"request: wrong magic {magic:#x}")
            # READs and WRITEs that break no rule are the hot path; all else goes to _other.
            if 0 < length_bytes <= PAYLOAD_MAX_BYTES and offset + length_bytes <= size_bytes and plain:
                if command == _READ and not flags:
                    add_request(make(request_type, (_VERB_READ, offset, length_bytes, b"", False, True)))
                    add_cookie(cookie)
                    position += header_bytes
                    left -= 1
                    bytes_max -= length_bytes
                    continue
                if command == _WRITE and flags | _FUA == write_flags:
                    data_start = position + header_bytes
                    data_end = data_start + length_bytes
                    if data_end > end:
                        need_bytes += length_bytes
                        break
                    data = view[data_start:data_end]
                    add_request(make(request_type, (_VERB_WRITE, offset, length_bytes, data, bool(flags & _FUA), True)))
                    add_cookie(cookie)
                    position = data_end
                    payload_bytes += length_bytes
                    left -= 1
                    bytes_max -= length_bytes
                    continue
            is_status_query = command == _BLOCK_STATUS and flags & framing.payload_flag
            if is_status_query and end - position - header_bytes < length_bytes <= _STATUS_QUERY_MAX_BYTES:
                need_bytes += length_bytes
                break
            position += header_bytes
            left -= 1
            inbox.start = position
            self._other(batch, flags, command, cookie, offset, length_bytes)
            position = inbox.start
            if self.disconnecting or self._skip_bytes:
                break
            if command == Command.READ:
                bytes_max -= length_bytes
        if 4 <= end - position < header_bytes and view[position : position + 4] != self._magic_bytes and not self.disconnecting:
            # Otherwise a peer that speaks something shorter would wait with us for the rest of a header.
            raise ProtocolError("request: wrong magic")
        inbox.start = position
        batch.payload_bytes = payload_bytes
        self._need_bytes = need_bytes
        self._fuller = left <= 0 or bytes_max <= 0
        return batch

    def _other(self, batch: Batch, flags: int, command: int, cookie: int, offset: int, length_bytes: int) -> None:
        """One request whose header ends at the inbox's start and that is not on the hot path: refuse it, or translate it."""
        if command == Command.DISC:
            self.disconnecting = True
            return
        inbox = self._inbox
        payload_bytes = self._payload_bytes(flags, command, length_bytes)
        contexts = self._contexts
        refusal: tuple[int, str] | None = None
        if payload_bytes:
            if command == Command.BLOCK_STATUS and payload_bytes <= _STATUS_QUERY_MAX_BYTES:
                try:
                    length_bytes, contexts = decode_status_query(inbox.view[inbox.start : inbox.start + payload_bytes])
                except ProtocolError as error:
                    refusal = NbdErrno.EINVAL, str(error)
                else:
                    if not set(contexts) <= set(self._contexts) or len(set(contexts)) < len(contexts):
                        refusal = NbdErrno.EINVAL, "a metadata context that was not selected, or twice"
            elif command != Command.WRITE:
                refusal = NbdErrno.EINVAL, "this request takes no payload"
            # A payload that is not used is dropped as it arrives, without being stored.
            present = min(payload_bytes, inbox.end - inbox.start)
            inbox.start += present
            self._skip_bytes = payload_bytes - present
        refusal = refusal or self._refusal(flags, command, offset, length_bytes)
        if refusal is not None:
            self._reply_error(batch.replies, cookie, offset, *refusal)
            return
        fua = bool(flags & _FUA)
        if command in (Command.BLOCK_STATUS, Command.CACHE) and length_bytes:
            one = bool(flags & _REQ_ONE)
            batch.queries.append(Query(Command(command), cookie, offset, length_bytes, one, contexts))
            return
        request: Request | None = None
        if command == Command.FLUSH:
            request = Request(Verb.FLUSH)
        elif not length_bytes:
            # Zero lengths are "unspecified" but must not disconnect: nothing to do, well done.
            framing = self._framing
            done = framing.done_reading if command == Command.READ else framing.done
            batch.replies.append(done(cookie, offset))
        elif command == Command.READ:
            request = Request(Verb.READ, offset, length_bytes)
            if flags & _DF:
                batch.undivided.add(cookie)
        elif command == Command.TRIM:
            request = Request(Verb.DISCARD, offset, length_bytes, fua=fua)
        elif command == Command.WRITE_ZEROES:
            request = Request(Verb.ZERO, offset, length_bytes, fua=fua, unmap=not flags & _NO_HOLE)
        if request is not None:
            batch.requests.append(request)
            batch.cookies.append(cookie)

    def _payload_bytes(self, flags: int, command: int, length_bytes: int) -> int:
        """What follows the header of a request that is not on the hot path. Raises ``ProtocolError`` where nobody can know, or
        would want to."""
        payload_flag = self._framing.payload_flag
        brings = bool(flags & payload_flag) if payload_flag else command == Command.WRITE
        if command == Command.WRITE and not brings:
            raise ProtocolError("a WRITE that does not say that it brings a payload")
        if brings and length_bytes > _SKIP_MAX_BYTES:
            raise ProtocolError(f"a request with a payload of {length_bytes} bytes")
        return length_bytes if brings else 0

    def _refusal(self, flags: int, command: int, offset: int, length_bytes: int) -> tuple[int, str] | None:
        """Error number and text for a request that breaks a rule; None for one that may be done."""
        if self.stopping:
            return NbdErrno.ESHUTDOWN, "the server is stopping"
        valid_flags = _VALID_FLAGS.get(command)  # type: ignore[call-overload]
        if valid_flags is None:
            return NbdErrno.EINVAL, f"unknown command {command}"
        if command == Command.READ and self._structured:
            valid_flags |= _DF
        if command in (Command.WRITE, Command.BLOCK_STATUS):
            valid_flags |= self._framing.payload_flag
        if flags & ~valid_flags:
            return NbdErrno.EINVAL, f"flags {flags:#x} are not valid here"
        if command == Command.FLUSH:
            return (NbdErrno.EINVAL, "FLUSH takes no range") if offset or length_bytes else None
        if command in _WRITING and not self._writable:
            return NbdErrno.EPERM, "the export is read-only"
        if command == Command.BLOCK_STATUS and not (self._contexts and length_bytes):
            return NbdErrno.EINVAL, "an empty range" if self._contexts else "no metadata context was selected"
        if command in (Command.READ, Command.WRITE) and length_bytes > PAYLOAD_MAX_BYTES:
            return NbdErrno.EINVAL, f"{length_bytes} bytes are more than the limit of {PAYLOAD_MAX_BYTES}"
        if offset + length_bytes > self._size_bytes:
            full = command in (Command.WRITE, Command.WRITE_ZEROES)
            text = f"range {offset}+{length_bytes} lies past the end of the export"
            return (NbdErrno.ENOSPC if full else NbdErrno.EINVAL), text
        # "Fast" means without writing zeroes byte by byte: whole blocks, and free to unmap them.
        if flags & _FAST_ZERO and (flags & _NO_HOLE or (offset | length_bytes) % self._block_bytes):
            return NbdErrno.ENOTSUP, "zeroing this range would be no faster than writing it"
        return None

    # --- replies ---

    def answer(self, out: list[Reply], batch: Batch, outcomes: Sequence[Outcome]) -> list[int]:
        """Append the replies to the requests of ``batch``; returns the indices of those that are ``BLOCKED``."""
        blocked: list[int] = []
        add = out.append
        done, data, splits = self._framing.done, self._framing.data, self._structured
        cookies, requests = batch.cookies, batch.requests
        for index, outcome in enumerate(outcomes):
            if outcome is None:
                if requests[index][0] is not _VERB_READ:
                    add(done(cookies[index], requests[index][1]))
                    continue
            elif isinstance(outcome, _BUFFER_TYPES):
                verb, offset, length_bytes, _, _, _ = requests[index]
                if verb is _VERB_READ and len(outcome) == length_bytes:
                    if splits and length_bytes >= _SPLIT_BYTES and cookies[index] not in batch.undivided:
                        self._add_runs(out, cookies[index], offset, memoryview(outcome))
                        continue
                    add(data(cookies[index], offset, offset, length_bytes))
                    add(outcome)
                    continue
            elif outcome is BLOCKED:
                blocked.append(index)
                continue
            self._reply_failure(out, cookies[index], requests[index][1], outcome)
        return blocked

    def answer_elsewhere(self, batch: Batch, find: Callable[[int, int], Part | None]) -> list[Reply | Part]:
        """The replies to those READs of ``batch`` whose bytes (offset, length) ``find`` has elsewhere; they leave the batch."""
        out: list[Reply | Part] = []
        left: list[tuple[Request, int]] = []
        for request, cookie in zip(batch.requests, batch.cookies, strict=True):
            offset, length_bytes = request.offset, request.length_bytes
            part = find(offset, length_bytes) if request.verb is _VERB_READ else None
            if part is None:
                left.append((request, cookie))
            else:
                out += (self._framing.data(cookie, offset, offset, length_bytes), part)
        batch.requests = [request for request, _ in left]
        batch.cookies = [cookie for _, cookie in left]
        return out

    def _add_runs(self, out: list[Reply], cookie: int, offset: int, content: memoryview) -> None:
        """The reply to a READ, without its zeros: a chunk for each run of data or zeros."""
        runs = zero_runs(content)
        for start, stop, zero in runs:
            last = stop == len(content)
            if zero:
                out.append(self._framing.hole(cookie, offset, offset + start, stop - start, last=last))
            else:
                out.append(self._framing.data(cookie, offset, offset + start, stop - start, last=last))
                out.append(content if len(runs) == 1 else content[start:stop])

    def answer_finally(self, out: list[Reply], batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """The same for requests that were waited for; one still ``BLOCKED`` has failed."""
        for index in self.answer(out, batch, outcomes):
            self._reply_failure(out, batch.cookies[index], batch.requests[index].offset, BLOCKED)

    def answer_query(self, out: list[Reply], query: Query, result: QueryResult) -> None:
        """Append the reply to a query."""
        if isinstance(result, CowfenceError):
            self._reply_failure(out, query.cookie, query.offset, result)
        elif result is None:
            out.append(self._framing.done(query.cookie, query.offset))
        else:
            for number, (context_id, descriptors) in enumerate(result, 1):
                last = number == len(result)
                out.append(self._framing.status(query.cookie, query.offset, context_id, descriptors, last=last))

    def _reply_failure(self, out: list[Reply], cookie: int, offset: int, outcome: Outcome) -> None:
        # An outcome of the wrong kind or length would put the stream out of step: it is an error of ours, and EIO.
        if isinstance(outcome, CowfenceError):
            self._reply_error(out, cookie, offset, error_number(outcome), str(outcome))
        else:
            self._reply_error(out, cookie, offset, NbdErrno.EIO, "the disk gave no usable answer")

    def _reply_error(self, out: list[Reply], cookie: int, offset: int, error: int, text: str) -> None:
        self.errors += 1
        out.append(self._framing.error(cookie, offset, error, text))


def zero_runs(content: memoryview) -> list[tuple[int, int, bool]]:
    """The runs (start, end, whether it is zeros) of some data, in blocks of 4 KiB."""
    length_bytes = len(content)
    whole_bytes = length_bytes - length_bytes % _BLOCK_BYTES
    words = np.frombuffer(content[:whole_bytes], dtype=np.uint64).reshape(-1, _BLOCK_BYTES // 8)
    # Most blocks that are not zeros show it in their first word.
    zero = words[:, 0] == 0
    if not zero.any():
        return [(0, length_bytes, False)]
    suspects = np.flatnonzero(zero)
    zero[suspects] = ~words[suspects].any(axis=1)
    edges = (np.flatnonzero(np.diff(zero)) + 1) * _BLOCK_BYTES
    starts = [0, *edges.tolist()]
    runs = [(start, stop, bool(zero[start // _BLOCK_BYTES])) for start, stop in pairwise([*starts, whole_bytes])]
    if whole_bytes < length_bytes:
        if runs[-1][2]:
            runs.append((whole_bytes, length_bytes, False))
        else:
            runs[-1] = (runs[-1][0], length_bytes, False)
    return runs


def error_number(error: CowfenceError) -> int:
    """The number that stands on the wire for an error of the tree."""
    if isinstance(error, NoSpace):
        return NbdErrno.ENOSPC
    if isinstance(error, ReadOnly):
        return NbdErrno.EPERM
    if isinstance(error, Invalid):
        return NbdErrno.EINVAL
    return NbdErrno.EIO


SERVER_FLAGS: Final = int(Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.SEND_CACHE)
WRITABLE_FLAGS: Final = int(Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO)


def export_flags(*, writable: bool, shared: bool = True) -> int:
    """The transmission flags that ``ServerTransmission`` keeps the promises of. ``shared``: more than one client may come."""
    flags = SERVER_FLAGS | (WRITABLE_FLAGS if writable else int(Flag.READ_ONLY))
    return flags | (int(Flag.CAN_MULTI_CONN) if shared else 0)
