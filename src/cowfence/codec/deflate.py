"""Compression type 0: raw deflate streams (RFC 1951) without zlib headers, one for each cluster.

Only whole sectors are counted in an L2 entry, so that the input goes on behind the stream with whatever stands there, often the
next cluster's stream. Decompression stops when it has produced a cluster of data (specification, "Compressed Clusters
Descriptor"); what follows is not looked at. Output is bounded by the cluster, so that a small input cannot fill the memory.

The window. Writers use 4 KiB (wbits -12) so that every reader can follow. We read with 32 KiB, the largest that deflate has:
QEMU inflates a cluster in one call, where zlib does not limit how far a match reaches back, so it reads such streams too.
"""

from __future__ import annotations

import zlib as _zlib
from collections.abc import Callable
from typing import Any

from cowfence.codec.base import CodecError, Effort, check_length

_igzip: Any
try:
    from isal import igzip_lib as _igzip
except ImportError:  # No wheel for this machine: the standard library does the same, more slowly.
    _igzip = None

_zlib_ng: Any
try:
    from zlib_ng import zlib_ng as _zlib_ng
except ImportError:
    _zlib_ng = None

_ISAL_LEVELS = {Effort.FASTEST: 0, Effort.FAST: 1, Effort.GOOD: 3}
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


def deflater(effort: Effort = Effort.FAST) -> Callable[[bytes], bytes]:
    """What makes the stream of a cluster: isal up to where it ends, then zlib-ng; zlib where they are not installed."""
    if effort is Effort.BEST:
        # On files of /usr/lib: twice as fast as QEMU's zlib level 6, and smaller by one part in 300.
        return _deflate_with(_zlib if _zlib_ng is None else _zlib_ng, 6)
    level = _ISAL_LEVELS[effort]
    if _igzip is None:
        return _deflate_with(_zlib, max(1, 2 * level))

    def deflate(cluster: bytes) -> bytes:
        stream: bytes = _igzip.compress(cluster, level=level, flag=_igzip.COMP_DEFLATE, hist_bits=_WRITTEN_HISTORY_BITS)
        return stream

    return deflate


def _deflate_with(library: Any, level: int) -> Callable[[bytes], bytes]:
    def deflate(cluster: bytes) -> bytes:
        # Long blocks: the most memory for what waits to be coded.
        coder = library.compressobj(level, _zlib.DEFLATED, -_WRITTEN_HISTORY_BITS, _zlib.DEF_MEM_LEVEL + 1)
        stream: bytes = coder.compress(cluster) + coder.flush()
        return stream

    return deflate


def _inflate_zlib(data: bytes | bytearray | memoryview, cluster_bytes: int) -> bytes:
    decompressor = _zlib.decompressobj(-_HISTORY_BITS)
    try:
        cluster = decompressor.decompress(data, cluster_bytes)
    except _zlib.error as error:
        raise CodecError(f"bad deflate stream: {error}") from None
    check_length(len(cluster), cluster_bytes, ended=decompressor.eof)
    return cluster
