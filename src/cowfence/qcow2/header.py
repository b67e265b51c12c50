"""The header: the first cluster of an image, parsed into a value and encoded again; and the patches that the engine writes.

Three levels, because an image that cannot be read can still be described:

- ``parse_header`` checks the form (section "Header" of the qcow2 specification, and the limits of ``geometry``) and describes.
  Images that use features we do not have parse as well as others.
- ``check_supported`` refuses, by name, what this version cannot read.
- ``check_bounds`` and ``check_overlaps`` hold the header against the file: tables start inside it, and none lies on another.

A header is switched by a write inside sector 0 only, which never tears (crash contract, R5). The ``*_patch`` functions give
those writes: the fields of one switch are neighbours in the header, so each is one run of bytes.

Version 2 ends at byte 72; the fields that it lacks have the values that the specification gives them (16-bit refcounts, no
features). A field behind byte 104 that is unknown here is kept and written back (compatibility rule 2 of "Additional fields").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cowfence.errors import Corrupt, NotThisFormat, Unsupported
from cowfence.qcow2.extensions import (
    END_BYTES,
    KNOWN_INCOMPATIBLE,
    Autoclear,
    BitmapsPointer,
    Compatible,
    EncryptionPointer,
    Extension,
    ExtensionType,
    FeatureKind,
    FeatureName,
    Incompatible,
    decode_bitmaps,
    decode_encryption,
    decode_feature_names,
    default_feature_names,
    encode_chain,
    parse_chain,
)
from cowfence.qcow2.geometry import (
    MAX_BACKING_NAME_BYTES,
    MAX_CLUSTER_BITS,
    MAX_HOST_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    REFCOUNT_ORDER_V2,
    TABLE_ENTRY_BYTES,
    Geometry,
    HostOffset,
)
from cowfence.storage.base import Storage

__all__ = [
    "MAGIC",
    "Autoclear",
    "Compatible",
    "Extension",
    "ExtensionType",
    "Header",
    "Incompatible",
    "check_bounds",
    "check_overlaps",
    "check_supported",
    "cluster_bytes_of",
    "default_feature_names",
    "encode",
    "feature_bits_patch",
    "l1_patch",
    "parse_header",
    "read_header",
    "refcount_table_patch",
    "size_patch",
    "snapshots_patch",
]

MAGIC: Final = b"QFI\xfb"
HEADER_BYTES_V2: Final = 72
MIN_HEADER_BYTES_V3: Final = 104
HEADER_BYTES_V3: Final = 112
"""What we and QEMU write: with the compression type and its padding."""

COMPRESSION_DEFLATE: Final = 0
COMPRESSION_ZSTD: Final = 1

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

_PREFIX_BYTES: Final = 128

_BASE = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">QQQII")
_CLUSTER_BITS_AT: Final = 20
_SIZE_AT: Final = 24
_L1_AT: Final = 36
_REFCOUNT_TABLE_AT: Final = 48
_SNAPSHOTS_AT: Final = 60
_FEATURES_AT: Final = 72
_HOST_LIMIT: Final = 1 << MAX_HOST_BITS
_NOWHERE: Final = HostOffset(0)


@dataclass(frozen=True, slots=True)
class Header:
    """Every field of the header. Offsets and sizes in bytes; a table that does not exist has offset 0.

    ``backing_name``: as stored, not decoded; None where there is no backing file. ``backing_offset``: where it stands; 0 lets
    ``encode`` put it behind the extensions. ``additional``: the bytes from 105 to ``header_length``, kept as they are.
    """

    version: int
    cluster_bits: int
    size_bytes: int
    l1_entries: int
    l1_offset: HostOffset
    refcount_table_offset: HostOffset
    refcount_table_clusters: int
    backing_name: bytes | None = None
    backing_offset: int = 0
    crypt_method: int = CRYPT_NONE
    snapshot_count: int = 0
    snapshots_offset: HostOffset = _NOWHERE
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = REFCOUNT_ORDER_V2
    header_length: int = HEADER_BYTES_V3
    compression_type: int = COMPRESSION_DEFLATE
    additional: bytes = bytes(7)
    extensions: tuple[Extension, ...] = ()

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def geometry(self) -> Geometry:
        """The sizes that follow; a new value at each call."""
        return Geometry(
            self.cluster_bits,
            self.refcount_order,
            bool(self.incompatible & Incompatible.EXTENDED_L2),
            self.version,
            bool(self.incompatible & Incompatible.DATA_FILE),
        )

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of a type, or None."""
        return next((extension.data for extension in self.extensions if extension.type == kind), None)

    @property
    def backing_file(self) -> str | None:
        """The name of the backing file as text; bytes that are no UTF-8 become surrogates, as in ``os.fsdecode``."""
        return None if self.backing_name is None else _text(self.backing_name)

    @property
    def backing_format(self) -> str | None:
        return _optional_text(self.extension(ExtensionType.BACKING_FORMAT))

    @property
    def data_file(self) -> str | None:
        """The name of the external data file, where one is stored."""
        return _optional_text(self.extension(ExtensionType.DATA_FILE_NAME))

    @property
    def bitmaps(self) -> BitmapsPointer | None:
        """Where the bitmap directory stands. Its data is consistent only where ``Autoclear.BITMAPS`` is set."""
        data = self.extension(ExtensionType.BITMAPS)
        return None if data is None else decode_bitmaps(data)

    @property
    def encryption(self) -> EncryptionPointer | None:
        data = self.extension(ExtensionType.ENCRYPTION)
        return None if data is None else decode_encryption(data)

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """The feature name table that the image brings along (empty where it has none)."""
        return decode_feature_names(self.extension(ExtensionType.FEATURE_NAMES) or b"")

    def unknown_incompatible(self) -> tuple[str, ...]:
        """The incompatible features that we do not know, by the image's own names for them where it has some."""
        names = {entry.bit: entry.name for entry in self.feature_names if entry.kind == FeatureKind.INCOMPATIBLE}
        unknown = self.incompatible & ~KNOWN_INCOMPATIBLE
        return tuple(
            f"incompatible feature bit {bit}" + (f" ({names[bit]!a})" if names.get(bit) else "")
            for bit in range(64)
            if unknown >> bit & 1
        )


