"""The order of the transaction, proved on small images: the true engine keeps every clause in every state, every broken order
is caught by a case of at most two operations and a small witness, and one that only a power cut shows is not blamed on a kill.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest

from cowfence.crash import judge as judge_module
from cowfence.crash.cases import Case, crash_points, explain, parse_case, record, walk
from cowfence.crash.device import Unit
from cowfence.crash.explore import MODELS, Model, Walk
from cowfence.crash.oracles import STRUCTURE
from cowfence.crash.power import PowerModel
from cowfence.crash.runner import EngineSubject, Recording, Run
from cowfence.errors import Corrupt, CowfenceError
from cowfence.qcow2.entries import COPIED, ZERO
from cowfence.qcow2.geometry import OFFSET_MASK
from cowfence.qcow2.image import Qcow2Disk
from cowfence.qcow2.repair import repair
from cowfence.qcow2.transaction import Pending
from cowfence.storage.base import Storage
from cowfence.storage.oplog import Fence, Note, OpLog, Write
from cowfence.storage.record import RecordingStorage
from crash.compact_orders import COMPACT_CASES, COMPACT_MUTANTS
from crash.orders import CASES as OTHER_CASES
from crash.orders import MUTANTS as OTHER_MUTANTS
from crash.orders import Mutant
from crash.size_orders import SIZE_CASES, SIZE_MUTANTS
from crash.snapshot_orders import SNAPSHOT_CASES, SNAPSHOT_MUTANTS

CASES = OTHER_CASES | SNAPSHOT_CASES | SIZE_CASES | COMPACT_CASES
MUTANTS = [*OTHER_MUTANTS, *SNAPSHOT_MUTANTS, *SIZE_MUTANTS, *COMPACT_MUTANTS]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_true_engine_keeps_the_contract(name: str, model: Model) -> None:
    verdicts = walk(CASES[name], record(CASES[name]), model)
    assert not verdicts.violations, str(verdicts.violations[0])
    assert verdicts.distinct


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_broken_order_is_caught(mutant: Mutant) -> None:
    case = CASES[mutant.case]
    with mutant.patch():
        recording = record(case)
    # Judged by the true engine: what it does afterwards is not to blame.
    kill = walk(case, recording, "kill").violations
    power = walk(case, recording, "power").violations
    caught = kill or power
    assert caught, f"{mutant.name} survived"
    assert caught[0].clause in mutant.clauses, str(caught[0])
    if mutant.power_only:
        assert not kill, f"a kill cannot show this: {kill[0]}"
    with mutant.patch():
        explained = explain(case, caught[0])
    assert explained.violation.witness.deviating <= 3
    assert sum(1 for step in explained.case.script if step.verb != "flush") <= 2
    assert mutant.says in explained.edge, explained.edge
    assert explained.replay.startswith(caught[0].model)


def test_every_broken_order_of_the_contract_is_here() -> None:
    """The table of the contract, whole."""
    here = {word for mutant in MUTANTS for word in mutant.name.split()[:1]}
    elsewhere = {"M28", "M29", "M30", "M32", "M35", "M37"}  # M37: tests/unit/qcow2/test_face.py
    assert here | elsewhere == {f"M{number}" for number in range(1, 38)}


def test_judge_without_contents_misses_reuse() -> None:
    """J1: by structure alone, reuse before unlink passes for sound; so it is the contents that judge."""
    case = CASES["discard-then-write"]
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "M9 reused at once, discard")
    with mutant.patch():
        recording = record(case)
    assert walk(case, recording, "kill").violations
    assert not walk(case, recording, "kill", oracles=STRUCTURE, live=False).violations


class _NewestOnly(PowerModel):
    """The wrong model: of a sector's versions since the last fence only the newest is kept."""

    def _version(self, unit: Unit, data: bytes, mark: str, position: int) -> None:
        volatile = self._volatile.get(unit)
        if volatile is not None:
            del volatile.versions[1:]
        super()._version(unit, data, mark, position)


def test_model_of_newest_versions_misses_a_version_in_between() -> None:
    """J2: a guest sector is written twice, and only the first version is nobody's: an intermediate version counts."""
    case = parse_case("v3,c512,r16,t64,aged | write:0+512 flush")
    recording = record(case)
    entries = list(recording.entries)
    at = next(at for at, entry in enumerate(entries) if isinstance(entry, Write) and entry.mark == "data.write")
    data = entries[at]
    assert isinstance(data, Write)
    log = OpLog()
    for entry in entries[:at]:
        log.append(entry)
    memory = RecordingStorage(Run(case.image).memory, log, "image")
    memory.writev(data.offset, (b"first version without second".ljust(512, b"."),), "data.write")
    memory.writev(data.offset, (data.data,), "data.write")
    planted = Recording(recording.initial, recording.guest, log.entries())
    subject = EngineSubject(case.image)
    assert Walk(planted, "power", subject).run().violations
    # The walk of a whole log judges a version when it is the newest, so the wrong model is asked at the end only.
    blind = Walk(planted, "power", subject, device=_NewestOnly(planted.initial), start=len(planted.entries) - 1).run()
    assert not blind.violations


