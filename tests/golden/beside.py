"""qemu-img and ``cowfence-img`` side by side: the same lines, each in a folder of its own that holds the same images.

A line is a command line without the program. What is compared: standard output, exit code, standard error, and what is left in
the folder. In front of a line may stand

- ``~``: the error has other words here, but it is one line (``docs/differences.md`` says why, or it is argparse's);
- ``!``: qemu-img alone, ``?``: ``cowfence-img`` alone, to prepare or to look; ``>``: qemu-io on both.

Words are quoted as in a shell.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from helpers_programs import ENVIRONMENT, Programs
from judges import NOT_ITS_FAULT, TRIES, require

SECRET = "secret,id=k,file=key"
"""What opens the encrypted images of a folder."""
_TIMES = re.compile(
    r"\d+\.\d+ seconds|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    r"|(?<=disk size: ).*|(?<=\"actual-size\": )\d+|\"(date|clock|vm)-[a-z-]+\": \d+"
    r"|(?<=iters: )\d+|(?<=iters\": )\d+|(?<=uuid: )\S+|(?<=uuid\": )\S+"
)
_HINTS = re.compile(
    r"; see qemu-img.*|\nTry 'qemu-img --help' for more information|\nDetected format of \w+\."
    r"|\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively\."
)
_PROGRESS = re.compile(r"( +\(\d+\.\d\d/100%\)[\r\n])+\n?")


def theirs(words: list[str], folder: Path, *, program: str = "qemu-img") -> subprocess.CompletedProcess[str]:
    for _ in range(TRIES):
        done = subprocess.run(
            [require(program), *words],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if NOT_ITS_FAULT not in done.stderr:
            break
    return done


def plain(text: str) -> str:
    """Without times, without how far it was now and then, and without the program's name."""
    return _PROGRESS.sub("(progress)\n", _TIMES.sub("...", text)).replace("cowfence-img", "qemu-img")


def errors(text: str) -> str:
    """What was wrong. getopt and argparse point to the help each in its way."""
    text = re.sub(r"WARNING: (Image format was not specified .*?\.)\n.*\n.*restrictions\.", r"qemu-img: warning: \1", text)
    text = re.sub(r"(?<=suffixes for)\nqemu-img:", "", _HINTS.sub("", plain(text)))
    return re.sub(r"(?<=qemu-img)( \w+)?(?=: )", "", text).rstrip()


def same(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    """Carry out the lines of ``script`` in two copies of ``images``, and compare what each says and what is left."""
    mine, their = tmp_path / "ours", tmp_path / "theirs"
    for folder in (mine, their):
        shutil.copytree(images, folder)
    for line in filter(None, (line.strip() for line in script.splitlines())):
        mark, words = (line[0], shlex.split(line[1:])) if line[0] in "~!?>" else ("", shlex.split(line))
        if mark == ">":
            for folder in (mine, their):
                done = theirs(words, folder, program="qemu-io")
                assert done.returncode == 0, (line, done.stdout, done.stderr)
            continue
        ours = programs.run(words, mine) if mark != "!" else None
        judge = theirs(words, their) if mark != "?" else None
        if ours is None or judge is None:
            alone = ours or judge
            assert alone is not None
            assert alone.returncode == 0, (line, alone.stderr)
            continue
        assert (plain(ours.stdout), ours.returncode) == (plain(judge.stdout), judge.returncode), (
            line,
            ours.stderr,
            judge.stderr,
        )
        assert len(ours.stderr.splitlines()) <= 1, (line, ours.stderr)
        if mark == "~":
            assert bool(ours.stderr) == bool(judge.stderr), (line, ours.stderr, judge.stderr)
        else:
            assert errors(ours.stderr) == errors(judge.stderr), line
    same_files(mine, their)
    # Hundreds of folders; they stay where something differs.
    for folder in (mine, their):
        shutil.rmtree(folder)


def same_files(mine: Path, their: Path) -> None:
    """The same names; the same disk, described in the same words; and no image of ours that qemu-img's check complains of."""
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (mine, their)]
    assert names[0] == names[1]
    for name in names[0]:
        our_file, their_file = mine / name, their / name
        if our_file.is_dir() or our_file.read_bytes() == their_file.read_bytes():
            continue
        with our_file.open("rb") as file, their_file.open("rb") as other:
            magics = file.read(4), other.read(4)
        assert magics in ((b"QFI\xfb",) * 2, (b"LUKS",) * 2), f"{name}: not the same bytes"
        described = [theirs(["info", "-U", "--output=json", name], folder) for folder in (mine, their)]
        assert plain(described[0].stdout) == plain(described[1].stdout)
        facts = json.loads(described[0].stdout)
        secret = ["--object", SECRET] if facts.get("encrypted") else []
        opened = [_opened(folder, name, facts) for folder in (mine, their)]
        compared = theirs(["compare", "-U", *secret, "--image-opts", *opened], mine)
        assert compared.returncode == 0, (name, compared.stdout, compared.stderr)
        if b"LUKS" not in magics:
            checked = theirs(["check", name], mine)
            assert checked.returncode == theirs(["check", name], their).returncode, (name, checked.stdout)


def _opened(folder: Path, name: str, facts: dict[str, Any]) -> str:
    """An image with what opens it, and its data file beside it, for ``--image-opts``."""
    words = [f"driver={facts['format']}", f"file.filename={folder / name}".replace(",", ",,")]
    if facts.get("encrypted"):
        words.append(f"{'' if facts['format'] == 'luks' else 'encrypt.'}key-secret=k")
    data_file = facts["format-specific"]["data"].get("data-file")
    if data_file is not None:
        words += ["data-file.driver=file", f"data-file.filename={folder / data_file}"]
    return ",".join(words)
