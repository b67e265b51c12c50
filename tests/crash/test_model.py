"""The guest's model: what it must not forget."""

from __future__ import annotations

from cowfence.crash.model import GuestModel
from cowfence.units import SECTOR_BYTES

OLD, NEW, ZERO = b"old".ljust(512, b"."), b"new".ljust(512, b"."), bytes(512)


def wrong(model: GuestModel, value: bytes) -> bool:
    return bool(list(model.wrong_sectors({} if value == model.initial else {0: value})))


def flush(model: GuestModel) -> None:
    model.end_flush(model.begin_flush())


def test_a_flush_leaves_what_was_acknowledged_and_knows_what_is_past() -> None:
    model = GuestModel(OLD)
    token = model.begin_write(0, NEW)
    assert not wrong(model, OLD)
    assert not wrong(model, NEW)
    model.end(token)
    flush(model)
    assert wrong(model, OLD)
    assert model.is_past(0, OLD)
    assert not wrong(model, NEW)


def test_a_discard_after_a_failed_write_may_leave_what_was_before_both() -> None:
    """Found by a walk: a write that a close refused, then a discard that kept the old bytes."""
    model = GuestModel(OLD)
    model.fail(model.begin_write(0, NEW))
    model.end(model.begin_discard(0, 512))
    flush(model)
    for value in (OLD, NEW, ZERO):
        assert not wrong(model, value)


def test_a_write_inside_a_flush_is_not_covered_by_it() -> None:
    model = GuestModel(OLD)
    token = model.begin_flush()
    model.end(model.begin_write(0, NEW))
    model.end_flush(token)
    assert not wrong(model, OLD)
    assert wrong(model, ZERO)
    assert list(model.wrong_sectors({}, acknowledged=True)), "with a keeper it is there all the same"


def test_a_forced_write_is_durable_alone() -> None:
    model = GuestModel(OLD * 2)
    first = model.begin_write(0, NEW)
    model.end(first)
    forced = model.begin_write(512, NEW)
    model.end(forced)
    model.end_durable(forced)
    assert not list(model.wrong_sectors({1: NEW}))
    assert list(model.wrong_sectors({0: NEW}))


def test_a_sector_that_was_only_looked_at_is_judged_like_any_other() -> None:
    model = GuestModel(bytes(2048))
    model.begin_write(0, b"a" * 512)
    foreign = {2: b"f" * 512}
    assert list(model.wrong_sectors(foreign)) == [(2, b"f" * 512)]
    assert model.readable(2) == {bytes(512)}
    assert model.allowed(2) == [bytes(512)]
    assert list(model.wrong_sectors(foreign)) == [(2, b"f" * 512)]


def test_what_is_flushed_is_told_apart_from_what_is_not() -> None:
    model = GuestModel(bytes(1024))
    token = model.begin_write(0, b"a" * 512)
    assert (model.flushed(0), model.is_flushed(0), model.is_flushed(1)) == ((bytes(512),), False, True)
    model.end(token)
    model.end_flush(model.begin_flush())
    assert (model.flushed(0), model.is_flushed(0)) == ((b"a" * 512,), True)


def test_a_bitmap_made_after_a_discard_may_have_missed_that() -> None:
    """The guest does not know whether the discard took effect; the bitmap need not have it, whichever it was."""
    model = GuestModel(b"a" * 1024)
    model.end(model.begin_discard(0, 512))
    model.begin_bitmap(b"b")
    model.end_bitmap(b"b")
    (clean,) = model.bitmaps.values()
    assert list(model.differing({0: bytes(512)}, clean)) == []
    assert list(model.differing({}, clean)) == []
    assert list(model.differing({0: b"x" * 512}, clean)) == [(0, b"x" * 512)]
    assert list(model.differing({1: bytes(512)}, clean)) == [(1, bytes(512))]


def test_what_was_begun_before_and_goes_on_may_yet_come_last() -> None:
    """A long write leaves the lock to others while the host takes its data."""
    model = GuestModel(OLD)
    long = model.begin_write(0, b"L" * SECTOR_BYTES)
    short = model.begin_write(0, b"S" * SECTOR_BYTES)
    model.end(short)
    for value in (b"L", b"S"):
        assert not list(model.wrong_sectors({0: value * SECTOR_BYTES}, acknowledged=True))
    assert list(model.wrong_sectors({}, acknowledged=True))
    model.end_flush(model.begin_flush())
    assert not list(model.wrong_sectors({0: b"L" * SECTOR_BYTES}))
    model.end(long)
    assert model.readable(0) == {b"L" * SECTOR_BYTES, b"S" * SECTOR_BYTES}
    # Nothing is under way any more: what comes now comes last.
    model.end(model.begin_write(0, b"X" * SECTOR_BYTES))
    assert model.readable(0) == {b"X" * SECTOR_BYTES}
    assert list(model.wrong_sectors({0: b"L" * SECTOR_BYTES}, acknowledged=True))


def test_what_failed_is_not_under_way() -> None:
    model = GuestModel(OLD)
    model.fail(model.begin_write(0, b"F" * SECTOR_BYTES))
    model.end(model.begin_write(0, b"S" * SECTOR_BYTES))
    assert list(model.wrong_sectors({0: b"F" * SECTOR_BYTES}, acknowledged=True))


def test_after_an_alteration_that_failed_the_guest_goes_on_upon_either_disk() -> None:
    other = NEW * 2
    model = GuestModel(OLD * 2)
    model.begin_alteration({}, other)
    assert not model.is_other_disk({0: NEW})
    assert model.is_other_disk({0: NEW, 1: NEW})
    third = b"third".ljust(SECTOR_BYTES, b".")
    model.end(model.begin_write(0, third))
    assert model.is_other_disk({0: third, 1: NEW})
    assert not model.is_other_disk({0: third})
    assert not model.is_other_disk({0: ZERO, 1: NEW})
