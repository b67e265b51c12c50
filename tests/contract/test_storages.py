"""The storage contract, over every implementation and wrapper."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
from storage_contract import StorageContract

from cowfence.errors import Invalid
from cowfence.storage.base import Storage
from cowfence.storage.fault import FaultyStorage
from cowfence.storage.file import FileStorage
from cowfence.storage.memory import MemoryStorage
from cowfence.storage.oplog import OpLog
from cowfence.storage.overlay import OverlayStorage
from cowfence.storage.record import RecordingStorage
from cowfence.storage.wrapper import StorageWrapper


class TestMemory(StorageContract):
    def build(self, initial: bytes, *, writable: bool) -> Storage:
        return MemoryStorage(initial, writable=writable)


class TestWrapper(StorageContract):
    def build(self, initial: bytes, *, writable: bool) -> Storage:
        return StorageWrapper(MemoryStorage(initial, writable=writable))


class TestOverlay(StorageContract):
    def build(self, initial: bytes, *, writable: bool) -> Storage:
        return OverlayStorage(MemoryStorage(initial, writable=False), writable=writable)


class TestRecording(StorageContract):
    def build(self, initial: bytes, *, writable: bool) -> Storage:
        return RecordingStorage(MemoryStorage(initial, writable=writable), OpLog())


class TestFaultyWithoutFaults(StorageContract):
    def build(self, initial: bytes, *, writable: bool) -> Storage:
        return FaultyStorage(MemoryStorage(initial, writable=writable))


class TestFile(StorageContract):
    direct = False

    @pytest.fixture(autouse=True)
    def directory(self, tmp_path: Path) -> None:
        self.paths = (tmp_path / f"{n}.img" for n in itertools.count())

    def build(self, initial: bytes, *, writable: bool) -> Storage:
        path = next(self.paths)
        path.write_bytes(initial)
        return FileStorage.open(path, writable=writable, direct=self.direct)


class TestRecordingFile(TestFile):
    def build(self, initial: bytes, *, writable: bool) -> Storage:
        return RecordingStorage(super().build(initial, writable=writable), OpLog())


class TestDirectFile(TestFile):
    direct = True

    @pytest.fixture(autouse=True)
    def supported(self, directory: None, tmp_path: Path) -> None:  # noqa: ARG002 - set up first
        probe = tmp_path / "probe"
        probe.touch()
        try:
            FileStorage.open(probe, direct=True).close()
        except Invalid as exc:
            pytest.skip(str(exc))


class TestFileInMemory(TestFile):
    """tmpfs knows neither ZERO_RANGE nor (in most kernels) reads that must not wait."""

    @pytest.fixture(autouse=True)
    def directory(self, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: ARG002
        shm = Path("/dev/shm")
        if not shm.is_dir():
            pytest.skip("no tmpfs at /dev/shm")
        self.holder = tempfile.TemporaryDirectory(dir=shm)
        self.paths = (Path(self.holder.name) / f"{n}.img" for n in itertools.count())
