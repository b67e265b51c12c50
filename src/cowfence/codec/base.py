"""What the codecs share: one error, whatever the library underneath raises; how hard to try; the hash functions by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final

_HASHES: Final = ("md5", "ripemd160", "sha1", "sha224", "sha256", "sha384", "sha512")
"""Those that LUKS headers name."""


class Effort(StrEnum):
    """How much work a compressor puts into a cluster."""

    FASTEST = "fastest"
    FAST = "fast"
    GOOD = "good"
    BEST = "best"


class CodecError(ValueError):
    """Data that cannot be decoded, or asks for what is not known here. The caller adds where it stands."""


def check_length(got_bytes: int, cluster_bytes: int, *, ended: bool) -> None:
    """Raises ``CodecError`` where a stream gave less than a cluster, and says if it ended there or was cut off."""
    if got_bytes != cluster_bytes:
        how = "ends" if ended else "is cut off"
        raise CodecError(f"the compressed stream {how} after {got_bytes} of {cluster_bytes} bytes")


def hash_of(name: str) -> Callable[..., Any]:
    """The hash function of this name, as those of ``hashlib`` are called. Raises CodecError where there is none."""
    if name not in _HASHES or name not in hashlib.algorithms_available:
        raise CodecError(f"the hash function {name!a}")
    return lambda data=b"": hashlib.new(name, data, usedforsecurity=False)
