"""The policy of references, rule by rule, by both ways to resolve a path beneath a directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfence.disk import opener
from cowfence.disk.opener import OpenFile, Place, Refs, check_name, printable
from cowfence.errors import Refused, StorageFailed

OPENAT2 = opener._openat2


@pytest.fixture(params=["openat2", "components"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "components":
        monkeypatch.setattr(opener, "_openat2", lambda *_arguments: None)
    return str(request.param)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """images/top and images/base, images/sub/deep, and a secret beside the directory."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("images/top", "images/base", "images/sub/deep", "secret"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def top(pool: Path) -> Iterator[Place]:
    fd = os.open(pool / "images/top", os.O_RDONLY)
    yield Place.of_top(fd, pool / "images/top")
    os.close(fd)


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def content(opened: OpenFile) -> str:
    with os.fdopen(opened.fd) as stream:
        return stream.read()


@pytest.mark.parametrize("reference", ["base", "./base", "sub/../base", "../images/base", "sub/deep"])
def test_names_beneath_the_directory_of_the_image(pool: Path, top: Place, reference: str) -> None:
    refs = Refs.under(pool) if "images" in reference else Refs.beside(pool / "images/top")
    opened = refs.follow(reference, top)
    assert opened.name == str((pool / "images" / reference).resolve())
    assert os.get_blocking(opened.fd)
    assert not os.get_inheritable(opened.fd)
    assert content(opened) == "images/" + ("sub/deep" if "deep" in reference else "base")


def test_absolute_names_are_allowed_beneath_a_root(pool: Path, top: Place) -> None:
    assert content(Refs.beside(pool / "images/top").follow(str(pool / "images/base"), top)) == "images/base"
    assert content(Refs.under(pool).follow(str(pool / "secret"), top)) == "secret"


@pytest.mark.parametrize(
    "reference", ["../secret", "sub/../../secret", "{pool}/secret", "{pool}/images/../secret", "/etc/passwd"]
)
def test_names_outside_are_refused_with_the_flag_to_add(pool: Path, top: Place, reference: str) -> None:
    with pytest.raises(Refused, match="--ref-root DIR"):
        Refs.beside(pool / "images/top").follow(reference.format(pool=pool), top)


def test_another_root_widens(pool: Path, top: Place) -> None:
    other = pool / "other"
    other.mkdir()
    (other / "base2").write_text("other")
    refs = Refs.under(pool / "images", other)
    assert content(refs.follow("../other/base2", top)) == "other"
    assert content(refs.follow("base", top)) == "images/base"
    with pytest.raises(Refused):
        refs.follow("../secret", top)


def test_relative_names_resolve_against_the_image_that_holds_them(pool: Path, top: Place) -> None:
    refs = Refs.under(pool / "images")
    deep = refs.follow("sub/deep", top)
    assert deep.place.directory == str(pool / "images/sub")
    assert deep.place.depth == 1
    with pytest.raises(StorageFailed):
        refs.follow("base", deep.place)
    assert content(refs.follow("../base", deep.place)) == "images/base"
    os.close(deep.fd)


def test_top_image_may_be_named_through_a_link(pool: Path) -> None:
    (pool / "vm").mkdir()
    (pool / "vm/disk").symlink_to(pool / "images/top")
    (pool / "vm/base").write_text("beside the link")
    (pool / "way").symlink_to(pool / "vm")
    fd = os.open(pool / "way/disk", os.O_RDONLY)
    place = Place.of_top(fd, pool / "way/disk")
    refs = Refs.beside(pool / "way/disk")
    assert content(refs.follow("base", place)) == "beside the link"
    assert content(refs.follow(str(pool / "way/base"), place)) == "beside the link"
    os.close(fd)


@pytest.mark.parametrize("target", ["secret", "images/base"])
def test_symbolic_links_are_not_followed(pool: Path, top: Place, target: str) -> None:
    (pool / "images/link").symlink_to(pool / target)
    (pool / "images/dirlink").symlink_to(pool)
    for reference in ("link", f"dirlink/{target}"):
        with pytest.raises(Refused, match="symbolic link"):
            Refs.beside(pool / "images/top").follow(reference, top)
        assert content(Refs.trust_all().follow(reference, top)) == target


def test_descriptors_of_this_process_are_no_files_of_an_image(pool: Path, top: Place) -> None:
    with open(pool / "secret") as secret:
        for reference in (f"/proc/self/fd/{secret.fileno()}", f"/dev/fd/{secret.fileno()}"):
            with pytest.raises(Refused):
                Refs.under(pool).follow(reference, top)
            with pytest.raises(Refused, match="symbolic link"):
                Refs.under("/").follow(reference, top)


