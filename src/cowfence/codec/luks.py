"""LUKS version 1: the header, its eight key slots, and the way from a passphrase to the key. Pure functions over bytes.

The key that enciphers the data is stored once for each passphrase, in a *slot*: blown up 4000 times so that it can be destroyed
(``_split``, anti-forensic), and enciphered by a key that PBKDF2 derives from the passphrase. A digest in the header says which
key is the right one. Reference: "LUKS On-Disk Format Specification" version 1.2.3.

Whatever a header says is bounded before it is used: where areas stand and how long they are, and how many iterations are asked
for (``MAX_ITERATIONS``: half a minute here).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from cowfence.codec.base import CodecError, hash_of
from cowfence.units import SECTOR_BYTES, align_up

if TYPE_CHECKING:
    from cowfence.codec.sectors import SectorCipher

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_BYTES: Final = 592
SLOTS: Final = 8
STRIPES: Final = 4000
MIN_ITERATIONS: Final = 1000
MAX_ITERATIONS: Final = 1 << 26
MAX_AREA_BYTES: Final = 16 << 20
"""Of header and key material together."""

_ACTIVE: Final = 0x00AC71F3
_DISABLED: Final = 0x0000DEAD
_MATERIAL_ALIGNMENT: Final = 8
_HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
_DIGEST_BYTES: Final = 20
_SALT_BYTES: Final = 32

ReadArea: TypeAlias = Callable[[int, int], bytes]
"""(offset, length in bytes) -> bytes of header and key material."""


@dataclass(frozen=True, slots=True)
class KeySlot:
    """Where a passphrase leads to the key. ``material_sector``: where the enciphered key begins, from the header's start."""

    active: bool
    iterations: int
    salt: bytes
    material_sector: int
    stripes: int = STRIPES


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """The fields of the header. ``payload_sector``: where the data begins, from the header's start."""

    cipher: str
    mode: str
    hash_name: str
    payload_sector: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def material_bytes(self) -> int:
        """Of one slot: whole sectors."""
        return align_up(self.key_bytes * STRIPES, SECTOR_BYTES)

    @property
    def area_bytes(self) -> int:
        """Header and key material of all slots."""
        return max(slot.material_sector for slot in self.slots) * SECTOR_BYTES + self.material_bytes

    @property
    def active(self) -> list[int]:
        """Numbers of the slots that hold the key."""
        return [number for number, slot in enumerate(self.slots) if slot.active]


def parse(data: bytes) -> LuksHeader:
    """The header that ``data`` begins with. Raises CodecError for one that is none, or that cannot be."""
    if len(data) < HEADER_BYTES or data[:6] != MAGIC:
        raise CodecError("there is no LUKS header")
    fields = _HEADER.unpack_from(data)
    _, version, cipher, mode, hash_name, payload, key_bytes, digest, salt, iterations, name = fields
    if version != 1:
        raise CodecError(f"LUKS version {version}; here is version 1")
    slots = tuple(_slot(data, number) for number in range(SLOTS))
    header = LuksHeader(
        _text(cipher), _text(mode), _text(hash_name), payload, key_bytes, digest, salt, iterations, _text(name), slots
    )
    _check(header)
    return header


def _slot(data: bytes, number: int) -> KeySlot:
    state, iterations, salt, material, stripes = _SLOT.unpack_from(data, _HEADER.size + number * _SLOT.size)
    if state not in (_ACTIVE, _DISABLED):
        raise CodecError(f"key slot {number} is neither active nor disabled ({state:#x})")
    if stripes != STRIPES:
        raise CodecError(f"key slot {number} has {stripes} stripes, must have {STRIPES}")
    if state == _ACTIVE and not 1 <= iterations <= MAX_ITERATIONS:
        raise CodecError(f"key slot {number} asks for {iterations} iterations, must be 1 to {MAX_ITERATIONS}")
    return KeySlot(state == _ACTIVE, iterations, salt, material)


