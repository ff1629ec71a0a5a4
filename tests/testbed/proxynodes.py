"""What tests of the proxy's dispatch use: a clock that stands, reports, and an afslet that only talks."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from typing_extensions import override

from afs.afslet import faults
from afs.core.errors import AfsError, Unimplemented
from afs.core.rpc import EOF, channel, serving
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import runs_pb2
from afs.proto.v1.afslet_pb2_grpc import AfsletServicer, AfsletStub, add_AfsletServicer_to_server
from afs.proto.v1.runs_pb2_grpc import RunsServicer, add_RunsServicer_to_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@dataclass
class Clock:
    """Monotonic seconds, as the test says."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


async def until(condition: Callable[[], bool], grace: float = 5.0) -> None:
    """Poll for what other tasks and processes do without an event for us."""
    deadline = time.monotonic() + grace
    while not condition():
        assert time.monotonic() < deadline, f"not after {grace} s"
        await asyncio.sleep(0.005)


def report(node_id: str, cpus: int, memory_mb: int, **fields: Any) -> pb.GetRuntimeStatusResponse:
    """What an afslet says about itself: its limits, and *fields*."""
    return pb.GetRuntimeStatusResponse(node_id=node_id, limit_cpu_cores=cpus, limit_memory_mb=memory_mb, **fields)


@dataclass
class Seen:
    """One call of Execute at a `TalkingNode`. It ends when `end` is set: with `error`, or a result."""

    start: pb.StartRequest
    metadata: dict[str, Any]
    requests: list[pb.ExecuteRequest] = field(default_factory=list)
    end: asyncio.Event = field(default_factory=asyncio.Event)
    error: AfsError | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)


