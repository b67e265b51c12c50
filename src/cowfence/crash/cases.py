"""A case: an image, a script, and what disturbs it; small, independent, and one line of text, so that it can be sent to another
process and given to ``cowfence crash replay``.

    v3,c512,r16,t64,aged | write:0+512 discard:512+512 flush | inside 2=write:1024+512
    v3,c512,r16,t64 | write:0+512 flush | fault 3 EIO once half
    v3,c512,r16,t64 | write:0+512 flush | nested 17 repair

*nested*: the process is killed at that position of the log, and what recovers it (opening, or repairing leaks, then work) is
explored under the power model, with everything that no fence covers still volatile.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cowfence.crash.explore import Model, Verdicts, Violation, Walk
from cowfence.crash.images import BACKING, DATA, IMAGE, ImageSpec, build, parse_image
from cowfence.crash.judge import Judge
from cowfence.crash.kept import KeptWalk
from cowfence.crash.kill import KillModel
from cowfence.crash.operations import OPERATIONS, Step, parse_step
from cowfence.crash.oracles import ALL, Oracle
from cowfence.crash.runner import EngineSubject, Recording, Run
from cowfence.crash.witness import edge
from cowfence.errors import CowfenceError, Invalid
from cowfence.storage.fault import Arrived, FaultPlan
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Done, Fence, Note, OpLog

_ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


@dataclass(frozen=True, slots=True)
class Fault:
    """The ``nth`` change or fence fails with ``error``; ``for_good``: all after it too."""

    nth: int
    error: str = "EIO"
    for_good: bool = False
    arrived: str = "nothing"

    def __str__(self) -> str:
        return f"fault {self.nth} {self.error} {'forever' if self.for_good else 'once'} {self.arrived}"

    def plan(self) -> FaultPlan:
        return FaultPlan(self.nth, error=_ERRORS[self.error], keep_failing=self.for_good, arrived=Arrived(self.arrived))


@dataclass(frozen=True, slots=True)
class Nested:
    """Killed after the entry at ``position`` of the log; then ``repair`` leaks or only open, and work."""

    position: int
    repair: bool = False

    def __str__(self) -> str:
        return f"nested {self.position} {'repair' if self.repair else 'open'}"


@dataclass(frozen=True, slots=True)
class Case:
    """See the module."""

    image: ImageSpec
    script: tuple[Step, ...]
    inside: tuple[tuple[int, Step], ...] = ()
    fault: Fault | None = None
    nested: Nested | None = None

    def __str__(self) -> str:
        parts = [str(self.image), " ".join(map(str, self.script))]
        parts += [f"inside {number}={step}" for number, step in self.inside]
        parts += [str(part) for part in (self.fault, self.nested) if part is not None]
        return " | ".join(parts)


def parse_case(text: str) -> Case:
    """The reverse of ``str(case)``. Raises Invalid."""
    parts = [part.strip() for part in text.split("|")]
    if len(parts) < 2:
        raise Invalid("a case reads: IMAGE | STEPS [| inside N=STEP] [| fault ...] [| nested ...]")
    case = Case(parse_image(parts[0]), tuple(map(parse_step, parts[1].split())))
    for part in parts[2:]:
        words = part.split()
        try:
            if words[0] == "inside":
                number, _, step = words[1].partition("=")
                case = replace(case, inside=(*case.inside, (int(number), parse_step(step))))
            elif words[0] == "fault":
                fault = Fault(int(words[1]), words[2], words[3] == "forever", words[4])
                fault.plan()
                case = replace(case, fault=fault)
            elif words[0] == "nested":
                case = replace(case, nested=Nested(int(words[1]), words[2] == "repair"))
            else:
                raise Invalid(f"{part!r} is no part of a case")
        except (IndexError, KeyError, ValueError):
            raise Invalid(f"{part!r} is no part of a case") from None
    for _, inner in case.inside:
        if OPERATIONS[inner.verb].request is None:
            raise Invalid(f"{inner.verb} cannot be carried out inside another call")
    size = build(case.image).size_bytes
    for each in (*case.script, *(inner for _, inner in case.inside)):
        if each.offset + each.length_bytes > size:
            raise Invalid(f"{each} lies past the end of the disk of {size} bytes")
    return case


def record(case: Case) -> Recording:
    """Carry a case out. Raises what the engine raises where nothing was made to fail."""
    run = Run(case.image, inside=dict(case.inside), faults=case.fault.plan() if case.fault is not None else None)
    for step in case.script:
        run.step(step)
    if case.fault is not None:
        # The disk is well again; what stands on it must be good to work on.
        run.kill()
        for step in _AFTERWARDS:
            run.step(_fitting(step, case.image))
    recording = run.recording()
    return recording if case.nested is None else _nested(case, recording)


_AFTERWARDS = (Step("write", 0, 512), *(Step("write", cluster, 512) for cluster in range(7, 11)), Step("flush"))


def _fitting(step: Step, image: ImageSpec) -> Step:
    """``offset`` of these counts in clusters."""
    return step._replace(offset=step.offset * image.cluster_bytes)


def _nested(case: Case, first: Recording) -> Recording:
    """The log up to the kill, and then what recovers from it, in one log: so nothing that no fence covered is durable."""
    assert case.nested is not None
    entries = list(first.entries[: case.nested.position + 1])
    device = KillModel(first.initial)
    for position, entry in enumerate(entries):
        if isinstance(entry, Done):
            operation = entries[entry.position]
            assert not isinstance(operation, Done | Note)
            list(device.done(position, entry.position, operation, failed=entry.failed))
        elif not isinstance(entry, Note):
            list(device.issue(position, entry))
    contents = next(iter(device.settle())).contents()
    # A call in flight when the process was killed has run to its end, or not at all; the walk has both.
    log = OpLog()
    for entry in entries:
        log.append(entry)
    run = Run(case.image)
    run.log = log
    run.memory = MemoryStorage(contents[IMAGE], name=IMAGE)
    if DATA in contents:
        run.data = MemoryStorage(contents[DATA], name=DATA)
    if BACKING in contents:
        run.below = MemoryStorage(contents[BACKING], name=BACKING)
    run.take_over(first.journals, case.nested.position)
    run.kill(repair_leaks=case.nested.repair)
    for step in _AFTERWARDS:
        run.step(_fitting(step, case.image))
    return Recording(first.initial, first.guest, log.entries(), 0, run.journals, first.errors)


def walk(
    case: Case,
    recording: Recording,
    model: Model,
    *,
    oracles: Sequence[Oracle] = ALL,
    limit: int = 4096,
    seed: int = 0,
    live: bool = True,
    stop_at: int = 1,
    deadline: float | None = None,
) -> Verdicts:
    """Judge every state of a recorded case under a device model."""
    start = case.nested.position + 1 if case.nested is not None else 0
    walk_of = KeptWalk if case.image.keeper and model == "kill" else Walk
    return walk_of(
        recording,
        model,
        EngineSubject(case.image),
        oracles=oracles,
        limit=limit,
        seed=seed,
        live=live,
        stop_at=stop_at,
        start=start,
        deadline=deadline,
    ).run()


def crash_points(recording: Recording) -> list[int]:
    """Positions of the log at which a kill leaves another file than at the one before."""
    return [
        position
        for position, entry in enumerate(recording.entries)
        if isinstance(entry, Done) and not isinstance(recording.entries[entry.position], Fence)
    ]


@dataclass(frozen=True, slots=True)
class Explained:
    """A violation as small as it gets. ``replay``: what ``cowfence crash replay`` takes."""

    case: Case
    violation: Violation
    edge: str
    lost: list[str]
    recording: Recording

    @property
    def replay(self) -> str:
        return f"{self.violation.model} | {self.case}"

    def __str__(self) -> str:
        return (
            f"{self.violation.clause} ({self.violation.model}): {self.edge}\n"
            f"  operations: {' '.join(map(str, self.case.script))}\n  replay: cowfence crash replay '{self.replay}'"
        )


def explain(
    case: Case,
    violation: Violation,
    *,
    oracles: Sequence[Oracle] = ALL,
    limit: int = 4096,
    seed: int = 0,
    deadline: float | None = None,
) -> Explained:
    """Shrink operations first, until the deadline (of the monotonic clock), then units, and say what is missing in one
    sentence."""
    case, recording, violation = _with_fewer_steps(case, violation, oracles, limit, seed, deadline)
    subject = EngineSubject(case.image)
    violation.witness = violation.witness.shrunk(subject, oracles, violation.clause)
    verdict = violation.witness.verdict(subject, oracles) or violation.verdict
    violation.verdict = verdict
    sentence = edge(violation.witness, verdict, recording.entries, violation.position, subject.image)
    return Explained(case, violation, sentence, violation.witness.lost(), recording)


def _with_fewer_steps(
    case: Case, violation: Violation, oracles: Sequence[Oracle], limit: int, seed: int, deadline: float | None
) -> tuple[Case, Recording, Violation]:
    """Leave out one step after the other while the same clause stays broken."""
    best = case, record(case), violation
    at = len(case.script) - 1
    while at >= 0 and case.nested is None and case.fault is None:
        if deadline is not None and time.monotonic() > deadline:
            break
        script = (*best[0].script[:at], *best[0].script[at + 1 :])
        smaller = replace(best[0], script=script)
        at -= 1
        if not script:
            continue
        try:
            recording = record(smaller)
            verdicts = walk(smaller, recording, violation.model, oracles=oracles, limit=limit, seed=seed, deadline=deadline)
            found = verdicts.violations
        except CowfenceError:
            continue
        if found and found[0].clause == violation.clause:
            best = smaller, recording, found[0]
    return best


__all__ = [
    "Case",
    "Explained",
    "Fault",
    "Judge",
    "Nested",
    "crash_points",
    "explain",
    "parse_case",
    "record",
    "walk",
]