def _check(header: LuksHeader) -> None:
    """Sizes and places, before anything is read by them."""
    if header.key_bytes not in (16, 24, 32, 48, 64):
        raise CodecError(f"a key of {header.key_bytes} bytes")
    if not 1 <= header.digest_iterations <= MAX_ITERATIONS:
        raise CodecError(f"the key's digest asks for {header.digest_iterations} iterations, must be 1 to {MAX_ITERATIONS}")
    end = 0
    for number, slot in sorted(enumerate(header.slots), key=lambda pair: pair[1].material_sector):
        start = slot.material_sector * SECTOR_BYTES
        if start < max(end, HEADER_BYTES):
            raise CodecError(f"the material of key slot {number} overlaps what stands before it")
        end = start + header.material_bytes
    if end > MAX_AREA_BYTES:
        raise CodecError(f"the key material reaches to {end} bytes, must be {MAX_AREA_BYTES} at most")


def _text(field: bytes) -> str:
    raw = field.split(b"\0", 1)[0]
    if not raw.isascii():
        raise CodecError("a name is not ASCII")
    return raw.decode("ascii")


def encode(header: LuksHeader) -> bytes:
    """The header's 592 bytes."""
    words = (text.encode("ascii") for text in (header.cipher, header.mode, header.hash_name))
    fixed = _HEADER.pack(
        MAGIC,
        1,
        *words,
        header.payload_sector,
        header.key_bytes,
        header.digest,
        header.digest_salt,
        header.digest_iterations,
        header.uuid.encode("ascii"),
    )
    return fixed + b"".join(
        _SLOT.pack(_ACTIVE if slot.active else _DISABLED, slot.iterations, slot.salt, slot.material_sector, slot.stripes)
        for slot in header.slots
    )


def cipher_of(header: LuksHeader, key: bytes) -> SectorCipher:
    """The cipher of the data, or with another key that of key material. Raises CodecError for one that is not known here."""
    from cowfence.codec.sectors import sector_cipher  # It needs numpy, and to describe a header nothing is deciphered.

    return sector_cipher(header.cipher, header.mode, key)


def unlock(header: LuksHeader, read: ReadArea, passphrase: bytes) -> tuple[int, bytes] | None:
    """The first slot that the passphrase opens, and the key; None where it opens none. Raises CodecError."""
    for number in header.active:
        key = open_slot(header, read, number, passphrase)
        if key is not None:
            return number, key
    return None


def open_slot(header: LuksHeader, read: ReadArea, number: int, passphrase: bytes) -> bytes | None:
    """The key, if the passphrase opens this slot."""
    slot = header.slots[number]
    if not slot.active:
        return None
    cipher = cipher_of(header, _derived(header, slot, passphrase))
    material = read(slot.material_sector * SECTOR_BYTES, header.material_bytes)
    if len(material) != header.material_bytes:
        raise CodecError(f"the material of key slot {number} is cut off")
    split = cipher.decrypt(0, material)[: header.key_bytes * STRIPES]
    key = _merge(split, header.key_bytes, header.hash_name)
    return key if hmac.compare_digest(_digest(header, key), header.digest) else None


def _derived(header: LuksHeader, slot: KeySlot, passphrase: bytes) -> bytes:
    hash_of(header.hash_name)
    return hashlib.pbkdf2_hmac(header.hash_name, passphrase, slot.salt, slot.iterations, header.key_bytes)


def _digest(header: LuksHeader, key: bytes) -> bytes:
    hash_of(header.hash_name)
    return hashlib.pbkdf2_hmac(header.hash_name, key, header.digest_salt, header.digest_iterations, _DIGEST_BYTES)


# The key, split and merged


def _merge(split: bytes, key_bytes: int, hash_name: str) -> bytes:
    block = bytes(key_bytes)
    last = len(split) - key_bytes
    for at in range(0, last, key_bytes):
        block = _diffused(_xor(block, split[at : at + key_bytes]), hash_name)
    return _xor(block, split[last:])


def _split(key: bytes, hash_name: str) -> bytes:
    stripes = os.urandom(len(key) * (STRIPES - 1))
    block = bytes(len(key))
    for at in range(0, len(stripes), len(key)):
        block = _diffused(_xor(block, stripes[at : at + len(key)]), hash_name)
    return stripes + _xor(block, key)


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(len(one))


def _diffused(block: bytes, hash_name: str) -> bytes:
    """Every byte of a part of the block depends on every other of it."""
    new = hash_of(hash_name)
    step = new().digest_size
    return b"".join(
        new(struct.pack(">I", number) + block[at : at + step]).digest()[: len(block) - at]
        for number, at in enumerate(range(0, len(block), step))
    )


# Making and changing


