"""``cowfence check``: check an image, in the words and with the exit codes of ``qemu-img check``.

0: clean. 1: the check could not be made. 2: corrupt. 3: leaked clusters only. 63: the format has no check. After ``-r`` they
describe what is left. Each finding is a line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Final

from cowfence.cli.main import add_output_option, complain, one_line, print_json
from cowfence.cli.progress import shown
from cowfence.errors import Invalid

if TYPE_CHECKING:
    from cowfence.ops.check import CheckResult
    from cowfence.qcow2.findings import Report

EXIT_NO_CHECK: Final = 63


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument(
        "-r", dest="repair", choices=("leaks", "all"), help="repair leaked clusters, or all that can be repaired"
    )
    parser.add_argument(
        "--explain", action="store_true", help="say of each finding what is wrong, what it risks and what a repair would do"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far the check is")
    parser.add_argument("-U", "--force-share", action="store_true", help="check an image that another process writes to")
    add_output_option(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    # numpy's BLAS, which a check does not use, would start a thread for each processor: a tenth of the whole run.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from cowfence.ops.check import Mode, NoCheck, check

    mode = None if arguments.repair is None else Mode(arguments.repair)
    if mode is not None and arguments.force_share:
        raise Invalid("an image that another process may write to cannot be repaired (-r with -U)")
    if arguments.explain and arguments.quiet:
        raise Invalid("--explain with -q: there would be nothing to read")
    try:
        with shown(arguments.progress and not arguments.quiet) as progress:
            result = check(
                arguments.image, format=arguments.format, repair=mode, force_share=arguments.force_share, progress=progress
            )
    except NoCheck as error:
        return complain(arguments, str(error), EXIT_NO_CHECK)
    for finding in result.findings:
        print(f"{finding.grade.value}: {one_line(str(finding))}", file=sys.stderr)
    for line in _left_out(result.report):
        print(line, file=sys.stderr)
    for reason in result.unrepairable:
        print(f"not repaired: {one_line(reason)}", file=sys.stderr)
    if not arguments.quiet:
        if arguments.output == "json":
            print_json(result.to_dict(explained=arguments.explain))
        else:
            _print_human(result)
            if arguments.explain:
                _print_explained(result)
    return result.exit_code


def _left_out(report: Report) -> list[str]:
    """A line for each sort of finding of which not all are kept."""
    kept: dict[tuple[object, object], int] = {}
    for finding in report.findings:
        kept[finding.problem, finding.grade] = kept.get((finding.problem, finding.grade), 0) + 1
    return [
        f"{grade.value}: {problem.value}: {total - kept[problem, grade]} more"
        for (problem, grade), total in report.totals.items()
        if total > kept[problem, grade]
    ]


def _print_human(result: CheckResult) -> None:
    report = result.report
    if result.corruptions_fixed or result.leaks_fixed:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {result.leaks_fixed} leaked clusters\n    {result.corruptions_fixed} corruptions\n")
    if not report.corruptions and not report.leaks:
        print("No errors were found on the image.")
    if report.corruptions:
        print(f"\n{report.corruptions} errors were found on the image.")
        if report.fatal:
            print("Data may be corrupted, or further writes to the image may corrupt it.")
        else:
            print("All of them are harmless: no data is in danger.")
    if report.leaks:
        print(f"\n{report.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if report.total_clusters and report.allocated_clusters:
        allocated, total = report.allocated_clusters, report.total_clusters
        print(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{report.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{report.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if report.image_end_bytes:
        print(f"Image end offset: {report.image_end_bytes}")


def _print_explained(result: CheckResult) -> None:
    from cowfence.ops.explain import explain

    for finding in result.findings:
        explanation = explain(finding)
        print(f"\n{one_line(str(finding))}")
        print(f"    wrong:  {explanation.wrong}\n    risk:   {explanation.risk}\n    repair: {explanation.repair}")
    for line in _left_out(result.report):
        print(f"\n{line}")
    if result.findings:
        print("\nTo see every change before it is made: repair --plan; to be able to go back: repair --apply --undo FILE.")
