"""Only a whole report that follows its writer's last one is a promise."""

from __future__ import annotations

from guest.console import LAG, Console, Promises
from guest.content import SLOTS


def fed(*lines: str) -> Console:
    console = Console(Promises(2))
    for line in lines:
        console.feed(line)
    return console


def test_reports_move_the_promises_on() -> None:
    console = fed(
        "booted\r\n", "mounted\r\n", "synced 0 0\r\n", "synced 1 0\r\n", "synced 0 1\r\n", "failed 1 1\r\n", "ended\r\n"
    )
    assert console.booted
    assert (console.mounted, console.synced, console.failed, console.unknown) == (True, 3, 1, [])
    assert console.promises.last == [1, 0]


def test_what_does_not_follow_is_not_believed() -> None:
    console = fed("synced 0 5", "synced 7 0", "sync", "synced 0 0 0", "")
    assert console.synced == 0
    assert console.unknown == ["synced 0 5", "synced 7 0", "sync", "synced 0 0 0"]


def test_the_guest_says_why_it_cannot_work() -> None:
    assert fed("broken mount").broken == "mount"


def test_a_second_boot_goes_on_where_the_first_ended() -> None:
    first = fed("synced 0 0", "synced 0 1")
    second = Console(first.promises)
    second.feed("synced 0 2")
    assert (second.synced, first.promises.last[0]) == (1, 2)


def test_each_file_has_its_last_promise_and_what_may_be_under_way() -> None:
    promises = Promises(1)
    assert promises.promised(0, 3) is None
    assert [promises.under_way(0, slot) for slot in range(LAG + 1)] == [*range(LAG), None]
    promises.last = [SLOTS + 2]
    assert [promises.promised(0, slot) for slot in (0, 2, 3, SLOTS - 1)] == [SLOTS, SLOTS + 2, 3, SLOTS - 1]
    assert [promises.under_way(0, slot) for slot in (2, 3, 2 + LAG, 3 + LAG)] == [None, SLOTS + 3, SLOTS + 2 + LAG, None]
