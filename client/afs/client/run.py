"""One run under way: events one way, standard input and the terminal's size the other way.

State: a :class:`Run` belongs to one event loop and may be used by several of its tasks, typically one that reads and one
that writes. gRPC takes one read and one write at a time: ``_reading`` and ``_writing`` are held across those awaits, and
across nothing else. Nothing is read ahead, so a consumer that waits holds the command's output back.
"""

import asyncio
import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import grpc.aio

from afs.client.collecting import collect
from afs.client.errors import RunEnded, run_error
from afs.client.events import (
    Accepted,
    DiffChunk,
    Done,
    Event,
    Finished,
    Log,
    Outcome,
    Progress,
    Queued,
    RunResult,
)
from afs.client.options import RunRequest, start_message
from afs.client.uploads import batches, data_size, messages
from afs.client.wire import event_of, finished_of
from afs.core.errors import AfsError, Cancelled, Internal, InvalidArgument
from afs.core.rpc import CALL_ENDED, EOF, calling, send, to_afs_error
from afs.core.threads import ahead
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import runs_pb2

if TYPE_CHECKING:
    from afs.client.channels import Connections

log = logging.getLogger(__name__)

_STDIN_CHUNK = 1 << 18
_AHEAD = 2  # batches of an upload that are read before they can be sent