@pytest.mark.parametrize("refs", [Refs.under("/"), Refs.trust_all()], ids=["under", "trust_all"])
def test_only_regular_files(pool: Path, top: Place, refs: Refs) -> None:
    os.mkfifo(pool / "images/fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(pool / "images/socket"))
    for reference in ("fifo", "socket", "sub", ".", "..", "/dev/null", "/dev/zero"):
        with pytest.raises((Refused, StorageFailed)):  # A directory by its own name is refused before it is looked at.
            refs.follow(reference, top)
    with pytest.raises(Refused, match="no regular file"):
        refs.follow("fifo", top)


def test_a_fifo_put_there_after_the_look_does_not_block(pool: Path, top: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(pool / "images/fifo")
    look = Refs._check_type
    looks: list[str] = []

    def blind_at_first(self: Refs, status: os.stat_result, shown: str, kind: str) -> None:
        looks.append(shown)
        if len(looks) > 1:
            look(self, status, shown, kind)

    monkeypatch.setattr(Refs, "_check_type", blind_at_first)
    with pytest.raises(Refused, match="no regular file"):
        Refs.under(pool).follow("fifo", top)


@pytest.mark.parametrize(
    "reference",
    ["json:{}", "json:{/}", "nbd://host/export", "nbd:unix:/tmp/s", "file:base", "fd:3", "https://host/i", "a:b", "", "a\0b"],
)
def test_protocols_are_refused_under_every_policy_and_at_creation(pool: Path, top: Place, reference: str) -> None:
    with pytest.raises(Refused):
        check_name(reference)
    for refs in (Refs.none(), Refs.under("/"), Refs.trust_all(), Refs.explicit({reference: pool / "secret"})):
        with pytest.raises(Refused):
            refs.follow(reference, top)


def test_a_colon_behind_a_slash_is_a_file_name(pool: Path, top: Place) -> None:
    (pool / "images/a:b").write_text("colon")
    check_name("./a:b")
    assert content(Refs.under(pool).follow("./a:b", top)) == "colon"


def test_none_opens_nothing(top: Place) -> None:
    with pytest.raises(Refused, match="--ref-root DIR"):
        Refs.none().follow("base", top)


def test_explicit_opens_what_is_provided_and_nothing_else(pool: Path, top: Place) -> None:
    with open(pool / "secret") as secret:
        refs = Refs.explicit({"base": pool / "images/sub/deep", "by-descriptor": secret.fileno()})
        assert content(refs.follow("base", top)) == "images/sub/deep"
        opened = refs.follow("by-descriptor", top)
        assert opened.fd != secret.fileno()
        assert content(opened) == "secret"
        for reference in ("sub/deep", str(pool / "images/base")):
            with pytest.raises(Refused, match="provides none"):
                refs.follow(reference, top)
        with pytest.raises(Refused, match="relative"):
            Refs.under("/").follow("base", opened.place)


def test_loops_are_found_by_identity(pool: Path, top: Place) -> None:
    refs = Refs.under(pool)
    os.link(pool / "images/top", pool / "images/alias")
    for reference in ("top", "alias"):
        with pytest.raises(Refused, match="loop"):
            refs.follow(reference, top)
    base = refs.follow("base", top)
    for reference in ("top", "base"):
        with pytest.raises(Refused, match="loop"):
            refs.follow(reference, base.place)
    os.close(base.fd)


def test_depth_is_limited(pool: Path, top: Place) -> None:
    place = top
    for depth in range(opener.MAX_DEPTH + 1):
        (pool / f"images/{depth}").write_text("")
        if depth == opener.MAX_DEPTH:
            with pytest.raises(Refused, match="deeper than 32"):
                Refs.under(pool).follow(f"{depth}", place)
            break
        opened = Refs.under(pool).follow(f"{depth}", place)
        os.close(opened.fd)
        place = opened.place


def test_missing_files_are_no_matter_of_policy(pool: Path, top: Place) -> None:
    for refs in (Refs.under(pool / "images"), Refs.trust_all()):
        with pytest.raises(StorageFailed, match="No such file"):
            refs.follow("missing", top)


def test_files_are_read_only_unless_asked_for(pool: Path, top: Place) -> None:
    opened = Refs.under(pool).follow("base", top)
    with pytest.raises(OSError):
        os.write(opened.fd, b"x")
    os.close(opened.fd)
    opened = Refs.under(pool).follow("base", top, writable=True)
    assert os.write(opened.fd, b"x") == 1
    os.close(opened.fd)


def test_names_in_messages_cannot_steer_a_terminal(top: Place) -> None:
    assert printable("plain name") == "plain name"
    with pytest.raises(Refused) as caught:
        Refs.none().follow("evil\x1b[2J\nname", top)
    assert str(caught.value).isprintable()


def test_this_kernel_has_openat2(pool: Path) -> None:
    root_fd = os.open(pool, os.O_PATH)
    try:
        fd = OPENAT2(root_fd, "secret", os.O_RDONLY)
        if fd is None:
            pytest.skip("no openat2 here: only the way by components was tested")
        os.close(fd)
    finally:
        os.close(root_fd)
