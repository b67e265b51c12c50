"""What has been asked of an export, counted for whoever watches it. Written by the server's thread only, read by any."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import Final

from cowfence.disk.base import Request, Verb

LATENCY_BUCKETS_SECONDS: Final = (
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    5.0,
)
_VERB = itemgetter(0)


class Stats:
    """``requests``: by what they ask for. ``latencies``: how many requests took up to each of the buckets, and longer;
    ``busy_seconds``: of all together. A request takes the time from being taken up to being answered."""

    __slots__ = ("busy_seconds", "clients", "errors", "latencies", "read_bytes", "requests", "written_bytes")

    def __init__(self) -> None:
        self.requests: Counter[Verb] = Counter()
        self.read_bytes = 0
        self.written_bytes = 0
        self.errors = 0
        self.clients = 0
        self.busy_seconds = 0.0
        self.latencies = [0] * (len(LATENCY_BUCKETS_SECONDS) + 1)

    def took_up(self, requests: Sequence[Request]) -> None:
        """They have come in."""
        self.requests.update(map(_VERB, requests))
        for verb, _, length_bytes, data, _, _ in requests:
            if verb is Verb.READ:
                self.read_bytes += length_bytes
            elif verb is Verb.WRITE:
                self.written_bytes += len(data)

    def answered(self, count: int, seconds: float) -> None:
        """So many requests were answered, together, after this time."""
        self.busy_seconds += count * seconds
        self.latencies[bisect_left(LATENCY_BUCKETS_SECONDS, seconds)] += count

    def to_dict(self) -> dict[str, object]:
        return {
            "clients": self.clients,
            "requests": {verb.name.lower(): self.requests[verb] for verb in Verb},
            "read-bytes": self.read_bytes,
            "written-bytes": self.written_bytes,
            "errors": self.errors,
            "busy-seconds": round(self.busy_seconds, 6),
        }
