"""Files that appear whole or not at all, and directories that go away whole."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from afs.core.errors import FailedPrecondition
from afs.core.run import run


def fsync_dir(path: Path) -> None:
    """Make the names in directory *path* durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace *path* by *data*: after a crash it holds the old bytes or the new ones.

    With *durable* false it may be gone or damaged after a crash of the machine: for what a reader checks and can do without.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(data)
            if durable:
                out.flush()
                os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


@contextlib.contextmanager
def unlinked_on_error(path: Path) -> Iterator[Path]:
    """A path for a file under construction, removed if the block fails."""
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def remove_tree(path: Path) -> None:
    """Remove a directory tree that may hold anything but mounts; a missing one is no error.

    Hostile trees are expected: symlinks are not followed (shutil.rmtree works by descriptors), and a depth beyond
    Python's recursion or our descriptors is left to rm(1), whose fts(3) knows no such limit.
    """
    for _ in range(5):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # of the tree itself, or of an entry that somebody removed meanwhile
            if not os.path.lexists(path):
                return
        except (RecursionError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EMFILE, errno.ENOTEMPTY):
                raise
            run(["rm", "-rf", "--one-file-system", "--", str(path)])
            return
        else:
            return
    raise FailedPrecondition(f"cannot remove {path}: its entries keep changing")


@contextlib.contextmanager
def locked(path: Path, program: str) -> Iterator[None]:
    """Hold the lock file *path* while the block runs, so that one *program* uses its directory; FailedPrecondition else."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(f"{path.parent} is in use by another {program}") from None
        yield
    finally:
        os.close(fd)
