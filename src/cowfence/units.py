"""Sizes and alignment: the arithmetic that every layer needs and none should write twice."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
PIB = 1024 * TIB

SECTOR_BYTES = 512
"""The unit that a disk writes whole: a 512-byte sector never tears (crash contract, model P)."""

MAX_SIZE_BYTES = (1 << 63) - 1
"""Of anything that has a size: file offsets are signed."""

_SUFFIXES = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": PIB, "e": 1024 * PIB}
_SIZE = re.compile(r"\+?(?:0x([0-9a-f]+)|([0-9]+)(?:\.([0-9]*))?([bkmgtpe]?))", re.IGNORECASE | re.ASCII)


def align_down(value: int, unit: int) -> int:
    """The greatest multiple of ``unit`` that is <= ``value``."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` that is >= ``value``."""
    return -(-value // unit) * unit


def div_up(value: int, unit: int) -> int:
    """How many pieces of ``unit`` cover ``value``."""
    return -(-value // unit)


class TooLarge(ValueError):
    """A size beyond what counts bytes anywhere: 2**63 and more."""


def parse_size(text: str) -> int:
    """Bytes from a size as qemu-img takes it: ``512``, ``64k``, ``1.5G``, ``0x1000`` (1024-based, b k M G T P E).

    Raises ValueError for anything else and for negative sizes, TooLarge for 2**63 bytes and more.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is not a size: use a number with an optional suffix b, k, M, G, T, P or E")
    hexadecimal, whole, fraction, suffix = found.groups(default="")
    unit = _SUFFIXES[suffix.lower()]
    size_bytes = (int(hexadecimal, 16) if hexadecimal else int(whole)) * unit
    if fraction:
        size_bytes += int(fraction) * unit // 10 ** len(fraction)
    if size_bytes > MAX_SIZE_BYTES:
        raise TooLarge(f"'{text}' is too large a size: the limit is 8 EiB")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size as qemu-img prints it: ``196 KiB``, ``1.5 GiB``; three significant digits."""
    value = float(size_bytes)
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1000 or suffix == "EiB":
            return f"{value:.3g} {suffix}"
        value /= 1024
    raise AssertionError("unreachable")
