"""The policy of references: which files an image may make us open.

A name stored in an image is data that anyone may have written: opening it without a question has let guests read the host's
secrets more than once. So nobody but this module turns such a name into a descriptor, by one of four policies:

- ``Refs.beside(image)``, the default: files under the image's own directory.
- ``Refs.under(directory, ...)``: files under any of these directories.
- ``Refs.explicit({name: path or descriptor})``: exactly what the caller provides; the file system is not searched.
- ``Refs.none()``: nothing. ``Refs.trust_all()``: any plain path, as QEMU does.

Under all of them:

- No protocols: a name that starts with ``json:``, or has a ``:`` before its first ``/``, is refused (``check_name``; creating
  an image asks it too). URLs come from the caller only.
- Only regular files, and block devices where allowed. What a name leads to is looked at through an O_PATH descriptor before it
  is opened, because opening alone can block (a FIFO) or act (a device).
- A file that is already part of the chain is refused (by device and inode, so that a hard link does not hide it), and so is a
  chain deeper than 32.

Under directories, paths are resolved by ``openat2`` beneath a descriptor of the directory, without following any symbolic
link: the kernel checks what it opens, so that nothing can be exchanged between the check and the opening. Where the kernel or
a sandbox has no ``openat2``, each component is opened by itself with O_NOFOLLOW.

A relative name is meant relative to the directory of the image that holds it. That is the directory by which the caller named
the image, even if its last component is a symbolic link; so does QEMU.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from cowfence.errors import Refused, from_os_error
from cowfence.storage.host import above_standard

MAX_DEPTH: Final = 32
"""Backing files below the top image."""

Identity: TypeAlias = tuple[int, int]
"""Device and inode: what makes two descriptors the same file."""

_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_BENEATH: Final = 0x08
_SYS_OPENAT2: Final = 437
_TRIES: Final = 16
"""``openat2`` answers EAGAIN where a rename elsewhere kept it from being sure about a ``..``."""

_WIDEN: Final = "add --ref-root DIR to allow another directory"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an open image stands in its chain: what its own references resolve against.

    ``directory``: absolute, or None for a file that is known by its descriptor only. ``chain``: the identities of the files
    from the top image to this one.
    """

    name: str
    directory: str | None
    chain: tuple[Identity, ...]

    @classmethod
    def of_top(cls, fd: int, path: str | os.PathLike[str] | None, name: str | None = None) -> Place:
        """The place of the image that the caller opened as ``fd``, by ``path`` if it has one."""
        text = None if path is None else os.fspath(path)
        directory = None if text is None else os.path.realpath(os.path.dirname(os.path.abspath(text)))
        return cls(name or text or f"descriptor {fd}", directory, (_identity(os.fstat(fd)),))

    @property
    def depth(self) -> int:
        """0 for the top image, 1 for its backing file, and so on."""
        return len(self.chain) - 1


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open descriptor, which belongs to the caller now, the name to show for it, and its place in the chain."""

    fd: int
    name: str
    place: Place


@dataclass(frozen=True, slots=True)
class _Found:
    fd: int
    name: str
    directory: str | None


def check_name(reference: str, kind: str = "backing file") -> None:
    """Raises Refused for a name that must not stand in an image: empty, with a NUL byte, or with a protocol."""
    if not reference or "\0" in reference:
        raise Refused(printable(reference), f"the {kind}'s name is empty or has a NUL byte")
    if ":" in reference.split("/", 1)[0]:
        raise Refused(
            printable(reference),
            f"the {kind}'s name has a protocol; images may name plain files only (a file of this name can be written ./NAME)",
        )


def printable(name: str) -> str:
    """The name as it is, or quoted and escaped where it holds anything that a terminal would act on."""
    return name if name.isprintable() else ascii(name)


class Refs(ABC):
    """A policy of references. Made by one of the static methods; see the module."""

    def __init__(self, *, allow_devices: bool = False, max_depth: int = MAX_DEPTH) -> None:
        self.allow_devices = allow_devices
        self.max_depth = max_depth

    @staticmethod
    def none() -> Refs:
        """Open nothing that an image names."""
        return _NoRefs()

    @staticmethod
    def beside(image: str | os.PathLike[str], *, allow_devices: bool = False) -> Refs:
        """Open files under the directory of ``image``."""
        return _RefsUnder((os.path.dirname(os.path.abspath(image)),), allow_devices=allow_devices)

    @staticmethod
    def under(*directories: str | os.PathLike[str], allow_devices: bool = False, max_depth: int = MAX_DEPTH) -> Refs:
        """Open files under any of these directories."""
        return _RefsUnder(tuple(map(os.path.abspath, directories)), allow_devices=allow_devices, max_depth=max_depth)

    @staticmethod
    def explicit(files: Mapping[str, str | os.PathLike[str] | int], *, allow_devices: bool = False) -> Refs:
        """Open exactly these: from a name, as it stands in the image, to a path or an open descriptor (which is duplicated)."""
        return _ExplicitRefs(dict(files), allow_devices=allow_devices)

    @staticmethod
    def trust_all(*, allow_devices: bool = True, max_depth: int = MAX_DEPTH) -> Refs:
        """Open any plain path, through symbolic links too: for images that the caller wrote."""
        return _TrustedRefs(allow_devices=allow_devices, max_depth=max_depth)

    def follow(self, reference: str, place: Place, *, kind: str = "backing file", writable: bool = False) -> OpenFile:
        """Open what the image at ``place`` calls ``reference``.

        ``kind`` says what it is, for messages. ``writable`` is for commit and rebase only: backing files are opened read-only.
        Raises Refused (the policy), StorageFailed (the host: no such file, no permission).
        """
        check_name(reference, kind)
        shown = printable(reference)
        if place.depth >= self.max_depth:
            raise Refused(shown, f"the chain of backing files is deeper than {self.max_depth}")
        access = os.O_RDWR if writable else os.O_RDONLY
        try:
            found = self._open(reference, place, access, kind)
        except OSError as error:
            raise from_os_error(shown, "open", 0, error) from error
        identity = _identity(os.fstat(found.fd))
        if identity in place.chain:
            os.close(found.fd)
            raise Refused(shown, "the backing files form a loop: this file is in the chain already")
        name = printable(found.name)
        return OpenFile(found.fd, name, Place(name, found.directory, (*place.chain, identity)))

    @abstractmethod
    def _open(self, reference: str, place: Place, access: int, kind: str) -> _Found: ...

    def _open_checked(self, resolve: _Resolver, access: int, shown: str, kind: str) -> int:
        """Look at what ``resolve`` leads to, and open it if it is of a kind that may be opened."""
        peek = resolve(os.O_PATH)
        try:
            status = os.fstat(peek)
        finally:
            os.close(peek)
        self._check_type(status, shown, kind)
        # Without O_NONBLOCK a FIFO put there since the look would block us; the second look catches it.
        fd = above_standard(resolve(access | os.O_NONBLOCK | os.O_NOCTTY))
        try:
            self._check_type(os.fstat(fd), shown, kind)
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_type(self, status: os.stat_result, shown: str, kind: str) -> None:
        if stat.S_ISREG(status.st_mode):
            return
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if stat.S_ISBLK(status.st_mode):
            if self.allow_devices:
                return
            raise Refused(shown, f"the {kind} is a block device, which this policy does not allow")
        raise Refused(shown, f"the {kind} is no regular file")


class _NoRefs(Refs):
    def _open(self, reference: str, place: Place, access: int, kind: str) -> _Found:  # noqa: ARG002 (it opens nothing)
        raise Refused(printable(reference), f"no {kind} is opened for {place.name}: references are switched off; {_WIDEN}")


class _TrustedRefs(Refs):
    def _open(self, reference: str, place: Place, access: int, kind: str) -> _Found:
        path = os.path.join(_directory_of(reference, place, kind), reference)
        fd = self._open_checked(_PlainPath(path), access, printable(reference), kind)
        return _Found(fd, path, os.path.realpath(os.path.dirname(path)))


class _ExplicitRefs(Refs):
    def __init__(self, files: dict[str, str | os.PathLike[str] | int], *, allow_devices: bool) -> None:
        super().__init__(allow_devices=allow_devices)
        self._files = files

    def _open(self, reference: str, place: Place, access: int, kind: str) -> _Found:
        shown = printable(reference)
        given = self._files.get(reference)
        if given is None:
            raise Refused(shown, f"{place.name} names this {kind}, but the caller provides none of this name")
        if not isinstance(given, int):
            path = os.path.abspath(given)
            fd = self._open_checked(_PlainPath(path), access, shown, kind)
            return _Found(fd, path, os.path.realpath(os.path.dirname(path)))
        self._check_type(os.fstat(given), shown, kind)
        return _Found(os.dup(given), reference, None)


class _RefsUnder(Refs):
    def __init__(self, directories: tuple[str, ...], *, allow_devices: bool, max_depth: int = MAX_DEPTH) -> None:
        super().__init__(allow_devices=allow_devices, max_depth=max_depth)
        # Both spellings: an absolute name in an image may go the way through a symbolic link that the caller went.
        self._roots = tuple((os.path.realpath(directory), directory) for directory in directories)

    def _open(self, reference: str, place: Place, access: int, kind: str) -> _Found:
        shown = printable(reference)
        directory = _directory_of(reference, place, kind)
        failure: OSError | None = None
        for root, root_as_given in self._roots:
            relative = _relative_to(root, reference, directory)
            if relative is None:
                relative = _relative_to(root_as_given, reference, directory)
            if relative is None:
                continue
            try:
                root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fd = self._open_checked(_Beneath(root_fd, relative), access, shown, kind)
                finally:
                    os.close(root_fd)
            except OSError as error:
                # A further root may hold it; the first that says more than "not in here" is told.
                if error.errno != errno.EXDEV and failure is None:
                    failure = error
                continue
            # No symbolic link was followed, so that ".." may be taken out of the text.
            path = os.path.normpath(os.path.join(root, relative))
            return _Found(fd, path, os.path.dirname(path))
        if failure is None:
            roots = ", ".join(printable(given) for _root, given in self._roots)
            raise Refused(shown, f"the {kind} of {place.name} lies outside of {roots}; {_WIDEN}")
        if failure.errno == errno.ELOOP:
            raise Refused(
                shown,
                f"the path of the {kind} goes through a symbolic link, which is not followed; add --ref-root DIR with the "
                "directory that it leads to and rebase the image to the real name",
            )
        raise failure


def _directory_of(reference: str, place: Place, kind: str) -> str:
    if place.directory is not None:
        return place.directory
    if os.path.isabs(reference):
        return "/"
    raise Refused(
        printable(reference), f"the {kind}'s name is relative, but {place.name} has no directory; provide it explicitly"
    )


def _relative_to(root: str, reference: str, directory: str) -> str | None:
    """The path from ``root`` to what ``reference`` means in ``directory``; None where it lies elsewhere by its text alone."""
    if not os.path.isabs(reference) and _is_under(directory, root):
        # Keep every ".." for the kernel: only it knows if one leads out.
        return os.path.join(os.path.relpath(directory, root), reference)
    path = os.path.normpath(os.path.join(directory, reference))
    return os.path.relpath(path, root) if _is_under(path, root) else None


def _is_under(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


class _Resolver(ABC):
    """A name that is opened more than once by the same rules: first with O_PATH, to look at it."""

    @abstractmethod
    def __call__(self, flags: int) -> int: ...


@dataclass(frozen=True, slots=True)
class _PlainPath(_Resolver):
    path: str

    def __call__(self, flags: int) -> int:
        return os.open(self.path, flags | os.O_CLOEXEC)


@dataclass(frozen=True, slots=True)
class _Beneath(_Resolver):
    """A path that must stay beneath a directory and go through no symbolic link: EXDEV and ELOOP say that it does not."""

    root_fd: int
    relative: str

    def __call__(self, flags: int) -> int:
        fd = _openat2(self.root_fd, self.relative, flags)
        return _open_by_components(self.root_fd, self.relative, flags) if fd is None else fd


def _openat2(root_fd: int, relative: str, flags: int) -> int | None:
    """The descriptor, or None where this system call does not exist here."""
    import ctypes  # Costs milliseconds, which the many images without a backing file need not pay.

    libc = ctypes.CDLL(None, use_errno=True)
    how = (ctypes.c_uint64 * 3)(
        flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS
    )
    path = os.fsencode(relative)
    error_number = errno.EAGAIN
    for _ in range(_TRIES):
        fd: int = libc.syscall(
            ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(root_fd), path, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
        )
        if fd >= 0:
            return fd
        error_number = ctypes.get_errno()
        if error_number not in (errno.EAGAIN, errno.EINTR):
            break
    if error_number in (errno.ENOSYS, errno.EPERM):  # Sandboxes of the time before openat2 answer EPERM.
        return None
    raise OSError(error_number, os.strerror(error_number))


def _open_by_components(root_fd: int, relative: str, flags: int) -> int:
    """What ``_openat2`` does, one component after the other: ``..`` goes back to a descriptor that we came through."""
    *parents, last = [part for part in relative.split("/") if part not in ("", ".")] or ["."]
    if last in (".", ".."):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    way = [os.dup(root_fd)]
    try:
        for part in parents:
            if part == "..":
                if len(way) == 1:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
                os.close(way.pop())
                continue
            fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=way[-1])
            way.append(fd)
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=way[-1])
    finally:
        for fd in way:
            os.close(fd)
