"""Sizes and alignment: the arithmetic that every layer needs and none should write twice."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
PIB = 1024 * TIB

SECTOR_BYTES = 512
"""The unit that a disk writes whole: a 512-byte sector never tears (crash contract, model P)."""

_SUFFIXES = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": PIB, "e": 1024 * PIB}


def align_down(value: int, unit: int) -> int:
    """The greatest multiple of ``unit`` that is <= ``value``."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` that is >= ``value``."""
    return -(-value // unit) * unit


def div_up(value: int, unit: int) -> int:
    """How many pieces of ``unit`` cover ``value``."""
    return -(-value // unit)


def parse_size(text: str) -> int:
    """Bytes from a size as qemu-img takes it: ``512``, ``64k``, ``1.5G`` (1024-based, b k M G T P E).

    Raises ValueError for anything else, for negative sizes and for 2**63 bytes and more.
    """
    stripped = text.strip()
    suffix = stripped[-1:].lower()
    number = stripped if suffix.isdigit() or suffix == "." else stripped[:-1]
    if suffix.isdigit() or suffix == ".":
        suffix = ""
    if suffix not in _SUFFIXES or not number or not number.isascii():
        raise ValueError(f"'{text}' is not a size: use a number with an optional suffix b, k, M, G, T, P or E")
    whole, dot, fraction = number.partition(".")
    if not whole.isdigit() or (dot and not fraction.isdigit()):
        raise ValueError(f"'{text}' is not a size: use a number with an optional suffix b, k, M, G, T, P or E")
    unit = _SUFFIXES[suffix]
    size_bytes = int(whole) * unit
    if fraction:
        size_bytes += int(fraction) * unit // 10 ** len(fraction)
    if size_bytes >= 1 << 63:
        raise ValueError(f"'{text}' is too large a size: the limit is 8 EiB")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size as qemu-img prints it: ``196 KiB``, ``1.5 GiB``; three significant digits."""
    value = float(size_bytes)
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1000 or suffix == "EiB":
            return f"{value:.3g} {suffix}"
        value /= 1024
    raise AssertionError("unreachable")
