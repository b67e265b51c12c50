"""The rows: each makes its images, measures peer and ours in turn, and gives what it found."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cowfence
from bench.depth import nbdkit_file
from bench.measure import Row, command_seconds, cowfence_serve, fio, in_turn, peak_rss_mib, qemu_nbd, served, version_of
from cowfence.disk.base import Request, Verb
from cowfence.nbd.client import NbdDisk
from cowfence.units import GIB, TIB

_ALLOCATING = 20_000
_COWFENCE = [sys.executable, "-m", "cowfence.cli.main"]


def _create(path: Path, size: str, *options: str) -> Path:
    path.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size], check=True)
    return path


def _full(path: Path) -> Path:
    """A 1 GiB image, every cluster allocated and written."""
    _create(path, "1G")
    subprocess.run(["qemu-io", "-c", "write -P 1 0 1G", str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


def _shuffle(path: Path) -> None:
    """Put the host clusters of a metadata-preallocated image into random order."""
    import numpy as np

    with path.open("r+b") as file:
        header = file.read(104)
        bits = int.from_bytes(header[20:24])
        entries, offset = int.from_bytes(header[36:40]), int.from_bytes(header[40:48])
        file.seek(offset)
        l1 = np.frombuffer(file.read(entries * 8), dtype=">u8") & 0x00FFFFFFFFFFFE00
        tables = []
        for table in l1.tolist():
            file.seek(table)
            tables.append(np.frombuffer(file.read(1 << bits), dtype=">u8"))
        whole = np.concatenate(tables)
        whole = np.random.default_rng(1).permutation(whole)
        for number, table in enumerate(l1.tolist()):
            file.seek(table)
            file.write(whole[number << bits - 3 : (number + 1) << bits - 3].astype(">u8").tobytes())


def check(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    peer = version_of("qemu-img")
    # In random order the peer reads a refcount block for nearly every cluster: minutes for 1 TiB, so a small part is taken.
    for size, note, target in (("1T", "", 4.0), ("16G", "16 GiB of it, clusters in random order", 2.0)):
        image = _create(fast / "check.qcow2", size, "-o", "preallocation=metadata")
        if note:
            _shuffle(image)
        theirs, ours = in_turn(
            pairs,
            lambda image=image: command_seconds(["qemu-img", "check", str(image)], warmup=1),  # type: ignore[misc]
            lambda image=image: command_seconds([*_COWFENCE, "check", str(image)], warmup=1),  # type: ignore[misc]
        )
        yield Row("P5", "check, 1 TiB, preallocation=metadata", peer, theirs, ours, "s", target, "low", note)
        image.unlink()


def snapshot(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    """P6. Each works on an image of its own, which is as it was before each measurement."""
    theirs = _create(fast / "theirs.qcow2", "1T", "-o", "preallocation=metadata")
    ours = _create(fast / "ours.qcow2", "1T", "-o", "preallocation=metadata")
    seconds: dict[str, list[float]] = {"-c": [], "-d": []}

    def measure(command: Sequence[str], image: Path) -> float:
        for option, found in seconds.items():
            found.append(command_seconds([*command, "snapshot", option, "bench", str(image)]))
        return seconds["-c"][-1] + seconds["-d"][-1]

    measure([*_COWFENCE], ours)
    measure(["qemu-img"], theirs)
    for found in seconds.values():
        found.clear()
    peer, own = in_turn(pairs, lambda: measure(["qemu-img"], theirs), lambda: measure(_COWFENCE, ours))
    parts = [statistics.median(found[side::2]) for side in (0, 1) for found in seconds.values()]
    note = f"create {parts[0]:.2f} and {parts[2]:.2f} s, delete {parts[1]:.2f} and {parts[3]:.2f} s"
    yield Row("P6", "snapshot create, then delete, on that image", version_of("qemu-img"), peer, own, "s", 10.0, "low", note)
    theirs.unlink()
    ours.unlink()


def _serve_pairs(image: Callable[[], Path], fast: Path, pairs: int, rw: str, **options: object) -> tuple[float, float]:
    """fio's rate against both servers in turn; ``image`` makes the image anew for each."""
    socket = fast / "nbd.sock"

    def rate(server: Callable[[Path, Path], list[str]]) -> float:
        path = image()
        with served(server(path, socket), socket):
            return fio(socket, rw, **options)  # type: ignore[arg-type]

    return in_turn(pairs, lambda: rate(qemu_nbd), lambda: rate(cowfence_serve))


