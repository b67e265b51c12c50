"""Judging other programs: QEMU's losses are found and explained, its sound operations are not accused, logs are checked.

What QEMU is accused of here was seen with 7.2. A newer QEMU that no longer loses the data makes these tests fail: then they,
and ``docs/qemu-findings.md``, have to say so.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cowfence.crash import foreign_judge, fuse, logfile
from cowfence.crash.foreign import Workload, judge, record
from cowfence.crash.foreign_explain import value_words
from cowfence.crash.foreign_judge import ForeignViolation, judge_run
from cowfence.crash.foreign_run import ForeignRun, apply, replay
from cowfence.crash.foreign_states import Crash, Grain, Model, Walk
from cowfence.crash.foreign_view import look
from cowfence.crash.fuse import FuseRecorder
from cowfence.crash.judging import judge_workload, workload_of_text
from cowfence.crash.qemu import ProgramFailed, QemuIo
from cowfence.crash.qemu_workloads import random_workload, workload, workloads
from cowfence.crash.script import parse, with_paths
from cowfence.errors import Corrupt, Invalid
from cowfence.storage.oplog import Done, Entry, Fence, Note, Operation, OpLog, Truncate, Write, Zero
from helpers_fuse import require_fuse
from judges import require
from judges import run as run_judge

BOTH: tuple[Model, ...] = ("kill", "power")


def recorded(chosen: Workload) -> ForeignRun:
    require("qemu-io")
    if chosen.recorder == "fuse" or chosen.program != "qemu-io":
        require_fuse()
    return record(chosen)


def violations(name: str, model: Model, **options: float) -> list[ForeignViolation]:
    found = judge(recorded(workload(name)), model, **options)  # type: ignore[arg-type]
    assert not found.disputed
    return found.violations


def test_the_reuse_of_a_compressed_cluster_is_found_and_explained() -> None:
    (found,) = violations("compressed", "kill")
    assert (found.clause, found.model, found.breaks_promise) == ("C3", "kill", True)
    assert "guest sector 0 was flushed as 'sector 0 write 1', now reads an error" in found.edge
    assert "was freed by 'write 0 64k' and reused by 'write 512k 64k'" in found.edge
    assert "before the L2 entry at 0x40000 that still leads to it was replaced on disk" in found.edge
    assert "exit code 3, 1 leaked cluster" in found.confirmed
    assert "qemu-io reads guest sector 0 as an error" in found.confirmed


def test_sectors_that_the_guest_never_touched_are_lost_with_their_compressed_cluster() -> None:
    (found,) = violations("compressed-part", "kill")
    assert (found.clause, found.sector, found.breaks_promise) == ("C2", 0, True)
    assert "freed by 'write 512 512'" in found.edge


def test_a_power_cut_shows_it_too_in_large_clusters_within_a_budget() -> None:
    (found,) = violations("compressed", "power", budget_seconds=2.5)
    assert "freed by 'write 0 64k' and reused by 'write 512k 64k'" in found.edge


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("name", ["allocate", "allocate-64k", "overwrite", "part", "shared", "aio", "backed", "small-cache"])
def test_plain_writes_are_accused_of_nothing(name: str, model: Model) -> None:
    assert violations(name, model, budget_seconds=1.5) == []


@pytest.mark.parametrize("name", ["grow", "snapshot-create", "snapshot-delete", "bitmap-merge", "commit", "check-dirty"])
def test_whole_image_tools_that_are_sound_are_accused_of_nothing(name: str) -> None:
    for model in BOTH:
        assert violations(name, model, budget_seconds=1.5) == []


def test_zeroed_and_reused_reads_foreign_data_and_check_is_clean() -> None:
    (found,) = violations("zero-unmap", "kill")
    assert (found.clause, found.breaks_promise) == ("C3", True)
    assert "which is foreign data of guest sector 32" in found.edge
    assert "No errors were found" in found.confirmed


@pytest.mark.parametrize(("name", "line"), [("compressed-zero", "write -z -u 0 64k"), ("compressed-discard", "discard 0 64k")])
def test_a_compressed_cluster_is_punched_out_before_its_entry_is_replaced(name: str, line: str, tmp_path: Path) -> None:
    (found,) = violations(name, "kill")
    assert (found.clause, found.breaks_promise) == ("C3", True)
    assert f"was given back to the host by '{line}'" in found.edge
    assert "No errors were found" in found.confirmed
    # And with nothing between qemu-io and the file: killed after the command returned.
    image = tmp_path / "image"
    run_judge(["qemu-img", "create", "-f", "qcow2", image, "1M"])
    run_judge(["qemu-io", "-c", "write -c -P 1 0 64k", image])
    process = QemuIo(["-t", "writeback", "-d", "unmap", "-f", "qcow2", str(image)])
    assert "65536/65536" in process.command(line)
    process.kill()
    assert "Input/output error" in run_judge(["qemu-io", "-r", "-c", "read 0 512", image], check=False).stdout
    assert run_judge(["qemu-img", "check", image]).returncode == 0


def test_discarded_data_is_not_called_lost() -> None:
    (found,) = violations("discard", "kill")
    assert (found.clause, found.breaks_promise) == ("C3", False)
    assert "was discarded and had been" in found.edge


def test_a_stale_copied_flag_is_judged_by_the_harm_that_going_on_does() -> None:
    (found,) = violations("snapshot-apply", "kill")
    assert (found.clause, found.breaks_promise) == ("C5", True)
    assert "a snapshot reads differently" in found.confirmed


def test_rebase_switches_the_header_before_its_tables() -> None:
    (found,) = violations("rebase", "kill")
    assert (found.clause, found.breaks_promise) == ("C3", True)
    assert "leads nowhere" in found.edge


def test_lazy_refcounts_link_before_the_data_is_durable_and_qemus_repair_reuses_the_cluster() -> None:
    (found,) = violations("lazy-backed", "power")
    assert (found.clause, found.breaks_promise) == ("C3", True)
    assert "guest sector 2 was flushed as 0xb5 throughout" in found.edge
    assert "qemu-io reads guest sector 2 as zeros; once opened for writing, as other bytes" in found.confirmed


def test_a_real_kill_leaves_the_state_that_was_accused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-io is killed while its write of the L2 table waits in the mount; the file then reads as the explorer said."""
    require_fuse()
    image, mount = tmp_path / "IMG", tmp_path / "mount"
    mount.mkdir()
    run_judge(["qemu-img", "create", "-f", "qcow2", image, "1M"])
    run_judge(["qemu-io", "-c", "write -P 1 0 64k", image])
    writes = itertools.count()
    passed_on = fuse._Recorder.write

    def write(recorder: fuse._Recorder, path: str, data: bytes, offset: int, fi: object) -> int:
        if process.answered and next(writes) > 0:
            process.kill_only()
            raise OSError(errno.EIO, "the writer is dead")
        return passed_on(recorder, path, data, offset, fi)

    class Killable(QemuIo):
        answered = False

        def kill_only(self) -> None:
            self._process.kill()

    monkeypatch.setattr(fuse._Recorder, "write", write)
    with FuseRecorder(mount, {"IMG": image}):
        process = Killable(["-t", "writeback", "-d", "unmap", "-f", "qcow2", str(mount / "IMG")])
        process.command("write -z -u 0 64k")
        process.answered = True
        with pytest.raises(ProgramFailed):
            process.command("write -P 0x33 512k 64k")
        process.kill()
    assert "No errors" in run_judge(["qemu-img", "check", image]).stdout
    assert "00000000:  33 33" in run_judge(["qemu-io", "-r", "-c", "read -v 0 512", image]).stdout


