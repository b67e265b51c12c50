"""What the control socket can do to the images that are served, and tell about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cowfence
from cowfence.errors import Invalid
from cowfence.ops.backup import BackupPlan, plan_of
from cowfence.ops.check import check_storage
from cowfence.ops.commit import commit_disk
from cowfence.ops.resize import resize_disk
from cowfence.ops.snapshot import apply_snapshot, create_snapshot, delete_snapshot
from cowfence.qcow2.describe import snapshot_dict
from cowfence.service.backup import Moment
from cowfence.service.control import Command, Fields, qcow2_of
from cowfence.service.exports import OpenedExport

if TYPE_CHECKING:
    from cowfence.service.service import Service


class LiveCommands:
    """``commands``: by name, for ``ControlServer``."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.commands: dict[str, Command] = {
            "status": self._status,
            "snapshot-create": self._snapshot_create,
            "snapshot-apply": self._snapshot_apply,
            "snapshot-delete": self._snapshot_delete,
            "snapshot-list": self._snapshot_list,
            "bitmap-add": self._bitmap_add,
            "bitmap-remove": self._bitmap_remove,
            "bitmap-clear": self._bitmap_clear,
            "bitmap-enable": self._bitmap_enable,
            "bitmap-disable": self._bitmap_disable,
            "bitmap-merge": self._bitmap_merge,
            "bitmap-list": self._bitmap_list,
            "resize": self._resize,
            "check": self._check,
            "commit": self._commit,
            "flush": self._flush,
            "backup-begin": self._backup_begin,
            "backup-end": self._backup_end,
            "reload": self._reload,
            "drain": self._drain,
            "stop": self._stop,
        }

    def _image(self, fields: Fields) -> tuple[str, OpenedExport]:
        name = fields.optional_text("export") or self._service.only_name()
        served = self._service.registry.served(name)
        if not isinstance(served, OpenedExport):
            raise Invalid(f"the export {name!a} is a backup")
        return name, served

    def _disk(self, fields: Fields) -> cowfence.Qcow2Disk:
        name, opened = self._image(fields)
        return qcow2_of(opened.image, name)

    # --- looking ---

    def _status(self, request: Mapping[str, Any]) -> object:
        Fields(request).end()
        return self._service.status()

    def _snapshot_list(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        name, opened = self._image(fields)
        fields.end()
        if not isinstance(opened.image, cowfence.Qcow2Disk):
            raise Invalid(f"the export {name!a} is no qcow2 image")
        return [snapshot_dict(snapshot) for snapshot in opened.image.snapshots()]

    def _bitmap_list(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        name, opened = self._image(fields)
        fields.end()
        if not isinstance(opened.image, cowfence.Qcow2Disk):
            raise Invalid(f"the export {name!a} is no qcow2 image")
        return [bitmap._asdict() for bitmap in opened.image.bitmaps]

    def _check(self, request: Mapping[str, Any]) -> object:
        """The image as it is on disk, while guests wait: leaks, and damage."""
        fields = Fields(request)
        disk = self._disk(fields)
        fields.end()
        return disk.alter(lambda _: check_storage(disk.storage)).to_dict()

    # --- changing ---

    def _snapshot_create(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        disk, name = self._disk(fields), fields.text("name")
        fields.end()
        return snapshot_dict(create_snapshot(disk, name))

    def _snapshot_apply(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        name, opened = self._image(fields)
        disk, which = qcow2_of(opened.image, name), fields.text("name")
        fields.end()
        with self._service.without_clients(name):
            return snapshot_dict(apply_snapshot(disk, which))

    def _snapshot_delete(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        name, opened = self._image(fields)
        disk, which = qcow2_of(opened.image, name), fields.text("name")
        fields.end()
        exported = {view.snapshot.id for _, view in self._service.views_of(name) if isinstance(view, Moment)}
        for snapshot in disk.snapshots():
            if which not in (snapshot.id, snapshot.name):
                continue
            if snapshot.id in exported:
                raise Invalid(f"the snapshot {snapshot.name!a} is exported")
            if plan_of(snapshot) is not None:
                raise Invalid(f"the snapshot {snapshot.name!a} is a backup's (backup-end)")
        return snapshot_dict(delete_snapshot(disk, which))

    def _bitmap_add(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        disk, name = self._disk(fields), fields.text("name")
        granularity_bytes = fields.optional_number("granularity")
        fields.end()
        disk.bitmaps.add(name, granularity_bytes=granularity_bytes)
        return None

    def _bitmap_remove(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        disk, name = self._disk(fields), fields.text("name")
        fields.end()
        disk.bitmaps.remove(name)
        return None

    def _bitmap_clear(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        disk, name = self._disk(fields), fields.text("name")
        fields.end()
        disk.bitmaps.clear(name)
        return None

    def _bitmap_enable(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        disk, name = self._disk(fields), fields.text("name")
        fields.end()
        disk.bitmaps.enable(name)
        return None

    def _bitmap_disable(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        disk, name = self._disk(fields), fields.text("name")
        fields.end()
        disk.bitmaps.disable(name)
        return None

    def _bitmap_merge(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        disk, name, source = self._disk(fields), fields.text("name"), fields.text("source")
        fields.end()
        disk.bitmaps.merge(name, [disk.bitmaps.bits_of(source)])
        return None

    def _resize(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        _, opened = self._image(fields)
        size_bytes, shrink = fields.optional_number("size"), fields.flag("shrink")
        preallocation = fields.optional_text("preallocation") or "off"
        fields.end()
        if size_bytes is None:
            raise Invalid("size is missing")
        old_bytes = opened.image.size
        resize_disk(opened.image, size_bytes, shrink=shrink, preallocation=preallocation)
        return {"old-virtual-size": old_bytes, "virtual-size": opened.image.size}

    def _commit(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        name, opened = self._image(fields)
        keep = fields.flag("keep")
        fields.end()
        disk = qcow2_of(opened.image, name)
        if opened.base is None:
            raise Invalid(f"the export {name!a} was not opened for commits into its backing file (commit-into-backing)")
        commit_disk(disk, opened.base, keep=keep)
        return {"base-virtual-size": opened.base.size}

    def _flush(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        _, opened = self._image(fields)
        fields.end()
        opened.image.flush()
        return None

    # --- backups ---

    def _backup_begin(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        name, opened = self._image(fields)
        backup_name = fields.text("name")
        plan = BackupPlan(backup_name, fields.optional_text("bitmap"), fields.optional_text("next-bitmap"))
        fields.end()
        self._service.begin_backup(plan, name, opened)
        return {"export": backup_name}

    def _backup_end(self, request: Mapping[str, Any]) -> object:
        fields = Fields(request)
        backup_name, failed, of = fields.text("name"), fields.flag("failed"), fields.optional_text("export")
        fields.end()
        self._service.end_backup(backup_name, failed=failed, of=of)
        return None

    # --- the server ---

    def _reload(self, request: Mapping[str, Any]) -> object:
        Fields(request).end()
        return self._service.reload()

    def _drain(self, request: Mapping[str, Any]) -> object:
        Fields(request).end()
        self._service.drain()
        return None

    def _stop(self, request: Mapping[str, Any]) -> object:
        Fields(request).end()
        self._service.server.stop()
        return None
