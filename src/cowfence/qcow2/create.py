"""A new, empty image: header, refcount table, one refcount block for each range used, L1 table.

Written into a file that nobody can see yet (see ``cowfence.storage.publish``), so the order inside does not matter; the
publisher fences it before it gets its name.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowfence.errors import Invalid
from cowfence.qcow2.entries import BITMAP_SHIFT, COPIED, WORD_MASK, whole, zeroed
from cowfence.qcow2.extensions import (
    Autoclear,
    Compatible,
    EncryptionPointer,
    Extension,
    ExtensionType,
    Incompatible,
    default_feature_names,
    encode_encryption,
)
from cowfence.qcow2.geometry import (
    MAX_BACKING_NAME_BYTES,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_BITS_EXTENDED_L2,
    Geometry,
    HostOffset,
)
from cowfence.qcow2.header import CRYPT_LUKS, CRYPT_NONE, Header, encode
from cowfence.qcow2.tables import RefcountBlock, Table
from cowfence.storage.base import Storage
from cowfence.units import div_up


@dataclass(frozen=True, slots=True)
class NewImage:
    """What a new image shall be. ``size_bytes``: of the guest's disk, a multiple of 512."""

    size_bytes: int
    cluster_bytes: int = 65536
    refcount_bits: int = 16
    version: int = 3
    lazy_refcounts: bool = False
    compression_type: int = 0
    backing_name: str | None = None
    backing_format: str | None = None
    extended_l2: bool = False
    data_file: str | None = None
    """The name of the external data file, as the image stores it."""
    data_file_raw: bool = False
    luks_area: bytes | None = None
    """The LUKS header and its key material, as ``codec.luks`` makes them: the image is encrypted."""
    preallocate_metadata: bool = False
    """Allocate every guest cluster, with its entries; the data stays a hole of the file."""


def geometry_of(wanted: NewImage) -> Geometry:
    """The geometry, or Invalid with the name of the option that is wrong."""
    cluster_bits = wanted.cluster_bytes.bit_length() - 1
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS or wanted.cluster_bytes != 1 << cluster_bits:
        raise Invalid("Cluster size must be a power of two between 512 and 2048k")
    order = wanted.refcount_bits.bit_length() - 1
    if not 0 <= order <= 6 or wanted.refcount_bits != 1 << order:
        raise Invalid("Refcount width must be a power of two and may not exceed 64 bits")
    if wanted.version not in (2, 3):
        raise Invalid("compatibility level must be 0.10 (version 2) or 1.1 (version 3)")
    if wanted.version == 2:
        for wrong, option in (
            (wanted.refcount_bits != 16, "a refcount width other than 16 bits"),
            (wanted.lazy_refcounts, "lazy refcounts"),
            (wanted.compression_type != 0, "a compression type other than zlib"),
            (wanted.extended_l2, "a table of extended L2 entries"),
            (wanted.data_file is not None, "an external data file"),
            (wanted.luks_area is not None, "encryption"),
        ):
            if wrong:
                raise Invalid(f"{option} needs compatibility level 1.1 or above (use compat=1.1)")
    if wanted.extended_l2 and cluster_bits < MIN_CLUSTER_BITS_EXTENDED_L2:
        raise Invalid("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")
    if wanted.data_file_raw and wanted.data_file is None:
        raise Invalid("data_file_raw needs data_file")
    if wanted.data_file_raw and wanted.backing_name is not None:
        raise Invalid("a backing file and data_file_raw cannot be used at the same time")
    return Geometry(cluster_bits, order, wanted.extended_l2, wanted.version, wanted.data_file is not None)


def check_new(wanted: NewImage) -> None:
    """Raises Invalid for an image that cannot be: its options, the size of its disk, or what its header has to hold."""
    geometry = geometry_of(wanted)
    _check_size(geometry, wanted.size_bytes)
    encoded_header(header_of(wanted, geometry, 1, 0, HostOffset(0)))