def test_shrinking_first_punches() -> None:
    (found,) = violations("shrink", "kill")
    assert (found.clause, found.breaks_promise) == ("C8", False)


def test_violations_are_shrunk_to_the_commands_that_they_need() -> None:
    require("qemu-io")
    chosen = replace(workload("zero-unmap"), commands=("write 1k 512", "flush", "write -z -u 0 512", "write 16k 512", "flush"))
    found = judge_workload(chosen, ["kill"], replay="--workload zero-unmap").to_dict()
    (violation,) = json.loads(json.dumps(found))["violations"]
    assert violation["operations"] == ["write -z -u 0 512", "write 16k 512"]
    assert violation["replay"].endswith("--commands 'write -z -u 0 512; write 16k 512'")
    assert found["exhaustive"] is True


def test_an_nbd_server_is_judged_like_qemu_io() -> None:
    require("qemu-nbd")
    sound = recorded(replace(workload("aio"), program="qemu-nbd"))
    assert judge(sound, "power").violations == []
    (found,) = judge(recorded(replace(workload("zero-unmap"), program="qemu-nbd")), "kill").violations
    assert "freed by 'write -z -u 0 512'" in found.edge


@pytest.mark.parametrize("name", ["zero-unmap", "compressed-zero", "compressed-4k", "discard", "lazy-backed"])
def test_our_own_server_stands_before_the_same_judge(name: str) -> None:
    """The control, with the server that ships, on a real file: where QEMU is accused, it must not be."""
    run = recorded(replace(workload(name), program="cowfence"))
    for model in BOTH:
        found = judge(run, model, budget_seconds=1.5)
        assert not found.violations
        assert not found.disputed
        assert found.distinct > 1