def cluster_bytes_of(prefix: bytes, name: str) -> int:
    """The cluster size of the image whose first 24 bytes (or more) are ``prefix``: how much ``parse_header`` may need.

    Raises NotThisFormat, Unsupported (the version) and Corrupt (the size).
    """
    if prefix[:4] != MAGIC:
        raise NotThisFormat(name, "not a qcow2 image: the magic string is missing")
    if len(prefix) < HEADER_BYTES_V2:
        raise Corrupt(f"{name}: header", f"the file ends after {len(prefix)} bytes, a header has at least {HEADER_BYTES_V2}")
    version = int.from_bytes(prefix[4:8])
    if version not in (2, 3):
        raise Unsupported(name, f"qcow2 version {version}")
    cluster_bits = int.from_bytes(prefix[_CLUSTER_BITS_AT : _CLUSTER_BITS_AT + 4])
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise _corrupt(name, "cluster_bits", f"is {cluster_bits}, must be {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
    return 1 << cluster_bits


def read_header(storage: Storage) -> Header:
    """The header of an image file. Reads the first cluster. Raises NotThisFormat, Unsupported, Corrupt."""
    prefix = bytearray(_PREFIX_BYTES)
    got = storage.readv(0, (prefix,))
    length_bytes = cluster_bytes_of(bytes(prefix[:got]), storage.name)
    cluster = bytearray(length_bytes)
    got = storage.readv(0, (cluster,))
    return parse_header(bytes(cluster[:got]), storage.name)


def parse_header(cluster0: bytes, name: str) -> Header:
    """The header of the image that starts with ``cluster0``: its first cluster, or what the file has of it; more is ignored.

    ``name`` is the file's name, for messages. Raises NotThisFormat (no magic string), Unsupported (another version) and Corrupt
    (a field that breaks the format or its limits).
    """
    cluster_bytes = cluster_bytes_of(cluster0, name)
    cluster0 = bytes(cluster0[:cluster_bytes])
    (
        _magic,
        version,
        backing_offset,
        backing_bytes,
        cluster_bits,
        size_bytes,
        crypt_method,
        l1_entries,
        l1_offset,
        refcount_table_offset,
        refcount_table_clusters,
        snapshot_count,
        snapshots_offset,
    ) = _BASE.unpack_from(cluster0)
    incompatible = compatible = autoclear = compression_type = 0
    refcount_order, header_length, additional = REFCOUNT_ORDER_V2, HEADER_BYTES_V2, b""
    if version == 3:
        if len(cluster0) < MIN_HEADER_BYTES_V3:
            raise _corrupt(name, "header_length", f"the file ends after {len(cluster0)} bytes")
        incompatible, compatible, autoclear, refcount_order, header_length = _FEATURES.unpack_from(cluster0, _FEATURES_AT)
        if header_length < MIN_HEADER_BYTES_V3 or header_length % 8 or header_length > cluster_bytes:
            raise _corrupt(
                name,
                "header_length",
                f"is {header_length}, must be a multiple of 8 from {MIN_HEADER_BYTES_V3} to the cluster size {cluster_bytes}",
            )
        if header_length > len(cluster0):
            raise _corrupt(name, "header_length", f"is {header_length}, but the file ends after {len(cluster0)} bytes")
        if header_length > MIN_HEADER_BYTES_V3:
            compression_type = cluster0[MIN_HEADER_BYTES_V3]
            additional = cluster0[MIN_HEADER_BYTES_V3 + 1 : header_length]
    backing_name = _backing_name(cluster0, backing_offset, backing_bytes, header_length, name)
    try:
        extensions = parse_chain(cluster0[header_length : backing_offset or len(cluster0)])
    except ValueError as error:
        raise _corrupt(name, "header extensions", str(error)) from None
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size_bytes=size_bytes,
        l1_entries=l1_entries,
        l1_offset=HostOffset(l1_offset),
        refcount_table_offset=HostOffset(refcount_table_offset),
        refcount_table_clusters=refcount_table_clusters,
        backing_name=backing_name,
        backing_offset=backing_offset,
        crypt_method=crypt_method,
        snapshot_count=snapshot_count,
        snapshots_offset=HostOffset(snapshots_offset),
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        header_length=header_length,
        compression_type=compression_type,
        additional=additional,
        extensions=extensions,
    )
    _validate(header, name)
    return header


