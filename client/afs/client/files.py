"""A local directory as the messages of an upload."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

_CHUNK = 1 << 20


def upload_messages(directory: Path, prefix: str = "") -> Iterator[pb.ExecuteRequest]:
    """Every file, directory and symlink below *directory*, to be placed at *prefix* in the container's root.

    Blocking, bounded memory. Raises InvalidArgument for what an upload cannot hold, such as a socket.
    """
    if not directory.is_dir():
        raise InvalidArgument(f"cannot upload {directory}: not a directory")
    base = PurePosixPath(prefix.strip("/"))
    yield from _walk(str(directory), base)


def _walk(directory: str, base: PurePosixPath) -> Iterator[pb.ExecuteRequest]:
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if not _is_text(entry.name):
            raise InvalidArgument(f"cannot upload {entry.path!r}: its name is not UTF-8, as the interface demands")
        status, path = entry.stat(follow_symlinks=False), base / entry.name
        begin = pb.FileEntryBegin(
            path=str(path), mode=stat.S_IMODE(status.st_mode), uid=0, gid=0, mtime_unix=int(status.st_mtime)
        )
        if stat.S_ISDIR(status.st_mode):
            begin.type = pb.FILE_TYPE_DIR
            yield pb.ExecuteRequest(file_begin=begin)
            yield pb.ExecuteRequest(file_end=pb.FileEntryEnd())
            yield from _walk(entry.path, path)
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(entry.path)
            if not _is_text(target):
                raise InvalidArgument(
                    f"cannot upload {entry.path!r}: its target is not UTF-8, as the interface demands"
                )
            begin.type, begin.symlink_target = pb.FILE_TYPE_SYMLINK, target
            yield pb.ExecuteRequest(file_begin=begin)
            yield pb.ExecuteRequest(file_end=pb.FileEntryEnd())
        elif stat.S_ISREG(status.st_mode):
            begin.type = pb.FILE_TYPE_FILE
            yield pb.ExecuteRequest(file_begin=begin)
            with open(entry.path, "rb") as file:
                while data := file.read(_CHUNK):
                    yield pb.ExecuteRequest(file_chunk=pb.FileChunk(data=data))
            yield pb.ExecuteRequest(file_end=pb.FileEntryEnd())
        else:
            raise InvalidArgument(f"cannot upload {entry.path}: neither file, directory nor symlink")


def _is_text(name: str) -> bool:
    """Whether *name* came from valid UTF-8: Python maps other bytes to lone surrogates (PEP 383)."""
    return name.isprintable() or name.encode(errors="replace").decode() == name
