"""What is changed while it is served, in a server of this process: who comes meanwhile, and backups that nobody ended.

A killed server is a copy of its image, made while it runs: what had been written is in the page cache, and nothing else is
left.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cowfence
from cowfence.disk.base import BLOCKED, Disk, Outcome, Request
from cowfence.errors import CowfenceError, Invalid
from cowfence.nbd import workers
from cowfence.nbd.client import NbdDisk, list_exports
from cowfence.nbd.messages import Command
from cowfence.ops.backup import BackupPlan, begin_backup
from cowfence.ops.diff import diff
from cowfence.ops.snapshot import apply_snapshot
from cowfence.qcow2.snapshot_table import Snapshot
from cowfence.service import live
from cowfence.service.config import ExportPlan, ServerSettings, ServiceConfig
from cowfence.service.exports import ExportSpec
from cowfence.service.live import LiveCommands
from cowfence.service.service import Service
from cowfence.units import KIB, MIB
from helpers_nbd import BareClient

SIZE = 4 * MIB


class Serving:
    """A server of one image, and what ``cowfence ctl`` does to it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._commands = LiveCommands(service).commands

    def ctl(self, verb: str, **fields: object) -> Any:
        return self._commands[verb]({"command": verb, **{name.replace("_", "-"): value for name, value in fields.items()}})

    def write(self, *offsets: int, fill: bytes = b"x") -> None:
        with NbdDisk(self.service.server.uri("disk")) as disk:
            for offset in offsets:
                disk.write(offset, fill * 4096)
            disk.flush()


@contextmanager
def serving(image: Path, **spec: Any) -> Iterator[Serving]:
    plan = ExportPlan(ExportSpec(str(image), "disk", commit_interval=None, **spec))
    with Service(ServiceConfig(ServerSettings(), (plan,))) as service:
        service.server.listen_unix(str(image) + ".sock")
        with running(service) as server:
            yield server


@contextmanager
def running(service: Service) -> Iterator[Serving]:
    thread = threading.Thread(target=service.server.serve_forever)
    thread.start()
    try:
        yield Serving(service)
    finally:
        service.server.stop()
        thread.join(20)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """With a bitmap, ``mon``, that has recorded the second 64 KiB."""
    path = tmp_path / "disk.qcow2"
    with cowfence.create(path, SIZE) as disk:
        disk.write(0, b"\1" * MIB)
        disk.bitmaps.add("mon")
        disk.write(64 * KIB, b"\2" * 100)
    return path


def killed(image: Path) -> Path:
    """The image as a server leaves it that is killed now."""
    return Path(shutil.copy(image, image.with_name("killed.qcow2")))


def bitmaps(serving: Serving) -> dict[str, tuple[bool, bool]]:
    """Of each, whether it records, and whether it is not to be trusted."""
    return {one["name"]: (one["enabled"], one["inconsistent"]) for one in serving.ctl("bitmap-list")}


