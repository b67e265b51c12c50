"""What ``cowfence crash record`` and ``judge`` do, apart from arguments and printing.

A judgement is of a run: recorded now, from a ready workload or a script, or earlier, in a file.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cowfence.crash import logfile, logwrites
from cowfence.crash.foreign import Workload, judge, record, shrink
from cowfence.crash.foreign_judge import ForeignVerdicts, ForeignViolation
from cowfence.crash.foreign_run import ForeignRun, GuestNotes, operation_range
from cowfence.crash.foreign_sessions import NbdSession, Serials
from cowfence.crash.foreign_states import Model
from cowfence.crash.foreign_view import DISK_MAX_BYTES, look
from cowfence.crash.script import parse
from cowfence.errors import CowfenceError, Invalid
from cowfence.storage.oplog import Done, Note, OpLog

ModelChoice = Literal["kill", "power", "both"]
_LOG_MAX = 1 << 31


@dataclass(frozen=True, slots=True)
class Judgement:
    """A run, judged under one or both models. ``found``: each violation with the commands that show it and a replay line.

    ``disputed``: how many would be violations if QEMU did not read what is allowed there.
    """

    run: ForeignRun
    name: str
    models: tuple[Model, ...]
    states: int
    distinct: int
    exhaustive: bool
    disputed: int
    found: tuple[tuple[ForeignViolation, tuple[str, ...], str], ...]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "program": self.run.program,
            "workload": self.name,
            "models": list(self.models),
            "states": self.states,
            "distinct": self.distinct,
            "exhaustive": self.exhaustive,
            "disputed": self.disputed,
            "violations": [_to_dict(*one) for one in self.found],
        }


def _to_dict(violation: ForeignViolation, operations: tuple[str, ...], replay: str) -> dict[str, object]:
    return {
        "clause": violation.clause,
        "model": violation.model,
        "breaks_promise": violation.breaks_promise,
        "operations": list(operations),
        "edge": violation.edge,
        "replay": replay,
        "entry": violation.position,
        "after": violation.after,
        "missing": list(violation.missing),
        "states": violation.states,
        "confirmed": violation.confirmed,
    }


def workload_of_text(text: str, name: str) -> Workload:
    """A workload from a script's text: lines that prepare the files, a line ``---``, and the commands to record.

    Lines ``recorder fuse`` and ``options TEXT`` may stand among the first. Raises Invalid.
    """
    head, bar, tail = text.partition("\n---\n")
    if not bar:
        raise Invalid(f"{name}: no line '---' between the preparation and the commands")
    found = Workload(name, "", (), tuple(line for line in tail.splitlines() if line.split("#")[0].strip()))
    prepare = []
    for line in head.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "recorder":
            if rest not in ("fuse", "blklogwrites"):
                raise Invalid(f"{name}: the recorders are fuse and blklogwrites, not {rest!a}")
            found = replace(found, recorder="fuse" if rest == "fuse" else "blklogwrites")
        elif word == "options":
            found = replace(found, options=tuple(rest.split(",")))
        elif line.split("#")[0].strip():
            prepare.append(line.strip())
    return replace(found, prepare=tuple(prepare))


def judge_workload(
    workload: Workload, models: Sequence[Model], *, replay: str, budget_seconds: float | None = None, seed: int = 0
) -> Judgement:
    """Record a workload and judge it; violations are shrunk to the commands that they need.

    ``replay``: the words of the command line that name the workload, for the replay lines.
    """
    run = record(workload)
    found = []

    verdicts = _judge_all(run, models, budget_seconds, seed)
    for model, verdict in verdicts.items():
        for violation in verdict.violations:
            smallest = shrink(workload, violation, seed=seed)
            commands = "; ".join(smallest.commands)
            line = f"cowfence crash judge {replay} --model {model} --seed {seed}"
            if smallest.commands != workload.commands:
                line += f" --commands {shlex.quote(commands)}"
            found.append((violation, smallest.commands, line))
    return _judgement(run, workload.name, models, list(verdicts.values()), found)


def judge_logs(
    runs: Sequence[ForeignRun], name: str, models: Sequence[Model], *, budget_seconds: float | None = None, seed: int = 0
) -> Judgement:
    """Judge a run that was recorded earlier, in the file ``name``, in all its versions."""
    share = None if budget_seconds is None else budget_seconds / len(runs)
    judged = [(run, _judge_all(run, models, share, seed)) for run in runs]
    found = [
        (violation, run.commands, f"cowfence crash judge --log {shlex.quote(name)} --model {model} --seed {seed}")
        for run, verdicts in judged
        for model, verdict in verdicts.items()
        for violation in verdict.violations
    ]
    return _judgement(runs[0], name, models, [verdict for _, verdicts in judged for verdict in verdicts.values()], found)


def _judge_all(
    run: ForeignRun, models: Sequence[Model], budget_seconds: float | None, seed: int
) -> dict[Model, ForeignVerdicts]:
    share = None if budget_seconds is None else budget_seconds / len(models)
    return {model: judge(run, model, budget_seconds=share, seed=seed) for model in models}


def _judgement(
    run: ForeignRun,
    name: str,
    models: Sequence[Model],
    verdicts: Sequence[ForeignVerdicts],
    found: Sequence[tuple[ForeignViolation, tuple[str, ...], str]],
) -> Judgement:
    return Judgement(
        run,
        name,
        tuple(models),
        sum(verdict.states for verdict in verdicts),
        sum(verdict.distinct for verdict in verdicts),
        all(verdict.exhaustive for verdict in verdicts),
        sum(len(verdict.disputed) for verdict in verdicts),
        tuple(found),
    )


def load_runs(log: str, image: str | None) -> list[ForeignRun]:
    """The run in a file: our own log, or a dm-log-writes log of ``image``, which is the file as it was before.

    A dm-log-writes log with discards gives two runs: what was discarded reads as zeros, or as before; the log does not say.
    Raises Corrupt, Invalid.
    """
    if os.path.getsize(log) > _LOG_MAX:
        raise Invalid(f"{log}: larger than 2 GiB")
    content = Path(log).read_bytes()
    if logfile.is_run(content):
        return [logfile.load(content, log)]
    if not logwrites.is_log(content):
        raise Invalid(f"{log}: neither a log of 'cowfence crash record' nor one of dm-log-writes")
    if image is None:
        raise Invalid(f"{log}: a dm-log-writes log needs --image FILE, the image as it was before the log")
    name = os.path.basename(image)
    initial = {name: Path(image).read_bytes()}
    guest = look(initial, name).guest
    zeroed = logwrites.entries_of(content, name, discards="zeroed", name=log)
    unchanged = logwrites.entries_of(content, name, discards="unchanged", name=log)
    for entry in zeroed:
        if not isinstance(entry, Note | Done) and operation_range(entry)[1] > DISK_MAX_BYTES:
            raise Invalid(f"{log}: {entry.mark} leads past {DISK_MAX_BYTES} bytes: larger files are not judged")
    versions = [zeroed] if zeroed == unchanged else [zeroed, unchanged]
    return [ForeignRun(initial, guest, tuple(entries), "an unknown program", (), name) for entries in versions]


def record_command(mountpoint: str, files: Sequence[str], command: Sequence[str], *, atomic: bool) -> tuple[ForeignRun, int]:
    """Run ``command`` while ``mountpoint`` shows ``files``: the run, whose image is the first file, and the exit code.

    ``atomic``: the command is one operation on the whole image (as ``qemu-img resize``), before or after in every crash state;
    else nobody knows what it writes for its guest, and only the structure can be judged.
    """
    names = {os.path.basename(file): file for file in files}
    if len(names) != len(files):
        raise Invalid("two of the files have the same name")
    initial = {name: Path(file).read_bytes() for name, file in names.items()}
    image = os.path.basename(files[0])
    log = OpLog()
    text = shlex.join(command)
    from cowfence.crash.fuse import FuseRecorder

    with FuseRecorder(mountpoint, names, log):
        token = log.note("tool.begin", command=text) if atomic else 0
        try:
            code = subprocess.run(list(command), check=False).returncode
        except OSError as error:
            raise CowfenceError(f"{command[0]}: {error.strerror}") from None
        if atomic:
            log.note("tool.end", token=token, ok=code == 0)
    guest = look(initial, image).guest
    run = ForeignRun(initial, guest, log.entries(), command[0], (text,), image)
    return run, code if code >= 0 else 128 - code


def record_at_uri(uri: str, mountpoint: str, image: str, lines: Sequence[str]) -> ForeignRun:
    """Send a script to the NBD server at ``uri``, which serves ``image`` out of ``mountpoint``; waits until it answers."""
    from cowfence.crash.fuse import FuseRecorder

    commands = parse(lines)
    name = os.path.basename(image)
    initial = {name: Path(image).read_bytes()}
    log = OpLog()
    with FuseRecorder(mountpoint, {name: image}, log):
        session = NbdSession(uri, Serials(), GuestNotes(log))
        for command in commands:
            session.run(command, lambda: None)
        session.close()
    guest = look(initial, name).guest
    return ForeignRun(initial, guest, log.entries(), uri, tuple(command.text for command in commands), name)
