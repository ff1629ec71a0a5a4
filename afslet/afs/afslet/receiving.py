"""The messages of an upload, put into a :class:`~afs.afslet.upload.Staging`.

State: a staging area has one user at a time. What is small is done at once on the event loop, as long as no thread is at
work; else messages are gathered, in order, for the thread that takes them all next. So one batch is written while the next
one is received: at most two of them are in memory, of 2 MiB and one message each.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from afs.afslet.placing import Attributes, UploadRefused
from afs.afslet.upload import Staging
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

_SMALL = 1 << 16  # bytes that are written to the page cache without a thread
_BATCH_BYTES = 2 << 20
_BATCH = 512  # messages
Progress = Callable[[int], object]


async def receive(
    requests: AsyncIterator[pb.ExecuteRequest],
    staging: Staging,
    progress: Progress | None = None,
    other: Callable[[pb.ExecuteRequest], object] | None = None,
) -> bool:
    """Take the upload. True if it ended with ``upload_end``, so that *requests* go on; False if the client half-closed.

    *progress* is called now and then with the bytes of files so far, *other* with requests that are no part of an upload,
    such as a terminal's new size; without it they are refused. InvalidArgument for messages out of order, or an entry
    that cannot be placed; on return and on errors no thread uses *staging* any more.
    """
    receiving = _Receiving(staging, progress)
    try:
        async for request in requests:
            if request.upload_end:
                await receiving.finish()
                return True
            if request.WhichOneof("payload") is not None or request.entries:
                await receiving.take(request)
            elif other is not None:
                other(request)
            else:
                raise InvalidArgument("a request without payload")
        await receiving.finish()
    finally:
        await receiving.settle()
    return False


class _Receiving:
    def __init__(self, staging: Staging, progress: Progress | None) -> None:
        self._staging = staging
        self._progress = progress
        self._writing: asyncio.Future[None] | None = None
        self._waiting: list[pb.ExecuteRequest] = []
        self._size = 0

    async def take(self, request: pb.ExecuteRequest) -> None:
        size = request.ByteSize()
        if self._writing is not None and self._writing.done():
            await self._written()
        if self._writing is None and size <= _SMALL:
            _place(self._staging, [request])
            return
        self._waiting.append(request)
        self._size += size
        if self._size >= _BATCH_BYTES or len(self._waiting) >= _BATCH:
            await self._written()
        if self._writing is None:
            self._write()

    async def finish(self) -> None:
        """Place all, and check that the upload is whole."""
        while self._writing is not None:
            await self._written()
        self._staging.finish()
        if self._progress is not None:
            self._progress(self._staging.bytes)

    async def settle(self) -> None:
        """Wait for the thread: it cannot be cancelled, and its file must not be closed below it."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            if not self._writing.cancelled():
                self._writing.exception()  # of a call that has failed otherwise

    def _write(self) -> None:
        batch, self._waiting, self._size = self._waiting, [], 0
        self._writing = asyncio.ensure_future(asyncio.to_thread(_place, self._staging, batch))

    async def _written(self) -> None:
        """Wait until the thread has placed its batch, and hand it what gathered meanwhile."""
        if self._writing is None:
            return
        await asyncio.shield(self._writing)
        self._writing = None
        if self._progress is not None:
            self._progress(self._staging.bytes)
        if self._waiting:
            self._write()


def _place(staging: Staging, requests: Sequence[pb.ExecuteRequest]) -> None:
    for request in requests:
        match request.WhichOneof("payload"):
            case "file_chunk":
                staging.write(request.file_chunk.data)
            case "file_end":
                staging.end_file()
            case "file_begin":
                _begin(staging, request.file_begin)
            case "start":
                raise InvalidArgument("a second start")
            case _:
                for entry in request.entries:
                    _add(staging, entry)


def _begin(staging: Staging, begin: pb.FileEntryBegin) -> None:
    if begin.type == pb.FILE_TYPE_FILE:
        staging.begin_file(begin.path, _attributes(begin))
    else:
        _add_other(staging, begin)
        staging.expect_end()


def _add(staging: Staging, entry: pb.UploadEntry) -> None:
    if entry.begin.type == pb.FILE_TYPE_FILE:
        staging.add_file(entry.begin.path, _attributes(entry.begin), entry.data)
    elif entry.data:
        raise UploadRefused(entry.begin.path, "only files have data")
    else:
        _add_other(staging, entry.begin)


def _add_other(staging: Staging, begin: pb.FileEntryBegin) -> None:
    if begin.type == pb.FILE_TYPE_DIR:
        staging.add_directory(begin.path, _attributes(begin))
    elif begin.type == pb.FILE_TYPE_SYMLINK:
        staging.add_symlink(begin.path, begin.symlink_target, _attributes(begin))
    else:
        raise UploadRefused(begin.path, f"unknown type {begin.type}")


def _attributes(begin: pb.FileEntryBegin) -> Attributes:
    return Attributes(begin.mode, begin.uid, begin.gid, begin.mtime_unix)
