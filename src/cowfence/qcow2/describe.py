"""A description of an image: what ``info`` shows, as a value. Made from the header and what it points to directly.

It reads one file and follows no name that stands in it. It describes images that this version cannot open as well: what the
header says needs no support. Only the snapshot table and the bitmap directory are read besides the header, in slices, so that
work and memory follow the bytes that are there and not the sizes that are claimed.

Keys and their order in ``to_dict`` are those of ``qemu-img info --output=json`` (7.2). No numpy: ``cowfence info`` is made of
this module.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from cowfence.errors import Corrupt
from cowfence.qcow2.extensions import Autoclear, BitmapsPointer, Compatible, Incompatible
from cowfence.qcow2.header import (
    COMPRESSION_DEFLATE,
    COMPRESSION_ZSTD,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    MAGIC,
    Header,
    read_header,
)
from cowfence.qcow2.snapshot_table import Snapshot, read_snapshots
from cowfence.storage.base import Storage
from cowfence.storage.file import FileStorage
from cowfence.units import KIB, SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.codec.luks import LuksHeader

_SLICE_BYTES: Final = 64 * KIB
_BITMAP = struct.Struct(">QIIBBHI")
_BITMAP_IN_USE: Final = 1
_BITMAP_AUTO: Final = 2
_MAX_BITMAP_NAME_BYTES: Final = 1023
_MAX_GRANULARITY_BITS: Final = 31
_BLOCK_BYTES: Final = 512  # of st_blocks
_NANO: Final = 10**9

_COMPRESSION_NAMES: Final = {COMPRESSION_DEFLATE: "zlib", COMPRESSION_ZSTD: "zstd"}
_CRYPT_NAMES: Final = {CRYPT_AES: "aes", CRYPT_LUKS: "luks"}

JsonValue = str | int | bool | None | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """An entry of the bitmap directory. ``flags``: of "in-use" (its content is not to be trusted) and "auto" (it records)."""

    name: str
    granularity_bytes: int
    flags: tuple[str, ...]

    def to_dict(self) -> dict[str, JsonValue]:
        return {"flags": list(self.flags), "name": self.name, "granularity": self.granularity_bytes}


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """What only qcow2 has. ``corrupt``: the image is marked corrupt. ``bitmaps``: those whose data is consistent by the header.

    ``unsupported``: features that this version cannot read, by name. ``encryption``: "aes", "luks", or None; ``luks``: its
    header, where it can be read.
    """

    compat: Literal["0.10", "1.1"]
    compression_type: str
    refcount_bits: int
    lazy_refcounts: bool = False
    corrupt: bool = False
    extended_l2: bool = False
    bitmaps: tuple[BitmapInfo, ...] = ()
    data_file: str | None = None
    data_file_raw: bool = False
    has_data_file: bool = False
    encryption: str | None = None
    luks: LuksHeader | None = None
    unsupported: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, JsonValue]:
        found: dict[str, JsonValue] = {"compat": self.compat}
        found["compression-type"] = self.compression_type
        if self.compat == "1.1":
            found["lazy-refcounts"] = self.lazy_refcounts
        if self.bitmaps:
            found["bitmaps"] = [bitmap.to_dict() for bitmap in self.bitmaps]
        found["refcount-bits"] = self.refcount_bits
        if self.data_file is not None:
            found["data-file"] = self.data_file
        if self.encryption is not None:
            found["encrypt"] = {"format": self.encryption} if self.luks is None else _luks_dict(self.luks)
        if self.has_data_file:
            found["data-file-raw"] = self.data_file_raw
        if self.compat == "1.1":
            found["corrupt"] = self.corrupt
            found["extended-l2"] = self.extended_l2
        if self.unsupported:
            found["unsupported"] = list(self.unsupported)
        return {"type": "qcow2", "data": found}


@dataclass(frozen=True, slots=True)
class LuksInfo:
    """What a file has that is encrypted as a whole."""

    header: LuksHeader

    def to_dict(self) -> dict[str, JsonValue]:
        found = _luks_dict(self.header)
        del found["format"]
        return {"type": "luks", "data": found}


def _luks_dict(luks: LuksHeader) -> dict[str, JsonValue]:
    """As ``qemu-img info`` names and orders it."""
    chaining, _, vectors = luks.mode.partition("-")
    vectors, _, vectors_hash = vectors.partition(":")
    key_bits = luks.key_bytes * (4 if chaining == "xts" else 8)
    slots: list[JsonValue] = []
    for slot in luks.slots:
        place: dict[str, JsonValue] = {"active": slot.active}
        if slot.active:
            place["iters"] = slot.iterations
        place["key-offset"] = slot.material_sector * SECTOR_BYTES
        if slot.active:
            place["stripes"] = slot.stripes
        slots.append(place)
    found: dict[str, JsonValue] = {"ivgen-alg": vectors}
    found["hash-alg"] = luks.hash_name
    found["cipher-alg"] = f"{luks.cipher}-{key_bits}"
    found["uuid"] = luks.uuid
    if vectors_hash:
        found["ivgen-hash-alg"] = vectors_hash
    return found | {
        "format": "luks",
        "cipher-mode": chaining,
        "slots": slots,
        "payload-offset": luks.payload_sector * SECTOR_BYTES,
        "master-key-iters": luks.digest_iterations,
    }


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image, described. Sizes in bytes.

    ``format``: "qcow2", "raw", "luks", or "unknown" (nobody said, and it is no qcow2). ``actual_bytes``: what the file takes on
    its host, None where it is no local file. ``dirty``: None where nobody knows. ``full_backing_filename``: the stored name,
    seen from here.
    """

    filename: str
    format: Literal["qcow2", "raw", "luks", "unknown"]
    virtual_bytes: int
    actual_bytes: int | None = None
    dirty: bool | None = False
    cluster_bytes: int | None = None
    encrypted: bool = False
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_format: str | None = None
    snapshots: tuple[Snapshot, ...] = ()
    specific: FormatInfo | LuksInfo | None = None

    def to_dict(self) -> dict[str, JsonValue]:
        """As ``qemu-img info --output=json`` names and orders it; a key without a value is left out."""
        found: dict[str, JsonValue] = {}
        if self.backing_format is not None:
            found["backing-filename-format"] = self.backing_format
        if self.snapshots:
            found["snapshots"] = [snapshot_dict(snapshot) for snapshot in self.snapshots]
        found["virtual-size"] = self.virtual_bytes
        found["filename"] = self.filename
        if self.cluster_bytes is not None:
            found["cluster-size"] = self.cluster_bytes
        found["format"] = self.format
        if self.actual_bytes is not None:
            found["actual-size"] = self.actual_bytes
        if self.specific is not None:
            found["format-specific"] = self.specific.to_dict()
        if self.full_backing_filename is not None:
            found["full-backing-filename"] = self.full_backing_filename
        if self.encrypted:
            found["encrypted"] = True
        if self.backing_filename is not None:
            found["backing-filename"] = self.backing_filename
        if self.dirty is not None:
            found["dirty-flag"] = self.dirty
        return found


