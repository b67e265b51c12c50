"""Bench: many requests of one kind to a disk, so many at a time, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cowfence.disk.base import Disk, Request, Verb
from cowfence.errors import CowfenceError, Invalid
from cowfence.qcow2.describe import JsonValue


@dataclass(frozen=True, slots=True)
class Load:
    """Sizes in bytes. ``flush_interval``: a flush after so many requests; 0: none. It waits for those before it, and nothing is
    sent meanwhile."""

    count: int = 75000
    depth: int = 64
    offset: int = 0
    request_bytes: int = 4096
    step_bytes: int | None = None
    is_write: bool = False
    pattern: int = 0
    flush_interval: int = 0

    @property
    def step(self) -> int:
        return self.step_bytes or self.request_bytes


@dataclass(frozen=True, slots=True)
class Benched:
    load: Load
    seconds: float

    def to_dict(self) -> dict[str, JsonValue]:
        return {
            "requests": self.load.count,
            "request-bytes": self.load.request_bytes,
            "depth": self.load.depth,
            "write": self.load.is_write,
            "microseconds": round(self.seconds * 1e6),
        }


def bench(disk: Disk, load: Load, begin: Callable[[], None] = lambda: None) -> Benched:
    """Send the requests to an open disk. ``begin``: called just before the first. Raises Invalid, and what the disk raises."""
    if load.request_bytes > disk.size:
        raise Invalid("Request size is larger than the image")
    room = disk.size - load.request_bytes
    data = bytes([load.pattern]) * load.request_bytes if load.is_write else b""
    begin()
    began = time.perf_counter()
    sent, offset, since_flush = 0, load.offset % room if room else 0, 0
    while sent < load.count:
        batch = min(load.depth, load.count - sent)
        if load.flush_interval:
            batch = min(batch, load.flush_interval - since_flush)
        requests = []
        for _ in range(batch):
            verb = Verb.WRITE if load.is_write else Verb.READ
            requests.append(Request(verb, offset, load.request_bytes, data))
            offset = (offset + load.step) % room if room else 0
        for outcome in disk.submit(requests):
            if isinstance(outcome, CowfenceError):
                raise outcome
        sent += batch
        since_flush += batch
        if load.flush_interval and since_flush == load.flush_interval:
            disk.flush()
            since_flush = 0
    return Benched(load, time.perf_counter() - began)
