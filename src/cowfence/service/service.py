"""A server with all that belongs to it: exports that come and go, a control socket, and somebody who watches."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Self, TypeVar

import cowfence
from cowfence.disk.opener import Refs
from cowfence.errors import CowfenceError, Invalid
from cowfence.nbd.server import Server
from cowfence.ops.backup import BackupPlan, end_backup, left_behind, plan_of
from cowfence.service.backup import Backup, Moment
from cowfence.service.config import ExportPlan, ServerSettings, ServiceConfig, check_config
from cowfence.service.control import ControlServer
from cowfence.service.exports import OpenedExport, check_bitmap_name, is_export_name
from cowfence.service.registry import Registry, Served, left_alone

if TYPE_CHECKING:
    from ssl import SSLContext

    from cowfence.qcow2.encryption import Secrets
    from cowfence.service.metrics import MetricsServer

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_SOON_SECONDS: Final = 0.02


def moment_name(export: str, snapshot: str) -> str:
    """Under which a snapshot of an export's image is exported."""
    return f"{export}@{snapshot}"


def policy_of(plan: ExportPlan) -> Refs:
    """By which the files are opened that the image of an export names."""
    if plan.untrusted:
        return Refs.none()
    if plan.roots:
        return Refs.under(os.path.dirname(os.path.abspath(plan.spec.path)), *plan.roots)
    return Refs.beside(plan.spec.path)


