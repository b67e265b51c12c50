"""QEMU's opinion on a seeded sample of our crash states: each opens, is sound but for leaks, and reads as it reads to us (C1,
C5); and the file is valid at every flush that returned, not only at the end (C18).

COWFENCE_QEMU_STATES=500 asks it of more of them; each costs some sixty milliseconds.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cowfence.crash.cases import Case, record
from cowfence.crash.explore import Model, device_of
from cowfence.crash.images import IMAGE, SECRET
from cowfence.crash.runner import EngineSubject
from cowfence.crash.workloads import all_images, covering_images, two
from cowfence.crash.workloads import walk as random_walk
from cowfence.storage.base import Storage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import Done, Note
from judges import run

WANTED = int(os.environ.get("COWFENCE_QEMU_STATES", "60"))
SMALL = [image for image in all_images() if image.cluster_bytes == 512 and not image.cold]


def sample(model: Model, seed: int) -> Iterator[tuple[Case, str, dict[str, bytes]]]:
    """States of walks and of short sequences, a few of each; and each state at which a flush has just returned."""
    rng = random.Random(seed)
    covering = covering_images(SMALL)
    short = itertools.islice(two(rng.sample(covering, len(covering))), None, None, 37)
    for number in itertools.count():
        case = random_walk(seed + number, 12) if number % 2 else next(short, random_walk(seed + number, 12))
        if case.image.short_l1:
            continue  # QEMU opens no image whose L1 table is shorter than its disk.
        recording = record(case)
        device = device_of(model, recording, limit=64, seed=seed)
        for position, entry in enumerate(recording.entries):
            if isinstance(entry, Done):
                operation = recording.entries[entry.position]
                assert not isinstance(operation, Done | Note)
                list(device.done(position, entry.position, operation, failed=entry.failed))
            elif isinstance(entry, Note):
                of = entry.fields.get("of")
                begun = recording.entries[of] if entry.event == "end" and isinstance(of, int) else None
                if isinstance(begun, Note) and begun.event == "flush.begin" and rng.random() < 0.3:
                    yield case, "a flush has returned", next(iter(device.settle())).contents()
            else:
                for state in device.issue(position, entry):
                    if rng.random() < 0.01:
                        yield case, entry.mark, state.contents()


def read_by_us(case: Case, contents: Mapping[str, bytes]) -> bytes:
    files: dict[str, Storage] = {name: MemoryStorage(content, name=name, writable=False) for name, content in contents.items()}
    disk = EngineSubject(case.image).open(files, writable=False)
    return disk.read(0, disk.size)


@pytest.mark.parametrize("model", ["kill", "power"])
def test_qemu_agrees(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(SECRET)
    path, raw = tmp_path / IMAGE, tmp_path / "raw"
    flushes = 0
    for case, after, contents in itertools.islice(sample(model, 7), WANTED // 2):
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        seen = ["-f", "qcow2", str(path)]
        if case.image.encrypted:
            key = "driver=qcow2,encrypt.key-secret=s,file.filename="
            seen = ["--object", "secret,id=s,file=secret", "--image-opts", f"{key}{path}"]
        told = f"{case}: after {after}"
        flushes += after == "a flush has returned"
        done = run(["qemu-img", "check", *seen], check=False)
        assert done.returncode in (0, 3), f"{told}: {done.stdout}{done.stderr}"
        run(["qemu-img", "convert", "-O", "raw", *seen, str(raw)])
        assert raw.read_bytes() == read_by_us(case, contents), told
    assert flushes
