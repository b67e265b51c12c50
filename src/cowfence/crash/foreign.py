"""Judging other programs: run a script through one, record what it does to its files, judge every crash state.

Two recorders: QEMU's own ``blklogwrites`` driver, which needs no privilege and sees one image; and the FUSE mount (``fuse``),
which sees any program, all files, truncation, and qemu-img. Commands are sent one at a time, so that "begun", "acknowledged"
and "flushed" stand at their right places in the log; what the program does on its own counts to the last command.

A recording is worth nothing if it lacks a write: after the run the replayed log must give the very bytes that the files hold.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cowfence.crash import logwrites, qemu
from cowfence.crash.foreign_explain import value_words
from cowfence.crash.foreign_judge import ForeignVerdicts, ForeignViolation, judge_run
from cowfence.crash.foreign_run import IMAGE, ForeignRun, GuestNotes, replay
from cowfence.crash.foreign_sessions import SERVERS, NbdSession, QemuIoSession, Serials, Session
from cowfence.crash.foreign_states import Model
from cowfence.crash.foreign_view import look
from cowfence.crash.script import file_words, parse, with_paths
from cowfence.errors import CowfenceError, Invalid
from cowfence.storage.oplog import Done, OpLog
from cowfence.units import SECTOR_BYTES

Recorder = Literal["blklogwrites", "fuse"]

_SHRINKING_SECONDS = 3.0
"""For each attempt to do without a command: what has to be found again is found early."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A script with the image that it starts from. ``prepare``: lines that make the files, not recorded.

    ``options``: of the qcow2 driver while the script runs (``l2-cache-size=512``). ``program``: ``qemu-io``, ``qemu-nbd``,
    ``cowfence``, or the command line of an NBD server in which ``{image}`` and ``{socket}`` stand for the file and the socket.
    """

    name: str
    why: str
    prepare: tuple[str, ...]
    commands: tuple[str, ...]
    recorder: Recorder = "blklogwrites"
    options: tuple[str, ...] = ()
    program: str = "qemu-io"


def record(workload: Workload) -> ForeignRun:
    """Make the files, run the script, and give what was recorded. Raises MissingProgram, ProgramFailed, Invalid."""
    with tempfile.TemporaryDirectory(prefix="cowfence-judge-") as name:
        return _Recording(workload, Path(name)).run()


class _Recording:
    def __init__(self, workload: Workload, directory: Path) -> None:
        self._workload = workload
        self._directory = directory
        self._prepare = parse(workload.prepare)
        self._commands = parse(workload.commands)
        self._serials = Serials()
        words = {IMAGE: None, **dict.fromkeys(file_words((*self._prepare, *self._commands)))}
        self._files = directory / "files"
        self._files.mkdir()
        self._names = list(words)
        self.log = OpLog()
        self._notes = GuestNotes(self.log)

    def run(self) -> ForeignRun:
        self._make()
        names = [name for name in self._names if (self._files / name).exists()]
        if IMAGE not in names:
            raise Invalid("the preparation makes no IMG")
        initial = {name: (self._files / name).read_bytes() for name in names}
        guest = guest_bytes(self._files / IMAGE)
        if self._workload.recorder == "fuse" or self._workload.program != "qemu-io":
            self._run_in_mount(names)
        else:
            self._run_with_driver()
        program = self._workload.program
        if program.startswith("qemu-"):
            program = f"{program.split()[0]} {qemu.version()}"
        run = ForeignRun(initial, guest, self.log.entries(), program, self._workload.commands)
        for name, content in replay(run).items():
            if content != (self._files / name).read_bytes():
                raise CowfenceError(f"the recorded log does not give what {name} holds now: something was not recorded")
        return run

    def _make(self) -> None:
        session: QemuIoSession | None = None
        paths = {name: str(self._files / name) for name in self._names}
        for command in self._prepare:
            if command.verb in ("tool", "kill") and session is not None:
                session.kill() if command.verb == "kill" else session.close()
                session = None
            if command.verb == "tool":
                qemu.run(with_paths(command.words, paths))
            elif command.verb != "kill":
                if session is None:
                    session = QemuIoSession(
                        self._arguments(f"file.filename={paths[IMAGE]}"), self._directory, self._serials, None
                    )
                session.run(command, lambda: None)
        if session is not None:
            session.close()

    def _arguments(self, file_options: str) -> list[str]:
        options = ["driver=qcow2", "discard=unmap", *self._workload.options, "file.discard=unmap", file_options]
        return ["-t", "writeback", "--image-opts", ",".join(options)]

    def _run_with_driver(self) -> None:
        if any(command.verb in ("tool", "kill") for command in self._commands):
            raise Invalid("qemu-img and kill are recorded by the FUSE mount only")
        log_file = self._directory / "log"
        log_file.touch()
        taken = 0

        def take() -> None:
            nonlocal taken
            entries = list(logwrites.read_log(log_file.read_bytes(), sector_bytes=SECTOR_BYTES))
            for entry in entries[taken:]:
                for operation in logwrites.operations_of(entry, IMAGE):
                    self.log.append(Done(self.log.append(operation)))
            taken = len(entries)

        driver = "file.driver=blklogwrites,file.file.discard=unmap,file.file.driver=file,file.file.filename="
        session = QemuIoSession(
            self._arguments(f"{driver}{self._files / IMAGE},file.log.driver=file,file.log.filename={log_file}"),
            self._directory,
            self._serials,
            self._notes,
        )
        take()
        for command in self._commands:
            session.run(command, take)
        session.close()
        take()

    def _run_in_mount(self, names: list[str]) -> None:
        from cowfence.crash.fuse import FuseRecorder

        mount = self._directory / "mount"
        mount.mkdir()
        with FuseRecorder(mount, {name: self._files / name for name in names}, self.log):
            self._run_commands(mount)

    def _run_commands(self, mount: Path) -> None:
        paths = {name: str(mount / name) for name in self._names}
        session: Session | None = None
        for command in self._commands:
            if command.verb in ("tool", "kill") and session is not None:
                session.kill() if command.verb == "kill" else session.close()
                session = None
            if command.verb == "tool":
                token = self.log.note("tool.begin", command=command.text)
                done = qemu.run(with_paths(command.words, paths), check=False)
                self.log.note("tool.end", token=token, ok=done.returncode == 0, said=(done.stderr or done.stdout).strip())
            elif command.verb == "kill":
                self.log.note("reopened", command="kill", data=guest_bytes(self._files / IMAGE))
            else:
                if session is None:
                    session = self._session(paths[IMAGE])
                session.run(command, lambda: None)
        if session is not None:
            session.close()

    def _session(self, image: str) -> Session:
        program = self._workload.program
        if program == "qemu-io":
            return QemuIoSession(self._arguments(f"file.filename={image}"), self._directory, self._serials, self._notes)
        program = SERVERS.get(program, program)
        return NbdSession.start(program, image, self._directory, self._serials, self._notes)


def guest_bytes(image: Path) -> bytes:
    """The bytes of the disk in an image, as QEMU itself reads them."""
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        qemu.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(image), str(raw)])
        return raw.read_bytes()


def judge(
    run: ForeignRun, model: Model, *, budget_seconds: float | None = None, seed: int = 0, limit: int = 4096, stop_at: int = 20
) -> ForeignVerdicts:
    """Judge a recorded run, and put each violation before QEMU as well: ``confirmed`` says what it found there.

    A state in which QEMU reads what the sector may hold accuses nobody, whatever we read; it goes to ``disputed``.
    """
    verdicts = judge_run(
        run, model, budget_seconds=budget_seconds, seed=seed, limit=limit, stop_at=stop_at, reopen=opened_by_qemu
    )
    found, verdicts.violations = verdicts.violations, []
    for violation in found:
        try:
            agrees = confirm(run, violation)
        except qemu.MissingProgram as missing:
            agrees, violation.confirmed = True, f"not put before QEMU: {missing}"
        (verdicts.violations if agrees else verdicts.disputed).append(violation)
    return verdicts


@contextlib.contextmanager
def state_files(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A directory with the files of a crash state, under their names in the run."""
    with tempfile.TemporaryDirectory(prefix="cowfence-state-") as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


