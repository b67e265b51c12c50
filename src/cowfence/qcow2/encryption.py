"""Encryption of guest data: the cipher between the read and write paths and the file (section "Data encryption").

Only the guest's plain data clusters are enciphered, in sectors of 512 bytes; tables are not, and neither are compressed
clusters, which nobody writes into an encrypted image. A sector's number is its place in the file with LUKS, its guest offset
with the legacy method: so no cluster is ever moved as it stands, copy-on-write deciphers and enciphers. Nothing in the file
reads as zeros by itself, so a new cluster is written as a whole, and a place that is kept without data is a zero cluster.

The LUKS header stands in clusters of its own. A change of its key slots (crash contract, R13):

=========  ===========================================================================  =====================================
step       on disk                                                                      a crash after it
=========  ===========================================================================  =====================================
switch     PREPARE  the whole new header in fresh clusters                              the old header counts: old passphrases
           LINK     its offset in the extension, in sector 0                            the new one does
wipe       random bytes over the old header, fenced                                     the same; what was the old is leaked
free       RECLAIM  the old clusters                                                    the same
=========  ===========================================================================  =====================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from cowfence.errors import Corrupt, Invalid, NotThisFormat, Unsupported
from cowfence.qcow2.alteration import Alteration
from cowfence.qcow2.extensions import EncryptionPointer, ExtensionType, encode_encryption
from cowfence.qcow2.header import CRYPT_LUKS, CRYPT_NONE, Header
from cowfence.qcow2.header_change import switch_header, with_extension
from cowfence.qcow2.state import State
from cowfence.qcow2.tables import Kind
from cowfence.qcow2.transaction import Change, Stage, write_changes
from cowfence.storage.base import Storage, read_exact, read_padded
from cowfence.units import SECTOR_BYTES

if TYPE_CHECKING:
    from cowfence.codec.luks import LuksHeader
    from cowfence.codec.sectors import SectorCipher

Secrets: TypeAlias = Callable[[str], Sequence[bytes]]
"""(name of an image's file) -> passphrases that may open it, tried in turn. May raise what the caller's way to them raises."""


class DataCipher(Protocol):
    """Enciphers whole sectors that stand at ``host`` of the file and are the guest's at ``guest``. Offsets in bytes."""

    def encrypt(self, data: bytes, host: int, guest: int) -> bytes: ...

    def decrypt(self, data: bytearray, host: int, guest: int) -> bytes: ...


class _Unlocked:
    def __init__(self, cipher: SectorCipher, *, by_guest: bool) -> None:
        self._cipher = cipher
        self._by_guest = by_guest

    def encrypt(self, data: bytes, host: int, guest: int) -> bytes:
        return self._cipher.encrypt((guest if self._by_guest else host) // SECTOR_BYTES, data)

    def decrypt(self, data: bytearray, host: int, guest: int) -> bytes:
        return self._cipher.decrypt((guest if self._by_guest else host) // SECTOR_BYTES, data)


class _Locked:
    """Of an image that is looked at without its secret."""

    def __init__(self, name: str) -> None:
        self._name = name

    def encrypt(self, data: bytes, host: int, guest: int) -> bytes:  # noqa: ARG002
        raise self._refuse()

    def decrypt(self, data: bytearray, host: int, guest: int) -> bytes:  # noqa: ARG002
        raise self._refuse()

    def _refuse(self) -> Invalid:
        return Invalid(f"{self._name}: the image is encrypted, and its secret was not given")


def data_cipher(storage: Storage, header: Header, secrets: Secrets | None) -> DataCipher | None:
    """What enciphers the data of an image; None where it is not encrypted. Without a secret that is refused when it is used.

    Raises Invalid (no passphrase fits; several for the legacy method, which cannot try them), Corrupt (the LUKS header),
    Unsupported (a cipher that is not known here).
    """
    if header.crypt_method == CRYPT_NONE:
        return None
    name = storage.name
    given = [] if secrets is None else list(secrets(name))
    if header.crypt_method != CRYPT_LUKS:
        if not given:
            return _Locked(name)
        if len(set(given)) > 1:
            # Nothing in such an image tells a wrong passphrase from the right one: a guess would spoil what is written.
            raise Invalid(f"{name}: {len(given)} secrets were given; legacy encryption cannot tell which is its own")
        from cowfence.codec.sectors import legacy_cipher

        return _Unlocked(legacy_cipher(given[0]), by_guest=True)
    pointer = header.encryption
    if pointer is None:
        raise Corrupt(f"{name}: header extensions", "the image is encrypted with LUKS and has no LUKS header")
    if not given:
        return _Locked(name)
    from cowfence.codec.luks import cipher_of

    luks = read_luks(storage, header)
    with named(name):
        _, key = unlocked(luks, _reader(storage, pointer), given, name)
        return _Unlocked(cipher_of(luks, key), by_guest=False)


def read_luks(storage: Storage, header: Header) -> LuksHeader:
    """The LUKS header. Raises Corrupt, Unsupported."""
    from cowfence.codec import luks
    from cowfence.codec.base import CodecError

    pointer = header.encryption
    where = f"{storage.name}: LUKS header"
    if pointer is None:
        raise Corrupt(where, "the image has none")
    if not luks.HEADER_BYTES <= pointer.length_bytes <= luks.MAX_AREA_BYTES:
        raise Corrupt(where, f"it has {pointer.length_bytes} bytes, must have {luks.HEADER_BYTES} to {luks.MAX_AREA_BYTES}")
    try:
        found = luks.parse(bytes(read_exact(storage, pointer.offset, luks.HEADER_BYTES, "LUKS header")))
    except CodecError as bad:
        raise Corrupt(where, str(bad)) from None
    if found.area_bytes > pointer.length_bytes:
        raise Corrupt(where, f"its key material reaches to {found.area_bytes} bytes, it has {pointer.length_bytes}")
    return found


def read_luks_file(storage: Storage) -> LuksHeader:
    """The header of a file that is encrypted as a whole, without qcow2. Raises NotThisFormat, Corrupt."""
    from cowfence.codec import luks
    from cowfence.codec.base import CodecError

    start = bytearray(luks.HEADER_BYTES)
    read_padded(storage, 0, start)
    where = f"{storage.name}: LUKS header"
    try:
        found = luks.parse(bytes(start))
    except CodecError as bad:
        if start[:4] != luks.MAGIC[:4]:
            raise NotThisFormat(storage.name, "not a LUKS file (at offset 0: no magic string)") from None
        raise Corrupt(where, str(bad)) from None
    if found.payload_sector * SECTOR_BYTES < found.area_bytes:
        raise Corrupt(where, "the data begins inside the key material")
    return found


def _reader(storage: Storage, pointer: EncryptionPointer) -> Callable[[int, int], bytes]:
    def read(offset: int, length_bytes: int) -> bytes:
        # The file may end with the last byte that was ever written.
        buffer = bytearray(length_bytes)
        read_padded(storage, pointer.offset + offset, buffer)
        return bytes(buffer)

    return read


def unlocked(luks: LuksHeader, read: Callable[[int, int], bytes], secrets: Sequence[bytes], name: str) -> tuple[int, bytes]:
    """The slot that one of these passphrases opens, and the key. Raises Invalid where none does."""
    from cowfence.codec.luks import unlock

    for secret in secrets:
        found = unlock(luks, read, secret)
        if found is not None:
            return found
    raise Invalid(f"{name}: Invalid password, cannot unlock any keyslot")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Inside it, what the codec does not know is Unsupported, by the name of the image."""
    from cowfence.codec.base import CodecError

    try:
        yield
    except CodecError as unknown:
        raise Unsupported(name, f"LUKS with {unknown}") from None


def new_cipher(area: bytes, secret: bytes, name: str) -> DataCipher:
    """That of an image in the making, whose LUKS header will be ``area``."""
    from cowfence.codec.luks import cipher_of, parse

    with named(name):
        luks = parse(area)
        _, key = unlocked(luks, lambda offset, length_bytes: area[offset : offset + length_bytes], [secret], name)
        return _Unlocked(cipher_of(luks, key), by_guest=False)


# Key slots


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What shall be otherwise with the keys, with qemu-img's words.

    ``new_secret``: a passphrase to add, into ``keyslot`` or the first free one. Without it slots are erased: ``keyslot``, or
    those that ``old_secret`` opens. ``iter_time_ms``: how long one guess at the new passphrase shall take here.
    """

    new_secret: bytes | None = None
    old_secret: bytes | None = None
    keyslot: int | None = None
    iter_time_ms: int = 2000
    force: bool = False
    """Erase the last key, too, or overwrite a slot in use: then data may be lost for ever."""


def change_keys(alteration: Alteration, change: KeyChange, secrets: Sequence[bytes]) -> None:
    """Add or erase key slots. ``secrets``: passphrases of which one opens the image; needed to add one.

    Raises Invalid (no such slot, none free, one in use, the last one, no passphrase fits), Unsupported, Corrupt, NoSpace.
    """
    state = alteration.state
    name, storage = state.storage.name, state.storage
    if state.header.crypt_method != CRYPT_LUKS:
        raise Unsupported(name, "key slots of an image that is not encrypted with LUKS")
    luks, pointer = read_luks(storage, state.header), state.header.encryption
    assert pointer is not None
    buffer = bytearray(pointer.length_bytes)
    read_padded(storage, pointer.offset, buffer)
    with named(name):
        area = changed_keys(luks, bytes(buffer), change, secrets, name)
    _replace(alteration, pointer, area)


def changed_keys(luks: LuksHeader, area: bytes, change: KeyChange, secrets: Sequence[bytes], name: str) -> bytes:
    """Header and key material as they shall be. Raises as ``change_keys`` does, and CodecError."""
    from cowfence.codec.luks import SLOTS, open_slot, with_slot, without_slot

    def read(offset: int, length_bytes: int) -> bytes:
        return area[offset : offset + length_bytes]

    slot = change.keyslot
    if slot is not None and not 0 <= slot < SLOTS:
        raise Invalid(f"Invalid keyslot {slot} specified, must be between 0 and {SLOTS - 1}")
    if change.new_secret is not None:
        if change.old_secret is not None:
            raise Invalid("'old-secret' must not be given when activating a keyslot")
        _, key = unlocked(luks, read, secrets, name)
        if slot is None:
            slot = next((number for number in range(SLOTS) if not luks.slots[number].active), None)
            if slot is None:
                raise Invalid("Can't add a keyslot - all keyslots are in use")
        elif luks.slots[slot].active:
            if not change.force:
                raise Invalid(f"Refusing to overwrite active keyslot {slot} - please erase it first")
            area = without_slot(area, slot)
        return with_slot(area, slot, key, change.new_secret, change.iter_time_ms)
    erased = [slot] if slot is not None else []
    if change.old_secret is not None:
        erased = [
            number
            for number in ([slot] if slot is not None else luks.active)
            if open_slot(luks, read, number, change.old_secret) is not None
        ]
        if not erased:
            raise Invalid("No keyslots match given (old) password for erase operation")
    if not erased:
        raise Invalid("To erase keyslot(s), either 'keyslot' or 'old-secret' must be given")
    if not change.force and slot is not None and not luks.slots[slot].active:
        raise Invalid(f"Given keyslot {slot} is already erased (inactive)")
    if not set(luks.active) - set(erased) and not change.force:
        what = f"the only active keyslot {erased[0]}" if len(erased) == 1 else "all active keyslots"
        raise Invalid(f"Attempt to erase {what} which will erase all the data in the image irreversibly - refusing operation")
    for number in erased:
        if luks.slots[number].active:
            area = without_slot(area, number)
    return area


def _replace(alteration: Alteration, old: EncryptionPointer, area: bytes) -> None:
    """The header becomes ``area``, and what it was is gone."""
    state = alteration.state
    geometry = state.geometry
    clusters = geometry.clusters_for(len(area))

    def switch() -> None:
        run = state.allocator.reserve_contiguous(clusters, wait=True)
        offset = run.first << geometry.cluster_bits
        state.layout.claim_new(offset, clusters, Kind.ENCRYPTION)
        state.refcounts.increment(run.first, clusters)
        content = area.ljust(clusters << geometry.cluster_bits, b"\0")
        state.pending.put(Stage.PREPARE, offset, content, "luks.new", Kind.ENCRYPTION)
        switch_header(state, lambda now: _pointing(now, offset, len(area)))

    alteration.transaction(switch)
    first, count = old.offset >> geometry.cluster_bits, geometry.clusters_for(old.length_bytes)
    _wipe(state, first << geometry.cluster_bits, count << geometry.cluster_bits)
    alteration.read_again()
    alteration.transaction(lambda: state.pending.free(first, count, table=True))


def _pointing(now: Header, offset: int, length_bytes: int) -> Header:
    extensions = with_extension(now, ExtensionType.ENCRYPTION, encode_encryption(EncryptionPointer(offset, length_bytes)).data)
    return replace(now, extensions=extensions, backing_offset=0)


def _wipe(state: State, offset: int, length_bytes: int) -> None:
    """Nothing leads there any more, durably: what could still open the image is overwritten before anybody hears that it is."""
    change = Change(Stage.RECLAIM, 0, offset, os.urandom(length_bytes), "luks.wipe", Kind.ENCRYPTION)
    write_changes(state.storage, state.layout, [change])
    state.committer.fence("luks.fence")
