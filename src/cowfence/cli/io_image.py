"""The image that ``cowfence-io`` has open: how it was asked for, and its disk."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from cowfence.cli.formats import looked_at
from cowfence.cli.sources import CACHES, is_nbd, parse_source, secrets_for
from cowfence.disk.opener import Refs
from cowfence.errors import Invalid, Unsupported

if TYPE_CHECKING:
    from cowfence.disk.base import Disk
    from cowfence.ops.temporary import TemporaryOverlay

DISCARDS: Final = ("ignore", "off", "unmap", "on")


@dataclass(frozen=True, slots=True)
class Wish:
    """How an image is to be opened. ``name`` is a list of ``key=value`` where ``described``."""

    name: str
    format: str | None = None
    described: bool = False
    writable: bool = True
    temporary: bool = False
    cache: str = "writeback"
    discard: str = "unmap"
    force_share: bool = False


class Image:
    """An open image. ``-s`` writes into an overlay, which is there as long as it is open."""

    def __init__(self, wish: Wish, arguments: argparse.Namespace) -> None:
        """Raises as ``cowfence.open`` does, Invalid and Unsupported for what cannot be asked for."""
        check_cache(wish.cache)
        if wish.discard not in DISCARDS:
            raise Invalid(f"Invalid discard option: {wish.discard}")
        self.wish = wish
        self.discards = wish.discard in ("unmap", "on")
        self._arguments = arguments
        self._overlay: TemporaryOverlay | None = None
        source = parse_source(wish.name, image_opts=wish.described)
        self._source = source
        self.path = source.name
        self.format = source.format or wish.format
        if is_nbd(source):
            self.disk: Disk = self._open_nbd()
            return
        if self.format is None:
            self.format = looked_at(self.path, arguments, writes=wish.writable and not wish.temporary)
        self.disk = self._open_overlay() if wish.temporary else self._open_file(self.path, self.format)

    def _open_nbd(self) -> Disk:
        from cowfence.nbd.client import NbdDisk

        if self.format not in (None, "raw") or self.wish.temporary:
            raise Unsupported(self.path, "a format, or -s, behind NBD; let the server do that")
        self.format = "raw"
        return NbdDisk(self.path, reconnect_seconds=self._source.reconnect_seconds or 0.0)

    def _open_file(self, path: str, format_name: str, refs: Refs | None = None) -> Disk:
        import cowfence
        from cowfence.qcow2.image import CacheMode

        wish = self.wish
        opened = partial(
            cowfence.open,
            path,
            format=format_name,
            writable=wish.writable,
            refs=refs,
            direct=wish.cache in ("none", "directsync"),
            force_share=wish.force_share,
            secret=secrets_for(self._source, self._arguments),
        )
        if format_name != "qcow2":
            return opened()
        return opened(mode=CacheMode(_MODES[wish.cache]), discards=self.discards, commit_interval=None)

    def _open_overlay(self) -> Disk:
        """What is written goes into a file that nobody will see again."""
        from cowfence.ops.temporary import TemporaryOverlay

        assert self.format is not None  # since it was looked at
        self._overlay = TemporaryOverlay(self.path, self.format)
        try:
            return self._open_file(self._overlay.path, "qcow2", self._overlay.refs)
        except BaseException:
            self._overlay.close()
            raise

    def close(self) -> None:
        """Flush and release. Raises what that raises."""
        try:
            self.disk.close()
        finally:
            if self._overlay is not None:
                self._overlay.close()


_MODES: Final = {
    "none": "writeback",
    "writeback": "writeback",
    "writethrough": "writethrough",
    "directsync": "writethrough",
    "unsafe": "unsafe",
}


def check_cache(cache: str) -> None:
    if cache not in CACHES:
        raise Invalid(f"Invalid cache option: {cache}")
