"""``cowfence repair``: what a repair would do, the repair, and the way back.

``--plan`` prints the plan as JSON and changes nothing; ``--apply`` repairs, with ``--plan-file`` only if that is still the
plan; ``--undo-from`` takes a repair back. The exit code of a plan and of a repair is that of ``check``, for what is left.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cowfence.cli.main import add_output_option, complain, one_line, print_json
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.errors import Invalid

if TYPE_CHECKING:
    from cowfence.ops.repair import Plan, Repaired

EXIT_NO_CHECK = 63


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_mutually_exclusive_group(required=True)
    verbs.add_argument("--plan", action="store_true", help="print, as JSON, what a repair would do; change nothing")
    verbs.add_argument("--apply", action="store_true", help="repair the image")
    verbs.add_argument("--undo-from", metavar="FILE", help="take back the repair that wrote this undo file")
    parser.add_argument("-r", dest="mode", choices=("leaks", "all"), help="what may be repaired (default: all)")
    parser.add_argument(
        "--plan-file",
        metavar="FILE",
        help="with --plan: write the plan there; with --apply: repair only if it is still the plan",
    )
    parser.add_argument("--undo", metavar="FILE", help="with --apply: keep the way back there, before anything is changed")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    add_progress_option(parser)
    parser.add_argument("-U", "--force-share", action="store_true", help="plan for an image that another process writes to")
    add_dry_run_option(parser)
    add_output_option(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    _refuse_what_makes_no_sense(arguments)
    from cowfence.ops.check import NoCheck

    try:
        if arguments.undo_from is not None:
            return _undo(arguments)
        return _plan(arguments) if arguments.plan else _apply(arguments)
    except NoCheck as error:
        return complain(arguments, str(error), EXIT_NO_CHECK)


def _refuse_what_makes_no_sense(arguments: argparse.Namespace) -> None:
    if arguments.undo is not None and not arguments.apply:
        raise Invalid("--undo goes with --apply: only a repair writes an undo file")
    if arguments.dry_run and arguments.plan:
        raise Invalid("--plan changes nothing: --dry-run means nothing with it")
    if arguments.force_share and not arguments.plan:
        raise Invalid("-U goes with --plan: an image that another process may write to cannot be repaired")
    if arguments.undo_from is not None and (arguments.plan_file or arguments.mode or arguments.progress):
        raise Invalid("--undo-from takes no plan (--plan-file, -r, -p)")
    if arguments.plan and arguments.progress and arguments.plan_file is None:
        raise Invalid("-p with --plan needs --plan-file: the plan itself is what is printed")


def _plan(arguments: argparse.Namespace) -> int:
    from cowfence.ops.repair import Mode, plan, write_plan

    with shown(arguments) as progress:
        planned = plan(arguments.image, Mode(arguments.mode or "all"), force_share=arguments.force_share, progress=progress)
    if arguments.plan_file is not None:
        write_plan(planned, arguments.plan_file, arguments.image)
    elif not arguments.quiet:
        print_json(planned.to_dict())
    return planned.result.exit_code


def _apply(arguments: argparse.Namespace) -> int:
    from cowfence.ops.repair import Mode, apply, read_plan

    mode = None if arguments.mode is None else Mode(arguments.mode)
    stored = None if arguments.plan_file is None else read_plan(arguments.plan_file)
    rehearsal = rehearsal_of(arguments)
    with shown(arguments) as progress:
        done = apply(arguments.image, mode, stored=stored, undo_file=arguments.undo, progress=progress, rehearsal=rehearsal)
    if rehearsal is not None:
        return tell(arguments, rehearsal, done.to_dict(), code=done.exit_code)
    if not arguments.quiet:
        if arguments.output == "json":
            print_json(done.to_dict())
        else:
            _print_human(done)
    return done.exit_code


def _print_human(done: Repaired) -> None:
    planned: Plan = done.plan
    if planned.empty:
        print("Nothing was changed.")
    else:
        total = sum(length_bytes for _, length_bytes in planned.ranges)
        print(f"Repaired: {planned.result.corruptions_fixed} corruptions, {planned.result.leaks_fixed} leaked clusters.")
        print(f"{total} bytes were changed in {len(planned.ranges)} places of the file.")
    if done.undo_file is not None:
        print(f"The way back: {one_line(done.undo_file)} (--undo-from).")
    for reason in planned.result.unrepairable:
        print(f"Not repaired: {one_line(reason)}")
    report = planned.result.report
    if report.corruptions or report.leaks:
        print(f"Left: {report.corruptions} corruptions, {report.leaks} leaked clusters (check --explain).")


def _undo(arguments: argparse.Namespace) -> int:
    from cowfence.ops.repair import undo

    rehearsal = rehearsal_of(arguments)
    restored = undo(arguments.image, arguments.undo_from, rehearsal=rehearsal)
    found = {"filename": arguments.image, "undo-file": arguments.undo_from, "restored-bytes": restored}
    if rehearsal is not None:
        return tell(arguments, rehearsal, found)
    if not arguments.quiet:
        if arguments.output == "json":
            print_json(found)
        else:
            print(f"The repair was taken back: {restored} bytes are as they were.")
    return 0
