"""Ciphers against the library's own modes, and LUKS headers: made, changed, and hostile."""

from __future__ import annotations

import os
import random
import struct
from functools import cache

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cowfence.codec import luks
from cowfence.codec.base import CodecError
from cowfence.codec.sectors import legacy_cipher, sector_cipher

QUICK = luks.NewLuks(key_bits=128, chaining="cbc", iter_time_ms=1)


@cache
def made() -> tuple[bytes, bytes]:
    return luks.create(QUICK, b"passphrase")


def reader(area: bytes) -> luks.ReadArea:
    return lambda offset, length_bytes: area[offset : offset + length_bytes]


@pytest.mark.parametrize("bits", [128, 256])
@pytest.mark.parametrize("first", [0, 5, 2**40])
def test_xts_is_the_librarys(bits: int, first: int) -> None:
    key, data = os.urandom(bits // 4), os.urandom(512 * 9)
    cipher = sector_cipher("aes", "xts-plain64", key)
    expected = b"".join(
        Cipher(algorithms.AES(key), modes.XTS((first + n).to_bytes(16, "little"))).encryptor().update(data[n * 512 :][:512])
        for n in range(9)
    )
    assert cipher.encrypt(first, data) == expected
    assert cipher.decrypt(first, expected) == data


@pytest.mark.parametrize("mode", ["cbc-plain", "cbc-plain64", "cbc-essiv:sha256", "xts-plain", "xts-essiv:sha256"])
@pytest.mark.parametrize("first", [7, 2**33 + 7])
def test_modes_come_back_and_differ_by_sector(mode: str, first: int) -> None:
    data = bytes(512 * 4)
    cipher = sector_cipher("aes", mode, os.urandom(32))
    enciphered = cipher.encrypt(first, data)
    assert cipher.decrypt(first, enciphered) == data
    assert len({enciphered[at : at + 16] for at in range(0, len(enciphered), 16)}) == 128
    assert cipher.encrypt(first + 1, data)[:512] == enciphered[512:1024]
    assert (cipher.encrypt(first + 2**32, data) == enciphered) is mode.endswith("plain")


def test_cbc_is_the_librarys() -> None:
    key, data = os.urandom(32), os.urandom(1024)
    vector = (3).to_bytes(16, "little")
    first = Cipher(algorithms.AES(key), modes.CBC(vector)).encryptor().update(data[:512])
    assert sector_cipher("aes", "cbc-plain64", key).encrypt(3, data)[:512] == first


def test_legacy_keys_are_cut_and_filled() -> None:
    assert legacy_cipher(b"0123456789abcdefXYZ").encrypt(1, bytes(512)) == legacy_cipher(b"0123456789abcdef").encrypt(
        1, bytes(512)
    )
    assert legacy_cipher(b"short").encrypt(1, bytes(512)) != legacy_cipher(b"short1").encrypt(1, bytes(512))


@pytest.mark.parametrize(
    ("name", "mode", "what"),
    [
        ("serpent", "xts-plain64", "serpent"),
        ("twofish", "cbc-plain64", "twofish"),
        ("cast5", "cbc-plain64", "cast5"),
        ("aes", "ctr-plain64", "ctr"),
        ("aes", "xts-benbi", "benbi"),
        ("aes", "cbc-essiv:whirlpool", "whirlpool"),
        ("aes", "cbc-essiv:md4", "md4"),
    ],
)
def test_what_is_not_here_is_named(name: str, mode: str, what: str) -> None:
    with pytest.raises(CodecError, match=what):
        sector_cipher(name, mode, bytes(32))


def test_parts_of_sectors_are_refused() -> None:
    with pytest.raises(CodecError, match="whole sectors"):
        legacy_cipher(b"x").encrypt(0, bytes(100))


def test_slots_are_added_and_erased() -> None:
    area, key = made()
    header = luks.parse(area)
    assert luks.encode(header) == area[: luks.HEADER_BYTES]
    assert luks.unlock(header, reader(area), b"passphrase") == (0, key)
    assert luks.unlock(header, reader(area), b"Passphrase") is None
    two = luks.with_slot(area, 7, key, b"another", 1)
    assert luks.unlock(luks.parse(two), reader(two), b"another") == (7, key)
    assert luks.unlock(luks.parse(two), reader(two), b"passphrase") == (0, key)
    with pytest.raises(CodecError, match="in use"):
        luks.with_slot(two, 7, key, b"third", 1)
    one = luks.without_slot(two, 0)
    assert luks.parse(one).active == [7]
    assert luks.unlock(luks.parse(one), reader(one), b"passphrase") is None
    at = header.slots[0].material_sector * 512
    assert one[at : at + 64000] != two[at : at + 64000]


@pytest.mark.parametrize("chaining", ["xts", "cbc"])
@pytest.mark.parametrize("bits", [128, 192, 256])
def test_every_key_length(chaining: str, bits: int) -> None:
    wanted = luks.NewLuks(key_bits=bits, chaining=chaining, hash_name="sha512", iter_time_ms=1)
    area, key = luks.create(wanted, b"p")
    assert luks.unlock(luks.parse(area), reader(area), b"p") == (0, key)
    assert len(area) == luks.parse(area).payload_sector * 512


@pytest.mark.parametrize(
    ("at", "data", "what"),
    [
        (0, b"LUXS", "no LUKS header"),
        (6, b"\0\2", "version 2"),
        (8, b"\xff", "ASCII"),
        (108, struct.pack(">I", 0), "a key of 0 bytes"),
        (108, struct.pack(">I", 2**31), "a key of"),
        (164, struct.pack(">I", 2**32 - 1), "iterations"),
        (208, struct.pack(">I", 1), "neither active nor disabled"),
        (212, struct.pack(">I", 2**32 - 1), "iterations"),
        (212, struct.pack(">I", 0), "iterations"),
        (248, struct.pack(">I", 2**32 - 1), "reaches to"),
        (248, struct.pack(">I", 0), "overlaps"),
        (248 + 48, struct.pack(">I", 9), "overlaps"),
        (252, struct.pack(">I", 2**32 - 1), "stripes"),
        (252, struct.pack(">I", 0), "stripes"),
    ],
)
def test_hostile_headers_are_refused(at: int, data: bytes, what: str) -> None:
    area = made()[0]
    with pytest.raises(CodecError, match=what):
        luks.parse(area[:at] + data + area[at + len(data) : luks.HEADER_BYTES])


def test_random_headers_are_parsed_or_refused() -> None:
    rng, area = random.Random(1), made()[0]
    for _ in range(3000):
        header = bytearray(area[: luks.HEADER_BYTES])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(header))
            header[at] = rng.choice([0, 255, rng.randrange(256)])
        try:
            found = luks.parse(bytes(header[: rng.choice([600, 592, rng.randrange(600)])]))
        except CodecError:
            continue
        assert found.area_bytes <= luks.MAX_AREA_BYTES