def _backing_name(cluster0: bytes, offset: int, length_bytes: int, header_length: int, name: str) -> bytes | None:
    if not offset:
        return None  # The length field is undefined then.
    if length_bytes > MAX_BACKING_NAME_BYTES:
        raise _corrupt(name, "backing_file_size", f"is {length_bytes}, must be at most {MAX_BACKING_NAME_BYTES}")
    if offset < header_length or offset + length_bytes > len(cluster0):
        raise _corrupt(
            name,
            "backing_file_offset",
            f"puts the backing file name at {offset}+{length_bytes}, must lie behind the header in the first cluster",
        )
    if not length_bytes:
        raise _corrupt(name, "backing_file_size", "is 0, but the image has a backing file")
    return cluster0[offset : offset + length_bytes]


def _validate(header: Header, name: str) -> None:
    """The rules of the specification and the limits for every field. Raises Corrupt."""
    try:
        geometry = header.geometry
    except ValueError as error:
        raise _corrupt(name, "geometry", str(error)) from None
    for field, offset in (
        ("l1_table_offset", header.l1_offset),
        ("refcount_table_offset", header.refcount_table_offset),
        ("snapshots_offset", header.snapshots_offset if header.snapshot_count else 0),
    ):
        _check_offset(name, field, offset, geometry)
    if header.l1_entries * TABLE_ENTRY_BYTES > MAX_L1_BYTES:
        raise _corrupt(name, "l1_size", f"is {header.l1_entries}, the L1 table must not exceed {MAX_L1_BYTES} bytes")
    needed = geometry.l1_entries_for(header.size_bytes)
    if needed * TABLE_ENTRY_BYTES > MAX_L1_BYTES:
        # A shorter table is not refused: what it does not reach is a hole. But no table that is allowed would hold this disk.
        raise _corrupt(
            name, "l1_size", f"a disk of {header.size_bytes} bytes needs {needed} entries, more than {MAX_L1_BYTES} bytes"
        )
    if header.refcount_table_clusters * geometry.cluster_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise _corrupt(
            name,
            "refcount_table_clusters",
            f"is {header.refcount_table_clusters}, the table must not exceed {MAX_REFCOUNT_TABLE_BYTES} bytes",
        )
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise _corrupt(name, "nb_snapshots", f"is {header.snapshot_count}, must be at most {MAX_SNAPSHOTS}")
    if bool(header.incompatible & Incompatible.COMPRESSION) != bool(header.compression_type):
        raise _corrupt(
            name,
            "compression_type",
            f"is {header.compression_type}, which contradicts the compression feature bit "
            f"({'set' if header.incompatible & Incompatible.COMPRESSION else 'clear'})",
        )
    if header.autoclear & Autoclear.DATA_FILE_RAW and not header.incompatible & Incompatible.DATA_FILE:
        raise _corrupt(name, "autoclear_features", "says the data file is raw, but the image has no data file")
    try:
        bitmaps, encryption = header.bitmaps, header.encryption
    except ValueError as error:
        raise _corrupt(name, "header extensions", str(error)) from None
    if bitmaps is not None:
        _check_offset(name, "bitmap_directory_offset", bitmaps.directory_offset, geometry)
    elif header.autoclear & Autoclear.BITMAPS:
        raise _corrupt(name, "autoclear_features", "says the bitmaps are consistent, but there is no bitmaps extension")
    if encryption is not None:
        _check_offset(name, "encryption header offset", encryption.offset, geometry)


