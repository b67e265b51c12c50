"""One verdict on an image that somebody else made: may it be used, and what is in it.

Opens exactly one file unless ``refs`` allows more. Everything is looked at that an engine would follow later: the header, every
table, every refcount. A *reason* is why the image is not accepted; a *feature* is something that it has, for who can decide by
that; a *note* is harmless.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cowfence.errors import Corrupt, CowfenceError, Invalid, NotThisFormat, Unsupported
from cowfence.qcow2.extensions import Autoclear, Compatible, Incompatible
from cowfence.qcow2.header import COMPRESSION_ZSTD, Header, check_bounds, check_overlaps, check_supported, read_header
from cowfence.qcow2.verify import verify
from cowfence.storage.base import Storage
from cowfence.storage.file import FileStorage

if TYPE_CHECKING:
    from cowfence.disk.opener import Refs
    from cowfence.qcow2.describe import JsonValue

_MAGICS: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)
"""What a raw disk must not begin with: another program would take it for something that leads to other files."""
_MOST_FINDINGS: Final = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What is accepted, in bytes; None: anything."""

    virtual_bytes: int | None = None
    file_bytes: int | None = None


@dataclass
class Verdict:
    """``accepted``: nothing stands against it. ``format``: what it is; "unknown" if that cannot be said."""

    filename: str
    format: str
    virtual_bytes: int | None = None
    file_bytes: int | None = None
    reasons: list[str] = field(default_factory=list)
    features: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    backing_filename: str | None = None
    data_filename: str | None = None

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "filename": self.filename,
            "verdict": "accepted" if self.accepted else "refused",
            "format": self.format,
            "virtual-size": self.virtual_bytes,
            "file-size": self.file_bytes,
            "reasons": list(self.reasons),
            "features": list(self.features),
            "notes": list(self.notes),
            "backing-filename": self.backing_filename,
            "data-filename": self.data_filename,
        }


def inspect(
    path: str | os.PathLike[str], *, format: str | None = None, limits: Limits | None = None, refs: Refs | None = None
) -> Verdict:
    """The verdict on the file at ``path``. ``format``: what its owner says that it is ("qcow2", "raw"); None: he says nothing,
    and then it has to be qcow2. ``refs``: which other files it may name (default: none).

    Raises Invalid (no regular file, another format was asked for), Locked, StorageFailed: then nothing is known of the image.
    """
    if format not in (None, "qcow2", "raw"):
        raise Invalid(f"inspecting images of the format {format!a}; here are qcow2 and raw")
    limits = limits or Limits()
    storage = FileStorage.open(path, allow_devices=False)
    try:
        verdict = Verdict(os.fspath(path), "unknown", file_bytes=storage.size())
        if limits.file_bytes is not None and storage.size() > limits.file_bytes:
            verdict.reasons.append(f"the file has {storage.size()} bytes; at most {limits.file_bytes} are accepted")
        looks = _looks(storage)
        if format == "raw":
            _inspect_raw(storage, verdict, looks)
        elif looks != "qcow2":
            verdict.reasons.append(f"it is not qcow2: {'it looks like ' + looks if looks else 'the magic string is missing'}")
        else:
            verdict.format = "qcow2"
            _inspect_qcow2(storage, verdict)
    finally:
        storage.close()
    if limits.virtual_bytes is not None and (verdict.virtual_bytes or 0) > limits.virtual_bytes:
        verdict.reasons.append(f"the disk has {verdict.virtual_bytes} bytes; at most {limits.virtual_bytes} are accepted")
    _inspect_references(path, verdict, refs)
    return verdict


def _looks(storage: Storage) -> str | None:
    start = bytearray(4096)
    got = storage.readv(0, (start,))
    return next((name for at, magic, name in _MAGICS if start[:got][at : at + len(magic)] == magic), None)


def _inspect_raw(storage: Storage, verdict: Verdict, looks: str | None) -> None:
    if looks is not None:
        verdict.reasons.append(f"it is said to be raw, and begins as {looks} does: who probes it would follow what it says")
    verdict.format = "raw"
    verdict.virtual_bytes = storage.size()
    if storage.size() % 512:
        verdict.notes.append("its size is no multiple of 512 bytes")


def _inspect_qcow2(storage: Storage, verdict: Verdict) -> None:
    try:
        header = read_header(storage)
        verdict.virtual_bytes = header.size_bytes
        _list_features(header, verdict)
        check_supported(header, storage.name)
        check_bounds(header, storage.size(), storage.name)
        check_overlaps(header, storage.name)
        report = verify(storage, header)
    except (Corrupt, Unsupported, NotThisFormat) as error:
        verdict.reasons.append(_without_name(str(error), storage.name))
        return
    bad = [finding for finding in report.findings if finding.grade.name == "FATAL"]
    verdict.reasons += [f"damaged: {finding}" for finding in bad[:_MOST_FINDINGS]]
    if report.fatal > _MOST_FINDINGS:
        verdict.reasons.append(f"damaged: {report.fatal} findings in all")
    elif report.fatal and not bad:
        verdict.reasons.append(f"damaged: {report.fatal} findings")
    if not report.complete and not report.fatal:
        verdict.reasons.append("damaged: parts of it cannot be read")
    if report.leaks:
        verdict.notes.append(f"{report.leaks} leaked clusters")
    if report.harmless:
        verdict.notes.append(f"{report.harmless} flags that are wrong without harm")
    if report.compressed_clusters:
        verdict.features.append("compressed clusters")


def _list_features(header: Header, verdict: Verdict) -> None:
    """Honest about every feature; against the image stand only those that are no longer sound."""
    verdict.features.append(f"version {header.version}")
    if header.backing_name is not None:
        verdict.backing_filename = header.backing_name.decode("utf-8", "backslashreplace")
        verdict.features.append("backing file")
    if header.incompatible & Incompatible.DATA_FILE:
        verdict.data_filename = header.data_file
        verdict.features.append("external data file")
    if header.crypt_method:
        verdict.features.append("encryption")
        verdict.notes.append("what is encrypted cannot be looked at")
    if header.incompatible & Incompatible.EXTENDED_L2:
        verdict.features.append("extended L2 entries")
    if header.compression_type == COMPRESSION_ZSTD:
        verdict.features.append("compression with zstd")
    if header.compatible & Compatible.LAZY_REFCOUNTS:
        verdict.features.append("lazy refcounts")
    if header.autoclear & Autoclear.BITMAPS:
        verdict.features.append("persistent bitmaps")
    if header.snapshot_count:
        verdict.features.append(f"{header.snapshot_count} internal snapshots")
    if header.incompatible & Incompatible.DIRTY:
        verdict.notes.append("it was not closed cleanly; its refcounts are to be rebuilt")
    if header.incompatible & Incompatible.CORRUPT:
        verdict.reasons.append("it is marked corrupt")


def _inspect_references(path: str | os.PathLike[str], verdict: Verdict, refs: Refs | None) -> None:
    """Other files that the image wants, held against the policy."""
    named = [("backing file", verdict.backing_filename), ("external data file", verdict.data_filename)]
    for kind, name in named:
        if name is not None and refs is None:
            verdict.reasons.append(f"it names a {kind}, {name!a}: names in an image are somebody else's")
    if refs is None or verdict.reasons or all(name is None for _, name in named):
        return
    from cowfence.chain import open_chain

    try:
        open_chain(path, refs=refs).close()
    except CowfenceError as error:
        verdict.reasons.append(_without_name(str(error), os.fspath(path)))


def _without_name(text: str, name: str) -> str:
    return text.removeprefix(f"{name}: ")
