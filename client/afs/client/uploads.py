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


def messages(upload: Path | str | Iterable[Upload], to: str, *, entries: bool = False) -> Iterator[pb.ExecuteRequest]:
    """The upload's messages, in bounded memory. Blocking; InvalidArgument for what cannot be uploaded or read.

    *entries*: small files of a directory share messages, which the server has to understand.
    """
    parts = [Upload(upload, to)] if isinstance(upload, Path | str) else upload
    try:
        for part in parts:
            yield from _part(part, entries)
    except OSError as error:
        raise InvalidArgument(f"cannot upload: {error}") from None


def _part(part: Upload, entries: bool) -> Iterator[pb.ExecuteRequest]:
    if isinstance(part.source, bytes):
        yield from _file(part.to, part.mode, 0, _slices(part.source))
        return
    path = Path(part.source)
    if not path.is_file():
        yield from upload_messages(path, part.to, entries=entries)
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


def batches(upload: Iterator[pb.ExecuteRequest]) -> Iterator[list[pb.ExecuteRequest]]:
    """*upload* in groups that are worth the way from one thread to another."""
    batch, size = list[pb.ExecuteRequest](), 0
    for message in upload:
        batch.append(message)
        size += data_size(message)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_MESSAGES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def data_size(message: pb.ExecuteRequest) -> int:
    """Bytes of files in *message*."""
    return len(message.file_chunk.data) + sum(len(entry.data) for entry in message.entries)
