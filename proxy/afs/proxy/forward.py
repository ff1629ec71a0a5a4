"""``afsletpb.Afslet`` on the proxy: find a node for each run and pass its messages on as bytes, undecoded.

A run is tried elsewhere only before a node accepted it: until then nothing has happened, and nothing but the start has
been read from the client.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from typing_extensions import override

from afs.afslet.requests import check_start
from afs.core.errors import AfsError, InvalidArgument, ResourceExhausted, Unavailable
from afs.core.rpc import EOF, calling
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy.nodes import AfsletNode, NobodyAnswers, Nodes, Room

log = logging.getLogger(__name__)
_EXECUTE = "/afsletpb.Afslet/Execute"
_STATUS = "/afsletpb.Afslet/GetRuntimeStatus"
_DEFAULT_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
Context = grpc.aio.ServicerContext[Any, Any]
Call = grpc.aio.StreamStreamCall[bytes, bytes]


class Forwarder(grpc.GenericRpcHandler):
    """Register it with ``server.add_generic_rpc_handlers``."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        if handler_call_details.method == _EXECUTE:
            return grpc.stream_stream_rpc_method_handler(self._execute)
        if handler_call_details.method == _STATUS:
            return grpc.unary_unary_rpc_method_handler(self._status)
        return None

    async def _status(self, request: bytes, context: Context) -> bytes:
        """The whole cluster as one big node: sums over the nodes that answer."""
        total = pb.GetRuntimeStatusResponse()
        for node in self._nodes.nodes:
            if node.reachable:
                for descriptor, value in node.status.ListFields():
                    if descriptor.type == descriptor.TYPE_INT64:
                        setattr(total, descriptor.name, getattr(total, descriptor.name) + value)
        return total.SerializeToString()

    async def _execute(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        first = await anext(requests, None)
        start = _start(first)
        wanted = Room(start.cpu_cores, start.memory_mb)
        node, call, accepted = await self._dispatch(first or b"", start, wanted)
        pumping = asyncio.create_task(_pump(requests, call))
        try:
            yield accepted
            with calling(f"afslet {node.endpoint}"):
                while (response := await call.read()) is not EOF:
                    yield cast("bytes", response)
        finally:
            pumping.cancel()
            call.cancel()  # does nothing to a call that has ended
            self._nodes.give_back(node, wanted)

    async def _dispatch(self, first: bytes, start: pb.StartRequest, wanted: Room) -> tuple[AfsletNode, Call, bytes]:
        """A node that accepted the run, with *wanted* taken from its room, the call to it, and its first response."""
        retries = 0
        pause = start.proxy_dispatch_backoff_ms / 1000 or _DEFAULT_BACKOFF_S
        while True:
            try:
                node = self._nodes.choose(wanted, start.node_id)
                call, accepted = await self._offer(node, first, wanted)
            except (ResourceExhausted, Unavailable) as error:
                nobody = not any(node.reachable for node in self._nodes.nodes)
                if isinstance(error, NobodyAnswers) or (isinstance(error, Unavailable) and nobody):
                    raise
                if start.proxy_dispatch_max_retries and retries >= start.proxy_dispatch_max_retries:
                    raise type(error)(f"{error.line} (tried {retries + 1} times)") from None
                await self._pause(pause, wanted, start.node_id)
                retries += 1
                pause = min(pause * 2, max(_MAX_BACKOFF_S, start.proxy_dispatch_backoff_ms / 1000))
            else:
                return node, call, accepted

    async def _pause(self, seconds: float, wanted: Room, node_id: str) -> None:
        """Wait *seconds*, or until a node seems to have room: only offers and pauses count as retries, not every wake-up."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not await self._nodes.room_may_be_free(left):
                return
            with contextlib.suppress(AfsError):
                self._nodes.choose(wanted, node_id)
                return

    async def _offer(self, node: AfsletNode, first: bytes, wanted: Room) -> tuple[Call, bytes]:
        # Taken before the node answers, so that a burst of runs does not see the same room free.
        self._nodes.take(node, wanted)
        try:
            return await self._ask(node, first)
        except ResourceExhausted:
            # The node knows better than the estimate, and its next report corrects that. Nobody is woken: the others
            # would be refused as well.
            node.free = Room()
            raise
        except BaseException:
            self._nodes.give_back(node, wanted)
            raise

    async def _ask(self, node: AfsletNode, first: bytes) -> tuple[Call, bytes]:
        call: Call = node.channel.stream_stream(_EXECUTE)()
        try:
            with calling(f"afslet {node.endpoint}"):
                # A refused call refuses the write as well; its status comes with the read.
                with contextlib.suppress(grpc.aio.UsageError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(first)
                answer = await call.read()
        except AfsError as error:
            if isinstance(error, Unavailable):
                self._nodes.mark_unreachable(node, error)
            raise
        except BaseException:
            call.cancel()
            raise
        if not isinstance(answer, bytes):
            raise Unavailable(f"afslet {node.endpoint} ended the call without an answer")
        return call, answer


def _start(first: bytes | None) -> pb.StartRequest:
    try:
        request = pb.ExecuteRequest.FromString(first or b"")
    except DecodeError:
        raise InvalidArgument("the first request is not an ExecuteRequest") from None
    if not request.HasField("start"):
        raise InvalidArgument("the first request must be start")
    check_start(request.start)
    return request.start


async def _pump(requests: AsyncIterator[bytes], call: Call) -> None:
    """Pass the client's further messages on; the write waits while the node does not read, and so does the client."""
    try:
        async for request in requests:
            await call.write(request)
        await call.done_writing()
    except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
        # The node ended the call; its status goes to the client with the response stream.
        log.debug("the node ended the call during the upload")
