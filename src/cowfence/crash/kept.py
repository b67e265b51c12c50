"""The kill model with a keeper (C4): after a kill the keeper carries out what the dead writer's journal holds, and then the
state is judged; every acknowledged write must be there.

A killed state is the files, as before, and the journal as it was at that instant. The keeper itself may be killed too: the
state before its work is judged by the clauses that hold without it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from cowfence.crash.device import Base, CrashState
from cowfence.crash.explore import Walk, judge_with
from cowfence.crash.oracles import Acknowledged, Verdict
from cowfence.qcow2.journal import Journal
from cowfence.qcow2.replay import replay
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Note


class KeptWalk(Walk):
    """A walk of the kill model over a recording with journals."""

    _poisoned = False
    """A fence failed: the keeper may do nothing and promises nothing, until the guest has come back (C16)."""

    def _note(self, position: int, note: Note) -> Iterator[CrashState]:
        """After each note, whatever was acknowledged by then is asked for."""
        yield from super()._note(position, note)
        if note.event == "reopened":
            self._poisoned = False
        yield from self._device.settle()

    def _verdict(self, state: CrashState) -> Verdict | None:
        alone = super()._verdict(state)
        if alone is not None:
            return alone
        kept = self._after_the_keeper(state)
        if isinstance(kept, Verdict):
            return kept
        if kept is None or ((kept.key, "kept"), self.guest.changes) in self._known:
            return None
        self._known.add(((kept.key, "kept"), self.guest.changes))
        self.result.states += 1
        if kept.key not in self._distinct:
            self._distinct.add(kept.key)
            self.result.distinct += 1
        return judge_with((*self._oracles, Acknowledged()), self._judge.look(kept), self.guest)

    def _after_the_keeper(self, state: CrashState) -> CrashState | Verdict | None:
        """The state as the keeper leaves it; None before there is a keeper."""
        journals = self._recording.journals
        positions = sorted(journals)
        at = bisect_right(positions, self._position) - 1
        if at < 0:
            return None
        contents = state.contents()
        image = self._subject.image
        storage = MemoryStorage(contents[image], name=image)
        journal = Journal(bytearray(journals[positions[at]]))
        self._poisoned |= journal.poisoned
        if self._poisoned:
            return None
        done = replay(storage, journal)
        if done.failure is not None:
            return Verdict("C4", f"the keeper cannot do its work: {done.failure}")
        content = storage.snapshot()
        bases = {file: Base(file, bytes_, self._device.unit_bytes) for file, bytes_ in {**contents, image: content}.items()}
        lengths = {file: len(base.content) for file, base in bases.items()}
        return CrashState((hash(content), tuple(lengths.values())), bases, {}, lengths, [])
