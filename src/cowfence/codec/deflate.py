"""Compression type 0: raw deflate streams (RFC 1951) without zlib headers, one for each cluster.

Only whole sectors are counted in an L2 entry, so that the input goes on behind the stream with whatever stands there, often the
next cluster's stream. Decompression stops when it has produced a cluster of data (specification, "Compressed Clusters
Descriptor"); what follows is not looked at. Output is bounded by the cluster, so that a small input cannot fill the memory.

The window. Writers use 4 KiB (wbits -12) so that every reader can follow. We read with 32 KiB, the largest that deflate has:
QEMU inflates a cluster in one call, where zlib does not limit how far a match reaches back, so it reads such streams too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from cowfence.codec.base import CodecError, check_length

_igzip: Any
try:
    from isal import igzip_lib as _igzip
except ImportError:  # No wheel for this machine: the standard library does the same, more slowly.
    _igzip = None

_HISTORY_BITS = 15
_WRITTEN_HISTORY_BITS = 12


def inflate(data: bytes | bytearray | memoryview, cluster_bytes: int) -> bytes:
    """The cluster that the stream at the start of ``data`` holds: exactly ``cluster_bytes``. Raises ``CodecError``."""
    if _igzip is None:
        return _inflate_zlib(data, cluster_bytes)
    decompressor = _igzip.IgzipDecompressor(_igzip.DECOMP_DEFLATE, _HISTORY_BITS)
    try:
        cluster: bytes = decompressor.decompress(data, cluster_bytes)
    except _igzip.IsalError as error:
        raise CodecError(f"bad deflate stream: {error}") from None
    check_length(len(cluster), cluster_bytes, ended=decompressor.eof)
    return cluster


def deflater(level: int | None = None) -> Callable[[bytes], bytes]:
    """What makes the stream of a cluster. ``level``: 0 to 3 of isal where it is installed (default 1), else of zlib."""
    if _igzip is None:
        return lambda cluster: _deflate_zlib(cluster, 6 if level is None else level)
    chosen = 1 if level is None else level

    def deflate(cluster: bytes) -> bytes:
        stream: bytes = _igzip.compress(cluster, level=chosen, flag=_igzip.COMP_DEFLATE, hist_bits=_WRITTEN_HISTORY_BITS)
        return stream

    return deflate


def _deflate_zlib(cluster: bytes, level: int) -> bytes:
    deflate = zlib.compressobj(level, zlib.DEFLATED, -_WRITTEN_HISTORY_BITS)
    return deflate.compress(cluster) + deflate.flush()


def _inflate_zlib(data: bytes | bytearray | memoryview, cluster_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(-_HISTORY_BITS)
    try:
        cluster = decompressor.decompress(data, cluster_bytes)
    except zlib.error as error:
        raise CodecError(f"bad deflate stream: {error}") from None
    check_length(len(cluster), cluster_bytes, ended=decompressor.eof)
    return cluster
