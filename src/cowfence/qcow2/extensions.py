"""Header extensions: the chain behind the header, the feature bits and their names, and the extensions that point elsewhere.

Sections "Header extensions", "Feature name table", "Bitmaps extension" and "Full disk encryption header pointer" of the qcow2
specification. Extensions are kept in order with their data byte for byte, unknown ones too, so that a header that is rewritten
loses nothing that a later version of the format put there. Only the padding between them is not kept: it has no meaning.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from cowfence.qcow2.geometry import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS
from cowfence.units import align_up

# No flags of the library's: their complement has known bits only, and here those that are not known have to stay, or to go.


class Incompatible(IntEnum):
    """Who does not know one of these must not open the image."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntEnum):
    """Who does not know one of these may ignore it."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntEnum):
    """Who does not know one of these must clear it before writing to the image."""

    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1


KNOWN_INCOMPATIBLE: Final = sum(Incompatible)
KNOWN_COMPATIBLE: Final = sum(Compatible)
KNOWN_AUTOCLEAR: Final = sum(Autoclear)


class ExtensionType(IntEnum):
    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE_NAME = 0x44415441


class Extension(NamedTuple):
    """One header extension: its type number and its data, without the padding."""

    type: int
    data: bytes


class FeatureKind(IntEnum):
    """Which of the header's three feature bitmaps."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


class FeatureName(NamedTuple):
    """An entry of the feature name table. ``kind`` is a number, because an image may hold one that is no ``FeatureKind``."""

    kind: int
    bit: int
    name: str


@dataclass(frozen=True, slots=True)
class BitmapsPointer:
    """The bitmaps extension: how many bitmaps, and where their directory stands."""

    count: int
    directory_bytes: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class EncryptionPointer:
    """The full disk encryption extension: where the LUKS header stands, and how long it is."""

    offset: int
    length_bytes: int


_ENVELOPE = struct.Struct(">II")
_FEATURE_NAME = struct.Struct(">BB46s")
_BITMAPS = struct.Struct(">IIQQ")
_ENCRYPTION = struct.Struct(">QQ")
END_BYTES: Final = _ENVELOPE.size
"""Size of the END extension."""

_KNOWN_TYPES: Final = frozenset(ExtensionType)


def parse_chain(area: bytes) -> tuple[Extension, ...]:
    """The extensions that stand in ``area`` (from the end of the header to the backing name or the end of the cluster).

    The chain ends at an END extension or where no further one fits. Raises ValueError where one reaches past the area, or where
    a known type stands twice with different data (an unknown type may be of a kind that is allowed to repeat).
    """
    extensions: list[Extension] = []
    first_of: dict[int, bytes] = {}
    at = 0
    while at + _ENVELOPE.size <= len(area):
        kind, length_bytes = _ENVELOPE.unpack_from(area, at)
        if kind == ExtensionType.END:
            break
        start = at + _ENVELOPE.size
        if length_bytes > len(area) - start:
            raise ValueError(
                f"header extension {kind:#010x} of {length_bytes} bytes reaches past the header area by "
                f"{length_bytes - (len(area) - start)} bytes"
            )
        data = bytes(area[start : start + length_bytes])
        if kind in _KNOWN_TYPES and first_of.setdefault(kind, data) != data:
            raise ValueError(f"header extension {kind:#010x} stands twice, with different data")
        extensions.append(Extension(kind, data))
        at = start + align_up(length_bytes, 8)
    return tuple(extensions)


def encode_chain(extensions: Iterable[Extension]) -> bytes:
    """The bytes of a chain, its END included, each extension padded with zeros to a multiple of 8 bytes."""
    parts: list[bytes] = []
    for extension in extensions:
        if extension.type == ExtensionType.END:
            raise ValueError("an extension of type 0 would end the chain")
        parts.append(_ENVELOPE.pack(extension.type, len(extension.data)))
        parts.append(extension.data.ljust(align_up(len(extension.data), 8), b"\0"))
    parts.append(_ENVELOPE.pack(ExtensionType.END, 0))
    return b"".join(parts)


