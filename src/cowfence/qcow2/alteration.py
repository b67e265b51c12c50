"""Altering the image as a whole: what changes more than guest data (snapshots, resizing, bitmaps, keys, header fields).

An alteration has the image for itself. Before it begins: all that was pending is committed, no older plan is under way, and
the gate is closed, so that guests wait and find the image as it is afterwards. It is then a sequence of transactions, each
made in memory under the lock by a plan, and committed: three stages and their fences, as ever. Every alteration says in its
own docstring what holds on disk after each of them. When it ends, all is fenced, RECLAIM included, and the state is read
again from the file, which is the only truth: nothing that an alteration did has to be repeated in memory.

**If it fails** before LINK has begun, its transaction is dropped: on disk are leaked clusters at worst. If LINK itself fails,
its pointers may be old or new, so nothing more may be written on what we remember: the image is read-only until it is opened
again (as after a failed fence).

**The keeper** hears nothing of it. All that a guest did before is committed, and an alteration that its process did not
survive is one that did not happen, or did: each LINK is atomic by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from cowfence.errors import CowfenceError, ReadOnly
from cowfence.qcow2.assemble import reassemble
from cowfence.qcow2.header import read_header
from cowfence.qcow2.mapping import runs
from cowfence.qcow2.plans import Plans
from cowfence.qcow2.state import State

if TYPE_CHECKING:
    from cowfence.qcow2.bitmaps import Bitmaps
    from cowfence.qcow2.zero import Zeroes

T = TypeVar("T")


class Alteration:
    """What the body of an alteration works with."""

    def __init__(self, state: State, plans: Plans, bitmaps: Bitmaps | None, zeroes: Zeroes | None) -> None:
        self.state = state
        self.zeroes = zeroes
        """How the image zeroes and writes guest clusters, for plans."""
        self._plans = plans
        self._bitmaps = bitmaps

    def transaction(self, plan: Callable[[], T]) -> T:
        """Carry out ``plan`` under the lock, and commit what it entered. It may begin several times, so it changes nothing
        before it has reserved all that it needs. It takes the header from the state: that is the one on disk each time it
        begins, for a table may have grown."""
        result = self._plans.run(lambda _: plan(), lambda: refresh_header(self.state))
        self.state.committer.commit()
        return result

    def before_other_disk(self, size_bytes: int) -> None:
        """The disk will have another content, and this size: the bitmaps' part of it. Raises Invalid where one of them cannot
        follow."""
        if self._bitmaps is not None and size_bytes != self.state.size:
            self._bitmaps.follow_size(self)

    def after_other_disk(self) -> None:
        """It has; the state has been read again."""
        if self._bitmaps is not None:
            self._bitmaps.resized()
            self._bitmaps.mark(0, self.state.size)

    def after_move(self, tables: Mapping[int, int]) -> None:
        """Tables of bitmaps stand elsewhere now; offsets in bytes, old and new."""
        if self._bitmaps is not None:
            self._bitmaps.moved(tables)

    def after_resize(self) -> None:
        """The disk has become longer or shorter, and the state has been read again."""
        if self._bitmaps is not None:
            self._bitmaps.resized()

    def read(self, offset: int, length_bytes: int) -> bytearray:
        """What the guest would read; it waits at the gate meanwhile."""
        assert self.zeroes is not None
        buffer, state = bytearray(length_bytes), self.state
        with state.lock:
            plan = list(runs(state, offset, length_bytes, wait=True))
            self.zeroes.reads.fill(plan, offset, memoryview(buffer), wait=True)
        return buffer

    def read_again(self) -> None:
        """Between two transactions: what follows is planned from what is on disk now."""
        with self.state.lock:
            reassemble(self.state)

    def forget(self) -> bool:
        """What is still pending is forgotten: after a transaction that failed, before its PREPARE is undone; and before tables
        are written straight, because what RECLAIM could not write would come after them. ``read_again`` before the next
        transaction.

        False where a LINK had begun, or a fence failed: the image is read-only, and nothing may be written any more.
        """
        _give_up(self.state)
        return self.state.committer.broken is None


def alter(
    state: State,
    plans: Plans,
    check: Callable[[], None],
    body: Callable[[Alteration], T],
    bitmaps: Bitmaps | None = None,
    zeroes: Zeroes | None = None,
) -> T:
    """Close the gate, carry out ``body``, read the state again, open the gate.

    ``check``: called under the lock once the image is quiet; raises where it must not be written. Raises what ``body`` and the
    storage raise.
    """
    with state.lock:
        plans.close_gate()
    try:
        state.tickets.wait_for_all()
        state.committer.commit()
        with state.lock:
            check()
            if state.pending:
                # RECLAIM could not write some counts. Written later, they would undo what ``body`` writes straight. They stay
                # as they are on disk: too high, leaks.
                _read_again(state)
            refresh_header(state)
            notes, state.pending.notes = state.pending.notes, None
        try:
            result = body(Alteration(state, plans, bitmaps, zeroes))
            if state.committer.unfenced_reclaim:
                state.committer.fence("reclaim.fence")
        except BaseException:
            _give_up(state)
            raise
        finally:
            with state.lock:
                state.pending.notes = notes
                _read_again(state)
        return result
    finally:
        with state.lock:
            plans.open_gate()


def refresh_header(state: State) -> None:
    """The state's header is the one on disk: where guests, or a plan that began again, made tables grow, theirs moved."""
    state.header = read_header(state.storage)


def _give_up(state: State) -> None:
    with state.lock:
        # A guest's flush may be about to carry out what failed: it is over, or has not begun, when this goes on.
        state.committer.wait_until_idle()
        if state.pending.drop() and state.committer.broken is None:
            state.committer.broken = ReadOnly(
                f"{state.storage.name}: altering the image failed half-way; it is read-only until it is opened again"
            )


def _read_again(state: State) -> None:
    """Also where nothing may be written any more: what was linked is what readers must follow, for the old may be gone."""
    try:
        reassemble(state)
    except CowfenceError as failure:
        state.committer.broken = state.committer.broken or ReadOnly(
            f"{state.storage.name}: it cannot be read any more ({failure}); it is read-only until it is opened again"
        )
        raise
