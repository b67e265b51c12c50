"""``cowfence crash explore`` and ``replay``: our own engine before the explorer."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cowfence.cli.main import print_json
from cowfence.errors import Invalid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cowfence.crash.campaign import Judging, Totals
    from cowfence.crash.cases import Explained

EXIT_VIOLATIONS = 2
_CODES = "exit codes: 0 no violation found, 1 error, 2 violations found"
_SUITES = ("one", "two", "three", "interleaved", "faulted", "nested", "walks", "all")
_MODELS = ("kill", "power", "power4096")
_RUNS_SHOWN = 4


def configure_explore(subparsers: Any) -> None:
    line = "explore the crash states of cowfence's own engine"
    parser = subparsers.add_parser("explore", help=line, description=line)
    parser.epilog = _CODES
    parser.add_argument(
        "--suite", choices=_SUITES, default="all", help="which workloads (default: all, and then walks, until the budget ends)"
    )
    parser.add_argument(
        "--images",
        default="covering",
        metavar="all|covering|IMAGE",
        help="every combination of options, a set in which every two of them meet (default), or one image, as in a replay line",
    )
    parser.add_argument("--model", action="append", choices=_MODELS, help="may be repeated (default: kill and power)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop after so long (default: 60 for walks)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the first walk, and of samples (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)")
    parser.add_argument(
        "--limit", type=int, default=4096, metavar="N", help="states of an instant up to which all are judged (default: 4096)"
    )
    parser.add_argument("--html", metavar="FILE", help="write a report that needs nothing but a browser")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run_crash=_explore)


def configure_replay(subparsers: Any) -> None:
    line = "explore one case again and explain what it breaks"
    parser = subparsers.add_parser("replay", help=line, description=line)
    parser.epilog = _CODES
    parser.add_argument("line", metavar="'MODEL | CASE'", help="a replay line of explore")
    parser.add_argument("--limit", type=int, default=4096, metavar="N", help="as of explore")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="as of explore")
    parser.add_argument("--html", metavar="FILE", help="write a report")
    parser.set_defaults(run_crash=_replay)


def _explore(arguments: argparse.Namespace) -> int:
    from cowfence.crash import campaign
    from cowfence.crash.images import parse_image
    from cowfence.crash.workloads import all_images, covering_images

    if arguments.jobs < 1 or arguments.limit < 1:
        raise Invalid("--jobs and --limit are at least 1")
    judging = campaign.Judging(tuple(dict.fromkeys(arguments.model or ("kill", "power"))), arguments.limit, arguments.seed)
    if arguments.images in ("all", "covering"):
        images = all_images() if arguments.images == "all" else covering_images()
    else:
        images = [parse_image(arguments.images)]
    budget = arguments.budget
    if budget is None and arguments.suite in ("walks", "all"):
        budget = 60.0
    cases = campaign.cases_of(arguments.suite, images, arguments.seed)
    with _progress(budget) as progress:
        totals = campaign.run(cases, judging, budget_seconds=budget, jobs=arguments.jobs, progress=progress)
    command = " ".join(["cowfence", *sys.argv[1:]])
    if arguments.html is not None:
        shown = list(itertools.islice(campaign.cases_of(arguments.suite, images, arguments.seed), _RUNS_SHOWN))
        explained = [
            one
            for found in totals.violations
            if found.clause != "run"
            for one in campaign.explain_all(*campaign.parse_replay(found.replay), judging)
        ]
        _write_page(arguments.html, command, judging, totals, shown, explained)
    if arguments.json:
        print_json(_as_json(arguments, judging, totals))
    else:
        _print(totals, judging)
    return EXIT_VIOLATIONS if totals.violations else 0


def _replay(arguments: argparse.Namespace) -> int:
    from cowfence.crash import campaign

    model, case = campaign.parse_replay(arguments.line)
    judging = campaign.Judging((model,), arguments.limit, arguments.seed)
    explained = campaign.explain_all(model, case, judging)
    for one in explained:
        print(one)
    if not explained:
        print("no violation")
    if arguments.html is not None:
        totals = campaign.judge_case(case, judging)
        command = f"cowfence crash replay '{arguments.line}'"
        _write_page(arguments.html, command, judging, totals, [] if explained else [case], explained)
    return EXIT_VIOLATIONS if explained else 0


def _write_page(
    path: str, command: str, judging: Judging, totals: Totals, shown: list[Any], explained: list[Explained]
) -> None:
    from cowfence.crash.page import page
    from cowfence.crash.report import write_report

    write_report(page(command, judging.seed, judging, totals, shown, explained), path)


def _as_json(arguments: argparse.Namespace, judging: Judging, totals: Totals) -> dict[str, object]:
    return {
        "suite": arguments.suite,
        "images": arguments.images,
        "models": list(judging.models),
        "seed": arguments.seed,
        "limit": judging.limit,
        "cases": totals.cases,
        "states": totals.states,
        "distinct": totals.distinct,
        "looks": totals.looks,
        "instants": totals.instants,
        "instants_sampled": totals.sampled,
        "exhaustive": totals.exhaustive,
        "cpu_seconds": round(totals.seconds, 1),
        "distinct_per_cpu_second": round(totals.distinct / totals.seconds) if totals.seconds else 0,
        "violations": [found.to_dict() for found in totals.violations],
    }


def _print(totals: Totals, judging: Judging) -> None:
    rate = totals.distinct / totals.seconds if totals.seconds else 0
    how = "all of them judged"
    if totals.sampled:
        how = f"at {totals.sampled} of {totals.instants} instants pairs, triples and a sample"
    print(f"{totals.cases} cases under {', '.join(judging.models)}: {totals.states} states, {totals.distinct} distinct, {how}")
    print(f"{rate:,.0f} distinct states a second of one core; {totals.looks} had to be opened, the others read the same bytes")
    operations = sorted({operation for operation, _ in totals.coverage})
    options = sorted({option for _, option in totals.coverage})
    print(f"operations: {' '.join(operations)}; options: {' '.join(options)}")
    for found in totals.violations:
        print(f"{found.clause} ({found.model}): {found.edge}")
        print(f"  operations: {' '.join(found.operations)}")
        print(f"  replay: cowfence crash replay '{found.replay}'")
    print(f"{len(totals.violations) or 'no'} violation{'' if len(totals.violations) == 1 else 's'}")


@contextmanager
def _progress(budget_seconds: float | None) -> Iterator[Callable[[Totals, float], None] | None]:
    """A line on a terminal: how far, how fast, how much of the operations."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(totals: Totals, seconds: float) -> None:
        of = f"/{budget_seconds:.0f}" if budget_seconds is not None else ""
        text = (
            f"{seconds:5.0f}{of} s  {totals.cases} cases  {totals.distinct} distinct states  "
            f"{totals.distinct / max(seconds, 0.001):,.0f}/s  {len(totals.coverage)} pairs of operation and option  "
            f"{len(totals.violations)} violations"
        )
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
