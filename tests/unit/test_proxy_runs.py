"""afs.v1.Runs on the proxy: what waits and runs, and ending it, through a real server."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from afs.core.errors import AfsError, DeadlineExceeded, Internal, Unavailable
from afs.core.rpc import channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import runs_pb2
from afs.proto.v1.runs_pb2_grpc import RunsStub
from tests.testbed.proxynodes import Caller, TalkingNode, until
from tests.testbed.proxyserver import full, proxy

Code = grpc.StatusCode
GRACE = 5.0


@pytest.fixture
async def node() -> TalkingNode:
    """One afslet of 4 CPUs."""
    return TalkingNode("node1")


async def listed(address: str) -> list[runs_pb2.Run]:
    """Runs.List."""
    async with channel(address) as opened:
        return list((await RunsStub(opened).List(runs_pb2.ListRunsRequest())).runs)


async def cancel(address: str, run_id: str) -> None:
    """Runs.Cancel."""
    async with channel(address) as opened:
        await RunsStub(opened).Cancel(runs_pb2.CancelRunRequest(run_id=run_id, reason="enough"))


async def test_what_waits_and_runs_is_listed_and_can_be_ended(node: TalkingNode) -> None:
    node.pushes = False  # it knows nothing of Runs
    async with proxy(node) as front, full(front, node):
        waiting = await Caller(front.address, tenant="a", labels={"job": "7"}, tag="v1").start()
        await front.queued(1)
        (queued,) = [each for each in await listed(front.address) if each.phase == "queued"]
        assert (queued.image, queued.tenant, queued.node_id) == ("image:v1", "a", "")
        assert (dict(queued.labels), list(queued.command), queued.cpu_millis) == ({"job": "7"}, ["true"], 1000)
        running = [each for each in await listed(front.address) if each.phase == "running"]
        assert {each.run_id for each in running} == {f"node1-{number}" for number in range(1, 5)}
        await cancel(front.address, queued.run_id)
        ended = await waiting.end()
        assert (ended.code, ended.details) == (Code.CANCELLED, f"run {queued.run_id} was cancelled: enough")
        assert ended.fault is not None
        assert ended.fault.outcome == pb.OUTCOME_CANCELLED


async def test_a_running_one_ends_with_its_call_if_the_node_cannot_cancel(node: TalkingNode) -> None:
    node.pushes, node.hold = False, True
    async with proxy(node) as front:
        caller = await (await Caller(front.address).start()).until_accepted()
        await cancel(front.address, "node1-1")
        ended = await caller.end()
        assert ended.code is Code.CANCELLED
        assert ended.fault is not None
        assert ended.fault.outcome == pb.OUTCOME_CANCELLED
        await asyncio.wait_for((await node.seen.get()).over.wait(), GRACE)


@pytest.mark.parametrize("error", [Unavailable("busy"), DeadlineExceeded("late"), Internal("broken")], ids=repr)
async def test_a_running_one_ends_with_its_call_if_its_node_fails_to_cancel(node: TalkingNode, error: AfsError) -> None:
    node.hold, node.cancel_error = True, error
    async with proxy(node) as front:
        caller = await (await Caller(front.address).start()).until_accepted()
        await cancel(front.address, "node1-1")
        assert (await caller.end()).code is Code.CANCELLED
        await asyncio.wait_for((await node.seen.get()).over.wait(), GRACE)


async def test_a_running_one_ends_although_who_asked_did_not_wait(node: TalkingNode) -> None:
    node.hold, node.cancel_hangs = True, True
    async with proxy(node) as front:
        caller = await (await Caller(front.address).start()).until_accepted()
        asking = asyncio.create_task(cancel(front.address, "node1-1"))
        await until(lambda: bool(node.cancelled))
        asking.cancel()
        assert (await asyncio.wait_for(caller.end(), 1)).code is Code.CANCELLED


async def test_nodes_are_asked_to_list_and_to_cancel(node: TalkingNode) -> None:
    node.hold = True
    async with proxy(node) as front:
        caller = await (await Caller(front.address).start()).until_accepted()
        assert [each.run_id for each in await listed(front.address)] == ["told"], "the node knows best"
        await cancel(front.address, "node1-1")
        await cancel(front.address, "came-by-another-door")
        assert node.cancelled == ["node1-1", "came-by-another-door"]
        (await node.seen.get()).end.set()
        assert (await caller.end()).code is Code.OK
        node.pushes = False
        with pytest.raises(grpc.aio.AioRpcError, match="no run 'nobody' is under way"):
            await cancel(front.address, "nobody")
