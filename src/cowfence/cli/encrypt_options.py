"""``encrypt.*``: how a new image is encrypted, with the option names and words of ``qemu-img create``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from cowfence.errors import Invalid, Unsupported

if TYPE_CHECKING:
    from cowfence.codec.luks import NewLuks

OPTIONS: Final = {
    "encrypt.cipher-alg=<str>": "aes-128, aes-192, aes-256 (default)",
    "encrypt.cipher-mode=<str>": "xts (default), cbc",
    "encrypt.format=<str>": "luks",
    "encrypt.hash-alg=<str>": "of passphrases: sha1, sha256 (default), sha512, ...",
    "encrypt.iter-time=<num>": "milliseconds that a guess at the passphrase takes (default: 2000)",
    "encrypt.ivgen-alg=<str>": "plain64 (default), plain, essiv",
    "encrypt.ivgen-hash-alg=<str>": "of essiv (default: sha256)",
    "encrypt.key-secret=<str>": "id of the secret that opens the image; see --object",
}
NAMES: Final = tuple(option.partition("=")[0] for option in OPTIONS)
_KEY_BITS: Final = {"aes-128": 128, "aes-192": 192, "aes-256": 256}


def luks_of(texts: Mapping[str, str], image: str) -> NewLuks | None:
    """What the ``encrypt.`` options among ``texts`` ask for; None where there are none. Raises Invalid, Unsupported."""
    from cowfence.codec.luks import NewLuks

    given = {name: text for name, text in texts.items() if name in NAMES}
    if not given:
        return None
    kind = given.pop("encrypt.format", None)
    if kind is None:
        raise Invalid(f"{image}: Parameter 'encrypt.format' is missing")
    if kind != "luks":
        raise Unsupported(
            image, f"creating images with encrypt.format={kind}; it is weak, and kept for reading and writing only"
        )
    algorithm = given.get("encrypt.cipher-alg", "aes-256")
    if algorithm not in _KEY_BITS:
        raise Unsupported(image, f"the cipher {algorithm}; here are {', '.join(_KEY_BITS)}")
    mode = given.get("encrypt.cipher-mode", "xts")
    vectors = given.get("encrypt.ivgen-alg", "plain64")
    vectors_hash = given.get("encrypt.ivgen-hash-alg", "sha256" if vectors == "essiv" else None)
    if vectors_hash is not None and vectors != "essiv":
        raise Invalid(f"{image}: encrypt.ivgen-hash-alg is for essiv only")
    return NewLuks(
        key_bits=_KEY_BITS[algorithm],
        chaining=mode,
        vectors=vectors,
        vectors_hash=vectors_hash,
        hash_name=given.get("encrypt.hash-alg", "sha256"),
        iter_time_ms=iter_time(given.get("encrypt.iter-time", "2000"), image),
    )


def iter_time(text: str, image: str) -> int:
    """Milliseconds, above 0. Raises Invalid."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1_000_000):
        raise Invalid(f"{image}: encrypt.iter-time={text}: must be a number of milliseconds")
    return int(text)