class Service:
    """Opens everything that ``config`` says, but does not listen yet. ``secrets``: of images for which the configuration names
    no file; ``again``: reads the configuration again.

    Raises as ``OpenedExport``, ``nbd.tls`` and ``ControlServer`` do; then all is closed again.
    """

    def __init__(
        self,
        config: ServiceConfig,
        *,
        secrets: Secrets | None = None,
        again: Callable[[], ServiceConfig] | None = None,
        until_unused: bool = False,
    ) -> None:
        self._settings = config.server
        self._secrets = secrets
        self._again = again
        self._plans: dict[str, ExportPlan] = {}
        self._changing = threading.Lock()
        self._hung_up = threading.Lock()
        self._reload_waits = False
        self._began = time.monotonic()
        self.registry = Registry()
        self._files = ExitStack()
        try:
            self._files.callback(self.registry.close)
            for plan in config.exports:
                self._add(plan)
            self.server = Server(
                self.registry,
                limits=config.server.limits,
                tls=_tls(config.server),
                tls_required=not config.server.tls_offered,
                until_unused=until_unused,
                on_unused=self.registry.unused,
            )
            self._files.callback(self.server.close)
            self._control, self._metrics = self._begin_control(), self._begin_metrics()
        except BaseException:
            self._files.close()
            raise

    def _begin_control(self) -> ControlServer | None:
        if self._settings.control is None:
            return None
        from cowfence.service.live import LiveCommands

        control = ControlServer(self._settings.control, LiveCommands(self).commands)
        self._files.callback(control.close)
        return control

    def _begin_metrics(self) -> MetricsServer | None:
        if self._settings.metrics is None:
            return None
        from cowfence.service.metrics import MetricsServer

        metrics = MetricsServer(self._settings.metrics, self.registry)
        self._files.callback(metrics.close)
        return metrics

    def run(self, ready: Callable[[], None]) -> None:
        """Listen where the settings say (or where ``server`` listens already), call ``ready``, and serve until a signal or a
        command ends it. Then everything is committed and closed. Raises what that raises, and as ``Server.listen_`` does."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: self.server.stop())
            signal.signal(signal.SIGHUP, lambda _number, _frame: self._on_hangup())
            for helper in (self._control, self._metrics):
                if helper is not None:
                    helper.start()
            ready()
            self.server.serve_forever()
        finally:
            self.close()

    def close(self) -> None:
        """Commit and close everything. May be called again. Raises what that raises."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_hangup(self) -> None:
        if self._again is None:
            self.server.stop()
        elif not self._reload_waits:
            # Opening images is no business of a signal handler, nor of the thread that serves.
            self._reload_waits = True
            threading.Thread(target=self._reload_and_tell, name="reload").start()

    def _reload_and_tell(self) -> None:
        with self._hung_up:
            self._reload_waits = False
            try:
                _log.info("the configuration was read again: %s", self.reload())
            except CowfenceError as error:
                _log.error("the configuration is not, or not wholly, as the file says: %s", error)

    # --- exports ---

    def _add(self, plan: ExportPlan) -> None:
        secrets = self._secrets if plan.secret_file is None else _of_file(plan.secret_file)
        opened = OpenedExport(plan.spec, refs=policy_of(plan), secrets=secrets)
        try:
            self.registry.add(plan.spec.name, opened)
        except BaseException:
            opened.close()
            raise
        self._plans[plan.spec.name] = plan
        if plan.spec.snapshots and isinstance(opened.image, cowfence.Qcow2Disk):
            for snapshot in opened.image.snapshots():
                moment = Moment(
                    opened.image,
                    plan.spec.path,
                    snapshot,
                    refs=policy_of(plan),
                    secrets=secrets,
                    assume_backing_format=plan.spec.assume_backing_format,
                    clients=plan.spec.clients,
                )
                name = moment_name(plan.spec.name, snapshot.name)
                if name in self.registry or not is_export_name(name):  # QEMU makes several snapshots of one name
                    name = moment_name(plan.spec.name, snapshot.id)
                try:
                    self.registry.add(name, moment)
                except BaseException:
                    moment.close()
                    raise

    def _in_server(self, function: Callable[[], _T]) -> _T:
        """What ``function`` returns, or raises of ours, in the serving thread: no client comes or goes meanwhile."""
        done = threading.Event()
        results: list[_T] = []
        errors: list[CowfenceError] = []

        def call() -> None:
            try:
                results.append(function())
            except CowfenceError as error:
                errors.append(error)
            finally:
                done.set()

        self.server.call(call)
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    def reload(self) -> dict[str, list[str]]:
        """Read the configuration again: exports that are new in it are opened, those that it has no more are closed when their
        last client has left. One that is described otherwise now is both, where it has no clients; else it stays as it is. So
        does one of which there is a backup, or a snapshot that has clients.

        Returns the names: ``added``, ``removed``, ``in-use``. Raises Invalid where there is no configuration, or it is wrong;
        then all is as it was. Where an image cannot be opened, the others are still brought up to date.
        """
        if self._again is None:
            raise Invalid("the server has no configuration file")
        with self._changing:
            config = self._again()
            check_config(config)
            if config.server != self._settings:
                raise Invalid("[server] is as it was when the server began; stop it and start it again to change that")
            wanted = {plan.spec.name: plan for plan in config.exports}
            removed: list[str] = []
            in_use: list[str] = []
            for name in sorted(self._plans, key=lambda name: name in wanted):
                if wanted.get(name) == self._plans[name]:
                    continue
                left = self._in_server(partial(self._take_away, name, although_used=name not in wanted))
                if left is None:
                    in_use.append(name)
                    continue
                del self._plans[name]
                removed.append(name)
                for served in left:
                    self.registry.wait_until_closed(served)
            new = [name for name in wanted if name not in self._plans]
            failed: CowfenceError | None = None
            for name in new:
                try:
                    self._add(wanted[name])
                except CowfenceError as error:
                    failed = failed or error
            if failed is not None:
                raise failed
            return {"added": new, "removed": removed, "in-use": in_use}

    @contextmanager
    def without_clients(self, name: str) -> Iterator[None]:
        """An export has no clients, and none comes in until the end: who tries is told to try again. Raises Invalid where it
        has some."""
        with self._changing:
            export = self.registry.served(name).export

            def hold() -> None:
                if export.stats.clients:
                    raise Invalid(f"the export {name!a} has clients, whose disk would become another one under them")
                export.held.set()

            left_alone(export)
            try:
                self._in_server(hold)
                # What clients that are gone had asked for may still wait for a thread, and must not be done to the other disk.
                while self._in_server(lambda: self.server.works_for(export)):
                    time.sleep(_SOON_SECONDS)
                yield
            finally:
                export.held.clear()

    def views_of(self, name: str) -> list[tuple[str, Backup | Moment]]:
        """The backups and snapshots of an export that are exported themselves."""
        opened = self.registry.served(name)
        assert isinstance(opened, OpenedExport)  # since it has a plan
        others = [(other, self.registry.served(other)) for other in self.registry]
        return [(other, view) for other, view in others if isinstance(view, Backup | Moment) and view.disk is opened.image]

    def _take_away(self, name: str, *, although_used: bool) -> list[Served] | None:
        """No new client finds an export, nor its snapshots: those of them that are being closed now. None where it stays, since
        there is a backup of it, or a snapshot of it is used, or it itself is, unless it goes ``although_used``."""
        used = bool(self.registry[name].stats.clients)
        views = self.views_of(name)
        if (used and not although_used) or any(isinstance(view, Backup) or view.export.stats.clients for _, view in views):
            return None
        closing: list[Served] = [self.registry.remove(other) for other, _ in views]
        last = self.registry.remove(name)
        return closing if used else [*closing, last]

    def begin_backup(self, backup_plan: BackupPlan, of: str, opened: OpenedExport) -> None:
        """Export ``of`` as it is now, under the backup's name. Raises as ``Backup`` does, and Invalid where it is taken."""
        name = backup_plan.name
        with self._changing:
            if name in self.registry:
                raise Invalid(f"there is an export {name!a} already")
            if not is_export_name(name):
                raise Invalid(f"the name of an export is UTF-8, which {name!a} is not")
            for bitmap in (backup_plan.bitmap, backup_plan.next_bitmap):
                if bitmap is not None:
                    check_bitmap_name(bitmap)
            self._check_no_view_of_backup(name, of)
            plan = self._plans[of]
            secrets = self._secrets if plan.secret_file is None else _of_file(plan.secret_file)
            backup = Backup(
                backup_plan,
                opened.image,
                plan.spec.path,
                refs=policy_of(plan),
                secrets=secrets,
                assume_backing_format=plan.spec.assume_backing_format,
                clients=plan.spec.clients,
            )
            self.registry.add(name, backup)

    def _check_no_view_of_backup(self, name: str, of: str) -> None:
        """Raises Invalid where the moment that a backup of this name left behind is exported like any snapshot."""
        for other, view in self.views_of(of):
            if isinstance(view, Moment) and (found := plan_of(view.snapshot)) is not None and found.name == name:
                raise Invalid(f"the moment of the backup {name!a} is exported as {other!a}")

    def end_backup(self, name: str, *, failed: bool, of: str | None = None) -> None:
        """Give up what was kept for a backup; where it has ``failed``, its bitmaps become one again, else the old one goes.
        ``of``: the export of which it is, or was before its server died, a backup (default: any).

        Raises Invalid where there is no such backup, or it has clients, and as ``ops.backup.end_backup`` does.
        """
        with self._changing:
            # One of this name may be going on of another export: that one is not meant.
            if name not in self.registry or (of is not None and not self._is_backup_of(name, of)):
                self._end_left_behind(name, [*self._plans] if of is None else [of], failed=failed)
                return
            backup = self.registry.served(name)
            if not isinstance(backup, Backup):
                raise Invalid(f"the export {name!a} is no backup")
            if not left_alone(backup.export):
                raise Invalid(f"the backup {name!a} has clients")
            # Nobody takes the image away before it is ended, or begins a backup of this name.
            self.registry.wait_until_closed(self._in_server(partial(self._take_away_unused, name, backup, failed=failed)))
            if backup.failure is not None:
                raise backup.failure

    def _is_backup_of(self, name: str, of: str) -> bool:
        backup, opened = self.registry.served(name), self.registry.served(of)
        return isinstance(backup, Backup) and isinstance(opened, OpenedExport) and backup.disk is opened.image

    def _end_left_behind(self, name: str, exports: Sequence[str], *, failed: bool) -> None:
        found: list[tuple[str, cowfence.Qcow2Disk, BackupPlan]] = []
        for of in exports:
            opened = self.registry.served(of)
            disk = opened.image if isinstance(opened, OpenedExport) else None
            plan = left_behind(disk, name) if isinstance(disk, cowfence.Qcow2Disk) else None
            if plan is not None:
                assert isinstance(disk, cowfence.Qcow2Disk)  # it has a plan
                found.append((of, disk, plan))
        if not found:
            raise Invalid(f"there is no backup {name!a}, and none is left in an image")
        if len(found) > 1:
            raise Invalid(f"which export? there are backups {name!a} of {', '.join(repr(of) for of, _, _ in found)}")
        ((of, disk, plan),) = found
        self._check_no_view_of_backup(name, of)
        end_backup(disk, plan, failed=failed)

    def _take_away_unused(self, name: str, backup: Backup, *, failed: bool) -> Served:
        if backup.export.stats.clients:
            raise Invalid(f"the export {name!a} has clients")
        backup.failed = failed
        return self.registry.remove(name)

    def begin_backup_of_only(self, name: str) -> None:
        """The same of the only export."""
        of = self.only_name()
        served = self.registry.served(of)
        assert isinstance(served, OpenedExport)  # since it has a plan
        self.begin_backup(BackupPlan(name), of, served)

    def only_name(self) -> str:
        """Of the export that is not a backup, where there is just one. Raises Invalid where one has to be named."""
        if len(self._plans) != 1:
            raise Invalid(f"which export? there are {', '.join(map(repr, self._plans))}")
        return next(iter(self._plans))

    def drain(self) -> None:
        """No new clients; the server ends when the last one has left. From any thread."""
        self.server.call(self.server.drain)

    def status(self) -> dict[str, object]:
        """What is served, and what was asked of it."""
        exports: dict[str, object] = {}
        for name in self.registry:
            served = self.registry.served(name)
            image = served.image if isinstance(served, OpenedExport) else None
            exports[name] = {
                "image": served.spec.path if isinstance(served, OpenedExport) else None,
                "virtual-size": served.export.disk.size,
                "writable": served.export.writable,
                **served.export.stats.to_dict(),
                **(image.statistics() if isinstance(image, cowfence.Qcow2Disk) else {}),
            }
        return {"pid": os.getpid(), "uptime-seconds": round(time.monotonic() - self._began, 3), "exports": exports}


def _tls(settings: ServerSettings) -> SSLContext | None:
    if settings.tls is None:
        return None
    from cowfence.nbd.tls import server_context

    return server_context(settings.tls, verify_peer=settings.verify_clients)


def _of_file(path: str) -> Secrets:
    from cowfence.errors import from_os_error

    try:
        with open(path, "rb") as file:
            value = file.read()
    except OSError as error:
        raise from_os_error(path, "open", 0, error) from error
    return lambda _: [value]
