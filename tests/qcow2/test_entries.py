"""Table entries: every word decodes and encodes back to itself, or is refused with a reason."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.qcow2.entries import (
    COMPRESSED,
    COPIED,
    UNALLOCATED,
    ZERO,
    ZERO_PLAIN,
    BadEntry,
    Compressed,
    Data,
    L1Entry,
    Mapping,
    Subclustered,
    Zero,
    decode_l1,
    decode_l2,
    decode_refcount_table_entry,
    encode_l1,
    encode_l2,
    encode_refcount_table_entry,
    zeroed,
)
from cowfence.qcow2.geometry import Geometry, HostOffset

GEOMETRIES = [Geometry(9, 0), Geometry(12, 6), Geometry(16), Geometry(16, version=2), Geometry(21)]
geometries = st.sampled_from(GEOMETRIES)
words = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(
        lambda cluster, flags: cluster << 21 | flags, st.integers(0, 2**35 - 1), st.sampled_from([0, 1, COPIED, COPIED | 1])
    ),
    st.builds(lambda low: COMPRESSED | low, st.integers(0, 2**62 - 1)),
)


@given(words, geometries)
def test_l2_words_come_back_or_are_refused(word: int, geometry: Geometry) -> None:
    try:
        mapping = decode_l2(word, geometry)
    except BadEntry:
        return
    assert encode_l2(mapping, geometry) == word


EXTENDED = [Geometry(14, extended_l2=True), Geometry(16, extended_l2=True), Geometry(21, 6, extended_l2=True)]
bitmaps = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.builds(lambda a, b: (a & ~b) << 32 | b, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.sampled_from([2**32 - 1, (2**32 - 1) << 32]),
)


@given(words, bitmaps, st.sampled_from(EXTENDED))
def test_extended_entries_come_back_or_are_refused(word: int, bitmap: int, geometry: Geometry) -> None:
    try:
        mapping = decode_l2(bitmap << 64 | word, geometry)
    except BadEntry:
        return
    expected = word if isinstance(mapping, Compressed) else bitmap << 64 | word
    assert encode_l2(mapping, geometry) == expected


@given(st.data(), st.sampled_from(EXTENDED))
def test_subclusters_come_back(data: st.DataObject, geometry: Geometry) -> None:
    host_offset = HostOffset(data.draw(st.integers(1, (1 << 56 - geometry.cluster_bits) - 1)) << geometry.cluster_bits)
    zero = data.draw(st.integers(0, 2**32 - 2))
    allocated = data.draw(st.integers(0, 2**32 - 2)) & ~zero
    copied = data.draw(st.booleans())
    mappings: list[Mapping] = [Subclustered(host_offset, copied, allocated, zero), Data(host_offset, copied)]
    mappings += [Zero(host_offset, copied), ZERO_PLAIN, UNALLOCATED, Subclustered(None, False, 0, zero or 1)]
    for mapping in mappings:
        assert decode_l2(encode_l2(mapping, geometry), geometry) == mapping
        assert zeroed(encode_l2(mapping, geometry), geometry) == encode_l2(
            Zero(getattr(mapping, "host_offset", None), getattr(mapping, "copied", False)), geometry
        )


@pytest.mark.parametrize(
    ("word", "bitmap", "what"),
    [
        (0x10000, 1 << 32 | 1, "allocated and read as zeros"),
        (0, 1, "without a host offset"),
        (COPIED, 1 << 40, "without a host offset"),
        (0x10000 | 2, 1, "reserved bits"),
        (0x10200, 1, "not aligned"),
    ],
)
def test_bad_extended_entries_are_named(word: int, bitmap: int, what: str) -> None:
    with pytest.raises(BadEntry, match=what):
        decode_l2(bitmap << 64 | word, Geometry(16, extended_l2=True))


@given(words, geometries)
def test_l1_and_refcount_table_words_come_back_or_are_refused(word: int, geometry: Geometry) -> None:
    with contextlib.suppress(BadEntry):
        assert encode_l1(decode_l1(word, geometry), geometry) == word
    with contextlib.suppress(BadEntry):
        assert encode_refcount_table_entry(decode_refcount_table_entry(word, geometry), geometry) == word


@given(st.data(), geometries)
def test_mappings_come_back(data: st.DataObject, geometry: Geometry) -> None:
    cluster = data.draw(st.integers(1, (1 << 56 - geometry.cluster_bits) - 1))
    host_offset = HostOffset(cluster << geometry.cluster_bits)
    copied = data.draw(st.booleans())
    mappings: list[Mapping] = [UNALLOCATED, Data(host_offset, copied)]
    if geometry.version >= 3:
        mappings += [Zero(host_offset, copied), ZERO_PLAIN]
    for mapping in mappings:
        assert decode_l2(encode_l2(mapping, geometry), geometry) == mapping


@given(st.data(), geometries)
def test_compressed_length_covers_the_stream_to_its_last_sector(data: st.DataObject, geometry: Geometry) -> None:
    host_offset = HostOffset(data.draw(st.integers(0, min(geometry.compressed_offset_mask, 2**56 - 1))))
    length_bytes = data.draw(st.integers(1, geometry.cluster_bytes))
    decoded = decode_l2(encode_l2(Compressed(host_offset, length_bytes), geometry), geometry)
    assert isinstance(decoded, Compressed)
    assert decoded.host_offset == host_offset
    assert length_bytes <= decoded.length_bytes < length_bytes + 512
    assert (host_offset + decoded.length_bytes) % 512 == 0


def test_compressed_descriptor_by_hand() -> None:
    # 64 KiB clusters: x = 62 - 8 = 54. Offset 0x50123 with 2 more sectors: 3 * 512 less the 0x123 bytes before it.
    word = 1 << 62 | 2 << 54 | 0x50123
    assert decode_l2(word, Geometry(16)) == Compressed(HostOffset(0x50123), 3 * 512 - 0x123)


@pytest.mark.parametrize(
    ("word", "geometry", "what"),
    [
        (0x10000 | 2, Geometry(16), "reserved bits"),
        (0x10000 | 1 << 8, Geometry(16), "reserved bits"),
        (0x10000 | 1 << 56, Geometry(16), "reserved bits"),
        (0x10000 | 1 << 61, Geometry(16), "reserved bits"),
        (0x10200, Geometry(16), "not aligned"),
        (0x10000 | ZERO, Geometry(16, version=2), "version 2"),
        (0x10000 | ZERO, Geometry(16, extended_l2=True), "extended"),
        (COPIED, Geometry(16), "without a host offset"),
        (COPIED | ZERO, Geometry(16), "without a host offset"),
        (COMPRESSED | COPIED | 0x10000, Geometry(16), "COPIED"),
        (COMPRESSED | 1 << 56, Geometry(9), "beyond"),
    ],
)
def test_bad_l2_entries_are_named(word: int, geometry: Geometry, what: str) -> None:
    with pytest.raises(BadEntry, match=what):
        decode_l2(word, geometry)


@pytest.mark.parametrize("word", [0x10000 | 1, 0x10000 | 1 << 56, 0x10000 | 1 << 62, 0x10200, COPIED])
def test_bad_l1_entries_are_refused(word: int) -> None:
    with pytest.raises(BadEntry):
        decode_l1(word, Geometry(16))


@pytest.mark.parametrize("word", [0x10000 | 1, 0x10200, 1 << 56, COPIED | 0x10000])
def test_bad_refcount_table_entries_are_refused(word: int) -> None:
    with pytest.raises(BadEntry):
        decode_refcount_table_entry(word, Geometry(16))


@pytest.mark.parametrize(
    "mapping",
    [
        Data(HostOffset(0), True),
        Data(HostOffset(0x10200), True),
        Data(HostOffset(1 << 56), True),
        Zero(None, True),
        Zero(HostOffset(0), False),
        Compressed(HostOffset(0x10000), 0),
        Compressed(HostOffset(1 << 54), 1),
        Compressed(HostOffset(0x10000), 256 * 512 + 1),
    ],
)
def test_values_without_an_entry_are_refused(mapping: Mapping) -> None:
    with pytest.raises(BadEntry):
        encode_l2(mapping, Geometry(16))


def test_l1_values_without_an_entry_are_refused() -> None:
    with pytest.raises(BadEntry):
        encode_l1(L1Entry(None, True), Geometry(16))
    with pytest.raises(BadEntry):
        encode_l1(L1Entry(HostOffset(512), False), Geometry(16))
