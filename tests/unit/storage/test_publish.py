"""New files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cowfence.errors import Invalid, Locked, StorageFailed
from cowfence.storage.file import FileStorage
from cowfence.storage.publish import NewFile


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_nothing_is_at_the_final_name_before_publish(tmp_path: Path) -> None:
    target = tmp_path / "new.img"
    with NewFile(target) as new:
        new.storage.writev(0, (b"content",), "test")
        (partial,) = names(tmp_path)
        assert partial.startswith(".new.img")
        assert partial.endswith(".partial")
        new.publish()
        assert names(tmp_path) == ["new.img"]
    assert target.read_bytes() == b"content"
    FileStorage.open(target, writable=True).close()


def test_the_mode_obeys_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with NewFile(tmp_path / "new.img") as new:
            new.publish()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new.img").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_without_publish_nothing_is_left_and_the_old_file_stays(tmp_path: Path, error: type[BaseException] | None) -> None:
    (tmp_path / "old.img").write_bytes(b"old")

    def attempt() -> None:
        with NewFile(tmp_path / "old.img") as new:
            new.storage.writev(0, (b"new",), "test")
            if error is not None:
                raise error

    if error is None:
        attempt()
    else:
        with pytest.raises(error):
            attempt()
    assert names(tmp_path) == ["old.img"]
    assert (tmp_path / "old.img").read_bytes() == b"old"


def test_a_killed_process_leaves_no_target(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from cowfence.storage.publish import NewFile\n"
        "new = NewFile(sys.argv[1])\n"
        "new.storage.writev(0, (b'half',), 'test')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "new.img")],
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.endswith(".partial")
    with NewFile(tmp_path / "new.img") as new:
        new.publish()
    assert names(tmp_path) == [left, "new.img"]


def test_an_existing_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "old.img"
    target.write_bytes(b"old, and longer")
    target.chmod(0o600)
    with NewFile(target) as new:
        new.storage.writev(0, (b"new",), "test")
        new.publish()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_an_image_in_use_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "busy.img"
    target.write_bytes(b"old")
    for writable in (True, False):
        user = FileStorage.open(target, writable=writable)
        with pytest.raises(Locked):
            NewFile(target)
        user.close()
        assert names(tmp_path) == ["busy.img"]
    with NewFile(target), pytest.raises(Locked):
        FileStorage.open(target)


def test_an_image_that_appeared_meanwhile_and_is_in_use_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "late.img"
    with NewFile(target) as new:
        target.write_bytes(b"late")
        user = FileStorage.open(target)
        with pytest.raises(Locked):
            new.publish()
        user.close()
    assert target.read_bytes() == b"late"


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.img"
    link.symlink_to("there/real.img")
    for content in (b"first", b"second"):
        with NewFile(link) as new:
            new.storage.writev(0, (content,), "test")
            new.publish()
        assert link.is_symlink()
        assert names(tmp_path / "there") == ["real.img"]
        assert link.read_bytes() == content


def test_what_cannot_be_an_image_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(Invalid):
            NewFile(tmp_path / name)
    with pytest.raises(StorageFailed):
        NewFile(tmp_path / "no" / "such" / "directory" / "x.img")
    assert names(tmp_path) == ["directory", "fifo"]


def test_whoever_wrote_may_close_before_publish(tmp_path: Path) -> None:
    with NewFile(tmp_path / "new.img") as new:
        new.storage.writev(0, (b"content",), "test")
        new.storage.close()
        new.publish()
    assert (tmp_path / "new.img").read_bytes() == b"content"


def test_a_fence_that_failed_earlier_forbids_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with NewFile(tmp_path / "new.img") as new:
        monkeypatch.setattr(os, "fdatasync", lost)
        with pytest.raises(StorageFailed):
            new.storage.fence("test")
        monkeypatch.undo()
        new.storage.close()
        with pytest.raises(StorageFailed):
            new.publish()
    assert names(tmp_path) == []


def test_the_file_is_fenced_before_the_rename_and_the_directory_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def watch(name: str, step: str) -> None:
        real = getattr(os, name)

        def watched(*arguments: object) -> object:
            steps.append(step)
            return real(*arguments)

        monkeypatch.setattr(os, name, watched)

    watch("fdatasync", "fence file")
    watch("rename", "rename")
    watch("fsync", "fence directory")
    with NewFile(tmp_path / "new.img") as new:
        new.publish()
        new.publish()
    assert steps == ["fence file", "rename", "fence directory"]


def test_a_long_name_still_has_room_for_a_partial(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 125 + ".img")
    with NewFile(target) as new:
        new.publish()
    assert names(tmp_path) == [target.name]


def test_a_forked_child_does_not_remove_its_parents_file(tmp_path: Path) -> None:
    with NewFile(tmp_path / "new.img") as new:
        child = os.fork()
        if child == 0:
            new.close()
            os._exit(0)
        os.waitpid(child, 0)
        new.publish()
    assert names(tmp_path) == ["new.img"]
