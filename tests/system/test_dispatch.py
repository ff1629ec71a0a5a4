"""The proxy's queue over real nodes: bursts, priorities, places, time-outs, limits, keys, peers, nodes that die."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from afs.core.cluster import Process, start_process
from afs.core.rpc import channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import proxy_pb2, runs_pb2
from afs.proto.v1.proxy_pb2_grpc import AfsProxyStub
from afs.proto.v1.runs_pb2_grpc import RunsStub
from afs.proxy import httpd
from tests.system.test_faults import fragile as fragile  # noqa: PLC0414 - a fixture
from tests.testbed.proxynodes import Caller, Ended, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root
Code = grpc.StatusCode
CPUS = 4  # of each node
GRACE = 10.0


class Bench:
    """Calls to one proxy, with one image."""

    def __init__(self, address: str, http: str, image: str) -> None:
        self.address, self.http, self.image = address, http, image

    async def begin(self, *command: str, timeout: float | None = None, **fields: Any) -> Caller:
        """Start a run."""
        wanted = {"image": self.image, "command": command or ["true"], **fields}
        return await Caller(self.address, **wanted).start(timeout=timeout)

    async def run(self, *command: str, **fields: Any) -> Ended:
        """One run to its end."""
        return await run(self.address, image=self.image, command=command or ["true"], **fields)

    async def status(self, query: str = "") -> dict[str, Any]:
        """What /status says."""
        document: dict[str, Any] = json.loads(await httpd.get(self.http, f"/status{query}", GRACE))
        return document

    async def queued(self, count: int) -> None:
        """Wait until so many wait."""
        async with asyncio.timeout(GRACE):
            while True:
                if (await self.status("?local=1"))["queue"]["queued"] == count:
                    return

    @asynccontextmanager
    async def full(self, nodes: tuple[str, ...] = ("node1", "node2"), each: int = 1) -> AsyncIterator[list[Caller]]:
        """Runs that take all of *nodes*, *each* of them on each, until they are cancelled."""
        async with AsyncExitStack() as stack:
            callers = []
            for node in nodes:
                for _ in range(each):
                    command = ("sh", "-c", "echo here; exec sleep 1000")
                    caller = await self.begin(*command, cpu_cores=CPUS // each, node_id=node, tenant="filler")
                    stack.push_async_callback(caller.cancel)
                    while not (await caller.next()).HasField("log"):
                        pass
                    callers.append(caller)
            yield callers


@pytest.fixture
def bench(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> Bench:
    """The shared cluster's proxy."""
    return Bench(shared_cluster.proxy, shared_cluster.proxy_http, busybox_image.reference)


@asynccontextmanager
async def another_proxy(
    cluster: RealCluster, image: BusyboxImage, directory: Path, *flags: str
) -> AsyncIterator[tuple[Bench, Process]]:
    """One more proxy over the cluster's nodes while the block runs."""
    assert cluster.cluster.discovery is not None
    arguments = ["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0"]
    arguments += [f"--discovery={cluster.cluster.discovery.address}"]
    arguments += [f"--afslet={node.afslet.address}" for node in cluster.nodes]
    process = await start_process("proxy", "afs.proxy", [*arguments, *flags], directory)
    try:
        yield Bench(process.address, process.http, image.reference), process
    finally:
        process.popen.terminate()
        await asyncio.to_thread(process.popen.wait)


async def test_a_burst_is_shared_fairly_between_tenants(bench: Bench) -> None:
    accepted: list[str] = []
    async with bench.full() as fillers:
        callers = [await bench.begin(cpu_cores=2, tenant=f"t{number // 10}") for number in range(40)]
        await bench.queued(40)

        async def follow(caller: Caller) -> Any:
            await caller.until_accepted()
            accepted.append(caller.start_request.tenant)
            return await caller.end()

        tasks = [asyncio.create_task(follow(caller)) for caller in callers]
        for filler in fillers:
            await filler.cancel()
        ended = [await task for task in tasks]
    assert [each.code for each in ended] == [Code.OK] * 40
    counts = Counter(accepted[:20])
    assert all(4 <= counts[f"t{number}"] <= 6 for number in range(4)), accepted


