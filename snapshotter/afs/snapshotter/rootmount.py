"""One root: what is wanted, mounting it, and taking it down again. Blocking functions without state.

Every root has a *home*, a directory of the snapshotter's, and all that is mounted for it has the home's path as its
source: mountinfo alone tells whose a mount is, wherever it is, and after a crash as well. What is made for a root outside
its home, in a directory of the user's, the home has links to, from before it is made: nothing else there is ever removed.
"""

import contextlib
import errno
import logging
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from afs.core import syscalls
from afs.core.errors import AfsError, FailedPrecondition, InvalidArgument
from afs.core.files import remove_tree
from afs.core.mounts import MountPoint, list_mounts, mounts_from, unmount
from afs.snapshotter.layermount import MountedLayer
from afs.snapshotter.overlay import mount_overlay
from afs.snapshotter.procdev import mount_proc_dev, put_back
from afs.snapshotter.scratchfs import Scratch
from afs.snapshotter.shiftedids import Directories, Ids, open_way, shifted

log = logging.getLogger(__name__)
_WORK, _NEW_UPPER = "work-made", "upper-made"  # links in a home


class RootRequest:
    """What kind of root is wanted. *extra_dirs* are read-only, topmost first, over the image.

    *upper_dir* gets the directories ``upper``, which stays when the root goes, and ``.afs-work-<random>``, which does not.
    All paths are resolved here, once: what a symlink leads to later changes nothing. *disk_bytes* can be written at most;
    0: no limit. *ids*: owners appear shifted, for a user namespace.
    """

    __slots__ = ("disk_bytes", "extra_dirs", "ids", "proc_dev", "read_only", "suid", "target", "upper_dir", "work_name")

    def __init__(
        self,
        extra_dirs: Sequence[str | bytes] = (),
        *,
        read_only: bool = False,
        target: str | bytes = "",
        upper_dir: str | bytes = "",
        proc_dev: bool = False,
        suid: bool = False,
        disk_bytes: int = 0,
        ids: Ids | None = None,
    ) -> None:
        if read_only and upper_dir:
            raise InvalidArgument("a read-only root has no upper directory")
        if disk_bytes and read_only:
            raise InvalidArgument("nothing is written to a read-only root, so disk_bytes cannot be asked for")
        if disk_bytes and upper_dir:
            raise InvalidArgument("an upper_dir is as large as its file system, so disk_bytes cannot be asked for")
        # overlayfs refuses a directory that is given twice.
        self.extra_dirs = tuple(dict.fromkeys(_directory(path) for path in extra_dirs))
        self.read_only = read_only
        self.target = _directory(target) if target else None
        self.upper_dir = _directory(upper_dir) if upper_dir else None
        self.work_name = f".afs-work-{secrets.token_hex(8)}" if upper_dir else "work"
        self.proc_dev = proc_dev
        self.disk_bytes = disk_bytes
        self.ids = ids
        # Nobody but root gets into a directory of the snapshotter's; a target may be anybody's.
        self.suid = suid or not target
        if self.target == Path("/"):
            raise InvalidArgument("a root cannot be mounted over /")


def _directory(path: str | bytes) -> Path:
    name = os.fsdecode(path)
    if not os.path.isabs(name):
        raise InvalidArgument(f"{name!r} is not an absolute path")
    if not os.path.isdir(name):
        raise FailedPrecondition(f"{name} is not a directory")
    return Path(os.path.realpath(name))


@dataclass(frozen=True, slots=True)
class Root:
    """A root as it is mounted and taken down. *upper* and *work* are None for a read-only one.

    They are in *scratch* if that is there. What is neither in that nor in *home* is the user's: the upper directory
    stays then.
    """

    home: Path
    path: Path
    upper: Path | None
    work: Path | None
    proc_dev: bool
    scratch: Scratch | None = None

    @classmethod
    def of(cls, home: Path, request: RootRequest, scratch: Scratch | None = None) -> "Root":
        """The root that *request* asks for."""
        path = request.target or home / "merged"
        written = scratch.path if scratch is not None else request.upper_dir or home
        upper, work = (None, None) if request.read_only else (written / "upper", written / request.work_name)
        return cls(home, path, upper, work, request.proc_dev, scratch)

    @property
    def kept_upper(self) -> Path | None:
        """The upper directory that stays when the root goes."""
        return None if self.upper is None or self.owns(self.upper) else self.upper

    def owns(self, path: Path) -> bool:
        """Whether *path*, the upper or work directory, is in a directory of the snapshotter's, which goes with the root."""
        return path.parent == self.home or (self.scratch is not None and path.parent == self.scratch.path)