def snapshot_dict(snapshot: Snapshot) -> dict[str, JsonValue]:
    """As ``qemu-img info --output=json`` names and orders it."""
    found: dict[str, JsonValue] = {} if snapshot.icount is None else {"icount": snapshot.icount}
    return found | {
        "vm-clock-nsec": snapshot.vm_clock_nanoseconds % _NANO,
        "name": snapshot.name,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": snapshot.vm_clock_nanoseconds // _NANO,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_bytes,
    }


def probe(storage: Storage) -> Literal["qcow2", "unknown"]:
    """What the file looks like: for showing it, and for reading it where nobody said. Never for writing.

    A guest can write anything into a raw disk, this magic string too: so a file that begins with it may be raw, and one that
    does not is never called raw.
    """
    magic = bytearray(len(MAGIC))
    return "qcow2" if storage.readv(0, (magic,)) == len(MAGIC) and magic == MAGIC else "unknown"


def describe(storage: Storage, header: Header | None = None) -> ImageInfo:
    """The qcow2 image in ``storage``; its header is read unless given.

    Raises NotThisFormat, Corrupt (the header, the snapshot table or the bitmap directory breaks the format), Unsupported (a
    version that is not 2 or 3), StorageFailed.
    """
    if header is None:
        header = read_header(storage)
    backing = header.backing_file
    return ImageInfo(
        filename=storage.name,
        format="qcow2",
        virtual_bytes=header.size_bytes,
        actual_bytes=allocated_bytes(storage),
        dirty=bool(header.incompatible & Incompatible.DIRTY),
        cluster_bytes=header.cluster_bytes,
        encrypted=header.crypt_method != CRYPT_NONE,
        backing_filename=backing,
        full_backing_filename=None if backing is None else _seen_from_here(storage.name, backing),
        backing_format=header.backing_format if backing is not None else None,
        snapshots=read_snapshots(storage, header) if header.snapshot_count else (),
        specific=_specific(storage, header),
    )


def describe_other(storage: Storage, format_name: Literal["raw", "unknown"]) -> ImageInfo:
    """A file that is raw by the caller's word, or of a format that nobody knows: only its sizes."""
    # A disk is made of whole sectors; QEMU rounds up as well.
    return ImageInfo(storage.name, format_name, align_up(storage.size(), SECTOR_BYTES), allocated_bytes(storage))


