"""Convert a disk into a new image: raw or qcow2, plain or compressed, on all cores.

The target is made under a temporary name and gets its own when it is whole and durable: an interrupted conversion leaves
nothing under that name (``storage.publish``). A block device as a raw target is written in place. A pipe gets a qcow2 image in
two passes over the source, because the tables, which come first, tell where the data will be (``qcow2.bulk``).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from cowfence.chain import open_chain
from cowfence.disk.base import Disk
from cowfence.disk.opener import Refs, printable
from cowfence.disk.raw import RawDisk
from cowfence.errors import Invalid, NoSpace, Unsupported
from cowfence.ops.create import CreateOptions, backing_size, data_path, new_file, preallocate, settle, write_empty
from cowfence.ops.pieces import DiskSupply, How, Progress, Sink, Work
from cowfence.ops.sinks import DiskSink, QcowSink, RawSink
from cowfence.ops.streams import Qcow2Stream, RawStream
from cowfence.qcow2.describe import JsonValue
from cowfence.qcow2.image import Qcow2Disk
from cowfence.storage.base import Buffer
from cowfence.storage.file import FileStorage
from cowfence.storage.pipe import Nowhere, PipeWriter
from cowfence.storage.publish import NewFile

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import Secrets

__all__ = [
    "Converted",
    "How",
    "Opener",
    "Progress",
    "convert",
    "convert_disk",
    "convert_into",
    "convert_stream",
    "convert_to_pipe",
    "measure_conversion",
    "spooled",
    "takes_stream",
]

_BESIDE_US = os.path.join(os.curdir, "-")
"""Where the names in an image count from that goes into a pipe."""

Opener: TypeAlias = Callable[[bool], Qcow2Disk | RawDisk]


@dataclass(frozen=True, slots=True)
class Converted:
    """``data_bytes``: of the source, were written (before compression); the rest reads as zeros."""

    source: str
    target: str
    format: str
    size_bytes: int
    data_bytes: int
    unreadable: tuple[tuple[int, str], ...] = ()
    """Where the source could not be read (offset, why), and zeros were written instead."""

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "source": self.source,
            "target": self.target,
            "format": self.format,
            "virtual-size": self.size_bytes,
            "data": self.data_bytes,
            "unreadable": [offset for offset, _ in self.unreadable],
        }


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: CreateOptions,
    *,
    how: How | None = None,
    format: str = "qcow2",
    snapshot: str | None = None,
    refs: Refs | None = None,
    force_share: bool = False,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert the disk of ``source`` (or of one of its snapshots) into a new image at ``target``: see ``convert_disk``.

    Raises also as ``chain.open_chain`` does.
    """
    disk = open_chain(
        source,
        format=format,
        refs=refs,
        force_share=force_share,
        assume_backing_format=assume_backing_format,
        secrets=secrets,
        snapshot=snapshot,
    )
    try:
        return convert_disk(disk, os.fspath(source), target, options, how, progress=progress)
    finally:
        disk.close()


def convert_disk(
    disk: Disk,
    source: str,
    target: str | os.PathLike[str],
    options: CreateOptions,
    how: How | None = None,
    *,
    direct: bool = False,
    progress: Progress | None = None,
    before_publishing: Callable[[Opener], None] | None = None,
) -> Converted:
    """Convert an open disk into a new image at ``target``; ``source``: its name. ``direct``: the target goes around the page
    cache. ``before_publishing``: called with what opens the image (writable or not) when it is whole, and has no name yet; what
    it raises ends it all.

    ``options``: of the new image; its size is the source's. With a backing file in them only what the source holds itself, not
    what it has from its own backing file, goes into the new image: that file has to hold the same.

    Raises Invalid, Unsupported, NoSpace, and as ``storage.publish`` does; then nothing is left.
    """
    how = how or How()
    settled, supply = _begun(disk, target, options, how)
    work = Work(supply, how, progress)
    _into_new(work, target, settled, how, direct=direct, before_publishing=before_publishing)
    return _converted(source, os.fspath(target), options.format, supply, work)


def _into_new(
    work: Work,
    target: str | os.PathLike[str],
    settled: CreateOptions,
    how: How,
    *,
    direct: bool,
    before_publishing: Callable[[Opener], None] | None = None,
) -> None:
    with ExitStack() as files:
        new = files.enter_context(NewFile(target, direct=direct))
        data = None if settled.data_file is None else new_file(files, data_path(target, settled.data_file))
        work.run(_sink(new, data, settled, how))
        if settled.format == "qcow2":
            for file in (new, data):
                if file is not None:
                    preallocate(file.storage, settled.preallocation)
        if before_publishing is not None:
            before_publishing(partial(_open_made, new, data, settled))
        if data is not None:
            data.publish()
        new.publish()


