"""What a chroot needs: /proc, /sys (read-only) and a /dev of its own, mounted in a root.

The root's tree comes from an image and may be hostile: mount points are opened without following any symlink and mounted
on by descriptor.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import FailedPrecondition

_PLAIN = syscalls.MS_NOSUID | syscalls.MS_NOEXEC | syscalls.MS_NODEV
# In this order; as runc mounts them for a container, but for the host's own /proc.
_MOUNTS = (
    ("proc", "proc", _PLAIN, ""),
    ("sys", "sysfs", _PLAIN | syscalls.MS_RDONLY, ""),
    ("dev", "tmpfs", syscalls.MS_NOSUID, "mode=755,size=65536k"),
    ("dev/pts", "devpts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("dev/shm", "tmpfs", _PLAIN, "mode=1777,size=65536k"),
)
# Linux Documentation/admin-guide/devices.txt
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def mount_proc_dev(root: Path, source: str) -> None:
    """Mount all of it in *root*; the mounts are told by their *source*. Blocking.

    FailedPrecondition if the image has something else than a directory where a mount point has to be.
    """
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, fstype, flags, options in _MOUNTS:
            with _mount_point(base, root, name) as fd:
                syscalls.mount(source, f"/proc/self/fd/{fd}", fstype, flags, options)
            if name == "dev":
                with _mount_point(base, root, name) as fd:  # what is mounted there now
                    _fill_dev(fd)
    finally:
        os.close(base)


def put_back(root: Path, mounts: Sequence[tuple[str, int]]) -> None:
    """Mount again in *root* what was unmounted: pairs of a path in it and a clone_mount(), in this order. Blocking."""
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, mounted in mounts:
            with _mount_point(base, root, name) as fd:
                syscalls.place_mount(mounted, fd)
    finally:
        os.close(base)


@contextmanager
def _mount_point(base: int, root: Path, name: str) -> Iterator[int]:
    try:
        resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_BENEATH
        fd = syscalls.openat2(base, name.encode(), os.O_PATH | os.O_DIRECTORY, resolve)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
            raise
        raise FailedPrecondition(f"cannot mount on {root / name}: it is not a directory in the image") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _fill_dev(dev: int) -> None:
    for name, (major, minor) in _DEVICES.items():
        os.mknod(name, stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=dev)
        os.chmod(name, 0o666, dir_fd=dev)  # noqa: S103 - as everywhere, whatever our umask is
    for name, target in _LINKS.items():
        os.symlink(target, name, dir_fd=dev)
    for name in ("pts", "shm"):
        os.mkdir(name, 0o755, dir_fd=dev)
