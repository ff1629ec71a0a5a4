"""The three ways to mount a layer, behind one interface; docs/mounts.md compares them.

- ``erofs-file``: the kernel mounts EROFS on the layer file itself (Linux 6.12);
- ``erofs-loop``: on a loop device over it (6.4, or a stable kernel that took over its blocks of 512 bytes);
- ``tree``: a bind mount of the tree that an ``afs_fused`` process serves: any kernel, and without EROFS.

A layer file is a complete one on the disk, or one that ``afs_fused`` shows (a *lazy* mount). Which of the ways work here
is found out by :mod:`afs.snapshotter.probe`. All functions block.
"""

import enum
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import FailedPrecondition, Internal, InvalidArgument
from afs.core.mounts import list_mounts, unmount

_BLOCK_SIZE = 512  # of EROFS in a layer file
_BLOCKS_AT = 1024 + 36  # in an EROFS image: how many blocks there are, and at which one the metadata begin
_READ_AHEAD = 8 << 20  # bytes: metadata of some 80,000 files
_READ_AT_ONCE = 128 << 10  # bytes: the kernel leaves out what exceeds a device's own read-ahead
_FLAGS = syscalls.MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOSUID


class Backend(enum.StrEnum):
    """A way to mount a layer, in the order of preference."""

    FILE = "erofs-file"
    LOOP = "erofs-loop"
    TREE = "tree"


def parse_backend(text: str) -> Backend | None:
    """The backend that a setting names, None for ``auto``; InvalidArgument for anything else."""
    if text == "auto":
        return None
    try:
        return Backend(text)
    except ValueError:
        raise InvalidArgument(f"{text!r} is neither auto nor {', '.join(Backend)}") from None


