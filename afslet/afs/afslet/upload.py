"""Files from the client, on their way to be a read-only directory over the image, or to be copied into a root.

Nothing in a path is trusted: it is relative, has no ``..``, and is opened below the staging directory without following
any symlink (openat2(2): RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS). Where the *image* has a symlink to a directory, as in
``/bin -> usr/bin``, :meth:`Staging.settle` moves the files to where it leads, as tar and docker cp would.
"""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path

from afs.afslet.placing import Attributes, UploadRefused, place
from afs.core import syscalls
from afs.core.errors import InvalidArgument
from afs.core.files import remove_tree

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS


def check_path(path: str) -> bytes:
    """*path* without needless parts, as bytes; UploadRefused if it could lead outside."""
    if not path or "\0" in path:
        raise UploadRefused(path, "not a path")
    if path.startswith("/"):
        raise UploadRefused(path, "the path is absolute; it has to be relative to the container's root")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UploadRefused(path, "the path leads outside the container's root")
    encoded = os.fsencode("/".join(parts))
    if len(encoded) > 4000 or any(len(os.fsencode(part)) > 255 for part in parts):
        raise UploadRefused(path, "the path is too long")
    return encoded


class Staging:
    """A directory that receives one upload; made with its first entry. Blocking; one caller at a time.

    Everything is placed with its attributes but for directory times, which are set at the end, because making an entry
    changes its directory's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._root: int | None = None
        self._file: int | None = None
        self._entry: tuple[bytes, Attributes] | None = None
        self._explicit: dict[bytes, Attributes] = {}
        self._without_data = False
        # The directory of the entry before: the next one is most often in it, too. Directories never go away here.
        self._last: tuple[bytes, int] | None = None
        self.bytes = 0
        self.entries = 0

    def close(self) -> None:
        """Remove all."""
        self._forget_last()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._root is not None:
            os.close(self._root)
            self._root = None
            remove_tree(self.directory)

    def _open(self) -> int:
        if self._root is None:
            self.directory.mkdir(mode=0o755)
            self._root = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._root

    def _forget_last(self) -> None:
        if self._last is not None:
            os.close(self._last[1])
            self._last = None

    # Entries

    def add_directory(self, path: str, attributes: Attributes) -> None:
        """A directory; one that exists keeps its entries and gets the attributes."""
        name = check_path(path)
        if not name:  # the root itself: its attributes are the image's
            return
        self.entries += 1
        parent, base = self._parent(path, name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(base, 0o755, dir_fd=parent)
        if not stat.S_ISDIR(os.lstat(base, dir_fd=parent).st_mode):
            raise UploadRefused(path, "an uploaded file is in the way")
        os.chown(base, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(base, attributes.mode & 0o7777 or 0o755, dir_fd=parent)
        self._explicit[name] = attributes

    def add_symlink(self, path: str, target: str, attributes: Attributes) -> None:
        """A symlink. Its target is a matter of the container: nothing on this side follows it."""
        name = check_path(path)
        if not name or not target or "\0" in target:
            raise UploadRefused(path, "a symlink needs a name and a target")
        self.entries += 1
        parent, base = self._parent(path, name)
        try:
            os.symlink(target, base, dir_fd=parent)
        except FileExistsError:
            self._make_room(path, parent, base)
            os.symlink(target, base, dir_fd=parent)
        os.chown(base, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(base, (attributes.mtime, attributes.mtime), dir_fd=parent, follow_symlinks=False)

    def begin_file(self, path: str, attributes: Attributes) -> None:
        """Start a file; chunks and :meth:`end_file` follow."""
        if self._file is not None:
            raise UploadRefused(path, "the file before it was not ended")
        name = check_path(path)
        if not name:
            raise UploadRefused(path, "not a file name")
        self.entries += 1
        parent, base = self._parent(path, name)
        try:
            self._file = os.open(base, _NEW, 0o600, dir_fd=parent)
        except FileExistsError:
            self._make_room(path, parent, base)
            self._file = os.open(base, _NEW, 0o600, dir_fd=parent)
        self._entry, self._without_data = (name, attributes), False

    def expect_end(self) -> None:
        """The next :meth:`end_file` ends a directory or symlink, which have no data. Clients may leave it out."""
        self._without_data = True

    def write(self, data: bytes) -> None:
        """The next bytes of the file."""
        if self._file is None:
            raise InvalidArgument("file_chunk without file_begin")
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self.bytes += len(data)

    def add_file(self, path: str, attributes: Attributes, data: bytes) -> None:
        """A whole file."""
        self.begin_file(path, attributes)
        self.write(data)
        self.end_file()

    def end_file(self) -> None:
        """Finish the file."""
        if self._without_data:
            self._without_data = False
            return
        if self._file is None or self._entry is None:
            raise InvalidArgument("file_end without file_begin")
        _, attributes = self._entry
        try:
            os.fchown(self._file, attributes.uid, attributes.gid)
            os.fchmod(self._file, attributes.mode & 0o7777 or 0o644)
            os.utime(self._file, (attributes.mtime, attributes.mtime))
        finally:
            os.close(self._file)
            self._file = self._entry = None

    def finish(self) -> None:
        """Check that the upload is whole."""
        if self._file is not None and self._entry is not None:
            raise UploadRefused(os.fsdecode(self._entry[0]), "the upload ended in the middle of it")

    def _make_room(self, path: str, parent: int, base: bytes) -> None:
        """The last entry of a name wins, but a file does not take a whole directory away."""
        try:
            os.unlink(base, dir_fd=parent)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            raise UploadRefused(path, "an uploaded directory is in the way") from None

    def _parent(self, path: str, name: bytes) -> tuple[int, bytes]:
        """A descriptor of the directory that holds *name*, made if need be, and the last part of it.

        It stays open until the next call.
        """
        directory, _, base = name.rpartition(b"/")
        if self._last is not None and self._last[0] == directory:
            return self._last[1], base
        self._forget_last()
        for _ in range(2):
            try:
                found = syscalls.openat2(self._open(), directory or b".", os.O_PATH | os.O_DIRECTORY, _BENEATH)
            except OSError as error:
                self._explain(path, error)
            else:
                self._last = directory, found
                return found, base
            self._make_parents(path, directory)
        raise UploadRefused(path, "its directory vanished")

    @staticmethod
    def _explain(path: str, error: OSError) -> None:
        """Raise what *error* means for the client; return if only directories are missing."""
        if error.errno in (errno.ELOOP, errno.EXDEV):
            raise UploadRefused(path, "it goes through an uploaded symlink") from None
        if error.errno == errno.ENOTDIR:
            raise UploadRefused(path, "it goes through an uploaded file or symlink") from None
        if error.errno != errno.ENOENT:
            raise error

    def _make_parents(self, path: str, directory: bytes) -> None:
        parts = directory.split(b"/")
        for count in range(1, len(parts) + 1):
            above = b"/".join(parts[: count - 1]) or b"."
            try:
                parent = syscalls.openat2(self._open(), above, os.O_PATH | os.O_DIRECTORY, _BENEATH)
            except OSError as error:
                self._explain(path, error)
                raise
            try:
                os.mkdir(parts[count - 1], 0o755, dir_fd=parent)
            except FileExistsError:
                pass
            finally:
                os.close(parent)

    # Fitting it to the image

    def settle(self, image_root: Path) -> None:
        """Follow the image's symlinks to directories, and give directories that the client did not describe its attributes.

        *image_root* is the image, mounted read-only. The directory is then fit to lie over it.
        """
        self._forget_last()
        root = os.open(image_root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._copy_attributes(root, b"")
            pending, moves = [b""], 0
            while pending:
                moved = False
                for name in self._directories(pending.pop()):
                    target = _where(root, name)
                    if target is not None and target != name:
                        self._merge(name, target)
                        moved = True
                        break
                    if target is not None and name not in self._explicit:
                        self._copy_attributes(root, name)
                    pending.append(name)
                if moved:
                    moves += 1
                    if moves > 10_000:
                        raise InvalidArgument("the upload crosses too many symlinks of the image")
                    pending = [b""]
        finally:
            os.close(root)
        for name, attributes in sorted(self._explicit.items(), reverse=True):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(name), (attributes.mtime, attributes.mtime), follow_symlinks=False)

    def place_into(self, root: Path, first_id: int = 0) -> None:
        """Copy everything into the mounted *root*, as if a command in it had; see :func:`afs.afslet.placing.place`."""
        if self._root is not None:
            place(self.directory, self._explicit, root, first_id)

    def _path(self, name: bytes) -> bytes:
        return os.path.join(os.fsencode(self.directory), name)

    def _directories(self, name: bytes) -> list[bytes]:
        with os.scandir(self._path(name)) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return sorted(os.path.join(name, entry) for entry in found)

    def _copy_attributes(self, root: int, name: bytes) -> None:
        fd = syscalls.openat2(root, name or b".", os.O_RDONLY | os.O_DIRECTORY, syscalls.RESOLVE_IN_ROOT)
        path = self._path(name)
        try:
            status = os.fstat(fd)
            os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
            for key in os.listxattr(fd):
                os.setxattr(path, key, os.getxattr(fd, key), follow_symlinks=False)
        finally:
            os.close(fd)
        os.chmod(path, status.st_mode & 0o7777)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _merge(self, name: bytes, target: bytes) -> None:
        """Move what is below *name* to *target*, a path without symlinks in the image."""
        shown = os.fsdecode(name)
        if target:
            # Made and opened like any uploaded path: an uploaded symlink on the way must not lead us outside.
            self._parent(shown, target + b"/")
            self._forget_last()  # what is merged away is gone
        for entry in os.listdir(self._path(name)):
            source, destination = self._path(os.path.join(name, entry)), self._path(os.path.join(target, entry))
            if _is_directory(source) and _is_directory(destination):
                self._merge(os.path.join(name, entry), os.path.join(target, entry))
                continue
            try:
                os.rename(source, destination)
            except OSError as error:
                raise UploadRefused(
                    f"{shown}/{os.fsdecode(entry)}", f"another upload is in the way: {error.strerror}"
                ) from None
            moved = os.path.join(name, entry)
            for known in [key for key in self._explicit if key == moved or key.startswith(moved + b"/")]:
                self._explicit[os.path.join(target, known[len(name) + 1 :])] = self._explicit.pop(known)
        self._explicit.pop(name, None)
        shutil.rmtree(self._path(name), ignore_errors=False)


def _is_directory(path: bytes) -> bool:
    """Whether *path* is a directory and no symlink to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _where(root: int, name: bytes) -> bytes | None:
    """Where *name* leads inside the image, if to a directory: the path without symlinks."""
    try:
        fd = syscalls.openat2(
            root, name, os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
        )
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    try:
        found = os.path.relpath(os.readlink(b"/proc/self/fd/%d" % fd), os.readlink(b"/proc/self/fd/%d" % root))
        return b"" if found == b"." else found
    finally:
        os.close(fd)
