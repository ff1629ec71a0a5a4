"""What the kernel keeps in memory of a layer that is mounted, after its file was repaired below the mount.

EROFS copies a file's data from the layer file into pages of its own, which know nothing of later writes to the layer file;
the layer file's own pages were corrected by writing them. What ``afs_fused`` serves, a layer as one file or as a tree, the
kernel keeps over closing and opening (FOPEN_KEEP_CACHE). Those are dropped here. Pages that a process has mapped stay, and
so do the attributes of inodes in use, and all names and attributes of a tree: they go with the mount.
"""

import fcntl
import logging
import os
import re
from pathlib import Path, PurePath

from afs.core import syscalls
from afs.core.mounts import MountPoint, list_mounts

log = logging.getLogger(__name__)
_LOOP = re.compile(r"/dev/(loop\d+)")
_FILES, _TREES = "f", ("t", "u")  # directories of an afs_fused, where layers are named by the hex of their diff_ids


def forget_pages(layer: Path) -> int:
    """Have mounts of the file *layer*, in this mount namespace, read it anew; how many there are.

    That is one open(2) per file of the layer: a tenth of a second for ten thousand. What cannot be opened is logged.
    """
    file, count = os.path.realpath(layer), 0
    for mount in list_mounts():
        if mount.fstype == "erofs":
            behind = _file_behind(mount.source)
            if behind != file and not _is_served(behind, layer.stem):
                continue
            if behind != file:
                _forget(behind)
            if _LOOP.fullmatch(mount.source):
                _forget_device(mount.source)
        elif not _is_tree(mount, layer.stem):
            continue
        count += 1
        _forget_below(mount.target)
    return count


def _file_behind(source: str) -> str:
    """The file that an EROFS mount reads, through a loop device or not."""
    if (loop := _LOOP.fullmatch(source)) is None:
        return os.path.realpath(source)
    try:
        return Path(f"/sys/block/{loop[1]}/loop/backing_file").read_text().rstrip("\n")
    except FileNotFoundError:  # it was just let go
        return ""


def _is_served(file: str, name: str) -> bool:
    """Whether *file* is what an afs_fused shows of the layer *name*."""
    return PurePath(file).parts[-2:] == (_FILES, name)


def _is_tree(mount: MountPoint, name: str) -> bool:
    """Whether *mount* is the tree of the layer *name*, bound from an afs_fused."""
    return mount.fstype.startswith("fuse") and PurePath(mount.root).parts[-2:] in [(kind, name) for kind in _TREES]


def _forget_device(device: str) -> None:
    """Metadata that EROFS reads through the page cache of a block device."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, syscalls.BLKFLSBUF)
    finally:
        os.close(fd)


def _forget_below(root: str) -> None:
    todo = [root]
    while todo:
        directory = todo.pop()
        _forget(directory)
        try:
            with os.scandir(directory) as found:
                entries = list(found)
        except OSError as error:
            log.warning("%s may list what was damaged until it is unmounted: %s", directory, error)
            continue
        todo += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                _forget(entry.path)


def _forget(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        log.warning("%s may show damaged bytes until it is unmounted: %s", path, error)
        return
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
