"""``cowfence repair``: a plan of a repair, the repair, and the way back. The exit code is that of ``check``."""

from __future__ import annotations

import argparse
import json
import os

from cowfence.cli.main import add_output_option, print_json
from cowfence.errors import Invalid, from_os_error
from cowfence.ops.check import CheckResult, Mode
from cowfence.ops.repair import apply_repair, plan_repair, undo_repair


def configure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--plan", action="store_true", help="print as JSON what a repair would change; change nothing")
    group.add_argument("--apply", action="store_true", help="repair")
    group.add_argument("--undo-from", metavar="FILE", help="take back the repair that this undo file was made for")
    parser.add_argument(
        "--plan-file", metavar="FILE", help="with --plan: write the plan there; with --apply: only if it would be this"
    )
    parser.add_argument("--undo", metavar="FILE", help="with --apply: write what takes it back to this new file first")
    parser.add_argument("-r", dest="mode", choices=("leaks", "all"), default="all", help="what is repaired (default: all)")
    add_output_option(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if arguments.undo is not None and not arguments.apply:
        raise Invalid("--undo goes with --apply")
    if arguments.plan_file is not None and arguments.undo_from is not None:
        raise Invalid("--plan-file and --undo-from do not go together")
    image = arguments.image
    if arguments.undo_from is not None:
        put_back = undo_repair(image, arguments.undo_from)
        if arguments.output == "json":
            print_json({"filename": image, "bytes-put-back": put_back})
        else:
            print(f"{image}: {put_back} bytes are as they were before the repair")
        return 0
    mode = Mode(arguments.mode)
    if arguments.plan:
        plan = plan_repair(image, mode)
        if arguments.plan_file is not None:
            _write(arguments.plan_file, json.dumps(plan.to_dict(), indent=4) + "\n")
        print_json(plan.to_dict())
        return plan.result.exit_code
    result = apply_repair(image, mode, plan_file=arguments.plan_file, undo_file=arguments.undo)
    if arguments.output == "json":
        print_json(result.to_dict())
    else:
        _print(result)
    return result.exit_code


def _write(path: str, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise from_os_error(path, "write", 0, error) from error


def _print(result: CheckResult) -> None:
    print(f"{result.leaks_fixed} leaked clusters and {result.corruptions_fixed} corruptions are repaired")
    print(f"{result.report.leaks} leaked clusters and {result.report.corruptions} corruptions are left")
    for reason in result.unrepairable:
        print(f"not repaired: {reason}")
