"""Turns a directory tree into a layer tar: a whole tree, or the upper directory of an overlay mount.

Overlay's marks (a 0:0 character device, `trusted.overlay.opaque`) become OCI whiteouts as image-spec layer.md has them.
"""

from __future__ import annotations

import os
import stat
import tarfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
_OVERLAY = "trusted.overlay."


def write_layer(tree: Path, target: Path, *, newest: int | None = None) -> int:
    """Write `tree` as a tar, sorted by name; returns the number of entries.

    Times are whole seconds, and no later than `newest` (seconds since 1970): what a build created would else carry
    the build's date into the layer's digest. Sockets are left out, as other layer writers do.
    """
    seen: dict[tuple[int, int], str] = {}
    entries = 0
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path, name in _walk(os.fsencode(tree), b""):
            status = os.lstat(path)
            if stat.S_ISSOCK(status.st_mode):
                continue
            info = _entry(path, os.fsdecode(name), status, seen)
            if newest is not None:
                info.mtime = min(int(info.mtime), newest)
            if info.isreg() and info.size:
                with open(path, "rb") as source:
                    tar.addfile(info, source)
            else:
                tar.addfile(info)
            entries += 1
            if info.isdir() and _is_opaque(path):
                tar.addfile(_marker(f"{info.name}/{OPAQUE}", int(info.mtime)))
                entries += 1
    return entries


def _walk(directory: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every path below `directory` with its name in the tar, parents before children."""
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        inner = os.path.join(prefix, name)
        yield path, inner
        if stat.S_ISDIR(os.lstat(path).st_mode):
            yield from _walk(path, inner)


def _entry(path: bytes, name: str, status: os.stat_result, seen: dict[tuple[int, int], str]) -> tarfile.TarInfo:
    mode = status.st_mode
    if stat.S_ISCHR(mode) and status.st_rdev == 0:
        directory, _, base = name.rpartition("/")
        return _marker(f"{directory}/{WHITEOUT}{base}".lstrip("/"), int(status.st_mtime))
    info = tarfile.TarInfo(name)
    info.mode = stat.S_IMODE(mode)
    info.uid, info.gid, info.mtime = status.st_uid, status.st_gid, int(status.st_mtime)
    first = seen.setdefault((status.st_dev, status.st_ino), name)
    if first != name and not stat.S_ISDIR(mode):
        info.type, info.linkname = tarfile.LNKTYPE, first
        return info
    if stat.S_ISLNK(mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(os.readlink(path))
    elif stat.S_ISDIR(mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISFIFO(mode):
        info.type = tarfile.FIFOTYPE
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    else:
        info.size = status.st_size
    info.pax_headers = {
        f"SCHILY.xattr.{key}": os.fsdecode(os.getxattr(path, key, follow_symlinks=False))
        for key in sorted(os.listxattr(path, follow_symlinks=False))
        if not key.startswith(_OVERLAY)
    }
    return info


def _marker(name: str, mtime: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = 0o600, mtime
    return info


def _is_opaque(path: bytes) -> bool:
    try:
        return os.getxattr(path, f"{_OVERLAY}opaque") == b"y"
    except OSError:  # no such xattr, or a filesystem without xattrs
        return False
