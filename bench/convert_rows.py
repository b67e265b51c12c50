"""P1 to P4: conversions of a 4 GiB disk, half holes, the rest text, random bytes and written zeros."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Row, command_seconds, in_turn, version_of
from cowfence.units import GIB, MIB

_COWFENCE = [sys.executable, "-m", "cowfence.cli.main"]
_DISK_BYTES = 4 * GIB
_USR_LIB_BYTES = 256 * MIB


def mixed_disk(folder: Path) -> Path:
    """The recipe: parts of 0.5 to 4 MiB; of eight, four are holes, two text of 4,000 words, one random, one written zeros. Made
    once in a folder."""
    path = folder / "mixed.raw"
    if path.exists():
        return path
    rng = random.Random(7)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    text = b" ".join(rng.choice(words) for _ in range(3_000_000))
    with path.open("wb") as file:
        file.truncate(_DISK_BYTES)
        at = 0
        while at < _DISK_BYTES:
            kind = rng.choice(["hole"] * 4 + ["text", "text", "random", "zero"])
            length = min(rng.choice([1, 2, 4, 8]) * MIB // 2, _DISK_BYTES - at)
            if kind != "hole":
                start = rng.randrange(len(text) - 4 * MIB)
                data = {"text": text[start : start + length], "random": rng.randbytes(length), "zero": bytes(length)}[kind]
                file.seek(at)
                file.write(data)
            at += length
    return path


def usr_lib_disk(folder: Path) -> Path:
    """256 MiB of what a system has in /usr/lib: its files one behind the other, in the order of their names."""
    path = folder / "usr-lib.raw"
    if path.exists():
        return path
    left = _USR_LIB_BYTES
    with path.open("wb") as disk:
        for file in sorted(Path("/usr/lib").rglob("*")):
            if left and file.is_file() and not file.is_symlink():
                data = file.read_bytes()[:left]
                disk.write(data)
                left -= len(data)
        disk.truncate(_USR_LIB_BYTES)
    return path


def _convert_seconds(program: list[str], words: list[str], target: Path) -> float:
    """Into a new file: one that is replaced would lend its pages to one side only."""
    target.unlink(missing_ok=True)
    return command_seconds([*program, "convert", *words, str(target)])


def _pair(
    pairs: int, theirs: list[list[str]], ours: list[str], source: Path, folder: Path
) -> tuple[float, float, tuple[int, int]]:
    """Medians of the peer's best options and of ours, and the sizes of the files. ``source`` is the last word but one."""
    peer_target, own_target = folder / "peer", folder / "own"
    best = min(theirs, key=lambda words: _convert_seconds(["qemu-img"], [*words, str(source)], peer_target))
    # As the peer had, one run that does not count: the first to touch the host's memory pays for it.
    _convert_seconds(_COWFENCE, [*ours, str(source)], own_target)
    peer, own = in_turn(
        pairs,
        lambda: _convert_seconds(["qemu-img"], [*best, str(source)], peer_target),
        lambda: _convert_seconds(_COWFENCE, [*ours, str(source)], own_target),
    )
    sizes = (peer_target.stat().st_size, own_target.stat().st_size)
    subprocess.run(["qemu-img", "compare", "-q", str(source), str(own_target)], check=True)
    peer_target.unlink()
    own_target.unlink()
    return peer, own, sizes


_MANY = ["-W", "-m", "16"]
_PLAIN = ["-f", "raw", "-O", "qcow2"]


def plain(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    theirs, ours, _ = _pair(pairs, [_PLAIN, [*_MANY, *_PLAIN]], _PLAIN, mixed_disk(fast), fast)
    yield Row("P1", "convert raw to qcow2, 4 GiB mixed", version_of("qemu-img"), theirs, ours, "s", 1.2, "low")


def _compressed(
    number: str, work: str, kind: str, target: float, source: Path, fast: Path, pairs: int, *, effort: str = ""
) -> Row:
    words = ["-c", "-o", f"compression_type={kind}", *_PLAIN]
    ours = ["--effort", effort, *words] if effort else words
    peer, own, (peer_bytes, own_bytes) = _pair(max(1, pairs // 2), [[*_MANY, *words]], ours, source, fast)
    note = f"file {100 * own_bytes / peer_bytes - 100:+.1f} %"
    return Row(number, f"{work}, compressed ({kind})", version_of("qemu-img"), peer, own, "s", target, "low", note)


def zlib(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    for work, source in (("the same", mixed_disk(fast)), ("256 MiB of /usr/lib", usr_lib_disk(fast))):
        yield _compressed("P2", work, "zlib", 6.0, source, fast, pairs)
        yield _compressed("P2", f"{work}, best effort", "zlib", 1.5, source, fast, pairs, effort="best")


def zstd(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    yield _compressed("P3", "the same", "zstd", 1.5, mixed_disk(fast), fast, pairs)


def back(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    for kind, target in (("zlib", 2.0), ("zstd", 1.2)):
        source = fast / "compressed.qcow2"
        words = ["-c", "-o", f"compression_type={kind}", *_PLAIN, str(mixed_disk(fast)), str(source)]
        subprocess.run([*_COWFENCE, "convert", *words], check=True)
        to_raw = ["-O", "raw"]
        theirs, ours, _ = _pair(pairs, [to_raw, [*_MANY, *to_raw]], to_raw, source, fast)
        yield Row("P4", f"compressed qcow2 ({kind}) to raw", version_of("qemu-img"), theirs, ours, "s", target, "low")
        source.unlink()
