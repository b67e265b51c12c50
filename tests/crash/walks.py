"""Seeded random walks: long mixed scripts on small images, with guest operations inside fences, judged in every state.

``python -m crash.walks --budget SECONDS --seed N`` explores until the time is over and prints one line of totals; a violation
prints the seed that shows it again (``--walks 1 --seed N``).
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from typing import Literal

from cowfence.crash.explore import Recording, Runner, Step, Verdicts, explore
from cowfence.disk.base import Disk
from cowfence.qcow2.image import Options, open_image
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultPlan, FaultyStorage, Kind
from cowfence.storage.memory import MemoryStorage
from crash.scenarios import CLUSTER, OPTIONS, SIZE, TIGHT, compressed, image, open_plain, snapshotted, written


@dataclass(frozen=True)
class Walk:
    """One seed's image, options, backing image and script."""

    seed: int
    content: bytes
    options: Options
    backing: bytes | None
    script: tuple[Step, ...]
    inside: tuple[Step, ...]

    def open(self, storage: Storage, writable: bool) -> Disk:
        backing = None
        if self.backing is not None:
            backing = open_plain(MemoryStorage(self.backing, name="backing", writable=False), False)
        return open_image(storage, backing=backing, writable=writable, options=self.options)


def _images() -> list[bytes]:
    fresh = image()
    used = written(fresh, (0, 4 * CLUSTER), (70 * CLUSTER, CLUSTER))
    packed = compressed(compressed(used, 0), CLUSTER)
    full = written(image(64, size=256 * CLUSTER), (0, 46 * CLUSTER))
    # Several refcount blocks, of which an engine that opens it has looked at none.
    many = written(image(64, size=256 * CLUSTER), (0, 150 * CLUSTER))
    two = written(image(version=2), (0, 2048))
    return [fresh, used, packed, snapshotted(used), snapshotted(packed), full, many, many, image(1), two]


IMAGES = _images()
BACKINGS = [None, None, written(image(), (0, 20 * CLUSTER)), written(image(size=10 * CLUSTER), (0, 10 * CLUSTER))]


def walk(seed: int) -> Walk:
    rng = random.Random(seed)
    content = rng.choice(IMAGES)
    hot = [*rng.sample(range(SIZE // CLUSTER), 6), 0, 1, 2]

    def step(verbs: list[str]) -> Step:
        verb = rng.choice(verbs)
        if verb in ("flush", "kill"):
            return Step(verb)  # type: ignore[arg-type]
        cluster = rng.choice(hot)
        count = min(rng.choice([1, 1, 1, 2, 3]), SIZE // CLUSTER - cluster)
        return Step(verb, cluster * CLUSTER, count * CLUSTER)  # type: ignore[arg-type]

    changes = ["write"] * 5 + ["zero", "keep_zero", "discard", "discard"]
    script = tuple(step([*changes, "flush", "flush", "flush", *(["kill"] if rng.random() < 0.2 else [])]) for _ in range(20))
    inside = tuple(step(changes) for _ in range(rng.choice([0, 4, 12])))
    options = rng.choice([OPTIONS, TIGHT, Options(cache_bytes=2 * CLUSTER, commit_interval=None, quarantine_bytes=1)])
    return Walk(seed, content, options, rng.choice(BACKINGS), script, inside)


def run(chosen: Walk) -> Recording:
    left = list(chosen.inside)

    def during(kind: Kind, mark: str) -> None:
        if left and (kind is Kind.FENCE or mark in ("refcount.decrement", "host.discard")) and mark != "open.fence":
            runner.step_inside(left.pop())

    plan = FaultPlan(on_call=during)
    runner = Runner(chosen.content, lambda storage, writable: chosen.open(FaultyStorage(storage, plan), writable))
    disk = chosen.open(MemoryStorage(chosen.content, name="image", writable=False), False)
    guest = disk.read(0, disk.size)
    for step in chosen.script:
        runner.step(step)
    return Recording(chosen.content, guest, runner.log.entries())


def judge(chosen: Walk, recording: Recording, model: Literal["kill", "power"], limit: int = 64) -> Verdicts:
    return explore(recording, model, chosen.open, limit=limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--walks", type=int, default=1 << 30)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.budget
    states = distinct = walks = 0
    seed = arguments.seed
    while walks < arguments.walks and time.monotonic() < end:
        chosen = walk(seed)
        recording = run(chosen)
        for model in ("kill", "power"):
            verdicts = judge(chosen, recording, model)
            states += verdicts.states
            distinct += verdicts.distinct
            if verdicts.violations:
                print(f"seed {seed}, model {model}: {verdicts.violations[0]}")  # noqa: T201
                return 1
        walks += 1
        seed += 1
    print(f"{walks} walks from seed {arguments.seed}, {states} states, {distinct} distinct, 0 violations")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