def _beside(image: Path, fast: Path, rw: str, **options: object) -> str:
    """What nbdkit's file plugin does with the raw disk of ``image``: no tables to look into, and so no peer, but a measure."""
    socket, raw = fast / "nbd.sock", image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    with served(nbdkit_file(image, socket), socket):
        rate = statistics.median(fio(socket, rw, **options) for _ in range(3))  # type: ignore[arg-type]
    raw.unlink()
    return f"nbdkit's file plugin, raw: {rate:,.0f}"


def random_read(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    image = _full(fast / "full.qcow2")
    theirs, ours = _serve_pairs(lambda: image, fast, pairs, "randread")
    yield Row(
        "P7",
        "serve, 4 KiB random read, depth 32",
        version_of("qemu-nbd"),
        theirs,
        ours,
        "/s",
        3.0,
        "high",
        _beside(image, fast, "randread"),
    )


def random_write_in_place(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    image = _full(fast / "full.qcow2")
    theirs, ours = _serve_pairs(lambda: image, fast, pairs, "randwrite")
    yield Row(
        "P8",
        "serve, 4 KiB random write in place, depth 32",
        version_of("qemu-nbd"),
        theirs,
        ours,
        "/s",
        3.0,
        "high",
        _beside(image, fast, "randwrite"),
    )


def allocating_write(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    # A bounded number of writes: so every one of nearly all writes allocates, whichever server is faster.
    theirs, ours = _serve_pairs(
        lambda: _create(fast / "empty.qcow2", "4G"), fast, pairs, "randwrite", extra=["--size=4G", "--number_ios=20000"]
    )
    yield Row(
        "P9", "serve, 4 KiB random write that allocates, depth 32", version_of("qemu-nbd"), theirs, ours, "/s", 2.5, "high"
    )


def flushed_write(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:
    for place, note, target in ((fast, "tmpfs", 2.5), (slow, "on the disk", 1.5)):
        theirs, ours = _serve_pairs(
            lambda place=place: _create(place / "flushed.qcow2", "4G"),  # type: ignore[misc]
            fast,
            pairs,
            "randwrite",
            count=_ALLOCATING,
            extra=["--size=4G", "--fsync=32"],
        )
        yield Row("P10", "P9 with a flush every 32 writes", version_of("qemu-nbd"), theirs, ours, "/s", target, "high", note)
        (place / "flushed.qcow2").unlink()


def sequential(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    peer = version_of("qemu-nbd")
    image = _full(fast / "full.qcow2")
    theirs, ours = _serve_pairs(lambda: image, fast, pairs, "read", bs="1m", depth=16)
    yield Row(
        "P11",
        "serve, sequential 1 MiB read",
        peer,
        theirs,
        ours,
        "MiB/s",
        1.2,
        "high",
        _beside(image, fast, "read", bs="1m", depth=16),
    )
    image.unlink()
    theirs, ours = _serve_pairs(
        lambda: _create(fast / "empty.qcow2", "4G"),
        fast,
        pairs,
        "write",
        bs="1m",
        depth=16,
        extra=["--size=4G", "--number_ios=3000"],
    )
    yield Row("P11", "serve, sequential 1 MiB write that allocates", peer, theirs, ours, "MiB/s", 2.0, "high")
    (fast / "empty.qcow2").unlink()


def _reads_a_second(read: Callable[[int], object], count: int) -> float:
    rng = random.Random(1)
    offsets = [rng.randrange(GIB // 4096) * 4096 for _ in range(count)]
    for offset in offsets[:1000]:
        read(offset)
    begin = time.perf_counter()
    for offset in offsets:
        read(offset)
    return count / (time.perf_counter() - begin)


def library_reads(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    image = _full(fast / "full.qcow2")
    with cowfence.open(image) as disk:

        def ours() -> float:
            return _reads_a_second(lambda offset: disk.read(offset, 4096), 100_000)

        fd = os.open(image, os.O_RDONLY)
        theirs, own = in_turn(pairs, lambda: _reads_a_second(lambda offset: os.pread(fd, 4096, offset), 100_000), ours)
        yield Row("P12", "library, 4 KiB random reads", "os.pread on the file", theirs, own, "/s", 0.5, "high")
        os.close(fd)
        for module, package, target, reader in (
            ("pyqcow", "libqcow-python", 4.0, _libqcow),
            ("dissect.hypervisor", "dissect.hypervisor", 8.0, _dissect),
        ):
            try:
                found = importlib.util.find_spec(module)
            except ModuleNotFoundError:
                found = None
            if found is None:
                print(f"bench: {package} is not installed (pip install '.[bench]'): row left out", file=sys.stderr)
                continue
            theirs, own = in_turn(pairs, lambda reader=reader: _reads_a_second(reader(image), 20_000), ours)  # type: ignore[misc]
            yield Row("P12", "library, 4 KiB random reads", package, theirs, own, "/s", target, "high")


def _libqcow(image: Path) -> Callable[[int], object]:
    import pyqcow

    disk = pyqcow.file()
    disk.open(str(image))
    return lambda offset: disk.read_buffer_at_offset(4096, offset)


def _dissect(image: Path) -> Callable[[int], object]:
    from dissect.hypervisor.disk.qcow2 import QCow2

    opened = QCow2(image.open("rb"))
    disk = opened.open() if hasattr(opened, "open") else opened

    def read(offset: int) -> object:
        disk.seek(offset)
        return disk.read(4096)

    return read


def _traced(server: Callable[[Path, Path], list[str]], image: Path, fast: Path) -> tuple[float, float]:
    """(fences per guest flush, host bytes per 4 KiB write) of 6,400 allocating writes with a flush each 32."""
    socket, trace = fast / "nbd.sock", fast / "trace"
    calls = "trace=fdatasync,fsync,pwrite64,pwritev,pwritev2"
    with served(server(image, socket), socket, ["strace", "-f", "-qq", "-e", calls, "-o", str(trace)]):
        # Our own client, because fio sends many more flushes than one for each 32 writes once its queue is deep.
        rng = random.Random(1)
        with NbdDisk(f"nbd+unix:///?socket={socket}") as disk:
            for _ in range(200):
                batch = [Request(Verb.WRITE, rng.randrange(4 * GIB // 4096) * 4096, 4096, bytes(4096)) for _ in range(32)]
                assert disk.submit(batch) == [None] * 32
                disk.flush()
    text = trace.read_text().splitlines()
    fences = sum(1 for row in text if re.search(r"\b(fdatasync|fsync)\(", row))
    written = sum(int(match[1]) for row in text if (match := re.search(r"pwrite\S*\(.*= (\d+)$", row)))
    # The tail of a call that another thread interrupted stands on a line of its own.
    written += sum(int(match[1]) for row in text if (match := re.search(r"<\.\.\. pwrite\S* resumed>.*= (\d+)$", row)))
    trace.unlink()
    return fences / (6400 / 32), written / 6400


def fences(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    theirs = _traced(qemu_nbd, _create(fast / "empty.qcow2", "4G"), fast)
    ours = _traced(cowfence_serve, _create(fast / "empty.qcow2", "4G"), fast)
    peer = f"{version_of('qemu-nbd')} ({theirs[0]:.2f})"
    yield Row("P13", "fences per guest flush, mean", peer, theirs[0], ours[0], "fences", 2.1, "limit")
    yield Row("P13", "host bytes per allocating 4 KiB write", version_of("qemu-nbd"), theirs[1], ours[1], "B", 1.0, "low")
    (fast / "empty.qcow2").unlink()


def memory(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    image, socket = fast / "sparse.qcow2", fast / "nbd.sock"
    cowfence.create(image, 64 * TIB).close()
    rng = random.Random(1)
    with served(cowfence_serve(image, socket), socket) as pid:
        with NbdDisk(f"nbd+unix:///?socket={socket}") as disk:
            for _ in range(20_000 // 32):
                batch = [Request(Verb.WRITE, rng.randrange(64 * TIB // 4096) * 4096, 4096, bytes(4096)) for _ in range(32)]
                assert disk.submit(batch) == [None] * 32
        peak = peak_rss_mib(pid)
    image.unlink()
    yield Row("P14", "peak RSS: 64 TiB sparse, 20,000 random 4 KiB writes", "", 0.0, peak, "MiB", 120.0, "limit")


def info_start(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:  # noqa: ARG001
    image = _create(fast / "info.qcow2", "1G")
    bare, ours = in_turn(
        pairs,
        lambda: command_seconds([sys.executable, "-c", "pass"], warmup=1, runs=10),
        lambda: command_seconds([*_COWFENCE, "info", str(image)], warmup=1, runs=10),
    )
    note = f"python -c pass {bare * 1000:.0f} ms, info {ours * 1000:.0f} ms"
    yield Row("P15", "cowfence info beyond a bare Python", "", 0.0, (ours - bare) * 1000, "ms", 60.0, "limit", note)


def cold_read(fast: Path, slow: Path, pairs: int) -> Iterator[Row]:
    image = _full(slow / "cold.qcow2")

    def dropped() -> Path:
        fd = os.open(image, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        return image

    theirs, ours = _serve_pairs(dropped, fast, pairs, "randread", seconds=2.0)
    yield Row("P17", "P7 from a cold page cache, on the disk", version_of("qemu-nbd"), theirs, ours, "/s", 1.0, "high")
    image.unlink()
