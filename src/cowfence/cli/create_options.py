"""``-o``: the options of a new image as qemu-img writes them, ``name=value,name=value``; a comma in a value is doubled.

The legacy encryption is known by name, and refused unless it says "off".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from cowfence.cli import encrypt_options
from cowfence.cli.main import size_option
from cowfence.disk.opener import printable
from cowfence.errors import Invalid, Unsupported
from cowfence.ops.create import COMPRESSION_TYPES, PREALLOCATIONS, CreateOptions

VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_SWITCH: Final = {word: on for on, words in ((True, "on yes true y"), (False, "off no false n")) for word in words.split()}
_LIST: Final = re.compile(r"(?!,).*[^,](?:,,)*", re.DOTALL)
_NUMBER: Final = re.compile(r"\+?(0x[0-9a-f]+|0|-?[1-9][0-9]*)", re.IGNORECASE)


def option_items(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each option of all ``-o`` together, as written. Raises Invalid for a comma that separates nothing."""
    for text in texts:
        if not _LIST.fullmatch(text):
            raise Invalid(f"Invalid option list: {text}")
        for item in re.findall(r"(?:[^,]|,,)+", text):
            name, equals, value = item.replace(",,", ",").partition("=")
            yield name, value if equals else "on"


def switch_option(text: str, name: str) -> bool:
    """Raises Invalid, in qemu-img's words, as the next one does."""
    if text not in _SWITCH:
        raise Invalid(f"Parameter '{name}' expects 'on' or 'off'")
    return _SWITCH[text]


def number_option(text: str, name: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise Invalid(f"Parameter '{name}' expects a number")
    return int(text, 0)


def _text(text: str, _: str) -> str:
    return text


_CONVERT: Final[dict[str, Callable[[str, str], object]]] = {
    "backing_file": _text,
    "backing_fmt": _text,
    "cluster_size": size_option,
    "compat": _text,
    "compression_type": _text,
    "data_file": _text,
    "data_file_raw": switch_option,
    "extended_l2": switch_option,
    "lazy_refcounts": switch_option,
    "preallocation": _text,
    "refcount_bits": number_option,
    "size": size_option,
    **dict.fromkeys(encrypt_options.NAMES, _text),
    "encrypt.iter-time": number_option,
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
_CHOICES: Final = {"compat": VERSIONS, "compression_type": COMPRESSION_TYPES, "preallocation": PREALLOCATIONS}
_ON_THE_HOST: Final = ("extent_size_hint", "nocow")
"""Options that QEMU passes on to the host's file system."""


class GivenOptions:
    """What was given for an image of this format, by name: ``texts`` as written, ``value`` as meant."""

    def __init__(self, image: str, format_name: str) -> None:
        self.image = printable(image)
        self.format = format_name
        self.texts: dict[str, str] = {}
        self._values: dict[str, object] = {}

    def put(self, name: str, text: str) -> None:
        """Set an option; the last of several counts. Raises Invalid, Unsupported."""
        if name in _ON_THE_HOST:
            raise Unsupported(self.image, f"{name}: it is the file system's; set it on the directory (chattr, xfs_io)")
        if self.format == "raw" and name not in _RAW:
            raise Invalid(f"{self.image}: Invalid parameter '{name}'")
        self.texts[name] = text
        if name == "encryption":
            if switch_option(text, name):
                raise Unsupported(self.image, "creating images with AES encryption; it is weak: use encrypt.format=luks")
            return
        convert = _CONVERT.get(name)
        if convert is None:
            raise Invalid(f"{self.image}: Invalid parameter '{name}'")
        try:
            self._values[name] = convert(text, name)
        except Invalid as error:
            raise Invalid(f"{self.image}: {error}") from None

    def take(self, name: str, value: object, what: str) -> None:
        """An argument of its own that means the same as an option: one of them at most. ``what`` it is begins a sentence."""
        if value is None:
            return
        if self.format == "raw" and name not in _RAW:
            raise Invalid(f"{self.image}: {what} not supported for file format 'raw'")
        if name in self._values:
            raise Invalid(f"{self.image}: {what} must be specified only once")
        self._values[name] = value

    def set_size(self, size_bytes: int) -> None:
        self._values["size"] = size_bytes

    def text(self, name: str) -> str | None:
        """The value of an option that is a text; None where it was not given."""
        value = self._values.get(name)
        return None if value is None else str(value)

    def number(self, name: str) -> int | None:
        value = self._values.get(name)
        return value if isinstance(value, int) else None

    def shown(self, name: str, default: str | None) -> str | None:
        """As qemu-img shows it: numbers as such, everything else as it was written."""
        value = self._values.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        text = self.texts.get(name, value)
        return None if text is None else printable(str(text).replace(",", ",,"))

    def create_options(self, secret: Callable[[str], bytes]) -> CreateOptions:
        """The options for the image. ``secret``: by its id. Raises Invalid, Unsupported for values that there are not."""
        for name, known in _CHOICES.items():
            text = self.texts.get(name)
            if text is not None and text not in known:
                raise Invalid(f"{self.image}: {name}={text}: must be one of {', '.join(known)}")
        values = {field: self._values[name] for name, field in _FIELDS.items() if name in self._values}
        encryption = encrypt_options.luks_of(self.texts, self.image)
        key_secret = self.texts.get("encrypt.key-secret")
        if encryption is not None:
            values["encryption"] = encryption
            values["secret"] = None if key_secret is None else secret(key_secret)
        return CreateOptions(self.format, version=VERSIONS[self.texts.get("compat", "v3")], **values)  # type: ignore[arg-type]


_FIELDS: Final = {
    "backing_file": "backing",
    "backing_fmt": "backing_format",
    "cluster_size": "cluster_bytes",
    "compression_type": "compression_type",
    "data_file": "data_file",
    "data_file_raw": "data_file_raw",
    "extended_l2": "extended_l2",
    "lazy_refcounts": "lazy_refcounts",
    "preallocation": "preallocation",
    "refcount_bits": "refcount_bits",
    "size": "size_bytes",
}


def wants_help(texts: Sequence[str]) -> bool:
    return any(item in ("help", "?") for text in texts for item in text.split(","))


def help_lines(format_name: str) -> list[str]:
    """What ``-o help`` says of a format: a line for each option."""
    return [
        f"  {option:<24} - {line}"
        for option, line in OPTIONS.items()
        if format_name != "raw" or option.partition("=")[0] in _RAW
    ]


def parse_options(texts: Sequence[str], image: str, format_name: str) -> GivenOptions:
    """The options of all ``-o`` arguments together; ``image`` is for messages. Raises Invalid, Unsupported."""
    given = GivenOptions(image, format_name)
    for name, text in option_items(texts):
        given.put(name, text)
    return given