def _open_made(new: NewFile, data: NewFile | None, settled: CreateOptions, writable: bool) -> Qcow2Disk | RawDisk:
    """The new image, in this process, which holds its lock."""
    refs = Refs.trust_all()
    if data is not None and settled.data_file is not None:
        files: dict[str, str | os.PathLike[str] | int] = {settled.data_file: data.path_now}
        if settled.backing is not None:
            files[settled.backing] = os.path.join(os.path.dirname(new.path_now), settled.backing)
        refs = Refs.explicit(files)
    secret = settled.secret
    secrets: Secrets | None = None if secret is None else lambda _: [secret]
    return open_chain(new.path_now, format=settled.format, writable=writable, lock=False, refs=refs, secrets=secrets)


def _converted(source: str, target: str, format_name: str, supply: DiskSupply, work: Work) -> Converted:
    return Converted(source, target, format_name, supply.size_bytes, work.data_bytes, supply.unreadable)


def _begun(disk: Disk, target: str | os.PathLike[str], options: CreateOptions, how: How) -> tuple[CreateOptions, DiskSupply]:
    """The options of the new image with all that is known now, and where its data comes from. Raises Invalid, Unsupported."""
    _check(how, options, os.fspath(target))
    settled = settle(target, replace(options, size_bytes=disk.size))
    return settled, DiskSupply(disk, how, below_bytes=_below_bytes(target, settled))


def _below_bytes(target: str | os.PathLike[str], settled: CreateOptions) -> int | None:
    if settled.backing is None or settled.backing_format is None:
        return None
    return backing_size(target, settled.backing, settled.backing_format, Refs.trust_all())


def convert_to_pipe(
    disk: Disk,
    source: str,
    fd: int,
    options: CreateOptions,
    how: How | None = None,
    *,
    progress: Progress | None = None,
) -> Converted:
    """Write an open disk as a new image into a descriptor that cannot seek, which stays the caller's. A qcow2 image takes two
    passes over the source, which must not change in between, and no space on any disk.

    Raises as ``convert_disk`` does, and StorageFailed where the reader has gone: what it got then is no image.
    """
    how = how or How()
    name = "standard output"
    if options.data_file is not None or options.preallocation != "off":
        raise Unsupported(name, "an external data file, or preallocation, of an image in a pipe")
    settled, supply = _begun(disk, _BESIDE_US, options, how)
    pipe = PipeWriter(fd, name)
    if settled.format == "raw":
        work = Work(supply, how, progress)
        work.run(RawSink(pipe, how, serial=True))
        return _converted(source, "-", "raw", supply, work)
    head = QcowSink(Nowhere(name), settled, how)
    # Places as the second pass will have them. Nothing is written, so nothing is to be held back.
    Work(supply, replace(how, in_order=True, rate_bytes=None), _part(progress, 0)).run(head)
    head.image.write_head(pipe)
    body = QcowSink(pipe, settled, how, head=head)
    work = Work(supply, how, _part(progress, 1))
    work.run(body)
    if not body.image.continues(head.image):
        raise Invalid(f"{printable(source)}: it has changed while it was read; what was written is no valid image")
    pipe.truncate(body.image.end_bytes, "create.size")
    return _converted(source, "-", "qcow2", supply, work)


def measure_conversion(
    disk: Disk, source: str, target: str, options: CreateOptions, how: How | None = None, *, progress: Progress | None = None
) -> tuple[Converted, int]:
    """What ``convert_disk`` would write, and the length that the image's file would have in bytes; reads the source as a
    conversion does, and writes nothing. Raises as ``convert_disk`` does."""
    how = replace(how or How(), rate_bytes=None)
    settled, supply = _begun(disk, target, options, how)
    work = Work(supply, how, progress)
    nowhere = Nowhere(target)
    work.run(RawSink(nowhere, how) if settled.format == "raw" else QcowSink(nowhere, settled, how, data=_data_nowhere(settled)))
    return _converted(source, target, settled.format, supply, work), nowhere.size_bytes


def _data_nowhere(settled: CreateOptions) -> Nowhere | None:
    return None if settled.data_file is None else Nowhere(settled.data_file)


