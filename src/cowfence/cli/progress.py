"""``-p``: how far it is, as qemu-img shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def shown(wanted: bool) -> Iterator[Callable[[float], None] | None]:
    """Whom to tell the fraction that is done, 0 to 1; None where nobody wants to know."""
    if not wanted:
        yield None
        return
    try:
        _show(0)
        yield _show
        _show(1)
    finally:
        print()


def _show(done: float) -> None:
    print(f"    ({done * 100:.2f}/100%)", end="\r", flush=True)