class Lower(NamedTuple):
    """What is below the upper directory, topmost first, and the directory whose owner and mode the root takes."""

    directories: tuple[Path, ...]
    attributes: Path


def lower_directories(layers: Sequence[MountedLayer], request: RootRequest, base: Path) -> Lower:
    """The lower directories of a root over *layers* (bottom first); *base* is the lowest one of every root."""
    image = _visible(layers)
    # An image without layers is legal; its root directory is the base's.
    return Lower((*request.extra_dirs, *image, base), image[0] if image else base)


def _visible(layers: Sequence[MountedLayer]) -> list[Path]:
    """The lower directories for *layers* (bottom first), topmost first.

    A layer whose root is opaque hides all below it; overlayfs itself ignores the mark on a root. And overlayfs refuses
    a directory that is given twice: an image may hold one layer several times, the topmost one decides.
    """
    paths: dict[Path, None] = {}
    for layer in reversed(layers):
        paths.setdefault(layer.path)
        if layer.opaque:
            break
    return list(paths)


def make_root(root: Root, lower: Lower, *, suid: bool, ids: Ids | None = None) -> None:
    """Make the directories of *root* in its home and mount it; *suid*: setuid programs are setuid there.

    *ids*: owners appear shifted.

    If it fails, :func:`detach_root` and :func:`remove_home` clear what is there; else :func:`keep_upper` is next.
    """
    if root.upper is not None and root.work is not None:
        _make_upper(root, root.upper, lower.attributes)
        _make(root, _WORK, root.work)
    if root.path.parent == root.home:
        root.path.mkdir()
    directories = lower.directories
    if root.upper is None and len(directories) == 1:
        # An image without layers. Overlayfs takes one directory only if there is an upper one.
        empty = root.home / "empty"
        empty.mkdir()
        directories = (*directories, empty)
    if ids is not None:
        open_way(root.home, root.path, ids)
    found = Directories(directories, root.upper, root.work)
    with contextlib.nullcontext(found) if ids is None else shifted(root.home, found, ids) as found:
        _mount(root, found, suid=suid)
    if root.proc_dev:
        mount_proc_dev(root.path, str(root.home))


def _mount(root: Root, found: Directories, *, suid: bool) -> None:
    try:
        mount_overlay(
            root.path,
            *(found.lower, found.upper, found.work),
            source=str(root.home),
            volatile=root.kept_upper is None,
            suid=suid,
        )
    except OSError as error:
        where = f", writing to {root.upper}" if root.upper else ""
        raise FailedPrecondition(f"cannot mount a root at {root.path}{where}: {error.strerror}") from error


def _make_upper(root: Root, upper: Path, attributes: Path) -> None:
    # The merged root directory takes its attributes from the upper one, so a new one gets the image's.
    try:
        found = os.lstat(upper)
    except FileNotFoundError:
        _make(root, _NEW_UPPER, upper)
    else:
        if not stat.S_ISDIR(found.st_mode):
            raise FailedPrecondition(f"{upper} is not a directory")
        return  # the user's, from an earlier mount
    status = os.stat(attributes)
    os.chown(upper, status.st_uid, status.st_gid, follow_symlinks=False)
    os.chmod(upper, status.st_mode & 0o7777)


def _make(root: Root, link: str, path: Path) -> None:
    """Make the new directory *path*, with a *link* to it in the home if it is in a directory of the user's."""
    if root.owns(path):
        path.mkdir(mode=0o700)
        return
    (root.home / link).symlink_to(path)
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        (root.home / link).unlink()  # it is not ours
        raise FailedPrecondition(f"cannot make {path}: {error.strerror}") from error


def keep_upper(root: Root) -> None:
    """The root is mounted for good: from now on :func:`remove_home` leaves its upper directory, even an empty one."""
    (root.home / _NEW_UPPER).unlink(missing_ok=True)


def mounts_of(home: Path) -> list[MountPoint]:
    """What is mounted for the root with that *home*, oldest first, wherever it is."""
    return mounts_from(str(home))


def place_of(home: Path, path: Path) -> Path:
    """Where the root is that was mounted at *path*: elsewhere if somebody has moved it, or a directory above it."""
    found = mounts_of(home)
    if not found or any(mount.target == str(path) for mount in found):
        return path
    return Path(found[0].target)


