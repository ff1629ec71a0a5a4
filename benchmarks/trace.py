"""The first run of an image whose bytes a peer has, with a start trace and without, against the same tree on a local ext4."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import unpackers
from tests.testbed.cluster import cluster

from afs.afslet.bundle import Process, merge_env, runtime_config
from afs.afslet.cgroups import clean_up
from afs.afslet.rootfs import User
from afs.core.rpc import channel
from afs.core.run import stop
from afs.proto.v1.layerstore_pb2 import CacheStatusRequest, TraceStatus
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.proto.v1.mounts_pb2 import OpenImage
from afs.snapshotter.client import Mounts
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.testbed.cluster import RealCluster

    from afs.core.cluster import NodeProcesses

SAMPLES = 5
LIMIT = 1.15
WITH, WITHOUT, LOCAL = "peer, with a trace", "peer, no trace", "ext4 tree"
_RECORDED_S = 20.0
_numbers = itertools.count(3)


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*, by the last of its commands. Node 1 has the bytes, node 2 recorded the trace."""
    image = subjects.image(name)
    label, command = list(image.commands.items())[-1]
    with ExitStack() as stack:
        tree = unpackers.umoci(image.layout, image.tag, stack.enter_context(_scratch()) / "tree")
        running = stack.enter_context(cluster(1, proxy=False))
        act = stack.enter_context(_runc())
        for node in (running.nodes[0], running.start_node(2)):
            with subjects.connected(node.afslet.address, proxy=False) as client:
                client.run(image.reference, command)
        recorded = _wait_for_trace(running.nodes[1])
        taken = measure.interleave(
            {
                WITH: lambda: _on_a_new_node(running, image.reference, lambda root: act(root, command), traces=True),
                WITHOUT: lambda: _on_a_new_node(
                    running, image.reference, lambda root: act(root, command), traces=False
                ),
                LOCAL: lambda: _on_a_tree(lambda: act(tree, command)),
            },
            samples or SAMPLES,
        )
    return measure.Report(
        f"trace-{name}",
        f"The first run of {label} in {name} on a node whose peer has all bytes",
        measure.seconds(taken),
        [measure.ratio(taken, WITH, LOCAL, LIMIT)],
        notes=[
            "From the opening of the image to the end of the command, on a node that has nothing; page caches empty.",
            f"The trace has what {recorded.demanded_chunks} chunks of 1 MiB were demanded on the node that recorded it.",
        ],
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="afs-bench-") as directory:
        yield Path(directory)


def _wait_for_trace(node: NodeProcesses) -> TraceStatus:
    async def status() -> TraceStatus:
        async with channel(f"unix:{node.run_dir}/layerstore.sock") as opened:
            return (await LayerstoreNodeStub(opened).CacheStatus(CacheStatusRequest())).traces

    deadline = time.monotonic() + _RECORDED_S
    while not (found := asyncio.run(status())).recorded:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no trace was recorded: {found}")
        time.sleep(0.05)
    return found


@contextmanager
def _on_a_tree(act: Callable[[], None]) -> Iterator[Callable[[], object]]:
    measure.drop_caches()
    yield act


@contextmanager
def _on_a_new_node(
    running: RealCluster, reference: str, act: Callable[[str], None], *, traces: bool
) -> Iterator[Callable[[], object]]:
    """A node with an empty cache, which is gone afterwards."""
    settings = running.cluster.settings
    flags = (*settings.layerstore_flags, "--traces" if traces else "--no-traces")
    running.cluster.settings = dataclasses.replace(settings, layerstore_flags=flags)
    node = running.start_node(next(_numbers))
    running.cluster.settings = settings
    with asyncio.Runner() as runner, ExitStack() as stack:

        async def connect() -> Mounts:
            mounts = Mounts(f"unix:{node.run_dir}/mounts.sock")
            await mounts.stats()
            return mounts

        mounts = runner.run(connect())
        stack.callback(lambda: runner.run(_end(running, node)))
        stack.callback(lambda: runner.run(mounts.close()))

        async def root() -> str:
            hold = await holding.__aenter__()
            await hold.open(OpenImage(image=reference))
            return (await hold.mount()).path

        holding = mounts.holding()
        stack.callback(lambda: runner.run(holding.__aexit__(None, None, None)))
        measure.drop_caches()
        yield lambda: act(runner.run(root()))


async def _end(running: RealCluster, node: NodeProcesses) -> None:
    for process in (node.afslet, node.snapshotter, node.layerstore):
        await stop(process.popen, 10)
    running.nodes.remove(node)
    shutil.rmtree(node.directory)


@contextmanager
def _runc() -> Iterator[Callable[[str | Path, tuple[str, ...]], None]]:
    """Runs a command in a root by `runc run`, with the configuration that afslet writes."""
    parent, names = f"afs-bench-{os.getpid()}", itertools.count()
    with _scratch() as directory:

        def act(root: str | Path, command: tuple[str, ...]) -> None:
            user = User(0, 0, (), "/root")
            process = Process(command, merge_env((), (), user.home), "/", user)
            config = runtime_config(process, str(root), 1024)
            name = f"bench{next(names)}"
            config["linux"]["cgroupsPath"] = f"/{parent}/{name}"
            (directory / "config.json").write_text(json.dumps(config))
            argv = ["runc", "--root", f"{directory}/state", "run", "--bundle", str(directory), name]
            done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        try:
            yield act
        finally:
            clean_up(parent)
