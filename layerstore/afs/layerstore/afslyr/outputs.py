"""Where a command writes: a file that appears whole or not at all, or a stream."""

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from afs.core.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from afs.core.files import fsync_dir

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_stream(out: str) -> bool:
    """Whether *out* is to be written as it stands: ``-`` and whatever else stdout is, pipes, devices and sockets."""
    if out == "-":
        return True
    try:
        found = os.stat(out)
    except FileNotFoundError:
        return False
    # /dev/stdout is a regular file when the shell sent stdout to one.
    if not stat.S_ISREG(found.st_mode):
        return True
    return sys.stdout is not None and os.path.samestat(found, os.fstat(sys.stdout.fileno()))


@contextlib.contextmanager
def opened_stream(out: str) -> Iterator[int]:
    """The descriptor of the stream *out*; InvalidArgument if it is a terminal, ResourceExhausted if there is no room."""
    if out == "-" and sys.stdout is None:
        raise InvalidArgument("stdout is closed")
    with told_when_full(out):
        fd = os.dup(sys.stdout.fileno()) if out == "-" else os.open(out, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.isatty(fd):
                raise InvalidArgument(f"{out} is a terminal; redirect it")
            yield fd
        finally:
            os.close(fd)


def check_new(out: str, *, force: bool) -> Path:
    """The file that *out* names, symlinks followed; AlreadyExists if it is there, unless by *force*; NotFound without
    a directory for it."""
    path = Path(os.path.realpath(out))
    if path.exists() and not force:
        raise _exists(out)
    if not path.parent.is_dir():
        raise NotFound(f"no directory {path.parent} for {out}")
    return path


@contextlib.contextmanager
def new_file(out: str, *, force: bool) -> Iterator[Path]:
    """A name beside *out* for the block to write a durable file under, which then becomes *out*.

    Whatever fails, nothing is left of it, and what was at *out* before is still there. Raises as :func:`check_new` and
    ResourceExhausted on a full disk.
    """
    path = check_new(out, force=force)
    temporary = path.with_name(f".afs_layer.{secrets.token_hex(8)}.tmp")
    with told_when_full(out):
        try:
            yield temporary
            if force:
                temporary.replace(path)
            else:
                os.link(temporary, path)  # unlike rename(2) it does not replace what came meanwhile
        except FileExistsError as error:
            raise _exists(out) from error
        finally:
            temporary.unlink(missing_ok=True)
        fsync_dir(path.parent)


@contextlib.contextmanager
def told_when_full(out: str) -> Iterator[None]:
    """Turn the system's errors for a full disk into ResourceExhausted that names *out*."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceExhausted(f"no room for {out}: {error.strerror}") from error
        raise


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of *data* to *fd*, which may take it in parts."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _exists(out: str) -> AlreadyExists:
    return AlreadyExists(f"{out} exists; --force replaces it")