def _check_offset(name: str, field: str, offset: int, geometry: Geometry) -> None:
    if not geometry.is_cluster_aligned(offset):
        raise _corrupt(name, field, f"is {offset:#x}, not aligned to the cluster size {geometry.cluster_bytes}")
    if offset >= _HOST_LIMIT:
        raise _corrupt(name, field, f"is {offset:#x}, must be below 2**{MAX_HOST_BITS}")


def check_supported(header: Header, name: str) -> None:
    """Raises Unsupported, naming the feature, where this version of the engine cannot read the image."""
    unknown = header.unknown_incompatible()
    if unknown:
        raise Unsupported(name, ", ".join(unknown))
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
        raise Unsupported(name, f"encryption method {header.crypt_method}")
    if header.compression_type not in (COMPRESSION_DEFLATE, COMPRESSION_ZSTD):
        raise Unsupported(name, f"compression type {header.compression_type}")


def check_bounds(header: Header, file_size_bytes: int, name: str) -> None:
    """Raises Corrupt where a table of the header does not start inside the file, or would start on the header.

    A table may reach past the end of the file: a sparse file may lack its last cluster's tail.
    """
    if not header.refcount_table_clusters:
        raise _corrupt(name, "refcount_table_clusters", "is 0: the image has no refcount table")
    for field, start, _length_bytes in _tables(header):
        if start < header.cluster_bytes:
            raise _corrupt(name, field, f"is at {start:#x}, inside the header's cluster")
        if start >= file_size_bytes:
            raise _corrupt(name, field, f"is at {start:#x}, past the end of the file ({file_size_bytes:#x})")


def check_overlaps(header: Header, name: str) -> None:
    """Raises Corrupt where two tables of the header share a cluster: before any write, that would destroy one of them.

    The snapshot table's length is not in the header; its first cluster is held against the others.
    """
    geometry = header.geometry
    last_field, last_end = "header", header.cluster_bytes
    for field, start, length_bytes in sorted(_tables(header), key=lambda table: table[1]):
        if start < last_end:
            raise _corrupt(name, field, f"is at {start:#x}, on the {last_field}, which reaches to {last_end:#x}")
        last_field, last_end = field, start + geometry.clusters_for(max(length_bytes, 1)) * geometry.cluster_bytes


def _tables(header: Header) -> Iterator[tuple[str, int, int]]:
    """Name, start and length in bytes of each table that the header points to."""
    if header.l1_entries:
        yield "L1 table", header.l1_offset, header.l1_entries * TABLE_ENTRY_BYTES
    if header.refcount_table_clusters:
        yield "refcount table", header.refcount_table_offset, header.refcount_table_clusters * header.cluster_bytes
    if header.snapshot_count:
        yield "snapshot table", header.snapshots_offset, header.cluster_bytes
    if header.bitmaps is not None:
        yield "bitmap directory", header.bitmaps.directory_offset, header.bitmaps.directory_bytes
    if header.encryption is not None:
        yield "encryption header", header.encryption.offset, header.encryption.length_bytes


