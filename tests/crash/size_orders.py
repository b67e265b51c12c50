"""The broken orders of resizing and of changes of the header, like those of ``orders``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from cowfence.crash.cases import parse_case
from cowfence.qcow2 import resize as resize_module
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.header import size_patch
from crash.orders import Mutant


@contextmanager
def _discards_first() -> Iterator[None]:
    """What lies behind the new end is freed while the disk still has its old size."""

    def resize(alteration: Alteration, size_bytes: int, *_: Any) -> None:
        resize_module._unlink_behind(alteration, size_bytes)
        alteration.transaction(lambda: alteration.state.pending.patch_header(*size_patch(size_bytes), "header.link"))

    with mock.patch.object(resize_module, "resize", resize):
        yield


SIZE_CASES = {
    name: parse_case(text)
    for name, text in {
        "shrink": "v3,c512,r16,t64,aged | shrink flush",
        "shrink-and-grow": "v3,c4096,r16,t64,aged,qcow2 | shrink grow flush",
    }.items()
}

SIZE_MUTANTS = [Mutant("M22 shrink discards first", "shrink", _discards_first, clauses=("C3", "C7", "C8"))]
