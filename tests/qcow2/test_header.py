"""The header: round trips, the limits one by one, hostile bytes, and QEMU's own headers."""

from __future__ import annotations

import dataclasses
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfence.errors import Corrupt, NotThisFormat, Unsupported
from cowfence.qcow2.extensions import (
    BitmapsPointer,
    EncryptionPointer,
    FeatureName,
    encode_bitmaps,
    encode_encryption,
    encode_feature_names,
)
from cowfence.qcow2.geometry import HostOffset
from cowfence.qcow2.header import (
    Autoclear,
    Compatible,
    Extension,
    ExtensionType,
    Header,
    Incompatible,
    check_bounds,
    check_overlaps,
    check_supported,
    default_feature_names,
    encode,
    feature_bits_patch,
    l1_patch,
    parse_header,
    refcount_table_patch,
    size_patch,
    snapshots_patch,
)

BASE = Header(
    version=3,
    cluster_bits=16,
    size_bytes=1 << 30,
    l1_entries=2,
    l1_offset=HostOffset(0x30000),
    refcount_table_offset=HostOffset(0x10000),
    refcount_table_clusters=1,
    extensions=(default_feature_names(),),
)
V2 = dataclasses.replace(BASE, version=2, header_length=72, additional=b"", extensions=())

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is the judge here")


def with_bytes(at: int, data: bytes, header: Header = BASE) -> bytes:
    raw = bytearray(encode(header).ljust(header.cluster_bytes, b"\0"))
    raw[at : at + len(data)] = data
    return bytes(raw)


