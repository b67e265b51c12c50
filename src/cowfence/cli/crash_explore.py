"""``cowfence crash explore`` and ``cowfence crash replay``: our own engine before the judge, many cases or one again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from cowfence.cli.main import add_output_option, print_json
from cowfence.errors import Invalid

if TYPE_CHECKING:
    from cowfence.crash.campaign import Outcome
    from cowfence.crash.explore import Model
    from cowfence.crash.unit import Settings

EXIT_VIOLATIONS: Final = 2
_CODES: Final = "exit codes: 0 no violation found, 1 error, 2 violations found"
_SUITES: Final = ("one", "two", "three", "interleaved", "faulted", "nested", "backups", "walks", "all")
_MODELS: Final = ("kill", "power", "power4096")
_BUDGET_SECONDS: Final = 60.0
_STOP_AT: Final = 10


def configure(subparsers: Any) -> None:
    """Add both commands."""
    _configure_explore(subparsers)
    _configure_replay(subparsers)


def _configure_explore(subparsers: Any) -> None:
    line = "judge every state that a crash of cowfence itself could leave"
    parser = subparsers.add_parser("explore", help=line, description=line)
    parser.epilog = _CODES
    parser.add_argument("--suite", choices=_SUITES, default="all", help="which cases (default: all, walks last)")
    parser.add_argument(
        "--images",
        default="covering",
        metavar="IMAGES",
        help="all, covering (every two options meet; default), or one such as v3,c512,r16,t64,aged; walks choose their own",
    )
    parser.add_argument(
        "--model",
        choices=_MODELS,
        action="append",
        default=[],
        help="what a crash does; may be given more than once (default: kill and power)",
    )
    parser.add_argument("--budget", type=_seconds, default=_BUDGET_SECONDS, metavar="SECONDS", help="(default: 60)")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: one for each core)")
    _add_common(parser)
    parser.set_defaults(run_crash=_explore)


def _configure_replay(subparsers: Any) -> None:
    line = "judge one case again, as a violation named it"
    parser = subparsers.add_parser("replay", help=line, description=line)
    parser.epilog = _CODES
    parser.add_argument("case", metavar="'MODEL | CASE'", help="such as 'power | v3,c512,r16,t64 | write:0+512 flush'")
    _add_common(parser)
    parser.set_defaults(run_crash=_replay)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of samples, and of the first walk (default: 0)")
    parser.add_argument(
        "--limit",
        type=_positive,
        default=4096,
        metavar="N",
        help="states of one instant above which they are sampled (default: 4096)",
    )
    add_json_options(parser)
    parser.add_argument("--html", metavar="FILE", help="write a report as one HTML page (needs the extra: cowfence[report])")


def add_json_options(parser: argparse.ArgumentParser) -> None:
    """``--output``, and ``--json`` for short."""
    add_output_option(parser)
    parser.add_argument("--json", action="store_const", const="json", dest="output", help="--output=json")


def _explore(arguments: argparse.Namespace) -> int:
    from cowfence.crash.campaign import ORDER, cases_of, chosen_images, explore
    from cowfence.crash.unit import Settings

    images = chosen_images(arguments.images)
    names = ORDER if arguments.suite == "all" else (arguments.suite,)
    models: tuple[Model, ...] = tuple(dict.fromkeys(arguments.model)) or ("kill", "power")
    settings = Settings(models, arguments.limit, arguments.seed)
    with _report_file(arguments.html) as write, _progress(arguments.budget) as progress:
        outcome = explore(
            [(name, cases_of(name, images, arguments.seed)) for name in names],
            settings,
            jobs=arguments.jobs,
            budget_seconds=arguments.budget,
            stop_at=_STOP_AT,
            progress=progress,
        )
        write(outcome, _command(arguments, settings))
    if arguments.output == "json":
        print_json(outcome.to_dict())
    else:
        _print(outcome)
    return EXIT_VIOLATIONS if outcome.found else 0


def _replay(arguments: argparse.Namespace) -> int:
    from cowfence.crash.campaign import explore
    from cowfence.crash.cases import parse_case
    from cowfence.crash.unit import Settings

    model, bar, text = (part.strip() for part in arguments.case.partition("|"))
    if not bar or model not in _MODELS:
        raise Invalid(f"a replay reads: MODEL | CASE, with a model of {', '.join(_MODELS)}")
    case = parse_case(text)
    settings = Settings((model,), arguments.limit, arguments.seed)
    with _report_file(arguments.html) as write:
        outcome = explore([("replay", [case])], settings, jobs=1)
        write(outcome, settings.replay(model, str(case)))
    if arguments.output == "json":
        print_json(outcome.to_dict())
        return EXIT_VIOLATIONS if outcome.found else 0
    for found in outcome.found:
        print(found)
    if not outcome.found:
        print(f"no violation ({outcome.totals.states:,} states, {'exhaustive' if outcome.exhaustive else 'sampled'})")
    return EXIT_VIOLATIONS if outcome.found else 0


def _command(arguments: argparse.Namespace, settings: Settings) -> str:
    models = " ".join(f"--model {model}" for model in settings.models)
    return (
        f"cowfence crash explore --suite {arguments.suite} --images {arguments.images} {models} "
        f"--budget {arguments.budget:g} --seed {settings.seed} --limit {settings.limit}"
    )


@contextmanager
def _report_file(path: str | None) -> Iterator[Callable[[Outcome, str], None]]:
    """What writes the page. That it can be written is tried first: not after ten minutes of work."""
    if path is None:
        yield lambda outcome, command: None  # noqa: ARG005
        return
    from cowfence.crash.campaign_report import report_of
    from cowfence.crash.report import check_renderer, render

    check_renderer()
    with open(path, "w", encoding="utf-8") as file:

        def write(outcome: Outcome, command: str) -> None:
            file.write(render(report_of(outcome, command)))

        yield write


@contextmanager
def _progress(budget_seconds: float) -> Iterator[Callable[[Outcome], None] | None]:
    """A bar on standard error, if that is a terminal and rich is there (the extra ``terminal``)."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[done]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("exploring", total=budget_seconds, done="")

        def show(outcome: Outcome) -> None:
            done = (
                f"{outcome.totals.states:,} states, {outcome.states_per_second:,.0f}/s, {len(outcome.coverage)} pairs of "
                f"operation and option, {len(outcome.found) or 'no'} violation{'' if len(outcome.found) == 1 else 's'}"
            )
            suite = next(reversed(outcome.suites), "exploring")
            bar.update(task, completed=min(outcome.seconds, budget_seconds), description=suite, done=done)

        yield show


def _print(outcome: Outcome) -> None:
    print(f"{'suite':<12} {'cases':>8} {'states':>12} {'distinct':>12} {'looks':>9} {'violations':>10}")
    for name, totals in [*outcome.suites.items(), ("total", outcome.totals)]:
        note = "" if name == "total" or name in outcome.complete else "  (not to its end)"
        print(
            f"{name:<12} {totals.cases:>8,} {totals.states:>12,} {totals.distinct:>12,} {totals.looks:>9,} "
            f"{totals.violations:>10,}{note}"
        )
    how = "every state of each case was judged"
    if not outcome.exhaustive:
        how = f"sampled at {outcome.totals.sampled:,} instants, {outcome.totals.cut} cases half judged"
    print(
        f"{', '.join(outcome.settings.models)}; seed {outcome.settings.seed}; {outcome.seconds:.1f} s, "
        f"{outcome.states_per_second:,.0f} states/s; {how}{'; interrupted' if outcome.interrupted else ''}"
    )
    for found in outcome.found:
        print(f"\n{found}")
    if not outcome.found:
        print("no violation")


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError("0 is too few")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds")
    return value
