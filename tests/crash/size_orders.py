"""The broken orders of resizing and of changes of the header, like those of ``orders``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from cowfence.crash.cases import parse_case
from cowfence.disk.raw import RawDisk
from cowfence.qcow2 import rebase as rebase_module
from cowfence.qcow2 import resize as resize_module
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.header import Header, encode, read_header, size_patch
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind
from cowfence.qcow2.transaction import Stage
from crash.orders import Mutant


@contextmanager
def _discards_first() -> Iterator[None]:
    """What lies behind the new end is freed while the disk still has its old size."""

    def resize(alteration: Alteration, size_bytes: int, *_: Any, **__: Any) -> None:
        resize_module.unlink_behind(alteration, size_bytes)
        alteration.transaction(lambda: alteration.state.pending.patch_header(*size_patch(size_bytes), "header.link"))

    with mock.patch.object(resize_module, "resize", resize):
        yield


def _in_one_write(state: State, change: Callable[[Header], Header]) -> None:
    """The whole header in one write of several sectors."""
    header = encode(change(read_header(state.storage)))
    state.pending.put(Stage.LINK, 0, header, "header.link", Kind.HEADER)


@contextmanager
def _header_in_one_write() -> Iterator[None]:
    with mock.patch.object(rebase_module, "switch_header", _in_one_write):
        yield


@contextmanager
def _let_go_first() -> Iterator[None]:
    """The image is emptied before the base is durable."""

    def flush(self: RawDisk) -> None:
        """Nothing."""

    with mock.patch.object(RawDisk, "flush", flush):
        yield


SIZE_CASES = {
    name: parse_case(text)
    for name, text in {
        "shrink": "v3,c512,r16,t64,aged | shrink flush",
        "shrink-and-grow": "v3,c4096,r16,t64,aged,qcow2 | shrink grow flush",
        "rebase": "v3,c1024,r16,t64,raw | rebase rebase flush",
        "commit": "v3,c512,r16,t64,raw,aged | commit flush",
        "amend": "v3,c512,r16,t64,qcow2,aged | amend_refcounts amend_refcounts amend_version amend_version amend_lazy flush",
    }.items()
}

SIZE_MUTANTS = [
    Mutant("M22 shrink discards first", "shrink", _discards_first, clauses=("C3", "C7", "C8")),
    Mutant(
        "M21 header rewritten as one write of several sectors", "rebase", _header_in_one_write, power_only=True, clauses=("C9",)
    ),
    Mutant("M6 the base of a commit is not fenced", "commit", _let_go_first, power_only=True, clauses=("C3", "C2")),
]