def dirty(path: Path, name: str) -> list[int]:
    """Which 64 KiB."""
    with cowfence.open(path) as disk:
        ranges = disk.bitmaps.ranges(name)
    return [at // (64 * KIB) for start, length in ranges for at in range(start, start + length, 64 * KIB)]


def test_nobody_comes_in_while_a_snapshot_is_applied(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(image) as server:
        uri, control = server.service.server.uri("disk"), server.ctl
        control("snapshot-create", name="then")
        server.write(0, fill=b"z")
        turned_away: list[str] = []

        def apply(disk: cowfence.Qcow2Disk, which: str) -> Snapshot:
            for name in ("disk", ""):
                with pytest.raises(CowfenceError) as caught:
                    NbdDisk(server.service.server.uri(name))
                turned_away.append(str(caught.value))
            assert [listed.name for listed in list_exports(server.service.server.uri())] == ["disk"]
            return apply_snapshot(disk, which)

        monkeypatch.setattr(live, "apply_snapshot", apply)
        control("snapshot-apply", name="then")
        assert all("try again" in what for what in turned_away)
        assert len(turned_away) == 2
        with NbdDisk(uri) as disk:
            assert disk.read(0, 4) == b"\1" * 4
            monkeypatch.setattr("cowfence.service.registry._PATIENCE_SECONDS", 0)
            with pytest.raises(Invalid, match="has clients"):
                control("snapshot-apply", name="then")
        # Also where it failed, the export is there again.
        monkeypatch.undo()
        with pytest.raises(Invalid, match="no snapshot"):
            control("snapshot-apply", name="nothing")
        NbdDisk(uri).close()


def test_one_command_takes_back_a_backup_whose_server_was_killed(image: Path) -> None:
    with serving(image) as server:
        server.write(128 * KIB)
        server.ctl("backup-begin", name="t/u?e", bitmap="mon", next_bitmap="tue")
        server.write(256 * KIB, 2 * MIB)
        image = killed(image)
    with serving(image) as server:
        server.write(3 * MIB)
        with pytest.raises(Invalid, match="is a backup's"):
            server.ctl("snapshot-delete", name=server.ctl("snapshot-list")[0]["name"])
        assert bitmaps(server) == {"mon": (False, False), "tue": (True, True)}
        with pytest.raises(Invalid, match="none is left in an image"):
            server.ctl("backup-end", name="other")
        server.ctl("backup-end", name="t/u?e", failed=True)
        assert bitmaps(server) == {"mon": (True, False)}
        assert server.ctl("snapshot-list") == []
        with pytest.raises(Invalid, match="none is left in an image"):
            server.ctl("backup-end", name="t/u?e", failed=True)
        server.write(3 * MIB + 512 * KIB)
    assert dirty(image, "mon") == [1, 2, 4, 32, 48, 56]


def test_a_backup_that_is_begun_again_takes_back_what_a_killed_server_left(image: Path) -> None:
    with serving(image) as server:
        server.ctl("backup-begin", name="tue", bitmap="mon", next_bitmap="tue")
        server.write(256 * KIB)
        image = killed(image)
    with serving(image) as server:
        server.ctl("backup-begin", name="tue", bitmap="mon", next_bitmap="tue")
        with NbdDisk(server.service.server.uri("tue"), contexts=("qemu:dirty-bitmap:mon",)) as backup:
            told = [(start, length) for start, length, state in backup.status("qemu:dirty-bitmap:mon", 0, SIZE) if state]
            assert told == [(64 * KIB, 64 * KIB), (256 * KIB, 64 * KIB)]
            assert backup.read(256 * KIB, 1) == b"x"
        server.write(MIB)
        server.ctl("backup-end", name="tue")
        assert bitmaps(server) == {"tue": (True, False)}
    assert dirty(image, "tue") == [16]


def test_a_server_that_ends_takes_back_what_nobody_ended(image: Path) -> None:
    with serving(image) as server:
        server.ctl("backup-begin", name="tue", bitmap="mon", next_bitmap="tue")
        server.write(256 * KIB)
    assert dirty(image, "mon") == [1, 4]
    with cowfence.open(image) as disk:
        assert [bitmap.name for bitmap in disk.bitmaps] == ["mon"]
        assert not disk.snapshots()


def test_a_good_backup_whose_server_was_killed_before_its_end(image: Path) -> None:
    """The next bitmap has what came after the moment, and goes on."""
    with serving(image) as server:
        server.write(128 * KIB)
        server.ctl("backup-begin", name="tue", bitmap="mon", next_bitmap="tue")
        server.write(256 * KIB)
        image = killed(image)
    with serving(image) as server:
        server.write(2 * MIB)
        server.ctl("backup-end", name="tue")
        assert bitmaps(server) == {"tue": (True, False)}
        server.write(3 * MIB)
        image = killed(image.rename(image.with_name("running.qcow2")))
    with serving(image) as server:
        # Not this time: it was recording, and there is no moment.
        assert bitmaps(server) == {"tue": (True, True)}
        with pytest.raises(Invalid, match="a full backup is needed"):
            server.ctl("backup-begin", name="wed", bitmap="tue", next_bitmap="wed")
        assert bitmaps(server) == {"tue": (True, True)}
        server.ctl("backup-begin", name="full")
        server.ctl("backup-end", name="full")
    assert dirty(image.with_name("running.qcow2"), "tue") == [4, 32, 48]


def test_where_it_is_not_known_what_has_changed_the_command_says_so(image: Path) -> None:
    """The server was killed when it had taken the backup back: the one bitmap that is left was recording."""
    with serving(image) as server:
        server.ctl("backup-begin", name="tue", bitmap="mon", next_bitmap="tue")
        server.ctl("bitmap-enable", name="mon")
        image = killed(image)
    with serving(image) as server:
        with pytest.raises(Invalid, match="a full backup is needed"):
            server.ctl("backup-end", name="tue", failed=True)
        assert len(server.ctl("snapshot-list")) == 1
        server.ctl("backup-end", name="tue")
        assert server.ctl("snapshot-list") == []


def test_a_moment_that_is_exported_like_any_snapshot_is_not_let_go(image: Path) -> None:
    with serving(image) as server:
        server.ctl("backup-begin", name="tue")
        image = killed(image)
    with serving(image, snapshots=True) as server:
        for verb in ("backup-end", "backup-begin"):
            with pytest.raises(Invalid, match="is exported as"):
                server.ctl(verb, name="tue")


def test_what_a_kill_leaves_is_what_differs(tmp_path: Path) -> None:
    """By the tables: all that differs from the moment, and no more than a bitmap would have had."""
    image = tmp_path / "disk.qcow2"
    with cowfence.create(image, SIZE, cluster_size=64 * KIB) as disk:
        disk.write(0, b"\1" * MIB)
    with serving(image) as server:
        server.ctl("bitmap-add", name="mon")
        server.ctl("backup-begin", name="tue", bitmap="mon", next_bitmap="tue")
        with cowfence.open(killed(image)) as moment:
            (tmp_path / "before").write_bytes(moment.read(0, SIZE))
        with NbdDisk(server.service.server.uri("disk")) as disk:
            disk.write(10, b"here")
            disk.zero(128 * KIB, 64 * KIB)
            disk.write(2 * MIB, b"new")
        image = killed(image)
    with serving(image) as server:
        server.ctl("backup-end", name="tue", failed=True)
    with cowfence.open(image) as now, cowfence.open(tmp_path / "before", format="raw") as then:
        changes = {change.start // (64 * KIB) for change in diff(then, now)}
    assert set(dirty(image, "mon")) == changes


def test_what_a_client_that_is_gone_had_asked_for_is_not_done_to_another_disk(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writes may still wait for a thread of the pool when a snapshot is applied."""
    asked, go_on = threading.Event(), threading.Event()
    submit = workers.submit

    def slow(disk: Disk, requests: list[Request], *, wait: bool) -> list[Outcome]:
        asked.set()
        assert go_on.wait(10)
        return submit(disk, requests, wait=wait)

    with serving(image) as server:
        server.ctl("snapshot-create", name="then")
        monkeypatch.setattr(workers, "submit", slow)  # of the pool; the loop has a name of its own for it
        monkeypatch.setattr("cowfence.nbd.server.submit", lambda _disk, requests, **_: [BLOCKED] * len(requests))
        client = BareClient(Path(str(image) + ".sock"), "disk")
        client.send(Command.WRITE, length=4, data=b"late")
        assert asked.wait(10)
        client.sock.sendall(bytes(28))  # no request: the server closes the connection at once
        assert client.closed_by_server()
        applying = threading.Thread(target=server.ctl, args=("snapshot-apply",), kwargs={"name": "then"})
        applying.start()
        applying.join(0.3)
        waits = applying.is_alive()
        go_on.set()
        assert waits
        applying.join(10)
        assert not applying.is_alive()
    with cowfence.open(image) as disk:
        assert disk.read(0, 4) == b"\1" * 4


def test_the_backup_of_another_export_is_not_the_one_that_is_ended(image: Path) -> None:
    """Where one of the same name goes on, what is said of another export must not call that one good."""
    other = image.with_name("other.qcow2")
    shutil.copy(image, other)
    with cowfence.open(other, writable=True) as disk:
        begin_backup(disk, BackupPlan("tue", "mon", "tue"))
    plans = tuple(ExportPlan(ExportSpec(str(path), path.stem, commit_interval=None)) for path in (image, other))
    with Service(ServiceConfig(ServerSettings(), plans)) as service, running(service) as server:
        server.ctl("backup-begin", export="disk", name="tue", bitmap="mon", next_bitmap="tue")
        server.ctl("backup-end", name="tue", export="other")
        assert [one["name"] for one in server.ctl("bitmap-list", export="other")] == ["tue"]
        assert [one["name"] for one in server.ctl("bitmap-list", export="disk")] == ["mon", "tue"]
        for export in ("other", "tue"):
            with pytest.raises(Invalid, match="no backup"):
                server.ctl("backup-end", name="tue", export=export)
        server.ctl("backup-end", name="tue", export="disk")
        assert [one["name"] for one in server.ctl("bitmap-list", export="disk")] == ["tue"]


def test_the_bitmap_of_an_export_that_begins_at_an_offset(image: Path) -> None:
    with serving(image, bitmaps=("mon",), offset=48 * KIB) as server:
        export = server.service.registry["disk"]
        assert export.status(2, 0, MIB) == [(16 * KIB, 0), (64 * KIB, 1), (MIB - 80 * KIB, 0)]
        assert export.status(2, 32 * KIB, 4 * KIB) == [(4 * KIB, 1)]
