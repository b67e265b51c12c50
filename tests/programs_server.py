"""A process that has everything loaded and runs one command line after another, each in a child of its own.

Starting an interpreter for each of many hundred command lines would take most of the time of the tests. Requests are lines of
JSON on standard input, ``[program, words, folder, name of a file for what stdin holds, changes of the environment]``; answers
the same, ``[exit code, stdout, stderr]``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable

from cowfence.cli import img, io, nbd
from cowfence.cli.main import COMMANDS, entry_of

_PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "cowfence": lambda words: entry_of("cowfence", COMMANDS, words),
    "cowfence-img": lambda words: entry_of("cowfence-img", {name: COMMANDS[name] for name in img.NAMES}, words),
    "cowfence-nbd": nbd.entry,
    "cowfence-io": io.entry,
}


def _serve() -> None:
    for name in img.NAMES:
        importlib.import_module(f"cowfence.cli.{name}")
        importlib.import_module(f"cowfence.ops.{name}")
    for line in sys.stdin:
        program, words, folder, stdin, environment = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                os.environ.update(environment)
                os._exit(_child(program, words, folder, stdin, out.fileno(), err.fileno()))
            _, status = os.waitpid(child, 0)
            said = []
            for stream in (out, err):
                stream.seek(0)
                said.append(stream.read().decode("utf-8", "replace"))
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), *said]) + "\n")
        sys.stdout.flush()


def _child(program: str, words: list[str], folder: str, stdin: str, out: int, err: int) -> int:
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    try:
        os.chdir(folder)
        code = _PROGRAMS[program](words)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
