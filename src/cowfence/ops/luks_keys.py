"""Key slots of a LUKS file without qcow2, changed in place (crash contract, R13).

There is one header, so a change needs a slot of its own, and nothing that is in use is ever overwritten:

======  ==================================================================  ===================================================
change  on disk, with a fence behind each line                              a crash after it
======  ==================================================================  ===================================================
add     the key, enciphered, in the material of a free slot                 the slot is still disabled
        salt and iterations of the slot                                     the same
        the word "active", inside one sector                                the new passphrase opens it
erase   the word "disabled"                                                 the passphrase opens it no more
        random bytes over the material                                      the same
======  ==================================================================  ===================================================
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from cowfence.errors import Corrupt, Invalid
from cowfence.qcow2.encryption import KeyChange, changed_keys, named
from cowfence.storage.base import Storage, read_exact, read_padded
from cowfence.units import SECTOR_BYTES

_SLOTS_AT: Final = 208
_SLOT_BYTES: Final = 48
_DISABLED: Final = 0x0000DEAD


def change_keys(storage: Storage, change: KeyChange, secrets: Sequence[bytes]) -> None:
    """Add or erase key slots of the LUKS file in ``storage``, which is open for writing.

    ``secrets``: passphrases of which one opens it; needed to add one. Raises as ``encryption.change_keys`` does; Invalid also
    for a slot in use that was to be overwritten.
    """
    from cowfence.codec.base import CodecError
    from cowfence.codec.luks import HEADER_BYTES, SLOTS, parse

    if change.new_secret is not None and change.force:
        raise Invalid("A slot in use of a LUKS file is not overwritten: erase it first")
    storage.fence("open.fence")
    try:
        luks = parse(bytes(read_exact(storage, 0, HEADER_BYTES, "LUKS header")))
    except CodecError as bad:
        raise Corrupt(f"{storage.name}: LUKS header", str(bad)) from None
    area = bytearray(luks.area_bytes)
    read_padded(storage, 0, area)
    with named(storage.name):
        wanted = changed_keys(luks, bytes(area), change, secrets, storage.name)
        slots = parse(wanted).slots
    for number in range(SLOTS):
        if slots[number] == luks.slots[number]:
            continue
        at = slots[number].material_sector * SECTOR_BYTES
        material = wanted[at : at + luks.material_bytes]
        place = _SLOTS_AT + number * _SLOT_BYTES
        parameters = wanted[place : place + _SLOT_BYTES]
        word, rest = parameters[:4], parameters[4:]
        if slots[number].active:
            storage.writev(at, (material,), "luks.material")
            storage.fence("luks.fence")
            storage.writev(place, (struct.pack(">I", _DISABLED) + rest,), "luks.slot")
            storage.fence("luks.fence")
            storage.writev(place, (word,), "luks.link")
            storage.fence("luks.fence")
        else:
            storage.writev(place, (word,), "luks.link")
            storage.fence("luks.fence")
            storage.writev(at, (material,), "luks.wipe")
            storage.writev(place + 4, (rest,), "luks.slot")
            storage.fence("luks.fence")
