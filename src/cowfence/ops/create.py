"""Create an image: under a temporary name, fenced, then given its name (``storage.publish``), so that it appears whole.

What stood at the path before is replaced as a whole, and not at all while somebody has it open. The backing file is opened
before anything is made, alone, without the files below it: for its size, and to see that it is there and what it is said to be.
Its name is stored as it was given, relative to the directory of the new image; it must be one that opening would accept.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from cowfence.chain import FORMATS, lock_reference
from cowfence.disk.opener import Identity, Place, Refs, check_name, printable
from cowfence.errors import Invalid, Unsupported, from_os_error
from cowfence.qcow2.create import NewImage, check_new, write_new
from cowfence.qcow2.describe import JsonValue
from cowfence.qcow2.header import COMPRESSION_DEFLATE, COMPRESSION_ZSTD, read_header
from cowfence.storage.base import Storage
from cowfence.storage.file import FileStorage
from cowfence.storage.publish import NewFile
from cowfence.units import MAX_SIZE_BYTES, MIB, SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.codec.luks import NewLuks
    from cowfence.storage.rehearsal import Rehearsal, RehearsedFile

COMPRESSION_TYPES: Final = {"zlib": COMPRESSION_DEFLATE, "zstd": COMPRESSION_ZSTD}
PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """What to create; the defaults are qemu-img's.

    ``size_bytes``: None takes the backing file's; it is rounded up to 512. ``version``: 2 (compat 0.10) or 3 (1.1).
    ``preallocation``: "off"; "metadata" (tables for the whole disk); "falloc" (and the host's space reserved); "full" (and
    written). A raw image has a size and a preallocation (not "metadata") only.
    """

    format: str = "qcow2"
    size_bytes: int | None = None
    cluster_bytes: int = 65536
    refcount_bits: int = 16
    version: int = 3
    backing: str | None = None
    backing_format: str | None = None
    lazy_refcounts: bool = False
    compression_type: str = "zlib"
    extended_l2: bool = False
    data_file: str | None = None
    data_file_raw: bool = False
    encryption: NewLuks | None = None
    secret: bytes | None = None
    """The passphrase that opens the new image, where it is encrypted."""
    preallocation: str = "off"


@dataclass(frozen=True, slots=True)
class Created:
    """The image that was made: its path, and its options with the size that it has now."""

    path: str
    size_bytes: int
    options: CreateOptions

    def to_dict(self) -> dict[str, JsonValue]:
        options = self.options
        found: dict[str, JsonValue] = {"filename": self.path, "format": options.format, "virtual-size": self.size_bytes}
        if options.format == "raw":
            return found | {"preallocation": options.preallocation}
        if options.backing is not None:
            found |= {"backing-filename": options.backing, "backing-filename-format": options.backing_format}
        return found | {
            "cluster-size": options.cluster_bytes,
            "compat": "0.10" if options.version == 2 else "1.1",
            "compression-type": options.compression_type,
            "extended-l2": options.extended_l2,
            **({} if options.encryption is None else {"encrypt": {"format": "luks"}}),
            **({} if options.data_file is None else {"data-file": options.data_file, "data-file-raw": options.data_file_raw}),
            "lazy-refcounts": options.lazy_refcounts,
            "preallocation": options.preallocation,
            "refcount-bits": options.refcount_bits,
        }


def create(
    path: str | os.PathLike[str],
    options: CreateOptions,
    *,
    open_backing: bool = True,
    refs: Refs | None = None,
    rehearsal: Rehearsal | None = None,
) -> Created:
    """Make the image at ``path``, replacing a file of this name.

    ``refs`` is asked for the backing file (default: trusted, because the caller names it). ``open_backing=False`` stores its
    name unseen; the size must be given then. ``rehearsal``: nothing is made.

    Raises Invalid (options that make no image), Unsupported, Refused (the backing file's name), Locked (the file to replace is
    in use), NoSpace, StorageFailed. Nothing is left behind then, and what stood at the path still does.
    """
    settled = settle(path, options, open_backing=open_backing, refs=refs)
    with ExitStack() as files:
        new = _new_file(files, path, rehearsal)
        data = None if settled.data_file is None else _new_file(files, data_path(path, settled.data_file), rehearsal)
        write_empty(new.storage, settled, None if data is None else data.storage)
        if data is not None:
            # First, so that no image ever names a file that is not there.
            data.publish()
        new.publish()
    assert settled.size_bytes is not None  # since settle
    return Created(os.fspath(path), settled.size_bytes, settled)


def new_file(files: ExitStack, path: str | os.PathLike[str]) -> NewFile:
    """A file in the making, until ``files`` is closed. Raises Unsupported for a block device."""
    new = files.enter_context(NewFile(path))
    _refuse_device(new)
    return new


def _new_file(files: ExitStack, path: str | os.PathLike[str], rehearsal: Rehearsal | None) -> NewFile | RehearsedFile:
    if rehearsal is None:
        return new_file(files, path)
    rehearsed = files.enter_context(rehearsal.new_file(path))
    _refuse_device(rehearsed)
    return rehearsed


def _refuse_device(new: NewFile | RehearsedFile) -> None:
    if new.in_place:
        raise Unsupported(new.path, "creating an image on a block device")


def data_path(path: str | os.PathLike[str], data_file: str) -> str:
    """Where a file stands that the image at ``path`` names: its external data file, its backing file."""
    return os.path.join(os.path.dirname(os.fspath(path)), data_file)


def settle(
    path: str | os.PathLike[str], options: CreateOptions, *, open_backing: bool = True, refs: Refs | None = None
) -> CreateOptions:
    """The options checked against each other, with the size filled in; writes nothing. Raises as ``create`` does."""
    name = printable(os.fspath(path))
    _check_options(options, name)
    if options.data_file is not None:
        # It is made anew: what was in it would be gone.
        data = data_path(path, options.data_file)
        if _same_file(path, data):
            raise Invalid(f"{name}: an image cannot be its own external data file")
        if options.backing is not None and _same_file(data_path(path, options.backing), data):
            raise Invalid(f"{name}: the backing file cannot be the external data file, too")
    size_bytes = size_of_new(
        path, options.size_bytes, options.backing, options.backing_format, open_backing=open_backing, refs=refs
    )
    settled = replace(options, size_bytes=align_up(size_bytes, SECTOR_BYTES))
    if options.format == "qcow2":
        try:
            check_new(new_image(replace(settled, encryption=None)))
        except Invalid as error:
            raise Invalid(f"{name}: {error}") from None
    return settled


def size_of_new(
    path: str | os.PathLike[str],
    size_bytes: int | None,
    backing: str | None,
    backing_format: str | None,
    *,
    open_backing: bool = True,
    refs: Refs | None = None,
) -> int:
    """The size of the disk of a new image: the one that is asked for, or that of its backing file, which is opened to see that
    it is there (``open_backing``). Raises as ``create`` does."""
    name = printable(os.fspath(path))
    if backing is not None:
        if not backing:
            raise Invalid(f"{name}: Expected backing file name, got empty string")
        check_name(backing)
        if os.fspath(path) == backing:
            raise Invalid(f"{name}: Error: Trying to create an image with the same filename as the backing file")
        if backing_format is None:
            raise Invalid(f"{name}: Backing file specified without backing format")
        if backing_format not in FORMATS:
            raise Unsupported(name, f"backing file format {backing_format!a}; cowfence opens qcow2, raw and luks")
        if open_backing:
            found_bytes = backing_size(path, backing, backing_format, refs or Refs.trust_all())
            size_bytes = align_up(found_bytes, SECTOR_BYTES) if size_bytes is None else size_bytes
    if size_bytes is None:
        raise Invalid(f"{name}: Image creation needs a size parameter")
    if not 0 <= size_bytes <= MAX_SIZE_BYTES:
        raise Invalid(f"{name}: an image of {size_bytes} bytes; the size must be between 0 and {MAX_SIZE_BYTES}")
    return size_bytes


def _same_file(path: str | os.PathLike[str], other: str) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return bool(identities := _identity_of(path)) and identities == _identity_of(other)


def _check_options(options: CreateOptions, name: str) -> None:
    if options.format not in ("qcow2", "raw"):
        raise Unsupported(name, f"creating images of format {options.format!a}; cowfence creates qcow2 and raw")
    if options.preallocation not in PREALLOCATIONS:
        raise Invalid(f"{name}: preallocation {options.preallocation!a} is none of {', '.join(PREALLOCATIONS)}")
    if options.compression_type not in COMPRESSION_TYPES:
        raise Invalid(f"{name}: compression type {options.compression_type!a} is none of {', '.join(COMPRESSION_TYPES)}")
    if options.encryption is not None:
        if options.secret is None:
            raise Invalid(f"{name}: Parameter 'encrypt.key-secret' is required for cipher")
        if options.version == 2:
            raise Invalid(f"{name}: encryption with LUKS needs compatibility level 1.1 or above (use compat=1.1)")
    if options.data_file is not None:
        check_name(options.data_file, "external data file")
    if options.backing is None and options.backing_format is not None:
        raise Invalid(f"{name}: Backing format cannot be used without backing file")
    if options.format == "raw":
        if options.backing is not None:
            raise Invalid(f"{name}: a raw image has no backing file")
        if options.data_file is not None:
            raise Invalid(f"{name}: a raw image has no external data file")
        if options.encryption is not None:
            raise Invalid(f"{name}: a raw image is not encrypted")
        if options.preallocation == "metadata":
            raise Invalid(f"{name}: Unsupported preallocation mode: metadata")
    if options.backing is not None and options.preallocation != "off" and not options.extended_l2:
        raise Invalid(f"{name}: preallocation would hide the backing file: the two exclude each other without extended_l2")


def backing_size(path: str | os.PathLike[str], backing: str, backing_format: str, refs: Refs) -> int:
    """The size of the backing file's disk. Opens that file only."""
    directory = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    opened = refs.follow(backing, Place(printable(os.fspath(path)), directory, _identity_of(path)))
    storage = lock_reference(opened, lock=True, force_share=False)
    try:
        if backing_format == "luks":
            raise Unsupported(storage.name, "finding the size of an encrypted backing file; give the size, and -u")
        return storage.size() if backing_format == "raw" else read_header(storage).size_bytes
    finally:
        storage.close()


