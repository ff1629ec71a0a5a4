"""What the kernel keeps in memory of a layer that is mounted, after its file was repaired below the mount.

EROFS copies a file's data from the layer file into pages of its own, which know nothing of later writes to the layer file;
the layer file's own pages were corrected by writing them. Pages that a process has mapped stay, and so do the attributes of
inodes in use: they go with the mount.
"""

import fcntl
import logging
import os
import re
from pathlib import Path

from afs.core import syscalls
from afs.core.mounts import list_mounts

log = logging.getLogger(__name__)
_LOOP = re.compile(r"/dev/(loop\d+)")


def forget_pages(layer: Path) -> int:
    """Have mounts of the file *layer*, in this mount namespace, read it anew; how many there are.

    That is one open(2) per file of the layer: a tenth of a second for ten thousand. What cannot be opened is logged.
    """
    file, count = os.path.realpath(layer), 0
    for mount in list_mounts():
        if mount.fstype != "erofs" or _file_behind(mount.source) != file:
            continue
        count += 1
        if _LOOP.fullmatch(mount.source):
            _forget_device(mount.source)
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