def _check_size(geometry: Geometry, size_bytes: int) -> None:
    if geometry.l1_entries_for(size_bytes) * 8 > MAX_L1_BYTES:
        raise Invalid("The image size is too large for file format 'qcow2' (try using a larger cluster size)")


def encoded_header(header: Header) -> bytes:
    """The first cluster's content. Raises Invalid for names that do not fit into it."""
    try:
        encoded = encode(header)
    except ValueError as error:
        raise Invalid(str(error)) from None
    if len(encoded) > header.cluster_bytes:
        raise Invalid(f"the header does not fit into a cluster of {header.cluster_bytes} bytes")
    return encoded


def write_new(storage: Storage, wanted: NewImage) -> Header:
    """Write the image into an empty file. Raises Invalid for options that make no image, and the storage's errors."""
    geometry = geometry_of(wanted)
    _check_size(geometry, wanted.size_bytes)
    cluster_bytes = geometry.cluster_bytes
    l1_entries = geometry.l1_entries_for(wanted.size_bytes)
    l1_clusters = geometry.clusters_for(l1_entries * 8)
    guest_clusters = geometry.clusters_for(wanted.size_bytes) if wanted.preallocate_metadata else 0
    l2_tables = l1_entries if wanted.preallocate_metadata else 0
    luks_clusters = geometry.clusters_for(len(wanted.luks_area or b""))
    used = 1 + l1_clusters + luks_clusters + l2_tables + (0 if geometry.external_data else guest_clusters)
    table_clusters, blocks = refcount_shape(geometry, used)
    l1_at = 1 + table_clusters + blocks
    luks_at = l1_at + l1_clusters << geometry.cluster_bits
    l1_offset = HostOffset(l1_at << geometry.cluster_bits)
    header = header_of(wanted, geometry, table_clusters, l1_entries, l1_offset, luks_offset=luks_at)
    encoded = encoded_header(header)
    total = used + table_clusters + blocks
    storage.truncate(total * cluster_bytes, "create.size")
    _write_refcounts(storage, geometry, table_clusters, blocks, total)
    if l2_tables:
        _write_mapping(storage, geometry, wanted, l1_offset, luks_at + (luks_clusters << geometry.cluster_bits), guest_clusters)
    if wanted.luks_area is not None:
        storage.writev(luks_at, [wanted.luks_area], "create.luks")
    storage.writev(0, [encoded], "create.header")
    return header


def refcount_shape(geometry: Geometry, used: int) -> tuple[int, int]:
    """Clusters of the refcount table, and blocks, that count ``used`` clusters and themselves."""
    table_clusters, blocks = 1, 1
    while True:
        total = used + table_clusters + blocks
        need_blocks = div_up(total, geometry.refcounts_per_block)
        need_table = div_up(need_blocks, geometry.table_entries_per_cluster)
        if (need_table, need_blocks) == (table_clusters, blocks):
            return table_clusters, blocks
        table_clusters, blocks = max(need_table, table_clusters), max(need_blocks, blocks)


