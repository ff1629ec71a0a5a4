"""Recognising the layer mounts of an earlier snapshotter by what the kernel says of them; no file remembers them.

- EROFS on a file: mountinfo has the file's path as the source;
- on a loop device: the source is the device, and sysfs has the file behind it;
- a tree: mountinfo has the directory of the bind mount, and the source of the worker's file system.

The file is ``.../<hex>.afslyr``, or ``<hex>`` in the directory ``f`` of a worker; a tree is ``/t/<hex>`` or ``/u/<hex>``.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from afs.core.digests import check_digest
from afs.core.errors import InvalidArgument
from afs.core.mounts import MountPoint, list_mounts
from afs.snapshotter.backends import Backend

log = logging.getLogger(__name__)
_DELETED = " (deleted)"  # what sysfs adds to the name of a file that has none any more


@dataclass(frozen=True, slots=True)
class Found:
    """A layer that is mounted at *path*, through the worker of a number or from a *file*. *covered*: something else is over it."""

    path: Path
    diff_id: str
    backend: Backend
    worker: int | None
    covered: bool = False
    file: str = ""


def find_mounts(directory: Path) -> list[Found]:
    """The layers that are mounted in *directory*, oldest first; others are logged. Blocking."""
    found: dict[Path, Found] = {}
    resolved = directory.resolve()
    for mount in list_mounts(str(resolved)):
        if Path(mount.target).parent != resolved:  # the directory itself may be a mount point
            continue
        path = directory / Path(mount.target).name
        if path in found:
            log.error("%s is mounted over %s; the layer there is for its users alone", mount.source, path)
            found[path] = replace(found[path], covered=True)
            continue
        layer = recognise(mount, path)
        if layer is None:
            log.warning("%s (%s on %s) is no layer of ours", mount.target, mount.fstype, mount.source)
        else:
            found[path] = layer
    return list(found.values())


def recognise(mount: MountPoint, path: Path) -> Found | None:
    """The layer of a mount, which is at *path*; None if it is none."""
    try:
        if mount.fstype == "erofs":
            if not mount.source.startswith("/dev/loop"):
                return _of_file(path, Backend.FILE, mount.source)
            behind = Path("/sys/block", Path(mount.source).name, "loop/backing_file")
            return _of_file(path, Backend.LOOP, behind.read_text().removesuffix("\n").removesuffix(_DELETED))
        kind, name = Path(mount.root).parts[-2:]
        if mount.fstype.startswith("fuse") and kind in ("t", "u"):
            return Found(path, check_digest(f"sha256:{name}"), Backend.TREE, int(mount.source.removeprefix("afs/")))
    except (InvalidArgument, OSError, ValueError) as error:
        log.warning("%s on %s: %s", mount.fstype, mount.source, error)
    return None


def _of_file(path: Path, backend: Backend, source: str) -> Found:
    file = Path(source)
    diff_id = check_digest(f"sha256:{file.name.removesuffix('.afslyr')}")
    worker = None if file.suffix == ".afslyr" else int(file.parent.parent.name)
    return Found(path, diff_id, backend, worker, file="" if worker is not None else source)