def opened_by_qemu(files: Mapping[str, bytes], image: str = IMAGE) -> Mapping[str, bytes]:
    """The files as QEMU leaves them when it opens the image for writing and closes it again: with its own repairs."""
    with state_files(files) as directory:
        with contextlib.suppress(qemu.MissingProgram):
            qemu.run(["qemu-io", "-f", "qcow2", "-c", "length", str(directory / image)], check=False)
        return {name: (directory / name).read_bytes() for name in files}


def confirm(run: ForeignRun, violation: ForeignViolation) -> bool:
    """Ask QEMU about a crash state: its check, how it reads the sector concerned, and what harm writing on does.

    Sets ``confirmed``, and ``breaks_promise`` where going on destroys what was whole. False where QEMU reads what
    the sector may hold, both before and after it opened the image for writing (which repairs a dirty image).
    """
    with state_files(violation.files) as directory:
        image = directory / run.image
        check = qemu.run(["qemu-img", "check", "-U", "-f", "qcow2", str(image)], check=False)
        lines = [line for line in (check.stdout + check.stderr).splitlines() if line.strip()]
        summary = next((line for line in lines if "leaked" in line or "errors" in line or "No errors" in line), "")
        told = [f"qemu-img check: exit code {check.returncode}" + (f", {summary.strip().rstrip('.')}" if summary else "")]
        agrees = True
        if violation.sector is not None:
            value = _read_by_qemu(image, violation.sector)
            told.append(f"qemu-io reads guest sector {violation.sector} as {_words(value, violation.sector)}")
            agrees = value not in violation.allowed
            qemu.run(["qemu-io", "-f", "qcow2", "-c", "length", str(image)], check=False)
            if image.read_bytes() != violation.files[run.image]:
                value = _read_by_qemu(image, violation.sector)
                told.append(f"once opened for writing, as {_words(value, violation.sector)}")
                agrees |= value not in violation.allowed
        if violation.clause == "C5":
            harm = _harm_of_going_on(run, image)
            violation.breaks_promise |= harm is not None
            told.append(harm or "writing all of the disk with QEMU then does no harm")
        violation.confirmed = "; ".join(told)
        return agrees


