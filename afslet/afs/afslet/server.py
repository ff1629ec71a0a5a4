"""The Afslet gRPC service; see proto/afs/proto/v1/afslet.proto."""

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.afslet.execution import Execution, Node
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import afslet_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class AfsletService(pb_grpc.AfsletServicer):
    """Runs commands. ``_idle`` is set while no run is under way, cleanup included."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drained(self) -> None:
        """Wait until every run has given back what it took."""
        await self._idle.wait()

    @override
    async def Execute(
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: Context
    ) -> AsyncIterator[pb.ExecuteResponse]:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("start"):
            raise InvalidArgument("the first request must be start")
        execution = Execution(self._node, first.start, secrets.token_hex(8))
        self._running += 1
        self._idle.clear()
        try:
            async with contextlib.aclosing(execution.responses(request_iterator)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @override
    async def GetRuntimeStatus(
        self, request: pb.GetRuntimeStatusRequest, context: Context
    ) -> pb.GetRuntimeStatusResponse:
        admission = self._node.admission
        limit, used, free = admission.limit, admission.used, admission.available
        return pb.GetRuntimeStatusResponse(
            running_containers=admission.running,
            limit_cpu_cores=int(limit.cpus),
            limit_memory_mb=limit.memory_mb,
            used_cpu_cores=math.ceil(used.cpus),
            used_memory_mb=used.memory_mb,
            available_cpu_cores=int(free.cpus),
            available_memory_mb=free.memory_mb,
            node_id=self._node.node_id,
        )
