"""Batches whose data goes out while others have the image's lock: whatever fits into one of their calls, in each."""

from __future__ import annotations

import pytest

from cowfence.crash.cases import Case, record, walk
from cowfence.crash.images import ImageSpec, disk_bytes
from cowfence.crash.operations import Step
from cowfence.crash.workloads import FLUSH, all_images, covering_images
from cowfence.qcow2.batch import BatchWrites

IMAGES = covering_images([image for image in all_images() if image.cluster_bytes == 512])
FREE = 40 * 512


def _cases(image: ImageSpec, *, again: bool = False) -> list[Case]:
    """A batch into new clusters, or once more and in place, with one step inside of each of its calls; then what was written is
    changed and flushed."""
    elsewhere = disk_bytes(image) // 1024 * 512
    batch = Step("write_batch", FREE, 4 * 512)
    before = (
        Step("write", FREE + 30 * 512, 512),
        Step("write", elsewhere, 512),
        *((batch,) if again else ()),
        FLUSH,
        Step("read", FREE, 512),
    )
    script = (*before, batch, Step("write", FREE, 512), FLUSH)
    inner = [
        Step("write", FREE + 512, 512),
        Step("zero", FREE, 1024),
        Step("discard", FREE + 512, 1024),
        Step("read", elsewhere, 512),
        Step("write", elsewhere + 512, 512),
    ]
    first, end = (record(Case(image, script[: len(before) + more])).calls for more in (0, 1))
    return [Case(image, script, ((number, step),)) for number in range(first, end) for step in inner]


@pytest.mark.parametrize("again", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize(("first", "image"), list(enumerate(IMAGES)), ids=str)
def test_inside_of_a_long_batch(first: int, image: ImageSpec, again: bool) -> None:
    """A sample; the walks of ``make crash`` have such batches, too."""
    for number, case in enumerate(_cases(image, again=again)[first % 15 :: 15]):
        recording = record(case)
        found = walk(case, recording, "kill" if number % 2 else "power", limit=16).violations
        assert not found, f"{case}: {found[0]}"


def test_the_cases_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary: what enters as it was planned, although its table is not the one in memory any more, is lost."""
    monkeypatch.setattr(BatchWrites, "_holds", lambda self, written: True)  # noqa: ARG005
    for image in IMAGES:
        if image.cache > 1:
            continue
        for case in _cases(image):
            try:
                recording = record(case)
            except Exception:
                return
            if walk(case, recording, "kill", limit=16).violations:
                return
    pytest.fail("no case caught it")
