"""Encryption of sectors of 512 bytes: AES in XTS or CBC mode, with the initialisation vectors that LUKS names.

A run of sectors costs a few calls of the library, not one for each sector: XTS is one ECB call between two XORs with tweaks
that numpy doubles for all sectors at once; CBC is deciphered by one ECB call, and enciphered by one for each of the 32 blocks
of a sector, over all sectors at once.

The library (``cryptography``, extra ``[crypto]``) is imported when the first cipher is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from cowfence.codec.base import CodecError, hash_of
from cowfence.errors import CowfenceError
from cowfence.units import SECTOR_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

Words: TypeAlias = "NDArray[np.uint64]"
Buffer: TypeAlias = "bytes | bytearray | memoryview"

_BLOCK_BYTES: Final = 16
_BLOCKS: Final = SECTOR_BYTES // _BLOCK_BYTES
_REDUCTION: Final = np.uint64(0x87)
"""Of the field GF(2**128) in which XTS doubles its tweaks."""

Vectors: TypeAlias = Callable[[int, int], Words]
"""(first sector, number of sectors) -> one vector for each: two little-endian words."""


class _Ecb:
    """AES, block by block."""

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise CowfenceError("encryption needs the package cryptography: pip install 'cowfence[crypto]'") from None
        if len(key) not in (16, 24, 32):
            raise CodecError(f"AES has no keys of {len(key)} bytes")
        self._cipher: Any = Cipher(algorithms.AES(key), modes.ECB())

    def encrypt(self, words: Words) -> Words:
        return self._run(self._cipher.encryptor(), words)

    def decrypt(self, words: Words) -> Words:
        return self._run(self._cipher.decryptor(), words)

    def _run(self, context: Any, words: Words) -> Words:
        done: bytes = context.update(np.ascontiguousarray(words).data.cast("B"))
        return np.frombuffer(done, "<u8").reshape(words.shape)


class SectorCipher:
    """Enciphers and deciphers whole sectors. Thread-safe."""

    def encrypt(self, first_sector: int, data: Buffer) -> bytes:
        """``data``: whole sectors, the first of which has this number."""
        return self._encrypt(first_sector, _blocks(data)).tobytes()

    def decrypt(self, first_sector: int, data: Buffer) -> bytes:
        return self._decrypt(first_sector, _blocks(data)).tobytes()

    def _encrypt(self, first_sector: int, blocks: Words) -> Words:
        raise NotImplementedError

    def _decrypt(self, first_sector: int, blocks: Words) -> Words:
        raise NotImplementedError


class _Xts(SectorCipher):
    def __init__(self, key: bytes, vectors: Vectors) -> None:
        half = len(key) // 2
        self._data, self._tweak = _Ecb(key[:half]), _Ecb(key[half:])
        self._vectors = vectors

    def _tweaks(self, first_sector: int, sectors: int) -> Words:
        tweaks = np.empty((sectors, _BLOCKS, 2), np.uint64)
        first = self._tweak.encrypt(self._vectors(first_sector, sectors))
        low, high = first[:, 0].copy(), first[:, 1].copy()
        one, top = np.uint64(1), np.uint64(63)
        for block in range(_BLOCKS):
            tweaks[:, block, 0], tweaks[:, block, 1] = low, high
            carry = (high >> top) * _REDUCTION
            high = high << one | low >> top
            low = low << one ^ carry
        return tweaks

    def _encrypt(self, first_sector: int, blocks: Words) -> Words:
        tweaks = self._tweaks(first_sector, len(blocks))
        return self._data.encrypt(blocks ^ tweaks) ^ tweaks

    def _decrypt(self, first_sector: int, blocks: Words) -> Words:
        tweaks = self._tweaks(first_sector, len(blocks))
        return self._data.decrypt(blocks ^ tweaks) ^ tweaks


class _Cbc(SectorCipher):
    def __init__(self, key: bytes, vectors: Vectors) -> None:
        self._data = _Ecb(key)
        self._vectors = vectors

    def _encrypt(self, first_sector: int, blocks: Words) -> Words:
        done = np.empty_like(blocks)
        before = self._vectors(first_sector, len(blocks))
        for block in range(_BLOCKS):
            before = self._data.encrypt(blocks[:, block] ^ before)
            done[:, block] = before
        return done

    def _decrypt(self, first_sector: int, blocks: Words) -> Words:
        done = self._data.decrypt(blocks).copy()
        done[:, 0] ^= self._vectors(first_sector, len(blocks))
        done[:, 1:] ^= blocks[:, :-1]
        return done


def sector_cipher(name: str, mode: str, key: bytes) -> SectorCipher:
    """The cipher that a LUKS header names: ``name`` aes, ``mode`` cbc or xts with plain, plain64 or essiv:HASH.

    Raises CodecError for what is not known here, by its name, and CowfenceError where the library is missing.
    """
    if name != "aes":
        raise CodecError(f"the cipher {name!a}; here is aes")
    chaining, _, vectors_name = mode.partition("-")
    if chaining not in ("xts", "cbc"):
        raise CodecError(f"the cipher mode {chaining!a}; here are xts and cbc")
    vectors = _vectors(vectors_name, key)
    return _Xts(key, vectors) if chaining == "xts" else _Cbc(key, vectors)


def legacy_cipher(passphrase: bytes) -> SectorCipher:
    """That of the method "AES" of qcow2: the passphrase itself is the key, cut or filled up to 16 bytes."""
    key = passphrase[:16].ljust(16, b"\0")
    return _Cbc(key, _vectors("plain64", key))


def _vectors(name: str, key: bytes) -> Vectors:
    if name == "plain64":
        return _numbers
    if name == "plain":
        return lambda first, count: _numbers(first, count) & np.uint64(0xFFFFFFFF)
    if name.startswith("essiv:"):
        ecb = _Ecb(hash_of(name.removeprefix("essiv:"))(key).digest())
        return lambda first, count: ecb.encrypt(_numbers(first, count))
    raise CodecError(f"initialisation vectors of the kind {name!a}; here are plain, plain64 and essiv")


def _numbers(first_sector: int, count: int) -> Words:
    vectors = np.zeros((count, 2), np.uint64)
    vectors[:, 0] = np.arange(count, dtype=np.uint64) + np.uint64(first_sector)
    return vectors


def _blocks(data: Buffer) -> Words:
    if len(data) % SECTOR_BYTES:
        raise CodecError(f"{len(data)} bytes are no whole sectors")
    return np.frombuffer(data, "<u8").reshape(-1, _BLOCKS, 2)
