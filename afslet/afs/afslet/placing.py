"""An upload copied into a mounted root, through overlayfs, so that it lands in the writable layer.

The result is what ``tar -x`` gives: files and symlinks replace files and symlinks of the image, directories are merged, and
symlinks of the image that lead to directories are followed, inside the root (openat2(2): RESOLVE_IN_ROOT). A directory is
not replaced by a file, nor a file by a directory. The command has not started yet, so nothing in the root moves meanwhile;
but its symlinks are the image's, and lead anywhere.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import InvalidArgument

_INSIDE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SENDFILE = 1 << 30  # bytes at once; sendfile(2) takes at most 2 GiB


class UploadRefused(InvalidArgument):
    """An entry of an upload that cannot be placed; *path* is as the client sent it."""

    def __init__(self, path: str, cause: str) -> None:
        self.path = path
        super().__init__(f"upload of {path!r} refused: {cause}")


@dataclass(frozen=True, slots=True)
class Attributes:
    """*mode* is permission bits (0: the usual ones), *mtime* in seconds."""

    mode: int
    uid: int
    gid: int
    mtime: int


def place(
    source: Path,
    explicit: Mapping[bytes, Attributes],
    root: Path,
    first_id: int = 0,
) -> None:
    """Copy the tree *source*, which only AFS writes, into *root*; *explicit* are the directories that the client described.

    *first_id*: the root's owners are shifted, and 0 is this one. Blocking. Raises UploadRefused, and OSError such as ENOSPC.
    """
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _Placing(os.fsencode(source), explicit, top, first_id).run()
    finally:
        os.close(top)


@dataclass(frozen=True, slots=True)
class _Placing:
    source: bytes
    explicit: Mapping[bytes, Attributes]
    root: int
    first_id: int
    described: list[bytes] = field(default_factory=list)  # of explicit those that got their attributes

    def run(self) -> None:
        pending = [b""]
        while pending:
            name = pending.pop()
            with os.scandir(os.path.join(self.source, name)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            with self._directory(name) as target:
                for entry in entries:
                    path = os.path.join(name, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        self._make_directory(path, entry.name, target)
                        pending.append(path)
                    elif entry.is_symlink():
                        self._copy_symlink(path, entry, target)
                    else:
                        self._copy_file(path, entry, target)
        # Deepest first, for making an entry changes its directory's time.
        for name in sorted(self.described, reverse=True):
            with self._directory(name) as target:
                os.utime(target, (self.explicit[name].mtime, self.explicit[name].mtime))

    @contextlib.contextmanager
    def _directory(self, name: bytes) -> Iterator[int]:
        fd = syscalls.openat2(self.root, name or b".", os.O_RDONLY | os.O_DIRECTORY, _INSIDE)
        try:
            yield fd
        finally:
            os.close(fd)

    def _make_directory(self, path: bytes, base: bytes, target: int) -> None:
        """A directory in *target*, or what the image has there. What a symlink leads to keeps its attributes."""
        attributes = self.explicit.get(path)
        try:
            self._mkdir(base, target)
        except FileExistsError:
            if not self._leads_to_directory(path, base, target):
                self._mkdir(base, target)
            elif attributes is None or stat.S_ISLNK(os.lstat(base, dir_fd=target).st_mode):
                return
        with self._directory(path) as fd:
            uid, gid, mode = (attributes.uid, attributes.gid, attributes.mode) if attributes else (0, 0, 0)
            os.fchown(fd, uid + self.first_id, gid + self.first_id)
            os.fchmod(fd, mode & 0o7777 or 0o755)
        if attributes is not None:
            self.described.append(path)

    def _leads_to_directory(self, path: bytes, base: bytes, target: int) -> bool:
        """Whether *path* is a directory, perhaps through symlinks. A symlink to nowhere is removed."""
        try:
            with self._directory(path):
                return True
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            if error.errno == errno.ENOENT and stat.S_ISLNK(os.lstat(base, dir_fd=target).st_mode):
                os.unlink(base, dir_fd=target)
                return False
        raise UploadRefused(os.fsdecode(path), "the image has a file there, not a directory")

    def _copy_symlink(self, path: bytes, entry: os.DirEntry[bytes], target: int) -> None:
        link, status = os.readlink(entry.path), entry.stat(follow_symlinks=False)
        try:
            self._symlink(link, entry.name, target)
        except FileExistsError:
            self._make_room(path, entry.name, target)
            self._symlink(link, entry.name, target)
        uid, gid = status.st_uid + self.first_id, status.st_gid + self.first_id
        os.chown(entry.name, uid, gid, dir_fd=target, follow_symlinks=False)
        os.utime(entry.name, ns=(status.st_mtime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)

    def _copy_file(self, path: bytes, entry: os.DirEntry[bytes], target: int) -> None:
        source = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            try:
                made = self._open(entry.name, target)
            except FileExistsError:
                self._make_room(path, entry.name, target)
                made = self._open(entry.name, target)
            try:
                status = os.fstat(source)
                offset = 0
                while offset < status.st_size:
                    if not (sent := os.sendfile(made, source, offset, _SENDFILE)):
                        raise OSError(errno.EIO, "a staged file has shrunk", os.fsdecode(entry.path))
                    offset += sent
                os.fchown(made, status.st_uid + self.first_id, status.st_gid + self.first_id)
                os.fchmod(made, stat.S_IMODE(status.st_mode))
                os.utime(made, ns=(status.st_mtime_ns, status.st_mtime_ns))
            finally:
                os.close(made)
        finally:
            os.close(source)

    def _creating(self) -> contextlib.AbstractContextManager[None]:
        return syscalls.creating_as(self.first_id, self.first_id) if self.first_id else contextlib.nullcontext()

    def _mkdir(self, base: bytes, target: int) -> None:
        with self._creating():
            os.mkdir(base, 0o755, dir_fd=target)

    def _symlink(self, link: bytes, base: bytes, target: int) -> None:
        with self._creating():
            os.symlink(link, base, dir_fd=target)

    def _open(self, base: bytes, target: int) -> int:
        with self._creating():
            return os.open(base, _NEW, 0o600, dir_fd=target)

    @staticmethod
    def _make_room(path: bytes, base: bytes, target: int) -> None:
        try:
            os.unlink(base, dir_fd=target)
        except IsADirectoryError:
            raise UploadRefused(os.fsdecode(path), "the image has a directory there") from None