extension_lists = st.lists(
    st.builds(Extension, st.integers(0x100, 0xFFFF), st.binary(max_size=80)),
    max_size=6,
    unique_by=lambda extension: extension.type,
)
headers = st.builds(
    lambda bits, order, size, l1, extra, extensions, backing, snapshots, features: dataclasses.replace(
        BASE,
        cluster_bits=bits,
        refcount_order=order,
        size_bytes=size,
        l1_entries=max(l1, -(-size // (1 << 2 * bits - 3))),
        header_length=112 + len(extra) * 8,
        additional=bytes(7) + b"".join(extra),
        extensions=tuple(extensions),
        backing_name=backing,
        snapshot_count=snapshots,
        snapshots_offset=HostOffset(snapshots << 21),
        compatible=features,
    ),
    st.integers(11, 21),
    st.integers(0, 6),
    st.integers(0, 1 << 37),
    st.integers(0, 100),
    st.lists(st.binary(min_size=8, max_size=8), max_size=4),
    extension_lists,
    st.none() | st.binary(min_size=1, max_size=1023).filter(bool),
    st.integers(0, 65536),
    st.integers(0, 2**64 - 1),
).map(lambda header: dataclasses.replace(header, l1_offset=HostOffset(1 << 22), refcount_table_offset=HostOffset(1 << 21)))


@given(headers)
def test_headers_come_back(header: Header) -> None:
    raw = encode(header)
    parsed = parse_header(raw, "image")
    assert dataclasses.replace(parsed, backing_offset=0) == header
    assert encode(parsed) == raw
    padded = raw.ljust(header.cluster_bytes + 512, b"\0")
    assert parse_header(padded, "image") == parsed


def test_version_2_header_is_72_bytes_and_comes_back() -> None:
    raw = encode(V2)
    assert len(raw) == 72 + 8
    assert parse_header(raw, "image") == V2
    backed = dataclasses.replace(V2, backing_name=b"base.img", backing_offset=72)
    assert parse_header(encode(backed), "image") == backed


def test_area_full_to_its_last_byte_needs_no_end() -> None:
    header = dataclasses.replace(BASE, backing_name=b"b", backing_offset=112 + 8 + 3, extensions=(Extension(0x1234, b"abc"),))
    raw = encode(header)
    assert raw.endswith(b"abcb")
    assert parse_header(raw, "image") == header


def test_512_byte_clusters_hold_the_feature_names_and_nothing_else() -> None:
    header = dataclasses.replace(BASE, cluster_bits=9, size_bytes=32768, l1_entries=1)
    raw = encode(header)
    assert len(raw) == 512
    assert parse_header(raw, "image") == header


@given(st.data())
def test_any_bytes_parse_or_are_refused(data: st.DataObject) -> None:
    raw = bytearray(encode(data.draw(headers)))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw)
    try:
        header = parse_header(cut, "image")
        check_supported(header, "image")
        check_bounds(header, 1 << 40, "image")
        check_overlaps(header, "image")
    except (NotThisFormat, Corrupt, Unsupported):
        return
    assert parse_header(encode(header), "image") == header


u32, u64 = struct.Struct(">I").pack, struct.Struct(">Q").pack


@pytest.mark.parametrize(
    ("at", "data", "what"),
    [
        (8, u64(64), "backing_file_offset"),
        (8, u64(65530) + u32(10), "backing_file_offset"),
        (8, u64(1 << 63) + u32(10), "backing_file_offset"),
        (8, u64(600) + u32(1024), "backing_file_size"),
        (8, u64(600) + u32(0), "backing_file_size"),
        (20, u32(8), "cluster_bits"),
        (20, u32(22), "cluster_bits"),
        (20, u32(0xFFFFFFFF), "cluster_bits"),
        (24, u64(1 << 63), "l1_size"),
        (36, u32(0xFFFFFFFF), "l1_size"),
        (36, u32(32 * 1024 * 1024 // 8 + 1), "l1_size"),
        (40, u64(0x30200), "l1_table_offset"),
        (40, u64(1 << 56), "l1_table_offset"),
        (48, u64(0x10001), "refcount_table_offset"),
        (48, u64(1 << 63), "refcount_table_offset"),
        (56, u32(129), "refcount_table_clusters"),
        (56, u32(0xFFFFFFFF), "refcount_table_clusters"),
        (60, u32(65537), "nb_snapshots"),
        (60, u32(1) + u64(0x30001), "snapshots_offset"),
        (72, u64(8), "compression_type"),
        (88, u64(1), "autoclear_features"),
        (88, u64(2), "autoclear_features"),
        (96, u32(7), "refcount_order"),
        (100, u32(96), "header_length"),
        (100, u32(108), "header_length"),
        (100, u32(65544), "header_length"),
        (104, b"\1", "compression_type"),
        (116, u32(0xFFFFFFFF), "reaches past"),
        (116, u32(65536 - 112 - 8 + 1), "reaches past"),
    ],
)
def test_each_rule_is_checked(at: int, data: bytes, what: str) -> None:
    with pytest.raises(Corrupt, match=what):
        parse_header(with_bytes(at, data), "image")


def test_extended_l2_needs_large_clusters() -> None:
    small = dataclasses.replace(BASE, cluster_bits=12, size_bytes=0, extensions=())
    with pytest.raises(Corrupt, match="extended"):
        parse_header(with_bytes(72, u64(Incompatible.EXTENDED_L2), small), "image")


@pytest.mark.parametrize("raw", [b"", b"QFI", b"\0" * 512, b"KDMV" + bytes(508)])
def test_other_files_are_not_this_format(raw: bytes) -> None:
    with pytest.raises(NotThisFormat):
        parse_header(raw, "image")


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
def test_other_versions_are_unsupported_by_name(version: int) -> None:
    with pytest.raises(Unsupported, match=f"version {version}"):
        parse_header(with_bytes(4, u32(version)), "image")


@pytest.mark.parametrize("length_bytes", [4, 71, 72, 103, 104, 111])
def test_a_header_that_is_cut_off_is_corrupt(length_bytes: int) -> None:
    with pytest.raises(Corrupt):
        parse_header(encode(BASE)[:length_bytes], "image")


def test_known_extensions_that_stand_twice_must_agree() -> None:
    twice = (Extension(ExtensionType.BACKING_FORMAT, b"raw"), Extension(ExtensionType.BACKING_FORMAT, b"raw"))
    assert parse_header(encode(dataclasses.replace(BASE, extensions=twice)), "image").backing_format == "raw"
    differ = (Extension(ExtensionType.BACKING_FORMAT, b"raw"), Extension(ExtensionType.BACKING_FORMAT, b"qcow2"))
    with pytest.raises(ValueError, match="twice"):
        encode(dataclasses.replace(BASE, extensions=differ))


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"crypt_method": 3}, "encryption method 3"),
        ({"incompatible": Incompatible.COMPRESSION, "compression_type": 9}, "compression type 9"),
        ({"incompatible": 1 << 63}, "bit 63"),
    ],
)
def test_unsupported_features_parse_and_are_refused_by_name(changes: dict[str, int], feature: str) -> None:
    header = parse_header(encode(dataclasses.replace(BASE, **changes)), "image")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=feature):
        check_supported(header, "image")


def test_unknown_features_have_the_name_that_the_image_gives_them() -> None:
    names = encode_feature_names([FeatureName(0, 40, "time\ntravel"), FeatureName(1, 41, "no"), FeatureName(9, 200 % 64, "no")])
    header = parse_header(encode(dataclasses.replace(BASE, incompatible=3 << 40, extensions=(names,))), "image")
    with pytest.raises(Unsupported, match=r"bit 40 \('time\\ntravel'\), incompatible feature bit 41$"):
        check_supported(header, "image")


def test_supported_features_are_let_through() -> None:
    bits = Incompatible.DIRTY | Incompatible.CORRUPT | Incompatible.COMPRESSION
    header = dataclasses.replace(BASE, incompatible=bits, compression_type=1, compatible=Compatible.LAZY_REFCOUNTS)
    check_supported(parse_header(encode(header), "image"), "image")
    check_supported(V2, "image")


