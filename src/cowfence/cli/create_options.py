"""``-o``: the options of a new image as qemu-img writes them, ``name=value,name=value``; a comma in a value is doubled.

The legacy encryption is known by name, and refused unless it says "off".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from cowfence.cli import encrypt_options
from cowfence.disk.opener import printable
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.create import COMPRESSION_TYPES, PREALLOCATIONS, CreateOptions
from cowfence.units import parse_size

_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("must be 'on' or 'off'")
    return text == "on"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("must be a number")
    return int(text)


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return convert


_CONVERT: Final[dict[str, Callable[[str], object]]] = {
    "backing_file": str,
    "backing_fmt": str,
    "cluster_size": parse_size,
    "compat": _one_of(tuple(_VERSIONS)),
    "compression_type": _one_of(tuple(COMPRESSION_TYPES)),
    "data_file": str,
    "data_file_raw": _switch,
    "extended_l2": _switch,
    "lazy_refcounts": _switch,
    "preallocation": _one_of(PREALLOCATIONS),
    "refcount_bits": _count,
    "size": parse_size,
    **dict.fromkeys(encrypt_options.NAMES, str),
}
OPTIONS: Final = {
    "backing_file=<str>": "name of the backing file",
    "backing_fmt=<str>": "format of the backing file: qcow2, raw",
    "cluster_size=<size>": "512 to 2M, a power of two (default: 64k)",
    "compat=<str>": "v2 (0.10) or v3 (1.1, the default)",
    "compression_type=<str>": "zlib (default), zstd",
    "data_file=<str>": "name of the external data file, which is created, too",
    "data_file_raw=<on/off>": "the data file can be read by itself (default: off)",
    **encrypt_options.OPTIONS,
    "extended_l2=<on/off>": "clusters have 32 subclusters, each allocated by itself; clusters of 16k or more (default: off)",
    "lazy_refcounts=<on/off>": "the image may postpone refcount updates (default: off)",
    "preallocation=<str>": "off (default), metadata, falloc, full",
    "refcount_bits=<num>": "1 to 64, a power of two (default: 16)",
    "size=<size>": "size of the disk",
}
"""Each option with one line of help. A raw image has ``preallocation`` and ``size``."""

_RAW: Final = ("preallocation", "size")


class GivenOptions:
    """What was given, by name: ``texts`` as written, ``value`` as meant."""

    def __init__(self, image: str) -> None:
        self.image = printable(image)
        self.texts: dict[str, str] = {}
        self._values: dict[str, object] = {}

    def put(self, name: str, text: str) -> None:
        """Set an option; the last of several counts. Raises Invalid, Unsupported."""
        if name == "encryption":
            if text == "off":
                return
            raise Unsupported(self.image, "creating images with AES encryption; it is weak: use encrypt.format=luks")
        convert = _CONVERT.get(name)
        if convert is None:
            raise Invalid(f"{self.image}: invalid parameter {name!a}; see -o help")
        try:
            self._values[name] = convert(text)
        except ValueError as error:
            raise Invalid(f"{self.image}: {name}={printable(text)}: {error}") from None
        self.texts[name] = text

    def take(self, name: str, value: object, what: str) -> None:
        """An argument of its own that means the same as an option: one of them at most."""
        if value is None:
            return
        if name in self._values:
            raise Invalid(f"{self.image}: {what} must be specified only once")
        self._values[name] = value

    def value(self, name: str) -> object:
        return self._values.get(name)

    def create_options(self, format_name: str, secret: Callable[[str], bytes]) -> CreateOptions:
        """The options for an image of this format. Raises Invalid for those that it does not have. ``secret``: by its id."""
        if format_name == "raw":
            wrong = sorted(set(self._values) - set(_RAW))
            if wrong:
                raise Invalid(f"{self.image}: a raw image has no option {wrong[0]}")
        values = {field: convert(self._values[name]) for name, (field, convert) in _FIELDS.items() if name in self._values}
        encryption = encrypt_options.luks_of(self.texts, self.image)
        key_secret = self.texts.get("encrypt.key-secret")
        if encryption is not None:
            values["encryption"] = encryption
            values["secret"] = None if key_secret is None else secret(key_secret)
        return CreateOptions(format_name, **values)  # type: ignore[arg-type]


def _as_it_is(value: object) -> object:
    return value


_FIELDS: Final[dict[str, tuple[str, Callable[[object], object]]]] = {
    "backing_file": ("backing", _as_it_is),
    "backing_fmt": ("backing_format", _as_it_is),
    "cluster_size": ("cluster_bytes", _as_it_is),
    "compat": ("version", lambda text: _VERSIONS[str(text)]),
    "compression_type": ("compression_type", _as_it_is),
    "data_file": ("data_file", _as_it_is),
    "data_file_raw": ("data_file_raw", _as_it_is),
    "extended_l2": ("extended_l2", _as_it_is),
    "lazy_refcounts": ("lazy_refcounts", _as_it_is),
    "preallocation": ("preallocation", _as_it_is),
    "refcount_bits": ("refcount_bits", _as_it_is),
    "size": ("size_bytes", _as_it_is),
}


def wants_help(texts: Sequence[str]) -> bool:
    return any(item in ("help", "?") for text in texts for item in text.split(","))


def parse_options(texts: Sequence[str], image: str) -> GivenOptions:
    """The options of all ``-o`` arguments together; ``image`` is for messages. Raises Invalid, Unsupported."""
    given = GivenOptions(image)
    for text in texts:
        for item in re.findall(r"(?:[^,]|,,)+", text):
            name, equals, value = item.replace(",,", ",").partition("=")
            given.put(name, value if equals else "on")
    return given
