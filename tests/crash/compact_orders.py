"""The broken orders of a compaction, like those of ``orders``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

from cowfence.crash.cases import parse_case
from cowfence.qcow2.moves import Ground, Move
from cowfence.qcow2.transaction import Stage
from crash.orders import Mutant


def _order(*actions: str) -> Callable[[], AbstractContextManager[None]]:
    """A move that does the named actions in the named order."""

    def carry_out(self: Ground, move: Move) -> None:
        self.state.committer.unfenced_reclaim = True
        for action in actions:
            if action == "raise":
                self._count(move.raised, 1, Stage.PREPARE, "refcount.increment")
            elif action == "copy":
                move.copy()
            elif action == "link":
                move.link()
            elif action == "lower":
                self.lower(move.lowered)
            else:
                self.state.committer.fence("mutant.fence")

    @contextmanager
    def patched() -> Iterator[None]:
        with mock.patch.object(Ground, "carry_out", carry_out):
            yield

    return patched


COMPACT_CASES = {
    name: parse_case(text)
    for name, text in {
        "compact": "v3,c512,r16,t64,aged | discard:0+1024 compact flush",
        "compact-snapshot": "v3,c512,r16,t64,aged,s1,diverged | snapshot_delete compact flush",
        "compact-bitmap": "v3,c512,r16,t64,aged,bitmap | discard:0+1024 compact flush",
        "compact-write": "v3,c1024,r64,t64,aged,s2 | compact write:0+1024 flush",
    }.items()
}

COMPACT_MUTANTS = [
    Mutant("M2 compaction: pointers before content", "compact", _order("raise", "fence", "link", "fence", "copy", "lower")),
    Mutant("M3 compaction: pointers before counts", "compact", _order("copy", "fence", "link", "fence", "raise", "lower")),
    Mutant("M4 compaction: counts down before pointers", "compact", _order("raise", "copy", "fence", "lower", "fence", "link")),
    Mutant("M6 compaction: no fence behind the copy", "compact", _order("raise", "copy", "link", "fence", "lower"), True),
    Mutant("M5 compaction: no fence behind the pointers", "compact", _order("raise", "copy", "fence", "link", "lower"), True),
]
