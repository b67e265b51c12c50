"""What is served: an image, opened as it was asked for, as an export of the NBD server."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import cowfence
from cowfence.disk.careful import KeepDiscarded, WriteThrough
from cowfence.disk.detect import DetectZeroes
from cowfence.disk.opener import printable
from cowfence.disk.window import WindowDisk
from cowfence.errors import Invalid
from cowfence.nbd.export import Export
from cowfence.nbd.steady import SteadyFile
from cowfence.storage.file import FileStorage
from cowfence.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cowfence.disk.base import Disk
    from cowfence.disk.opener import Refs
    from cowfence.nbd.export import Ranges
    from cowfence.qcow2.encryption import Secrets

CACHES: Final[dict[str, tuple[bool, Literal["writeback", "writethrough", "unsafe"]]]] = {
    "none": (True, "writeback"),
    "writeback": (False, "writeback"),
    "writethrough": (False, "writethrough"),
    "directsync": (True, "writethrough"),
    "unsafe": (False, "unsafe"),
}
"""QEMU's names of cache modes: whether the page cache is gone around, and when a write is durable."""
DISCARDS: Final = {"ignore": False, "off": False, "unmap": True, "on": True}
DETECT_ZEROES: Final = ("off", "on", "unmap")
CACHE_BYTES: Final = 32 * MIB
COMMIT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """An export, as a user describes it.

    ``cache``: of ``CACHES``. ``snapshot``: the disk as it was when this internal snapshot was taken. ``temporary``: what is
    written goes into an overlay and is forgotten. ``offset``: where the export begins in the disk. ``bitmaps``: those that
    clients may ask about. ``clients``: names of certificates that may use it; None: anybody. ``keeper``: a process that
    completes what is pending if this one is killed. ``cache_bytes``: of tables in memory. ``into_backing``: the
    backing file is opened for writing, too, so that the image can be committed into it; without a keeper.
    ``snapshots``: each internal snapshot that is there is exported too, as ``NAME@SNAPSHOT``.
    """

    path: str
    name: str = ""
    format: str = "qcow2"
    read_only: bool = False
    description: str = ""
    cache: str = "writeback"
    discard: bool = True
    detect_zeroes: str = "off"
    snapshot: str | None = None
    temporary: bool = False
    offset: int = 0
    bitmaps: tuple[str, ...] = ()
    allocation_depth: bool = False
    clients: frozenset[str] | None = None
    force_share: bool = False
    assume_backing_format: str | None = None
    keeper: bool = False
    cache_bytes: int = CACHE_BYTES
    commit_interval: float | None = COMMIT_SECONDS
    into_backing: bool = False
    snapshots: bool = False

    @property
    def writes(self) -> bool:
        """Whether the image itself is written to."""
        return not (self.read_only or self.temporary or self.snapshot is not None)


class OpenedExport:
    """An export whose image is open until ``close``."""

    def __init__(self, spec: ExportSpec, *, refs: Refs | None = None, secrets: Secrets | None = None) -> None:
        """Raises Invalid for what does not go together, and as ``cowfence.open`` does."""
        _check(spec)
        self.spec = spec
        self.base: cowfence.Qcow2Disk | cowfence.RawDisk | None = None
        self._files = ExitStack()
        try:
            image = self._open(spec, refs, secrets)
            disk: Disk = image
            self._files.callback(lambda: disk.close())
            bitmaps = _bitmaps(spec, image)
            if spec.format != "qcow2" and not spec.temporary:
                disk = KeepDiscarded(disk) if not spec.discard else disk
                disk = WriteThrough(disk) if CACHES[spec.cache][1] == "writethrough" else disk
            if spec.offset:
                if spec.offset >= disk.size:
                    raise Invalid(f"{printable(spec.path)}: the disk ends before the offset {spec.offset}")
                disk = WindowDisk(disk, spec.offset)
            if spec.detect_zeroes != "off":
                disk = DetectZeroes(disk, unmap=spec.detect_zeroes == "unmap")
        except BaseException:
            self._files.close()
            raise
        self.image = image
        self.export = Export(
            disk,
            read_only=spec.read_only,
            description=spec.description,
            bitmaps=bitmaps,
            allocation_depth=spec.allocation_depth,
            clients=spec.clients,
            steady=_steady(spec, image) if disk is image else None,
        )

    def _open(self, spec: ExportSpec, refs: Refs | None, secrets: Secrets | None) -> cowfence.Qcow2Disk | cowfence.RawDisk:
        path, format_name = spec.path, spec.format
        if spec.temporary:
            from cowfence.ops.temporary import TemporaryOverlay

            overlay = TemporaryOverlay(path, format_name)
            self._files.callback(overlay.close)
            path, format_name, refs = overlay.path, "qcow2", overlay.refs
        direct, mode = CACHES[spec.cache]
        if spec.into_backing:
            return self._open_for_commit(spec, refs, secrets)
        common = {
            "writable": spec.writes or spec.temporary,
            "format": format_name,
            "refs": refs,
            "force_share": spec.force_share,
            "direct": direct,
            "assume_backing_format": spec.assume_backing_format,
            "secret": secrets,
        }
        if format_name != "qcow2":
            return cowfence.open(path, **common)  # type: ignore[call-overload, no-any-return]
        return cowfence.open(  # type: ignore[call-overload, no-any-return]
            path,
            **common,
            cache_bytes=spec.cache_bytes,
            mode="unsafe" if spec.temporary else mode,
            commit_interval=spec.commit_interval,
            discards=spec.discard,
            keeper=spec.keeper and spec.writes and mode != "unsafe",
            snapshot=spec.snapshot,
        )

    def _open_for_commit(self, spec: ExportSpec, refs: Refs | None, secrets: Secrets | None) -> cowfence.Qcow2Disk:
        from cowfence.chain import open_for_commit
        from cowfence.qcow2.image import CacheMode, Options

        direct, mode = CACHES[spec.cache]
        disk, self.base = open_for_commit(
            spec.path,
            direct=direct,
            refs=refs,
            assume_backing_format=spec.assume_backing_format,
            secrets=secrets,
            options=Options(
                cache_bytes=spec.cache_bytes,
                mode=CacheMode(mode),
                commit_interval=spec.commit_interval,
                discards=spec.discard,
            ),
        )
        return disk

    def close(self) -> None:
        """Commit everything, and close the image. Raises what that raises."""
        if self.export.steady is not None:
            self.export.steady.settle()
        self._files.close()


