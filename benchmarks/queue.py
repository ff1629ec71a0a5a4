"""The proxy's queue: many short runs at once from one client, for several tenants, on two small nodes."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.cluster import cluster

from afs.core.rpc import channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afs.proto.v1.afslet_pb2_grpc import AfsletAsyncStub

RUNS, TENANTS = 500, 5
CPUS = 2  # of each node
UNFAIR, MEMORY_MIB = 20.0, 150.0


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*."""
    reference = subjects.image(name).reference
    spread, rates, peaks, waits = [], [], [], []
    for _ in range(samples or 3):
        with cluster(2, cpus=CPUS) as running:
            assert running.cluster.proxy is not None
            pid = running.cluster.proxy.popen.pid
            ended, seconds, wait = asyncio.run(_burst(running.proxy, reference))
            peaks.append(_peak_mib(pid))
        rates.append(len(ended) / seconds)
        spread.append(unfairness(ended))
        waits.append(statistics.median(wait))
    series = [
        measure.Series("runs per second", "/s", rates),
        measure.Series("wait in the queue, median of the runs", "s", waits),
        measure.Series("unfairness at half time", "%", spread),
        measure.Series("afs_proxy's peak memory", "MiB", peaks),
    ]
    targets = [
        measure.Target("unfairness, worst sample", max(spread), UNFAIR, "%"),
        measure.Target("afs_proxy's peak memory, worst sample", max(peaks), MEMORY_MIB, "MiB"),
    ]
    notes = [
        (
            f"{RUNS} runs of /bin/true at once from one client, {RUNS // TENANTS} for each of {TENANTS} tenants, one tenant's after "
            f"the other's; {CPUS} CPUs on each of two nodes, one for each run. Every run has to succeed."
        ),
        (
            "Unfairness: of the runs that had ended when half of all had, how far the tenant that is farthest from an equal share "
            "is from it."
        ),
    ]
    return measure.Report("queue", f"{RUNS} runs in the queue of afs_proxy", series, targets, notes=notes)


def unfairness(ended: Sequence[str]) -> float:
    """*ended* are the tenants of the runs in the order of their ends; percent of an equal share."""
    half = ended[: len(ended) // 2]
    counts = Counter(half)
    share = len(half) / TENANTS
    return 100 * max(abs(counts[tenant] - share) for tenant in set(ended)) / share


async def _burst(address: str, reference: str) -> tuple[list[str], float, list[float]]:
    """The tenants in the order in which their runs ended, the seconds of all, and how long each waited in seconds."""
    ended: list[str] = []
    waits: list[float] = []
    async with channel(address) as opened:
        stub = AfsletStub(opened)

        async def one(tenant: str) -> None:
            sent = time.perf_counter()
            waits.append(await _true(stub, reference, tenant=tenant) - sent)
            ended.append(tenant)

        for node in ("node1", "node2"):  # the image is mounted before the clock starts
            await _true(stub, reference, node_id=node)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(RUNS):
                group.create_task(one(f"tenant{number * TENANTS // RUNS}"))
        return ended, time.perf_counter() - started, waits


async def _true(stub: AfsletAsyncStub, reference: str, **fields: str) -> float:
    """Run it to its `done`; it has to succeed. When it was accepted."""
    start = pb.StartRequest(image=reference, command=subjects.TRUE, cpu_cores=1, memory_mb=64, progress=True)
    for name, value in fields.items():
        setattr(start, name, value)
    call = stub.Execute()
    await call.write(pb.ExecuteRequest(start=start))
    await call.done_writing()
    accepted, done = 0.0, False
    async for response in call:
        if response.HasField("accepted"):
            accepted = time.perf_counter()
        if response.HasField("result") and not response.result.success:
            raise RuntimeError(f"{subjects.TRUE} failed: {response.result}")
        done = response.HasField("done")
    if not done:
        raise RuntimeError(f"a run ended without done: {await call.details()}")
    return accepted


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