def _part(progress: Progress | None, number: int) -> Progress | None:
    """The progress of one of two passes."""
    if progress is None:
        return None
    return lambda done, size: progress((number * size + done) // 2, size)


def convert_stream(
    stream: RawStream | Qcow2Stream,
    source: str,
    target: str | os.PathLike[str],
    options: CreateOptions,
    how: How | None = None,
    *,
    direct: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """As ``convert_disk``, from a disk that comes once. No backing file: what is below it cannot be compared.

    Raises Unsupported where the target wants pieces that are larger than the stream's, or its size beforehand: then it is
    to be converted in two steps (``spooled``).
    """
    how = how or How()
    _check(how, options, os.fspath(target))
    if options.backing is not None:
        raise Unsupported(printable(source), "a backing file of what is converted from a pipe")
    if not takes_stream(stream, options):
        raise Unsupported(printable(source), "this target for a pipe")
    settled = settle(target, replace(options, size_bytes=stream.known_bytes or 0))
    work = Work(stream, how, progress)
    _into_new(work, target, settled, how, direct=direct)
    return Converted(source, os.fspath(target), options.format, stream.size_bytes, work.data_bytes)


class _Bounded:
    """A file that takes so many bytes and no more."""

    def __init__(self, storage: FileStorage, limit_bytes: int) -> None:
        self.name = storage.name
        self._storage = storage
        self._left = limit_bytes
        self._limit_bytes = limit_bytes
        self._guard = threading.Lock()

    def writev(self, offset: int, buffers: Sequence[Buffer], mark: str) -> None:
        with self._guard:
            self._left -= sum(map(len, buffers))
            if self._left < 0:
                raise Invalid(
                    f"{self.name}: this target cannot be made of what comes once, and more than {self._limit_bytes} bytes "
                    "would have to be kept; allow more, or convert it from a file"
                )
        self._storage.writev(offset, buffers, mark)

    def truncate(self, size_bytes: int, mark: str) -> None:
        self._storage.truncate(size_bytes, mark)


def takes_stream(stream: RawStream | Qcow2Stream, options: CreateOptions) -> bool:
    """True if a new image with these options can be made of what comes once: its clusters have to come whole, and its length
    has to be known where space is allocated for all of it."""
    if options.format == "raw":
        return options.preallocation == "off"
    sized = stream.known_bytes is not None or (options.preallocation == "off" and options.data_file is None)
    return sized and options.cluster_bytes <= stream.whole_bytes


@contextmanager
def spooled(stream: RawStream | Qcow2Stream, how: How, *, limit_bytes: int) -> Iterator[RawDisk]:
    """The disk of a stream in a temporary file, as long as the block runs. ``limit_bytes``: of its data, without zeros.

    Raises Invalid where there is more, NoSpace, and what reading the stream does.
    """
    with tempfile.TemporaryFile() as file:
        storage = FileStorage.from_fd(os.dup(file.fileno()), "temporary file", writable=True)
        Work(stream, replace(how, rate_bytes=None), None).run(RawSink(_Bounded(storage, limit_bytes), how))
        disk = RawDisk(storage)
        try:
            yield disk
        finally:
            disk.close()


def convert_into(
    disk: Disk,
    source: str,
    target: Disk,
    name: str,
    format_name: str,
    how: How | None = None,
    *,
    progress: Progress | None = None,
) -> Converted:
    """Copy an open disk over an existing one, open for writing; ``name``: of its file. Zeros are written as zeros, unless it
    reads as zeros already. It is flushed at the end. Raises Invalid (it is smaller), NoSpace, and what reading and writing
    raise: then the target holds a part."""
    how = how or How()
    if target.size < disk.size:
        raise Invalid("Output file is smaller than input file")
    supply = DiskSupply(disk, how)
    work = Work(supply, how, progress)
    if not how.target_is_zero:
        _zero_gaps(disk, target)
    work.run(DiskSink(target, how))
    target.flush()
    return _converted(source, name, format_name, supply, work)


def _zero_gaps(disk: Disk, target: Disk) -> None:
    """What the source calls zeros. (What is behind its end stays, as it does in qemu-img.)"""
    for extent in disk.extents(0, disk.size):
        if extent.zero:
            target.zero(extent.start, extent.length_bytes)


def _check(how: How, options: CreateOptions, target: str) -> None:
    if options.size_bytes is not None:
        raise Invalid(f"{printable(target)}: a conversion takes the size from its source")
    if how.compress and (options.format != "qcow2" or options.data_file is not None):
        raise Invalid("Compression not supported for this file format")
    if how.compress and options.encryption is not None:
        raise Invalid("Compression and encryption not supported at the same time")
    if how.sparse_bytes < 0 or how.sparse_bytes % 512:
        raise Invalid("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512")
    if how.compress and options.preallocation != "off":
        raise Invalid("Compression and preallocation not supported at the same time")
    if options.backing is not None and options.preallocation != "off":
        raise Unsupported(printable(target), "preallocation over a backing file, which it would hide")


def _sink(new: NewFile, data: NewFile | None, settled: CreateOptions, how: How) -> Sink:
    size_bytes = settled.size_bytes
    assert size_bytes is not None  # since settle
    if settled.format == "raw":
        return _raw_sink(new, settled, size_bytes, how)
    if new.in_place:
        raise Unsupported(new.path, "a qcow2 image on a block device as the target of convert")
    if data is not None:
        data.storage.truncate(size_bytes, "create.size")
    return QcowSink(new.storage, settled, how, data=None if data is None else data.storage)


def _raw_sink(new: NewFile, settled: CreateOptions, size_bytes: int, how: How) -> Sink:
    """A device is made zero first, and keeps its length."""
    if not new.in_place:
        write_empty(new.storage, settled)
        return RawSink(new.storage, how)
    if settled.preallocation != "off":
        raise Unsupported(new.path, f"preallocation={settled.preallocation} of a block device")
    if new.storage.size() < size_bytes:
        raise NoSpace(f"{new.path}: the device has {new.storage.size()} bytes, {size_bytes} are needed")
    new.storage.zero(0, size_bytes, "convert.zero")
    return RawSink(new.storage, how, fixed=True)