def header_of(
    wanted: NewImage,
    geometry: Geometry,
    table_clusters: int,
    l1_entries: int,
    l1_offset: HostOffset,
    *,
    luks_offset: int = 0,
) -> Header:
    """The header of a new image whose refcount table stands in the second cluster."""
    extensions: list[Extension] = []
    backing_name = wanted.backing_name.encode("utf-8", "surrogateescape") if wanted.backing_name is not None else None
    if backing_name is not None and not 0 < len(backing_name) <= MAX_BACKING_NAME_BYTES:
        raise Invalid(f"a backing file name has 1 to {MAX_BACKING_NAME_BYTES} bytes")
    if wanted.backing_format is not None:
        extensions.append(Extension(ExtensionType.BACKING_FORMAT, wanted.backing_format.encode()))
    incompatible = 0
    if wanted.compression_type:
        incompatible |= Incompatible.COMPRESSION
    if wanted.extended_l2:
        incompatible |= Incompatible.EXTENDED_L2
    if wanted.data_file is not None:
        incompatible |= Incompatible.DATA_FILE
        extensions.append(Extension(ExtensionType.DATA_FILE_NAME, wanted.data_file.encode("utf-8", "surrogateescape")))
    if wanted.luks_area is not None:
        extensions.append(encode_encryption(EncryptionPointer(luks_offset, len(wanted.luks_area))))
    if wanted.version >= 3:
        names = default_feature_names()
        # The table is optional; a small cluster has no room for it beside the backing file's name.
        if geometry.cluster_bytes >= 4096 or 600 + len(backing_name or b"") <= geometry.cluster_bytes:
            extensions.append(names)
    return Header(
        version=wanted.version,
        cluster_bits=geometry.cluster_bits,
        size_bytes=wanted.size_bytes,
        crypt_method=CRYPT_LUKS if wanted.luks_area is not None else CRYPT_NONE,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_table_offset=HostOffset(geometry.cluster_bytes),
        refcount_table_clusters=table_clusters,
        backing_name=backing_name,
        compatible=int(Compatible.LAZY_REFCOUNTS) if wanted.lazy_refcounts else 0,
        incompatible=incompatible,
        autoclear=int(Autoclear.DATA_FILE_RAW) if wanted.data_file_raw else 0,
        compression_type=wanted.compression_type,
        refcount_order=geometry.refcount_bits.bit_length() - 1,
        header_length=72 if wanted.version == 2 else 112,
        additional=b"" if wanted.version == 2 else bytes(7),
        extensions=tuple(extensions),
    )


def _write_refcounts(storage: Storage, geometry: Geometry, table_clusters: int, blocks: int, total: int) -> None:
    table = Table.empty_table(table_clusters * geometry.cluster_bytes)
    first_block = 1 + table_clusters
    per_block = geometry.refcounts_per_block
    full: bytes | None = None
    for index in range(blocks):
        offset = first_block + index << geometry.cluster_bits
        table.entries[index] = offset
        counted = min(per_block, total - index * per_block)
        if counted == per_block and full is not None:
            content = full
        else:
            block = RefcountBlock(index, offset, geometry.refcount_bits, bytes(geometry.cluster_bytes))
            for at in range(counted):
                block.set(at, 1)
            content = block.content()
            if counted == per_block:
                full = content
        storage.writev(offset, [content], "create.refcounts")
    storage.writev(geometry.cluster_bytes, [table.content()], "create.refcounts")


def _write_mapping(
    storage: Storage, geometry: Geometry, wanted: NewImage, l1_offset: int, start: int, guest_clusters: int
) -> None:
    """L1, L2 tables and data clusters: from ``start`` on every L2 table, each followed by the clusters it maps, unless these
    have a file of their own."""
    l1_entries = geometry.l1_entries_for(wanted.size_bytes)
    l1 = Table.empty_table(geometry.clusters_for(l1_entries * 8) * geometry.cluster_bytes)
    offset, left, words = start, guest_clusters, geometry.l2_entry_words
    for index in range(l1_entries):
        l1.entries[index] = offset | COPIED
        mapped = min(left, geometry.l2_entries)
        l2 = Table.empty_table(geometry.cluster_bytes)
        first = guest_clusters - left << geometry.cluster_bits if geometry.external_data else offset + geometry.cluster_bytes
        for at in range(mapped):
            entry = first + (at << geometry.cluster_bits) | COPIED
            if wanted.luks_area is not None:
                # What is enciphered does not read as zeros by itself.
                entry = zeroed(entry, geometry)
            elif wanted.data_file_raw:
                entry = whole(entry, geometry)
            # Else, with subclusters, none is allocated yet: the backing file shows.
            l2.entries[at * words] = entry & WORD_MASK
            if words == 2:
                l2.entries[at * words + 1] = entry >> BITMAP_SHIFT
        storage.writev(offset, [l2.content()], "create.l2")
        offset += geometry.cluster_bytes * (1 if geometry.external_data else 1 + mapped)
        left -= mapped
    storage.writev(l1_offset, [l1.content()], "create.l1")