def _words(value: bytes | None, sector: int) -> str:
    return "an error" if value is None else value_words(value, sector)


def _harm_of_going_on(run: ForeignRun, image: Path) -> str | None:
    """Has QEMU write all of the disk in a state, and says what harm that did, to the disk or to snapshots (contract, C10)."""

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in image.parent.iterdir()}

    before = look(files(), run.image)
    qemu.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 0xee 0 {before.size_bytes}", "-c", "flush", str(image)], check=False)
    after = look(files(), run.image)
    if after.error is not None:
        return f"after QEMU wrote on it does not open: {after.error}"
    if dict(after.snapshots or {}) != dict(before.snapshots or {}):
        return "after QEMU wrote all of the disk a snapshot reads differently"
    return "after QEMU wrote all of the disk it does not read as written" if after.guest.strip(b"\xee") else None


def _read_by_qemu(image: Path, sector: int) -> bytes | None:
    """A guest sector as qemu-io reads it; None for an error."""
    words = ["qemu-io", "-U", "-r", "-f", "qcow2", "-c", f"read -v {sector * SECTOR_BYTES} {SECTOR_BYTES}", str(image)]
    dump = "".join(re.findall(r"^[0-9a-f]{8,}: ((?: [0-9a-f]{2}){16})  ", qemu.run(words, check=False).stdout, re.MULTILINE))
    value = bytes.fromhex(dump)
    return value if len(value) == SECTOR_BYTES else None


def shrink(workload: Workload, violation: ForeignViolation, *, seed: int = 0) -> Workload:
    """The workload with as few commands as still break the same clause in the same way."""
    commands = list(workload.commands)
    at = 0
    while at < len(commands) and len(commands) > 1:
        fewer = replace(workload, commands=tuple(commands[:at] + commands[at + 1 :]))
        if _shows(fewer, violation, seed):
            del commands[at]
        else:
            at += 1
    return replace(workload, commands=tuple(commands))


def _shows(workload: Workload, violation: ForeignViolation, seed: int) -> bool:
    try:
        again = judge_run(
            record(workload), violation.model, budget_seconds=_SHRINKING_SECONDS, seed=seed, reopen=opened_by_qemu
        )
    except CowfenceError:
        return False
    kinds = {(one.clause, one.breaks_promise and one.clause != "C5") for one in again.violations}
    return (violation.clause, violation.breaks_promise and violation.clause != "C5") in kinds
