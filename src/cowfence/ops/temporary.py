"""A temporary image over another, for what shall be written and forgotten."""

from __future__ import annotations

import os
import tempfile

from cowfence.disk.opener import Refs
from cowfence.errors import StorageFailed, Unsupported
from cowfence.ops.create import CreateOptions, create


class TemporaryOverlay:
    """An image over the one at ``path``, of format ``format``, in a directory of its own until ``close``.

    ``path`` and ``refs`` are what to open it by: only the image, and what that may open itself, can be its backing files.
    Raises Unsupported for encrypted raw images, and as ``ops.create`` does.
    """

    def __init__(self, path: str, format: str, *, roots: tuple[str, ...] = ()) -> None:
        if format == "luks":
            raise Unsupported(path, "a temporary image over an encrypted raw one")
        below = os.path.realpath(path)
        try:
            self._directory = tempfile.TemporaryDirectory(prefix="cowfence-")
        except OSError as error:
            raise StorageFailed(tempfile.gettempdir(), "create", 0, error) from error
        self.path = os.path.join(self._directory.name, "overlay.qcow2")
        self.refs = Refs.under(os.path.dirname(below), *roots)
        try:
            create(self.path, CreateOptions(backing=below, backing_format=format), refs=self.refs)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove it. May be called again."""
        self._directory.cleanup()
