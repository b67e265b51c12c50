"""Pure functions over bytes: compression. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from cowfence.codec.base import Effort as Effort

Decompressor: TypeAlias = Callable[[bytes | memoryview, int], bytes]
"""(compressed bytes with padding behind them, cluster size in bytes) -> exactly one cluster. Raises ValueError."""

Compressor: TypeAlias = Callable[[bytes], bytes]
"""One cluster -> its stream, which may be longer than the cluster."""


def compressor(compression_type: int, effort: Effort = Effort.FAST) -> Compressor:
    """The compressor of a header's compression type."""
    if compression_type == 0:
        from cowfence.codec.deflate import deflater

        return deflater(effort)
    from cowfence.codec.zstd import compressor as zstd_compressor

    return zstd_compressor(effort)


def decompressor(compression_type: int) -> Decompressor:
    """The decompressor of a header's compression type: 0 deflate, 1 zstd (specification, "Additional fields")."""
    if compression_type == 0:
        from cowfence.codec.deflate import inflate

        return inflate
    from cowfence.codec.zstd import decompress

    return decompress
