"""``cowfence check``: check an image, in the words and with the exit codes of ``qemu-img check``.

0: clean. 1: the check could not be made. 2: corrupt. 3: leaked clusters only. 63: the format has no check. After ``-r`` they
describe what is left. Each finding is a line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Final

from cowfence.cli.main import EXIT_FAILED, add_output_option, complain, one_line, print_json
from cowfence.cli.progress import add_progress_option, shown
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import CACHE_HELP, add_image_opts_option, goes_direct, local_file, secrets_for
from cowfence.errors import CowfenceError, Invalid
from cowfence.ops.check import CheckResult, NoCheck

if TYPE_CHECKING:
    from cowfence.qcow2.describe import JsonValue
    from cowfence.qcow2.findings import Report

EXIT_NO_CHECK: Final = 63


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    parser.add_argument("-r", "--repair", choices=("leaks", "all"), help="repair leaked clusters, or all that can be repaired")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    add_progress_option(parser)
    parser.add_argument("-U", "--force-share", action="store_true", help="check an image that another process writes to")
    parser.add_argument("-T", dest="source_cache", metavar="CACHE", help=CACHE_HELP.format("read"))
    add_image_opts_option(parser)
    add_dry_run_option(parser)
    add_output_option(parser)
    add_secret_options(parser)
    parser.add_argument(
        "--explain", action="store_true", help="say what each sort of finding means, risks, and how it is repaired"
    )
    parser.add_argument("images", nargs="+", metavar="image", help="of several, a table is printed")


def run(arguments: argparse.Namespace) -> int:
    if arguments.repair is not None and arguments.force_share:
        raise Invalid("an image that another process may write to cannot be repaired (-r with -U)")
    if arguments.explain and arguments.quiet:
        raise Invalid("--explain with -q: there would be nothing to read")
    if arguments.dry_run and arguments.repair is None:
        raise Invalid("--dry-run goes with -r: a check changes nothing")
    if len(arguments.images) > 1:
        return _check_many(arguments)
    outcome = _check(arguments, arguments.images[0])
    if not isinstance(outcome, CheckResult):
        return complain(arguments, "This image format does not support checks", EXIT_NO_CHECK)
    _tell(outcome)
    if not arguments.quiet:
        if arguments.output == "json":
            print_json(_dict(arguments, outcome))
        else:
            _print_human(outcome, dry_run=arguments.dry_run)
            if arguments.explain:
                _print_explained(outcome)
    return outcome.exit_code


def _check(arguments: argparse.Namespace, image: str) -> CheckResult | NoCheck:
    from cowfence.ops.check import Mode, check

    mode = None if arguments.repair is None else Mode(arguments.repair)
    direct = goes_direct(arguments.source_cache, "source cache")
    source = local_file(image, arguments)
    # No guest data is read; but what is given has to be there.
    secrets_for(source, arguments)
    try:
        with shown(arguments) as progress:
            return check(
                source.name,
                format=source.format,
                repair=mode,
                force_share=arguments.force_share,
                direct=direct,
                progress=progress,
                rehearsal=rehearsal_of(arguments),
            )
    except NoCheck as error:
        return error


def _tell(result: CheckResult) -> None:
    """The findings, on standard error."""
    for finding in result.findings:
        print(f"{finding.grade.value}: {one_line(str(finding))}", file=sys.stderr)
    for line in _left_out(result.report):
        print(line, file=sys.stderr)
    for reason in result.unrepairable:
        print(f"not repaired: {one_line(reason)}", file=sys.stderr)


def _print_explained(result: CheckResult) -> None:
    from cowfence.ops.meanings import explain

    for finding in result.findings:
        explanation = explain(finding)
        print(f"\n{one_line(str(finding))}")
        print(f"    wrong:  {explanation.wrong}\n    risk:   {explanation.risk}\n    repair: {explanation.repair}")
    for line in _left_out(result.report):
        print(f"\n{line}")
    if result.findings:
        print("\nTo see every change before it is made: repair --plan; to be able to go back: repair --apply --undo FILE.")


def _check_many(arguments: argparse.Namespace) -> int:
    """A table, and one exit code: 2 where any image is corrupt, else 1 where any could not be checked, else 3 for leaks."""
    rows: list[tuple[str, str, int, int]] = []
    told: list[JsonValue] = []
    codes = set()
    for image in arguments.images:
        try:
            outcome = _check(arguments, image)
        except CowfenceError as error:
            complain(arguments, str(error), EXIT_FAILED)
            outcome = None
        if isinstance(outcome, CheckResult):
            _tell(outcome)
            if arguments.explain and arguments.output == "human":
                _print_explained(outcome)
            codes.add(outcome.exit_code)
            words = {0: "clean", 2: "corrupt", 3: "leaks"}
            rows.append((image, words[outcome.exit_code], outcome.report.corruptions, outcome.report.leaks))
            told.append(_dict(arguments, outcome) | {"result": words[outcome.exit_code]})
        else:
            if outcome is not None:
                complain(arguments, str(outcome), EXIT_FAILED)
            codes.add(EXIT_FAILED)
            rows.append((image, "not checked", 0, 0))
            told.append({"filename": image, "check-errors": 1, "result": "not checked"})
    if arguments.output == "json":
        print_json(told)
    elif not arguments.quiet:
        print(f"{'RESULT':<12}{'CORRUPTIONS':>12}{'LEAKS':>12}  IMAGE")
        for image, word, corruptions, leaks in rows:
            print(f"{word:<12}{corruptions:>12}{leaks:>12}  {one_line(image)}")
    return next((code for code in (2, EXIT_FAILED, 3) if code in codes), 0)


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


def _dict(arguments: argparse.Namespace, result: CheckResult) -> dict[str, JsonValue]:
    return result.to_dict(explained=arguments.explain) | ({"dry-run": True} if arguments.dry_run else {})


def _print_human(result: CheckResult, *, dry_run: bool) -> None:
    report = result.report
    if result.corruptions_fixed or result.leaks_fixed:
        print(f"The following inconsistencies {'would be' if dry_run else 'were found and'} repaired:\n")
        print(f"    {result.leaks_fixed} leaked clusters\n    {result.corruptions_fixed} corruptions\n")
        print("Double checking the fixed image now...")
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
