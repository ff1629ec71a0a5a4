"""Looking into a root file system that untrusted code has written: every path is resolved by the kernel inside it.

openat2(2) with RESOLVE_IN_ROOT treats the root as a chroot would: absolute symlinks and ``..`` stay inside.
"""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from afs.core import syscalls

_INSIDE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_MAX_PASSWD = 8 << 20
_MAX_INTERPRETERS = 5
_MOUNT_POINTS = ("dev", "proc", "sys")
# The dynamic loaders of 32-bit programs, by which a root that is made for them is known.
_LOADERS_32BIT = (
    *("lib/ld-linux.so.2", "lib/ld-musl-i386.so.1"),
    *("lib/ld-linux-armhf.so.3", "lib/ld-linux.so.3", "lib/ld-musl-armhf.so.1"),
)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG, errno.ENXIO)
_BINFMT = "/proc/sys/fs/binfmt_misc"
_PT_INTERP = 3


@contextlib.contextmanager
def open_root(path: Path) -> Iterator[int]:
    """A descriptor of directory *path* for the functions below."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_regular(root: int, path: str) -> BinaryIO | None:
    """A regular file inside the root, open for reading; None for anything else.

    It is looked at before it is opened: opening a device of the image's would be opening the host's.
    """
    found = syscalls.openat2(root, os.fsencode(path), os.O_PATH, _INSIDE)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            return None
        return open(f"/proc/self/fd/{found}", "rb")
    finally:
        os.close(found)


def read_file(root: int, path: str) -> str | None:
    """A small text file inside the root; None if there is none that can be read as a file."""
    try:
        file = _open_regular(root, path)
        if file is None:
            return None
        with file:
            return file.read(_MAX_PASSWD).decode(errors="replace")
    except OSError as error:
        if error.errno not in _ABSENT:
            raise  # a layer that cannot be read says nothing about who is in its files
        return None


def stat_inside(root: int, path: str) -> os.stat_result | None:
    """What *path* leads to inside the root, following symlinks; None if nothing."""
    try:
        fd = syscalls.openat2(root, os.fsencode(path), os.O_PATH, _INSIDE)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def find_bad_mount_point(root: int) -> str:
    """Which of the directories that the runtime mounts on is something else; "" if they are what they should be.

    runc mounts on what they lead to inside the root, but then makes the links in /dev (fd, stdin, ptmx, ...) by its plain
    path: with /dev a symlink, in whatever directory of the machine it names (runc 1.1.5). What is missing runc makes.
    """
    for name in _MOUNT_POINTS:
        try:
            status = os.stat(name, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            return f"/{name}"
    return ""


def make_directories(root: int, path: str, uid: int, gid: int, first_id: int = 0) -> bool:
    """``mkdir -p`` inside the root, new directories 0755 owned by *uid*:*gid*; False if something else is in the way.

    *first_id*: the root's owners are shifted, and 0 is this one.
    """
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
                with syscalls.creating_as(first_id, first_id) if first_id else contextlib.nullcontext():
                    os.mkdir(parts[count - 1], 0o755, dir_fd=parent)
                os.chown(parts[count - 1], first_id + uid, first_id + gid, dir_fd=parent, follow_symlinks=False)
            except FileExistsError:  # a symlink to nowhere
                return False
            finally:
                os.close(parent)
        elif not stat.S_ISDIR(found.st_mode):
            return False
    return True


def remove_inside(root: int, path: str) -> None:
    """Remove the file that *path* names inside the root, where symlinks may lead to it; not what a symlink leads to."""
    directory, _, name = path.rpartition("/")
    parent = syscalls.openat2(root, os.fsencode(directory or "/"), os.O_PATH | os.O_DIRECTORY, _INSIDE)
    try:
        os.unlink(name, dir_fd=parent)
    finally:
        os.close(parent)


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


def find_groups(root: int, user: User, names: Sequence[str]) -> User:
    """*user* with more supplementary groups: names of /etc/group, or numbers. Raises UnknownUser."""
    if not names:
        return user
    known, extra = read_file(root, "etc/group"), set(user.groups)
    for name in names:
        number = _number(name)
        if number is None:
            number = next((_number(line[2]) for line in _lines(known, 3) if line[0] == name), None)
        if number is None:
            raise UnknownUser(f"group {name!r} is not in its /etc/group")
        extra.add(number)
    return replace(user, groups=tuple(sorted(extra)))


def _may_execute(status: os.stat_result, user: User, first_id: int) -> bool:
    if user.uid == 0:
        return bool(status.st_mode & 0o111)
    if status.st_uid == first_id + user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid - first_id in (user.gid, *user.groups):
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


@dataclass(frozen=True, slots=True)
class Command:
    """Whether execvp(3) would find a command and run it; *why* says more about it if not, *path* where it is if so."""

    found: bool
    executable: bool
    why: str = ""
    path: str = ""


def find_command(root: int, name: str, cwd: str, path: str, user: User, first_id: int = 0) -> Command:
    """What would become of execvp(3) of *name* with *path* as PATH; *first_id* as for :func:`make_directories`.

    The runtime's own words for a failed execve(2) come on the command's stderr, so what can be foreseen is looked at here.
    """
    refused = Command(found=False, executable=False)
    # A name with a slash is relative to the working directory, others go through PATH.
    directories = [cwd] if "/" in name else [entry or "." for entry in path.split(":")]
    for directory in directories:
        file = name if name.startswith("/") else os.path.join("/", cwd, directory, name)
        status = stat_inside(root, file)
        if status is None:
            continue
        if stat.S_ISDIR(status.st_mode):
            if "/" in name:
                return Command(found=True, executable=False, why="it is a directory")
        elif not stat.S_ISREG(status.st_mode):
            refused = Command(found=True, executable=False, why="it is not a regular file")
        elif _may_execute(status, user, first_id):
            return replace(_check_format(root, file, cwd, user, first_id), path=file)
        else:
            refused = Command(found=True, executable=False, why="it has no execute permission")
    return refused


def _check_format(root: int, file: str, cwd: str, user: User, first_id: int) -> Command:
    """Whether the kernel can load *file*: its interpreter, and that one's, have to be there (fs/exec.c)."""
    for _ in range(_MAX_INTERPRETERS):
        try:
            interpreter = read_interpreter(root, file)
        except OSError:
            break  # not for us to judge
        except (ValueError, OverflowError):  # OverflowError: an offset that no file has
            known = sorted(set(os.listdir(_BINFMT)) - {"register", "status"}) if os.path.isdir(_BINFMT) else []
            return Command(found=True, executable=bool(known), why="" if known else "it is neither program nor script")
        if not interpreter:
            break
        status = stat_inside(root, os.path.join("/", cwd, interpreter))
        if status is None:
            return Command(found=False, executable=False, why=f"its interpreter {interpreter} is missing")
        if not stat.S_ISREG(status.st_mode) or not _may_execute(status, user, first_id):
            return Command(found=True, executable=False, why=f"its interpreter {interpreter} is not executable")
        file = os.path.join("/", cwd, interpreter)
    return Command(found=True, executable=True)


