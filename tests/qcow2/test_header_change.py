"""A header changes by one write of sector 0: before it the old header reads as before, after it the new one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cowfence.errors import Unsupported
from cowfence.qcow2.extensions import Extension, ExtensionType, default_feature_names
from cowfence.qcow2.geometry import HostOffset
from cowfence.qcow2.header import Header, encode, parse_header
from cowfence.qcow2.header_change import FILLER_TYPE, plan_header, with_extension

_DATA = {
    ExtensionType.BACKING_FORMAT: st.sampled_from([b"raw", b"qcow2"]),
    ExtensionType.DATA_FILE_NAME: st.binary(min_size=1, max_size=40),
    ExtensionType.BITMAPS: st.integers(1, 9).map(lambda n: bytes([0, 0, 0, n]) + bytes(11) + b"\x40" + bytes(5) + b"\x05\0\0"),
}
_UNKNOWN = st.lists(
    st.builds(Extension, st.integers(0x1000, 0x1005), st.binary(max_size=120)), max_size=2, unique_by=lambda e: e.type
)


@st.composite
def extension_sets(draw: st.DrawFn) -> tuple[Extension, ...]:
    kinds = draw(st.lists(st.sampled_from(list(_DATA)), unique=True))
    found = [Extension(kind, draw(_DATA[kind])) for kind in kinds]
    found += [default_feature_names()] if draw(st.booleans()) else []
    found += draw(_UNKNOWN)
    return tuple(draw(st.permutations(found)))


NAMES = st.one_of(st.none(), st.binary(min_size=1, max_size=300).map(lambda raw: raw.replace(b"\0", b"x")))


def header(cluster_bits: int, extensions: tuple[Extension, ...], name: bytes | None, version: int = 3) -> Header:
    return Header(
        version=version,
        cluster_bits=cluster_bits,
        size_bytes=1 << 20,
        l1_entries=1,
        l1_offset=HostOffset(3 << cluster_bits),
        refcount_table_offset=HostOffset(1 << cluster_bits),
        refcount_table_clusters=1,
        backing_name=name,
        header_length=72 if version == 2 else 112,
        additional=b"" if version == 2 else bytes(7),
        extensions=extensions,
    )


def meaning(found: Header) -> tuple[object, ...]:
    """What two headers must agree on; the feature names serve messages only."""
    ignored = (FILLER_TYPE, ExtensionType.FEATURE_NAMES)
    kept = sorted(extension for extension in found.extensions if extension.type not in ignored)
    return replace(found, extensions=(), backing_offset=0), tuple(kept)


@given(
    st.sampled_from([9, 12, 16]),
    st.lists(st.tuples(extension_sets(), NAMES), min_size=2, max_size=5),
    st.integers(0, 2000),
    st.sampled_from([2, 3]),
)
def test_any_change_is_one_write_of_sector_0(
    cluster_bits: int, versions: list[tuple[tuple[Extension, ...], bytes | None]], gap: int, version: int
) -> None:
    cluster_bytes = 1 << cluster_bits
    extensions, name = versions[0]
    first = header(cluster_bits, extensions, name, version)
    try:
        content = encode(first)
        if name and gap:
            content = encode(replace(first, backing_offset=min(parse_header(content, "x").backing_offset + gap, cluster_bytes)))
    except ValueError:
        assume(False)
    area = bytearray(content.ljust(cluster_bytes, b"\0"))
    for extensions, name in versions[1:]:
        old = parse_header(bytes(area), "x")
        wanted = replace(old, extensions=extensions, backing_name=name, size_bytes=old.size_bytes + 512)
        try:
            plan = plan_header(bytes(area), old, wanted, "x")
        except Unsupported:
            continue
        for offset, data in plan.prepare:
            assert offset >= 512
            area[offset : offset + len(data)] = data
            assert meaning(parse_header(bytes(area), "x")) == meaning(old), "the old header was damaged before the switch"
        assert len(plan.sector) == 512
        area[:512] = plan.sector
        assert meaning(parse_header(bytes(area), "x")) == meaning(wanted)


def test_a_large_cluster_has_always_room() -> None:
    found = header(16, (default_feature_names(),), b"base.qcow2")
    area = bytearray(encode(found).ljust(1 << 16, b"\0"))
    for number in range(50):
        old = parse_header(bytes(area), "x")
        data = bytes([0, 0, 0, 1]) + bytes(11) + b"\x40" + (number * 65536).to_bytes(8)
        wanted = replace(old, extensions=with_extension(old, ExtensionType.BITMAPS, data), backing_name=b"b%d" % number * 9)
        plan = plan_header(bytes(area), old, wanted, "x")
        for offset, put in plan.prepare:
            area[offset : offset + len(put)] = put
        area[:512] = plan.sector
        again = parse_header(bytes(area), "x")
        assert meaning(again) == meaning(wanted)
        assert again.feature_names == found.feature_names


def test_a_cluster_of_one_sector_gives_up_the_feature_names_or_refuses() -> None:
    found = header(9, (default_feature_names(),), None)
    area = encode(found).ljust(512, b"\0")
    data = bytes([0, 0, 0, 1]) + bytes(11) + b"\x40" + (65536).to_bytes(8)
    plan = plan_header(area, found, replace(found, extensions=with_extension(found, ExtensionType.BITMAPS, data)), "x")
    assert plan.prepare == []
    assert parse_header(plan.sector, "x").bitmaps is not None
    with pytest.raises(Unsupported, match="no room"):
        plan_header(area, found, replace(found, backing_name=b"n" * 400), "x")
