"""Made-up results of the explorer, small and large, for the tests of its report."""

from __future__ import annotations

import random

from cowfence.crash.report import Report, ReportCoverage, ReportEntry, ReportRun, ReportViolation

HOSTILE = "<script>document.title='taken'</script>\"'&{{ 7*7 }}</script><!--<img src=x onerror=alert(1)>"

_PREPARE = ("data.write", "refcount.increment", "l2.new", "refcount.increment")
_LINK = ("l2.link", "l1.link")
_RECLAIM = ("refcount.decrement", "host.discard")


def run(name: str, length: int, seed: int = 1) -> ReportRun:
    """A log of about ``length`` entries in the order of the transaction, and states that grow until each fence."""
    rng = random.Random(seed)
    entries = [ReportEntry("fence", "open.fence")]
    states = [1]
    volatile = 1

    def put(entry: ReportEntry) -> None:
        nonlocal volatile
        volatile = 1 if entry.kind == "fence" else min(4096, volatile * rng.choice((1, 2, 2, 3)))
        entries.append(entry)
        states.append(0 if entry.kind == "guest" else volatile)

    def change(mark: str) -> None:
        kind = "discard" if mark == "host.discard" else "write"
        put(ReportEntry(kind, mark, f"512 bytes at {rng.randrange(1 << 16) * 512:#x}"))

    while len(entries) < length:
        for _ in range(rng.randint(1, 4)):
            verb = rng.choice(("write", "write", "zero", "discard"))
            at = len(entries)
            text = f"{rng.choice((512, 4096, 65536))} bytes at {rng.randrange(1 << 10) * 512}"
            put(ReportEntry("guest", verb, text, until=at + 3))
            change("data.write")
            change("refcount.increment")
        flush = len(entries)
        put(ReportEntry("guest", "flush"))
        for mark in _PREPARE[: rng.randint(1, 4)]:
            change(mark)
        put(ReportEntry("fence", "prepare.fence"))
        for mark in _LINK[: rng.randint(1, 2)]:
            change(mark)
        put(ReportEntry("fence", "link.fence"))
        entries[flush] = ReportEntry("guest", "flush", until=len(entries))
        for mark in _RECLAIM[: rng.randint(0, 2)]:
            change(mark)
    return ReportRun(name, entries[:length], states[:length])


def sectors(count: int, seed: int = 1) -> list[str]:
    """A guest's disk: mostly old, a written range, and in it what is wrong."""
    words = ["old"] * count
    first = count // 3
    for sector in range(first, min(count, first + 24)):
        words[sector] = "new"
    rng = random.Random(seed)
    for word in ("foreign", "foreign", "lost") if count else ():
        words[first + rng.randrange(min(24, count - first))] = word
    return words


def violation(clause: str, run_name: str, point: int, sector_count: int = 128) -> ReportViolation:
    """One violation with all its parts."""
    return ReportViolation(
        clause=clause,
        model="power",
        edge="the L2 entry (l2.link) can be durable before the data that it leads to (data.write): no fence between them",
        what="guest sector 43 holds b'sector 12 write 4', which was never written there",
        operations=["write 4096 bytes at 16384", "flush", "write 512 bytes at 22016"],
        replay=f"cowfence crash replay --seed 1 --clause {clause} --state 000fa3:2,5,9 --model power overlay.walk",
        lost=["data.write: 512 bytes at 0x5600, version 1", "refcount.increment: 512 bytes at 0x10000, version 2"],
        sectors=sectors(sector_count),
        run=run_name,
        point=point,
    )


def coverage() -> list[ReportCoverage]:
    """Some operations by some options, one of them never put together."""
    rng = random.Random(3)
    operations = ("write full cluster", "write head", "write in place", "zero, unmap", "discard", "snapshot delete")
    options = ("version 2", "version 3", "512 B clusters", "64 KiB clusters", "refcount bits 1", "backing raw", "1 snapshot")
    counts = {(one, two): rng.randrange(1, 4000) for one in operations for two in options}
    counts["snapshot delete", "backing raw"] = 0
    return [ReportCoverage(one, two, count) for (one, two), count in counts.items()]


def clean() -> Report:
    """Nothing found, all judged."""
    return Report(
        command="cowfence crash explore --model kill,power --sequences 2 --cluster-size 512",
        seed=20261125,
        models=["kill", "power"],
        states=1_482_331,
        distinct=311_870,
        seconds=412.7,
        runs=[run("write, flush, discard over a backing image", 60), run("walk 17", 400, seed=2), run("first", 5, seed=3)],
        coverage=coverage(),
    )


def broken(length: int = 600) -> Report:
    """Three violations in one long run."""
    name = "walk 4711: 512-byte clusters, refcount bits 1"
    violations = [violation("C3", name, length // 5), violation("C5", name, length // 2, 5000), violation("C2", name, 4, 0)]
    return Report(
        command="cowfence crash explore --model power --walks 200 --seed 4711",
        seed=4711,
        models=["power"],
        states=98_231,
        distinct=40_112,
        seconds=33.0,
        sampled=12_000,
        subject="qemu 7.2",
        runs=[run(name, length)],
        violations=violations,
        coverage=coverage(),
    )


def hostile() -> Report:
    """Every text is an attack."""
    bad = HOSTILE
    return Report(
        command=bad,
        seed=None,
        models=[bad],
        states=1,
        distinct=1,
        seconds=0.0,
        subject=bad,
        runs=[ReportRun(bad, [ReportEntry(bad, bad, bad), ReportEntry("guest", bad, bad)], [1, 1])],
        violations=[ReportViolation(bad, bad, bad, [bad], bad, [bad], [bad, "old"], bad, bad, 0)],
        coverage=[ReportCoverage(bad, bad, 1)],
    )