def has_32bit_programs(root: int, command: str) -> bool:
    """Whether the root can load programs for 32 bits, or *command*, a path in it, is one."""
    if any(stat_inside(root, loader) is not None for loader in _LOADERS_32BIT):
        return True
    opened = _open_regular(root, command) if command else None
    if opened is None:
        return False
    with opened as file:
        return file.read(5) == b"\x7fELF\x01"


def read_interpreter(root: int, path: str) -> str:
    """What execve(2) loads to run a file: of ``#!`` or of an ELF program header; "" for a static program.

    Raises ValueError for a file of neither format.
    """
    opened = _open_regular(root, path)
    if opened is None:
        raise ValueError("not a regular file")
    with opened as file:
        head = file.read(256)  # BINPRM_BUF_SIZE
        if head.startswith(b"#!"):
            words = head[2:].partition(b"\n")[0].split()
            if not words:
                raise ValueError("no interpreter behind #!")
            return os.fsdecode(words[0])
        if not head.startswith(b"\x7fELF") or len(head) < 64:
            raise ValueError("neither ELF nor script")
        order = "<" if head[5] == 1 else ">"
        wide = head[4] == 2
        (table,) = struct.unpack_from(order + ("Q" if wide else "I"), head, 0x20 if wide else 0x1C)
        size, count = struct.unpack_from(order + "HH", head, 0x36 if wide else 0x2A)
        for index in range(count):
            header = os.pread(file.fileno(), 56, table + index * size)
            if len(header) < 56 or struct.unpack_from(order + "I", header)[0] != _PT_INTERP:
                continue
            offset, length = struct.unpack_from(order + ("Q16xQ" if wide else "I8xI"), header, 8 if wide else 4)
            return os.fsdecode(os.pread(file.fileno(), min(length, 4096), offset).rstrip(b"\0"))
    return ""
