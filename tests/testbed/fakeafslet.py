"""A server in this process that speaks afsletpb, afsproxy and Runs by a script of the test: what real nodes cannot be made to do."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from typing_extensions import override

from afs.core.errors import AfsError, NotFound
from afs.core.rpc import serving
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import afslet_pb2_grpc, proxy_pb2, proxy_pb2_grpc, runs_pb2, runs_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Script = Callable[[pb.StartRequest, AsyncIterator[pb.ExecuteRequest], Context], AsyncIterator[pb.ExecuteResponse]]


def accepted(node_id: str = "n1", run_id: str = "") -> pb.ExecuteResponse:
    """The node took the run."""
    return pb.ExecuteResponse(accepted=pb.Accepted(accepted=True, node_id=node_id, run_id=run_id))


def log(data: bytes, source: str = "stdout") -> pb.ExecuteResponse:
    """Output, as servers send it to those who want bytes only."""
    return pb.ExecuteResponse(log=pb.LogMessage(source=source, data=data))


def result(exit_code: int = 0, **fields: Any) -> pb.ExecuteResponse:
    """The command exited."""
    wanted = {"outcome": pb.OUTCOME_EXITED, "success": exit_code == 0, **fields}
    return pb.ExecuteResponse(result=pb.Result(exit_code=exit_code, **wanted))


def diff(data: bytes) -> list[pb.ExecuteResponse]:
    """A diff in one chunk."""
    header = pb.ExecuteResponse(tar_header=pb.TarHeader(name="writable-upper.tar.gz"))
    return [header, pb.ExecuteResponse(tar_chunk=pb.TarChunk(data=data))]


def done(**fields: Any) -> pb.ExecuteResponse:
    """Everything was given back."""
    return pb.ExecuteResponse(done=pb.Done(**fields))


async def abort(
    context: Context, code: grpc.StatusCode, details: str, outcome: pb.Outcome.ValueType | None = None, **fields: Any
) -> None:
    """End the call with a status, and with a typed fault in its trailing metadata if there is an *outcome*."""
    from afs.afslet.faults import to_metadata

    metadata = () if outcome is None else to_metadata(pb.Result(outcome=outcome, error=details, **fields))
    await context.abort(code, details, metadata)


class FakeAfslet(afslet_pb2_grpc.AfsletServicer, runs_pb2_grpc.RunsServicer, proxy_pb2_grpc.AfsProxyServicer):
    """Made by `fake_afslet`. `starts` are the requests that came; `ended` counts calls whose script has ended."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.address = ""
        self.starts: list[pb.StartRequest] = []
        self.under_way = 0
        self.most = 0
        self.ended = asyncio.Semaphore(0)
        self.listed: list[runs_pb2.Run] = []
        self.cancelled: dict[str, asyncio.Event] = {}
        self.reasons: list[str] = []
        self.cancel_fault: AfsError | None = None
        self.statuses: list[list[proxy_pb2.StatusResponse]] = [[]]

    @override
    async def Execute(
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: Context
    ) -> AsyncIterator[pb.ExecuteResponse]:
        first = await anext(request_iterator)
        self.starts.append(first.start)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            async with contextlib.aclosing(self.script(first.start, request_iterator, context)) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response
        finally:
            self.under_way -= 1
            self.ended.release()

    @override
    async def List(self, request: runs_pb2.ListRunsRequest, context: Context) -> runs_pb2.ListRunsResponse:
        return runs_pb2.ListRunsResponse(runs=self.listed)

    @override
    async def Cancel(self, request: runs_pb2.CancelRunRequest, context: Context) -> runs_pb2.CancelRunResponse:
        if self.cancel_fault is not None:
            raise self.cancel_fault
        if request.run_id not in self.cancelled:
            raise NotFound(f"no run {request.run_id}")
        self.reasons.append(request.reason)
        self.cancelled[request.run_id].set()
        return runs_pb2.CancelRunResponse()

    @override
    async def Watch(
        self, request: runs_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[pb.GetRuntimeStatusResponse]:
        yield pb.GetRuntimeStatusResponse()

    @override
    async def GetRuntimeStatus(
        self, request: pb.GetRuntimeStatusRequest, context: Context
    ) -> pb.GetRuntimeStatusResponse:
        return pb.GetRuntimeStatusResponse()

    @override
    async def Status(
        self, request: proxy_pb2.StatusRequest, context: Context
    ) -> AsyncIterator[proxy_pb2.StatusResponse]:
        """All of `statuses` to who follows, else the first one."""
        for responses in self.statuses if request.follow_ms else self.statuses[:1]:
            for response in responses:
                yield response

    @override
    async def ReconcileImageReplica(
        self, request: proxy_pb2.ReconcileImageReplicaRequest, context: Context
    ) -> proxy_pb2.ReconcileImageReplicaResponse:
        return proxy_pb2.ReconcileImageReplicaResponse(current_replica=request.replica, ensured=True)


async def echo(
    start: pb.StartRequest, requests: AsyncIterator[pb.ExecuteRequest], context: Context
) -> AsyncIterator[pb.ExecuteResponse]:
    """The command's words on stdout."""
    yield accepted()
    async for _ in requests:
        pass
    yield log(" ".join(start.command).encode())
    yield result()
    yield done()


@contextlib.asynccontextmanager
async def fake_afslet(script: Script = echo) -> AsyncIterator[FakeAfslet]:
    """A server on a port of its own while the block runs."""
    fake = FakeAfslet(script)

    def register(server: grpc.aio.Server) -> None:
        afslet_pb2_grpc.add_AfsletServicer_to_server(fake, server)
        runs_pb2_grpc.add_RunsServicer_to_server(fake, server)
        proxy_pb2_grpc.add_AfsProxyServicer_to_server(fake, server)

    async with serving(["127.0.0.1:0"], register, grace_s=0) as (address,):
        fake.address = address
        yield fake


@contextlib.contextmanager
def fake_in_thread(script: Script = echo) -> Iterator[FakeAfslet]:
    """A server on an event loop in another thread."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[FakeAfslet] = []

    async def serve() -> None:
        async with fake_afslet(script) as fake:
            found.append(fake)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
