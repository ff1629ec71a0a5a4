"""The first run of an image on a node whose peer has all bytes: with a start trace, without, and from the unpacked tree on ext4.

Node 1 has the image, node 2 ran the command once and so recorded a trace, and every sample has a new node. Page caches are
emptied before the image is opened, so what the trace names is on its way while the image is mounted: *opening and W* is all
of that, *W* begins when the root is mounted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.cluster import cluster
from tests.testbed.registry import Registry

from afs.core.rpc import channel
from afs.proto.v1.layerstore_pb2 import CacheStatusRequest, TraceStatus
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.proto.v1.mounts_pb2 import OpenImage
from afs.snapshotter.client import Mounts
from benchmarks import lazy, measure, subjects

if TYPE_CHECKING:
    from tests.testbed.cluster import RealCluster

    from afs.core.cluster import NodeProcesses

SAMPLES = 5
LIMIT = 1.15
LOCAL = "W on ext4"
_RECORDED_S = 20.0


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*, which is img4."""
    image, taken = subjects.image(name), dict[str, list[float]]()
    work, numbers = image.commands["W"], itertools.count(2)
    demanded = []
    with (
        Registry() as registry,
        cluster(1, proxy=False, layerstore_flags=("--completion=never",)) as running,
    ):
        reference = image.push(registry)
        lazy.pull(running.nodes[0], reference)
        recorder = running.start_node(next(numbers))
        asyncio.run(_run(recorder, reference, work))
        recorded = asyncio.run(_recorded(recorder))
        for number in range(samples or SAMPLES):
            for how in ("with a trace", "no trace", LOCAL)[:: 1 if number % 2 else -1]:
                if how == LOCAL:
                    taken.setdefault(LOCAL, []).append(lazy.on_ext4(work))
                    continue
                node = _new_node(running, next(numbers), traces=how == "with a trace")
                opened, worked, status = asyncio.run(_run(node, reference, work))
                asyncio.run(lazy.stop_node(running, node))
                taken.setdefault(f"W, {how}", []).append(worked)
                taken.setdefault(f"opening and W, {how}", []).append(opened + worked)
                if status.enabled:
                    demanded.append(status.demanded_chunks)
    note = f"{recorded.demanded_chunks} chunks were demanded while the trace was recorded"
    return measure.Report(
        f"trace-{name}",
        f"The first run of W in {name} on a node whose peer has all bytes",
        measure.seconds(taken),
        [measure.ratio(taken, "W, with a trace", LOCAL, LIMIT)],
        notes=[
            f"{note}, with it {min(demanded)} to {max(demanded)}: those that were still on their way are among them."
        ],
    )


def _new_node(running: RealCluster, number: int, *, traces: bool) -> NodeProcesses:
    settings = running.cluster.settings
    flags = (*settings.layerstore_flags, "--traces" if traces else "--no-traces")
    running.cluster.settings = dataclasses.replace(settings, layerstore_flags=flags)
    try:
        return running.start_node(number)
    finally:
        running.cluster.settings = settings


async def _run(node: NodeProcesses, reference: str, work: tuple[str, ...]) -> tuple[float, float, TraceStatus]:
    """Seconds that opening and mounting the image took, and *work* in it; what the node says of traces then."""
    mounts = Mounts(f"unix:{node.run_dir}/mounts.sock")
    await mounts.stats()  # connected
    measure.drop_caches()
    started = time.perf_counter()
    async with mounts.holding() as hold:
        await hold.open(OpenImage(image=reference))
        root = Path((await hold.mount()).path)
        opened = time.perf_counter() - started
        worked = await asyncio.to_thread(lazy.timed, lazy.in_root(root, work))
        status = await _status(node)
    await mounts.close()
    return opened, worked, status


async def _status(node: NodeProcesses) -> TraceStatus:
    async with channel(f"unix:{node.run_dir}/layerstore.sock") as opened:
        return (await LayerstoreNodeStub(opened).CacheStatus(CacheStatusRequest())).traces


async def _recorded(node: NodeProcesses) -> TraceStatus:
    """When the node has announced its trace."""
    deadline = time.monotonic() + _RECORDED_S
    while not (found := await _status(node)).recorded:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no trace was recorded: {found}")
        await asyncio.sleep(0.05)
    return found