class TalkingNode(AfsletServicer, RunsServicer):
    """An afslet without containers: it accepts or refuses as the test says, and tells what the test has it tell.

    With *pushes* it serves Runs.Watch; else it is as old as that it does not.
    """

    def __init__(self, node_id: str, cpus: int = 4, *, pushes: bool = True) -> None:
        self.node_id = node_id
        self.status = report(node_id, cpus, 4096)
        self.pushes = pushes
        self.refusals: list[AfsError] = []  # what the next offers are answered with
        self.offers = 0
        self.polls = 0
        self.watchers = 0
        self.old = False  # whether it knows nothing of no_upload
        self.hold = False  # whether runs last until the test ends them
        self.seen: asyncio.Queue[Seen] = asyncio.Queue()
        self.cancelled: list[str] = []
        self.cancel_error: AfsError | None = None  # what a Cancel is answered with
        self.cancel_hangs = False
        self.listed = ["told"]  # the runs that it tells of
        self.lists = 0
        self.mute = asyncio.Event()  # while it is set, nothing is pushed
        self._changed = asyncio.Event()
        self.address = ""

    def tell(self, **fields: Any) -> None:
        """Push another status."""
        for name, value in fields.items():
            setattr(self.status, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    @override
    async def Watch(self, request: runs_pb2.WatchRequest, context: Any) -> AsyncIterator[pb.GetRuntimeStatusResponse]:
        if not self.pushes:
            raise Unimplemented("Watch")
        self.watchers += 1
        try:
            while True:
                changed = self._changed
                if not self.mute.is_set():
                    yield self.status
                try:
                    await asyncio.wait_for(changed.wait(), request.heartbeat_ms / 1000)
                except TimeoutError:
                    continue
        finally:
            self.watchers -= 1

    @override
    async def GetRuntimeStatus(self, request: Any, context: Any) -> pb.GetRuntimeStatusResponse:
        self.polls += 1
        return self.status

    @override
    async def List(self, request: Any, context: Any) -> runs_pb2.ListRunsResponse:
        if not self.pushes:
            raise Unimplemented("List")
        self.lists += 1
        return runs_pb2.ListRunsResponse(runs=[runs_pb2.Run(run_id=each, node_id=self.node_id) for each in self.listed])

    @override
    async def Cancel(self, request: runs_pb2.CancelRunRequest, context: Any) -> runs_pb2.CancelRunResponse:
        if not self.pushes:
            raise Unimplemented("Cancel")
        self.cancelled.append(request.run_id)
        if self.cancel_error is not None:
            raise self.cancel_error
        if self.cancel_hangs:
            await asyncio.Event().wait()
        return runs_pb2.CancelRunResponse()

    @override
    async def Execute(
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> AsyncIterator[pb.ExecuteResponse]:
        first = await anext(request_iterator)
        self.offers += 1
        if self.refusals:
            error = self.refusals.pop(0)
            context.set_trailing_metadata(faults.to_metadata(faults.fault(error, accepted=False)))
            raise error
        seen = Seen(first.start, dict(context.invocation_metadata()))
        self.seen.put_nowait(seen)
        try:
            accepted = pb.Accepted(accepted=True, node_id=self.node_id, run_id=f"{self.node_id}-{self.offers}")
            yield pb.ExecuteResponse(accepted=accepted)
            while (self.old or not first.start.no_upload) and (
                request := await anext(request_iterator, None)
            ) is not None:
                seen.requests.append(request)
                if request.stdin:
                    yield pb.ExecuteResponse(log=pb.LogMessage(source="stdout", data=request.stdin))
            if self.hold:
                await seen.end.wait()
            if seen.error is not None:
                raise seen.error
            yield pb.ExecuteResponse(log=pb.LogMessage(source="stdout", data=b"ran\n"))
            yield pb.ExecuteResponse(result=pb.Result(success=True, outcome=pb.OUTCOME_EXITED))
            yield pb.ExecuteResponse(done=pb.Done())
        finally:
            seen.over.set()


@asynccontextmanager
async def talking(node: TalkingNode, address: str = "127.0.0.1:0") -> AsyncIterator[TalkingNode]:
    """Serve *node* while the block runs."""

    def register(server: grpc.aio.Server) -> None:
        add_AfsletServicer_to_server(node, server)
        add_RunsServicer_to_server(node, server)

    async with serving([address], register, grace_s=0.0) as bound:
        node.address = bound[0]
        yield node


@dataclass
class Ended:
    """What a call gave, and how it ended."""

    responses: list[pb.ExecuteResponse]
    code: grpc.StatusCode
    details: str
    fault: pb.Result | None

    @property
    def kinds(self) -> list[str]:
        """The responses by name."""
        return [response.WhichOneof("payload") or "progress" for response in self.responses]

    @property
    def node_id(self) -> str:
        """Who accepted it."""
        return next(r.accepted.node_id for r in self.responses if r.HasField("accepted"))


class Caller:
    """One run by the bare protocol; `start()` it, and `end()` gives the rest."""

    def __init__(self, address: str, **fields: Any) -> None:
        wanted = {"image": "image", "command": ["true"], "cpu_cores": 1, "memory_mb": 64, **fields}
        self.start_request = pb.StartRequest(**wanted)
        self._channel = channel(address)
        self.call: Any = None
        self.responses: list[pb.ExecuteResponse] = []

    async def start(self, *more: pb.ExecuteRequest, timeout: float | None = None) -> Caller:
        """Send the start and *more*, and half-close."""
        self.call = AfsletStub(self._channel).Execute(timeout=timeout)
        await self.call.write(pb.ExecuteRequest(start=self.start_request))
        for request in more:
            await self.call.write(request)
        await self.call.done_writing()
        return self

    async def start_open(self) -> Caller:
        """Send the start, and leave the stream open."""
        self.call = AfsletStub(self._channel).Execute()
        await self.call.write(pb.ExecuteRequest(start=self.start_request))
        return self

    async def next(self) -> pb.ExecuteResponse:
        """The next response."""
        response: pb.ExecuteResponse = await self.call.read()
        assert response is not EOF, await self.call.details()
        self.responses.append(response)
        return response

    async def until_accepted(self) -> Caller:
        """Read on until a node has taken it."""
        while not (await self.next()).HasField("accepted"):
            pass
        return self

    async def end(self) -> Ended:
        """Read to the end."""
        try:
            while (response := await self.call.read()) is not EOF:
                self.responses.append(response)
        except grpc.aio.AioRpcError:
            pass  # told below
        code, details = await self.call.code(), await self.call.details() or ""
        found = faults.from_metadata(await self.call.trailing_metadata())
        await self._channel.close()
        return Ended(self.responses, code, details, found)

    async def cancel(self) -> None:
        """Go away."""
        self.call.cancel()
        await self._channel.close()


async def run(address: str, **fields: Any) -> Ended:
    """One run to its end."""
    return await (await Caller(address, **fields).start()).end()
