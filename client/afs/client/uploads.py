"""What a run takes along, as the messages of an upload."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_IMODE

from afs.client.files import upload_messages
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

_CHUNK = 1 << 20
_BATCH_BYTES, _BATCH_MESSAGES = 1 << 20, 256


@dataclass(frozen=True, slots=True)
class Upload:
    """One part of an upload: a directory, whose content goes to *to*, a file, or bytes, which get the name *to*.

    *mode* is for bytes; files have their own.
    """

    source: Path | str | bytes
    to: str = "/"
    mode: int = 0o644


def messages(upload: Path | str | Iterable[Upload], to: str) -> Iterator[pb.ExecuteRequest]:
    """The upload's messages, in bounded memory. Blocking; InvalidArgument for what cannot be uploaded or read."""
    parts = [Upload(upload, to)] if isinstance(upload, Path | str) else upload
    try:
        for part in parts:
            yield from _part(part)
    except OSError as error:
        raise InvalidArgument(f"cannot upload: {error}") from None


def _part(part: Upload) -> Iterator[pb.ExecuteRequest]:
    if isinstance(part.source, bytes):
        yield from _file(part.to, part.mode, 0, _slices(part.source))
        return
    path = Path(part.source)
    if not path.is_file():
        yield from upload_messages(path, part.to)
        return
    with path.open("rb") as file:
        status = path.stat()
        chunks = iter(lambda: file.read(_CHUNK), b"")
        yield from _file(part.to, S_IMODE(status.st_mode), int(status.st_mtime), chunks)


def _slices(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))


def _file(to: str, mode: int, mtime: int, chunks: Iterable[bytes]) -> Iterator[pb.ExecuteRequest]:
    name = to.strip("/")
    if not name or to.endswith("/"):
        raise InvalidArgument(f"cannot upload a file as {to!r}: it needs a name")
    begin = pb.FileEntryBegin(path=name, type=pb.FILE_TYPE_FILE, mode=mode, mtime_unix=mtime)
    yield pb.ExecuteRequest(file_begin=begin)
    for chunk in chunks:
        yield pb.ExecuteRequest(file_chunk=pb.FileChunk(data=chunk))
    yield pb.ExecuteRequest(file_end=pb.FileEntryEnd())


def next_batch(upload: Iterator[pb.ExecuteRequest]) -> list[pb.ExecuteRequest]:
    """The next messages, about a MiB; none at the end. Blocking: one step of a thread instead of one per message."""
    batch, size = [], 0
    for message in upload:
        batch.append(message)
        size += len(message.file_chunk.data)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_MESSAGES:
            break
    return batch
