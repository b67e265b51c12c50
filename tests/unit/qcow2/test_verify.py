"""Verify: every kind of damage, planted by hand, is found and graded; nothing is written; hostile images end in findings."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest

from cowfence.errors import CowfenceError, Unsupported
from cowfence.qcow2.entries import COMPRESSED, COPIED, ZERO, Compressed, encode_l2
from cowfence.qcow2.findings import KEPT_FINDINGS, Finding, Grade, Problem, Report
from cowfence.qcow2.geometry import HostOffset
from cowfence.qcow2.verify import verify
from cowfence.storage.base import Buffer
from cowfence.storage.memory import MemoryStorage
from helpers_check import Scalpel, new_image


class NeverWritten(MemoryStorage):
    """A storage on which any change or fence fails the test."""

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        raise AssertionError(f"verify wrote at {offset} ({mark}, {len(buffers)} buffers)")

    def truncate(self, size_bytes: int, mark: str) -> None:
        raise AssertionError(f"verify truncated to {size_bytes} ({mark})")

    def discard(self, offset: int, length_bytes: int, mark: str) -> None:
        raise AssertionError(f"verify discarded {offset}+{length_bytes} ({mark})")

    def fence(self, mark: str) -> None:
        raise AssertionError(f"verify fenced ({mark})")


def found(image: Scalpel) -> Report:
    return verify(NeverWritten(bytes(image.data), writable=True))


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, [str(finding) for finding in report.findings]
    assert sum(report.totals.values()) == 1
    return report.findings[0]


@pytest.fixture
def image() -> Scalpel:
    return Scalpel(new_image())


def kinds(report: Report) -> dict[tuple[str, str], int]:
    return {(problem.value, grade.value): total for (problem, grade), total in report.totals.items()}


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536])
def test_a_good_image_is_clean(cluster_bytes: int, refcount_bits: int) -> None:
    report = verify(NeverWritten(new_image(cluster_bytes=cluster_bytes, refcount_bits=refcount_bits, size_bytes=3 << 20)))
    assert report.clean
    assert report.complete
    assert report.refcounts_sound
    assert (report.total_clusters, report.allocated_clusters) == ((3 << 20) // cluster_bytes, 12)
    assert report.fragmented_clusters == report.compressed_clusters == 0


def test_an_empty_image_and_version_2_are_clean() -> None:
    for image in (new_image(writes=0), new_image(version=2), new_image(size_bytes=0, writes=0)):
        assert verify(NeverWritten(image)).clean


def test_a_snapshot_counts_each_reference(image: Scalpel) -> None:
    image.add_snapshot()
    report = found(image)
    assert report.clean
    assert report.allocated_clusters == 12


def test_refcount_too_low(image: Scalpel) -> None:
    cluster = image.cluster_of(image.l2_at(0, 4))
    image.set_count(cluster, 0)
    report = found(image)
    low = report.findings[0]
    assert (low.problem, low.grade) == (Problem.REFCOUNT_TOO_LOW, Grade.FATAL)
    assert (low.cluster, low.stored, low.references) == (cluster, 0, 1)
    assert low.where == f"cluster {cluster} at offset {cluster * 512:#x}"
    assert low.what == "its stored refcount is 0, but it has 1 references"
    # The flag does not agree with the stored count either; the data has one owner, so that alone is harmless.
    flag = report.findings[1]
    assert (flag.problem, flag.grade, flag.where) == (Problem.COPIED_SET, Grade.HARMLESS, "L2[0][4]")
    assert not report.refcounts_sound


def test_refcount_too_high_is_a_leak_and_its_flag_harmless(image: Scalpel) -> None:
    cluster = image.cluster_of(image.l2_at(0, 4))
    image.set_count(cluster, 3)
    report = found(image)
    assert kinds(report) == {("refcount-too-high", "leak"): 1, ("copied-set", "harmless"): 1}
    assert (report.fatal, report.harmless, report.leaks, report.corruptions) == (0, 1, 1, 1)
    assert report.refcounts_sound


def test_a_leak_without_references(image: Scalpel) -> None:
    cluster = image.append(1)
    finding = only(found(image))
    assert (finding.problem, finding.grade, finding.cluster) == (Problem.REFCOUNT_TOO_HIGH, Grade.LEAK, cluster)
    assert (finding.stored, finding.references) == (1, 0)


def test_copied_on_a_shared_cluster_is_fatal(image: Scalpel) -> None:
    image.add_snapshot()
    at = image.l2_at(0, 4)
    image.put(at, image.word(at) | COPIED)
    finding = only(found(image))
    assert (finding.problem, finding.grade, finding.where) == (Problem.COPIED_SET, Grade.FATAL, "L2[0][4]")
    assert (finding.stored, finding.references) == (2, 2)


def test_copied_on_a_shared_table_is_fatal(image: Scalpel) -> None:
    image.add_snapshot()
    image.put(image.l1_at(0), image.word(image.l1_at(0)) | COPIED)
    finding = only(found(image))
    assert (finding.problem, finding.grade, finding.where) == (Problem.COPIED_SET, Grade.FATAL, "L1[0]")


def test_copied_clear_is_harmless_in_active_tables_only(image: Scalpel) -> None:
    l1 = image.add_snapshot()
    # The active disk lets go of everything: what is left belongs to the snapshot, whose flags mean nothing.
    for index in range(image.header.l1_entries):
        image.put(image.l1_at(index), 0)
    for cluster in range(len(image.data) // 512):
        if image.count(cluster) == 2:
            image.set_count(cluster, 1)
    assert image.word(l1 * 512)
    assert found(image).clean


def test_copied_clear(image: Scalpel) -> None:
    for at in (image.l2_at(0, 4), image.l1_at(0)):
        image.put(at, image.word(at) & ~COPIED)
    report = found(image)
    assert kinds(report) == {("copied-clear", "harmless"): 2}
    assert {finding.where for finding in report.findings} == {"L1[0]", "L2[0][4]"}


def test_reserved_bits(image: Scalpel) -> None:
    for at, bit in ((image.l2_at(0, 4), 1 << 3), (image.l2_at(0, 6), 1 << 60), (image.l1_at(0), 1 << 57)):
        image.put(at, image.word(at) | bit)
    report = found(image)
    assert kinds(report) == {("reserved-bits", "fatal"): 3}
    assert {finding.where for finding in report.findings} == {"L1[0]", "L2[0][4]", "L2[0][6]"}
    assert report.complete


def test_reserved_bits_of_the_refcount_table(image: Scalpel) -> None:
    image.put(image.table_at(0), image.word(image.table_at(0)) | 1)
    report = found(image)
    assert report.findings[0].where == "refcount table[0]"
    assert report.findings[0].problem is Problem.RESERVED_BITS
    assert not report.refcounts_sound


def test_zero_flag_in_version_2() -> None:
    image = Scalpel(new_image(version=2))
    at = image.l2_at(0, 4)
    image.put(at, image.word(at) | ZERO)
    finding = only(found(image))
    assert (finding.problem, finding.grade, finding.where) == (Problem.ZERO_FLAG, Grade.FATAL, "L2[0][4]")


def test_zero_clusters_of_version_3(image: Scalpel) -> None:
    at = image.l2_at(0, 4)
    image.put(at, image.word(at) | ZERO)
    image.put(image.l2_at(0, 5), ZERO)
    report = found(image)
    assert report.clean
    assert report.allocated_clusters == 12


def test_copied_without_a_cluster(image: Scalpel) -> None:
    image.put(image.l2_at(0, 5), COPIED)
    image.put(image.l2_at(0, 7), COPIED | ZERO)
    image.put(image.l1_at(1), COPIED)
    report = found(image)
    assert kinds(report) == {("copied-without-cluster", "fatal"): 3}
    assert {finding.where for finding in report.findings} == {"L1[1]", "L2[0][5]", "L2[0][7]"}


def test_misaligned_offsets() -> None:
    image = Scalpel(new_image(cluster_bytes=4096, size_bytes=4 << 20))
    at = image.l2_at(0, 4)
    image.put(at, (image.word(at) & ~COPIED) + 512)
    report = found(image)
    assert report.findings[-1].where == "L2[0][4]"
    misaligned = next(finding for finding in report.findings if finding.problem is Problem.MISALIGNED)
    assert (misaligned.grade, misaligned.where) == (Grade.FATAL, "L2[0][4]")
    image = Scalpel(new_image(cluster_bytes=4096, size_bytes=4 << 20))
    image.put(image.l1_at(1), image.word(image.l1_at(0)) + 512)
    image.put(image.table_at(1), 4096 + 512)
    report = found(image)
    wheres = {finding.where for finding in report.findings if finding.problem is Problem.MISALIGNED}
    assert wheres == {"L1[1]", "refcount table[1]"}
    assert not report.complete
    assert not report.refcounts_sound


def test_past_the_end(image: Scalpel) -> None:
    end = len(image.data)
    image.put(image.l2_at(0, 5), end)
    image.put(image.l1_at(1), end + 512)
    image.put(image.table_at(1), 1 << 40)
    image.put(image.l2_at(0, 7), encode_l2(Compressed(HostOffset(end + 100), 200), image.header.geometry))
    report = found(image)
    wheres = {finding.where for finding in report.findings if finding.problem is Problem.PAST_END}
    assert wheres == {"L2[0][5]", "L2[0][7]", "L1[1]", "refcount table[1]"}
    assert not report.complete


def test_the_last_cluster_may_be_short(image: Scalpel) -> None:
    image.put(image.l2_at(0, 5), (image.append(1) * 512) | COPIED)
    del image.data[-500:]
    assert found(image).clean


def test_overlaps(image: Scalpel) -> None:
    l2 = image.cluster_of(image.l1_at(0))
    image.put(image.l2_at(0, 5), l2 * 512)
    image.put(image.l1_at(0), image.word(image.l1_at(0)) & ~COPIED)
    image.set_count(l2, 2)
    finding = only(found(image))
    assert (finding.problem, finding.grade) == (Problem.OVERLAP, Grade.FATAL)
    assert finding.where == f"L2 table on cluster {l2} at offset {l2 * 512:#x}"


@pytest.mark.parametrize("target", ["header", "L1 table", "refcount table", "refcount block"])
def test_data_on_a_structure(image: Scalpel, target: str) -> None:
    header = image.header
    offset = {
        "header": 0,
        "L1 table": int(header.l1_offset),
        "refcount table": int(header.refcount_table_offset),
        "refcount block": image.word(image.table_at(0)),
    }[target]
    compressed = encode_l2(Compressed(HostOffset(offset), 100), header.geometry)
    image.put(image.l2_at(0, 5), compressed)
    image.set_count(offset // 512, 2)
    finding = only(found(image))
    assert (finding.problem, finding.grade, finding.cluster) == (Problem.OVERLAP, Grade.FATAL, offset // 512)
    assert finding.where.startswith(f"{target} on cluster")
    image.set_count(offset // 512, 1)
    report = found(image)
    assert (Problem.REFCOUNT_TOO_LOW, Grade.FATAL) in report.totals
    assert report.refcounts_sound is False


def test_compressed_clusters_count_each_host_cluster(image: Scalpel) -> None:
    first = image.append(2)
    geometry = image.header.geometry
    # Two streams: one across both clusters, one in the second only.
    image.put(image.l2_at(0, 5), encode_l2(Compressed(HostOffset(first * 512 + 300), 400), geometry))
    image.put(image.l2_at(0, 7), encode_l2(Compressed(HostOffset(first * 512 + 700), 100), geometry))
    image.set_count(first + 1, 2)
    report = found(image)
    assert report.clean
    assert (report.allocated_clusters, report.compressed_clusters, report.fragmented_clusters) == (14, 2, 2)
    image.put(image.l2_at(0, 7), image.word(image.l2_at(0, 7)) | COPIED)
    finding = only(found(image))
    assert (finding.problem, finding.where) == (Problem.COPIED_ON_COMPRESSED, "L2[0][7]")


def test_a_snapshot_table_that_cannot_be_read_hides_references(image: Scalpel) -> None:
    image.add_snapshot()
    table = int(image.header.snapshots_offset)
    image.data[table + 36 : table + 40] = (5000).to_bytes(4)
    report = found(image)
    assert (Problem.SNAPSHOT_TABLE, Grade.FATAL) in report.totals
    assert not report.complete


def test_findings_in_snapshots_name_them(image: Scalpel) -> None:
    l1 = image.add_snapshot()
    image.put(l1 * 512 + 8, 1 << 57)
    assert only(found(image)).where == "snapshot '1': L1[1]"


def test_an_external_data_file_is_not_counted(image: Scalpel) -> None:
    image.set_features(4)
    report = found(image)
    assert report.leaks == 12
    assert report.corruptions == 0
    image.put(image.l2_at(0, 5), encode_l2(Compressed(HostOffset(512), 100), image.header.geometry))
    image.put(image.l2_at(0, 4), image.word(image.l2_at(0, 4)) & ~COPIED)
    assert kinds(found(image)) == {
        ("refcount-too-high", "leak"): 12,
        ("data-file", "fatal"): 1,
        ("copied-clear", "harmless"): 1,
    }


def test_unknown_features_are_refused_by_name(image: Scalpel) -> None:
    image.set_features(1 << 40)
    with pytest.raises(Unsupported, match="feature bit 40"):
        found(image)


def test_fragmentation_is_counted_within_a_table(image: Scalpel) -> None:
    a, b = image.l2_at(0, 4), image.l2_at(0, 6)
    one, other = image.word(a), image.word(b)
    image.put(a, other)
    image.put(b, one)
    report = found(image)
    assert report.clean
    assert report.fragmented_clusters == 3


def test_few_findings_are_kept_and_all_are_counted() -> None:
    image = Scalpel(new_image(cluster_bytes=65536, size_bytes=1 << 30, writes=1))
    for index in range(4096, 8192):
        image.put(image.l2_at(0, index), 1 << 55 | index << 16)
    report = found(image)
    assert report.totals[Problem.PAST_END, Grade.FATAL] == 4096
    assert len(report.findings) == KEPT_FINDINGS


def test_l2_tables_shared_within_the_active_l1_count_twice(image: Scalpel) -> None:
    image.put(image.l1_at(1), image.word(image.l1_at(0)))
    report = found(image)
    assert report.totals[Problem.REFCOUNT_TOO_LOW, Grade.FATAL] == 13


def test_progress_ends_at_one() -> None:
    seen: list[float] = []
    verify(MemoryStorage(new_image()), progress=seen.append)
    assert seen[-1] == 1.0


def _bigger() -> bytes:
    """More than a MiB: read by pieces, unlike small images."""
    return new_image(cluster_bytes=65536, size_bytes=1 << 30, writes=30)


@pytest.mark.parametrize("make", [new_image, _bigger])
def test_hostile_images_end_in_findings_or_in_our_errors(make: object) -> None:
    assert callable(make)
    clean = make()
    rng = random.Random(20)
    header = Scalpel(clean).header
    ranges = [
        (int(header.l1_offset), 64),
        (int(header.refcount_table_offset), 64),
        (Scalpel(clean).word(int(header.refcount_table_offset)), 256),
        (Scalpel(clean).l2_at(0, 0), 512),
        (0, 112),
    ]
    for _ in range(400):
        image = Scalpel(clean)
        for _ in range(rng.randint(1, 6)):
            start, length = rng.choice(ranges)
            at = start + rng.randrange(length)
            value = rng.choice((0, 0xFF, rng.randrange(256)))
            image.data[at] = value
        if rng.random() < 0.2:
            del image.data[rng.randrange(len(image.data)) :]
        try:
            for finding in verify(NeverWritten(bytes(image.data))).findings:
                assert str(finding)
        except CowfenceError:
            pass


def test_bitmaps_are_counted_while_they_are_consistent(image: Scalpel) -> None:
    directory = image.append(3)
    bits, table, data = 9, directory + 1, directory + 2
    entry = struct.pack(">QIIBBHI", table << bits, 1, 0, 1, 16, 4, 0) + b"bits"
    image.data[directory << bits : (directory << bits) + len(entry)] = entry
    image.put(table << bits, data << bits)
    # In place of the feature names, which fill a cluster of 512 bytes.
    extension = struct.pack(">IIIIQQII", 0x23852875, 24, 1, 0, 32, directory << bits, 0, 0)
    image.data[112 : 112 + len(extension)] = extension
    assert found(image).leaks == 3
    image.put(88, 1)
    assert found(image).clean
    image.put(table << bits, data << bits | 2)
    assert kinds(found(image)) == {("reserved-bits", "fatal"): 1, ("refcount-too-high", "leak"): 1}
    image.put(table << bits, 1 << 50)
    assert found(image).findings[0].where == "bitmap 'bits'[0]"
    image.data[(directory << bits) + 18 : (directory << bits) + 20] = b"\xff\xff"
    report = found(image)
    assert (Problem.BITMAP_DIRECTORY, Grade.FATAL) in report.totals
    assert not report.complete


def test_extended_l2_bitmaps() -> None:
    # Made from a plain image whose only table is empty: its entries are 16 bytes then.
    image = Scalpel(new_image(cluster_bytes=16384, size_bytes=1 << 20, writes=1))
    cluster = image.cluster_of(image.l2_at(0, 0))
    image.set_features(16)
    image.put(image.l2_at(0, 0) + 8, (1 << 32) - 1)
    assert found(image).clean
    image.put(image.l2_at(0, 0) + 8, 1 | 1 << 32)
    finding = only(found(image))
    assert (finding.problem, finding.where) == (Problem.SUBCLUSTERS, "L2[0][0]")
    image.put(image.l2_at(0, 0) + 8, 1)
    image.put(image.l2_at(0, 3) + 8, 1)
    image.put(image.l2_at(0, 5), COMPRESSED | cluster << 14)
    image.put(image.l2_at(0, 5) + 8, 1 << 63)
    image.set_count(cluster, 2)
    image.put(image.l2_at(0, 0), cluster << 14)
    assert kinds(found(image)) == {("subclusters", "fatal"): 2}
    image.put(image.l2_at(0, 0), cluster << 14 | ZERO)
    assert (Problem.ZERO_FLAG, Grade.FATAL) in found(image).totals