class Run:
    """Made by :meth:`AfsClient.open`; use it with ``async with``. Leaving the block before the end cancels the run.

    Iterating yields events to the end, which is after :class:`~afs.client.Done`, or raises RunError.
    """

    def __init__(self, connections: "Connections", peer: str, request: RunRequest, *, progress: bool = True) -> None:
        self._connections = connections
        self._peer = peer
        self.request = request
        self._start = start_message(request, progress=progress)
        self._sending: asyncio.Task[None] | None = None
        self._entries = False  # the node takes many files in one message
        self._taken: asyncio.Event | None = None  # set when a node has taken the run; uploads wait for it
        self._upload_failure: Exception | None = None
        self._failure: BaseException | None = None  # what ended the run instead of a result
        self._stdin_closed = False
        self._reading, self._writing = asyncio.Lock(), asyncio.Lock()
        self._cancelled = False
        self._ended = False
        self.accepted: Accepted | None = None  # once a node has taken it
        self.finished: Finished | None = None  # once the command has ended
        self.done: Done | None = None  # once the node has given everything back
        self.progress: Queued | Progress | None = None  # the last that came
        self.uploaded = 0  # bytes of files that have been sent
        self.diff_received = 0  # bytes of the diff that have come

    async def __aenter__(self) -> Self:
        self._connection = self._connections.take()
        try:
            self._call = self._connection.afslet.Execute()
        except BaseException:
            self._connections.give_back(self._connection)
            raise
        try:
            if self.request.upload is None:
                with contextlib.suppress(*CALL_ENDED):
                    await self._put(pb.ExecuteRequest(start=self._start))
                    await self._end_upload()
            else:
                if not self.request.stdin:  # who talks with a run may write before reading, and would wait for ever
                    self._taken = asyncio.Event()
                self._sending = asyncio.create_task(self._send(), name=f"upload to {self._peer}")
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        self._ended = True
        self._call.cancel()  # does nothing to a call that has ended
        self._connections.give_back(self._connection)
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])

    # Sending

    async def _send(self) -> None:
        assert self.request.upload is not None
        try:
            await self._put(pb.ExecuteRequest(start=self._start))
            # Nothing is read of us before that, and who is refused need not open a file.
            if self._taken is not None:
                await self._taken.wait()
            files = messages(self.request.upload, self.request.upload_to, entries=self._entries)
            async with contextlib.aclosing(ahead(batches(files), _AHEAD)) as read:
                async for batch in read:
                    for message in batch:
                        await self._put(message)
                        self.uploaded += data_size(message)
            await self._end_upload()
        except CALL_ENDED:
            return
        except Exception as error:
            # The read reports the call as cancelled; this is why.
            self._upload_failure = error
            self._call.cancel()

    async def _put(self, message: pb.ExecuteRequest) -> None:
        """Write *message*; one of CALL_ENDED."""
        await send(self._call, message.SerializeToString())

    async def _end_upload(self) -> None:
        if self._start.stdin:
            await self._put(pb.ExecuteRequest(upload_end=True))
        else:
            await self._call.done_writing()

    async def write(self, data: bytes) -> None:
        """Write to the command's standard input; waits while the command does not read. The run needs ``stdin=True``.

        RunEnded after the run's end or :meth:`close_stdin`; if the upload has failed here, what it failed of.
        """
        if self._stdin_closed:
            raise RunEnded("the run's standard input was closed")
        for start in range(0, len(data), _STDIN_CHUNK):
            await self._write(pb.ExecuteRequest(stdin=data[start : start + _STDIN_CHUNK]))

    async def close_stdin(self) -> None:
        """End of file on standard input."""
        await self._write(pb.ExecuteRequest(stdin_end=True))
        self._stdin_closed = True

    async def resize(self, rows: int, columns: int) -> None:
        """The terminal has another size now. The run needs ``tty=True`` and ``stdin=True``."""
        if not self._start.tty:
            raise InvalidArgument("the run has no terminal: give it tty=True")
        await self._write(pb.ExecuteRequest(terminal_size=pb.TerminalSize(rows=rows, columns=columns)))

    async def _write(self, message: pb.ExecuteRequest) -> None:
        if not self._start.stdin:
            raise InvalidArgument("the run has no standard input: give it stdin=True")
        if self._sending is not None and not self._sending.done():
            await asyncio.wait([self._sending])
        async with self._writing:
            if self._ended or self.finished is not None:
                raise self._upload_failure or RunEnded("the run has ended")
            try:
                await self._put(message)
            except CALL_ENDED:
                raise self._upload_failure or RunEnded("the run has ended") from None

    # Receiving

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        async with self._reading:
            while not self._ended:
                response = await self._read()
                if response is not None and (event := self._noted(response)) is not None:
                    return event
        if self._failure is not None:
            raise self._failure
        raise StopAsyncIteration

    def _noted(self, response: pb.ExecuteResponse) -> Event | None:
        event = event_of(response)
        match event:
            case Log():
                pass  # by far the most frequent one
            case Accepted():
                self.accepted = event
                self._entries = response.accepted.upload_entries
                if self._taken is not None:
                    self._taken.set()
            case Finished():
                self.finished = event
            case DiffChunk():
                self.diff_received += len(event.data)
            case Queued() | Progress():
                self.progress = event
            case Done():
                self.done = event
            case _:
                pass
        return event

    async def _read(self) -> pb.ExecuteResponse | None:
        """The next response; None when the call has ended, ``_failure`` says how. ``_reading`` is held."""
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            self._failure = self._fault(error)
        except asyncio.CancelledError:
            self._failure = self._local_end()  # gRPC has cancelled the call if it was not cancelled before
            if self._is_our_task_cancelled():
                self._ended = True
                raise
        else:
            if response is not EOF:
                return cast("pb.ExecuteResponse", response)
            if self.finished is None:
                self._failure = self._broken(Internal(f"{self._peer} ended the run without a result"))
        self._ended = True
        return None

    @staticmethod
    def _is_our_task_cancelled() -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def _local_end(self) -> BaseException:
        """Why a call ended that this side has cancelled."""
        if self._upload_failure is not None:
            return self._upload_failure
        reason = "was cancelled" if self._cancelled else "was cancelled: the client was closed"
        error = Cancelled(f"the run of {self.request.image} {reason}")
        return run_error(error, self._unfinished(error, Outcome.CANCELLED, retryable=False), self.run_id)

    def _unfinished(self, error: AfsError, outcome: Outcome, *, retryable: bool) -> Finished:
        node_id = self.accepted.node_id if self.accepted is not None else ""
        return Finished(0, outcome, error.line, retryable=retryable, node_id=node_id)

    def _broken(self, error: AfsError) -> AfsError:
        return run_error(error, self._unfinished(error, Outcome.INFRASTRUCTURE_ERROR, retryable=True), self.run_id)

    def _fault(self, error: grpc.aio.AioRpcError) -> AfsError:
        # Where faults are made; imported only when there is one.
        from afs.afslet.faults import fault, from_metadata

        known = to_afs_error(error, self._peer)
        result = from_metadata(error.trailing_metadata())
        if result is None:  # an old server, or none
            accepted = self.accepted is not None
            result = fault(known, accepted=accepted, node_id=self.accepted.node_id if self.accepted else "")
        return run_error(known, finished_of(result), self.run_id)

    @property
    def run_id(self) -> str:
        """What lists of runs call it; empty until a node has taken it."""
        return self.accepted.run_id if self.accepted is not None else ""

    # Ending

    async def cancel(self, reason: str = "") -> None:
        """Cancel the run and wait until the node has given back what it took. Whoever reads then gets RunCancelled.

        Output that nobody has read is lost.
        """
        if self._ended:
            return
        self._cancelled = True
        if not self.run_id:
            self._call.cancel()  # nothing has been taken yet, or the server is too old to be asked
            return
        try:
            with calling(self._peer):
                request = runs_pb2.CancelRunRequest(run_id=self.run_id, reason=reason)
                await self._connection.lists.Cancel(request, timeout=10.0)
        except (AfsError, grpc.aio.UsageError) as error:
            # Another proxy's run, an old server, one that is away or too slow, or a client that is closed. The call is the
            # lease, so ending it will do; only nobody tells when the node has given everything back.
            log.info("run %s is cancelled by its call: %s", self.run_id, error)
            self._call.cancel()
        async with self._reading:
            while not self._ended:
                await self._read()

    async def result(self, diff_to: Path | str | None = None) -> RunResult:
        """Read the rest and say how the run ended; output and diff that were iterated over are not in the result.

        The changed files go to the file *diff_to* if given, else into the result. Raises RunError.
        """
        return await collect(self, diff_to)
