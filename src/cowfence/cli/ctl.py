"""``cowfence ctl``: ask, or change, what ``cowfence serve --control`` is serving."""

from __future__ import annotations

import argparse
from typing import Final

from cowfence.cli.main import add_output_option, one_line, print_json, size_bytes
from cowfence.units import format_size

_EXPORT: Final = "of several exports, which"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-k", "--control", required=True, metavar="PATH", help="the control socket of the server")
    add_output_option(parser)
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True, prog=parser.prog)

    def verb(name: str, line: str, *, export: bool = True) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(name, help=line, description=line)
        if export:
            made.add_argument("-x", "--export", metavar="NAME", help=_EXPORT)
        return made

    verb("status", "show what is served, and what was asked of it", export=False)
    for name, line in (
        ("snapshot-create", "take an internal snapshot"),
        ("snapshot-apply", "make the disk what it was then; not while it has clients"),
        ("snapshot-delete", "delete an internal snapshot"),
        ("bitmap-remove", "remove a bitmap"),
        ("bitmap-clear", "nothing is dirty"),
        ("bitmap-enable", "let a bitmap record"),
        ("bitmap-disable", "let a bitmap stay as it is"),
    ):
        verb(name, line).add_argument("name")
    verb("snapshot-list", "list the internal snapshots")
    verb("bitmap-list", "list the bitmaps")
    add = verb("bitmap-add", "make a bitmap, which records from now on")
    add.add_argument("-g", "--granularity", type=size_bytes, metavar="SIZE", help="bytes for each bit")
    add.add_argument("name")
    merge = verb("bitmap-merge", "dirty wherever SOURCE is, too")
    merge.add_argument("name")
    merge.add_argument("source", metavar="SOURCE")
    resize = verb("resize", "make the disk longer or shorter; clients see it when they connect again")
    resize.add_argument("--shrink", action="store_true", help="it may become shorter: what lies behind its end is gone")
    resize.add_argument("--preallocation", metavar="MODE", help="of what is new: off (default), metadata, falloc, full")
    resize.add_argument("size", type=size_bytes)
    verb("check", "check the image: damage, and leaked clusters")
    verb("commit", "write the image's changes into its backing file").add_argument(
        "-d", dest="keep", action="store_true", help="do not empty the image afterwards"
    )
    verb("flush", "make durable what was written")
    begin = verb("backup-begin", "export the disk as it is now, under another name, while it goes on being written")
    begin.add_argument("--bitmap", metavar="OLD", help="it stops to record; what it has recorded is told with the backup")
    begin.add_argument("--next-bitmap", metavar="NEW", help="it records from now on, for the next backup")
    begin.add_argument("name")
    end = verb("backup-end", "give up what was kept for a backup, also for one whose server died", export=False)
    end.add_argument("-x", "--export", metavar="NAME", help="of which export it is, or was when its server died")
    end.add_argument(
        "--failed", action="store_true", help="OLD records again, with all that has changed meanwhile; else OLD is removed"
    )
    end.add_argument("name")
    verb("reload", "read the configuration again", export=False)
    verb("drain", "take no new clients, and end when the last one has left", export=False)
    verb("stop", "end", export=False)


_NOT_SENT: Final = ("control", "output", "verb", "program", "command")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.service.control import ask

    fields = {name.replace("_", "-"): value for name, value in vars(arguments).items() if name not in _NOT_SENT}
    request = {name: value for name, value in fields.items() if value is not None and value is not False}
    result = ask(arguments.control, {"command": arguments.verb, **request})
    if arguments.output == "json":
        print_json(result)
    elif arguments.verb == "status" and isinstance(result, dict):
        _print_status(result)
    elif result is not None:
        _print(result)
    if arguments.verb == "check" and isinstance(result, dict):
        return 2 if result.get("corruptions") else 3 if result.get("leaks") else 0
    return 0


def _print_status(status: dict[str, object]) -> None:
    print(f"process {status['pid']}, for {status['uptime-seconds']} s")
    exports = status["exports"]
    assert isinstance(exports, dict)
    print(f"{'EXPORT':<20}{'SIZE':>10}{'CLIENTS':>9}{'READS':>12}{'WRITES':>12}{'FLUSHES':>10}{'ERRORS':>8}")
    for name, found in exports.items():
        asked = found["requests"]
        print(
            f"{one_line(name) or '(default)':<20}{format_size(found['virtual-size']):>10}{found['clients']:>9}"
            f"{asked['read']:>12}{asked['write']:>12}{asked['flush']:>10}{found['errors']:>8}"
        )


def _print(result: object) -> None:
    """A list, a line each; of the rest, a line for each thing that it says."""
    if isinstance(result, list):
        for one in result:
            print(one_line("  ".join(f"{key}: {value}" for key, value in one.items()) if isinstance(one, dict) else str(one)))
    elif isinstance(result, dict):
        for key, value in result.items():
            print(one_line(f"{key}: {value}"))
