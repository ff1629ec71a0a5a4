"""One layer mount: what is known of it, and making and ending it. The functions block."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import Internal
from afs.core.mounts import unmount, unmount_below
from afs.snapshotter.backends import Backend, is_opaque, mount_layer
from afs.snapshotter.fusedworker import Worker

FileId = tuple[int, int]  # st_dev and st_ino, which nobody else has while the file is mounted


@dataclass(slots=True)
class MountedLayer:
    """One mount of a layer at *path*. *lazy*: it was made while the layer was partial, and bytes may come from elsewhere."""

    diff_id: str
    path: Path
    backend: Backend
    lazy: bool
    opaque: bool = False  # its root hides all layers below it
    worker: Worker | None = None  # the afs_fused that it is read through
    file: str = ""  # that is mounted, if there is no worker
    file_id: FileId | None = None  # of that file
    fallback: str = ""  # why a backend that is better here could not be used
    mount_id: int = 0
    users: int = 0
    leaving: bool = False

    def is_usable(self) -> bool:
        """Whether a root can be made on it."""
        return not self.leaving and (self.worker is None or self.worker.alive) and self.is_mounted()

    def was_replaced(self) -> bool:
        """Whether another file has the name of the one that is mounted."""
        return self.file_id is not None and file_id_of(self.file) not in (self.file_id, None)

    def is_mounted(self) -> bool:
        """Whether :attr:`path` leads to it. If somebody unmounted it, that is an empty directory, as good as any for overlayfs."""
        try:
            return syscalls.mount_id(str(self.path)) == self.mount_id
        except OSError:
            return False


def file_id_of(file: str) -> FileId | None:
    """Of the file that has this name now; None if none has. That is one stat(2), too quick to leave the event loop for."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def named_id(path: Path) -> FileId | None:
    """What the name of an adopted mount tells."""
    match path.name.split("-"):
        case [_, device, inode] if device.isdecimal() and inode.isdecimal():
            return int(device), int(inode)
        case _:
            return None


def unmount_layer(path: Path) -> None:
    """Unmount it and remove its directory, both if they are there."""
    unmount(str(path))
    try:
        path.rmdir()
    except FileNotFoundError:
        pass  # by whoever unmounted it by hand
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        unmount_below(path)  # something else was mounted over it
        path.rmdir()


def mount_layer_at(backend: Backend, source: Path, target: Path) -> tuple[bool, int]:
    """Mount it at the new directory *target*; whether its root is opaque, and the number of the mount."""
    target.mkdir(parents=True)
    try:
        mount_layer(backend, source, target)
        try:
            return is_opaque(target), syscalls.mount_id(str(target))
        except OSError as error:
            unmount(str(target))
            raise Internal(f"cannot read {source}: {error.strerror}") from error
    except BaseException:
        target.rmdir()
        raise
