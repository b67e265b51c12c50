"""The loop around every plan, and the gate that a change of the whole image closes.

A plan runs under the image's lock. What it needs first (cold bytes, a commit) is done outside of it, and the plan begins
again. While the image as a whole is altered (see ``alteration``) the gate is closed: plans wait before they begin, so none of
them ever sees the image between two transactions that belong together.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition
from typing import TypeVar

from cowfence.errors import NoSpace, WouldBlock
from cowfence.qcow2.reader import Cold, NeedsCommit
from cowfence.qcow2.state import State

T = TypeVar("T")

_TRIES_OUTSIDE = 3


class Plans:
    """Carries out the plans of one image."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._gate = Condition(state.lock)
        self.altering = False
        """The gate is closed. Read and set under the lock; who plans inline asks for it."""

    def pass_gate(self, *, wait: bool) -> None:
        """Under the lock, before a plan: wait until the gate is open. Raises WouldBlock where ``wait`` is false."""
        while self.altering:
            if not wait:
                raise WouldBlock(f"{self._state.storage.name}: the image is being altered")
            self._gate.wait()

    def close_gate(self) -> None:
        """Under the lock: no other plan begins from now on. Waits for another alteration to end."""
        self.pass_gate(wait=True)
        self.altering = True

    def open_gate(self) -> None:
        """Under the lock."""
        self.altering = False
        self._gate.notify_all()

    def run(self, plan: Callable[[bool], T], check: Callable[[], None]) -> T:
        """Carry out a plan under the lock; satisfy what it needs outside of it, and begin again.

        ``plan`` gets whether it may wait under the lock: only when warming did not help three times. ``check`` is asked under
        the lock each time: it passes the gate, or raises where the plan is not allowed any more.
        """
        state = self._state
        attempts = 0
        while True:
            attempts += 1
            with state.lock:
                check()
                try:
                    result = plan(attempts > _TRIES_OUTSIDE)
                    if state.pending.notes:
                        state.pending.publish()
                    return result
                except Cold as cold:
                    satisfy: Callable[[], object] = cold.warm
                except NeedsCommit as need:
                    satisfy = self._satisfier(need)
                ticket = state.tickets.begin()
            try:
                satisfy()
            finally:
                state.reclaimer.end_ticket(ticket)

    def _satisfier(self, need: NeedsCommit) -> Callable[[], None]:
        def satisfy() -> None:
            self._state.committer.commit()
            if need.then is None:
                return
            deeper: NeedsCommit | None = None
            with self._state.lock:
                if self._state.pending:
                    # Somebody else was faster; the plan begins again and finds out.
                    return
                try:
                    need.then()
                except NeedsCommit as again:
                    deeper = again
            if deeper is not None:
                self._satisfier(deeper)()
            self._state.committer.commit()

        return satisfy

    def mutate(self, plan: Callable[[bool], T], check: Callable[[], None]) -> T:
        """``run`` for a change: when the host or the image has no space left, commit once and use what that frees."""
        try:
            return self.run(plan, check)
        except NoSpace:
            if not self._state.pending.freed_clusters:
                raise
        self._state.committer.commit()
        return self.run(plan, check)
