"""What ``cowfence-io`` prints of a request: sizes, times, rates and bytes, in the form of ``qemu-io``."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ((1 << 60, "EiB"), (1 << 50, "PiB"), (1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_DUMP_BYTES: Final = 16


def size(value: float) -> str:
    """``1 KiB``, ``1.465 KiB``, ``512 bytes``: three decimals, or none where they are zeros."""
    for unit, name in _UNITS:
        if value >= unit:
            return f"{_decimals(value / unit)} {name}"
    return f"{_decimals(value)} bytes"


def _decimals(value: float) -> str:
    return f"{value:.3f}".removesuffix(".000")


def report(verb: str, seconds: float, offset: int, wanted_bytes: int, done_bytes: int, *, machine: bool) -> str:
    """The lines about a request that went well. ``machine``: one line for programs."""
    seconds = max(seconds, 1e-9)
    if machine:
        hours, rest = divmod(seconds, 3600)
        clock = f"{int(hours)}:{int(rest // 60):02}:{rest % 60:05.2f}"
        return f"{done_bytes},1,{clock},{done_bytes / seconds:.3f},{1 / seconds:.3f}"
    return (
        f"{verb} {done_bytes}/{wanted_bytes} bytes at offset {offset}\n"
        f"{size(done_bytes)}, 1 ops; {_clock(seconds)} ({size(done_bytes / seconds)}/sec and {1 / seconds:.4f} ops/sec)"
    )


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:05.2f} sec"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02}:{seconds % 60:05.2f}"


def dump(data: bytes | bytearray, offset: int) -> str:
    """Bytes in hexadecimal and as text, 16 on a line."""
    lines = []
    for at in range(0, len(data), _DUMP_BYTES):
        part = bytes(data[at : at + _DUMP_BYTES])
        text = "".join(chr(byte) if 0x20 < byte < 0x7F and chr(byte).isalnum() else "." for byte in part)
        lines.append(f"{offset + at:08x}:  {''.join(f'{byte:02x} ' for byte in part)} {text}")
    return "\n".join(lines)