class Unusable(FailedPrecondition):
    """A backend that cannot mount files of this place, whichever they are; another backend may."""

    def __init__(self, backend: Backend, reason: str) -> None:
        self.backend = backend
        self.reason = reason
        super().__init__(f"{backend} cannot be used: {reason}")


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of trying a backend: *reason* says why it does not work, "" if it does."""

    backend: Backend
    lazy: bool
    reason: str = ""

    @property
    def works(self) -> bool:
        """Whether it does."""
        return not self.reason


class Backends:
    """What to mount layers with. *trials* are in the order of preference; *forced* leaves no choice."""

    def __init__(self, trials: tuple[Trial, ...], forced: Backend | None = None) -> None:
        self.trials = trials
        self.forced = forced

    def choices(self, *, lazy: bool) -> list[Trial]:
        """Those that work, best first; no others than the forced one."""
        wanted = [trial for trial in self.trials if trial.lazy is lazy and trial.works]
        return [trial for trial in wanted if self.forced in (None, trial.backend)]

    def refusal(self, *, lazy: bool) -> str:
        """Why there is no choice."""
        tried = [trial for trial in self.trials if trial.lazy is lazy and self.forced in (None, trial.backend)]
        return "; ".join(f"{trial.backend}: {trial.reason}" for trial in tried)

    def check(self) -> None:
        """FailedPrecondition unless complete layers can be mounted, and lazy ones too if a backend is forced."""
        for lazy in (False, True) if self.forced else (False,):
            if not self.choices(lazy=lazy):
                kind = "lazy" if lazy else "complete"
                raise FailedPrecondition(f"no backend can mount {kind} layers here: {self.refusal(lazy=lazy)}")


def mount_layer(backend: Backend, source: Path, target: Path) -> None:
    """Mount *source*, a layer file (for the tree: a directory), read-only at *target*.

    nosuid and nodev hold for whoever looks below *target*; overlayfs goes by the flags of its own mount. Raises Unusable
    if the backend cannot do it with any file there, Internal if it cannot with this one.
    """
    try:
        if backend is Backend.FILE:
            # Without "directio": docs/mounts.md has the measurements.
            syscalls.mount(str(source), str(target), "erofs", _FLAGS)
        elif backend is Backend.LOOP:
            _mount_loop(source, target)
        else:
            _bind(source, target)
    except OSError as error:
        reason = _general(backend, source, error)
        if reason:
            raise Unusable(backend, reason) from error
        raise Internal(f"cannot mount {source} as {backend}: {error.strerror}") from error


def _mount_loop(source: Path, target: Path) -> None:
    file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device, path = _loop(file)
    finally:
        os.close(file)
    try:
        # The mount keeps the device; one without a mount is cleared when its last descriptor is closed.
        syscalls.mount(path, str(target), "erofs", _FLAGS)
        try:
            _read_metadata_ahead(device)
        except BaseException:
            unmount(str(target))
            raise
    finally:
        os.close(device)


def _read_metadata_ahead(device: int) -> None:
    """Have the kernel read the metadata into the device's page cache, without waiting for them.

    EROFS asks the device for them in single blocks, which direct I/O takes one by one to the disk, or to ``afs_fused``:
    ``find -ls`` in the largest layer of IMG4, a lazy mount, made 3,904 requests without this, and 1,520 with it. What is
    left are directories, which EROFS reads past that cache.
    """
    blocks, first = struct.unpack("<II", os.pread(device, 8, _BLOCKS_AT))
    start, end = first * _BLOCK_SIZE, blocks * _BLOCK_SIZE
    for offset in range(start, min(end, start + _READ_AHEAD), _READ_AT_ONCE):
        os.posix_fadvise(device, offset, min(_READ_AT_ONCE, end - offset), os.POSIX_FADV_WILLNEED)


def _loop(file: int) -> tuple[int, str]:
    """A loop device that reads *file* by direct I/O, and no other one.

    Before Linux 6.16 a device that reads through the file's page cache hands out zeros in place of what cannot be read
    (lo_read_simple takes an error behind the first page for the end of the file).
    """
    try:
        device, path = syscalls.attach_loop(file, _BLOCK_SIZE)
    except OSError as error:
        raise Unusable(Backend.LOOP, _no_loop(error)) from error
    try:
        reason = "" if syscalls.loop_is_direct(device) else _no_direct(file)
    except BaseException:
        os.close(device)
        raise
    if reason:
        os.close(device)
        raise Unusable(Backend.LOOP, reason)
    return device, path


def _bind(source: Path, target: Path) -> None:
    syscalls.mount(str(source), str(target), "", syscalls.MS_BIND)
    try:
        # Flags of a bind mount are only taken in a second step. Nobody knows the path of the mount before that.
        syscalls.mount("", str(target), "", _FLAGS | syscalls.MS_BIND | syscalls.MS_REMOUNT)
    except BaseException:
        unmount(str(target))
        raise


def _no_loop(error: OSError) -> str:
    if error.filename == syscalls.LOOP_CONTROL and error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"no {syscalls.LOOP_CONTROL}: the module loop is missing or blocked"
    return f"no loop device: {error.filename}: {error.strerror}"


def _no_direct(file: int) -> str:
    alignment = syscalls.direct_alignment(file)
    if alignment is not None and alignment > _BLOCK_SIZE:
        return f"direct I/O is in blocks of {alignment} bytes on this disk, and layers have blocks of {_BLOCK_SIZE}"
    return "this file system has no direct I/O, and without it a loop device gives zeros for what it cannot read"


def _general(backend: Backend, source: Path, error: OSError) -> str:
    """Why *error* has nothing to do with the layer, "" if it may have."""
    if backend is Backend.TREE:
        return "mounting is not permitted here" if error.errno == errno.EPERM else ""
    if error.errno == errno.ENODEV:
        return "no erofs in this kernel: the module is missing or blocked"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "mounting erofs is not permitted here, as in a user namespace"
    if error.errno == errno.ENOTBLK:
        # EROFS asks for a block device where a file will not do: before 6.12, or because the file's file system lacks
        # read_folio, as tmpfs does.
        here = f"here are Linux {os.uname().release} and {fstype_of(source)}"
        return f"EROFS mounts files from Linux 6.12 on, and those of file systems such as ext4 or xfs; {here}"
    return ""


def is_opaque(path: Path) -> bool:
    """Whether the root of the layer mounted at *path* hides all layers below it. OSError if it cannot be read."""
    # The second name is what a tree shows in a user namespace, where overlayfs may not read trusted attributes.
    return not {"trusted.overlay.opaque", "user.overlay.opaque"}.isdisjoint(os.listxattr(path))


def fstype_of(path: Path) -> str:
    """The type of the file system that *path* is on, as mountinfo names it."""
    status = os.stat(path)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    return next((mount.fstype for mount in list_mounts() if mount.device == device), "an unknown one")
