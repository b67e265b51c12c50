"""The workloads of the crash contract, as cases: every sequence of one operation over all options, of two over a covering set,
of three with the middle flushed or not, each also disturbed, and seeded random walks.

They are made from what is registered (``operations``) and from the options of images; an operation that is registered later is
in all of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from cowfence.crash.cases import Case, Fault, Nested, crash_points, record
from cowfence.crash.images import AGED, ImageSpec, disk_bytes
from cowfence.crash.operations import OPERATIONS, Step
from cowfence.crash.runner import Recording

FLUSH: Final = Step("flush")


def all_images() -> list[ImageSpec]:
    """Every combination of options that there can be, fresh and aged."""
    found = []
    for version, cluster, bits, backing, cache, discards, aged, snapshots in itertools.product(
        (3, 2), (512, 4096, 65536), (16, 1, 64), ("none", "raw", "qcow2"), (64, 2, 1), (True, False), (False, True), (0, 1, 2)
    ):
        if (version == 2 and bits != 16) or (snapshots and bits == 1) or (snapshots and not aged):
            continue
        found.append(ImageSpec(version, cluster, bits, backing, snapshots, aged, cache, discards))
    found += [
        ImageSpec(cold=True, aged=True),
        ImageSpec(cold=True, aged=True, snapshots=1, cache=1),
        ImageSpec(short_l1=True),
        ImageSpec(short_l1=True, snapshots=1),
        ImageSpec(aged=True, snapshots=1, diverged=True),
        ImageSpec(aged=True, snapshots=2, smaller=True, diverged=True, cache=1),
        ImageSpec(aged=True, snapshots=1, smaller=True, diverged=True, keeper=True),
        ImageSpec(keeper=True),
        ImageSpec(keeper=True, aged=True),
        ImageSpec(keeper=True, aged=True, snapshots=1, cache=1),
        ImageSpec(keeper=True, refcount_bits=64, full=True),
        ImageSpec(bitmap=True),
        ImageSpec(bitmap=True, aged=True),
        ImageSpec(bitmap=True, aged=True, snapshots=1, cache=1, backing="qcow2"),
        ImageSpec(bitmap=True, aged=True, snapshots=1, diverged=True),
        ImageSpec(bitmap=True, aged=True, snapshots=2, diverged=True, smaller=True),
        ImageSpec(bitmap=True, keeper=True, refcount_bits=64, full=True),
        ImageSpec(bitmap=True, aged=True, cluster_bytes=4096, refcount_bits=1),
        ImageSpec(dirty=True),
        ImageSpec(dirty=True, aged=True),
        ImageSpec(dirty=True, aged=True, refcount_bits=1),
        ImageSpec(dirty=True, aged=True, snapshots=1, cache=1, backing="raw"),
        ImageSpec(dirty=True, aged=True, cluster_bytes=4096, refcount_bits=64),
        *(
            ImageSpec(extended=True, cluster_bytes=cluster, **options)
            for cluster, options in (
                (16384, {}),
                (65536, {"backing": "qcow2"}),
                (16384, {"aged": True, "backing": "raw", "cache": 1}),
                (16384, {"aged": True, "snapshots": 1, "diverged": True}),
                (65536, {"aged": True, "snapshots": 2, "backing": "qcow2", "cache": 2}),
                (16384, {"aged": True, "keeper": True, "refcount_bits": 64, "backing": "qcow2"}),
                (16384, {"aged": True, "bitmap": True, "refcount_bits": 1, "discards": False}),
            )
        ),
        ImageSpec(aes=True, aged=True),
        ImageSpec(aes=True, aged=True, snapshots=1, backing="raw", cache=1),
        ImageSpec(aes=True, version=2, aged=True, backing="qcow2"),
        ImageSpec(luks=True, aged=True, cluster_bytes=4096, refcount_bits=64),
        ImageSpec(luks=True, aged=True, cluster_bytes=65536, snapshots=1, backing="qcow2"),
        ImageSpec(data=True),
        ImageSpec(data=True, aged=True),
        ImageSpec(data=True, aged=True, cache=1, backing="qcow2"),
        ImageSpec(data=True, aged=True, cluster_bytes=4096, backing="raw", refcount_bits=1),
        ImageSpec(data=True, aged=True, keeper=True, bitmap=True),
        ImageSpec(data=True, aged=True, extended=True, cluster_bytes=16384, backing="raw"),
        ImageSpec(rawdata=True),
        ImageSpec(rawdata=True, aged=True, cache=1),
        ImageSpec(rawdata=True, aged=True, cluster_bytes=65536, refcount_bits=64),
        ImageSpec(rawdata=True, extended=True, cluster_bytes=16384),
        ImageSpec(refcount_bits=64, full=True),
        ImageSpec(refcount_bits=64, full=True, cache=1),
    ]
    return found


def covering_images(images: Sequence[ImageSpec] | None = None) -> list[ImageSpec]:
    """Fewer of them, in which every two options still meet (pairwise)."""
    candidates = list(images if images is not None else all_images())

    def pairs(image: ImageSpec) -> set[tuple[int, object, int, object]]:
        return {(a, x, b, y) for (a, x), (b, y) in itertools.combinations(enumerate(image), 2)}

    left = set().union(*map(pairs, candidates))
    chosen = []
    while left:
        best = max(candidates, key=lambda image: len(pairs(image) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def places(image: ImageSpec) -> list[tuple[int, int]]:
    """(offset, length in bytes) of every kind of place: a whole cluster of each state, head, tail and middle of one, across
    two, the first of another L2 table, the last of the disk."""
    cluster, size = image.cluster_bytes, disk_bytes(image)
    found = [(AGED["free"] * cluster, cluster)]
    if image.aged:
        found += [(AGED[kind] * cluster, cluster) for kind in AGED if kind != "free"]
        found += [(AGED["compressed"] * cluster, 2 * cluster)]
    else:
        found += [(0, cluster)]
    if cluster > 512:
        start = AGED["allocated"] * cluster
        found += [(start, 512), (start + cluster - 512, 512), (start + 512, 1024), (start + cluster - 512, 1024)]
        found += [((AGED["free"] + 1) * cluster + 512, 512)]
    if size > 64 * 512 and cluster == 512:
        found += [(64 * cluster, cluster), (63 * cluster, 2 * cluster), (70 * cluster, cluster)]
    if image.full:
        found += [(50 * cluster, 30 * cluster)]
    found += [(size - cluster, cluster)]
    return found


def steps(image: ImageSpec) -> list[Step]:
    """Every operation at every place that it is tried at."""
    found = []
    for operation in OPERATIONS.values():
        if operation.places:
            found += [
                Step(operation.name, offset, length)
                for offset, length in places(image)
                if not operation.whole or not (offset | length) % image.cluster_bytes
            ]
        else:
            found.append(Step(operation.name))
    return found


def covering_steps(image: ImageSpec) -> list[Step]:
    """The operations at the places that differ most."""
    cluster = image.cluster_bytes
    hot = [0, AGED["compressed"] * cluster, AGED["free"] * cluster] if image.aged else [0, AGED["free"] * cluster]
    return [
        step
        for step in steps(image)
        if OPERATIONS[step.verb].combined
        if not step.length_bytes or (step.offset in hot and step.length_bytes == cluster)
    ]


def one(images: Sequence[ImageSpec]) -> Iterator[Case]:
    """Every sequence of one operation, flushed at its end."""
    for image in images:
        for step in steps(image):
            yield Case(image, (step, FLUSH))


def two(images: Sequence[ImageSpec]) -> Iterator[Case]:
    """Every sequence of two of the covering operations; the first flushed, or not."""
    for image in images:
        for first, second in itertools.product(covering_steps(image), repeat=2):
            yield Case(image, (first, second, FLUSH))
            yield Case(image, (first, FLUSH, second, FLUSH))


def three(images: Sequence[ImageSpec]) -> Iterator[Case]:
    """Every sequence of three of the covering operations, with the middle one flushed or not."""
    for image in images:
        for first, second, third in itertools.product(covering_steps(image), repeat=3):
            yield Case(image, (first, second, third, FLUSH))
            yield Case(image, (first, second, FLUSH, third, FLUSH))


def _recorded(case: Case) -> Recording | None:
    """The run that is to be disturbed; None where the engine cannot even carry it out, which whoever judges the case itself
    will find."""
    try:
        return record(case)
    except Exception:
        return None


def interleaved(images: Sequence[ImageSpec]) -> Iterator[Case]:
    """Every operation that can be carried out inside another call, inside each call of each of the covering sequences."""
    for image in images:
        inner = [step for step in covering_steps(image) if OPERATIONS[step.verb].request is not None]
        for first in covering_steps(image):
            script = (first, FLUSH, Step("write", (AGED["free"] + 1) * image.cluster_bytes, image.cluster_bytes), FLUSH)
            recording = _recorded(Case(image, script))
            if recording is None:
                yield Case(image, script)
                continue
            for number in range(recording.calls):
                for step in inner:
                    yield Case(image, script, inside=((number, step),))


def faulted(images: Sequence[ImageSpec]) -> Iterator[Case]:
    """Every change and fence of the covering sequences fails: with each error, once and for good, having arrived or not. What
    changes the image as a whole comes after a discard, too: so it begins with a commit that frees something."""
    for image in images:
        write = Step("write", (AGED["free"] + 1) * image.cluster_bytes, image.cluster_bytes)
        for first in covering_steps(image):
            if first.verb in ("kill", "repair", "reopen", "read", "flush"):
                continue
            yield from _faulted(image, (first, FLUSH, write, FLUSH))
            if not OPERATIONS[first.verb].places:
                yield from _faulted(image, (Step("discard", 0, image.cluster_bytes), first, FLUSH, write, FLUSH))


def _faulted(image: ImageSpec, script: tuple[Step, ...]) -> Iterator[Case]:
    recording = _recorded(Case(image, script))
    if recording is None:
        yield Case(image, script)
        return
    marks = [getattr(entry, "mark", "open.fence") for entry in recording.entries]
    total = sum(1 for mark in marks if mark != "open.fence")
    for nth in range(1, total + 1):
        for error, for_good, arrived in (
            ("EIO", False, "nothing"),
            ("EIO", True, "half"),
            ("ENOSPC", False, "half"),
            ("ENOSPC", True, "nothing"),
            ("EIO", False, "all"),
        ):
            yield Case(image, script, fault=Fault(nth, error, for_good, arrived))


def nested(images: Sequence[ImageSpec]) -> Iterator[Case]:
    """A kill at every point of the covering sequences, and a power cut in what recovers from it."""
    for image in images:
        for first in covering_steps(image):
            if first.verb in ("kill", "repair", "read"):
                continue
            script = (first, FLUSH)
            recording = _recorded(Case(image, script))
            if recording is None:
                yield Case(image, script)
                continue
            for position in crash_points(recording):
                for repair in (False, True):
                    yield Case(image, script, nested=Nested(position, repair))


def backups(images: Sequence[ImageSpec]) -> Iterator[Case]:
    """A backup during which any of the covering operations is carried out, flushed or not: ended, failed, and begun again after
    a kill. Incremental where the image can have bitmaps."""
    begin, end, failed, kill, reopen = map(Step, ("backup_begin", "backup_end", "backup_failed", "kill", "reopen"))
    for image in images:
        if image.external or image.refcount_bits == 1:
            continue
        before = (Step("bitmap_add"),) if image.version >= 3 and not image.bitmap else ()
        for step in covering_steps(image):
            yield Case(image, (*before, begin, step, end, reopen))
            yield Case(image, (*before, begin, step, FLUSH, failed, reopen))
            yield Case(image, (*before, begin, step, kill, begin, step, FLUSH, end, reopen))
            yield Case(image, (*before, begin, step, FLUSH, kill, failed, reopen))


def walk(seed: int, length: int = 60, *, only: Collection[str] | None = None) -> Case:
    """A random walk: a long mixed script on a small image, with operations inside calls. ``only``: of these operations."""
    known = {name: operation for name, operation in OPERATIONS.items() if only is None or name in only}
    rng = random.Random(seed)
    image = rng.choice([image for image in all_images() if image.cluster_bytes == 512])
    size = disk_bytes(image)
    hot = [*rng.sample(range(size // 512), 6), *range(7)]
    if image.full:
        hot += range(50, 70)

    def step(verbs: Sequence[str]) -> Step:
        verb = rng.choice(verbs)
        if not OPERATIONS[verb].places:
            return Step(verb)
        cluster = rng.choice(hot)
        count = min(rng.choice([1, 1, 1, 2, 3]), size // 512 - cluster)
        return Step(verb, cluster * 512, count * 512)

    placed = [name for name, operation in known.items() if operation.places and name not in ("write", "read")]
    single = [name for name, operation in known.items() if not operation.places and name != "flush"]
    verbs = ["write"] * 6 + placed * 2 + ["flush"] * 4 + (single if rng.random() < 0.3 else [])
    inner = [name for name in placed if OPERATIONS[name].request is not None] + ["write"] * 4 + ["read"]
    script = tuple(step(verbs) for _ in range(length))
    inside = tuple(
        (number, step(inner)) for number in sorted(rng.sample(range(2 * length), min(2 * length, rng.choice([0, 8, 30]))))
    )
    return Case(image, script, inside)


def walks(seed: int, length: int = 60) -> Iterator[Case]:
    """Walks without end."""
    for number in itertools.count(seed):
        yield walk(number, length)


SUITES: Final = {
    "one": one,
    "two": two,
    "three": three,
    "interleaved": interleaved,
    "faulted": faulted,
    "nested": nested,
    "backups": backups,
}
"""By name, the workloads that are made from images."""