def _steady(spec: ExportSpec, image: cowfence.Qcow2Disk | cowfence.RawDisk) -> SteadyFile | None:
    """The file that an image's bytes are in, where it is read through the page cache, and the image's lock keeps everybody from
    changing it."""
    if spec.writes or spec.temporary or spec.force_share or CACHES[spec.cache][0]:
        return None
    file = image.data if isinstance(image, cowfence.Qcow2Disk) else image.storage
    return SteadyFile(file.fileno(), image.locate) if isinstance(file, FileStorage) else None


def _dirty_ranges(image: cowfence.Qcow2Disk, bitmap: str, shift: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """``shift``: where the export begins in the disk, of which the bitmap tells."""
    for at, length_bytes in image.bitmaps.bits_of(bitmap).ranges(shift + offset, shift + end):
        yield at - shift, length_bytes


def is_export_name(name: str) -> bool:
    """Whether clients can ask for it. Names of files and of snapshots may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_bitmap_name(name: str) -> None:
    """Raises Invalid for a bitmap that no client can ask for."""
    if not is_export_name(name):
        raise Invalid(f"the name of a bitmap that clients ask for is UTF-8, which {name!a} is not")


def _check(spec: ExportSpec) -> None:
    name = printable(spec.path)
    if not is_export_name(spec.name):
        raise Invalid(f"{name}: the name of an export is UTF-8, which {spec.name!a} is not")
    if spec.cache not in CACHES:
        raise Invalid(f"Invalid cache mode '{spec.cache}'")
    if spec.detect_zeroes not in DETECT_ZEROES:
        raise Invalid(f"{name}: detect-zeroes is one of {', '.join(DETECT_ZEROES)}")
    if spec.detect_zeroes == "unmap" and not spec.discard:
        raise Invalid("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    if spec.snapshot is not None and spec.temporary:
        raise Invalid(f"{name}: a temporary image over an internal snapshot")
    if spec.into_backing and (spec.format != "qcow2" or not spec.writes):
        raise Invalid(f"{name}: only a qcow2 image that is written to can be committed into its backing file")
    if spec.force_share and spec.writes:
        raise Invalid(f"{name}: an image that another process writes to can only be exported read-only")
    only_qcow2 = spec.cache == "unsafe" or spec.cache_bytes != CACHE_BYTES or spec.commit_interval != COMMIT_SECONDS
    if spec.format != "qcow2" and not spec.temporary and only_qcow2:
        raise Invalid(f"{name}: cache unsafe, a size of tables in memory and a commit interval are for qcow2 images")
    if spec.snapshots and (spec.format != "qcow2" or spec.temporary or spec.snapshot is not None):
        raise Invalid(f"{name}: internal snapshots are exported beside the qcow2 image that they are in")
    if spec.format != "qcow2" and (spec.bitmaps or spec.snapshot is not None):
        raise Invalid(f"{name}: a {spec.format} image has neither bitmaps nor internal snapshots")


def _bitmaps(spec: ExportSpec, image: cowfence.Qcow2Disk | cowfence.RawDisk) -> dict[str, Ranges]:
    """What tells the dirty ranges of each bitmap, as they are when it is asked. Raises Invalid."""
    found: dict[str, Ranges] = {}
    for name in spec.bitmaps:
        assert isinstance(image, cowfence.Qcow2Disk)  # since _check
        if all(bitmap.name != name for bitmap in image.bitmaps):
            raise Invalid(f"Bitmap '{name}' is not found")
        check_bitmap_name(name)
        image.bitmaps.bits_of(name)  # raises where it is inconsistent
        found[name] = partial(_dirty_ranges, image, name, spec.offset)
    return found