def default_feature_names() -> Extension:
    """The feature name table as QEMU writes it: every feature that the specification knows."""
    names = (
        (FeatureKind.INCOMPATIBLE, 0, "dirty bit"),
        (FeatureKind.INCOMPATIBLE, 1, "corrupt bit"),
        (FeatureKind.INCOMPATIBLE, 2, "external data file"),
        (FeatureKind.INCOMPATIBLE, 3, "compression type"),
        (FeatureKind.INCOMPATIBLE, 4, "extended L2 entries"),
        (FeatureKind.COMPATIBLE, 0, "lazy refcounts"),
        (FeatureKind.AUTOCLEAR, 0, "bitmaps"),
        (FeatureKind.AUTOCLEAR, 1, "raw external data"),
    )
    return encode_feature_names(FeatureName(*entry) for entry in names)


def encode_feature_names(names: Iterable[FeatureName]) -> Extension:
    """The feature name table extension. Raises ValueError for names of more than 46 bytes."""
    entries = []
    for kind, bit, name in names:
        raw = name.encode("utf-8", "surrogateescape")
        if len(raw) > 46 or not 0 <= bit <= 63:
            raise ValueError(f"'{name}' for bit {bit} is no entry of a feature name table")
        entries.append(_FEATURE_NAME.pack(kind, bit, raw))
    return Extension(ExtensionType.FEATURE_NAMES, b"".join(entries))


def decode_feature_names(data: bytes) -> tuple[FeatureName, ...]:
    """The entries of a feature name table. It serves messages only, so that an incomplete last entry is skipped."""
    whole_bytes = len(data) - len(data) % _FEATURE_NAME.size
    return tuple(
        FeatureName(kind, bit, name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
        for kind, bit, name in _FEATURE_NAME.iter_unpack(data[:whole_bytes])
    )


def decode_bitmaps(data: bytes) -> BitmapsPointer:
    """The fields of the bitmaps extension. Raises ValueError for a wrong length, reserved bits, or more than the limits."""
    if len(data) != _BITMAPS.size:
        raise ValueError(f"the bitmaps extension has {len(data)} bytes instead of {_BITMAPS.size}")
    count, reserved, directory_bytes, directory_offset = _BITMAPS.unpack(data)
    if reserved:
        raise ValueError(f"the bitmaps extension has reserved bits {reserved:#x}")
    if not 1 <= count <= MAX_BITMAPS:
        raise ValueError(f"the bitmaps extension counts {count} bitmaps, must be 1 to {MAX_BITMAPS}")
    if directory_bytes > MAX_BITMAP_DIRECTORY_BYTES:
        raise ValueError(f"the bitmap directory of {directory_bytes} bytes is longer than {MAX_BITMAP_DIRECTORY_BYTES}")
    return BitmapsPointer(count, directory_bytes, directory_offset)


def encode_bitmaps(pointer: BitmapsPointer) -> Extension:
    """The bitmaps extension that points to a directory."""
    data = _BITMAPS.pack(pointer.count, 0, pointer.directory_bytes, pointer.directory_offset)
    return Extension(ExtensionType.BITMAPS, data)


def decode_encryption(data: bytes) -> EncryptionPointer:
    """The fields of the full disk encryption extension. Raises ValueError for a wrong length."""
    if len(data) != _ENCRYPTION.size:
        raise ValueError(f"the encryption extension has {len(data)} bytes instead of {_ENCRYPTION.size}")
    return EncryptionPointer(*_ENCRYPTION.unpack(data))


def encode_encryption(pointer: EncryptionPointer) -> Extension:
    """The full disk encryption extension that points to a LUKS header."""
    return Extension(ExtensionType.ENCRYPTION, _ENCRYPTION.pack(pointer.offset, pointer.length_bytes))
