"""Local files as the messages of an upload."""

import os
import stat
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path, PurePosixPath

from afs.afslet.globs import Globs
from afs.core.errors import InvalidArgument
from afs.core.threads import ahead
from afs.proto.v1 import afslet_pb2 as pb

_CHUNK = 1 << 20
_GROUP = 256  # messages that one hop from the reading thread carries at most
_ENTRIES_BYTES = 1 << 19  # of small files in one message
_SMALL = 1 << 16  # bytes of a file that shares a message with others
_ENTRY_COST = 128  # bytes of a message that an entry takes besides its data, roughly
_AHEAD = 2  # groups of messages that are read before they can be sent

Source = tuple[Path | str, str]
"""A directory, whose entries are placed below a directory of the container's root, or a file, which is placed in it."""
Sources = Path | str | Sequence[Source]


def upload_messages(
    sources: Sources, prefix: str = "", *, exclude: Sequence[str] = (), entries: bool = False
) -> Iterator[pb.ExecuteRequest]:
    """Everything of *sources*, which are pairs of a path and where it is to be in the root, or one path for *prefix*.

    What *exclude* means (as gitignore has it, relative to each directory) is left out. *entries*: small files and all else
    that has no content share messages, which the server has to understand. Symlinks stay symlinks; modes and times (in
    seconds) are kept, owners are not.

    Blocking, bounded memory. Raises InvalidArgument for what an upload cannot hold, such as a socket.
    """
    pairs = [(sources, prefix)] if isinstance(sources, str | Path) else sources
    globs = Globs(exclude, "exclude")
    found = (item for path, where in pairs for item in _source(Path(path), where, globs))
    return _explained(_with_entries(found) if entries else _one_by_one(found))


async def upload_stream(
    sources: Sources,
    prefix: str = "",
    *,
    exclude: Sequence[str] = (),
    entries: bool = False,
    progress: Callable[[int], object] | None = None,
) -> AsyncGenerator[pb.ExecuteRequest, None]:
    """:func:`upload_messages`, read in a thread that is some MiB ahead.

    *progress* is called on the event loop with the bytes of files that were taken so far.
    """
    messages = upload_messages(sources, prefix, exclude=exclude, entries=entries)
    done = 0
    async with aclosing(ahead(_groups(messages), _AHEAD)) as groups:
        async for group in groups:
            for message in group:
                yield message
                if progress is not None and (size := _data_size(message)):
                    done += size
                    progress(done)


def _explained(messages: Iterator[pb.ExecuteRequest]) -> Iterator[pb.ExecuteRequest]:
    try:
        yield from messages
    except OSError as error:
        raise InvalidArgument(f"cannot upload {error.filename}: {error.strerror}") from None


def _groups(messages: Iterator[pb.ExecuteRequest]) -> Iterator[list[pb.ExecuteRequest]]:
    """Several messages at a time, of a chunk's size together: a hop between threads costs as much as reading a file."""
    group, size = list[pb.ExecuteRequest](), 0
    for message in messages:
        group.append(message)
        size += _data_size(message)
        if size >= _CHUNK or len(group) == _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _data_size(message: pb.ExecuteRequest) -> int:
    return len(message.file_chunk.data) + sum(len(entry.data) for entry in message.entries)


def _one_by_one(found: "Iterator[tuple[pb.FileEntryBegin, str]]") -> Iterator[pb.ExecuteRequest]:
    """Messages that every server understands."""
    for begin, path in found:
        yield pb.ExecuteRequest(file_begin=begin)
        if begin.type == pb.FILE_TYPE_FILE:
            yield from _chunks(path)
        yield pb.ExecuteRequest(file_end=pb.FileEntryEnd())


def _with_entries(found: "Iterator[tuple[pb.FileEntryBegin, str]]") -> Iterator[pb.ExecuteRequest]:
    """Small files share messages; large ones come as they always do."""
    gathered, size = list[pb.UploadEntry](), 0
    for begin, path in found:
        data = _small(path) if begin.type == pb.FILE_TYPE_FILE else b""
        if data is not None:
            gathered.append(pb.UploadEntry(begin=begin, data=data))
            size += len(data) + len(begin.path) + _ENTRY_COST
        if gathered and (data is None or size >= _ENTRIES_BYTES):
            yield pb.ExecuteRequest(entries=gathered)
            gathered, size = [], 0
        if data is None:
            yield pb.ExecuteRequest(file_begin=begin)
            yield from _chunks(path)
            yield pb.ExecuteRequest(file_end=pb.FileEntryEnd())
    if gathered:
        yield pb.ExecuteRequest(entries=gathered)


def _small(path: str) -> bytes | None:
    """What is in a file, if it is small."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _SMALL + 1)
    finally:
        os.close(fd)
    return data if len(data) <= _SMALL else None


def _chunks(path: str) -> Iterator[pb.ExecuteRequest]:
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            yield pb.ExecuteRequest(file_chunk=pb.FileChunk(data=data))


def _source(path: Path, where: str, exclude: Globs) -> Iterator[tuple[pb.FileEntryBegin, str]]:
    """(entry, local path) of all that a source holds, parents first."""
    base = PurePosixPath(where.strip("/"))
    if path.is_dir():
        yield from _walk(str(path), str(base), exclude)
    elif path.is_file():
        yield _entry(str(path), path.name, str(base), path.stat()), str(path)
    else:
        raise InvalidArgument(f"cannot upload {path}: neither a directory nor a file")


def _walk(top: str, base: str, exclude: Globs) -> Iterator[tuple[pb.FileEntryBegin, str]]:
    """Iterative, as directories may nest deeper than Python recurses."""
    pending = [_listed(top)]
    while pending:
        found = next(pending[-1], None)
        if found is None:
            pending.pop()
            continue
        relative = found.path[len(top) :].lstrip("/")
        is_directory = found.is_dir(follow_symlinks=False)
        if exclude and exclude.match(relative, is_directory):
            continue
        above = "/".join(part for part in (base, os.path.dirname(relative)) if part not in ("", "."))
        yield _entry(found.path, found.name, above, found.stat(follow_symlinks=False)), found.path
        if is_directory:
            pending.append(_listed(found.path))


def _listed(directory: str) -> "Iterator[os.DirEntry[str]]":
    with os.scandir(directory) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def _entry(path: str, name: str, above: str, status: os.stat_result) -> pb.FileEntryBegin:
    """*path* as *name* in the directory *above* of the root."""
    if not _is_text(name):
        raise InvalidArgument(f"cannot upload {path!r}: its name is not UTF-8, as the interface demands")
    begin = pb.FileEntryBegin(
        path=f"{above}/{name}" if above not in ("", ".") else name,
        mode=stat.S_IMODE(status.st_mode),
        uid=0,
        gid=0,
        mtime_unix=int(status.st_mtime),
    )
    if stat.S_ISDIR(status.st_mode):
        begin.type = pb.FILE_TYPE_DIR
    elif stat.S_ISREG(status.st_mode):
        begin.type = pb.FILE_TYPE_FILE
    elif stat.S_ISLNK(status.st_mode):
        target = os.readlink(path)
        if not _is_text(target):
            raise InvalidArgument(f"cannot upload {path!r}: its target is not UTF-8, as the interface demands")
        begin.type, begin.symlink_target = pb.FILE_TYPE_SYMLINK, target
    else:
        raise InvalidArgument(f"cannot upload {path}: neither file, directory nor symlink")
    return begin


def _is_text(name: str) -> bool:
    """Whether *name* came from valid UTF-8: Python maps other bytes to lone surrogates (PEP 383)."""
    return name.isprintable() or name.encode(errors="replace").decode() == name
