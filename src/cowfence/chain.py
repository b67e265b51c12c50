"""An image over its backing files.

The caller names one file, and its format; every further file is named by an image, which is data that anyone may have written.
So each goes through the policy of references (``disk.opener``), and:

- The format of a backing file is the one that the image records, and is obeyed: "raw" is raw, even if the file begins with the
  magic string of qcow2, which a guest can write. There is no probing here. An image that records no format is refused, unless
  the caller says what to assume.
- Backing files are opened for reading, and locked as readers, so that nobody changes them below us; ``force_share`` leaves both
  the image and its backing files to others.
- A chain is at most 32 files deep, and no file stands in it twice.

What was opened before something failed is closed again.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, overload

from cowfence.disk.base import Disk
from cowfence.disk.opener import Identity, OpenFile, Place, Refs, printable
from cowfence.disk.raw import RawDisk
from cowfence.errors import Invalid, Refused, Unsupported
from cowfence.qcow2.describe import probe
from cowfence.qcow2.extensions import Incompatible
from cowfence.qcow2.header import CRYPT_AES, Header, check_supported, read_header
from cowfence.qcow2.image import CacheMode, Options, Qcow2Disk, open_image
from cowfence.qcow2.journal import Journal
from cowfence.storage.base import Storage, read_exact
from cowfence.storage.file import FileStorage
from cowfence.storage.host import go_direct
from cowfence.storage.locks import ImageLock
from cowfence.storage.overlay import OverlayStorage
from cowfence.units import SECTOR_BYTES

if TYPE_CHECKING:
    from cowfence.qcow2.encryption import Secrets
    from cowfence.storage.rehearsal import Rehearsal

__all__ = ["FORMATS", "Format", "backing_format_of", "check_format", "lock_reference", "open_chain", "probe"]

Format: TypeAlias = Literal["qcow2", "raw", "luks"]
_log = logging.getLogger(__name__)

FORMATS: Final[tuple[Format, ...]] = ("qcow2", "raw", "luks")
"""What is opened. (LUKS: a raw disk that is encrypted as a whole.)"""


@overload
def open_chain(
    path: str | os.PathLike[str],
    *,
    format: Literal["qcow2"] = "qcow2",
    writable: bool = False,
    refs: Refs | None = None,
    options: Options | None = None,
    lock: bool = True,
    force_share: bool = False,
    allow_devices: bool = True,
    direct: bool = False,
    direct_backing: bool = False,
    backing: bool = True,
    assume_backing_format: str | None = None,
    keeper: bool = False,
    snapshot: str | None = None,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
) -> Qcow2Disk: ...


@overload
def open_chain(
    path: str | os.PathLike[str],
    *,
    format: str,
    writable: bool = False,
    refs: Refs | None = None,
    options: Options | None = None,
    lock: bool = True,
    force_share: bool = False,
    allow_devices: bool = True,
    direct: bool = False,
    direct_backing: bool = False,
    backing: bool = True,
    assume_backing_format: str | None = None,
    keeper: bool = False,
    snapshot: str | None = None,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
) -> Qcow2Disk | RawDisk: ...


def open_chain(
    path: str | os.PathLike[str],
    *,
    format: str = "qcow2",
    writable: bool = False,
    refs: Refs | None = None,
    options: Options | None = None,
    lock: bool = True,
    force_share: bool = False,
    allow_devices: bool = True,
    direct: bool = False,
    direct_backing: bool = False,
    backing: bool = True,
    assume_backing_format: str | None = None,
    keeper: bool = False,
    snapshot: str | None = None,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
) -> Qcow2Disk | RawDisk:
    """Open the image at ``path``, of the given format, and the backing files that it names.

    ``refs``: which files may be opened because an image names them (default: those under the image's own directory).
    ``lock`` and ``force_share``: see ``storage.locks``; they hold for the backing files too. ``allow_devices``: the image may
    be a block device (for backing files ``refs`` decides). ``direct``: the image itself goes around the page cache;
    ``direct_backing``: backing files, which others may share, do too. ``backing=False`` opens no backing file: what the image
    does not hold then reads as zeros, which is for looking at the image, not at the guest's disk. ``assume_backing_format``:
    for images that record none; without it they are refused. ``keeper``: a small process beside ours completes what is pending
    if we are killed (see ``cowfence.keeper``); for a locked qcow2 image that is open for writing, and not in unsafe mode.
    ``snapshot``: the disk as it was when this internal snapshot (by id, or else by name) was taken; for reading. ``secrets``:
    passphrases of encrypted images, asked for by the name of the file. ``rehearsal``: files are opened for reading, and what
    would be written is kept there.

    Raises NotThisFormat (the file is not what ``format`` says), Unsupported, Corrupt, Refused (the policy), Locked, ReadOnly
    (marked corrupt), Invalid (no regular file), StorageFailed. The message names the file.
    """
    name = printable(os.fspath(path))
    check_format(format, name)
    if assume_backing_format is not None:
        check_format(assume_backing_format, name)
    options = options or Options()
    if keeper and (format != "qcow2" or not writable or not lock or rehearsal or options.mode is CacheMode.UNSAFE):
        raise Invalid(f"{name}: a keeper is for a locked qcow2 image that is open for writing and not in unsafe mode")
    if snapshot is not None and (format != "qcow2" or writable):
        raise Invalid(f"{name}: an internal snapshot is read from a qcow2 image, and never written")
    file = FileStorage.open(
        path,
        writable=writable and rehearsal is None,
        direct=direct,
        lock=lock,
        force_share=force_share,
        allow_devices=allow_devices,
    )
    storage = file if rehearsal is None or not writable else rehearsal.over(file)
    try:
        if format != "qcow2":
            return _open_plain(storage, format, secrets)
        way = _Way(
            refs=Refs.beside(path) if refs is None else refs,
            options=options,
            lock=lock,
            force_share=force_share,
            assume_format=assume_backing_format,
            direct=direct_backing,
            secrets=secrets,
            rehearsal=rehearsal,
        )
        return _open_qcow2(
            storage,
            Place.of_top(file.fileno(), path, name),
            way,
            writable=writable,
            backing=backing,
            direct=direct,
            keeper=keeper,
            snapshot=snapshot,
        )
    except BaseException:
        storage.close()
        raise


def check_format(name: str, image: str) -> None:
    """Raises Unsupported for a format other than qcow2 and raw; ``image`` is for the message."""
    if name not in FORMATS:
        raise Unsupported(image, f"image format {name!a}; cowfence opens qcow2, raw and luks")


def backing_format_of(header: Header, image: str, assume_format: str | None) -> Format:
    """The format that the image at ``image`` records for its backing file, or else the assumed one. Never a guess.

    Raises Refused where there is neither, Unsupported for another format than qcow2 and raw.
    """
    recorded = header.backing_format or assume_format
    if recorded is None:
        raise Refused(
            printable(header.backing_file or ""),
            f"{image} does not record the format of this backing file, and guessing it is unsafe; "
            "add --assume-backing-format qcow2 or raw",
        )
    if recorded not in FORMATS:
        raise Unsupported(image, f"backing file format {recorded!a}; cowfence opens qcow2, raw and luks")
    return next(known for known in FORMATS if known == recorded)


@dataclass(frozen=True, slots=True)
class _Way:
    """How the files of one chain are opened; ``direct``: backing files around the page cache."""

    refs: Refs
    options: Options
    lock: bool
    force_share: bool
    assume_format: str | None
    direct: bool = False
    secrets: Secrets | None = None
    target: _Target | None = None
    rehearsal: Rehearsal | None = None

    def lock_reference(self, opened: OpenFile, *, writable: bool) -> Storage:
        """The storage of a file that the policy opened; writable in the rehearsal, where there is one."""
        rehearsal = self.rehearsal if writable else None
        storage = lock_reference(opened, lock=self.lock, force_share=self.force_share, writable=writable and rehearsal is None)
        return storage if rehearsal is None else rehearsal.over(storage)


@dataclass(slots=True)
class _Target:
    """The backing file that is opened for writing. ``identity``: None for the first one."""

    identity: Identity | None
    disk: Qcow2Disk | RawDisk | None = None

    def is_at(self, place: Place) -> bool:
        if self.disk is not None:
            return False
        return place.depth == 1 if self.identity is None else place.chain[-1] == self.identity


def _open_qcow2(
    storage: Storage,
    place: Place,
    way: _Way,
    *,
    writable: bool,
    backing: bool = True,
    direct: bool = False,
    keeper: bool = False,
    snapshot: str | None = None,
) -> Qcow2Disk:
    """The image in ``storage``, which stays the caller's if this fails, over what it names."""
    header = read_header(storage)
    # An image that cannot be read must not make us open anything.
    check_supported(header, storage.name)
    if header.crypt_method == CRYPT_AES and way.secrets is not None:
        _log.warning("%s: the AES encryption of qcow2 is weak, and kept for old images only; convert it to LUKS", storage.name)
    below: Disk | None = None
    data: Storage | None = None
    journal: Journal | None = None
    try:
        if header.incompatible & Incompatible.DATA_FILE:
            data = _open_data(header.data_file, place, way, writable=writable, direct=direct)
        if backing and header.backing_file is not None:
            below = _open_backing(header.backing_file, backing_format_of(header, place.name, way.assume_format), place, way)
        if keeper:
            from cowfence.keeper.start import start_keeper  # Starting processes is a heavy module, and seldom asked for.

            assert isinstance(storage, FileStorage)  # since a rehearsal has no keeper
            assert data is None or isinstance(data, FileStorage)
            journal = start_keeper(storage, data)
        return open_image(
            storage,
            backing=below,
            data=data,
            writable=writable,
            options=way.options,
            journal=journal,
            snapshot=snapshot,
            secrets=way.secrets,
        )
    except BaseException:
        for opened in (journal, below, data):
            if opened is not None:
                opened.close()
        raise


def _open_plain(storage: Storage, format_name: str, secrets: Secrets | None) -> RawDisk:
    """A disk without tables, which may be encrypted as a whole. Raises Corrupt, Unsupported, Invalid (its secret)."""
    if format_name == "raw":
        return RawDisk(storage)
    from cowfence.codec.luks import cipher_of
    from cowfence.qcow2.encryption import named, read_luks_file, unlocked
    from cowfence.storage.encrypted import EncryptedStorage

    name = storage.name
    luks = read_luks_file(storage)
    if secrets is None:
        raise Invalid(f"{name}: the image is encrypted, and its secret was not given")

    def read(offset: int, length_bytes: int) -> bytes:
        return bytes(read_exact(storage, offset, length_bytes, "key material"))

    with named(name):
        _, key = unlocked(luks, read, secrets(name), name)
        return RawDisk(EncryptedStorage(storage, cipher_of(luks, key), luks.payload_sector * SECTOR_BYTES))


def _open_data(reference: str | None, place: Place, way: _Way, *, writable: bool, direct: bool) -> Storage:
    """The external data file of the image at ``place``. Raises Refused where the image does not name it, or names what the
    policy does not allow."""
    kind = "external data file"
    if reference is None:
        raise Refused(place.name, f"the image has an {kind}, but does not name it")
    opened = way.refs.follow(reference, place, kind=kind, writable=writable and way.rehearsal is None)
    if direct:
        _go_direct(opened)
    return way.lock_reference(opened, writable=writable)


def _go_direct(opened: OpenFile) -> None:
    try:
        go_direct(opened.fd, opened.name)
    except BaseException:
        os.close(opened.fd)
        raise


def _open_backing(reference: str, format_name: Format, place: Place, way: _Way) -> Qcow2Disk | RawDisk:
    opened = way.refs.follow(reference, place)
    writable = way.target is not None and way.target.is_at(opened.place)
    if writable and way.rehearsal is None:
        os.close(opened.fd)
        opened = way.refs.follow(reference, place, writable=True)
    if way.direct:
        _go_direct(opened)
    storage = way.lock_reference(opened, writable=writable)
    try:
        if format_name == "qcow2":
            disk: Qcow2Disk | RawDisk = _open_qcow2(storage, opened.place, way, writable=writable, direct=way.direct)
        else:
            disk = _open_plain(storage, format_name, way.secrets)
    except BaseException:
        storage.close()
        raise
    if writable and way.target is not None:
        way.target.disk = disk
    return disk


def open_backing(
    image: Qcow2Disk,
    path: str | os.PathLike[str],
    reference: str,
    format_name: str,
    *,
    refs: Refs | None = None,
    direct: bool = False,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
) -> Qcow2Disk | RawDisk:
    """Open ``reference`` as what the open image at ``path`` would stand over, and what it names in turn.

    ``refs``: default: trusted, because the caller names it. ``direct``: around the page cache. Raises as ``open_chain`` does.
    """
    check_format(format_name, printable(reference))
    file = image.storage.inner if isinstance(image.storage, OverlayStorage) else image.storage
    assert isinstance(file, FileStorage)
    way = _Way(
        refs=refs or Refs.trust_all(),
        options=Options(),
        lock=True,
        force_share=False,
        assume_format=assume_backing_format,
        direct=direct,
        secrets=secrets,
    )
    place = Place.of_top(file.fileno(), path, printable(os.fspath(path)))
    return _open_backing(reference, next(known for known in FORMATS if known == format_name), place, way)


def open_for_commit(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    direct: bool = False,
    refs: Refs | None = None,
    assume_backing_format: str | None = None,
    secrets: Secrets | None = None,
    rehearsal: Rehearsal | None = None,
    options: Options | None = None,
) -> tuple[Qcow2Disk, Qcow2Disk | RawDisk]:
    """Open the qcow2 image at ``path`` and its backing files, one of them for writing, too: the first, or the file ``base``.
    ``direct``: all of them around the page cache.

    The disk of the image owns all of them. ``rehearsal``, ``options``: see ``open_chain``. Raises Invalid where there is no
    such backing file, and as ``open_chain`` does.
    """
    name = printable(os.fspath(path))
    identity: Identity | None = None
    if base is not None:
        try:
            found = os.stat(base)
        except OSError:
            found = None
        if found is None:
            raise Invalid(f"Did not find '{printable(os.fspath(base))}' in the backing chain of '{name}'")
        identity = (found.st_dev, found.st_ino)
    target = _Target(identity)
    file = FileStorage.open(path, writable=rehearsal is None, direct=direct)
    storage = file if rehearsal is None else rehearsal.over(file)
    try:
        way = _Way(
            refs=Refs.beside(path) if refs is None else refs,
            options=options or Options(commit_interval=None),
            lock=True,
            force_share=False,
            assume_format=assume_backing_format,
            direct=direct,
            secrets=secrets,
            target=target,
            rehearsal=rehearsal,
        )
        disk = _open_qcow2(storage, Place.of_top(file.fileno(), path, name), way, writable=True, direct=direct)
    except BaseException:
        storage.close()
        raise
    if target.disk is None:
        disk.close()
        if base is None:
            raise Invalid("Image does not have a backing file")
        raise Invalid(f"Did not find '{printable(os.fspath(base))}' in the backing chain of '{name}'")
    return disk, target.disk


def lock_reference(
    opened: OpenFile, *, name: str | None = None, lock: bool, force_share: bool, writable: bool = False
) -> FileStorage:
    """The storage of a file that the policy opened, locked as a reader, or as a writer. Takes the descriptor over, also when it
    fails."""
    held: ImageLock | None = None
    shown = opened.name if name is None else name
    try:
        if lock:
            held = ImageLock.acquire(opened.fd, shown, writable=writable, force_share=force_share)
        return FileStorage.from_fd(opened.fd, shown, writable=writable, lock=held)
    except BaseException:
        if held is not None:
            # Closing is not enough: a descriptor that the caller provided shares the lock with the one that he keeps.
            held.release()
        os.close(opened.fd)
        raise
