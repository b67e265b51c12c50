"""cowfence: a crash-safe QCOW2 engine.

The public API, imported when it is used: ``import cowfence`` alone costs next to nothing, and numpy is loaded by the first
image that is opened.

    with cowfence.open("disk.qcow2", writable=True) as disk:
        disk.write(0, b"hello")
        disk.flush()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final, Literal, overload

if TYPE_CHECKING:
    import os

    from cowfence.chain import open_chain
    from cowfence.codec.luks import NewLuks
    from cowfence.disk.base import BLOCKED, Disk, Outcome, Request, Verb
    from cowfence.disk.opener import Refs
    from cowfence.disk.raw import RawDisk
    from cowfence.errors import (
        Closed,
        Corrupt,
        CowfenceError,
        Invalid,
        Locked,
        NoSpace,
        NotThisFormat,
        OutOfRange,
        ReadOnly,
        Refused,
        StorageFailed,
        Unsupported,
        WouldBlock,
    )
    from cowfence.extents import Extent
    from cowfence.ops.snapshot import apply_snapshot, create_snapshot, delete_snapshot
    from cowfence.qcow2.describe import ImageInfo
    from cowfence.qcow2.encryption import Secrets
    from cowfence.qcow2.image import CacheMode, Options, Qcow2Disk
    from cowfence.qcow2.snapshot_table import Snapshot

__version__ = "0.1.0"

__all__ = [
    "BLOCKED",
    "CacheMode",
    "Closed",
    "Corrupt",
    "CowfenceError",
    "Disk",
    "Extent",
    "ImageInfo",
    "Invalid",
    "Locked",
    "NoSpace",
    "NotThisFormat",
    "Options",
    "OutOfRange",
    "Outcome",
    "Qcow2Disk",
    "RawDisk",
    "ReadOnly",
    "Refs",
    "Refused",
    "Request",
    "Snapshot",
    "StorageFailed",
    "Unsupported",
    "Verb",
    "WouldBlock",
    "__version__",
    "apply_snapshot",
    "create",
    "create_snapshot",
    "delete_snapshot",
    "open",
    "open_chain",
]

_HOMES: Final = {
    "cowfence.chain": ("open_chain",),
    "cowfence.disk.base": ("BLOCKED", "Disk", "Outcome", "Request", "Verb"),
    "cowfence.disk.opener": ("Refs",),
    "cowfence.disk.raw": ("RawDisk",),
    "cowfence.errors": (
        "Closed",
        "Corrupt",
        "CowfenceError",
        "Invalid",
        "Locked",
        "NoSpace",
        "NotThisFormat",
        "OutOfRange",
        "ReadOnly",
        "Refused",
        "StorageFailed",
        "Unsupported",
        "WouldBlock",
    ),
    "cowfence.extents": ("Extent",),
    "cowfence.ops.snapshot": ("apply_snapshot", "create_snapshot", "delete_snapshot"),
    "cowfence.qcow2.describe": ("ImageInfo",),
    "cowfence.qcow2.image": ("CacheMode", "Options", "Qcow2Disk"),
    "cowfence.qcow2.snapshot_table": ("Snapshot",),
}
_HOME_OF: Final = {name: module for module, names in _HOMES.items() for name in names}
_CACHE_BYTES: Final = 32 << 20

if not TYPE_CHECKING:  # a type checker would take it for "any name is there"

    def __getattr__(name: str) -> object:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module 'cowfence' has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


@overload
def open(
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    format: Literal["qcow2"] = "qcow2",
    refs: Refs | None = None,
    cache_bytes: int = _CACHE_BYTES,
    mode: CacheMode | Literal["writeback", "writethrough", "unsafe"] = "writeback",
    commit_interval: float | None = 5.0,
    discards: bool = True,
    lock: bool = True,
    force_share: bool = False,
    direct: bool = False,
    backing: bool = True,
    assume_backing_format: str | None = None,
    keeper: bool = False,
    snapshot: str | None = None,
    secret: bytes | Secrets | None = None,
) -> Qcow2Disk: ...


@overload
def open(
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    format: str,
    refs: Refs | None = None,
    cache_bytes: int = _CACHE_BYTES,
    mode: CacheMode | Literal["writeback", "writethrough", "unsafe"] = "writeback",
    commit_interval: float | None = 5.0,
    discards: bool = True,
    lock: bool = True,
    force_share: bool = False,
    direct: bool = False,
    backing: bool = True,
    assume_backing_format: str | None = None,
    keeper: bool = False,
    snapshot: str | None = None,
    secret: bytes | Secrets | None = None,
) -> Qcow2Disk | RawDisk: ...


def open(
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    format: str = "qcow2",
    refs: Refs | None = None,
    cache_bytes: int = _CACHE_BYTES,
    mode: CacheMode | Literal["writeback", "writethrough", "unsafe"] = "writeback",
    commit_interval: float | None = 5.0,
    discards: bool = True,
    lock: bool = True,
    force_share: bool = False,
    direct: bool = False,
    backing: bool = True,
    assume_backing_format: str | None = None,
    keeper: bool = False,
    snapshot: str | None = None,
    secret: bytes | Secrets | None = None,
) -> Qcow2Disk | RawDisk:
    """Open an image and its backing files as one disk; a context manager. Read-only unless ``writable``.

    ``format``: "qcow2" or "raw"; never guessed, because a guest can make a raw disk look like qcow2. ``refs``: which files may
    be opened because the image names them (default: those under its own directory); ``Refs.none()`` for untrusted images.
    ``mode``: when a write is durable: "writeback" at the next flush, "writethrough" when it returns, "unsafe" never for sure.
    ``commit_interval``: seconds after which an idle guest's writes are committed; None: never on their own. ``discards``: give
    the host what the guest discards. ``lock``, ``force_share``: image locks as QEMU takes them; forced sharing reads beside a
    writer. ``direct``: around the page cache. ``cache_bytes``: of tables in memory. ``backing``, ``assume_backing_format``: see
    ``open_chain``. ``keeper``: a small process beside this one completes what is not committed if this one is killed, so that
    no write that returned is lost; for qcow2 images open for writing, not in unsafe mode. ``snapshot``: the disk as it was when
    an internal snapshot (by id, or else by name) was taken; for reading. ``secret``: the passphrase of encrypted images, or a
    function that returns some to be tried, told the name of the file; without it they open, and their data does not. Those
    about caching and commits (``cache_bytes`` to ``discards``) are for qcow2; of a raw image Invalid is raised where they are
    given.

    Raises NotThisFormat, Unsupported, Corrupt, Refused, Locked, ReadOnly, Invalid, StorageFailed.
    """
    from cowfence.chain import open_chain
    from cowfence.errors import Invalid
    from cowfence.qcow2.image import CacheMode, Options

    try:
        cache_mode = CacheMode(mode)
    except ValueError:
        raise Invalid(f"mode is {mode!r}, must be one of {', '.join(repr(known.value) for known in CacheMode)}") from None
    if cache_bytes <= 0 or (commit_interval is not None and commit_interval <= 0):
        raise Invalid("cache_bytes and commit_interval must be greater than 0")
    options = Options(cache_bytes=cache_bytes, mode=cache_mode, commit_interval=commit_interval, discards=discards)
    if format == "raw" and options != Options():
        raise Invalid("cache_bytes, mode, commit_interval and discards are for qcow2; a raw image has none of them")
    return open_chain(
        path,
        format=format,
        writable=writable,
        refs=refs,
        options=options,
        lock=lock,
        force_share=force_share,
        direct=direct,
        backing=backing,
        assume_backing_format=assume_backing_format,
        keeper=keeper,
        snapshot=snapshot,
        secrets=_secrets(secret),
    )


def _secrets(secret: bytes | Secrets | None) -> Secrets | None:
    return (lambda _: [secret]) if isinstance(secret, bytes) else secret


def create(
    path: str | os.PathLike[str],
    size: int | None = None,
    *,
    cluster_size: int = 65536,
    refcount_bits: int = 16,
    version: int = 3,
    backing: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    compression_type: Literal["zlib", "zstd"] = "zlib",
    extended_l2: bool = False,
    data_file: str | None = None,
    data_file_raw: bool = False,
    encryption: NewLuks | None = None,
    secret: bytes | None = None,
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off",
    refs: Refs | None = None,
) -> Qcow2Disk:
    """Create a qcow2 image and return its disk, open for writing. Sizes in bytes; a file of this name is replaced.

    ``backing``: the name to store, relative to the new image's directory, with its ``backing_format`` ("qcow2" or "raw"); then
    ``size`` may be None, for that of the backing file. ``refs``: the policy by which that is opened, as in ``open``.
    ``data_file``: the name of a file for the guest's data, which is made (or replaced), too; ``data_file_raw``: it can be read
    by itself. ``encryption``: it is encrypted with LUKS, and ``secret`` opens it.

    Raises Invalid (options that make no image), Refused, Locked (the file to replace is in use), NoSpace, StorageFailed; then
    what stood at the path still does.
    """
    from cowfence.disk.opener import Refs
    from cowfence.ops import create as ops

    policy = Refs.beside(path) if refs is None else refs
    options = ops.CreateOptions(
        size_bytes=size,
        cluster_bytes=cluster_size,
        refcount_bits=refcount_bits,
        version=version,
        backing=backing,
        backing_format=backing_format,
        lazy_refcounts=lazy_refcounts,
        compression_type=compression_type,
        extended_l2=extended_l2,
        data_file=data_file,
        data_file_raw=data_file_raw,
        encryption=encryption,
        secret=secret,
        preallocation=preallocation,
    )
    ops.create(path, options, refs=policy)
    return open(path, writable=True, refs=policy, secret=secret)
