"""The rules after a lost connection, without a connection."""

from __future__ import annotations

import errno
import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.disk.base import Request, Verb
from cowfence.errors import Closed, CowfenceError, Invalid, ReadOnly, StorageFailed
from cowfence.nbd.client_transmission import Completion
from cowfence.nbd.framing import Style
from cowfence.nbd.messages import Command, CommandFlag, NbdErrno, ProtocolError
from cowfence.nbd.negotiation import ExportInfo, Negotiated
from cowfence.nbd.recovery import CHANGES, Ledger, Recovery
from cowfence.nbd.terms import Piece

GONE = StorageFailed("disk", "exchange", 0, OSError(errno.ECONNRESET, "gone"))
FLUSH = Piece(0, Command.FLUSH, 0, 0, 0)


def change(offset: int = 0, *, fua: bool = False, command: Command = Command.WRITE) -> Piece:
    return Piece(0, command, int(CommandFlag.FUA) if fua else 0, offset, 512)


def asked(*pieces: Piece) -> Ledger:
    """A ledger of messages with the cookies 0, 1, ..., none of which is answered."""
    ledger = Ledger()
    for cookie, piece in enumerate(pieces):
        ledger.send(cookie, piece)
    return ledger


def answer(ledger: Ledger, *cookies: int, error: int = 0) -> None:
    for cookie in cookies:
        ledger.take(Completion(cookie, error))


# --- what a ledger counts ---


def test_a_flush_covers_what_was_acknowledged_when_it_was_sent() -> None:
    ledger = asked(change())
    answer(ledger, 0)
    assert ledger.unflushed
    ledger.send(1, FLUSH)
    answer(ledger, 1)
    assert not ledger.unflushed
    ledger.send(2, change())
    ledger.send(3, FLUSH)
    answer(ledger, 2, 3)  # acknowledged after the flush was sent
    assert ledger.unflushed


def test_flushes_that_are_answered_in_another_order() -> None:
    ledger = asked(FLUSH, change())
    answer(ledger, 1)
    ledger.send(2, FLUSH)
    answer(ledger, 2, 0)
    assert not ledger.unflushed


@pytest.mark.parametrize("piece", [change(fua=True), Piece(0, Command.READ, 0, 0, 512)])
def test_what_needs_no_flush(piece: Piece) -> None:
    ledger = asked(piece)
    assert not ledger.answered
    answer(ledger, 0)
    assert ledger.answered
    assert not ledger.unflushed


def test_what_failed_was_not_acknowledged_and_flushes_nothing() -> None:
    ledger = asked(change())
    answer(ledger, 0, error=5)
    assert not ledger.unflushed
    assert not ledger.unanswered_changes
    ledger = asked(change())
    answer(ledger, 0)
    ledger.send(1, FLUSH)
    answer(ledger, 1, error=5)
    assert ledger.unflushed


def test_unanswered_changes_are_those_of_which_something_was_sent() -> None:
    pieces = [change(512 * index, command=command) for index, command in enumerate(CHANGES)]
    ledger = asked(FLUSH, *pieces, Piece(0, Command.READ, 0, 0, 512))
    assert ledger.unanswered_changes == [(0, 512), (512, 1024), (1024, 1536)]
    answer(ledger, 2)
    ledger.unsend(3)
    assert ledger.unanswered_changes == [(0, 512)]


# --- what a disk may do then ---


def test_a_promise_that_was_broken_stays_broken() -> None:
    recovery, ledger = Recovery("disk", 5), asked(change())
    answer(ledger, 0)
    recovery.lose(ledger, GONE)
    recovery.lose(Ledger(), GONE)
    for _ in range(2):
        with pytest.raises(StorageFailed, match=r"may be lost: .*gone"):
            recovery.check_flush()
        with pytest.raises(ReadOnly, match="may be lost"):
            recovery.check_change(Request(Verb.WRITE, 4096, 0, b"x"))
    assert recovery.wants_another(ledger)  # to read


def test_what_overlaps_an_unanswered_change_is_refused() -> None:
    recovery = Recovery("disk", 5)
    recovery.lose(asked(change(512)), GONE)
    recovery.check_flush()
    for offset, length in ((0, 513), (1023, 1), (0, 4096)):
        with pytest.raises(ReadOnly, match="not answered"):
            recovery.check_change(Request(Verb.ZERO, offset, length))
    recovery.check_change(Request(Verb.ZERO, 0, 512))
    recovery.check_change(Request(Verb.DISCARD, 1024, 512))


def test_a_server_that_leaves_is_as_one_that_does_not_answer() -> None:
    leaving = Completion(1, int(NbdErrno.ESHUTDOWN))
    assert Recovery("disk", 1).is_leaving(leaving)
    assert not Recovery("disk", 0).is_leaving(leaving)
    assert not Recovery("disk", 1).is_leaving(Completion(1, int(NbdErrno.EIO)))


def test_patience_begins_with_the_first_loss_and_ends() -> None:
    recovery, ledger = Recovery("disk", 5), Ledger()
    deadline = recovery.patience(ledger, 100.0, None)
    assert deadline == 105.0
    assert recovery.patience(ledger, 104.9, deadline) == deadline
    with pytest.raises(StorageFailed, match="stopping"):
        recovery.patience(ledger, 105.0, deadline)
    recovery.lose(ledger, GONE)
    with pytest.raises(StorageFailed, match="gone"):
        recovery.patience(ledger, 105.0, deadline)
    with pytest.raises(StorageFailed, match="gone"):
        Recovery("disk", 0).patience(ledger, 100.0, None)


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_no_patience_below_nothing(seconds: float) -> None:
    with pytest.raises(Invalid):
        Recovery("disk", seconds)


