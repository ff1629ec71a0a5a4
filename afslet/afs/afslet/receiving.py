"""Messages of an upload on their way to a staging directory."""

import asyncio
from typing import TYPE_CHECKING

from afs.afslet.upload import Attributes, Staging
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

_INLINE_WRITE = 1 << 16  # bytes that are written to the page cache without a thread


async def receive_one(staging: Staging, request: pb.ExecuteRequest) -> None:
    """Do what one message says."""
    kind = request.WhichOneof("payload")
    if kind == "file_chunk":
        data = request.file_chunk.data
        if len(data) <= _INLINE_WRITE:
            staging.write(data)
        else:
            writing = asyncio.ensure_future(asyncio.to_thread(staging.write, data))
            try:
                await asyncio.shield(writing)
            finally:
                await asyncio.wait([writing])  # a thread cannot be cancelled, and its file must not be closed below it
    elif kind == "file_end":
        staging.end_file()
    elif kind == "file_begin":
        _begin(staging, request.file_begin)
    else:
        raise InvalidArgument("a request without payload")


def _begin(staging: Staging, begin: pb.FileEntryBegin) -> None:
    attributes = Attributes(begin.mode, begin.uid, begin.gid, begin.mtime_unix)
    if begin.type == pb.FILE_TYPE_FILE:
        staging.begin_file(begin.path, attributes)
        return
    actions: dict[int, Callable[[], None]] = {
        pb.FILE_TYPE_DIR: lambda: staging.add_directory(begin.path, attributes),
        pb.FILE_TYPE_SYMLINK: lambda: staging.add_symlink(begin.path, begin.symlink_target, attributes),
    }
    if begin.type not in actions:
        raise InvalidArgument(f"upload of {begin.path!r}: unknown type {begin.type}")
    actions[begin.type]()
    staging.expect_end()