def test_a_killed_program_may_lose_what_it_did_not_flush() -> None:
    run = recorded(workload("kill-reopen"))
    assert any(isinstance(entry, Note) and entry.event == "reopened" for entry in run.entries)
    assert judge(run, "power").violations == []


def test_random_walks_are_the_same_for_the_same_seed() -> None:
    assert random_workload(7) == random_workload(7) == workload("random:7")
    for seed in range(3):
        run = recorded(random_workload(seed))
        found = judge(run, "kill")
        assert all("freed by" in violation.edge for violation in found.violations)
        assert not found.disputed


def test_a_state_that_qemu_reads_well_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of ours that gets it wrong ends among the disputed."""

    def blind(files: dict[str, bytes], image: str) -> object:
        view = look(files, image)
        return replace(view, guest=b"!" * 512 + view.guest[512:])

    run = recorded(workload("overwrite"))
    monkeypatch.setattr(foreign_judge, "look", blind)
    found = judge(run, "kill")
    assert not found.violations
    assert found.disputed


def test_qemu_io_that_goes_away_is_said_in_one_line() -> None:
    require("qemu-io")
    with pytest.raises(ProgramFailed, match="No such file"):
        QemuIo(["-f", "qcow2", "no/such/file"])


# --- scripts ---


def test_scripts_are_parsed() -> None:
    lines = [
        "# nothing",
        "write -c 4k 512",
        "write -z -u 0 1k",
        "aio_write -P 0x7 0 512",
        "discard 0 4k",
        "flush",
        "qemu-img info IMG",
    ]
    found = parse(lines)
    assert [one.verb for one in found] == ["write", "zero", "aio_write", "discard", "flush", "tool"]
    assert found[0].qemu_io(3, "P") == "write -c -s P 4096 512"
    assert found[0].data(3).startswith(b"sector 8 write 3 ")
    assert found[1].qemu_io(1, "P") == "write -z -u 0 1024"
    assert found[2].data(9) == b"\x07" * 512


@pytest.mark.parametrize(
    "line",
    [
        *("read 0 512", "write 0", "write 1 512", "write 0 1", "write -1 512", "write 0 1T", "write 'a", "flush 1"),
        *("write -P 256 0 512", "write -P x 0 512", "write -z -P 1 0 512", "write -k 0 512"),
    ],
)
def test_bad_lines_are_refused_with_their_number(line: str) -> None:
    with pytest.raises(Invalid, match="line 2"):
        parse(["flush", line])


def test_backing_names_stay_relative() -> None:
    words = ["qemu-img", "create", "-b", "BASE", "-F", "qcow2", "IMG"]
    assert with_paths(words, {"IMG": "/d/IMG", "BASE": "/d/BASE"})[3] == "BASE"
    assert with_paths(words, {"IMG": "/d/IMG", "BASE": "/d/BASE"})[-1] == "/d/IMG"


def test_a_script_file_is_a_workload() -> None:
    text = "recorder fuse\noptions a=b,c=d\nqemu-img create -f qcow2 IMG 1M\n---\nwrite 0 512 # here\n\nflush\n"
    found = workload_of_text(text, "s")
    assert (found.recorder, found.options, found.commands) == ("fuse", ("a=b", "c=d"), ("write 0 512 # here", "flush"))
    for bad in ("flush", "recorder x\n---\nflush"):
        with pytest.raises(Invalid):
            workload_of_text(bad, "s")


def test_every_ready_workload_has_a_script_that_parses() -> None:
    for one in workloads().values():
        assert one.why
        assert parse(one.prepare)
        assert parse(one.commands)


# --- states ---


def run_of(*operations: Operation, initial: bytes = bytes(2048)) -> ForeignRun:
    log = OpLog()
    for operation in operations:
        log.append(Done(log.append(operation)))
    return ForeignRun({"IMG": initial, "BASE": bytes(512)}, b"", log.entries(), "nobody", ())


def contents(run: ForeignRun, model: Model, **options: str) -> set[bytes]:
    return {item.state.contents()["IMG"] for item in Walk(run, model, **options) if isinstance(item, Crash)}  # type: ignore[arg-type]


def test_whole_operations_are_dropped_only_while_no_fence_covers_them() -> None:
    a, b, c = (Write("IMG", at, bytes([at // 512 + 1]) * 512, str(at)) for at in (0, 512, 1024))
    run = run_of(a, Fence("IMG", "f"), b, c)

    def written(*operations: Operation) -> bytes:
        content = bytearray(2048)
        for operation in operations:
            apply(content, operation)
        return bytes(content)

    found = contents(run, "power", grain="operations")
    assert found == {written(a), written(a, b), written(a, c), written(a, b, c)}
    assert found <= contents(run, "power") | {written(a)}
    assert contents(run, "kill") == {written(a), written(a, b), written(a, b, c)}


def test_a_fence_of_another_file_covers_nothing() -> None:
    a, b = Write("IMG", 0, b"a" * 512, "a"), Write("IMG", 512, b"b" * 512, "b")
    run = run_of(a, Fence("BASE", "f"), b)
    assert bytes(512) + b"b" * 512 + bytes(1024) in contents(run, "power", grain="operations")


def test_files_lose_their_operations_independently_of_each_other() -> None:
    run = run_of(Write("IMG", 0, b"a" * 512, "a"), Write("BASE", 0, b"b" * 512, "b"))
    for grain in ("operations", "sectors"):
        walk = Walk(run, "power", grain=grain)
        found = {tuple(content[0] for content in item.state.contents().values()) for item in walk if isinstance(item, Crash)}
        assert found == {(97, 0), (0, 98), (97, 98)}
        assert not walk.sampled


def test_an_operation_that_did_not_arrive_makes_its_file_no_longer() -> None:
    run = run_of(Write("IMG", 2048, b"a" * 512, "a"), Write("IMG", 0, b"b" * 512, "b"))
    assert {len(content) for content in contents(run, "power", grain="operations") if content[0]} == {2048, 2560}


_PLACES = st.sampled_from([0, 512, 520, 1000, 1024, 2048])
_FILES = st.sampled_from(["IMG", "BASE"])
_OPERATIONS = st.one_of(
    st.builds(Write, _FILES, _PLACES, st.sampled_from([b"a" * 8, b"b" * 512, b"c" * 1000]), st.just("w")),
    st.builds(Zero, _FILES, _PLACES, st.sampled_from([100, 512]), st.just("z")),
    st.builds(Truncate, _FILES, st.sampled_from([0, 700, 1536, 3000]), st.just("t")),
    st.builds(Fence, _FILES, st.just("f")),
)


@given(st.lists(_OPERATIONS, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_states_of_whole_operations_are_states_of_the_power_model(operations: list[Operation], order: random.Random) -> None:
    """Also where operations overlap within a sector, and where they end in another order than they began."""
    log, under_way = OpLog(), []
    for operation in operations:
        under_way.append(log.append(operation))
        while under_way and order.random() < 0.6:
            log.append(Done(under_way.pop(order.randrange(len(under_way)))))
    run = ForeignRun({"IMG": b"i" * 2048, "BASE": b""}, b"", log.entries(), "nobody", ())

    def states(grain: Grain) -> set[tuple[bytes, ...]]:
        walk = Walk(run, "power", grain=grain, limit=1 << 14)
        found: set[tuple[bytes, ...]] = set()
        keys: dict[object, dict[str, bytes]] = {}
        for crash in (item for item in walk if isinstance(item, Crash)):
            files = crash.state.contents()
            found.add(tuple(files.values()))
            assert keys.setdefault(crash.state.key, files) == files
            for file, content in files.items():
                units = [crash.state.unit_data((file, number)) for number in range(8)]
                assert b"".join(units) == content.ljust(4096, b"\0")
        assume(not walk.sampled)
        return found

    whole, all_states = states("operations"), states("sectors")
    assert whole <= all_states | {(b"i" * 2048, b"")}


def test_replaying_follows_truncation_and_growth() -> None:
    run = run_of(Truncate("IMG", 100, "t"), Zero("IMG", 600, 100, "z"), Write("IMG", 50, b"x" * 10, "w"))
    content = replay(run)["IMG"]
    assert (len(content), content[50:60]) == (700, b"x" * 10)


def test_without_notes_only_structure_is_judged() -> None:
    run = recorded(workload("compressed-4k"))
    blind = replace(run, entries=_without_notes(run.entries))
    found = judge_run(blind, "kill")
    assert [violation.clause for violation in found.violations] == ["C3"]
    assert "cannot be read" in found.violations[0].edge
    assert judge_run(replace(blind, entries=()), "kill").violations == []


def _without_notes(entries: object) -> tuple[Entry, ...]:
    log = OpLog()
    for entry in entries:  # type: ignore[attr-defined]
        if not isinstance(entry, Note | Done):
            log.append(Done(log.append(entry)))
    return tuple(log.entries())


def test_values_have_words() -> None:
    assert value_words(b"sector 5 write 2 ".ljust(512, b"."), 5) == "'sector 5 write 2'"
    assert "foreign data of guest sector 5" in value_words(b"sector 5 write 2 ".ljust(512, b"."), 6)
    assert value_words(bytes(512), 0) == "zeros"
    assert value_words(b"\x07" * 512, 0) == "0x07 throughout"
    assert value_words(bytes(range(256)) * 2, 0).startswith("other bytes")


# --- logs in files ---


def small_run() -> ForeignRun:
    log = OpLog()
    token = log.note("write.begin", command="write 0 512", offset=0, data=b"d" * 512)
    for operation in (Write("IMG", 3, b"xyz", "w"), Zero("IMG", 0, 5, "z"), Truncate("IMG", 9, "t"), Fence("IMG", "f")):
        log.append(Done(log.append(operation)))
    log.note("end", token=token)
    return ForeignRun({"IMG": b"image\n{}", "BASE": b""}, b"guest", log.entries(), "program", ("write 0 512",))


def saved(run: ForeignRun) -> bytes:
    target = io.BytesIO()
    logfile.save(run, target)
    return target.getvalue()


def test_a_run_comes_back_from_its_file() -> None:
    run = small_run()
    assert logfile.load(saved(run)) == run
    assert logfile.is_run(saved(run))


@given(st.integers(0, 900), st.binary(max_size=30), st.integers(0, 30))
@settings(max_examples=300)
def test_hostile_log_files_are_read_or_corrupt(at: int, junk: bytes, cut: int) -> None:
    content = saved(small_run())
    content = content[:at] + junk + content[at + cut :]
    with contextlib.suppress(Corrupt):
        replay(logfile.load(content))


def test_a_log_that_promises_more_than_it_has_is_refused() -> None:
    content = saved(small_run())
    for old, new, what in (
        (b'"bytes": 3', b'"bytes": 3000000000', "'bytes' is no number"),
        (b'"size": 9', b'"size": 9000000000000', "'size' is no number"),
        (b'"position": 1', b'"position": 0', "no operation that could end"),
        (b'"token": 0', b'"token": 1', "nothing that 'end' could end"),
        (b'"op": "zero"', b'"op": "zeros"', "no operation 'zeros'"),
        (b'"file": "IMG", "mark": "f"', b'"file": "IMH", "mark": "f"', "none of the files"),
    ):
        assert old in content
        with pytest.raises(Corrupt, match=what):
            logfile.load(content.replace(old, new, 1))
    with pytest.raises(Corrupt, match="cut off"):
        logfile.load(content[:-1])
