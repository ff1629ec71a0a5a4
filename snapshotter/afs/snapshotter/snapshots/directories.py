"""The directories of snapshots that have files of their own, and what they take of the disk. Blocking.

ROOT/snapshots/<number>/fs       upper directory, or the contents of a committed snapshot
ROOT/snapshots/<number>/work     overlayfs's, for those that have an upper directory on something
ROOT/snapshots/<number>/lower    links to its lower directories, where their names are too long for mount(2)
"""

import errno
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from afs.core.errors import AfsError, InvalidArgument
from afs.core.files import remove_tree
from afs.core.run import run

log = logging.getLogger(__name__)


class Usage(NamedTuple):
    """*size* in bytes as allocated; hard links count once."""

    size: int
    inodes: int


class Directories:
    """See the module. InvalidArgument for a *root* whose name overlayfs's options cannot hold."""

    def __init__(self, root: Path) -> None:
        self._root = (root / "snapshots").resolve()
        if bad := [char for char in ':,\\"' if char in str(self._root)]:
            raise InvalidArgument(f"{self._root}: containerd cannot mount from a path with {bad[0]!r}")
        self._root.mkdir(parents=True, exist_ok=True)
        self._root.chmod(0o700)  # setuid files of images are below it, and no nosuid holds here

    def fs(self, number: int) -> Path:
        """Where the files are."""
        return self._root / str(number) / "fs"

    def work(self, number: int) -> Path:
        """The work directory."""
        return self._root / str(number) / "work"

    def make(self, number: int, *, work: bool, like: Path | None) -> None:
        """Make the directories of a new snapshot, owned as *like* is, the directory of its parent."""
        home = self._root / str(number)
        if home.exists():  # from a transaction that was not committed
            remove_tree(home)
        home.mkdir(mode=0o700)
        try:
            fs = home / "fs"
            fs.mkdir()
            fs.chmod(0o755)  # whatever the umask is
            if like is not None:
                status = os.stat(like)
                os.chown(fs, status.st_uid, status.st_gid)
            if work:
                (home / "work").mkdir(mode=0o711)
        except BaseException:
            remove_tree(home)
            raise

    def link(self, number: int, lower: Sequence[Path]) -> list[Path]:
        """Short names for directories: links in one directory of the snapshot."""
        links = self._root / str(number) / "lower"
        links.mkdir(parents=True, exist_ok=True)
        found = []
        for index, path in enumerate(lower):
            link = links / str(index)
            if not link.is_symlink() or link.readlink() != path:
                link.unlink(missing_ok=True)
                link.symlink_to(path)
            found.append(link)
        return found

    def numbers(self) -> set[int]:
        """Those that have a directory."""
        return {int(name) for name in os.listdir(self._root) if name.isdecimal()}

    def remove(self, number: int) -> None:
        """Delete the directory of a snapshot that is gone."""
        remove_tree(self._root / str(number))

    def usage(self, number: int) -> Usage:
        """What the files take now."""
        return disk_usage(self.fs(number))


def disk_usage(directory: Path) -> Usage:
    """What *directory* and all below it take; what vanishes meanwhile is not counted."""
    try:
        return _walk(directory)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
    # Deeper than a path can be long; fts(3) goes by directories.
    return Usage(_du(directory, "--block-size=1"), _du(directory, "--inodes"))


def _du(directory: Path, what: str) -> int:
    return int(run(["du", "--summarize", "--one-file-system", what, "--", str(directory)]).split()[0])


def _walk(directory: Path) -> Usage:
    found = directory.lstat()
    seen = {(found.st_dev, found.st_ino)}
    size, inodes = found.st_blocks * 512, 1
    pending = [os.fspath(directory)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    is_directory = entry.is_dir(follow_symlinks=False)
                    if not is_directory and status.st_nlink > 1:
                        key = status.st_dev, status.st_ino
                        if key in seen:
                            continue
                        seen.add(key)
                    size += status.st_blocks * 512
                    inodes += 1
                    if is_directory:
                        pending.append(entry.path)
        except FileNotFoundError:
            continue
    return Usage(size, inodes)


def remove_all(numbers: Sequence[int], remove: Callable[[int], None]) -> None:
    """Remove each; one that fails does not keep the others, and its error is raised at the end."""
    failed: Exception | None = None
    for number in numbers:
        try:
            remove(number)
        except (AfsError, OSError) as error:
            log.error("cannot remove all of snapshot %d: %s", number, error)
            failed = failed or error
    if failed is not None:
        raise failed