def encode(header: Header) -> bytes:
    """The first cluster's bytes up to the last that has a meaning; what follows in the cluster is zeros.

    Raises ValueError where the header does not fit into its first cluster, or breaks a rule that ``parse_header`` checks.
    """
    chain = encode_chain(header.extensions)
    backing_name = header.backing_name or b""
    backing_offset = (header.backing_offset or header.header_length + len(chain)) if backing_name else 0
    room_bytes = (backing_offset or header.cluster_bytes) - header.header_length
    if len(chain) > room_bytes:
        # An area that is full to its last bytes needs no END extension, nor the padding before it.
        padding_bytes = -len(header.extensions[-1].data) % 8 if header.extensions else 0
        if len(chain) - END_BYTES - padding_bytes > room_bytes:
            raise ValueError(f"the header does not fit into the {room_bytes} bytes that it has for extensions")
        chain = chain[: min(len(chain) - END_BYTES, room_bytes)]
    if backing_offset + len(backing_name) > header.cluster_bytes:
        raise ValueError(f"the backing file name does not fit into the first cluster of {header.cluster_bytes} bytes")
    fields = encode_fields(header, backing_offset)
    if len(fields) != header.header_length:
        raise ValueError(f"header_length is {header.header_length}, but the fields take {len(fields)} bytes")
    encoded = (fields + chain).ljust(backing_offset, b"\0") + backing_name
    try:
        parse_header(encoded, "new header")
    except (Corrupt, Unsupported) as error:
        raise ValueError(str(error)) from None
    return encoded


def encode_fields(header: Header, backing_offset: int) -> bytes:
    """The header up to its extensions. ``backing_offset``: where the backing file's name stands; 0 for none."""
    fields = _BASE.pack(
        MAGIC,
        header.version,
        backing_offset,
        len(header.backing_name or b"") if backing_offset else 0,
        header.cluster_bits,
        header.size_bytes,
        header.crypt_method,
        header.l1_entries,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshot_count,
        header.snapshots_offset,
    )
    if header.version == 3:
        features = (header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length)
        fields += _FEATURES.pack(*features)
        if header.header_length > MIN_HEADER_BYTES_V3:
            fields += bytes((header.compression_type,)) + header.additional
    return fields


def size_patch(size_bytes: int) -> tuple[int, bytes]:
    """Offset and bytes of the write that sets the size of the disk."""
    return _SIZE_AT, size_bytes.to_bytes(8)


def l1_patch(l1_offset: HostOffset, l1_entries: int) -> tuple[int, bytes]:
    """Offset and bytes of the write that switches to another active L1 table (bytes 36 to 47)."""
    return _L1_AT, struct.pack(">IQ", l1_entries, l1_offset)


def disk_patch(header: Header, size_bytes: int, l1_offset: HostOffset, l1_entries: int) -> tuple[int, bytes]:
    """Offset and bytes of the write that switches to another disk: its size and its L1 table at once (bytes 24 to 47)."""
    return _SIZE_AT, struct.pack(">QIIQ", size_bytes, header.crypt_method, l1_entries, l1_offset)


def refcount_table_patch(offset: HostOffset, clusters: int) -> tuple[int, bytes]:
    """Offset and bytes of the write that switches to another refcount table (bytes 48 to 59)."""
    return _REFCOUNT_TABLE_AT, struct.pack(">QI", offset, clusters)


def snapshots_patch(offset: HostOffset, count: int) -> tuple[int, bytes]:
    """Offset and bytes of the write that switches to another snapshot table (bytes 60 to 71)."""
    return _SNAPSHOTS_AT, struct.pack(">IQ", count, offset)


def feature_bits_patch(
    header: Header, *, incompatible: int | None = None, compatible: int | None = None, autoclear: int | None = None
) -> tuple[int, bytes]:
    """Offset and bytes of the write that changes feature bits (bytes 72 to 95); None leaves a field as it is.

    Raises ValueError for version 2, which has none.
    """
    if header.version < 3:
        raise ValueError("a version 2 header has no feature bits")
    return _FEATURES_AT, struct.pack(
        ">QQQ",
        header.incompatible if incompatible is None else incompatible,
        header.compatible if compatible is None else compatible,
        header.autoclear if autoclear is None else autoclear,
    )


def _corrupt(name: str, field: str, what: str) -> Corrupt:
    return Corrupt(f"{name}: header: {field}", what)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _optional_text(raw: bytes | None) -> str | None:
    return None if raw is None else _text(raw)
