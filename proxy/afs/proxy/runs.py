"""``afs.v1.Runs`` on the proxy: what waits here and what runs on the nodes, and ending one of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from typing_extensions import override

from afs.core.errors import AfsError, NotFound, Unimplemented
from afs.core.rpc import calling
from afs.proto.v1 import afslet_pb2
from afs.proto.v1 import runs_pb2 as pb
from afs.proto.v1.runs_pb2_grpc import RunsServicer, RunsStub
from afs.proxy.node import AfsletNode
from afs.proxy.nodes import Nodes
from afs.proxy.run import Run

Context = grpc.aio.ServicerContext[Any, Any]
_TIMEOUT_S = 2.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.02, 1.0  # between two looks whether a run is over


class RunsService(RunsServicer):
    """*runs* are this proxy's calls under way."""

    def __init__(self, nodes: Nodes, runs: dict[str, Run]) -> None:
        self._nodes = nodes
        self._runs = runs

    @override
    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[afslet_pb2.GetRuntimeStatusResponse]:
        raise Unimplemented("Watch is for nodes: ask one, or follow AfsProxy.Status")
        yield  # makes it a stream

    @override
    async def List(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """A node that does not tell its runs is known by what this proxy placed there."""
        nodes = [node for node in self._nodes.nodes if node.reachable]
        told = await asyncio.gather(*(_list(node) for node in nodes))
        known = {node for node, runs in zip(nodes, told, strict=True) if runs is not None}
        own = [run.describe() for run in self._runs.values() if not run.accepted or run.node not in known]
        return pb.ListRunsResponse(runs=[*own, *(run for runs in told for run in runs or ())])

    @override
    async def Cancel(self, request: pb.CancelRunRequest, context: Context) -> pb.CancelRunResponse:
        """By the proxy's or the node's name for the run; NotFound."""
        run = self._runs.get(request.run_id) or self._by_node_id(request.run_id)
        if run is None:
            await self._cancel_anywhere(request)
        elif run.node is None or not run.accepted:
            run.cancel(request.reason)
        else:
            try:
                await _cancel(run.node, pb.CancelRunRequest(run_id=run.node_run_id, reason=request.reason))
            except (AfsError, asyncio.CancelledError) as error:  # whatever it was: also that who asked did not wait
                run.cancel(request.reason)  # the node ends it when its call ends
                if isinstance(error, asyncio.CancelledError):
                    raise
        return pb.CancelRunResponse()

    def _by_node_id(self, run_id: str) -> Run | None:
        return next((run for run in self._runs.values() if run_id and run.node_run_id == run_id), None)

    async def _cancel_anywhere(self, request: pb.CancelRunRequest) -> None:
        """It may have come to its node by another door."""
        nodes = [node for node in self._nodes.nodes if node.reachable]
        answers = await asyncio.gather(*(_cancel(node, request) for node in nodes), return_exceptions=True)
        if None in answers:
            return
        for answer in answers:
            if not isinstance(answer, NotFound | Unimplemented):
                raise answer if isinstance(answer, AfsError) else TypeError(f"not an answer: {answer!r}")
        raise NotFound(f"no run {request.run_id!r} is under way")


async def until_over(node: AfsletNode, run_id: str, lease_ttl: float) -> None:
    """Wait until *node* has cleared up what is left of a run whose call was cancelled: until it does not list it.

    If it does not tell, or the run's name there is not known (empty), for *lease_ttl* seconds: by then it has.
    """
    pause = _FIRST_PAUSE_S
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(lease_ttl):
            while True:
                told = await _list(node) if run_id else None
                if told is not None and all(run.run_id != run_id for run in told):
                    return
                await asyncio.sleep(pause)
                pause = min(pause * 2, _MAX_PAUSE_S)


async def _list(node: AfsletNode) -> list[pb.Run] | None:
    try:
        with calling(f"afslet {node.endpoint}"):
            return list((await RunsStub(node.channel).List(pb.ListRunsRequest(), timeout=_TIMEOUT_S)).runs)
    except (AfsError, grpc.aio.UsageError):  # UsageError: the node was forgotten, its channel is closed
        return None  # older than this, or gone: its runs are told as far as they are known here


async def _cancel(node: AfsletNode, request: pb.CancelRunRequest) -> None:
    with calling(f"afslet {node.endpoint}"):
        await RunsStub(node.channel).Cancel(request, timeout=_TIMEOUT_S)