def test_no_fence_at_open_is_caught() -> None:
    """M32: kill inside LINK, leaks repaired by what stands in the page cache, work, power cut."""
    true_fence = RecordingStorage.fence

    def fence(self: RecordingStorage, mark: str) -> None:
        if mark not in ("open.fence", "repair.fence"):
            true_fence(self, mark)

    first = parse_case("v3,c512,r16,t64,aged | write:2048+1024 flush")
    cases = [parse_case(f"{first} | nested {point} repair") for point in crash_points(record(first))]
    assert not any(walk(case, record(case), "power").violations for case in cases)
    with mock.patch.object(RecordingStorage, "fence", fence):
        cases = [parse_case(f"{first} | nested {point} repair") for point in crash_points(record(first))]
        recordings = [record(case) for case in cases]
    caught = [walk(case, recording, "power").violations for case, recording in zip(cases, recordings, strict=True)]
    assert any(caught)
    assert {found[0].clause for found in caught if found} <= {"C1", "C2", "C3", "C5"}
    assert not any(walk(case, recording, "kill").violations for case, recording in zip(cases, recordings, strict=True)), (
        "a kill alone cannot show this"
    )


@pytest.mark.parametrize("wrong", ["zeroes an entry", "frees what is shared"])
def test_repair_that_harms_is_caught(wrong: str) -> None:
    """M29."""

    def harm(storage: Storage, mode: Any, **_: Any) -> Any:
        report = repair(storage, mode)
        content = bytearray(storage.size())
        storage.readv(0, (content,))

        def word(at: int) -> int:
            return int.from_bytes(content[at : at + 8], "big")

        l2 = word(word(40)) & OFFSET_MASK
        if wrong == "zeroes an entry":
            storage.writev(l2, (bytes(8),), "harm")
        else:
            host = (word(l2) & OFFSET_MASK) // 512
            storage.writev(word(word(48)) + host * 2, ((1).to_bytes(2, "big"),), "harm")
        return report

    case = parse_case("v3,c512,r16,t64,aged,s1 | write:5120+512 flush")
    recording = record(case)
    with mock.patch.object(judge_module, "repair", harm):
        found = walk(case, recording, "kill").violations
    assert found
    assert found[0].clause == "C12"


def test_a_failed_write_that_leaves_its_l1_entry_is_caught() -> None:
    """M30: the new table's L1 entry is entered before the data call, and stays when that fails."""
    from cowfence.qcow2.write import Writes

    true_plan = Writes._plan

    def plan(self: Writes, *args: Any, **kwargs: Any) -> Any:
        targets, runs, home = true_plan(self, *args, **kwargs)
        if not home.clusters:
            return targets, runs, home
        state, offset = self._state, home._cluster << self._state.geometry.cluster_bits
        state.pending.set(state.l1, args[1], offset | COPIED)
        return targets, runs, home

    case = parse_case("v3,c512,r16,t64 | write:0+512 write:35840+512 flush | fault 2 ENOSPC once nothing")
    assert not walk(case, record(case), "kill").violations
    with mock.patch.object(Writes, "_plan", plan):
        try:
            recording = record(case)
        except Corrupt:
            return  # the overlap check saw it when the next table was put there
    found = walk(case, recording, "kill").violations
    assert found
    assert found[0].clause in ("C1", "C3", "C5")