async def test_higher_priorities_come_first(bench: Bench) -> None:
    order: list[int] = []
    async with bench.full() as fillers:
        callers = [await bench.begin(cpu_cores=CPUS, node_id="node1", priority=priority) for priority in (-1, 0, 5)]
        await bench.queued(3)

        async def follow(caller: Caller) -> None:
            await caller.until_accepted()
            order.append(caller.start_request.priority)
            assert (await caller.end()).code is Code.OK

        tasks = [asyncio.create_task(follow(caller)) for caller in callers]
        await fillers[0].cancel()
        await asyncio.gather(*tasks)
    assert order == [5, 0, -1]


async def test_who_asks_is_told_the_place(bench: Bench) -> None:
    async with bench.full() as fillers:
        first = await bench.begin(progress=True, node_id="node1", cpu_cores=CPUS)
        assert (await first.next()).progress.position == 1
        second = await bench.begin(progress=True, node_id="node1")
        told = (await second.next()).progress
        assert (told.phase, told.position, told.queued) == (pb.Progress.PHASE_QUEUED, 2, 2)
        await fillers[0].cancel()
        for caller in (first, second):
            ended = await caller.end()
            assert ended.code is Code.OK
            assert ended.kinds.index("accepted") > ended.kinds.index("progress")


async def test_waiting_ends_in_time_with_a_typed_fault(bench: Bench) -> None:
    async with bench.full():
        ended = await bench.run(queue_timeout_ms=100)
        late = await (await bench.begin(timeout=0.5)).end()
    assert (ended.code, ended.details) == (
        Code.DEADLINE_EXCEEDED,
        "no node had 1 CPUs and 64 MiB free within the queue_timeout of 0.1 s",
    )
    assert (late.code, late.details) == (
        Code.DEADLINE_EXCEEDED,
        "no node had 1 CPUs and 64 MiB free before the call's deadline",
    )
    for each in (ended, late):
        assert each.fault is not None
        assert (each.fault.outcome, each.fault.retryable, each.fault.node_id) == (pb.OUTCOME_REJECTED, True, "")


async def test_a_queued_run_can_be_cancelled(bench: Bench) -> None:
    async with bench.full(), channel(bench.address) as opened:
        waiting = await bench.begin(tenant="a", labels={"job": "7"})
        await bench.queued(1)
        stub = RunsStub(opened)
        runs = (await stub.List(runs_pb2.ListRunsRequest())).runs
        (found,) = [each for each in runs if each.phase == "queued"]
        assert (found.tenant, found.image, dict(found.labels)) == ("a", bench.image, {"job": "7"})
        assert {each.node_id for each in runs if each is not found} == {"node1", "node2"}
        await stub.Cancel(runs_pb2.CancelRunRequest(run_id=found.run_id, reason="not needed"))
        ended = await waiting.end()
    assert (ended.code, ended.fault and ended.fault.outcome) == (Code.CANCELLED, pb.OUTCOME_CANCELLED)
    await bench.queued(0)


async def test_a_request_that_is_sent_again_runs_once(bench: Bench, tmp_path: Path) -> None:
    key: dict[str, Any] = {"tenant": "a", "idempotency_key": str(tmp_path)}
    first, again = [await bench.begin("sh", "-c", "echo $$; exit 3", **key) for _ in range(2)]
    ended = [await first.end(), await again.end(), await bench.run("sh", "-c", "echo $$; exit 3", **key)]
    results = [next(r.result for r in each.responses if r.HasField("result")) for each in ended]
    assert [result.exit_code for result in results] == [3, 3, 3]
    assert [each.kinds.count("log") for each in ended] == [1, 0, 0]
    assert [result.replayed for result in results] == [False, True, True]


