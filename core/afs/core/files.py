"""Files that appear whole or not at all, and directories that go away whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
    """Remove a directory tree that may hold anything but mounts; a missing one is no error."""
    # rmtree walks by descriptors and does not follow symlinks, so a hostile tree cannot lead it outside (bpo-4489).
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
