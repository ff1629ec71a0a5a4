"""A node's runs as its operator and its proxies see them: drains, the queue, the pushed status, lists, cancelling."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from afs.afslet.requests import image_hash
from afs.core.rpc import EOF, channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import runs_pb2
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from tests.testbed.leaseclient import start
from tests.testbed.leased import (
    FOREVER,
    GRACE,
    calling,
    fault_of,
    kill_sleep,
    other_flags,
    rest,
    runs_of,
    until_log,
)

if TYPE_CHECKING:
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root


async def test_drain(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    """What runs may end, what is new goes elsewhere, then afslet ends."""
    node = leased.nodes[0]
    address, image = node.afslet.address, busybox_image.reference
    async with runs_of(address) as runs, calling(address, start(image, "echo here; sleep 1000; exit 3")) as call:
        await until_log(call)
        watch = runs.Watch(runs_pb2.WatchRequest())
        assert not (await watch.read()).draining
        node.afslet.popen.terminate()
        status = await watch.read()
        assert (status.draining, status.running_containers) == (True, 1)
        async with calling(address, start(image, "true")) as refused:
            code, result = await fault_of(refused)
        assert (code, result.outcome, result.retryable) == (grpc.StatusCode.UNAVAILABLE, pb.OUTCOME_REJECTED, True)
        assert (result.error, result.node_id) == ("node node1 is draining", "node1")
        assert node.afslet.popen.poll() is None
        kill_sleep(leased)
        (ended,) = [response.result async for response in rest(call) if response.HasField("result")]
        assert ended.exit_code == 3
        while (status := await watch.read()) is not EOF:
            assert status.draining
    assert await asyncio.to_thread(node.afslet.popen.wait, GRACE) == 0
    assert not leased.left_by_runs(node)


async def test_who_does_not_want_to_wait_for_runs(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    node = leased.nodes[0]
    async with (
        runs_of(node.afslet.address) as runs,
        calling(node.afslet.address, start(busybox_image.reference, FOREVER)) as call,
    ):
        await until_log(call)
        watch = runs.Watch(runs_pb2.WatchRequest())
        await watch.read()
        node.afslet.popen.terminate()
        assert (await watch.read()).draining
        node.afslet.popen.terminate()
        code, result = await fault_of(call)
        assert (code, result.error) == (grpc.StatusCode.UNAVAILABLE, "node node1 is stopping")
        assert (result.outcome, result.retryable) == (pb.OUTCOME_INFRASTRUCTURE_ERROR, True)
    assert await asyncio.to_thread(node.afslet.popen.wait, GRACE) == 0
    assert not leased.left_by_runs(node)


async def test_drain_timeout(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    node = leased.nodes[0]
    async with other_flags(leased, "--drain-timeout=100ms"):
        async with calling(node.afslet.address, start(busybox_image.reference, FOREVER)) as call:
            await until_log(call)
            node.afslet.popen.terminate()
            code, result = await fault_of(call)
            assert (code, result.outcome) == (grpc.StatusCode.UNAVAILABLE, pb.OUTCOME_INFRASTRUCTURE_ERROR)
        assert await asyncio.to_thread(node.afslet.popen.wait, GRACE) == 0


async def test_drain_without_an_end(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    node = leased.nodes[0]
    async with runs_of(node.afslet.address) as runs:
        watch = runs.Watch(runs_pb2.WatchRequest())
        await watch.read()
        node.afslet.popen.send_signal(signal.SIGUSR1)
        assert (await watch.read()).draining
        async with calling(node.afslet.address, start(busybox_image.reference, "true")) as call:
            assert (await fault_of(call))[0] is grpc.StatusCode.UNAVAILABLE
        node.afslet.popen.send_signal(signal.SIGUSR2)
        assert not (await watch.read()).draining
        watch.cancel()
    async with calling(node.afslet.address, start(busybox_image.reference, "true")) as call:
        assert [response async for response in rest(call)][-1].HasField("done")


async def test_queue(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    """Two may wait on the node itself; who comes through a proxy waits there."""
    address, image = leased.nodes[0].afslet.address, busybox_image.reference
    whole = {"cpu_cores": 4, "progress": True}
    async with runs_of(address) as runs, calling(address, start(image, FOREVER, cpu_cores=4)) as running:
        held = await until_log(running)
        async with (
            calling(address, start(image, "echo one", **whole)) as one,
            calling(address, start(image, "echo two", priority=1, **whole)) as two,
        ):
            for call in (one, two):
                position = (await call.read()).progress
                assert (position.phase, position.position) == (pb.Progress.PHASE_QUEUED, 1)
            position = (await one.read()).progress
            assert (position.position, position.queued) == (2, 2)
            async with calling(address, start(image, "true", **whole)) as third:
                code, result = await fault_of(third)
                assert (code, result.outcome) == (grpc.StatusCode.RESOURCE_EXHAUSTED, pb.OUTCOME_REJECTED)
                assert result.error.endswith("but 0 CPUs and 3840 MiB are free, and 2 runs wait already")
            listed = (await runs.List(runs_pb2.ListRunsRequest())).runs
            assert [run.phase for run in listed] == ["running", "queued", "queued"]
            two.cancel()  # a waiting one whose client goes is gone at once
            position = (await one.read()).progress
            assert (position.position, position.queued) == (1, 1)
            await runs.Cancel(runs_pb2.CancelRunRequest(run_id=held.run_id))
            assert (await fault_of(running))[0] is grpc.StatusCode.CANCELLED
            found = [response async for response in rest(one)]
            assert found[0].HasField("accepted")
            (result,) = [response.result for response in found if response.HasField("result")]
            assert result.timings.queue_us > 0


async def test_deadlines_of_the_queue(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    address, image = leased.nodes[0].afslet.address, busybox_image.reference
    async with calling(address, start(image, FOREVER, cpu_cores=4)) as running:
        await until_log(running)
        async with calling(address, start(image, "true", queue_timeout_ms=50)) as call:
            code, result = await fault_of(call)
            assert (code, result.outcome) == (grpc.StatusCode.RESOURCE_EXHAUSTED, pb.OUTCOME_REJECTED)
            assert result.error == "no room for 1 CPUs and 256 MiB within 0.05 s"
        async with calling(address, start(image, "true"), timeout=0.2) as call:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with calling(address, start(image, "true"), metadata=(("afs-owner", "somebody"),)) as call:
            assert (await fault_of(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with channel(address) as opened:
            stub = AfsletStub(opened)
            deadline = time.monotonic() + GRACE
            while (await stub.GetRuntimeStatus(pb.GetRuntimeStatusRequest())).queued_runs:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)  # the client's clock and the node's are not one


async def test_watch_and_list(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    address = leased.nodes[0].afslet.address
    wanted = start(busybox_image.reference, FOREVER, cpu_millis=1500, disk_mb=7, tenant="t", labels={"a": "b"})
    async with runs_of(address) as runs:
        watch = runs.Watch(runs_pb2.WatchRequest(heartbeat_ms=60))
        before = await watch.read()
        assert before == await watch.read(), "a heartbeat"
        owner = (("afs-owner", "somebody"),)
        async with calling(address, wanted, metadata=owner) as call:
            accepted = await until_log(call)
            while (status := await watch.read()) == before:
                pass
            assert (status.running_containers, status.used_memory_mb, status.available_memory_mb) == (1, 256, 3840)
            assert (status.limit_cpu_millis, status.used_cpu_millis, status.used_disk_mb) == (4000, 1500, 7)
            assert (status.limit_cpu_cores, status.used_cpu_cores, status.available_cpu_cores) == (4, 2, 2)
            assert image_hash(wanted.start) in status.images
            (run,) = (await runs.List(runs_pb2.ListRunsRequest())).runs
            assert (run.run_id, run.node_id, run.phase) == (accepted.run_id, "node1", "running")
            assert (run.tenant, run.owner, dict(run.labels)) == ("t", "somebody", {"a": "b"})
            assert (run.image, list(run.command)) == (wanted.start.image, list(wanted.start.command))
            assert (run.cpu_millis, run.memory_mb) == (1500, 256)
            assert abs(run.started_unix_ms / 1000 - time.time()) < 60
        while (status := await watch.read()).running_containers:
            pass
        watch.cancel()


async def test_cancel(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    address = leased.nodes[0].afslet.address
    async with runs_of(address) as runs, calling(address, start(busybox_image.reference, FOREVER)) as call:
        run_id = (await until_log(call)).run_id
        await runs.Cancel(runs_pb2.CancelRunRequest(run_id=run_id, reason="enough"))
        code, result = await fault_of(call)
        assert (code, result.outcome, result.retryable) == (grpc.StatusCode.CANCELLED, pb.OUTCOME_CANCELLED, False)
        assert (result.error, result.node_id) == (f"run {run_id} was cancelled: enough", "node1")
        assert not leased.left_by_runs(leased.nodes[0]), "the call ended when all was given back"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await runs.Cancel(runs_pb2.CancelRunRequest(run_id=run_id))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "changes", [{"image": ""}, {"cpu_cores": 5}, {"pids_limit": 5000}], ids=["image", "CPUs", "processes"]
)
async def test_rejected(leased: RealCluster, busybox_image: BusyboxImage, changes: dict[str, Any]) -> None:
    wanted = start(busybox_image.reference, "true")
    for name, value in changes.items():
        setattr(wanted.start, name, value)
    async with calling(leased.nodes[0].afslet.address, wanted) as call:
        code, result = await fault_of(call)
        assert (code, result.outcome, result.retryable) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            pb.OUTCOME_REJECTED,
            False,
        )
        assert result.node_id == "node1"
