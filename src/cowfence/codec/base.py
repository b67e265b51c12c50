"""What the codecs share: one error, whatever the library underneath raises."""

from __future__ import annotations


class CodecError(ValueError):
    """Compressed data that does not give exactly one cluster. The caller adds where it stands."""


def check_length(got_bytes: int, cluster_bytes: int, *, ended: bool) -> None:
    """Raises ``CodecError`` where a stream gave less than a cluster, and says if it ended there or was cut off."""
    if got_bytes != cluster_bytes:
        how = "ends" if ended else "is cut off"
        raise CodecError(f"the compressed stream {how} after {got_bytes} of {cluster_bytes} bytes")
