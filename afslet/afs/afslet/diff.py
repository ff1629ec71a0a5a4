"""What a run changed: an overlayfs upper directory as a gzip-compressed OCI layer (OCI image spec, layer.md).

Deleted: ``.wh.NAME``; replaced directory: ``.wh..wh..opq`` in it; everything else as it is, with xattrs and hard links.
"""

import io
import logging
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from afs.core import syscalls

log = logging.getLogger(__name__)
_OPAQUE = "trusted.overlay.opaque"
_CHUNK = 1 << 18
_PATH_MAX = 4096
_LEVEL = 1  # of ISA-L: at 2 and 3 it is slower for a few per cent


class _Gzip:
    """A sink that compresses; :meth:`take` gives what is ready."""

    def __init__(self) -> None:
        from isal import isal_zlib

        self._compressor = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, 31)
        self._ready = bytearray()

    def write(self, data: bytes) -> int:
        """tarfile's only demand on a file."""
        self._ready += self._compressor.compress(data)
        return len(data)

    def finish(self) -> None:
        self._ready += self._compressor.flush()

    def take(self, least: int) -> Iterator[bytes]:
        """Chunks, as long as *least* bytes are ready."""
        while len(self._ready) >= max(least, 1):
            chunk, self._ready = bytes(self._ready[:_CHUNK]), self._ready[_CHUNK:]
            yield chunk


def diff_chunks(upper: Path, lower: Sequence[Path]) -> Iterator[bytes]:
    """The diff as chunks of tar.gz, made while they are taken. Blocking; memory bounded by a chunk.

    *lower* are the directories below *upper*, topmost first: overlayfs marks every new directory opaque, and only where
    one of them has it too does the mark say something.
    """
    sink = _Gzip()
    with tarfile.open(fileobj=cast("IO[bytes]", sink), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as tar:
        links: dict[tuple[int, int], str] = {}
        for path in _walk(os.fsencode(upper)):
            for _ in _add(tar, os.fsencode(upper), path, lower, links):
                yield from sink.take(_CHUNK)
            yield from sink.take(_CHUNK)
            tar.getmembers().clear()  # tarfile remembers every entry, but we never look back
    sink.finish()
    yield from sink.take(1)


def _walk(top: bytes) -> Iterator[bytes]:
    """Every path below *top*, parents first, sorted. Iterative: a run may nest directories deeper than Python recurses.

    What lies deeper than the kernel takes in one path (PATH_MAX, 4096 bytes) is left out and logged: a process reaches it
    only by descending step by step.
    """
    pending = [(b"", True)]
    while pending:
        path, is_directory = pending.pop()
        if path:
            yield path
        if not is_directory:
            continue
        with os.scandir(os.path.join(top, path)) as entries:
            found = sorted((os.path.join(path, entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries)
        fitting = [item for item in found if len(top) + 1 + len(item[0]) < _PATH_MAX]
        if len(fitting) < len(found):
            log.warning("diff: %d entries below %r lie too deep and are left out", len(found) - len(fitting), path[:80])
        pending.extend(reversed(fitting))


def _add(
    tar: tarfile.TarFile, top: bytes, path: bytes, lower: Sequence[Path], links: dict[tuple[int, int], str]
) -> Iterator[None]:
    """Write one entry; yields now and then, so that a big file does not pile up in memory."""
    full, name = os.path.join(top, path), os.fsdecode(path)
    status = os.lstat(full)
    mode = status.st_mode
    if stat.S_ISSOCK(mode):
        return
    if stat.S_ISCHR(mode) and status.st_rdev == 0:
        tar.addfile(_empty(_whiteout(name), status))
        return
    info = _info(name, full, status)
    if stat.S_ISREG(mode):
        first = links.get((status.st_dev, status.st_ino))
        if first is not None:
            info.type, info.linkname, info.size = tarfile.LNKTYPE, first, 0
            tar.addfile(info)
            return
        if status.st_nlink > 1:
            links[status.st_dev, status.st_ino] = name
        with open(full, "rb", buffering=0) as file:
            yield from _add_file(tar, info, file)
        return
    tar.addfile(info)
    if (
        stat.S_ISDIR(mode)
        and _xattr(full, _OPAQUE) == b"y"
        and any(_has_directory(directory, path) for directory in lower)
    ):
        tar.addfile(_empty(f"{name}/.wh..wh..opq", status))


def _add_file(tar: tarfile.TarFile, info: tarfile.TarInfo, file: io.FileIO) -> Iterator[None]:
    """tarfile.addfile in steps. A file that shrinks meanwhile is padded: its size is in the header already."""

    def write(data: bytes) -> None:
        tar.fileobj.write(data)
        tar.offset += len(data)

    write(info.tobuf(tar.format, tar.encoding, tar.errors))
    done = 0
    while done < info.size:
        data = file.read(min(_CHUNK, info.size - done)) or bytes(min(_CHUNK, info.size - done))
        write(data)
        done += len(data)
        yield
    write(bytes(-info.size % tarfile.BLOCKSIZE))
    yield


def _info(name: str, full: bytes, status: os.stat_result) -> tarfile.TarInfo:
    info, pax = tarfile.TarInfo(name), dict[str, str]()
    info.pax_headers = pax
    info.mode, info.uid, info.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    info.mtime = int(status.st_mtime)
    seconds, nanoseconds = divmod(abs(status.st_mtime_ns), 10**9)
    if nanoseconds:  # a float would lose them
        pax["mtime"] = f"{'-' if status.st_mtime_ns < 0 else ''}{seconds}.{nanoseconds:09}"
    mode = status.st_mode
    if stat.S_ISREG(mode):
        info.size = status.st_size
    elif stat.S_ISDIR(mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(os.readlink(full))
    elif stat.S_ISFIFO(mode):
        info.type = tarfile.FIFOTYPE
    else:
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    for attribute in os.listxattr(full, follow_symlinks=False):
        # A PAX record's key is UTF-8; an attribute of another name cannot be expressed in a layer.
        if not attribute.startswith("trusted.overlay.") and attribute.isprintable():
            value = os.getxattr(full, attribute, follow_symlinks=False)
            pax[f"SCHILY.xattr.{attribute}"] = os.fsdecode(value)
    return info


def _empty(name: str, status: os.stat_result) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mtime = int(status.st_mtime)
    return info


def _whiteout(name: str) -> str:
    directory, _, base = name.rpartition("/")
    return f"{directory}/.wh.{base}" if directory else f".wh.{base}"


def _xattr(path: bytes, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None


def _has_directory(lower: Path, path: bytes) -> bool:
    root = os.open(lower, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
        os.close(syscalls.openat2(root, path, os.O_PATH | os.O_DIRECTORY, resolve))
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(root)
