"""Directories whose owners appear shifted, for a root in a user namespace. Blocking.

The kernel does it by idmapped mounts of the directories, which overlayfs takes as layers since Linux 5.19. On the disk
nothing changes: what root in the container writes is root's in the upper directory, and so in the diff.

Overlayfs keeps clones of the mounts it is given, so these are needed only while it is mounted. Until Linux 6.15 it takes
only what is mounted somewhere; they are all on one file system, which goes in one step and whose source is the root's
home, so that :func:`~afs.snapshotter.rootmount.detach_root` finds them after a crash.
"""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from afs.core import syscalls
from afs.core.errors import FailedPrecondition, InvalidArgument
from afs.core.usernamespace import open_user_namespace
from afs.snapshotter.backends import fstype_of

_OLDEST = (5, 19)
_MAX_ID = 2**32 - 2  # the last number means "no id"
_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


@dataclass(frozen=True, slots=True)
class Ids:
    """User and group n, below *count*, appear as *first* + n."""

    first: int
    count: int

    def __post_init__(self) -> None:
        # From 0 on, root in the container would be root outside.
        if self.first <= 0 or self.count <= 0 or self.first + self.count - 1 > _MAX_ID:
            raise InvalidArgument(f"ids cannot be shifted to {self.count} from {self.first} on")


class Directories(NamedTuple):
    """What overlayfs is given; *lower* is topmost first."""

    lower: tuple[Path, ...]
    upper: Path | None
    work: Path | None


@contextlib.contextmanager
def shifted(home: Path, found: Directories, ids: Ids) -> Iterator[Directories]:
    """The same directories at other places, which exist within the block, with their owners shifted.

    The overlay has to be mounted by this thread. *home* is the root's. FailedPrecondition if the kernel, or the file system of one of them, cannot do it.
    """
    release = os.uname().release
    version = re.match(r"(\d+)\.(\d+)", release)
    if version and (int(version[1]), int(version[2])) < _OLDEST:
        raise FailedPrecondition(f"a root with shifted ids needs Linux {_OLDEST[0]}.{_OLDEST[1]}, here is {release}")
    namespace, place = _namespace(ids), home / "ids"
    place.mkdir(mode=0o700)
    try:
        syscalls.mount(str(home), str(place), "tmpfs", _FLAGS, "mode=0700,size=1m")
        try:
            moved = _placed(place, found, namespace)
            # Whoever mounts is who overlayfs makes its own files as, from its work directory on; and root has no id there.
            with syscalls.creating_as(ids.first, ids.first):
                yield moved
        finally:
            syscalls.umount(str(place), syscalls.MNT_DETACH)  # with all that is mounted in it
    finally:
        place.rmdir()


@functools.cache
def _namespace(ids: Ids) -> int:
    """One for each pair that was ever asked for, as long as this process lives; a node has one, as a rule."""
    return open_user_namespace(ids.first, ids.count)


def _placed(place: Path, found: Directories, namespace: int) -> Directories:
    lower = tuple(_place(path, place / str(number), namespace) for number, path in enumerate(found.lower))
    if found.upper is None or found.work is None:
        return Directories(lower, None, None)
    # Overlayfs wants both on one mount.
    parent = _place(found.upper.parent, place / "written", namespace)
    return Directories(lower, parent / found.upper.name, parent / found.work.relative_to(found.upper.parent))


def _place(path: Path, target: Path, namespace: int) -> Path:
    """Mount *path* at the new directory *target*, with its owners shifted."""
    target.mkdir()
    mounted = syscalls.clone_mount(str(path))
    try:
        try:
            syscalls.map_mount_ids(mounted, namespace)
        except OSError as error:
            why = error.strerror
            if error.errno == errno.EINVAL:
                why = f"its file system, {fstype_of(path)}, has no idmapped mounts in this kernel"
            raise FailedPrecondition(f"{path} cannot be mounted with shifted ids: {why}") from error
        directory = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.place_mount(mounted, directory)
        finally:
            os.close(directory)
    finally:
        os.close(mounted)
    return target


def open_way(home: Path, path: Path, ids: Ids) -> None:
    """Let root of the user namespace, and no other user, come from / to the root at *path* in *home*.

    The runtime goes there as that root. FailedPrecondition names a directory above, not ours, that nobody may pass.
    """
    if path.parent != home:
        return  # at a place that the user chose
    os.chown(home, -1, ids.first)
    home.chmod(0o710)
    # With homes that are closed, the numbers of those that exist are all there is to find out.
    home.parent.chmod(0o711)
    for directory in home.parent.parents:
        if not directory.stat().st_mode & 0o001:
            raise FailedPrecondition(
                f"a root for a user namespace cannot be at {path}: other users may not pass {directory} (chmod o+x)"
            )