def _identity_of(path: str | os.PathLike[str]) -> tuple[Identity, ...]:
    """The file that stands at ``path`` as the chain's first: an image cannot be its own backing file."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return ((found.st_dev, found.st_ino),)


def luks_area(options: CreateOptions) -> bytes:
    """A LUKS header with its key material. Raises Unsupported for ciphers that are not known here."""
    from cowfence.codec.luks import create as create_luks
    from cowfence.qcow2.encryption import named

    assert options.encryption is not None
    assert options.secret is not None  # since settle
    with named("a new image"):
        return create_luks(options.encryption, options.secret)[0]


def new_image(options: CreateOptions) -> NewImage:
    assert options.size_bytes is not None  # since settle
    return NewImage(
        size_bytes=options.size_bytes,
        cluster_bytes=options.cluster_bytes,
        refcount_bits=options.refcount_bits,
        version=options.version,
        lazy_refcounts=options.lazy_refcounts,
        compression_type=COMPRESSION_TYPES[options.compression_type],
        extended_l2=options.extended_l2,
        data_file=options.data_file,
        data_file_raw=options.data_file_raw,
        luks_area=None if options.encryption is None else luks_area(options),
        backing_name=options.backing,
        backing_format=options.backing_format,
        # What can be read by itself is allocated as a whole, so that no entry ever says something else (as QEMU has it).
        preallocate_metadata=options.preallocation != "off" or options.data_file_raw,
    )


def write_empty(storage: Storage, settled: CreateOptions, data: Storage | None = None) -> None:
    """Write the image into an empty file, for callers that fill it before it gets its name. ``settled``: from ``settle``.
    ``data``: the empty file that is to be its external data file."""
    if settled.format == "raw":
        assert settled.size_bytes is not None  # since settle
        storage.truncate(settled.size_bytes, "create.size")
    else:
        try:
            write_new(storage, new_image(settled))
        except Invalid as error:
            raise Invalid(f"{storage.name}: {error}") from None
    if data is not None:
        assert settled.size_bytes is not None  # since settle
        data.truncate(settled.size_bytes, "create.size")
    for file in (storage, data):
        if isinstance(file, FileStorage):
            preallocate(file, settled.preallocation)


def preallocate(storage: FileStorage, preallocation: str) -> None:
    """Reserve the host's space for a whole file ("falloc"), and write it ("full"); else nothing. Raises NoSpace."""
    if preallocation in ("falloc", "full"):
        _reserve(storage)
    if preallocation == "full":
        _fill_holes(storage)


def _reserve(storage: FileStorage) -> None:
    size_bytes = storage.size()
    if size_bytes:
        try:
            os.posix_fallocate(storage.fileno(), 0, size_bytes)
        except OSError as error:
            raise from_os_error(storage.name, "preallocate", 0, error) from error


def _fill_holes(storage: FileStorage) -> None:
    """Write zeros where nothing has been written: reserved space counts as a hole here."""
    zeros = bytes(MIB)
    size_bytes = storage.size()
    for extent in list(storage.extents(0, size_bytes)):
        if extent.zero:
            for at in range(extent.start, extent.end, MIB):
                storage.writev(at, (zeros[: extent.end - at],), "create.fill")
