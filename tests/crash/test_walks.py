"""A sample of every suite and of the random walks; ``make crash`` goes on for as long as it is given."""

from __future__ import annotations

import itertools

import pytest

from cowfence.crash.cases import record, walk
from cowfence.crash.explore import Model
from cowfence.crash.images import ImageSpec
from cowfence.crash.workloads import SUITES, all_images, covering_images
from cowfence.crash.workloads import walk as random_walk
from cowfence.qcow2.allocator import Allocator
from crash.orders import MUTANTS

SMALL = [image for image in all_images() if image.cluster_bytes == 512]

_GUESTS = ("write", "write_batch", "write_fua", "zero", "keep_zero", "discard", "read", "flush", "reopen", "kill", "repair")
"""Operations among which these mistakes are not rare."""


@pytest.mark.parametrize("model", ["kill", "power"])
@pytest.mark.parametrize("seed", range(12))
def test_true_engine_survives_walk(seed: int, model: Model) -> None:
    case = random_walk(seed, 20)
    verdicts = walk(case, record(case), model, limit=32)
    assert not verdicts.violations, f"{case}: {verdicts.violations[0]}"


@pytest.mark.parametrize(("number", "image"), list(enumerate(covering_images())), ids=str)
def test_operations_on_every_option(number: int, image: ImageSpec) -> None:
    """Sequences of one operation, over images in which every two options meet: every so many-th, another by image, so that each
    is tried on some. A cluster of 64 KiB is 128 sectors, and has many states. ``make crash`` tries all."""
    every = {512: 4, 4096: 10, 16384: 25, 65536: 25}[image.cluster_bytes]
    for case in itertools.islice(SUITES["one"]([image]), number % every, None, every):
        recording = record(case)
        for model in ("kill", "power" if image.cluster_bytes == 512 else "power4096"):
            found = walk(case, recording, model, limit=32 if image.cluster_bytes == 512 else 16).violations
            assert not found, f"{case}: {found[0]}"


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("suite", ["two", "three", "interleaved", "faulted", "nested"])
def test_a_sample_of_each_suite(suite: str, part: int) -> None:
    """Every so many-th case; which, differs by part."""
    steps = {"two": 197, "three": 9001, "interleaved": 397, "faulted": 1499, "nested": 151}
    images = covering_images(SMALL)
    cases = itertools.islice(SUITES[suite](images[part::4]), part, None, steps[suite])
    for case in itertools.islice(cases, 8):
        recording = record(case)
        for model in ("kill", "power"):
            found = walk(case, recording, model, limit=64).violations
            assert not found, f"{case}: {found[0]}"


def test_walks_can_fail() -> None:
    """The canary: clusters reused at once must be found by walks too, not only by the case made for them."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "M9 reused at once, discard")
    for seed in range(60):
        case = random_walk(seed, 20, only=_GUESTS)
        with mutant.patch():
            try:
                recording = record(case)
            except Exception:
                continue
        if walk(case, recording, "kill").violations:
            return
    pytest.fail("no walk caught the mutant")


def test_walks_find_a_cluster_that_is_handed_out_before_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of a refcount block while counts go down must not find what is in quarantine."""
    monkeypatch.setattr(Allocator, "hold", lambda self, clusters: None)  # noqa: ARG005
    monkeypatch.setattr(Allocator, "release", _release_everything)
    for seed in range(200):
        case = random_walk(seed, 20, only=_GUESTS)
        try:
            recording = record(case)
        except Exception:
            continue
        if walk(case, recording, "kill", limit=32).violations:
            return
    pytest.fail("no walk caught it")


def _release_everything(self: Allocator, clusters: list[int]) -> None:
    waiting = set(self._to_scan)
    scanned = [cluster for cluster in clusters if cluster // self._geometry.refcounts_per_block not in waiting]
    self._returned.extend(scanned)
    self.free += len(scanned)
