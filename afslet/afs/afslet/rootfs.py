"""Looking into a root file system that untrusted code has written: every path is resolved by the kernel inside it.

openat2(2) with RESOLVE_IN_ROOT treats the root as a chroot would: absolute symlinks and ``..`` stay inside.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afs.core import syscalls

_INSIDE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_MAX_PASSWD = 8 << 20


@contextmanager
def open_root(path: Path) -> Iterator[int]:
    """A descriptor of directory *path* for the functions below."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(root: int, path: str) -> str | None:
    """A small text file inside the root; None if there is none that can be read as a file."""
    try:
        # O_NONBLOCK: a fifo in the image must not hang us.
        fd = syscalls.openat2(root, os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK, _INSIDE)
    except OSError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        return file.read(_MAX_PASSWD).decode(errors="replace")


def stat_inside(root: int, path: str) -> os.stat_result | None:
    """What *path* leads to inside the root, following symlinks; None if nothing."""
    try:
        fd = syscalls.openat2(root, os.fsencode(path), os.O_PATH, _INSIDE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG):
            return None
        raise
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def make_directories(root: int, path: str, uid: int, gid: int) -> bool:
    """``mkdir -p`` inside the root, new directories 0755 owned by *uid*:*gid*; False if something else is in the way."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for count in range(1, len(parts) + 1):
        prefix = "/".join(parts[:count])
        found = stat_inside(root, prefix)
        if found is None:
            try:
                parent = syscalls.openat2(
                    root, os.fsencode("/".join(parts[: count - 1]) or "/"), os.O_PATH | os.O_DIRECTORY, _INSIDE
                )
            except OSError:
                return False
            try:
                os.mkdir(parts[count - 1], 0o755, dir_fd=parent)
                os.chown(parts[count - 1], uid, gid, dir_fd=parent, follow_symlinks=False)
            except FileExistsError:  # a symlink to nowhere
                return False
            finally:
                os.close(parent)
        elif not stat.S_ISDIR(found.st_mode):
            return False
    return True


@dataclass(frozen=True, slots=True)
class User:
    """Who runs the command; *groups* are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


class UnknownUser(Exception):
    """The image's or request's user is in none of the root's files; becomes InvalidArgument with the image's name."""


def _lines(text: str | None, fields: int) -> Iterator[list[str]]:
    for line in (text or "").splitlines():
        parts = line.split(":")
        if len(parts) >= fields and not line.startswith("#"):
            yield parts


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) < 2**32 - 1 else None


def find_user(root: int, spec: str) -> User:
    """Resolve ``user``, ``uid``, ``user:group`` or ``uid:gid`` (OCI image config, ``User``) with /etc/passwd and /etc/group.

    Supplementary groups come from /etc/group when no group is given, as Docker does. Raises UnknownUser.
    """
    name, colon, group = spec.partition(":")
    name = name or "0"
    passwd, groups = read_file(root, "etc/passwd"), read_file(root, "etc/group")
    number = _number(name)
    entry = next(
        (line for line in _lines(passwd, 6) if line[0] == name or (number is not None and line[2] == name)), None
    )
    if entry is not None:
        uid, gid, home, login = _number(entry[2]), _number(entry[3]), entry[5] or "/", entry[0]
    else:
        uid, gid, home, login = number, 0, "/", ""
    if uid is None or gid is None:
        raise UnknownUser(f"user {name!r} is not in its /etc/passwd")
    if colon:
        wanted = _number(group)
        if wanted is None:
            wanted = next((_number(line[2]) for line in _lines(groups, 3) if line[0] == group), None)
        if wanted is None:
            raise UnknownUser(f"group {group!r} is not in its /etc/group")
        return User(uid, wanted, (), home)
    extra = {_number(line[2]) for line in _lines(groups, 4) if login and login in line[3].split(",")}
    return User(uid, gid, tuple(sorted(g for g in extra if g is not None and g != gid)), home)


def _may_execute(status: os.stat_result, user: User) -> bool:
    if user.uid == 0:
        return bool(status.st_mode & 0o111)
    if status.st_uid == user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == user.gid or status.st_gid in user.groups:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def find_command(root: int, name: str, cwd: str, path: str, user: User) -> tuple[bool, bool]:
    """(found, executable): whether execvp(3) with *path* as PATH would find *name* and may run it."""
    found = False
    # A name with a slash is relative to the working directory, others go through PATH.
    directories = [cwd] if "/" in name else [entry or "." for entry in path.split(":")]
    for directory in directories:
        status = stat_inside(root, name if name.startswith("/") else os.path.join("/", cwd, directory, name))
        if status is None or stat.S_ISDIR(status.st_mode):
            continue
        if _may_execute(status, user):
            return True, True
        found = True
    return found, False
