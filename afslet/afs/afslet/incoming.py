"""What the client sends after the start: the upload, then standard input.

State: the iterator of requests has one reader at a time, :meth:`Incoming.upload` until it returns, then
:meth:`Incoming.feed`.
"""

from collections.abc import AsyncIterator

from afs.afslet.receiving import receive
from afs.afslet.stdio import Stdio, Window
from afs.afslet.upload import Staging
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

_MAX_SIDE = 0xFFFF  # struct winsize has 16 bits


class Incoming:
    """The *requests* of a run after its *start*."""

    def __init__(self, requests: AsyncIterator[pb.ExecuteRequest], start: pb.StartRequest) -> None:
        self._requests = requests
        self._stdin = start.stdin
        self._no_upload = start.no_upload

    async def upload(self, staging: Staging) -> None:
        """Receive files until the client half-closes, or says that they are all there."""
        if not self._no_upload:
            await receive(self._requests, staging)

    async def feed(self, stdio: Stdio) -> None:
        """Give standard input and terminal sizes to the command until the client half-closes."""
        if not self._stdin:
            return
        async for request in self._requests:
            if request.WhichOneof("payload") is not None:
                raise InvalidArgument("files cannot be uploaded once the upload has ended")
            if request.HasField("terminal_size"):
                size = request.terminal_size
                stdio.resize(Window(min(size.rows, _MAX_SIDE), min(size.columns, _MAX_SIDE)))
            if request.stdin:
                await stdio.write(request.stdin)
            if request.stdin_end:
                stdio.end_input()
        stdio.end_input()
