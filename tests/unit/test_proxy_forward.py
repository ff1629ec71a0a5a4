"""Calls through a real proxy server, in this process, to afslets that only talk: retries, faults, keys, Runs, limits."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import pytest

from afs.core.errors import (
    AfsError,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from afs.proto.v1 import afslet_pb2 as pb
from tests.testbed.proxynodes import Caller, Ended, TalkingNode, run, until
from tests.testbed.proxyserver import full, proxy

Code = grpc.StatusCode


@pytest.fixture
async def node() -> TalkingNode:
    """One afslet of 4 CPUs."""
    return TalkingNode("node1")


async def test_a_run_passes_and_the_node_learns_who_and_how_long(node: TalkingNode) -> None:
    async with proxy(node) as front:
        ended = await run(front.address, node_id="node1")
        assert ended.kinds == ["accepted", "log", "result", "done"]
        assert (ended.code, ended.fault) == (Code.OK, None)
        seen = await node.seen.get()
        assert seen.metadata["afs-owner"].startswith("ipv4:127.0.0.1:")
        assert 0 <= int(seen.metadata["afs-queued-us"]) < 1e6
        assert front.outcomes == ["completed"]


async def test_input_passes_while_output_comes(node: TalkingNode) -> None:
    async with proxy(node) as front:
        caller = Caller(front.address, stdin=True)
        await caller.start_open()
        await caller.until_accepted()
        for word in (b"one", b"two"):
            await caller.call.write(pb.ExecuteRequest(stdin=word))
            assert (await caller.next()).log.data == word
        await caller.call.done_writing()
        assert (await caller.end()).kinds[-3:] == ["log", "result", "done"]


async def test_what_nobody_waits_for_is_not_passed_on(node: TalkingNode) -> None:
    async with proxy(node) as front:
        caller = Caller(front.address, no_upload=True)
        await caller.start_open()
        assert (await caller.end()).kinds == ["accepted", "log", "result", "done"], "without a half-close"


async def test_an_old_node_that_waits_for_the_end_of_the_requests_gets_it(node: TalkingNode) -> None:
    node.old = True
    async with proxy(node) as front:
        caller = Caller(front.address, no_upload=True)
        await caller.start_open()
        ended = await asyncio.wait_for(caller.end(), 5)
        assert ended.kinds == ["accepted", "log", "result", "done"]


@pytest.mark.parametrize("error", [Unavailable("away"), Internal("broken"), ResourceExhausted("full")])
async def test_a_refused_run_goes_to_another_node_at_once(error: AfsError) -> None:
    nodes = [TalkingNode("node1"), TalkingNode("node2")]
    async with proxy(*nodes) as front:
        for each in nodes:
            each.refusals.append(error)
        first = await run(front.address, proxy_dispatch_backoff_ms=1)
        assert first.code is Code.OK
        assert nodes[0].offers + nodes[1].offers == 3, "each refused once, then one took it"


@pytest.mark.parametrize("error", [NotFound("no such image"), FailedPrecondition("no such platform")])
async def test_errors_of_the_request_go_back_at_once(error: AfsError) -> None:
    nodes = [TalkingNode("node1"), TalkingNode("node2")]
    async with proxy(*nodes) as front:
        for each in nodes:
            each.refusals.append(error)
        ended = await run(front.address)
        assert (ended.details, nodes[0].offers + nodes[1].offers) == (error.line, 1)
        assert ended.fault is not None
        assert (ended.fault.outcome, ended.fault.retryable) == (pb.OUTCOME_REJECTED, False)
        assert front.outcomes == ["rejected"]


@pytest.mark.parametrize("text", ["x" * 9000, "\u00fc" * 600])
async def test_a_long_error_keeps_its_status(node: TalkingNode, text: str) -> None:
    async with proxy(node) as front:
        node.refusals.append(NotFound(text))
        ended = await run(front.address)
        assert (ended.code, ended.details[:500]) == (Code.NOT_FOUND, text[:500])
        assert ended.fault is not None
        assert ended.fault.error == text.encode()[:1000].decode() + " ..."
        assert ended.fault.outcome == pb.OUTCOME_REJECTED


async def test_broken_nodes_are_not_asked_for_ever(node: TalkingNode) -> None:
    async with proxy(node) as front:
        node.refusals = [Internal("broken")] * 9
        ended = await run(front.address, proxy_dispatch_backoff_ms=1)
        assert (ended.code, ended.details, node.offers) == (Code.INTERNAL, "broken", 3)
        assert ended.fault is not None
        assert (ended.fault.outcome, ended.fault.retryable) == (pb.OUTCOME_REJECTED, True)
        assert front.nodes.state(front.nodes.nodes[0]) == "avoided"


async def test_an_accepted_run_is_never_tried_again(node: TalkingNode) -> None:
    other = TalkingNode("node2")
    async with proxy(node, other) as front:
        node.hold = True
        caller = await (await Caller(front.address, node_id="node1").start()).until_accepted()
        seen = await node.seen.get()
        seen.error = Unavailable("the snapshotter is gone")
        seen.end.set()
        ended = await caller.end()
        assert (ended.code, ended.details) == (Code.UNAVAILABLE, "the snapshotter is gone")
        assert ended.fault is not None
        assert ended.fault.outcome == pb.OUTCOME_INFRASTRUCTURE_ERROR
        assert (ended.fault.node_id, ended.fault.retryable) == ("node1", True)
        assert node.offers + other.offers == 1
        assert front.outcomes == ["failed"]


async def test_a_bad_request_is_rejected_in_the_trailers_too(node: TalkingNode) -> None:
    async with proxy(node) as front:
        for fields, code in (({"cpu_cores": 0}, Code.INVALID_ARGUMENT), ({"node_id": "x"}, Code.NOT_FOUND)):
            ended = await run(front.address, **fields)
            assert ended.code is code
            assert ended.fault is not None
            assert (ended.fault.outcome, ended.fault.error) == (pb.OUTCOME_REJECTED, ended.details)
            assert not ended.fault.retryable


async def test_a_queued_run_is_told_its_place_and_dispatched(node: TalkingNode) -> None:
    async with proxy(node) as front, full(front, node) as seen:
        first = await Caller(front.address, tenant="a", progress=True).start()
        told = await first.next()
        assert (told.progress.phase, told.progress.position) == (pb.Progress.PHASE_QUEUED, 1)
        second = await Caller(front.address, tenant="a", progress=True).start()
        told = await second.next()
        assert (told.progress.position, told.progress.queued) == (2, 2)
        quiet = await Caller(front.address, tenant="a").start()
        await front.queued(3)
        seen[0].end.set()
        await first.until_accepted()
        assert (await second.next()).progress.position == 1
        for each in (*seen, await node.seen.get()):
            each.end.set()
        ended = [asyncio.create_task(caller.end()) for caller in (first, second, quiet)]
        for _ in range(2):
            (await node.seen.get()).end.set()
        assert [(await each).code for each in ended] == [Code.OK] * 3
        assert "progress" not in (await ended[2]).kinds


async def test_queue_timeout_and_deadline(node: TalkingNode) -> None:
    async with proxy(node) as front, full(front, node):
        ended = await run(front.address, queue_timeout_ms=50)
        assert ended.code is Code.DEADLINE_EXCEEDED
        assert ended.details == "no node had 1 CPUs and 64 MiB free within the queue_timeout of 0.05 s"
        assert ended.fault is not None
        assert (ended.fault.outcome, ended.fault.retryable) == (pb.OUTCOME_REJECTED, True)
        ended = await (await Caller(front.address).start(timeout=0.4)).end()
        assert ended.code is Code.DEADLINE_EXCEEDED
        assert ended.details == "no node had 1 CPUs and 64 MiB free before the call's deadline"


async def test_tries_are_counted(node: TalkingNode) -> None:
    async with proxy(node) as front, full(front, node):
        ended = await run(front.address, proxy_dispatch_max_retries=2, proxy_dispatch_backoff_ms=1)
        assert ended.code is Code.RESOURCE_EXHAUSTED
        assert ended.details == "no node has 1 CPUs and 64 MiB free now (tried 3 times)"


async def test_more_than_may_wait_is_refused_at_once(node: TalkingNode) -> None:
    async with proxy(node, max_queued_tenant=1) as front, full(front, node):
        waiting = await Caller(front.address, tenant="a").start()
        await front.queued(1)
        ended = await run(front.address, tenant="a")
        assert ended.code is Code.RESOURCE_EXHAUSTED
        assert ended.details == "1 runs of tenant 'a' wait already: the limit per tenant is 1"
        await waiting.cancel()
        await front.queued(0)


async def test_a_client_that_goes_leaves_the_queue(node: TalkingNode) -> None:
    async with proxy(node) as front, full(front, node):
        waiting = await Caller(front.address).start()
        await front.queued(1)
        await waiting.cancel()
        await front.queued(0)
        assert front.outcomes == ["cancelled"]


async def test_a_draining_node_gets_nothing_new_and_keeps_what_it_has() -> None:
    one, two = TalkingNode("node1"), TalkingNode("node2")
    async with proxy(one, two) as front:
        one.hold = True
        caller = await (await Caller(front.address, node_id="node1").start()).until_accepted()
        one.tell(draining=True)
        await until(lambda: not front.nodes.nodes[0].usable)
        assert {(await run(front.address)).node_id for _ in range(6)} == {"node2"}
        (await one.seen.get()).end.set()
        assert (await caller.end()).code is Code.OK


async def test_nodes_that_do_not_push_are_polled(node: TalkingNode, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    node.pushes = False
    async with proxy(node) as front:
        polls = node.polls
        await until(lambda: node.polls > polls + 2)
        assert (await run(front.address)).code is Code.OK
    assert caplog.text.count("does not push its status: polled every 0.05 s") == 1


async def test_reports_make_room(node: TalkingNode) -> None:
    node.tell(used_cpu_cores=4)
    async with proxy(node) as front:
        waiting = await Caller(front.address).start()
        await front.queued(1)
        node.tell(used_cpu_cores=3)
        assert (await waiting.end()).code is Code.OK


async def test_silence_is_an_end_and_speech_a_beginning(node: TalkingNode) -> None:
    async with proxy(node) as front:
        (known,) = front.nodes.nodes
        node.mute.set()
        node.tell()
        await until(lambda: not known.reachable)
        assert known.error == f"afslet {node.address} does not answer: silent for 1 s"
        assert (await run(front.address)).code is Code.UNAVAILABLE
        node.mute.clear()
        await until(lambda: known.reachable)
        assert (await run(front.address)).code is Code.OK


async def test_one_key_is_one_run(node: TalkingNode) -> None:
    node.hold = True
    async with proxy(node) as front:
        key = {"tenant": "a", "idempotency_key": "k"}
        first = await (await Caller(front.address, **key).start()).until_accepted()
        seen = await node.seen.get()
        again = await Caller(front.address, **key, progress=True).start()
        assert (await again.next()).progress.phase == pb.Progress.PHASE_QUEUED
        other = await (await Caller(front.address, tenant="b", idempotency_key="k").start()).until_accepted()
        (await node.seen.get()).end.set()
        seen.end.set()
        assert not any(response.result.replayed for response in (await first.end()).responses)
        for ended in (await again.end(), await run(front.address, **key)):
            assert ended.code is Code.OK
            assert [kind for kind in ended.kinds if kind != "progress"] == ["accepted", "result", "done"]
            (result,) = [response.result for response in ended.responses if response.HasField("result")]
            assert (result.replayed, result.success) == (True, True)
            assert ended.node_id == "node1"
        await other.end()
        assert node.offers == 2, "one for each tenant"
        ended = await run(front.address, **key, command=["something", "else"])
        assert (ended.code, ended.details) == (
            Code.INVALID_ARGUMENT,
            "idempotency_key 'k' was used for another image or command",
        )
        assert sorted(front.outcomes) == ["completed", "completed", "rejected", "replayed", "replayed"]


async def test_a_run_without_a_result_is_run_again(node: TalkingNode) -> None:
    node.hold = True
    async with proxy(node) as front:
        key = {"idempotency_key": "k"}
        gone = await (await Caller(front.address, **key).start()).until_accepted()
        await node.seen.get()
        waiting = [await Caller(front.address, **key, progress=True).start() for _ in range(2)]
        for caller in waiting:
            await caller.next()
        await gone.cancel()
        broken = await node.seen.get()
        broken.error = Unavailable("the node is broken")
        broken.end.set()
        (await node.seen.get()).end.set()
        codes = [(await caller.end()).code for caller in waiting]
        assert sorted(code.name for code in codes) == ["OK", "UNAVAILABLE"]
        assert node.offers == 3


async def test_the_next_run_of_a_key_begins_when_the_node_has_cleared_up(node: TalkingNode) -> None:
    node.hold = True
    node.listed = ["node1-1"]
    async with proxy(node) as front:
        gone = await (await Caller(front.address, idempotency_key="k").start()).until_accepted()
        await node.seen.get()
        await gone.cancel()
        again = await Caller(front.address, idempotency_key="k").start()
        await until(lambda: node.lists >= 3)
        assert node.offers == 1, "the first one is still there"
        node.listed = ["another"]
        (await node.seen.get()).end.set()
        assert (await again.end()).kinds == ["accepted", "log", "result", "done"]


async def test_a_node_that_does_not_tell_has_cleared_up_after_the_lease(node: TalkingNode) -> None:
    node.pushes, node.hold = False, True
    async with proxy(node, lease_ttl=0.3) as front:
        gone = await (await Caller(front.address, idempotency_key="k").start()).until_accepted()
        await node.seen.get()
        began = time.monotonic()
        await gone.cancel()
        again = await Caller(front.address, idempotency_key="k").start()
        (await node.seen.get()).end.set()
        assert time.monotonic() - began >= 0.3
        assert (await again.end()).code is Code.OK


async def test_stopping_sends_those_that_wait_elsewhere(node: TalkingNode) -> None:
    async with proxy(node) as front, full(front, node):
        waiting = await Caller(front.address).start()
        await front.queued(1)
        front.dispatcher.close()
        ended: Ended = await waiting.end()
        assert (ended.code, ended.details) == (Code.UNAVAILABLE, "afs_proxy is being stopped")
        assert ended.fault is not None
        assert ended.fault.retryable