def _placed(table: Sequence[MountPoint], home: Path, path: Path) -> list[MountPoint]:
    """The root at *path*, first, and what is mounted in it for it; not what somebody bound to other places."""
    found = [mount for mount in table if mount.source == str(home)]
    return [mount for mount in found if mount.target == str(path) or mount.target.startswith(f"{path}/")]


def unmount_root(root: Root) -> None:
    """Unmount *root* and what was mounted in it for it.

    FailedPrecondition if it is in use. If anything fails all is as before.
    """
    table = list_mounts()
    found = _placed(table, root.home, place_of(root.home, root.path))
    if not found:
        return
    for mount in found:
        if _topmost(table, mount.target) != mount:
            raise FailedPrecondition(f"another file system is mounted over {mount.target}")
    path = found[0].target
    foreign = [mount.target for mount in table if mount.target.startswith(f"{path}/") and mount not in found]
    if foreign:
        raise FailedPrecondition(f"{path} is in use: {foreign[0]} is mounted in it")
    with contextlib.ExitStack() as clones:
        # The kernel tells whether the root is busy only when nothing is mounted in it. What was written to /dev/shm is in
        # memory, so it would be gone; a second mount of each keeps it.
        inside = []
        for mount in found[1:]:
            fd = syscalls.clone_mount(mount.target)
            clones.callback(os.close, fd)
            inside.append((os.path.relpath(mount.target, path), fd))
        left = len(found)
        try:
            for mount in reversed(found):
                syscalls.umount(mount.target)
                left -= 1
        except OSError as error:
            put_back(Path(path), inside[left - 1 :])
            if error.errno != errno.EBUSY:
                raise
            why = "a process works in it or has a file of it open"
            raise FailedPrecondition(f"{path} is in use: {why}") from error


def _topmost(table: Sequence[MountPoint], target: str) -> MountPoint:
    """What a path that is mounted on leads to."""
    return [mount for mount in table if mount.target == target][-1]


def detach_root(home: Path, path: Path | None = None, mount_id: int = 0) -> bool:
    """Take down what is mounted for the root with that *home*, in use or not; whether nothing is left.

    *mount_id* is that of the mount at *path*, if that is in the home. If it is still that one, not covered, and nothing is
    mounted in it, then there is no need to look for what has to go, but for what is left: the table of mounts is read
    once, not three times. With 150 roots that was 1.8 ms of the 3.1 for a removal.

    What is in use leaves the tree at once and goes when its last user does. What somebody mounted over it stays, with all
    that is below; and so does, if *path* says where the root is, what somebody bound or moved to other places.
    """
    if path is None or not mount_id or not _unmount_idle(path, mount_id):
        table = list_mounts()
        found = [mount for mount in table if mount.source == str(home)]
        for mount in reversed(found if path is None else _placed(table, home, path)):
            if _topmost(table, mount.target) == mount:
                unmount(mount.target)
    left = mounts_of(home)
    if left:
        log.error("%s stays mounted until the next start tries again: it was covered, or bound there", left[0].target)
    return not left


def _unmount_idle(path: Path, mount_id: int) -> bool:
    """Unmount what is at *path* if it is that mount, and nobody uses it; whether that was so."""
    try:
        if syscalls.mount_id(str(path)) != mount_id:
            return False
        syscalls.umount(str(path))
    except OSError as error:
        log.debug("%s: %s", path, error)
        return False
    return True


def remove_home(home: Path) -> None:
    """Delete the directories of the unmounted root with that *home*.

    In a directory of the user's that is the work directory; and the upper one, if it was made for a root that was never
    mounted.
    """
    try:
        if work := _led_to(home / _WORK):
            remove_tree(work)
        if upper := _led_to(home / _NEW_UPPER):
            with contextlib.suppress(OSError):  # somebody has put something there, or removed it
                upper.rmdir()
    finally:
        remove_tree(home)


def clear_home(home: Path) -> None:
    """:func:`remove_home` at a start, which nothing of a user's directories may end: errors are logged."""
    try:
        remove_home(home)
    except (AfsError, OSError) as error:
        log.error("cannot remove all of %s: %s", home, error)


def _led_to(link: Path) -> Path | None:
    return link.readlink() if link.is_symlink() else None


def homes_below(directory: Path) -> list[Path]:
    """The homes below *directory* that something is mounted for."""
    sources = {Path(mount.source) for mount in list_mounts() if mount.source.startswith("/")}
    return sorted(source for source in sources if source.parent == directory)