def test_pointers_of_extensions() -> None:
    extensions = (encode_bitmaps(BitmapsPointer(2, 64, 0x50000)), encode_encryption(EncryptionPointer(0x60000, 1 << 21)))
    header = dataclasses.replace(BASE, autoclear=Autoclear.BITMAPS, extensions=extensions)
    parsed = parse_header(encode(header), "image")
    assert parsed.bitmaps == BitmapsPointer(2, 64, 0x50000)
    assert parsed.encryption == EncryptionPointer(0x60000, 1 << 21)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">IIQ", 1, 0, 32),
        struct.pack(">IIQQ", 0, 0, 32, 0x50000),
        struct.pack(">IIQQ", 65536, 0, 32, 0x50000),
        struct.pack(">IIQQ", 1, 1, 32, 0x50000),
        struct.pack(">IIQQ", 1, 0, (64 << 20) + 1, 0x50000),
        struct.pack(">IIQQ", 1, 0, 32, 0x50001),
    ],
)
def test_bad_bitmaps_extensions_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        encode(dataclasses.replace(BASE, extensions=(Extension(ExtensionType.BITMAPS, data),)))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"l1_offset": 0}, "inside the header"),
        ({"refcount_table_offset": 0}, "inside the header"),
        ({"l1_offset": 0x50000}, "past the end"),
        ({"refcount_table_clusters": 0}, "no refcount table"),
        ({"snapshot_count": 1}, "inside the header"),
    ],
)
def test_tables_start_inside_the_file(changes: dict[str, int], what: str) -> None:
    check_bounds(BASE, 0x30001, "image")
    with pytest.raises(Corrupt, match=what):
        check_bounds(dataclasses.replace(BASE, **changes), 0x50000, "image")  # type: ignore[arg-type]


def test_tables_do_not_share_clusters() -> None:
    check_overlaps(BASE, "image")
    with pytest.raises(Corrupt, match="refcount table: is at 0x10000, on the L1 table"):
        check_overlaps(dataclasses.replace(BASE, l1_offset=HostOffset(0x10000), refcount_table_offset=HostOffset(0x10000)), "i")
    with pytest.raises(Corrupt, match="L1 table"):
        check_overlaps(dataclasses.replace(BASE, refcount_table_clusters=3), "image")


def test_patches_change_what_they_say_and_stay_inside_the_first_sector() -> None:
    header = BASE
    patches: tuple[tuple[tuple[int, bytes], dict[str, int]], ...] = (
        (size_patch(5 << 20), {"size_bytes": 5 << 20}),
        (l1_patch(HostOffset(0x70000), 9), {"l1_offset": 0x70000, "l1_entries": 9}),
        (refcount_table_patch(HostOffset(0x80000), 2), {"refcount_table_offset": 0x80000, "refcount_table_clusters": 2}),
        (snapshots_patch(HostOffset(0x90000), 3), {"snapshots_offset": 0x90000, "snapshot_count": 3}),
        (
            feature_bits_patch(header, incompatible=1, compatible=1, autoclear=4),
            {"incompatible": 1, "compatible": 1, "autoclear": 4},
        ),
        (feature_bits_patch(header), {}),
    )
    for (offset, data), changes in patches:
        assert offset + len(data) <= 112
        expected = dataclasses.replace(header, **changes)  # type: ignore[arg-type]
        assert parse_header(with_bytes(offset, data, header), "image") == expected
    with pytest.raises(ValueError):
        feature_bits_patch(V2, incompatible=1)


@needs_qemu_img
@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M,lazy_refcounts=on",
        "compression_type=zstd,refcount_bits=1",
        "extended_l2=on",
        "backing_file=base.qcow2,backing_fmt=qcow2",
        "compat=0.10,backing_file=base.qcow2,backing_fmt=qcow2",
    ],
)
def test_headers_of_qemu_come_back(tmp_path: Path, options: str) -> None:
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", "base.qcow2", "3M"], cwd=tmp_path, check=True)
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", "-o", options, "image.qcow2", "3M"], cwd=tmp_path, check=True)
    raw = (tmp_path / "image.qcow2").read_bytes()
    header = parse_header(raw, "image.qcow2")
    encoded = encode(header)
    assert encoded == raw[: len(encoded)]
    assert not any(raw[len(encoded) : header.cluster_bytes])
    assert header.size_bytes == 3 << 20
    if header.version == 3 and header.cluster_bits > 9:  # QEMU leaves the table out where the cluster is one sector
        assert header.extension(ExtensionType.FEATURE_NAMES) == default_feature_names().data
    if "backing" in options:
        assert (header.backing_file, header.backing_format) == ("base.qcow2", "qcow2")
    check_bounds(header, len(raw), "image.qcow2")
    check_overlaps(header, "image.qcow2")