# --- connections ---


def test_whether_another_connection_is_wanted() -> None:
    patient, hasty = Recovery("disk", 1), Recovery("disk", 0)
    ledger = Ledger()
    assert not patient.wants_another(ledger)
    assert not hasty.wants_another(ledger)
    patient.lose(ledger, GONE)
    assert patient.wants_another(ledger)
    with pytest.raises(StorageFailed, match="gone"):
        hasty.wants_another(ledger)


@pytest.mark.parametrize("error", [ProtocolError("a lie"), Closed("another export")])
def test_a_disk_that_has_failed_has_failed_for_good(error: CowfenceError) -> None:
    recovery, ledger = Recovery("disk", 5), Ledger()
    if isinstance(error, ProtocolError):
        recovery.lose(ledger, error)
    else:
        recovery.fail(error)
    for _ in range(2):
        with pytest.raises(type(error)):
            recovery.wants_another(ledger)


def test_the_terms_have_to_be_the_same() -> None:
    recovery = Recovery("disk", 5)
    agreed = Negotiated(ExportInfo("", 4096, 1), Style.STRUCTURED, {"base:allocation": 1})
    recovery.accept(agreed)
    recovery.accept(replace(agreed))
    for other in (
        replace(agreed, style=Style.SIMPLE),
        replace(agreed, contexts={"base:allocation": 2}),
        replace(agreed, export=ExportInfo("", 8192, 1)),
        replace(agreed, export=ExportInfo("", 4096, 3)),
    ):
        with pytest.raises(Invalid, match="other terms"):
            recovery.accept(other)


def attempts(recovery: Recovery, ledger: Ledger, *, each_seconds: float = 0.0) -> list[tuple[float, float]]:
    """All of them, by a clock that nothing but pauses and attempts move."""
    now = [1000.0]
    made = []
    for pause_seconds, open_seconds in recovery.attempts(ledger, lambda: now[0]):
        made.append((pause_seconds, open_seconds))
        now[0] += pause_seconds + each_seconds
    return made


def test_pauses_grow_and_the_time_has_an_end() -> None:
    recovery, ledger = Recovery("disk", 10), asked(FLUSH)
    answer(ledger, 0)
    pauses = [pause for pause, _ in attempts(recovery, ledger)]
    assert pauses[0] == 0
    assert all(later <= 2.0 for later in pauses)
    assert sum(pauses) == pytest.approx(10)
    assert all(earlier < later for earlier, later in itertools.pairwise(pauses[:7]))
    assert len(pauses) < 20
    # From a connection that answered nothing they grow on, from one that did they begin anew.
    assert next(recovery.attempts(Ledger(), lambda: 0.0))[0] > 1
    assert next(recovery.attempts(ledger, lambda: 0.0))[0] == 0


def test_an_attempt_takes_no_longer_than_there_is_time() -> None:
    assert all(0 < seconds <= 0.5 for _, seconds in attempts(Recovery("disk", 0.5), Ledger()))
    assert all(seconds <= 60 for _, seconds in attempts(Recovery("disk", 1000), Ledger(), each_seconds=60))
    assert not attempts(Recovery("disk", 0), Ledger())


# --- everything, against a model of the worst server ---

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["change", "fua"]), st.integers(0, 5)),
        st.tuples(st.just("flush"), st.just(0)),
        st.tuples(st.sampled_from(["answer", "fail"]), st.integers(0, 9)),
        st.tuples(st.just("lose"), st.integers(0, 2)),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_flush_vouches_for_what_a_server_may_have_lost(steps: list[tuple[str, int]]) -> None:
    """A server that keeps only what it must: FUA, and what it had acknowledged when a flush was sent that it answers. When it
    is lost, all else is gone, and what was not answered may come at any time. A flush and a change are allowed just where that
    harms nobody."""
    recovery, ledger = Recovery("disk", 5), Ledger()
    cookies = itertools.count()
    sent: dict[int, tuple[Piece, set[int]]] = {}
    acknowledged: set[int] = set()
    durable: set[int] = set()
    lost: set[int] = set()
    late: set[int] = set()
    for step, number in steps:
        if step == "lose":
            unsent = list(sent)[len(sent) - number :] if number else []
            for cookie in unsent:
                ledger.unsend(cookie)
                del sent[cookie]
            late |= {piece.offset for piece, _ in sent.values() if piece.command in CHANGES}
            lost |= acknowledged - durable
            recovery.lose(ledger, GONE)
            ledger, sent = Ledger(), {}
        elif step in ("answer", "fail"):
            if not sent:
                continue
            cookie = list(sent)[number % len(sent)]
            piece, covered = sent.pop(cookie)
            answer(ledger, cookie, error=5 if step == "fail" else 0)
            if step == "fail":
                continue
            if piece.command in CHANGES:
                acknowledged.add(cookie)
                durable |= {cookie} if piece.flags else set()
            else:
                durable |= covered
                assert covered <= durable - lost
        else:
            piece = FLUSH if step == "flush" else change(512 * number, fua=step == "fua")
            try:
                if step == "flush":
                    recovery.check_flush()
                else:
                    recovery.check_change(Request(Verb.WRITE, piece.offset, 0, bytes(512)))
            except CowfenceError:
                assert lost or (step != "flush" and piece.offset in late)
                continue
            assert not lost
            assert step == "flush" or piece.offset not in late
            cookie = next(cookies)
            ledger.send(cookie, piece)
            sent[cookie] = piece, set(acknowledged)