@dataclass(frozen=True, slots=True)
class NewLuks:
    """What a new header shall be; the defaults are QEMU's. ``iter_time_ms``: how long a guess at a passphrase takes here."""

    cipher: str = "aes"
    key_bits: int = 256
    chaining: str = "xts"
    vectors: str = "plain64"
    vectors_hash: str | None = None
    hash_name: str = "sha256"
    iter_time_ms: int = 2000

    @property
    def mode(self) -> str:
        return f"{self.chaining}-{self.vectors}" + (f":{self.vectors_hash}" if self.vectors_hash is not None else "")

    @property
    def key_bytes(self) -> int:
        return self.key_bits // 8 * (2 if self.chaining == "xts" else 1)

    @property
    def slot_sectors(self) -> int:
        """From the material of one key slot to that of the next."""
        return align_up(self.key_bytes * STRIPES, _MATERIAL_ALIGNMENT * SECTOR_BYTES) // SECTOR_BYTES

    @property
    def payload_sector(self) -> int:
        """Where the data begins: behind the header and the material of all slots."""
        return _MATERIAL_ALIGNMENT + SLOTS * self.slot_sectors


def create(wanted: NewLuks, passphrase: bytes) -> tuple[bytes, bytes]:
    """Header and key material, slot 0 of which the passphrase opens, and the key. Raises CodecError for what cannot be."""
    key = os.urandom(wanted.key_bytes)
    slots = tuple(
        KeySlot(False, 0, bytes(_SALT_BYTES), _MATERIAL_ALIGNMENT + number * wanted.slot_sectors) for number in range(SLOTS)
    )
    header = LuksHeader(
        wanted.cipher,
        wanted.mode,
        wanted.hash_name,
        wanted.payload_sector,
        len(key),
        bytes(_DIGEST_BYTES),
        os.urandom(_SALT_BYTES),
        max(MIN_ITERATIONS, iterations_for(wanted.hash_name, wanted.iter_time_ms, _DIGEST_BYTES) // 8),
        str(uuid.uuid4()),
        slots,
    )
    header = replace(header, digest=_digest(header, key))
    cipher_of(header, key)
    area = encode(header).ljust(header.payload_sector * SECTOR_BYTES, b"\0")
    return with_slot(area, 0, key, passphrase, wanted.iter_time_ms), key


def with_slot(area: bytes, number: int, key: bytes, passphrase: bytes, iter_time_ms: int = 2000) -> bytes:
    """``area`` with a slot that the passphrase opens. Raises CodecError where the slot is in use."""
    header = parse(area)
    if header.slots[number].active:
        raise CodecError(f"key slot {number} is in use")
    iterations = max(MIN_ITERATIONS, iterations_for(header.hash_name, iter_time_ms, header.key_bytes))
    slot = replace(header.slots[number], active=True, iterations=min(iterations, MAX_ITERATIONS), salt=os.urandom(_SALT_BYTES))
    cipher = cipher_of(header, _derived(header, slot, passphrase))
    split = _split(key, header.hash_name).ljust(header.material_bytes, b"\0")
    return _replaced(area, header, number, slot, cipher.encrypt(0, split))


def without_slot(area: bytes, number: int) -> bytes:
    """``area`` with this slot disabled, and its material overwritten."""
    header = parse(area)
    slot = KeySlot(False, 0, bytes(_SALT_BYTES), header.slots[number].material_sector)
    return _replaced(area, header, number, slot, os.urandom(header.material_bytes))


def _replaced(area: bytes, header: LuksHeader, number: int, slot: KeySlot, material: bytes) -> bytes:
    slots = (*header.slots[:number], slot, *header.slots[number + 1 :])
    changed = bytearray(area.ljust(header.area_bytes, b"\0"))
    changed[:HEADER_BYTES] = encode(replace(header, slots=slots))
    at = slot.material_sector * SECTOR_BYTES
    changed[at : at + len(material)] = material
    return bytes(changed)


def iterations_for(hash_name: str, milliseconds: int, key_bytes: int) -> int:
    """How many iterations of PBKDF2 take so long here."""
    hash_of(hash_name)
    count = MIN_ITERATIONS
    while True:
        began = time.process_time()
        hashlib.pbkdf2_hmac(hash_name, b"passphrase", bytes(_SALT_BYTES), count, key_bytes)
        took = time.process_time() - began
        if took > 0.02 or milliseconds <= 1:
            return int(count * milliseconds / 1000 / took) if took else count
        count *= 4