async def test_status_follows_and_metrics_count(bench: Bench) -> None:
    async with bench.full() as fillers, channel(bench.address) as opened:
        waiting = await bench.begin(tenant="a")
        await bench.queued(1)
        call = AfsProxyStub(opened).Status(proxy_pb2.StatusRequest(include_afslets=True, follow_ms=100))
        summaries = []
        async for response in call:
            if response.HasField("summary"):
                summaries.append(response.summary)
                if len(summaries) == 1:
                    await fillers[0].cancel()
                elif not response.summary.queued:
                    break
        call.cancel()
        first = summaries[0]
        assert (first.queued, first.running, first.peers) == (1, 2, 0)
        assert {(each.tenant, each.queued, each.running) for each in first.tenants} == {("a", 1, 0), ("filler", 0, 2)}
        assert (await waiting.end()).code is Code.OK
    text = (await httpd.get(bench.http, "/metrics", GRACE)).decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['afs_proxy_runs_total{outcome="completed"}']) >= 1
    assert float(values["afs_proxy_queue_wait_seconds_count"]) >= 1
    assert float(values['afs_proxy_nodes{state="ready"}']) == 2
    assert await httpd.get(bench.http, "/healthz", GRACE) == b"ok\n"


async def test_two_proxies_know_of_each_other(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, bench: Bench, tmp_path: Path
) -> None:
    flags = (f"--peer={shared_cluster.proxy_http}", "--peer=127.0.0.1:1", "--max-queued=1")
    async with another_proxy(shared_cluster, busybox_image, tmp_path, *flags) as (other, process), bench.full():
        here, there = await bench.begin(), await other.begin()
        await bench.queued(1)
        await other.queued(1)
        refused = await other.run()
        assert (refused.code, refused.details) == (
            Code.RESOURCE_EXHAUSTED,
            "1 runs wait already: the proxy's limit is 1",
        )
        assert refused.fault is not None
        assert (refused.fault.outcome, refused.fault.retryable) == (pb.OUTCOME_REJECTED, True)
        status = await other.status()
        assert status["total"] == {"queued": 2, "running": 2}
        assert status["peers"]["answering"] == [shared_cluster.proxy_http]
        assert list(status["peers"]["unreachable"]) == ["127.0.0.1:1"]
        async with channel(other.address) as opened:
            responses = [r async for r in AfsProxyStub(opened).Status(proxy_pb2.StatusRequest())]
        assert (responses[0].summary.peers_queued, responses[0].summary.peers) == (1, 1)
        assert [r.error.source for r in responses if r.HasField("error")] == ["proxy 127.0.0.1:1"]
        process.popen.terminate()
        stopped = await there.end()
        assert (stopped.code, stopped.details) == (Code.UNAVAILABLE, "afs_proxy is being stopped")
        await here.cancel()


async def test_a_node_that_dies_takes_its_runs_with_it_and_no_others(
    fragile: RealCluster, busybox_image: BusyboxImage
) -> None:
    bench = Bench(fragile.proxy, fragile.proxy_http, busybox_image.reference)
    async with bench.full() as fillers:
        waiting = await bench.begin()
        pinned = await bench.begin(node_id="node1")
        await bench.queued(2)
        await asyncio.to_thread(fragile.kill, fragile.nodes[0].afslet)
        ended = await fillers[0].end()
        assert ended.code is Code.UNAVAILABLE
        assert ended.fault is not None
        assert ended.fault.outcome == pb.OUTCOME_INFRASTRUCTURE_ERROR
        assert (ended.fault.retryable, ended.fault.node_id) == (True, "node1")
        refused = await bench.run(node_id="node1")
        assert refused.code is Code.UNAVAILABLE
        assert refused.fault is not None
        assert refused.fault.outcome == pb.OUTCOME_REJECTED
        await fillers[1].cancel()
        ended = await waiting.end()
        assert (ended.code, ended.node_id) == (Code.OK, "node2")
        await fragile.restart(fragile.nodes[0].afslet)
        ended = await pinned.end()
        assert (ended.code, ended.node_id) == (Code.OK, "node1"), "it waited for the node to come back"


async def test_a_proxy_that_dies_ends_its_runs_and_leaves_nothing(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    async with another_proxy(shared_cluster, busybox_image, tmp_path) as (other, process), other.full() as fillers:
        waiting = await other.begin()
        await other.queued(1)
        process.popen.kill()
        for caller in (waiting, *fillers):
            assert (await caller.end()).code is Code.UNAVAILABLE
    with contextlib.suppress(ProcessLookupError):
        process.popen.kill()
