"""The gRPC services of afslet: Afslet and Runs; see proto/afs/proto/v1/afslet.proto and runs.proto.

A run is a task of its own, not its call's: gRPC cancels the call's task whenever the client goes, even twice or while the
run is clearing up after another end. The run's task is cancelled once, by :meth:`Run.end`, and then left alone. Between
the two are a few messages in a queue; who reads slowly stops the run.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Never

import grpc.aio
from typing_extensions import override

from afs.afslet.execution import Execution, Node
from afs.afslet.faults import fault, to_metadata
from afs.afslet.requests import MAX_KEY, check_start
from afs.afslet.runs import Run, Runs
from afs.core.errors import AfsError, Cancelled, Internal, InvalidArgument
from afs.core.rpc import as_afs_error
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import afslet_pb2_grpc as pb_grpc
from afs.proto.v1 import runs_pb2, runs_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Responses = asyncio.Queue[pb.ExecuteResponse | None]
# From a proxy: its client, who holds the lease, and the microseconds that the run waited there.
OWNER_METADATA, QUEUED_METADATA = "afs-owner", "afs-queued-us"
_QUEUE = 4  # messages between a run and its call
_COALESCE_S = 0.025  # between two messages of a watch: a burst of runs is one change
_HEARTBEAT_S = 5.0
_MIN_HEARTBEAT_S = 0.05


class AfsletService(pb_grpc.AfsletServicer):
    """Runs commands."""

    def __init__(self, node: Node, runs: Runs) -> None:
        self._node = node
        self._runs = runs

    @override
    async def Execute(
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: Context
    ) -> AsyncIterator[pb.ExecuteResponse]:
        try:
            first = await anext(request_iterator, None)
            if first is None or not first.HasField("start"):
                raise InvalidArgument("the first request must be start")
            check_start(first.start)
            metadata = dict(context.invocation_metadata() or ())
            owner = str(metadata.get(OWNER_METADATA, ""))[:MAX_KEY]
            run = self._runs.add(first.start, owner or str(context.peer()))
            waited = str(metadata.get(QUEUED_METADATA, ""))
            run.queue_us = int(waited) if waited.isdecimal() and len(waited) < 16 else 0
        except AfsError as error:
            self._fail(context, error, accepted=False)
        responses: Responses = asyncio.Queue(_QUEUE)
        # A run from a proxy does not wait here: another node may have room, and a proxy has a queue of its own.
        task = run.task = asyncio.create_task(
            self._serve(run, request_iterator, responses, may_wait=not owner), name=f"run {run.run_id}"
        )
        task.add_done_callback(lambda _: None if responses.full() else responses.put_nowait(None))
        task.add_done_callback(
            lambda _: self._runs.remove(run)
        )  # one that is cancelled before its first step has no `finally`
        try:
            while not (task.done() and responses.empty()):
                if (response := await responses.get()) is not None:
                    yield response
        finally:
            run.end(Cancelled("the client went away"))
        if (broken := _outcome(run, task)) is not None:
            self._fail(context, broken, accepted=run.accepted)

    def _fail(self, context: Context, error: Exception, *, accepted: bool) -> Never:
        result = fault(as_afs_error(error), accepted=accepted, node_id=self._node.node_id)
        context.set_trailing_metadata(to_metadata(result))
        raise error

    async def _serve(
        self, run: Run, requests: AsyncIterator[pb.ExecuteRequest], responses: Responses, *, may_wait: bool
    ) -> None:
        await self._admit(run, responses, may_wait=may_wait)
        await Execution(self._node, run, responses.put).perform(requests)

    async def _admit(self, run: Run, responses: Responses, *, may_wait: bool) -> None:
        start, began = run.start, time.monotonic_ns()

        def moved(position: int, queued: int) -> None:
            # One that is not read in time is out of date soon anyway.
            with contextlib.suppress(asyncio.QueueFull):
                progress = pb.Progress(phase=pb.Progress.PHASE_QUEUED, position=position, queued=queued)
                responses.put_nowait(pb.ExecuteResponse(progress=progress))

        run.reservation = await self._runs.admission.reserve(
            run.wanted,
            priority=start.priority,
            may_wait=may_wait,
            timeout_s=start.queue_timeout_ms / 1000 or None,
            moved=moved if start.progress else None,
        )
        run.queue_us += (time.monotonic_ns() - began) // 1000
        self._runs.accept(run)

    @override
    async def GetRuntimeStatus(
        self, request: pb.GetRuntimeStatusRequest, context: Context
    ) -> pb.GetRuntimeStatusResponse:
        status = pb.GetRuntimeStatusResponse()
        status.CopyFrom(self._runs.status())
        status.ClearField("images")
        return status


def _outcome(run: Run, task: "asyncio.Task[None]") -> Exception | None:
    """The error that the run's call ends with."""
    if task.cancelled():
        return run.ending or Internal(f"run {run.run_id} was broken off")
    error = task.exception()
    if error is None:
        return None
    if not isinstance(error, Exception):
        raise error
    return run.ending or error


class RunsService(runs_pb2_grpc.RunsServicer):
    """The node's status, pushed, and its runs. Watches end when :meth:`close` was called."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._closed = False

    def close(self) -> None:
        """End all watches: a server that stops would wait for them."""
        self._closed = True
        self._runs.notify()

    @override
    async def Watch(
        self, request: runs_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[pb.GetRuntimeStatusResponse]:
        heartbeat = max(request.heartbeat_ms / 1000 or _HEARTBEAT_S, _MIN_HEARTBEAT_S)
        while not self._closed:
            status = self._runs.status()
            yield status
            await asyncio.sleep(_COALESCE_S)
            await self._runs.changed(status, heartbeat)

    @override
    async def List(self, request: runs_pb2.ListRunsRequest, context: Context) -> runs_pb2.ListRunsResponse:
        return runs_pb2.ListRunsResponse(runs=[run.message(self._runs.node_id) for run in self._runs.all()])

    @override
    async def Cancel(self, request: runs_pb2.CancelRunRequest, context: Context) -> runs_pb2.CancelRunResponse:
        self._runs.cancel(request.run_id, request.reason)
        return runs_pb2.CancelRunResponse()
