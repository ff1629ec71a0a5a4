"""The directories of snapshots that have files of their own, and what they take of the disk. Blocking.

    ROOT/snapshots/<number>/fs       upper directory, or the contents of a committed snapshot
    ROOT/snapshots/<number>/work     overlayfs's, for those that have an upper directory on something
    ROOT/snapshots/<number>/lower    links to its lower directories, where their names are too long for mount(2)
    ROOT/snapshots/gone-<random>     what is to be deleted; no snapshot can get such a name

Directories get and lose the name of a number in the thread of the database alone: a number is free again when the
transaction that it was given in failed, so nothing may be deleted by its number later.
"""

import errno
import logging
import os
import secrets
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from afs.core.errors import AfsError, Cancelled, InvalidArgument
from afs.core.files import remove_tree
from afs.core.run import CommandFailed, ask

log = logging.getLogger(__name__)
_DU_S = 600.0
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # or became something else


class Usage(NamedTuple):
    """*size* in bytes as allocated; hard links count once."""

    size: int
    inodes: int


def check_path(path: Path) -> Path:
    """*path*, resolved, if containerd can mount from it: its options have no way to write these."""
    found = path.resolve()
    if bad := [char for char in ':,\\"' if char in str(found)]:
        raise InvalidArgument(f"{found}: containerd cannot mount from a path with {bad[0]!r}")
    return found


class Directories:
    """See the module. InvalidArgument for a *root* whose name overlayfs's options cannot hold."""

    def __init__(self, root: Path) -> None:
        self._root = check_path(root / "snapshots")
        self._root.mkdir(parents=True, exist_ok=True)
        self._root.chmod(0o700)  # setuid files of images are below it, and no nosuid holds here
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let what deletes and counts in other threads end soon."""
        self._stopping.set()

    def fs(self, number: int) -> Path:
        """Where the files are."""
        return self._root / str(number) / "fs"

    def work(self, number: int) -> Path:
        """The work directory."""
        return self._root / str(number) / "work"

    def make(self, number: int, *, work: bool, owner: tuple[int, int] | None) -> None:
        """Make the directories of a new snapshot; *owner* is that of its parent's root."""
        home = self._root / str(number)
        if home.exists():  # from a transaction that was not committed
            self.retire(number)
        home.mkdir(mode=0o700)
        try:
            fs = home / "fs"
            fs.mkdir()
            fs.chmod(0o755)  # whatever the umask is
            if owner is not None:
                os.chown(fs, *owner)
            if work:
                (home / "work").mkdir(mode=0o711)
        except BaseException:
            self.retire(number)
            raise

    def links(self, number: int, count: int) -> list[Path]:
        """The names that :meth:`link` gives to so many directories."""
        return [self._root / str(number) / "lower" / str(index) for index in range(count)]

    def link(self, number: int, lower: Sequence[Path]) -> None:
        """Short names for directories: links in one directory of the snapshot."""
        links = self.links(number, len(lower))
        links[0].parent.mkdir(exist_ok=True)
        for link, path in zip(links, lower, strict=True):
            if not link.is_symlink() or link.readlink() != path:
                new = link.with_name(f"new-{link.name}")
                new.unlink(missing_ok=True)
                new.symlink_to(path)
                new.replace(link)  # containerd may mount by it at this moment

    def numbers(self) -> set[int]:
        """Those that have a directory."""
        return {int(name) for name in os.listdir(self._root) if name.isdecimal()}

    def retire(self, number: int) -> None:
        """Take the name from a snapshot's directory, which :meth:`remove_retired` deletes."""
        (self._root / str(number)).rename(self._root / f"gone-{secrets.token_hex(8)}")

    def remove_retired(self) -> int:
        """Delete what was retired; how many directories. One that fails does not keep the others: its error comes last."""
        failed: Exception | None = None
        count = 0
        for path in self._root.glob("gone-*"):
            if self._stopping.is_set():
                break
            try:
                remove_tree(path)
                count += 1
            except (AfsError, OSError) as error:
                log.error("cannot remove all of %s: %s", path, error)
                failed = failed or error
        if failed is not None:
            raise failed
        return count

    def usage(self, number: int) -> Usage:
        """What the files take now. Cancelled if it is told to stop."""
        return disk_usage(self.fs(number), self._stopping)


def disk_usage(directory: Path, stopping: threading.Event | None = None) -> Usage:
    """What *directory* and all below it take; what vanishes meanwhile is not counted. Whoever writes there may be hostile."""
    try:
        return _walk(directory, stopping or threading.Event())
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    # Deeper than we may have descriptors; fts(3) goes up by "..", and looks where that leads.
    return Usage(_du(directory, "--block-size=1"), _du(directory, "--inodes"))


def _du(directory: Path, what: str) -> int:
    # It fails if something vanishes, and has the sum all the same.
    argv = ["du", "--summarize", "--one-file-system", what, "--", str(directory)]
    answer = ask(argv, stdin=b"", timeout=_DU_S)
    found = answer.stdout.split()
    if not found:
        raise CommandFailed(argv, answer.returncode, answer.stderr.decode(errors="replace"))
    return int(found[0])


def _walk(directory: Path, stopping: threading.Event) -> Usage:
    """By descriptors: a directory that becomes a link must not lead elsewhere."""
    seen: set[tuple[int, int]] = set()
    above: list[tuple[int, Any]] = []  # the directories on the way down: a descriptor, and what is left of the entries

    def enter(name: str | Path, dir_fd: int | None = None) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            above.append((fd, os.scandir(fd)))
        except BaseException:
            os.close(fd)
            raise

    def leave() -> None:
        fd, entries = above.pop()
        entries.close()
        os.close(fd)

    enter(directory)
    try:
        size, inodes = os.fstat(above[0][0]).st_blocks * 512, 1
        while above:
            if stopping.is_set():
                raise Cancelled(f"{directory} is not counted: the service stops")
            fd, entries = above[-1]
            if (entry := next(entries, None)) is None:
                leave()
                continue
            try:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    enter(entry.name, fd)
            except OSError as error:
                if error.errno not in _VANISHED:
                    raise
                continue
            if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            size += status.st_blocks * 512
            inodes += 1
    finally:
        while above:
            leave()
    return Usage(size, inodes)