def describe_luks(storage: Storage) -> ImageInfo:
    """A file that is encrypted as a whole; no secret is needed. Raises NotThisFormat, Corrupt, StorageFailed."""
    from cowfence.qcow2.encryption import read_luks_file

    luks = read_luks_file(storage)
    size_bytes = align_up(max(storage.size() - luks.payload_sector * SECTOR_BYTES, 0), SECTOR_BYTES)
    return ImageInfo(storage.name, "luks", size_bytes, allocated_bytes(storage), encrypted=True, specific=LuksInfo(luks))


def allocated_bytes(storage: Storage) -> int | None:
    """What a local file takes on its host; None for any other storage."""
    return os.fstat(storage.fileno()).st_blocks * _BLOCK_BYTES if isinstance(storage, FileStorage) else None


def _seen_from_here(image: str, backing: str) -> str:
    """The stored name joined to the image's directory as its user wrote that; names with a protocol stay as they are."""
    if ":" in backing.split("/", 1)[0]:
        return backing
    return os.path.join(os.path.dirname(image), backing)


def _luks(storage: Storage, header: Header) -> LuksHeader | None:
    if header.crypt_method != CRYPT_LUKS:
        return None
    from cowfence.qcow2.encryption import read_luks

    try:
        return read_luks(storage, header)
    except Corrupt:
        # What cannot be opened can still be described.
        return None


def _specific(storage: Storage, header: Header) -> FormatInfo:
    compression = _COMPRESSION_NAMES.get(header.compression_type, f"unknown ({header.compression_type})")
    bitmaps: tuple[BitmapInfo, ...] = ()
    # Without the autoclear bit a program that knows no bitmaps has written since: they say nothing any more.
    if header.bitmaps is not None and header.autoclear & Autoclear.BITMAPS:
        bitmaps = _read_bitmaps(storage, header.bitmaps)
    has_data_file = bool(header.incompatible & Incompatible.DATA_FILE)
    encryption = _CRYPT_NAMES.get(header.crypt_method, f"unknown ({header.crypt_method})") if header.crypt_method else None
    return FormatInfo(
        compat="0.10" if header.version == 2 else "1.1",
        compression_type=compression,
        refcount_bits=header.geometry.refcount_bits,
        lazy_refcounts=bool(header.compatible & Compatible.LAZY_REFCOUNTS),
        corrupt=bool(header.incompatible & Incompatible.CORRUPT),
        extended_l2=bool(header.incompatible & Incompatible.EXTENDED_L2),
        bitmaps=bitmaps,
        data_file=header.data_file,
        data_file_raw=bool(header.autoclear & Autoclear.DATA_FILE_RAW),
        has_data_file=has_data_file,
        encryption=encryption,
        luks=_luks(storage, header),
        unsupported=header.unknown_incompatible(),
    )


def _read_bitmaps(storage: Storage, pointer: BitmapsPointer) -> tuple[BitmapInfo, ...]:
    """The names and flags of the bitmap directory, in its order."""
    bitmaps: list[BitmapInfo] = []
    at, end = pointer.directory_offset, pointer.directory_offset + pointer.directory_bytes
    window, window_at = b"", at
    for index in range(pointer.count):
        where = f"{storage.name}: bitmap directory at offset {pointer.directory_offset}: entry {index}"
        # An entry's own fields and the longest name stand in a slice, whatever extra data lies between them.
        if at + _BITMAP.size > window_at + len(window):
            window, window_at = _slice(storage, at, end), at
        if len(window) - (at - window_at) < _BITMAP.size:
            raise Corrupt(where, "the directory or the file ends before it")
        _table, _entries, flags, _kind, granularity_bits, name_bytes, extra_bytes = _BITMAP.unpack_from(window, at - window_at)
        if not 1 <= name_bytes <= _MAX_BITMAP_NAME_BYTES or granularity_bits > _MAX_GRANULARITY_BITS:
            raise Corrupt(where, f"has a name of {name_bytes} bytes and a granularity of 2**{granularity_bits} bytes")
        name_at = at + _BITMAP.size + extra_bytes
        if name_at + name_bytes > window_at + len(window):
            window, window_at = _slice(storage, name_at, end), name_at
        name = window[name_at - window_at : name_at - window_at + name_bytes]
        if len(name) < name_bytes:
            raise Corrupt(where, "the directory or the file ends before its name does")
        names = [text for bit, text in ((_BITMAP_IN_USE, "in-use"), (_BITMAP_AUTO, "auto")) if flags & bit]
        bitmaps.append(BitmapInfo(name.decode("utf-8", "surrogateescape"), 1 << granularity_bits, tuple(names)))
        at = name_at + name_bytes + 7 & ~7
    return tuple(bitmaps)


def _slice(storage: Storage, start: int, end: int) -> bytes:
    buffer = bytearray(max(0, min(_SLICE_BYTES, end - start)))
    return bytes(buffer[: storage.readv(start, (buffer,))]) if buffer else b""
