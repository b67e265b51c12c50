"""Pure functions over bytes: compression. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Decompressor: TypeAlias = Callable[[bytes, int], bytes]
"""(compressed bytes with padding behind them, cluster size in bytes) -> exactly one cluster. Raises ValueError."""


def decompressor(compression_type: int) -> Decompressor:
    """The decompressor of a header's compression type: 0 deflate, 1 zstd (specification, "Additional fields")."""
    if compression_type == 0:
        from cowfence.codec.deflate import inflate

        return inflate
    from cowfence.codec.zstd import decompress

    return decompress
