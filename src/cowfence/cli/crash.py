"""``cowfence crash``: record what a program does to an image, and judge every state that a crash could leave. What it does with
our own engine is in ``crash_explore``."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cowfence.cli import crash_explore
from cowfence.cli.main import print_json
from cowfence.errors import Invalid

if TYPE_CHECKING:
    from cowfence.crash.foreign import Workload
    from cowfence.crash.foreign_states import Model
    from cowfence.crash.judging import Judgement

EXIT_VIOLATIONS = 2
_WALKING_SECONDS = 60.0
_CODES = "exit codes: 0 no violation found, 1 error, 2 violations found"


def configure(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="crash_command", metavar="COMMAND", required=True, prog=parser.prog)
    crash_explore.configure(subparsers)
    _configure_record(subparsers)
    _configure_judge(subparsers)


def _configure_record(subparsers: Any) -> None:
    line = "run a program on files in a FUSE mount, and log all that it does to them"
    parser = subparsers.add_parser("record", help=line, description=line)
    parser.epilog = "exit code: that of the program; 1 on errors"
    parser.add_argument(
        "--mount", required=True, metavar="DIR", help="an empty directory; FILES are shown there by their names"
    )
    parser.add_argument("--log", required=True, metavar="FILE", help="where the log goes")
    parser.add_argument(
        "--atomic",
        action="store_true",
        help="the program is one operation on the whole image: each crash state must be as before it or as after it",
    )
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="FILES -- PROGRAM", help="the image and its other files; a program to run"
    )
    crash_explore.add_json_options(parser)
    parser.set_defaults(run_crash=_record)


def _configure_judge(subparsers: Any) -> None:
    line = "judge every crash state of a run of another program"
    parser = subparsers.add_parser("judge", help=line, description=line)
    parser.epilog = _CODES
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--workload",
        metavar="NAME",
        help="a ready workload for QEMU: 'list' shows them, 'all' runs them, 'random' walks from --seed on, for --budget",
    )
    source.add_argument("--script", metavar="FILE", help="lines that make IMG, a line ---, and the commands to judge")
    source.add_argument("--log", metavar="FILE", help="a run recorded earlier, or a dm-log-writes log")
    parser.add_argument("--image", metavar="FILE", help="with a dm-log-writes log or an NBD URI: the image before it")
    parser.add_argument("--commands", metavar="TEXT", help="instead of the workload's commands, separated by ';'")
    parser.add_argument(
        "--program",
        default="qemu-io",
        metavar="PROGRAM",
        help="qemu-io (default), qemu-nbd, cowfence, the command line of an NBD server with {socket} and {image}, or an NBD "
        "URI that serves --image out of --mount",
    )
    parser.add_argument("--mount", metavar="DIR", help="with an NBD URI: where the server finds the image")
    parser.add_argument("--model", choices=("kill", "power", "both"), default="both", help="(default: both)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="time for each workload (default: until all is judged)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample, where not all states can be judged")
    crash_explore.add_json_options(parser)
    parser.set_defaults(run_crash=_judge)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.run_crash(arguments))


def _record(arguments: argparse.Namespace) -> int:
    from cowfence.crash import logfile
    from cowfence.crash.judging import record_command

    words = arguments.words
    at = words.index("--") if "--" in words else len(words)
    files, program = words[:at], words[at + 1 :]
    if not files or not program:
        raise Invalid("record needs FILES, then --, then a program: record --mount DIR --log LOG disk.qcow2 -- PROGRAM ...")
    with open(arguments.log, "wb") as target:
        done, code = record_command(arguments.mount, files, program, atomic=arguments.atomic)
        logfile.save(done, target)
    if arguments.output == "json":
        print_json({"log": arguments.log, "files": files, "operations": len(done.entries), "exit-code": code})
    return code


def _judge(arguments: argparse.Namespace) -> int:
    if arguments.workload == "list":
        return _list(arguments)
    judgements = []
    for workload in _workloads(arguments):
        judgements.append(_judge_one(arguments, workload))
        if arguments.output == "human" and (judgements[-1].found or arguments.workload != "random"):
            _print(judgements[-1])
    if arguments.output == "json":
        print_json(judgements[0].to_dict() if len(judgements) == 1 else _totals(judgements))
    elif arguments.workload in ("all", "random"):
        states, found = sum(one.states for one in judgements), sum(len(one.found) for one in judgements)
        print(f"{len(judgements)} workloads, {states} crash states, {found or 'no'} violations")
    return EXIT_VIOLATIONS if any(judgement.found for judgement in judgements) else 0


def _list(arguments: argparse.Namespace) -> int:
    from cowfence.crash.qemu_workloads import workloads

    if arguments.output == "json":
        print_json({name: workload.why for name, workload in workloads().items()})
        return 0
    for name, workload in workloads().items():
        print(f"{name:24} {workload.why}")
    return 0


def _workloads(arguments: argparse.Namespace) -> Iterator[Workload | None]:
    """What to record and judge; None: a log."""
    import time
    from dataclasses import replace

    from cowfence.crash.judging import workload_of_text
    from cowfence.crash.qemu_workloads import workload, workloads

    if arguments.log is not None:
        yield None
        return
    if arguments.workload == "random":
        deadline = time.monotonic() + (arguments.budget or _WALKING_SECONDS)
        for seed in itertools.count(arguments.seed):
            if time.monotonic() > deadline:
                return
            yield replace(workload(f"random:{seed}"), program=arguments.program)
    if arguments.script is not None:
        with open(arguments.script, encoding="utf-8", errors="replace") as source:
            found = [workload_of_text(source.read(), arguments.script)]
    else:
        found = list(workloads().values()) if arguments.workload == "all" else [workload(arguments.workload)]
    if arguments.commands is not None:
        commands = tuple(line.strip() for line in arguments.commands.split(";"))
        found = [replace(one, commands=commands) for one in found]
    yield from (replace(one, program=arguments.program) for one in found)


def _judge_one(arguments: argparse.Namespace, workload: Workload | None) -> Judgement:
    import shlex

    from cowfence.crash import judging

    models: tuple[Model, ...] = ("kill", "power") if arguments.model == "both" else (arguments.model,)
    options = {"budget_seconds": arguments.budget, "seed": arguments.seed}
    if workload is None:
        return judging.judge_logs(judging.load_runs(arguments.log, arguments.image), arguments.log, models, **options)
    if "://" in workload.program:
        if arguments.mount is None or arguments.image is None:
            raise Invalid("an NBD URI needs --image FILE and --mount DIR: the server has to serve DIR/FILE")
        run = judging.record_at_uri(workload.program, arguments.mount, arguments.image, workload.commands)
        return judging.judge_logs([run], workload.name, models, **options)
    kind = "--workload" if arguments.script is None else "--script"
    replay = f"{kind} {shlex.quote(workload.name)}"
    if arguments.program != "qemu-io":
        replay += f" --program {shlex.quote(arguments.program)}"
    return judging.judge_workload(workload, models, replay=replay, **options)


def _totals(judgements: list[Judgement]) -> dict[str, object]:
    return {
        "workloads": [one.name for one in judgements],
        "states": sum(one.states for one in judgements),
        "distinct": sum(one.distinct for one in judgements),
        "exhaustive": all(one.exhaustive for one in judgements),
        "violations": [violation for one in judgements for violation in one.to_dict()["violations"]],  # type: ignore[attr-defined]
    }


def _print(judgement: Judgement) -> None:
    how = "all states of the model" if judgement.exhaustive else "not all states: a budget or a sample"
    print(
        f"{judgement.name} ({judgement.run.program}): {judgement.states} crash states, {judgement.distinct} distinct, {how}; "
        f"{len(judgement.found) or 'no'} violation{'' if len(judgement.found) == 1 else 's'}"
    )
    if judgement.disputed:
        print(f"  {judgement.disputed} more would be violations, but QEMU reads what is allowed there: see our reader")
    for violation, operations, replay in judgement.found:
        kind = "durable data is lost" if violation.breaks_promise else "beyond what the program promises"
        print(f"  {violation}")
        print(f"    {kind}; in {violation.states} states; shown by: {'; '.join(operations)}")
        print(f"    {violation.confirmed}")
        print(f"    replay: {replay}")