def _move(disk: Qcow2Disk, source: int, target: int) -> None:
    """Let guest cluster ``target`` take over the host cluster of ``source``, which reads as zeros afterwards, in one
    transaction: one reference more and one less for the same host cluster, their entries in different sectors."""
    state = disk._state
    with state.lock:
        old = state.l2_table(source // 64, wait=True, cached=True)
        new = state.l2_table(target // 64, wait=True, cached=True)
        assert old is not None
        assert new is not None
        host = old.entries[source % 64] & OFFSET_MASK
        cluster = host // 512
        state.refcounts.load(cluster, 1, wait=True)
        state.refcounts.increment(cluster)
        state.pending.set(new, target % 64, host)
        state.pending.set(old, source % 64, ZERO)
        state.pending.free(cluster)


def _record_move(*, netted: bool) -> tuple[Case, Recording]:
    case = parse_case("v3,c512,r16,t64,aged | flush")
    run = Run(case.image)
    state = run.disk._state
    table = state.l2_table(0, wait=True, cached=True)
    assert table is not None
    state.pending.set(table, 0, table.entries[0] & ~COPIED)
    run.disk.flush()

    def net(self: Pending, first: int, count: int = 1, *, discard: bool = False, table: bool = False) -> None:  # noqa: ARG001
        block = state.refcounts.block_of(first, wait=True)
        assert block is not None
        block.set(first % 256, block.get(first % 256) - 1)

    data = run.guest[:512]
    patched = mock.patch.object(Pending, "free", net) if netted else nullcontext()
    with run.writing(71 * 512, data), run.writing(0, bytes(512)), patched:
        _move(run.disk, 0, 71)
    run.disk.flush()
    return case, run.recording()


def test_an_increment_is_not_set_against_a_decrement() -> None:
    """M35: one reference comes and another goes; if the count were left alone, LINK could arrive in half, and only a power
    cut shows it."""
    case, recording = _record_move(netted=False)
    for model in MODELS:
        found = walk(case, recording, model).violations
        assert not found, str(found[0])
    case, recording = _record_move(netted=True)
    assert not walk(case, recording, "kill").violations
    caught = walk(case, recording, "power").violations
    assert caught
    assert caught[0].clause == "C5"


def test_a_failed_fence_is_not_called_again() -> None:
    """M28: a fence that failed once "succeeds" when it is called again, because the pages are gone. The image must say no."""
    case = parse_case("v3,c512,r16,t64,aged | write:5120+512 flush flush write:0+512 flush | fault 2 EIO once nothing")
    recording = record(case)
    fences = [at for at, entry in enumerate(recording.entries) if isinstance(entry, Fence) and entry.mark != "open.fence"]
    reopened = next(at for at, entry in enumerate(recording.entries) if isinstance(entry, Note) and entry.event == "reopened")
    if not any("fence" in error for error in recording.errors):
        case = parse_case("v3,c512,r16,t64,aged | write:5120+512 flush flush write:0+512 flush | fault 3 EIO once nothing")
        recording = record(case)
        reopened = next(
            at for at, entry in enumerate(recording.entries) if isinstance(entry, Note) and entry.event == "reopened"
        )
        fences = [at for at, entry in enumerate(recording.entries) if isinstance(entry, Fence) and entry.mark != "open.fence"]
    assert any("fence" in error for error in recording.errors)
    assert not [at for at in fences if at < reopened], "nothing is fenced, or written, after the failed fence"
    assert len(recording.errors) >= 3
    assert not walk(case, recording, "power").violations


def test_sharing_a_look_is_exact() -> None:
    """What the tree of looks says of a state is what a look of its own says."""
    case = parse_case(
        "v3,c512,r16,t64,aged,s1 | write:0+1024 discard:2048+512 write:35840+512 write:512+2048 write:5120+1024 flush"
    )
    recording = record(case)
    subject = EngineSubject(case.image)
    from cowfence.crash.explore import device_of
    from cowfence.storage.oplog import Done

    shared = judge_module.Judge(subject, recording.guest)
    device = device_of("power", recording, limit=64, seed=3)
    compared = 0
    for position, entry in enumerate(recording.entries):
        if isinstance(entry, Note):
            continue
        if isinstance(entry, Done):
            operation = recording.entries[entry.position]
            assert not isinstance(operation, Done | Note)
            list(device.done(position, entry.position, operation, failed=False))
            continue
        for number, state in enumerate(device.issue(position, entry)):
            seen = shared.look(state)
            if number % 7:
                continue
            alone = judge_module.Judge(subject, recording.guest).look(state)
            compared += 1
            assert (seen.error, seen.changed, seen.problems) == (alone.error, alone.changed, alone.problems)
            assert (seen.structure.findings, seen.structure.leaks, seen.structure.facts) == (
                alone.structure.findings,
                alone.structure.leaks,
                alone.structure.facts,
            )
    assert compared > 30
    assert shared.looks < compared * 7


@pytest.mark.parametrize(
    "text",
    ["v3 | no-such-verb", "v3", "nonsense | flush", "v3 | write:1+2", "v3 | flush | fault x", "v3 | write:65536+512"],
)
def test_a_line_that_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(CowfenceError):
        parse_case(text)


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_its_line(name: str) -> None:
    assert parse_case(str(CASES[name])) == CASES[name]
